"""What no strategy of a group can beat, in seconds and in bytes, from a few exact prices of single points. Pure.

The bounds hold for any model in which

- a step takes at least (micro batches) x (time of one on the mean pipeline rank) x (1 + bubble), and sharding, offload and
  recomputing only add to it;
- the first pipeline rank holds its share of the states beside the activations of min(m, p) micro batches;
- of one (degrees, ZeRO stage, offload) family, the smallest micro batch with everything recomputed, sequence parallel, the
  widest ZeRO group, 1F1B, and talk after every micro batch holds the fewest bytes;
- more checkpointed layers hold fewer bytes and take longer.

tests/unit/test_search.py holds the search against brute force, which needs none of this.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from orchestrator.planner.memory import MemoryPrice
from orchestrator.planner.problem import Choice, Problem
from orchestrator.planner.space import PER_MICRO_BATCH, PER_STEP, Batch, Core, Shape, Sharding, Space, point
from orchestrator.planner.stages import layer_counts
from strategies.pipeline.cost import bubble_fraction, in_flight
from strategies.strategy import Offload, Schedule, Strategy

INFINITE = float("inf")
SLACK = 1 - 1e-9
"""Bounds are a hair below, so that rounding never puts one above what it bounds."""


MANY = 1024
"""Sequences of a micro batch whose activations outweigh any states."""


class Pass(NamedTuple):
    """One micro batch through the whole model on one tensor group, nothing recomputed: seconds."""

    compute_s: float
    messages_s: float


class Kept(NamedTuple):
    """Bytes that a layer of one sequence leaves for backward, by what is recomputed."""

    none_bytes: float
    selective_bytes: float
    full_bytes: float


class Fixed(NamedTuple):
    """What a family adds to any of its members."""

    first_rank_bytes: float
    """States, gathered parameters and reserve of the first pipeline rank."""
    gradient_bytes: float
    """Gradients of the first rank, held in forward where there is more than one micro batch or they are not sharded."""
    usable_bytes: float
    step_s: float
    """Optimizer and offload at the fewest micro batches."""


class Leanest(NamedTuple):
    """The schedule and ZeRO group that hold the fewest bytes at a micro batch."""

    core: Core
    sharding: Sharding


class Least(NamedTuple):
    """What must be recomputed under the leanest: the kinds that fit, and how many layers of a rank fully (None: does not fit
    or is not open). `none` among the kinds: nothing must."""

    kinds: tuple[str, ...]
    layers: int | None


@lru_cache(maxsize=65536)
def bubble(pipeline: int, schedule: Schedule, virtual: int, accumulation: int) -> float:
    """Idle over busy time of a schedule."""
    if pipeline == 1:
        return 0.0
    return bubble_fraction(
        Strategy(
            pipeline_parallel_degree=pipeline,
            pipeline_schedule=schedule,
            num_virtual_stages=virtual,
            gradient_accumulation_steps=accumulation,
        )
    )


class Bounds:
    """Lower bounds of one space, each made from exact prices when it is first asked for."""

    def __init__(self, space: Space) -> None:
        self.space, self.problem = space, space.problem
        self.passes: dict[tuple[int, bool, int], Pass] = {}
        self.keeps: dict[tuple[int, bool], Kept] = {}
        self.added: dict[tuple[int, bool, int, str], float] = {}
        self.messages_count = space.problem.pinned_fields["mesh_order"][-1] == "tensor"
        """Tensor neighbours are next to each other whatever the other degrees, so their messages cost the same."""

    def fewest_layers(self, pipeline: int) -> int:
        """Layers of the pipeline rank that has the fewest."""
        return min(layer_counts(self.problem.arch.num_layers, pipeline, self.problem.head_layers))

    def micro_pass(self, tensor: int, sequence_parallel: bool, micro: int) -> Pass:
        key = tensor, sequence_parallel, micro
        if key not in self.passes:
            compute_s, messages_s, _ = self._seconds(*key, "none")
            self.passes[key] = Pass(compute_s, messages_s)
        return self.passes[key]

    def kept(self, tensor: int, sequence_parallel: bool) -> Kept:
        """Bytes grow with the tokens, so they are read off once, where activations are sure to make the peak."""
        key = tensor, sequence_parallel
        if key not in self.keeps:
            one = [
                _layer_bytes(self.problem, _micro_choice(*key, MANY, kind)) / MANY
                for kind in ("none", "selective", "full")
            ]
            self.keeps[key] = Kept(*(size * SLACK for size in one))
        return self.keeps[key]

    def added_s(self, tensor: int, sequence_parallel: bool, micro: int, kind: str) -> float:
        """Seconds that recomputing every layer adds to one micro batch."""
        added = self.added.get((tensor, sequence_parallel, micro, kind))
        if added is None:
            _, sent_s, again_s = self._seconds(tensor, sequence_parallel, micro, kind)
            added = again_s + sent_s - self.micro_pass(tensor, sequence_parallel, micro).messages_s
            self.added[tensor, sequence_parallel, micro, kind] = added
        return added

    def _seconds(self, tensor: int, sequence_parallel: bool, micro: int, kind: str) -> tuple[float, float, float]:
        """(compute, messages, recompute) of one micro batch on one tensor group."""
        strategy = self.problem.strategy(_micro_choice(tensor, sequence_parallel, micro, kind))
        time, times = self.problem.time(strategy), strategy.gradient_accumulation_steps
        messages_s = time.tensor_parallel_s if self.messages_count else 0.0
        return time.compute_s / times, messages_s / times, time.recompute_s / times

    # Seconds --------------------------------------------------------------------------------------------------------

    def share_s(self, shape: Shape, sequence_parallel: bool, micro: int) -> float:
        """Seconds of a step on the mean pipeline rank, nothing recomputed; the rank with the fewest layers has the fewest
        messages."""
        one = self.micro_pass(shape.tensor, sequence_parallel, micro)
        fewest = self.fewest_layers(shape.pipeline) / self.problem.arch.num_layers
        return self.problem.accumulation(shape.data, micro) * (one.compute_s / shape.pipeline + one.messages_s * fewest)

    def shape_s(self, shape: Shape) -> float:
        flags = self.space.sequence_parallels(shape.tensor)
        times = [self.share_s(shape, flag, batch.micro) for batch in self.space.batches(shape) for flag in flags]
        return min(times, default=0.0)

    def least(
        self, shape: Shape, zero: int, sequence_parallel: bool, micro: int, offload: Offload, fixed: Fixed
    ) -> Least | None:
        """What must be recomputed at least for the first pipeline rank to hold its activations; None where nothing can."""
        accumulation = self.problem.accumulation(shape.data, micro)
        held = fixed.first_rank_bytes + fixed.gradient_bytes * (zero < 2 or accumulation > 1)
        flights = 0 if offload.activations != "none" else min(accumulation, shape.pipeline)
        kinds, counts = self.space.recomputes(shape.pipeline, 1)
        partly = "num_checkpointed_layers_per_stage" in self.space.pins
        if partly or flights == 0:  # a pinned number of layers may be less than all; what it saves is left open here
            return Least(tuple(kinds), 1 if counts else None)
        first = layer_counts(self.problem.arch.num_layers, shape.pipeline, self.problem.head_layers)[0]
        free = (fixed.usable_bytes - held) / flights / micro
        kept = self.kept(shape.tensor, sequence_parallel)
        sizes = {"none": kept.none_bytes, "selective": kept.selective_bytes}
        fitting = tuple(kind for kind in kinds if first * sizes[kind] <= free)
        layers = None
        if counts:
            missing, saved = first * kept.none_bytes - free, kept.none_bytes - kept.full_bytes
            needed = missing / saved if saved > 0 else 0.0 if missing <= 0 else INFINITE
            layers = max(1, math.ceil(needed * SLACK)) if needed <= first / SLACK else None
        return Least(fitting, layers) if fitting or layers is not None else None

    # Bytes ----------------------------------------------------------------------------------------------------------

    def smallest(self, shape: Shape, zero: int, offload: Offload) -> Choice:
        """The member of a family that holds the fewest bytes."""
        space = self.space
        core, sharding = self.leanest(shape, zero, space.batches(shape)[0], any(space.sequence_parallels(shape.tensor)))
        kinds, counts = space.recomputes(shape.pipeline, core.virtual)
        kind, layers = ("full", counts[-1]) if counts else (kinds[-1], space.layers_of(kinds[-1]))
        return point(core, sharding, offload, kind, layers)

    def leanest(self, shape: Shape, zero: int, batch: Batch, sequence_parallel: bool) -> Leanest:
        """The schedule and ZeRO group that hold the fewest bytes at a micro batch: 1F1B if it is open, the widest group, and
        talk after every micro batch."""
        sharding = max(
            batch.shardings[zero], key=lambda s: (s.group, s.gather == PER_MICRO_BATCH, s.reduce == PER_MICRO_BATCH)
        )
        schedule, virtual = next((s for s in batch.schedules if s[0] == "1f1b"), batch.schedules[0])
        return Leanest(Core(shape, sequence_parallel, batch.micro, schedule, virtual), sharding)

    def again_s(self, shape: Shape, sequence_parallel: bool, micro: int, least: Least) -> float:
        """Seconds that recomputing adds to a step, at least."""
        if "none" in least.kinds or "num_checkpointed_layers_per_stage" in self.space.pins:
            return 0.0
        key, num_layers = (shape.tensor, sequence_parallel, micro), self.problem.arch.num_layers
        fewest, options = self.fewest_layers(shape.pipeline), []
        if "selective" in least.kinds:
            options.append(self.added_s(*key, "selective") * fewest / num_layers)
        if least.layers is not None:
            options.append(self.added_s(*key, "full") * min(least.layers, fewest) / num_layers)
        return self.problem.accumulation(shape.data, micro) * min(options)

    def layers_short(self, choice: Choice, strategy: Strategy, memory: MemoryPrice) -> int:
        """Layers of a stage that must be recomputed beyond those of a choice that does not fit, at least: on the fullest rank
        each saves no more than it leaves there, times what the allocator adds."""
        kept = self.kept(choice.tensor, choice.sequence_parallel)
        stage = max(memory.stages, key=lambda stage: stage.peak_bytes)
        grown = stage.peak_bytes / max(1, stage.peak_bytes - stage.reserve)
        flights = in_flight(strategy, stage.pipeline_rank) * (choice.virtual if choice.pipeline > 1 else 1)
        saved = (kept.none_bytes - kept.full_bytes) * choice.micro * flights * grown
        if saved <= 0 or choice.offload.activations != "none":
            return 1
        return max(1, math.ceil((stage.peak_bytes - memory.usable_bytes) / saved * (1 - 1e-3)))

    def fixed(self, smallest: Choice, memory: MemoryPrice) -> Fixed:
        """What every member of the family has, from its smallest member."""
        shape = Shape(smallest.tensor, smallest.pipeline, smallest.data)
        choice = smallest._replace(micro=self.space.batches(shape)[-1].micro, schedule="1f1b", virtual=1)
        if smallest.zero == 3:
            choice = choice._replace(gather=PER_STEP)
        time = self.problem.time(self.problem.strategy(choice))
        first = memory.stages[0]
        states = first.parameters + first.master_weights + first.optimizer_states + first.gathered_parameters
        return Fixed(states + first.reserve, first.gradients, memory.usable_bytes, time.optimizer_s + time.offload_s)


def _micro_choice(tensor: int, sequence_parallel: bool, micro: int, kind: str) -> Choice:
    return Choice(tensor=tensor, sequence_parallel=sequence_parallel, micro=micro, reduce=PER_STEP, recompute=kind)


def _layer_bytes(problem: Problem, choice: Choice) -> float:
    """Bytes that a layer leaves for backward, of one micro batch, read off the first of two pipeline ranks; 0 (a bound as
    well) where the peak is at another moment or the model has one layer."""
    if problem.arch.num_layers < 2:
        return 0.0
    strategy = problem.strategy(choice._replace(pipeline=2, schedule="1f1b"))
    stage = problem.memory(strategy).stages[0]
    return stage.activations / min(2, strategy.gradient_accumulation_steps) / strategy.stages[0].num_layers
