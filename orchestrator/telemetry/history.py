"""The history of a run, read from its two files piece by piece: what a report needs of it, in a few numbers a step."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.telemetry.goodput import Ledger, in_order
from orchestrator.telemetry.records import EVENTS, METRICS, Event, StepReport, Tail

PIECE_BYTES = 2**20
"""Read at once: records of a piece are objects, records of a history are eight bytes a number."""
COLUMNS = (
    "step",
    "loss",
    "learning_rate",
    "gradient_norm",
    "step_s",
    "tokens",
    "tokens_per_second_per_gpu",
    "mfu",
    "peak_bytes",
    "data_wait_s",
    "engine_s",
    "skipped",
)


class Steps:
    """Reports of steps as columns; an unknown number is NaN."""

    def __init__(self, columns: dict[str, NDArray[np.float64]]) -> None:
        self.columns = columns

    @classmethod
    def of(cls, reports: Iterable[StepReport]) -> Steps:
        history = Columns()
        history.add(reports)
        return history.steps()

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.columns["step"])

    def where(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Steps:
        return Steps({name: values[chosen] for name, values in self.columns.items()})

    def last_of_each(self) -> Steps:
        """One report a step, in order: a step that was done again counts as it was done last."""
        step = self["step"]
        if len(step) == 0 or bool(np.all(step[1:] > step[:-1])):
            return self
        _, from_end = np.unique(step[::-1], return_index=True)
        return self.where(len(step) - 1 - from_end)


class Columns:
    """Columns that grow."""

    def __init__(self) -> None:
        self._values = {name: array("d") for name in COLUMNS}

    def add(self, reports: Iterable[StepReport]) -> None:
        for report in reports:
            for name, values in self._values.items():
                value = getattr(report, name)
                values.append(float("nan") if value is None else value)

    def steps(self) -> Steps:
        return Steps({name: np.array(values, dtype=np.float64) for name, values in self._values.items()})


class History:
    """The contents of a run folder's files at the last `update`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[Event] = []
        self.ledger = Ledger()
        self._columns = Columns()
        self._steps_file: Tail[StepReport] = Tail(folder / METRICS, StepReport, most_bytes=PIECE_BYTES)
        self._events_file: Tail[Event] = Tail(folder / EVENTS, Event)
        self._boots: dict[str, int] = {}
        self._ahead: list[Event] = []
        """Events later than the last report that was read: the ledger wants them after the reports before them."""

    def update(self) -> None:
        """Reads what was added since the update before."""
        self._read_events()
        while True:
            reports = self._steps_file.new()
            self._columns.add(reports)
            self._account(reports)
            if self._steps_file.at_end:
                break
        self._read_events()
        for event in self._ahead:
            self.ledger.event(event)
        self._ahead = []

    def steps(self) -> Steps:
        """All that was done, in the order in which it was done."""
        return self._columns.steps()

    def _read_events(self) -> None:
        new = self._events_file.new()
        self.events += new
        self._ahead += new

    def _account(self, reports: list[StepReport]) -> None:
        """The reports, and the events between them."""
        records = in_order(reports, self._ahead, self._boots)
        last = max((at for at, record in enumerate(records) if isinstance(record, StepReport)), default=-1)
        self._ahead = [record for record in records[last + 1 :] if isinstance(record, Event)]
        for record in records[: last + 1]:
            self.ledger.take(record)
