"""The learning rate of every step and the moments of a checkpoint: pure functions of numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
