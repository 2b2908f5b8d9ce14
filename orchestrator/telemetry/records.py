"""The records that a run writes down, a line each: a step's report (metrics.jsonl) and an event (events.jsonl). Plain JSON."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
END_BYTES = 2**16
"""Bytes that are read to know how far a run is."""


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
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further numbers that the task tells, by name: of reward and dpo accuracy and margin, of ppo reward, kl, kl_coefficient,
    response_tokens, clipped, value_loss and critic_gradient_norm."""
    monotonic_s: float | None = None
    """Time at which it was written down, by a clock that nobody sets; it counts from a start of the machine. None: an older
    file."""
    boot: str = ""
    """Name of the start of the machine that the time counts from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened, with its cause; a line of events.jsonl."""

    time_unix_s: float
    kind: str
    step: int | None = None
    cause: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    monotonic_s: float | None = None
    """Time as in StepReport."""
    boot: str = ""


Record = TypeVar("Record", StepReport, Event)


def append(path: Path, record: StepReport | Event) -> None:
    """Adds a record as one line. Raises OSError where the disk refuses it; `journal.Journal` never does."""
    append_line(path, encode(record))


def encode(record: StepReport | Event) -> bytes:
    """A record as a line of JSON. JSON knows no NaN and no infinity: such a number becomes null, and `not_finite` of the line
    says which one it was, by its place: {"loss": null, "not_finite": {"loss": "nan"}}."""
    odd: dict[str, str] = {}
    values = finite(asdict(record), odd)
    return json.dumps(values | {"not_finite": odd} if odd else values, allow_nan=False).encode() + b"\n"


def append_line(path: Path, line: bytes) -> None:
    """Adds one line by one write, so that several processes may append to one file. Raises OSError where not all of it
    could be written.

    Where the last line is torn, because its writer was killed or the disk was full, the new one starts on a line of its own:
    looked at before, and once more after the write, since another process may have torn one in between."""
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end and _before(file, end) != b"\n":
            line = b"\n" + line
        while True:
            if (written := file.write(line)) != len(line):
                raise _refused(path, written)
            start = file.tell() - len(line)
            if line.startswith(b"\n") or start == 0 or _before(file, start) == b"\n":
                return
            line = b"\n" + line  # what was just written is the rest of a torn line, which readers pass over


def _before(file: Any, position: int) -> bytes:
    return os.pread(file.fileno(), 1, position - 1)


def _refused(path: Path, written: int) -> OSError:
    """A write that was cut short says no reason; where nothing else limits it, the disk is full."""
    return OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({written} bytes of a line were written)", str(path))


def finite(value: Any, odd: dict[str, str] | None = None, place: str = "") -> Any:
    """A copy of a value made of mappings, sequences and numbers in which null stands for every number that JSON does not know;
    `odd` gets them, by place."""
    if isinstance(value, float) and not math.isfinite(value):
        if odd is not None:
            odd[place] = str(value)
        return None
    inside = f"{place}/" if place else ""
    if isinstance(value, Mapping):
        return {key: finite(each, odd, f"{inside}{key}") for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each, odd, f"{inside}{index}") for index, each in enumerate(value)]
    return value


def _restore(values: dict[str, Any], odd: Mapping[str, str]) -> None:
    """The inverse of `finite`, in place."""
    for place, number in odd.items():
        *way, last = place.split("/")
        holder: Any = values
        for key in way:
            holder = holder[int(key) if isinstance(holder, list) else key]
        holder[int(last) if isinstance(holder, list) else last] = float(number)


def read(path: Path, kind: type[Record]) -> Iterator[Record]:
    """The records of a file, oldest first. Lines torn by a kill or a full disk are passed over, and keys that are not known."""
    if path.exists():
        with path.open("rb") as file:
            yield from parse(file, kind)


def parse(lines: Iterable[bytes], kind: type[Record]) -> Iterator[Record]:
    known = {f.name for f in fields(kind)}
    for line in lines:
        try:
            values = json.loads(line)  # older files have NaN and Infinity, which Python reads
            _restore(values, values.pop("not_finite", {}))
            yield kind(**{key: value for key, value in values.items() if key in known})
        except (ValueError, TypeError, AttributeError, LookupError):
            continue


def recent(path: Path) -> list[StepReport]:
    """The last reports of a metrics.jsonl, a hundred or more, oldest first, from the end of the file alone."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - END_BYTES))
            return list(parse(file, StepReport))
    except OSError:
        return []


def steps(path: Path) -> list[StepReport]:
    """One report a step, in order: a step that was done again counts as it was done last."""
    return last_of_each_step(read(path, StepReport))


def last_of_each_step(reports: Iterable[StepReport]) -> list[StepReport]:
    return [report for _, report in sorted({report.step: report for report in reports}.items())]


class Tail(Generic[Record]):
    """Reads a growing file: each call gives the records added since the one before, from `most_bytes` at most."""

    def __init__(
        self, path: Path, kind: type[Record], *, from_end: bool = False, most_bytes: int | None = None
    ) -> None:
        self.path = path
        self.kind: type[Record] = kind
        self.at_end = True
        """The last call read as far as the file went."""
        self._most = -1 if most_bytes is None else most_bytes
        self._position = path.stat().st_size if from_end and path.exists() else 0
        self._rest = b""

    def new(self) -> list[Record]:
        try:
            with self.path.open("rb") as file:
                file.seek(self._position)
                chunk = file.read(self._most)
        except OSError:  # not there yet, or a disk in trouble: the next look tries again
            self.at_end = True
            return []
        self.at_end = len(chunk) != self._most
        self._position += len(chunk)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return list(parse(lines, self.kind))
