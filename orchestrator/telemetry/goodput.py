"""The goodput of a run, or where its time went: buckets that sum to its wall time. Pure: fed with records, in the order of
their times."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.telemetry.records import Event, StepReport

BUCKETS = ("training", "redone", "data_wait", "evaluation", "checkpoint", "starting", "recovering", "other")
"""training: steps done for the first time. redone: steps again, after a restart. starting: from the command to the first
step. recovering: from the last sign of life before a failure to the first step after it. checkpoint: training stood still
for the copy. other: between steps and named by none of these."""
ENDS = ("finished", "stopped", "failed", "lost")


@dataclass(kw_only=True)
class Ledger:
    """Feed it records; each call gives the seconds that it adds, by bucket.

    Within a command it goes by the machine's monotonic clock, so that a clock that is set books nothing; what lies between two
    commands is not counted. Files from before records had that clock go by Unix time."""

    _at: float | None = None
    """Until when all time of this command is accounted for, by the clock of `when`."""
    _waiting: str | None = None
    """starting or recovering, until the next step; None while steps come, or between two commands."""
    _step: int = 0
    _paused: dict[str, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 0.0))

    def take(self, record: StepReport | Event) -> dict[str, float]:
        return self.step(record) if isinstance(record, StepReport) else self.event(record)

    def event(self, event: Event) -> dict[str, float]:
        if event.kind == "run":
            self._at, self._waiting = when(event), "starting"  # time between two commands is nobody's
        if event.kind == "evaluation":
            self._pause("evaluation", event.details.get("seconds", 0.0))
        elif event.kind == "checkpoint":
            self._pause("checkpoint", event.details.get("blocked_s", 0.0))
        elif event.kind == "restart":
            spent = self._pass_to(when(event), "recovering")
            self._waiting = "recovering"
            return spent
        elif event.kind in ENDS:
            return self._pass_to(when(event), self._waiting or "other")
        return {}

    def step(self, report: StepReport) -> dict[str, float]:
        began = when(report) - report.step_s
        spent = self._pass_to(began, self._waiting or "other")
        self._waiting = None
        kind = "training" if report.step > self._step else "redone"
        self._step = max(self._step, report.step)
        left = max(0.0, when(report) - (began if self._at is None else max(self._at, began)))
        waited = min(report.data_wait_s, left)
        self._at = max(when(report), self._at or 0.0)
        self._add(spent, {"data_wait": waited, kind: left - waited})
        return spent

    def _pause(self, bucket: str, seconds: float) -> None:
        self._paused[bucket] = self._paused.get(bucket, 0.0) + float(seconds)

    def _pass_to(self, until: float, bucket: str) -> dict[str, float]:
        """All time up to `until`: pauses that were told of first, the rest to the bucket."""
        left = 0.0 if self._at is None else max(0.0, until - self._at)
        self._at = until if self._at is None else max(until, self._at)
        spent: dict[str, float] = {}
        for name, seconds in self._paused.items():
            part = min(seconds, left)
            left -= part
            self._add(spent, {name: part})
        self._paused = {}
        self._add(spent, {bucket: left})
        return spent

    def _add(self, spent: dict[str, float], parts: dict[str, float]) -> None:
        for bucket, seconds in parts.items():
            spent[bucket] = spent.get(bucket, 0.0) + seconds
            self.totals[bucket] += seconds


def when(record: StepReport | Event) -> float:
    """Seconds by the clock that a ledger goes by."""
    return record.time_unix_s if record.monotonic_s is None else record.monotonic_s


def in_order(
    reports: Iterable[StepReport], events: Iterable[Event], boots: dict[str, int] | None = None
) -> list[StepReport | Event]:
    """Both files as one history. Each is in order already; between them, a monotonic time is compared with those of the same
    start of the machine alone, and the starts follow each other as in the files. `boots` keeps their order from piece to piece
    of a history."""
    boots = {} if boots is None else boots
    records: list[StepReport | Event] = [*events, *reports]
    for record in records:
        boots.setdefault(record.boot, len(boots))
    return sorted(records, key=lambda record: (boots[record.boot], when(record)))


def ledger_of(reports: Iterable[StepReport], events: Iterable[Event]) -> Ledger:
    """The ledger of a finished or running run, from its files."""
    ledger = Ledger()
    for record in in_order(reports, events):
        ledger.take(record)
    return ledger
