"""Which of the choices that a search asks about fit, each priced once; how little recomputing makes one fit. Pure."""

from __future__ import annotations

from typing import Any

from orchestrator.planner.groups import Core, Leanest, Least, Sharding, point
from orchestrator.planner.memory import MemoryPrice
from orchestrator.planner.problem import Choice, Problem
from orchestrator.planner.space import Space
from strategies.pipeline.cost import holds_like
from strategies.strategy import Offload


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


class Recomputing:
    """How little recomputing makes a strategy fit."""

    def __init__(self, space: Space, fits: Fits) -> None:
        self.space, self.fits = space, fits

    def least(self, leanest: list[Leanest], offload: Offload, floor: Least) -> Least | None:
        """Which recomputing fits at all, under the leanest schedules and ZeRO group; `floor` says where to begin."""
        fitting: set[str] = set()
        layers: int | None = None
        for core, sharding in leanest:
            for kind in floor.kinds:
                if kind not in fitting:
                    choice = point(core, sharding, offload, kind, self.space.layers_of(kind))
                    fitting |= {kind} if self.fits.fits(choice) else set()
                if "none" in fitting:
                    return Least(("none", *floor.kinds[1:]), floor.layers)
            if floor.layers is not None:
                found, _ = self.fewest(core, sharding, offload, floor.layers)
                if found is not None:
                    needed = found * core.virtual + 1
                    layers = needed if layers is None else min(layers, needed)
        if layers is None and not fitting:
            return None
        return Least(tuple(kind for kind in floor.kinds if kind in fitting), layers)

    def fewest(self, core: Core, sharding: Sharding, offload: Offload, floor: int) -> tuple[int | None, int]:
        """(place of the fewest recomputed layers that fit among space.recomputes' numbers, how many were priced): halved, since
        more layers recomputed never hold more. `floor`: layers of a pipeline rank that must be at least."""
        _, counts = self.space.recomputes(core.shape.pipeline, core.virtual)
        per_stage = -(-floor // core.virtual) if core.shape.pipeline > 1 else floor
        low, high, found, priced = max(0, min(per_stage, len(counts)) - 1), len(counts) - 1, None, 0
        middle = low  # the floor is often exact
        while low <= high:
            priced += 1
            if self.fits.fits(point(core, sharding, offload, "full", counts[middle])):
                found, high = middle, middle - 1
            elif found is None and middle != len(counts) - 1:
                low, middle = middle + 1, len(counts) - 1  # does it fit at all?
                continue
            else:
                low = middle + 1
            middle = (low + high) // 2
        return found, priced


def _key(choice: Choice) -> tuple[Any, ...]:
    return (*choice[:4], holds_like(choice.schedule, choice.virtual), *choice[5:])
