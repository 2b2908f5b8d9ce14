"""The log of one rank, `shardwise logs RUN --rank N`: how its start went, events, and steps now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

from orchestrator.telemetry.records import Event, StepReport

LOG = logging.getLogger("shardwise.rank")
FIRST_STEPS = 5
"""First steps of a process: each has a line. After them, a line every so many seconds."""
EVERY_S = 10.0


def begin() -> None:
    """Sends the lines to standard error, which is the rank's log; without it, as in tests, nothing is shown."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    LOG.handlers = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    logging.raiseExceptions = False  # a full disk takes no log and stops no training


class Logged:
    """Passes reports on, and writes of each event and of some steps a line."""

    def __init__(
        self, report: Callable[[StepReport | Event], None], *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._report, self._now = report, now
        self._num_steps, self._said_at = 0, now()

    def __call__(self, record: StepReport | Event) -> None:
        self._report(record)
        if isinstance(record, Event):
            LOG.info("step %s  %s: %s", record.step, record.kind, record.cause)
            return
        self._num_steps += 1
        if self._num_steps > FIRST_STEPS and self._now() - self._said_at < EVERY_S:
            return
        self._said_at = self._now()
        LOG.info(
            "step %d  loss %.4f, %.3g s, of which %.3g s waiting for data; at most %.0f MiB so far",
            *(record.step, record.loss, record.step_s, record.data_wait_s, record.peak_bytes / 2**20),
        )
