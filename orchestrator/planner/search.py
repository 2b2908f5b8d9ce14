"""The best strategy of a space, exactly: best first over lower bounds. Pure and deterministic.

A partial choice (the degrees; then micro batch, schedule, sequence parallel; then ZeRO; then offload) stands for a named group
of candidates and carries a time that none of them can beat. The group with the smallest bound is opened first; the first
complete strategy that fits and comes out on top is the best of the whole space. What is never opened is rejected with its
size and one reason. Four facts of the model make the bounds valid, and a test holds the result against brute force:

- a step takes at least (micro batches) x (time of one on the mean stage) x (1 + bubble);
- sharding, offload and recomputing add time to what the same choice takes without them;
- of one (degrees, ZeRO stage, offload) family, the smallest micro batch with everything recomputed, sequence parallel, the
  widest ZeRO group, and talk after every micro batch holds the fewest bytes;
- more checkpointed layers hold fewer bytes and take longer.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import Any

from orchestrator.planner.memory import MemoryPrice
from orchestrator.planner.problem import Choice, Problem
from orchestrator.planner.space import PER_MICRO_BATCH, PER_STEP, Core, Shape, Sharding, Space, point, simplicity
from orchestrator.planner.stages import layer_counts
from strategies.pipeline.cost import bubble_fraction
from strategies.strategy import Offload, Schedule, Strategy

GIB = 2**30
SLACK = 1 - 1e-9
"""Bounds are a hair below, so that rounding never puts one above what it bounds."""
ONE_GPU = 1e9
"""Seconds that one GPU more weighs when the fewest are wanted: longer than any step."""

Family = tuple[int, int, int, Offload]
"""tensor, pipeline, ZeRO stage, offload: what `alternatives` holds the best of."""


@dataclass(frozen=True, slots=True)
class Found:
    """A complete strategy that fits."""

    choice: Choice
    step_s: float

    @property
    def family(self) -> Family:
        c = self.choice
        return c.tensor, c.pipeline, c.zero, c.offload


@dataclass(frozen=True, slots=True)
class TooLarge:
    """A family of which not even the smallest member fits."""

    choice: Choice
    memory: MemoryPrice


@dataclass(frozen=True, slots=True)
class Rejection:
    """A named group of candidates that one bound rejected."""

    group: str
    candidates: int
    reason: str


@dataclass
class SearchResult:
    """What a search found."""

    best: Found | None = None
    fastest: Found | None = None
    """The best without the job's targets; the same as `best` where it meets them."""
    families: list[Found] = field(default_factory=list)
    """The best of each family, best first, the chosen one's among them."""
    too_large: list[TooLarge] = field(default_factory=list)
    closest: TooLarge | None = None
    """Where nothing fits: the candidate that is over by least."""
    num_candidates: int = 0
    num_priced: int = 0
    """Candidates whose bytes were counted; with those of the rejections they are all."""
    num_feasible: int = 0
    rejections: list[Rejection] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The job's targets as limits on a step; a strategy that keeps them all is taken before any that does not."""

    step_s: float = float("inf")
    gpu_s: float = float("inf")
    """Seconds of a step times its GPUs."""

    def met(self, step_s: float, num_gpus: int) -> bool:
        return step_s <= self.step_s and step_s * num_gpus <= self.gpu_s

    @property
    def any(self) -> bool:
        return self != Wanted()


def search(problem: Problem, *, wanted: Wanted | None = None, num_families: int = 21) -> SearchResult:
    """The best strategy under the problem's objective, and the best of each of the next families."""
    started = time.perf_counter()
    wanted = wanted or Wanted()
    space = Space(problem, every_size=problem.objective != "fastest" or wanted.any)
    result = _Search(space, wanted, num_families).run()
    result.seconds = time.perf_counter() - started
    return result


@lru_cache(maxsize=65536)
def _bubble(pipeline: int, schedule: Schedule, virtual: int, accumulation: int) -> float:
    return bubble_fraction(
        Strategy(
            pipeline_parallel_degree=pipeline,
            pipeline_schedule=schedule,
            num_virtual_stages=virtual,
            gradient_accumulation_steps=accumulation,
        )
    )


Opened = Callable[[], None]


class _Search:
    def __init__(self, space: Space, wanted: Wanted, num_families: int) -> None:
        self.space, self.problem, self.wanted, self.num_families = space, space.problem, wanted, num_families
        self.result = SearchResult()
        self.messages_count = space.problem.pinned_fields["mesh_order"][-1] == "tensor"
        """Tensor neighbours are next to each other whatever the other degrees, so their messages cost the same."""
        self.heap: list[tuple[float, int, Any, int, Shape, int, Any]] = []
        self.order = count()
        self.done: set[Family] = set()
        self.dead: dict[tuple[Shape, int, Offload | None], MemoryPrice | None] = {}
        self.rejected: dict[tuple[Shape, str], tuple[int, str]] = {}
        self.micro_time: dict[tuple[int, bool, int], tuple[float, float]] = {}

    def run(self) -> SearchResult:
        result = self.result
        for shape in self.space.shapes():
            size = self.space.shape_size(shape)
            result.num_candidates += size
            if size:
                self._push(self._shape_floor(shape), shape, size, self._open_shape, shape)
        while self.heap and not self._enough():
            _, is_leaf, _, _, shape, size, (step_s, action, arguments) = heapq.heappop(self.heap)
            if is_leaf:
                self._take(arguments)
            elif self._hopeless(step_s, shape):
                self._reject(shape, "targets", size, f"no faster than {step_s:.3g} s a step, too slow for the targets")
            else:
                action(size, *arguments)
        best = result.best or result.fastest
        for _, is_leaf, _, _, shape, size, (step_s, _, _) in self.heap:
            if not is_leaf:
                than = f"the best takes {best.step_s:.3g}" if best else "no use"
                self._reject(shape, "slower", size, f"at least {step_s:.3g} s a step, {than}")
        result.best = best
        result.rejections = [
            Rejection(f"tensor {s.tensor}, pipeline {s.pipeline}, data {s.data}", number, reason)
            for (s, _), (number, reason) in self.rejected.items()
        ]
        return result

    def _enough(self) -> bool:
        return self.result.best is not None and len(self.result.families) >= self.num_families

    def _hopeless(self, step_s: float, shape: Shape) -> bool:
        """The group cannot meet the targets, and the best without them is known."""
        if self.result.best is not None or self.result.fastest is None:
            return False
        return not self.wanted.met(step_s, shape.num_gpus) and len(self.result.families) >= self.num_families

    def _key(self, step_s: float, num_gpus: int) -> float:
        objective = self.problem.objective
        if objective == "cheapest":
            return step_s * num_gpus
        return step_s + num_gpus * ONE_GPU if objective == "fewest_gpus" else step_s

    def _push(self, step_s: float, shape: Shape, size: int, action: Any, *arguments: Any) -> None:
        key = self._key(step_s * SLACK, shape.num_gpus)
        heapq.heappush(self.heap, (key, 0, (), next(self.order), shape, size, (step_s, action, arguments)))

    def _reject(self, shape: Shape, kind: str, number: int, reason: str) -> None:
        if number:
            before, first = self.rejected.get((shape, kind), (0, reason))
            self.rejected[shape, kind] = (before + number, first)

    def _take(self, found: Found) -> None:
        """A complete strategy came out on top: the best there is, or the best of its family."""
        result, num_gpus = self.result, found.choice.num_gpus
        if result.fastest is None:
            result.fastest = found
        if result.best is None and (not self.wanted.any or self.wanted.met(found.step_s, num_gpus)):
            result.best = found
            if found.family in self.done:  # an earlier member was better, and missed a target
                result.families = [other for other in result.families if other.family != found.family]
                self.done.discard(found.family)
        if found.family not in self.done:
            self.done.add(found.family)
            result.families.append(found)

    # Bounds on time -------------------------------------------------------------------------------------------------

    def _micro_floor(self, tensor: int, sequence_parallel: bool, micro: int) -> tuple[float, float]:
        """Seconds of one micro batch through the whole model on one tensor group, nothing recomputed: (compute, messages)."""
        key = tensor, sequence_parallel, micro
        if key not in self.micro_time:
            choice = Choice(tensor=tensor, sequence_parallel=sequence_parallel, micro=micro, reduce=PER_STEP)
            strategy = self.problem.strategy(choice)
            price, times = self.problem.time(strategy), strategy.gradient_accumulation_steps
            messages_s = price.tensor_parallel_s if self.messages_count else 0.0
            self.micro_time[key] = price.compute_s / times, messages_s / times
        return self.micro_time[key]

    def _share_floor(self, shape: Shape, sequence_parallel: bool, micro: int) -> float:
        """Seconds of a step on the mean pipeline rank; the rank with the fewest layers sends the fewest messages."""
        compute_s, messages_s = self._micro_floor(shape.tensor, sequence_parallel, micro)
        layers = self.problem.arch.num_layers
        fewest = min(layer_counts(layers, shape.pipeline, self.problem.head_layers)) / layers
        return self.problem.accumulation(shape.data, micro) * (compute_s / shape.pipeline + messages_s * fewest)

    def _shape_floor(self, shape: Shape) -> float:
        flags = self.space.sequence_parallels(shape.tensor)
        return min(
            (self._share_floor(shape, flag, micro) for micro in self.space.micros(shape.data) for flag in flags),
            default=0.0,
        )

    def _core_floor(self, core: Core) -> float:
        shape = core.shape
        share = self._share_floor(shape, core.sequence_parallel, core.micro)
        if shape.pipeline == 1:
            return share
        accumulation = self.problem.accumulation(shape.data, core.micro)
        return share * (1 + _bubble(shape.pipeline, core.schedule, core.virtual, accumulation))

    # Bounds on memory -----------------------------------------------------------------------------------------------

    def _smallest(self, shape: Shape, zero: int, offload: Offload) -> Choice:
        """The member of a family that holds the fewest bytes."""
        space = self.space
        micro = min(space.micros(shape.data))
        accumulation = self.problem.accumulation(shape.data, micro)
        shardings = [s for s in space.shardings(shape.tensor, shape.data, accumulation) if s.zero == zero]
        sharding = max(shardings, key=lambda s: (s.group, s.gather == PER_MICRO_BATCH, s.reduce == PER_MICRO_BATCH))
        schedules = space.schedules(shape.pipeline, accumulation) or [("1f1b", 1)]
        schedule, virtual = next((s for s in schedules if s[0] == "1f1b"), schedules[0])
        sequence_parallel = any(space.sequence_parallels(shape.tensor))
        kinds, counts = space.recomputes(shape.pipeline, virtual)
        kind, layers = ("full", counts[-1]) if counts else (kinds[-1], space.layers_of(kinds[-1]))
        core = Core(shape, sequence_parallel, micro, schedule, virtual)
        return point(core, sharding, offload, kind, layers)

    def _too_large(self, shape: Shape, zero: int, offload: Offload | None) -> MemoryPrice | None:
        """The memory of a family's smallest member where even that is too much. Offload None: whatever is offloaded."""
        key = shape, zero, offload
        if key not in self.dead:
            choice = self._smallest(shape, zero, offload or self.space.offloads[-1])
            memory = self.problem.memory(self.problem.strategy(choice))
            fits = memory.fits if offload is not None else memory.peak_bytes <= memory.usable_bytes
            self.dead[key] = None if fits else memory
            if not fits:
                self._note_too_large(choice, memory)
        return self.dead[key]

    def _note_too_large(self, choice: Choice, memory: MemoryPrice) -> None:
        found = TooLarge(choice, memory)
        self.result.too_large.append(found)
        if self.result.closest is None or _excess(memory) < _excess(self.result.closest.memory):
            self.result.closest = found

    # Opening a group ------------------------------------------------------------------------------------------------

    def _open_shape(self, size: int, shape: Shape) -> None:
        accumulation = self.problem.accumulation(shape.data, min(self.space.micros(shape.data)))
        stages = sorted({s.zero for s in self.space.shardings(shape.tensor, shape.data, accumulation)})
        memories = [self._too_large(shape, zero, None) for zero in stages]
        if all(memory is not None for memory in memories):
            least = min((memory for memory in memories if memory), key=_excess)
            self._reject(shape, "memory", size, told_excess(least))
            return
        for core in self.space.cores(shape):
            self._push(self._core_floor(core), shape, self.space.core_size(core), self._open_core, core)

    def _open_core(self, size: int, core: Core) -> None:
        """Prices the choice under every sharding that is not known to be too large."""
        shape, space = core.shape, self.space
        accumulation = self.problem.accumulation(shape.data, core.micro)
        each = size // len(space.shardings(shape.tensor, shape.data, accumulation))
        for sharding in space.shardings(shape.tensor, shape.data, accumulation):
            memory = self._too_large(shape, sharding.zero, None)
            if memory is not None:
                self._reject(shape, f"memory {sharding.zero}", each, f"ZeRO {sharding.zero}: {told_excess(memory)}")
                continue
            first = space.offloads[0]
            self._push(self._plain_time(core, sharding, first), shape, each, self._open_sharding, core, sharding)

    def _plain_time(self, core: Core, sharding: Sharding, offload: Offload) -> float:
        """Seconds of the choice with as little recomputed as is open."""
        kinds, counts = self.space.recomputes(core.shape.pipeline, core.virtual)
        kind, layers = (kinds[0], self.space.layers_of(kinds[0])) if kinds else ("full", counts[0])
        choice = point(core, sharding, offload, kind, layers)
        return self.problem.time(self.problem.strategy(choice)).step_s

    def _open_sharding(self, size: int, core: Core, sharding: Sharding) -> None:
        """Offload only where the choice does not fit without: it never saves time."""
        offloads = self.space.offloads
        each = size // len(offloads)
        if self._open_offload(each, core, sharding, offloads[0]):
            self._reject(core.shape, "offload", size - each, "fits without offload, which only adds time")
            return
        for offload in offloads[1:]:
            memory = self._too_large(core.shape, sharding.zero, offload)
            if memory is not None:
                self._reject(
                    core.shape, f"offload {offload}", each, f"ZeRO {sharding.zero}, offload: {told_excess(memory)}"
                )
                continue
            step_s = self._plain_time(core, sharding, offload)
            self._push(step_s, core.shape, each, self._open_offload, core, sharding, offload)

    def _open_offload(self, size: int, core: Core, sharding: Sharding, offload: Offload) -> bool:
        """Finds the least recomputing that fits; True where none is needed."""
        shape, space = core.shape, self.space
        if (shape.tensor, shape.pipeline, sharding.zero, offload) in self.done and self.result.best is not None:
            self._reject(shape, "slower", size, "slower than the best of its family")
            return False
        memory = self._too_large(shape, sharding.zero, offload)
        if memory is not None:
            self._reject(shape, f"memory {sharding.zero}", size, f"ZeRO {sharding.zero}: {told_excess(memory)}")
            return False
        kinds, counts = space.recomputes(shape.pipeline, core.virtual)
        priced = 0
        for kind in kinds:
            priced += 1
            if self._leaf(point(core, sharding, offload, kind, space.layers_of(kind))) and kind == "none":
                self.result.num_priced += priced
                self._reject(shape, "recompute", size - priced, "fits with less recomputed")
                return True
        if counts:
            priced += self._least_layers(core, sharding, offload, counts)
        self.result.num_priced += priced
        self._reject(shape, "recompute", size - priced, "fits with fewer layers recomputed, or does not fit with more")
        return False

    def _least_layers(self, core: Core, sharding: Sharding, offload: Offload, counts: list[int | None]) -> int:
        """Bisects the number of recomputed layers; returns how many numbers were priced."""
        low, high, priced = 0, len(counts), 0
        while low < high:
            middle = (low + high) // 2 if priced else high - 1
            priced += 1
            memory = self.problem.memory(self.problem.strategy(point(core, sharding, offload, "full", counts[middle])))
            if memory.fits:
                high = middle
            elif middle == len(counts) - 1:
                return priced
            else:
                low = middle + 1
        choice = point(core, sharding, offload, "full", counts[high])
        self._push_leaf(choice, self.problem.time(self.problem.strategy(choice)).step_s)
        return priced

    def _leaf(self, choice: Choice) -> bool:
        """Prices one strategy and keeps it if it fits."""
        strategy = self.problem.strategy(choice)
        if not self.problem.memory(strategy).fits:
            return False
        self._push_leaf(choice, self.problem.time(strategy).step_s)
        return True

    def _push_leaf(self, choice: Choice, step_s: float) -> None:
        self.result.num_feasible += 1
        found = Found(choice, step_s)
        shape = Shape(choice.tensor, choice.pipeline, choice.data)
        key = self._key(step_s, choice.num_gpus)
        heapq.heappush(self.heap, (key, 1, simplicity(choice), next(self.order), shape, 1, (step_s, None, found)))


def _excess(memory: MemoryPrice) -> float:
    return memory.peak_bytes / max(1, memory.usable_bytes)


def told_excess(memory: MemoryPrice) -> str:
    """ "92.4 GiB on stage 0, 14.1 over"."""
    over = memory.peak_bytes - memory.usable_bytes
    if over <= 0:
        return "does not fit in host memory or NVMe"
    ranks = [stage.pipeline_rank for stage in memory.stages if stage.peak_bytes == memory.peak_bytes]
    where = f" on stage {ranks[0]}" if len(memory.stages) > 1 else ""
    return f"{memory.peak_bytes / GIB:.1f} GiB{where}, {over / GIB:.1f} over"
