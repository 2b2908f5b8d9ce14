"""Which of the choices that a search asks about fit, each priced once. Pure."""

from __future__ import annotations

from typing import Any

from orchestrator.planner.memory import MemoryPrice
from orchestrator.planner.problem import Choice, Problem
from strategies.pipeline.cost import holds_like


class Fits:
    """Neither a link's bandwidth nor what is pinned changes the bytes of a choice: searches for one job on the same GPUs, their
    links slower or fewer rooms open, share these."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.prices: dict[tuple[Any, ...], MemoryPrice] = {}
        self.larger: set[tuple[Any, ...]] = set()

    def memory(self, choice: Choice) -> MemoryPrice:
        """All schedules that hold alike are priced once."""
        key = _key(choice)
        known = self.prices.get(key)
        if known is None:
            known = self.prices[key] = self.problem.memory(self.problem.strategy(choice))
        return known

    def fits(self, choice: Choice) -> bool:
        """Most do not, and the first rank that is too full says so."""
        key = _key(choice)
        known = self.prices.get(key)
        if known is not None:
            return known.fits
        if key in self.larger:
            return False
        strategy = self.problem.strategy(choice)
        if self.problem.too_large(strategy):
            self.larger.add(key)
            return False
        return self.prices.setdefault(key, self.problem.memory(strategy)).fits


def _key(choice: Choice) -> tuple[Any, ...]:
    return (*choice[:4], holds_like(choice.schedule, choice.virtual), *choice[5:])
