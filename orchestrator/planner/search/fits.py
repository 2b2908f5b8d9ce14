"""Which of the choices that a search asks about fit, each priced once. Pure."""

from __future__ import annotations

from typing import Any

from orchestrator.planner.problem import Choice, Problem
from strategies.pipeline.cost import holds_like


class Fits:
    """Neither a link's bandwidth nor what is pinned changes the bytes of a choice: searches for one job on the same GPUs, their
    links slower or fewer rooms open, share these."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._known: dict[tuple[Any, ...], bool] = {}

    def __call__(self, choice: Choice) -> bool:
        key = (*choice[:4], holds_like(choice.schedule, choice.virtual), *choice[5:])
        if key not in self._known:
            self._known[key] = self.problem.memory(self.problem.strategy(choice)).fits
        return self._known[key]
