"""The answer of a search. Values only. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from orchestrator.planner.problem import Choice, Problem
from orchestrator.planner.search.bounds import Bounds
from orchestrator.planner.search.candidates import TooLarge
from orchestrator.planner.search.likely import LIKELY, fits_probability
from strategies.pipeline.in_flight import holds_like

INFINITE = float("inf")


@dataclass(frozen=True, slots=True)
class Found:
    """A complete strategy that fits."""

    choice: Choice
    step_s: float


@dataclass(frozen=True, slots=True)
class Rejection:
    """A named group of candidates that one bound rejected."""

    group: str
    candidates: int
    reason: str


class Fits:
    """Answers of one job on the same GPUs. Neither a link's bandwidth nor what is pinned changes the bytes of a choice: searches
    whose links are slower, or that may offload less, share them."""

    def __init__(self, problem: Problem, *, tight: bool = False) -> None:
        """`tight`: what is priced to fit will do, however likely it is to run."""
        self.problem, self.tight = problem, tight
        self._known: dict[tuple[Any, ...], bool] = {}

    def __call__(self, choice: Choice) -> bool:
        """Return whether a choice fits, and is likely to."""
        key = (*choice[:5], holds_like(choice.schedule, choice.virtual), *choice[6:])
        if key not in self._known:
            memory = self.problem.memory(self.problem.strategy(choice))
            self._known[key] = memory.fits and (self.tight or fits_probability(self.problem, memory)[0] >= LIKELY)
        return self._known[key]


@dataclass
class SearchResult:
    """The answer of a search: the best, what is near it, and what was rejected why."""

    fits: Fits
    """Choices that were priced in bytes, for the next search of this job."""
    bounds: Bounds
    """Bounds of the groups, for the next search of this job."""
    best: Found | None = None
    """The best that meets the job's targets, or else `fastest`."""
    fastest: Found | None = None
    """The best under the objective, whatever the targets."""
    near: list[Found] = field(default_factory=list)
    """All that came out on top until the best, and from there on as far as was asked."""
    closest: TooLarge | None = None
    """The candidate that is over by least; None where one fits."""
    num_candidates: int = 0
    num_priced: int = 0
    """Candidates whose bytes were counted; with those of the rejections they are all."""
    num_feasible: int = 0
    rejections: list[Rejection] = field(default_factory=list)
    seconds: float = 0.0
    """Until the best was known."""
    alternatives_seconds: float = 0.0
    """Seconds from then until all that is near the best was known."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The job's targets as limits on a step; a strategy that keeps them all is taken before any that does not."""

    step_s: float = INFINITE
    gpu_s: float = INFINITE
    """Seconds of a step times its GPUs."""

    def met(self, step_s: float, num_gpus: int) -> bool:
        return step_s <= self.step_s and step_s * num_gpus <= self.gpu_s

    @property
    def any(self) -> bool:
        return self.step_s < INFINITE or self.gpu_s < INFINITE
