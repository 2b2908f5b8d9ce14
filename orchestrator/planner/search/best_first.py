"""The best strategy of a space, exactly: best first over lower bounds. Pure and deterministic.

A partial choice stands for a named group of candidates and carries seconds that none of them can beat (bounds.py). The group
with the smallest bound is opened first, in this order:

    degrees -> ZeRO stage, offload -> ZeRO group, frequencies -> micro batch, sequence parallel, activations on the host
    -> schedule -> recompute

The first complete strategy that fits and comes out on top is the best of the whole space. What is never opened is rejected
with its size and one reason.
"""

from __future__ import annotations

import gc
import heapq
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

from orchestrator.planner.problem import Choice, Problem
from orchestrator.planner.result import (
    GIB,
    Family,
    Found,
    Rejection,
    SearchResult,
    TooLarge,
    Wanted,
    excess,
)
from orchestrator.planner.search.axes import Space
from orchestrator.planner.search.bounds import INFINITE, SLACK, Bounds, stays
from orchestrator.planner.search.candidates import Core, Least, Rest, Row, Shape, Sharding, point, simplicity
from orchestrator.planner.search.fits import Fits
from strategies.pipeline.cost import bubble_fraction, in_flight_of
from strategies.strategy import Offload

NO_RECOMPUTING = "activations do not fit however much is recomputed"


def search(
    problem: Problem,
    *,
    wanted: Wanted | None = None,
    num_families: int = 21,
    after: SearchResult | None = None,
    near_s: Callable[[Choice], float] | None = None,
) -> SearchResult:
    """The best strategy under the problem's objective, and the best of each of the next families.

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
        result = _Search(space, wanted, num_families, after, near_s).run(started)
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
        num_families: int,
        after: SearchResult | None,
        near_s: Callable[[Choice], float] | None,
    ) -> None:
        self.space, self.problem, self.wanted, self.num_families = space, space.problem, wanted, num_families
        self.bounds = after.bounds if after and after.bounds.space.is_alike(space) else Bounds(space)
        self.near_s = near_s
        self.key = self.near = 0.0
        """Of the group that is open, and up to which all strategies are wanted."""
        self.fits = after.fits if after else Fits(self.problem)
        self.result = SearchResult(fits=self.fits, bounds=self.bounds)
        self.heap: list[tuple[float, int, Any, int, Shape, int, Any]] = []
        self.order = count()
        self.done: set[Family] = set()
        self.opened: dict[tuple[Shape, int, Offload], None] = {}
        """Families that were looked at: where nothing fits, all but those that hold more than another one that does not fit."""
        self.host_holds: dict[tuple[Shape, int, str], bool] = {}
        self.rejected: dict[tuple[Shape, str], tuple[int, str]] = {}

    def run(self, started: float) -> SearchResult:
        result = self.result
        for shape in self.space.shapes():
            size = self.space.shape_size(shape)
            result.num_candidates += size
            if size:
                self._push(self.bounds.shape_s(shape), shape, size, self._open_shape, shape)
        while self.heap and not self._enough():
            self.key, is_leaf, _, _, shape, size, (step_s, action, arguments) = heapq.heappop(self.heap)
            if is_leaf:
                self._take(arguments)
                if not result.seconds and result.best is not None:
                    result.seconds = time.perf_counter() - started
            elif self._hopeless(step_s, shape):
                self._reject(shape, "targets", size, f"no faster than {step_s:.3g} s a step, too slow for the targets")
            else:
                action(size, *arguments)
        result.seconds = result.seconds or time.perf_counter() - started
        best = result.best or result.fastest
        if best is None:
            self._find_closest()
        than = f"the best takes {best.step_s:.3g}" if best else "no use"
        for _, is_leaf, _, _, shape, size, (step_s, _, _) in self.heap:
            if not is_leaf:
                self._reject(shape, "slower", size, f"at least {step_s:.3g} s a step, {than}")
        result.best = best
        result.rejections = [
            Rejection(f"tensor {s.tensor}, pipeline {s.pipeline}, data {s.data}", number, reason)
            for (s, _), (number, reason) in self.rejected.items()
        ]
        return result

    def _find_closest(self) -> None:
        """Nothing fits: of the families' smallest members the one that is over by least."""
        for shape, zero, offload in self.opened:
            for choice in self.bounds.smallest(shape, zero, offload):
                memory, closest = self.problem.memory(self.problem.strategy(choice)), self.result.closest
                if closest is None or excess(memory) < excess(closest.memory):
                    self.result.closest = TooLarge(choice, memory)

    def _enough(self) -> bool:
        wants = len(self.result.families) < self.num_families or self.heap[0][0] <= self.near
        return self.result.best is not None and not wants

    def _hopeless(self, step_s: float, shape: Shape) -> bool:
        """The group cannot meet the targets, and the best without them is known."""
        if self.result.best is not None or self.result.fastest is None:
            return False
        return not self.wanted.met(step_s, shape.num_gpus) and len(self.result.families) >= self.num_families

    def _push(self, step_s: float, shape: Shape, size: int, action: Any, *arguments: Any) -> None:
        key = self.problem.key(step_s * SLACK, shape.num_gpus)
        heapq.heappush(self.heap, (key, 0, (), next(self.order), shape, size, (step_s, action, arguments)))

    def _push_leaf(self, choice: Choice, step_s: float) -> None:
        self.result.num_feasible += 1
        shape = Shape(choice.tensor, choice.pipeline, choice.data)
        entry = (step_s, None, Found(choice, step_s))
        key = self.problem.key(step_s, choice.num_gpus)
        heapq.heappush(self.heap, (key, 1, simplicity(choice), next(self.order), shape, 1, entry))

    def _reject(self, shape: Shape, kind: str, number: int, reason: str) -> None:
        if number:
            before, first = self.rejected.get((shape, kind), (0, reason))
            self.rejected[shape, kind] = (before + number, first)

    def _take(self, found: Found) -> None:
        """A complete strategy came out on top: the best there is, or the best of its family."""
        result = self.result
        if result.best is None or self.key <= self.near:
            result.near.append(found)
        if result.fastest is None:
            result.fastest = found
        if result.best is None and (not self.wanted.any or self.wanted.met(found.step_s, found.choice.num_gpus)):
            result.best = found
            if self.near_s is not None:
                self.near = self.problem.key(self.near_s(found.choice), found.choice.num_gpus)
            if found.family in self.done:  # an earlier member was better, and missed a target
                result.families = [other for other in result.families if other.family != found.family]
                self.done.discard(found.family)
        if found.family not in self.done:
            self.done.add(found.family)
            result.families.append(found)

    def _is_done(self, shape: Shape, zero: int, offload: Offload, size: int) -> bool:
        """The best of the family is known, and no target sends for another member."""
        if self.result.best is None or self.key <= self.near:
            return False
        if (shape.tensor, shape.pipeline, zero, offload) not in self.done:
            return False
        self._reject(shape, "slower", size, "slower than the best of its family")
        return True

    def _undone(self, shape: Shape, zero: int, offloads: tuple[Offload, ...], size: int) -> tuple[Offload, ...]:
        """Those of which the best of the family is not known. `size`: candidates of all of them, each the same."""
        each = size // len(offloads)
        return tuple(offload for offload in offloads if not self._is_done(shape, zero, offload, each))

    # Opening a group ------------------------------------------------------------------------------------------------

    def _open_shape(self, size: int, shape: Shape) -> None:
        """Degrees -> (ZeRO stage, offload). Where not even everything offloaded fits, one price rejects a ZeRO stage."""
        stages: dict[int, int] = {}
        for batch in self.space.batches(shape):
            for zero, shardings in batch.shardings.items():
                stages[zero] = stages.get(zero, 0) + batch.num_recomputes * len(shardings)
        floor = self.bounds.shape_s(shape)
        sequence = len(self.space.sequence_parallels(shape.tensor))
        for zero, number in stages.items():
            each, offloads = number * sequence, self.space.offloads_of(zero, shape.data)
            if not offloads:  # what is pinned is not built at this stage
                continue
            most = self._most(offloads)
            over = min(self._over(shape, zero, None, offload)[0] for offload in most)
            if over > 0:
                self._none_fits(shape, zero, most)
                self._reject(shape, f"memory {zero}", each * len(offloads), f"ZeRO {zero}: {_told_over(over)}")
                continue
            families: dict[Offload, tuple[Offload, ...]] = {}
            for offload in offloads:
                if self._host_holds(shape, zero, offload):
                    self._reject(shape, "nvme", each, "host memory holds what would go to NVMe, which is slower")
                else:
                    away = stays(offload)
                    families[away] = (*families.get(away, ()), offload)
            for away, kept in families.items():
                floor_s = floor + self.bounds.fixed(shape, zero, None, away).step_s
                self._push(floor_s, shape, each * len(kept), self._open_family, shape, zero, away, kept)

    def _host_holds(self, shape: Shape, zero: int, offload: Offload) -> bool:
        """What would go to NVMe fits in host memory as well, whatever else is chosen."""
        if "nvme" not in (offload.optimizer, offload.parameters) or "offload" in self.space.pins:
            return False
        key = shape, zero, offload.activations
        if key not in self.host_holds:
            hungriest = self.problem.strategy(self.bounds.hungriest(shape, zero, offload.activations))
            self.host_holds[key] = (
                self.problem.memory(hungriest).host_bytes_per_node <= self.problem.cluster.host.memory_bytes
            )
        return self.host_holds[key]

    def _over(self, shape: Shape, zero: int, sharding: Sharding | None, offload: Offload) -> tuple[float, float]:
        """Fewest.over of a family, with any sharding or one."""
        fixed = self.bounds.fixed(shape, zero, sharding, stays(offload))
        fewest = self.bounds.fewest(shape, self.space.batches_of(shape, zero, sharding))
        return fewest.over(fixed, carried=offload.activations != "none")

    def _none_fits(self, shape: Shape, zero: int, offloads: Iterable[Offload]) -> None:
        """No member of these families does."""
        families = [(shape, zero, offload) for offload in offloads]
        self.opened |= dict.fromkeys(families)
        self.result.too_large += families

    def _open_family(self, size: int, shape: Shape, zero: int, away: Offload, offloads: tuple[Offload, ...]) -> None:
        """(ZeRO stage, offload but for activations) -> the same, with the least that must be recomputed or carried."""
        each, offloads = size // len(offloads), self._undone(shape, zero, offloads, size)
        self.opened |= dict.fromkeys((shape, zero, offload) for offload in offloads)
        if not offloads:
            return
        if len(self.space.shardings_of(shape, zero)) == 1:
            self._open_shardings(each * len(offloads), shape, zero, away, offloads)
            return
        step_s = self.bounds.family_s(shape, zero, away, offloads)
        if step_s < INFINITE:
            self._push(step_s, shape, each * len(offloads), self._open_shardings, shape, zero, away, offloads)
            return
        self._none_fits(shape, zero, offloads)
        for offload in offloads:
            if not self._too_large(shape, zero, None, offload, each):
                self._reject(shape, "activations", each, NO_RECOMPUTING)

    def _open_shardings(self, size: int, shape: Shape, zero: int, away: Offload, offloads: tuple[Offload, ...]) -> None:
        """-> ZeRO groups and frequencies."""
        offloads, some = self._undone(shape, zero, offloads, size), set[Offload]()
        flags = len(self.space.sequence_parallels(shape.tensor))
        for sharding in self.space.shardings_of(shape, zero) if offloads else []:
            number = flags * sum(batch.num_recomputes for batch in self.space.batches_of(shape, zero, sharding))
            fits = [offload for offload in offloads if not self._too_large(shape, zero, sharding, offload, number)]
            some.update(fits)
            if fits:
                self._push_next(self._rows(shape, sharding, away, fits, number * len(fits)))
        self._none_fits(shape, zero, [offload for offload in offloads if offload not in some])

    def _too_large(self, shape: Shape, zero: int, sharding: Sharding | None, offload: Offload, size: int) -> bool:
        """Whether no member of a family can fit, with any sharding or one; then they are rejected."""
        on_gpu, on_host = self._over(shape, zero, sharding, offload)
        if max(on_gpu, on_host) <= 0:
            return False
        where = _told_over(on_gpu) if on_gpu > 0 else f"{_told_over(on_host)} in host memory"
        self._reject(shape, f"memory {zero}", size, f"ZeRO {zero}: {where}")
        return True

    def _most(self, offloads: list[Offload]) -> list[Offload]:
        """The offloads of which one leaves the fewest bytes on a GPU: all that can go; and without activations, which come back
        two layers at a time where others are already gone."""
        stay = [offload for offload in offloads if offload.activations == "none"]
        return [*offloads[-1:], *stay[-1:]] if offloads[-1:] != stay[-1:] else offloads[-1:]

    def _rows(
        self, shape: Shape, sharding: Sharding, away: Offload, offloads: list[Offload], size: int
    ) -> Iterator[tuple[float, Row, int]]:
        """(micro batch, sequence parallel, activations on the host) of some families with one sharding, the best first: seconds,
        the row, and how many candidates it and the later ones have. A row is made when no earlier one must be better."""
        fixed, made = self.bounds.fixed(shape, sharding.zero, sharding, away), list[tuple[float, int, Row]]()
        for floor_s, lot in self.bounds.lots(shape, sharding.zero, sharding):
            while made and made[0][0] <= floor_s + fixed.step_s:
                step_s, _, row = heapq.heappop(made)
                yield step_s, row, size
                size -= row.lot.size
            for offload in offloads:
                least, added_s = self.bounds.added(lot, offload, fixed)
                if least is None:
                    self._reject(shape, "activations", lot.size, NO_RECOMPUTING)
                    size -= lot.size
                else:
                    row = Row(lot, sharding, offload, fixed, least)
                    heapq.heappush(made, (floor_s + fixed.step_s + added_s, next(self.order), row))
        while made:
            step_s, _, row = heapq.heappop(made)
            yield step_s, row, size
            size -= row.lot.size

    def _push_next(self, rows: Iterator[tuple[float, Row, int]]) -> None:
        """The best row stands in the heap for the others."""
        found = next(rows, None)
        if found is not None:
            step_s, row, size = found
            self._push(step_s, row.shape, size, self._time_row, row, rows)

    def _time_row(self, size: int, row: Row, rows: Iterator[tuple[float, Row, int]]) -> None:
        """A row -> the same, priced in time under the first schedule with as little recomputed as is open."""
        self._push_next(rows)
        size = row.lot.size
        if not self._is_done(row.shape, row.zero, row.offload, size):
            rest = self.bounds.rest(row)
            floor_s = self.bounds.row_s(row, rest, row.least, row.lot.idle)
            self._push(floor_s, row.shape, size, self._open_row, row, rest)

    def _open_row(self, size: int, row: Row, rest: Rest) -> None:
        """(micro batch, sequence parallel) -> schedules, each with its own bubble and micro batches in flight."""
        if self._is_done(row.shape, row.zero, row.offload, size):
            return
        shape, lot, batch = row.shape, row.lot, row.batch
        for schedule, virtual in batch.schedules:
            number = self.space.num_recomputes(shape.pipeline, virtual)
            held = in_flight_of(schedule, shape.pipeline, virtual, batch.accumulation, 0)
            least = self.bounds.least(lot, row.offload, row.fixed, held)
            if least is None:
                self._reject(shape, "activations", number, NO_RECOMPUTING)
                continue
            idle = bubble_fraction(schedule, shape.pipeline, virtual, batch.accumulation)
            core = Core(shape, lot.sequence_parallel, batch.micro, schedule, virtual)
            floor_s = self.bounds.row_s(row, rest, least, idle)
            self._push(floor_s, shape, number, self._open_core, core, row.sharding, row.offload, least)

    def _open_core(self, size: int, core: Core, sharding: Sharding, offload: Offload, least: Least) -> None:
        """Finds the least recomputing that fits."""
        shape, space = core.shape, self.space
        if self._is_done(shape, sharding.zero, offload, size):
            return
        kinds, _ = space.recomputes(shape.pipeline, core.virtual)
        carried = offload.activations != "none"  # then what is recomputed need not be carried, and more can be faster
        priced, done = 0, False
        for kind in kinds:
            if kind in least.kinds and not done:
                priced += 1
                choice = point(core, sharding, offload, kind, space.layers_of(kind))
                if self.fits(choice):
                    self._push_leaf(choice, self.problem.time(self.problem.strategy(choice)).step_s)
                    done = kind == "none" and not carried
        if least.layers is not None and not done:
            found, number = self._layers_that_fit(core, sharding, offload, least.layers)
            priced += number
            for layers in found:
                choice = point(core, sharding, offload, "full", layers)
                self._push_leaf(choice, self.problem.time(self.problem.strategy(choice)).step_s)
        self.result.num_priced += priced
        self._reject(shape, "recompute", size - priced, "fits with less recomputed, or does not fit with more")

    def _layers_that_fit(
        self, core: Core, sharding: Sharding, offload: Offload, floor: int
    ) -> tuple[list[int | None], int]:
        """Return the numbers of recomputed layers that fit and may be the fastest, and how many were priced.

        More recomputed layers never hold more, so the fewest are halved to, and where nothing is carried these are the fastest.
        Only the second adds bytes where activations are carried: it is on the GPU beside the block that comes back.
        `floor`: layers of a pipeline rank that must be recomputed at least."""
        _, counts = self.space.recomputes(core.shape.pipeline, core.virtual)
        per_stage = -(-floor // core.virtual) if core.shape.pipeline > 1 else floor
        low, high = max(0, min(per_stage, len(counts)) - 1), len(counts) - 1
        asked: dict[int, bool] = {}

        def fits(place: int) -> bool:
            asked[place] = self.fits(point(core, sharding, offload, "full", counts[place]))
            return asked[place]

        carried, found = offload.activations != "none", list[int]()
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


def _told_over(num_bytes: float) -> str:
    return f"at least {num_bytes / GIB:.1f} GiB over"
