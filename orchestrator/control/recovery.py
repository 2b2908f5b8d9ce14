"""Decisions after a failure: pure decisions. The supervisor carries them out and writes them down."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile


class FailureKind(StrEnum):
    USER_ERROR = "user_error"
    """The job cannot go on as it is: data, settings, a loss that is not finite."""
    WORKER_LOST = "worker_lost"
    """A worker's process died."""
    WORKER_ERROR = "worker_error"
    """A worker raised."""
    NODE_LOST = "node_lost"
    """A node of the Ray cluster died, with its workers."""
    OUT_OF_MEMORY = "out_of_memory"
    RAY_LOST = "ray_lost"
    """The raylet, the GCS or the process that holds them died."""
    NO_START = "no_start"
    """The worker group did not come up in time."""
    HANG = "hang"
    """No rank gave a sign of life for longer than what they were doing may take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    kind: FailureKind
    cause: str
    """One sentence for a person."""
    step: int
    """Newest step that was done when it happened."""
    checkpoint: str | None = None
    """The whole checkpoint that was the newest then; None where there was none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """The job's `recovery`, and how patient restarts are."""

    max_restarts: int = 10
    """Failures that are answered before the next whole checkpoint. Not counted by steps: a crash soon after each resume makes
    steps for ever. Nor over the life of a run: a long one fails more often."""
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0
    same_error_limit: int = 3
    """An error that comes back this many times at one step will not go away."""

    def wait_s(self, num_without_progress: int) -> float:
        """Nothing after a failure that followed new steps; then doubling."""
        if num_without_progress == 0:
            return 0.0
        return float(min(self.longest_wait_s, self.first_wait_s * 2 ** min(num_without_progress - 1, 30)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Restart:
    """The same plan again, from the newest whole checkpoint."""

    after_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GiveUp:
    reason: str
    """Sentence of what happened and what the user can do."""
    lost_cluster: bool = False
    """The machinery under the job failed, not the job."""


def on_failure(history: Sequence[Failure], policy: Policy) -> Restart | GiveUp:
    """The answer to the last failure of a run. Pure: no clock, no Ray, no logging."""
    latest = history[-1]
    if latest.kind is FailureKind.USER_ERROR:
        return GiveUp(reason=latest.cause)
    if latest.kind is FailureKind.OUT_OF_MEMORY:
        fix = "a smaller micro_batch_size, a higher zero_stage or more activation checkpointing needs less"
        told = "the run stops (recovery.on_oom: stop), since choosing a smaller strategy by itself is not built yet"
        return GiveUp(reason=f"{latest.cause}; {told}; {fix}")
    stuck = _same_in_a_row(history)
    lost = latest.kind in (FailureKind.RAY_LOST, FailureKind.NO_START)
    if stuck >= policy.same_error_limit and latest.kind in (FailureKind.WORKER_ERROR, FailureKind.NO_START):
        return GiveUp(reason=f"{latest.cause}; it came back {stuck} times at step {latest.step}", lost_cluster=lost)
    if (count := _since_checkpoint(history)) > policy.max_restarts:
        since = "" if latest.checkpoint is None else f" since checkpoint {latest.checkpoint.split()[0]}"
        told = f"{count} failures{since} are more than recovery.max_restarts: {policy.max_restarts} allows"
        return GiveUp(reason=f"{latest.cause}; {told}", lost_cluster=lost)
    return Restart(after_s=policy.wait_s(_without_progress(history)))


def _without_progress(history: Sequence[Failure]) -> int:
    """Failures at the end of the history before which no new step was done."""
    count = 0
    for earlier, later in zip(reversed(history[:-1]), reversed(history), strict=False):
        if later.step > earlier.step:
            break
        count += 1
    return count


def _since_checkpoint(history: Sequence[Failure]) -> int:
    """Failures at the end of the history with the same newest checkpoint."""
    return sum(1 for _ in takewhile(lambda failure: failure.checkpoint == history[-1].checkpoint, reversed(history)))


def _same_in_a_row(history: Sequence[Failure]) -> int:
    latest = _identity(history[-1])
    return sum(1 for _ in takewhile(lambda failure: _identity(failure) == latest, reversed(history)))


def _identity(failure: Failure) -> tuple[object, ...]:
    """Return what makes a failure the same as another: not the numbers in its text, such as addresses, ports, process ids,
    bytes, or which of the ranks told of it first."""
    return failure.kind, failure.step, re.sub(r"0x[0-9a-f]+|\b[0-9a-f]*[0-9][0-9a-f]*\b", "#", failure.cause.lower())
