"""The best strategy of a space, exactly: best first over lower bounds, from one heap. Pure and deterministic.

A group of candidates carries seconds that none of them can beat (bounds.py). The group with the smallest bound is opened first:

    degrees, micro batch, sequence parallel -> ZeRO sharding, offload -> schedule -> recompute

The first complete strategy that comes out on top is the best of the whole space. What is never opened is rejected with its size
and one reason.
"""

from __future__ import annotations

import gc
import heapq
import time
from collections.abc import Callable
from itertools import count
from typing import Any

from orchestrator.planner.problem import Choice, Problem
from orchestrator.planner.search.anchors import key_of, lacks_schedule, lacks_sharding, margin
from orchestrator.planner.search.axes import Space
from orchestrator.planner.search.bounds import SLACK, Bounds
from orchestrator.planner.search.candidates import (
    MicroBatchGroup,
    MinimumRecompute,
    PipelineConfiguration,
    Shape,
    ShardingGroup,
    point,
    simplicity,
)
from orchestrator.planner.search.result import Fits, Found, Rejection, SearchResult, Wanted
from orchestrator.planner.search.smallest import closest
from strategies.pipeline.cost import bubble_fraction

TOO_LARGE = "states and activations do not fit, however much is recomputed"


def search(
    problem: Problem,
    *,
    wanted: Wanted | None = None,
    after: SearchResult | None = None,
    near_s: Callable[[Choice], float] | None = None,
) -> SearchResult:
    """Return the best strategy under the objective, of those that are likely to fit (likely.py), or else of all that are
    priced to fit.

    Args:
        after: an earlier search for the same job on the same GPUs, whose bytes need no pricing again, and where only what may be
            offloaded is another, no bounds either.
        near_s: of the best, seconds of a step up to which all strategies are wanted (SearchResult.near).
    """
    started = time.perf_counter()
    wanted = wanted or Wanted()
    space = Space(problem, every_size=problem.objective != "fastest" or wanted.any)
    collects = gc.isenabled()
    gc.disable()  # a search makes values without cycles, and looking for them took a sixth of its time
    try:
        tight = after is not None and after.fits.tight
        result = _Search(space, wanted, after, near_s, tight=tight).run(started)
        if result.best is None and result.closest is not None and result.closest.memory.fits and not tight:
            result = _Search(space, wanted, result, near_s, tight=True).run(started)
    finally:
        if collects:
            gc.enable()
    result.alternatives_seconds = time.perf_counter() - started - result.seconds
    return result


class _Search:
    def __init__(
        self,
        space: Space,
        wanted: Wanted,
        after: SearchResult | None,
        near_s: Callable[[Choice], float] | None,
        *,
        tight: bool,
    ) -> None:
        self.space, self.problem, self.wanted, self.near_s = space, space.problem, wanted, near_s
        self.bounds = after.bounds if after and after.bounds.space.is_alike(space) else Bounds(space)
        self.fits = after.fits if after and after.fits.tight == tight else Fits(self.problem, tight=tight)
        self.result = SearchResult(fits=self.fits, bounds=self.bounds)
        self.near = 0.0
        """Key up to which all strategies are wanted."""
        self.heap: list[tuple[float, int, Any, int, Shape, int, float, Any]] = []
        self.order = count()
        self.rejected: dict[tuple[Shape, str], tuple[int, str]] = {}

    def run(self, started: float) -> SearchResult:
        result, bounds = self.result, self.bounds
        for group in bounds.groups():
            offloads = {zero: len(self.space.offloads_of(zero, group.shape.replicas)) for zero in group.batch.shardings}
            choices = sum(len(kept) * offloads[zero] for zero, kept in group.batch.shardings.items())
            size = group.batch.num_recomputes * choices
            result.num_candidates += size
            if size:
                self._push(group.floor_s, group.shape, size, group)
        while self.heap and (result.best is None or self.heap[0][0] <= self.near):
            key, is_leaf, _, _, shape, size, step_s, group = heapq.heappop(self.heap)
            if is_leaf:
                self._take(group, key)
                if not result.seconds and result.best is not None:
                    result.seconds = time.perf_counter() - started
            elif self._hopeless(step_s, shape):
                self._reject(shape, "targets", size, f"no faster than {step_s:.3g} s a step, too slow for the targets")
            else:
                self._open(group)
        result.seconds = result.seconds or time.perf_counter() - started
        result.best = result.best or result.fastest
        if result.best is None:
            result.closest = closest(self.space, self.bounds)
        self._account()
        return result

    def _account(self) -> None:
        """Reject what was never opened, and name all groups that were rejected."""
        best = self.result.best
        than = f"the best takes {best.step_s:.3g}" if best else "no use"
        for _, is_leaf, _, _, shape, size, step_s, _ in self.heap:
            if not is_leaf:
                self._reject(shape, "slower", size, f"at least {step_s:.3g} s a step, {than}")
        self.result.rejections = [
            Rejection(_degrees(s), number, reason) for (s, _), (number, reason) in self.rejected.items()
        ]

    def _hopeless(self, step_s: float, shape: Shape) -> bool:
        """Whether a group cannot meet the targets, where the best without them is known."""
        if self.result.best is not None or self.result.fastest is None:
            return False
        return not self.wanted.met(step_s, shape.num_gpus)

    def _push(self, step_s: float, shape: Shape, size: int, group: Any, *, lacking: int = 0) -> None:
        """Push a group of which every candidate has at least so many unanchored choices."""
        key = self.problem.key(step_s * SLACK * self._margin(lacking), shape.num_gpus)
        heapq.heappush(self.heap, (key, 0, (), next(self.order), shape, size, step_s, group))

    def _margin(self, lacking: int) -> float:
        return 1.0 if self.problem.bold else margin(lacking)

    def _push_leaf(self, choice: Choice) -> None:
        self.result.num_feasible += 1
        step_s = self.problem.time(self.problem.strategy(choice)).step_s
        shape = Shape(choice.tensor, choice.pipeline, choice.data, choice.context)
        key = key_of(self.problem, choice, step_s)
        entry = key, 1, simplicity(choice), next(self.order), shape, 1, step_s, Found(choice, step_s)
        heapq.heappush(self.heap, entry)

    def _reject(self, shape: Shape, kind: str, number: int, reason: str) -> None:
        if number:
            before, first = self.rejected.get((shape, kind), (0, reason))
            self.rejected[shape, kind] = (before + number, first)

    def _take(self, found: Found, key: float) -> None:
        """Keep a complete strategy that came out on top: the best there is, or one that is near it."""
        result = self.result
        if result.best is None or key <= self.near:
            result.near.append(found)
        if result.fastest is None:
            result.fastest = found
        if result.best is None and (not self.wanted.any or self.wanted.met(found.step_s, found.choice.num_gpus)):
            result.best = found
            if self.near_s is not None:
                self.near = key_of(self.problem, found.choice, self.near_s(found.choice))

    # Opening a group ------------------------------------------------------------------------------------------------

    def _open(self, group: Any) -> None:
        if isinstance(group, MicroBatchGroup):
            self._open_micro_batch(group)
        elif isinstance(group, ShardingGroup):
            self._open_sharding(group)
        else:
            self._open_configuration(*group)

    def _open_micro_batch(self, group: MicroBatchGroup) -> None:
        """Push each sharding and offload of a micro batch group."""
        shape, bounds = group.shape, self.bounds
        for zero, shardings in group.batch.shardings.items():
            for offload in self.space.offloads_of(zero, shape.replicas):
                for sharding in shardings:
                    least = bounds.least(group, sharding, offload, group.in_flight)
                    if least is None:
                        self._reject(shape, f"memory {zero}", group.batch.num_recomputes, f"ZeRO {zero}: {TOO_LARGE}")
                        continue
                    step_s = bounds.least_s(group, sharding, offload, least, floor_s=group.floor_s, idle=group.idle)
                    lacking = offload.any + (shape.context > 1) + lacks_sharding(shape.tensor, shape.pipeline, zero)
                    opened = ShardingGroup(group, sharding, offload)
                    self._push(step_s, shape, group.batch.num_recomputes, opened, lacking=lacking)

    def _open_sharding(self, group: ShardingGroup) -> None:
        """Push each schedule, with its own bubble and micro batches in flight."""
        micro, sharding, offload = group
        shape, batch = micro.shape, micro.batch
        for schedule, virtual in batch.schedules:
            number = self.space.num_recomputes(shape.pipeline, virtual)
            held = self.bounds.in_flight(shape, micro.sequence_parallel, batch, schedule, virtual)
            least = self.bounds.least(micro, sharding, offload, held)
            if least is None:
                self._reject(shape, f"memory {sharding.zero}", number, f"ZeRO {sharding.zero}: {TOO_LARGE}")
                continue
            idle = bubble_fraction(schedule, shape.pipeline, virtual, batch.accumulation)
            floor_s = self.bounds.floor_s(shape, micro.sequence_parallel, batch, idle)
            step_s = self.bounds.least_s(micro, sharding, offload, least, floor_s=floor_s, idle=idle)
            configuration = PipelineConfiguration(shape, micro.sequence_parallel, batch.micro, schedule, virtual)
            lacking = offload.any + (shape.context > 1) + lacks_sharding(shape.tensor, shape.pipeline, sharding.zero)
            lacking += lacks_schedule(shape.pipeline, schedule, virtual)
            self._push(step_s, shape, number, (configuration, group, least), lacking=lacking)

    def _open_configuration(
        self, configuration: PipelineConfiguration, group: ShardingGroup, least: MinimumRecompute
    ) -> None:
        """Time the least recomputing that fits."""
        shape, space = configuration.shape, self.space
        kinds, counts = space.recomputes(shape.pipeline, configuration.virtual)
        carried = group.offload.activations != "none"  # what is recomputed need not be carried: more can be faster
        priced, done = 0, False
        for kind in kinds:
            if kind in least.kinds and not done:
                priced += 1
                choice = point(configuration, group.sharding, group.offload, kind, space.layers_of(kind))
                if self.fits(choice):
                    self._push_leaf(choice)
                    done = kind == "none" and not carried
        if least.layers is not None and not done:
            found, number = self._layers_that_fit(configuration, group, least.layers)
            priced += number
            for layers in found:
                self._push_leaf(point(configuration, group.sharding, group.offload, "full", layers))
        self.result.num_priced += priced
        unpriced = len(kinds) + len(counts) - priced
        self._reject(shape, "recompute", unpriced, "fits with less recomputed, or does not fit with more")

    def _layers_that_fit(
        self, configuration: PipelineConfiguration, group: ShardingGroup, floor: int
    ) -> tuple[list[int | None], int]:
        """Return the numbers of recomputed layers that fit and may be the fastest, and how many were priced.

        More recomputed layers never hold more, so the fewest are halved to, and where nothing is carried these are the fastest.
        Only the second adds bytes where activations are carried: it is on the GPU beside the block that comes back.
        `floor`: layers of a pipeline rank that must be recomputed at least."""
        _, counts = self.space.recomputes(configuration.shape.pipeline, configuration.virtual)
        per_stage = -(-floor // configuration.virtual) if configuration.shape.pipeline > 1 else floor
        low, high = max(0, min(per_stage, len(counts)) - 1), len(counts) - 1
        asked: dict[int, bool] = {}

        def fits(place: int) -> bool:
            asked[place] = self.fits(point(configuration, group.sharding, group.offload, "full", counts[place]))
            return asked[place]

        carried, found = group.offload.activations != "none", list[int]()
        one = [0] if carried and low == 0 and fits(0) else []
        low = max(low, len(asked))
        middle = low  # the floor is often exact
        while low <= high:
            if fits(middle):
                found, high = list(range(middle, len(counts))), middle - 1
            elif not found and middle != len(counts) - 1:
                low, middle = middle + 1, len(counts) - 1  # does it fit at all?
                continue
            else:
                low = middle + 1
            middle = (low + high) // 2
        taken = one + (found if carried else found[:1])
        return [counts[place] for place in taken], len({*asked, *taken})


def _degrees(shape: Shape) -> str:
    context = f"context {shape.context}, " if shape.context > 1 else ""
    return f"tensor {shape.tensor}, {context}pipeline {shape.pipeline}, data {shape.data}"
