"""Journal of what a Self-Instruct run has decided, a JSON line each, on the disk before the next request: the run goes on from it
after any death, and the samples are derived from it.

    OUT            the samples, Alpaca's {instruction, input, output} with their provenance; what `task: sft` reads
    OUT.journal    begin, then of every round its proposals, then a line for each of them: accepted or rejected, and why
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clusters.files import sync_folder
from orchestrator.training.data import DataError

VERSION = 1


@dataclass(kw_only=True)
class State:
    """State of a run: the fold of its journal."""

    generated: list[list[str]] = field(default_factory=list)
    """Accepted instructions, by round."""
    candidates: list[str] = field(default_factory=list)
    """Candidates of the last round."""
    shown: list[str] = field(default_factory=list)
    """Instructions that its prompt showed."""
    num_decided: int = 0
    """Candidates of the last round that are decided."""
    num_accepted: int = 0
    num_samples: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Candidates that were left out, by reason."""

    @property
    def num_rounds(self) -> int:
        return len(self.generated)

    def apply(self, event: Mapping[str, Any]) -> None:
        """Takes one line of the journal in."""
        match event["event"]:
            case "propose":
                self.generated.append([])
                self.candidates, self.shown, self.num_decided = event["candidates"], event["shown"], 0
            case "accept":
                self.generated[-1].append(event["instruction"])
                self.num_decided += 1
                self.num_accepted += 1
                self.num_samples += len(event["instances"])
            case "reject":
                self.rejected[event["reason"]] += 1
                self.num_decided += 1


class Journal:
    """The files of a run, open for one process."""

    def __init__(self, out: Path, journal: int, samples: int, state: State, begun: dict[str, Any]) -> None:
        self.out, self.state = out, state
        self._journal, self._samples, self._begun = journal, samples, begun

    def record(self, event: dict[str, Any]) -> None:
        """Writes a decision down, then what follows from it."""
        _append(self._journal, _line(event))
        if event["event"] == "accept":
            _append(self._samples, samples_of(event, self._begun))
        self.state.apply(event)


def journal_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.journal")


@contextmanager
def opened(out: Path, begun: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of OUT, made or gone on with. DataError where OUT is another's, was changed, or is in use.

    Args:
        begun: what the run's course depends on; the run goes on only where it is what it began with.
    """
    begin = {"event": "begin", "version": VERSION, **begun}
    file = journal_of(out)
    if out.exists() and not file.exists():
        raise DataError(
            f"{out} is there already, and no Self-Instruct run left it ({file.name} is missing): name another file"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process goes on with {out}") from None
        events = _read(descriptor, file)
        if not events:
            _append(descriptor, _line(begin))
            events = [begin]
        if events[0] != begin:
            raise DataError(_differs(out, events[0], begin))
        samples = _open_samples(
            out, "".join(samples_of(event, begin) for event in events if event["event"] == "accept")
        )
        sync_folder(out.parent)
        try:
            state = State()
            for event in events:
                state.apply(event)
            yield Journal(out, descriptor, samples, state, begin)
        finally:
            os.close(samples)
    finally:
        os.close(descriptor)


def samples_of(event: Mapping[str, Any], begun: Mapping[str, Any]) -> str:
    """The lines of OUT that an accepted task gives, an instance each."""
    provenance = {
        "generator": begun["generator"],
        "seed": begun["seed"],
        **{key: event[key] for key in ("round", "candidate", "is_classification", "nearest", "similarity")},
    }
    return "".join(
        _line({"instruction": event["instruction"], **instance, "provenance": provenance})
        for instance in event["instances"]
    )


def _read(descriptor: int, file: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal. A last one that a death cut short is cut off."""
    raw = b""
    while part := os.pread(descriptor, 2**22, len(raw)):
        raw += part
    whole = raw[: raw.rfind(b"\n") + 1]
    os.ftruncate(descriptor, len(whole))
    events = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            event = json.loads(line)
            State(generated=[[]]).apply(event)
        except (ValueError, LookupError, TypeError):
            raise DataError(f"{file}:{number} was altered: it is no line of a journal. Name another OUT") from None
        events.append(event)
    return events


def _open_samples(out: Path, wanted: str) -> int:
    """OUT, completed to what the journal says: a death may have come between the two."""
    descriptor = os.open(out, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    held, text = out.read_bytes(), wanted.encode()
    if not text.startswith(held):
        os.close(descriptor)
        raise DataError(
            f"{out} was changed since the run wrote it: move it and its journal away, or put it back as it was to go on"
        )
    _append(descriptor, text[len(held) :].decode("utf-8", errors="surrogateescape"))
    return descriptor


def _append(descriptor: int, text: str) -> None:
    rest = text.encode("utf-8", errors="surrogateescape")
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _differs(out: Path, had: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    changed = [f"{key} {had.get(key)} then and {value} now" for key, value in wanted.items() if had.get(key) != value]
    return f"{out} was begun otherwise: {'; '.join(changed)}. Name another OUT, or say the same as then"
