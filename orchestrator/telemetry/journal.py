"""Writes a run's records where the disk may refuse them: what cannot be written is kept, and written once there is room."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from orchestrator.telemetry.records import EVENTS, METRICS, Event, StepReport, append_line, encode


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
    except OSError:
        return "unknown"


BOOT = _boot()
"""Name of this start of the machine: monotonic times are compared within one alone."""
KEPT_BYTES = 32 * 2**20
"""Bytes of records that a disk refuses, in memory: about 80,000 steps."""


class Journal:
    """Appends records to the files of a run folder; a disk that is full or broken never raises out of it.

    Records are kept in their order while the disk refuses them and written with the next record that it takes. The event
    `records_delayed` then says from when to when that was and how many were lost beyond the limit of memory: the oldest steps
    first, events last."""

    def __init__(
        self,
        folder: Path,
        *,
        on_refusal: Callable[[OSError], None] = lambda error: None,
        kept_bytes: int = KEPT_BYTES,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.folder, self.on_refusal, self.kept_bytes, self.now = folder, on_refusal, kept_bytes, now
        self._kept: deque[tuple[str, bytes]] = deque()
        self._size = 0
        self._refusal: OSError | None = None
        self._since = 0.0
        self._num_delayed = self._num_lost = 0

    def write(self, record: StepReport | Event) -> None:
        """Appends the record, after those that wait; the journal's clock stands in it."""
        record = replace(record, monotonic_s=time.monotonic(), boot=BOOT)
        self._keep(METRICS if isinstance(record, StepReport) else EVENTS, encode(record))
        self._drain()

    def sync(self) -> str | None:
        """Brings what was written onto the disk itself, so that a power cut does not take it. Where something is not there,
        says what and why."""
        self._drain()
        refusal = self._refusal
        for name in (METRICS, EVENTS):
            try:
                file = os.open(self.folder / name, os.O_RDONLY)
            except FileNotFoundError:
                continue
            except OSError as error:
                refusal = refusal or error
                continue
            try:
                os.fsync(file)
            except OSError as error:
                refusal = refusal or error
            finally:
                os.close(file)
        if refusal is None:
            return None
        waiting = f"{len(self._kept)} records are in memory alone" if self._kept else "records may not be on the disk"
        return f"{waiting}: {told(refusal)}"

    def _keep(self, name: str, line: bytes) -> None:
        self._kept.append((name, line))
        self._size += len(line)
        if self._refusal is not None:
            self._num_delayed += 1
        while self._size > self.kept_bytes and len(self._kept) > 1:
            at = next((at for at, (kept, _) in enumerate(self._kept) if kept == METRICS), 0)
            self._size -= len(self._kept[at][1])
            del self._kept[at]
            self._num_lost += 1

    def _drain(self) -> None:
        while self._kept:
            name, line = self._kept[0]
            try:
                append_line(self.folder / name, line)
            except OSError as error:
                self._refuse(error)
                return
            self._kept.popleft()
            self._size -= len(line)
            if not self._kept and self._refusal is not None:
                over = replace(self._over(self._refusal), monotonic_s=time.monotonic(), boot=BOOT)
                self._keep(EVENTS, encode(over))

    def _refuse(self, error: OSError) -> None:
        if self._refusal is not None:
            return
        self._refusal, self._since = error, self.now()
        self._num_delayed, self._num_lost = len(self._kept), 0
        self.on_refusal(error)

    def _over(self, refusal: OSError) -> Event:
        """The disk takes records again."""
        until, self._refusal = self.now(), None
        clocks = [time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at)) for at in (self._since, until)]
        lost = f"{self._num_lost} of them are lost" if self._num_lost else "none is lost"
        return Event(
            time_unix_s=until,
            kind="records_delayed",
            cause=f"{told(refusal)}, from {clocks[0]} to {clocks[1]} UTC: {self._num_delayed} records waited in memory, {lost}",
            details={
                "from_unix_s": self._since,
                "to_unix_s": until,
                "num_delayed": self._num_delayed,
                "num_lost": self._num_lost,
            },
        )


def told(error: OSError) -> str:
    """Return what the disk said and about which file, for a person."""
    what = error.strerror or str(error)
    return f"{Path(str(error.filename)).name}: {what}" if error.filename else what
