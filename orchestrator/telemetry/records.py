"""What a run writes down, a line each: a step's report (metrics.jsonl) and an event (events.jsonl). Plain JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """One optimizer step, as metrics.jsonl has it."""

    step: int
    time_unix_s: float
    loss: float
    """Nats per target token, over the global batch."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    step_s: float
    tokens: int
    """Trained on so far, this step included."""
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    mfu: float | None
    """Fraction of the accelerator's peak; None where the peak is unknown."""
    peak_bytes: int
    """GPU: allocated by torch; CPU: resident set of the process."""
    data_wait_s: float = 0.0
    engine_s: float = 0.0
    """Inside the engine's step function; what step_s has beyond it is orchestration."""
    skipped: bool = False
    """The loss scaler met an overflow: the samples are consumed, the weights unchanged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened, with its cause; a line of events.jsonl."""

    time_unix_s: float
    kind: str
    step: int | None = None
    cause: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


Record = TypeVar("Record", StepReport, Event)


def append(path: Path, record: StepReport | Event) -> None:
    """Adds one line by one write, so that several processes may append to one file.

    Where the last line is torn, because its writer was killed, the new one starts on a line of its own."""
    line = json.dumps(asdict(record)).encode() + b"\n"
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)


def read(path: Path, kind: type[Record]) -> Iterator[Record]:
    """The records of a file, oldest first. Lines torn by a kill are passed over, and keys that are not known."""
    if path.exists():
        with path.open("rb") as file:
            yield from parse(file, kind)


def parse(lines: Iterable[bytes], kind: type[Record]) -> Iterator[Record]:
    known = {f.name for f in fields(kind)}
    for line in lines:
        try:
            values = json.loads(line)
            yield kind(**{key: value for key, value in values.items() if key in known})
        except (ValueError, TypeError, AttributeError):
            continue


def steps(path: Path) -> list[StepReport]:
    """One report a step, in order: a step that was done again counts as it was done last."""
    return last_of_each_step(read(path, StepReport))


def last_of_each_step(reports: Iterable[StepReport]) -> list[StepReport]:
    return [report for _, report in sorted({report.step: report for report in reports}.items())]


class Tail(Generic[Record]):
    """Reads a growing file: each call gives the records added since the one before."""

    def __init__(self, path: Path, kind: type[Record], *, from_end: bool = False) -> None:
        self.path = path
        self.kind: type[Record] = kind
        self._position = path.stat().st_size if from_end and path.exists() else 0
        self._rest = b""

    def new(self) -> list[Record]:
        try:
            with self.path.open("rb") as file:
                file.seek(self._position)
                chunk = file.read()
        except FileNotFoundError:
            return []
        self._position += len(chunk)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return list(parse(lines, self.kind))
