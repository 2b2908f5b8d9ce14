"""What is wrong with a job: each fault says what, where and how to fix it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypedDict

MAPPING = "<mapping>"
"""The file of a job that came as a Python mapping."""


Keys = tuple[str | int, ...]
"""The keys and list indices that lead to a value."""
Spot = tuple[int, int]
"""Line and column, from 1."""


class ErrorEntry(TypedDict):
    """One fault, as SpecError.errors and `validate --json` show it."""

    file: str
    line: int | None
    column: int | None
    message: str
    fix: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A fault and the keys that lead to it. `of_key`: the key itself is wrong, not its value."""

    path: Keys = ()
    message: str
    fix: str
    of_key: bool = False
    line: int | None = None
    column: int | None = None


class SpecError(ValueError):
    """A job that cannot be: all of its faults at once."""

    exit_code = 2

    def __init__(self, errors: Sequence[ErrorEntry]) -> None:
        self.errors: list[ErrorEntry] = list(errors)
        super().__init__("\n".join(_text(error) for error in self.errors))

    def __reduce__(self) -> tuple[type[SpecError], tuple[list[ErrorEntry]]]:
        return SpecError, (self.errors,)


def dotted(path: Sequence[str | int]) -> str:
    """strategy.mesh_order[1]"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def nearest(word: object, known: Sequence[str]) -> str | None:
    """The known word that was probably meant."""
    matches = get_close_matches(str(word).lower(), known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def place(error: ErrorEntry) -> str:
    """jobs/opt.yaml:14:3"""
    return ":".join(str(part) for part in (error["file"], error["line"], error["column"]) if part is not None)


def _text(error: ErrorEntry) -> str:
    return f"{place(error)}: {error['message']}\n  to fix: {error['fix']}"
