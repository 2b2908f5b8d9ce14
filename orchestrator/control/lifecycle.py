"""A job's life under the service, as a table of states and moves. Pure.

    queued -> planned -> placing -> starting -> running <-> recovering -> succeeded | failed | cancelled      (and paused)

A *driven* job has a supervisor and GPUs; only the holder of its newest fencing token moves it. Any other job is moved by the
controller, or at once by what a user asks of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

LEASE_S = 20.0
"""Seconds after which a supervisor that did not renew its lease counts as lost."""


class State(StrEnum):
    QUEUED = "queued"
    """Waits to be planned."""
    PLANNED = "planned"
    """Has a plan that fits, and waits for its GPUs."""
    PLACING = "placing"
    """Has its GPUs; its supervisor is being started."""
    STARTING = "starting"
    """Its supervisor prepares data and starts workers."""
    RUNNING = "running"
    """Trains: steps are being done."""
    RECOVERING = "recovering"
    """A failure is being answered; no step has been done since."""
    PAUSED = "paused"
    """Stopped by a user until it is resumed."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Ask(StrEnum):
    """What is asked of a driven job; its supervisor carries it out. A later value overrides an earlier one in this order."""

    PREEMPT = "preempt"
    """Checkpoint, give the GPUs back and wait in the queue again."""
    PAUSE = "pause"
    CANCEL = "cancel"


WAITING = frozenset({State.QUEUED, State.PLANNED})
DRIVEN = frozenset({State.PLACING, State.STARTING, State.RUNNING, State.RECOVERING})
ENDED = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})

_STOPS = frozenset({State.QUEUED, State.PAUSED, State.SUCCEEDED, State.FAILED, State.CANCELLED})
"""Where a supervisor can leave a job; queued after a preemption, or when its supervisor is lost."""

MOVES: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.PLANNED, State.FAILED, State.PAUSED, State.CANCELLED}),
    State.PLANNED: frozenset({State.QUEUED, State.PLACING, State.FAILED, State.PAUSED, State.CANCELLED}),
    State.PLACING: frozenset({State.STARTING}) | _STOPS,
    State.STARTING: frozenset({State.RUNNING, State.RECOVERING}) | _STOPS,
    State.RUNNING: frozenset({State.RECOVERING}) | _STOPS,
    State.RECOVERING: frozenset({State.RUNNING}) | _STOPS,
    State.PAUSED: frozenset({State.QUEUED, State.CANCELLED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset({State.QUEUED}),
    State.CANCELLED: frozenset(),
}
"""State -> the states that may follow it. A failed job goes back into the queue only when a user resumes it."""

STOPPED_AS: Mapping[Ask, State] = {
    Ask.PREEMPT: State.QUEUED,
    Ask.PAUSE: State.PAUSED,
    Ask.CANCEL: State.CANCELLED,
}
"""What a job becomes when its supervisor has carried out what was asked."""


def stronger(asked: Ask | None, new: Ask) -> Ask:
    """Return the ask that holds when a job that was asked one thing is asked another: a cancel is never taken back."""
    order = list(Ask)
    return new if asked is None or order.index(new) > order.index(asked) else asked
