"""A worker's signs of life: what its training thread is doing, for a look from another thread of the same process."""

from __future__ import annotations

import linecache
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

Phase = Literal["rendezvous", "setup", "data", "step", "agreement", "report", "evaluation", "checkpoint", "end"]
NUM_FRAMES = 6
"""Innermost calls of the training thread that a sign names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """The sign that one rank gave of itself at one look."""

    count: int
    """Grows with every phase that is entered; the same number twice is no new sign of life."""
    phase: Phase
    step: int
    """The step that the phase belongs to."""
    calls: tuple[str, ...] = ()
    """Innermost calls of the training thread, outermost first: file:line function."""
    waits: bool = False
    """The rank waits inside a collective, as far as the calls show: for another rank, that is."""

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Sign:
        return cls(**{**mapping, "calls": tuple(mapping["calls"])})


class Pulse:
    """Written by the training thread alone; to enter a phase is one assignment, which nothing can block."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._now: tuple[int, str, int] = (0, "rendezvous", 0)

    def enter(self, phase: Phase, step: int = 0) -> None:
        self._now = (self._now[0] + 1, phase, step)

    def sign(self) -> Sign:
        """Called from another thread."""
        count, phase, step = self._now
        calls: list[str] = []
        frame = sys._current_frames().get(self._thread)
        innermost = frame
        while frame is not None and len(calls) < NUM_FRAMES:
            path = "/".join(frame.f_code.co_filename.split("/")[-2:])
            calls.append(f"{path}:{frame.f_lineno} {frame.f_code.co_name}")
            frame = frame.f_back
        waits = False
        if innermost is not None:
            file, line = innermost.f_code.co_filename, innermost.f_lineno
            waits = "/torch/distributed/" in file or ".wait(" in linecache.getline(file, line)
        return Sign(
            count=count,
            phase=cast(Phase, phase),
            step=step,
            calls=tuple(reversed(calls)),
            waits=waits and phase != "data",
        )
