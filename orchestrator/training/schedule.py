"""The learning rate of every step and the moments of a checkpoint: pure functions of numbers."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

ScheduleName = Literal["cosine", "linear", "constant"]


def learning_rate(
    step: int,
    *,
    peak: float,
    num_steps: int,
    warmup_steps: int = 0,
    name: ScheduleName = "cosine",
    final_fraction: float = 0.1,
) -> float:
    """Learning rate of step 1, 2, ..., num_steps.

    Warm-up climbs in a straight line and reaches the peak at step `warmup_steps`; the decay ends at peak x
    final_fraction at `num_steps` and stays there. Source of the shape: GPT-3, arXiv:2005.14165, app. B; OPT,
    arXiv:2205.01068, section 2.2 (linear, to 10 %).
    """
    if step < 1:
        raise ValueError(f"steps are counted from 1, got {step}")
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if name == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    falls = (1 + math.cos(math.pi * progress)) / 2 if name == "cosine" else 1 - progress
    return peak * (final_fraction + (1 - final_fraction) * falls)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointEvery:
    """How often a checkpoint is due: exactly one of the two is set."""

    num_steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.num_steps is None) == (self.seconds is None):
            raise ValueError("a checkpoint is due every so many steps or every so many seconds: set one of the two")

    def is_due(self, *, step: int, seconds_since_last: float) -> bool:
        """After `step` finished steps."""
        if self.num_steps is not None:
            return step % self.num_steps == 0
        return seconds_since_last >= (self.seconds or 0.0)


GPU_SECONDS_BETWEEN_FAILURES = 54 * 86400 * 16384 / 419
"""GPU-seconds from one unexpected interruption of a job to the next, about 5.8 years of one GPU. Source: The Llama 3 Herd of
Models, arXiv:2407.21783, section 3.3.4: 419 in 54 days on 16,384 H100."""
SHORTEST_S, LONGEST_S = 60.0, 3600.0
"""Bounds of an interval. Failures that come in bursts would make a formula of the mean lose too much, so an hour is the most that
is risked; below a minute, restarts take longer than what they save."""
COPIED_BYTES_PER_S = 1e9
"""How fast the state is assumed to leave the device before the first save has been measured: slower than a pageable copy over
PCIe 3, since the writing behind it slows steps as well."""
NOTABLE = 0.2
"""Part of an interval by which it must change to be told again."""


def checkpoint_interval_s(*, cost_s: float, num_gpus: int, save_s: float = 0.0) -> float:
    """Return the seconds of training between two checkpoints that lose the least time, to saving and to failures together.

    Source: sqrt(2 x cost x mean time between failures): Young, CACM 17(9), 1974; Daly, Future Generation Computer Systems
    22(3), 2006, whose first-order optimum this is; his terms of higher order matter where a save costs a good part of the time
    between failures. We depart by the bounds, and by waiting for the save before: it must have ended (`save_s`).

    Args:
        cost_s: what one save costs training: the time it stands still and the time its steps take longer.
        num_gpus: a failure of any of them ends the run.
        save_s: from the start of a save to its last byte on the disk.
    """
    mean_time_s = GPU_SECONDS_BETWEEN_FAILURES / num_gpus
    best_s = math.sqrt(2 * max(0.0, cost_s) * mean_time_s)
    return max(min(max(best_s, SHORTEST_S), LONGEST_S), save_s)


@dataclass(kw_only=True, slots=True)
class CheckpointAuto:
    """`checkpoint.every: auto`: an interval that follows what a save has been seen to cost. Rank 0 asks it, all obey."""

    num_gpus: int
    state_bytes: int
    """Bytes of one rank; they predict the first save's cost."""
    cost_s: float = field(init=False)
    save_s: float = 0.0
    measured: bool = False
    _told_s: float = 0.0
    _plain_s: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    """Steps beside which nothing was saved."""
    _saving_s: list[float] = field(default_factory=list)
    """Steps since the last save began, as long as it was written."""

    def __post_init__(self) -> None:
        self.cost_s = self.state_bytes / COPIED_BYTES_PER_S

    @property
    def seconds(self) -> float:
        """The interval."""
        return checkpoint_interval_s(cost_s=self.cost_s, num_gpus=self.num_gpus, save_s=self.save_s)

    def is_due(self, *, step: int, seconds_since_last: float) -> bool:
        """Return whether a checkpoint is due, as CheckpointEvery.is_due does."""
        return seconds_since_last >= self.seconds

    def step_took(self, seconds: float, *, saving: bool) -> None:
        """A step is over; `saving`: a checkpoint was being written beside it."""
        (self._saving_s if saving else self._plain_s).append(seconds)

    def saved(self, *, blocked_s: float, seconds: float) -> None:
        """A save is over: what it blocked, and what the steps beside it took longer than the median of the others, cost."""
        usual_s = statistics.median(self._plain_s) if self._plain_s else 0.0
        slowed_s = sum(self._saving_s) - usual_s * len(self._saving_s) if self._plain_s else 0.0
        self.cost_s, self.save_s, self.measured = blocked_s + max(0.0, slowed_s), seconds, True
        self._saving_s.clear()

    def news(self) -> str | None:
        """The interval in a sentence, where it was not told yet or has changed much since."""
        if abs(self.seconds - self._told_s) <= NOTABLE * self._told_s:
            return None
        self._told_s = self.seconds
        days = GPU_SECONDS_BETWEEN_FAILURES / self.num_gpus / 86400
        how = "measured" if self.measured else "predicted"
        many = f"{self.num_gpus} accelerators fail" if self.num_gpus > 1 else "an accelerator fails"
        return (
            f"a checkpoint is due every {self.seconds:.0f} s: one costs training {self.cost_s:.3g} s ({how}), and {many} once in "
            f"{days:,.0f} days"
        )
