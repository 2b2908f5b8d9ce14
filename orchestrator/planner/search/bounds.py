"""Lower bounds: what no candidate of a group can beat, in seconds and in bytes, from a few exact prices. Pure.

The bounds hold for any model in which

- a step takes at least (micro batches) x (time of one on the slowest pipeline rank), and the bubble, in which one passes through
  the other ranks, and sharding, offload and recomputing only add to it;
- the first pipeline rank, going back through a block, holds its states, what `least_bytes` counts and that block's work beside
  the activations of min(m, p) micro batches, or of two layers where all others wait on the host;
- more checkpointed layers hold fewer bytes, and take longer where activations stay on the GPU.

tests/unit/test_search.py holds the search against brute force, which needs none of this, and every bound against prices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache
from typing import NamedTuple

from orchestrator.planner.problem import Choice
from orchestrator.planner.search.axes import Space
from orchestrator.planner.search.candidates import (
    PER_STEP,
    BatchOption,
    MicroBatchGroup,
    MinimumRecompute,
    Shape,
    Sharding,
)
from strategies.constants import TIME
from strategies.model.cost import stepped_parameters
from strategies.offload.cost import activations_s, exposed_s
from strategies.pipeline.cost import bubble_fraction
from strategies.pipeline.in_flight import in_flight_of
from strategies.price.memory import ROUNDING, least_bytes, tensor_budget
from strategies.price.step_time import passes, sent_s, stepping_s
from strategies.rank import MicroBatchBytes, PassSeconds, Share
from strategies.shares import shares
from strategies.strategy import Offload, Schedule, Strategy

INFINITE = float("inf")
SLACK = 1 - 1e-9
"""Bounds are a hair below, so that rounding never puts one above what it bounds."""


class Layouts(NamedTuple):
    """How the layouts of a pipeline deal out layers, at their least."""

    first: int
    """Layers of the first pipeline rank."""
    fewest: int
    """Layers of the rank that has the fewest."""
    busiest: tuple[tuple[Share, ...], ...]
    """Shares of which one is the slowest, by layout."""


class LayerBytes(NamedTuple):
    """Bytes that a layer of one micro batch leaves for backward, by what is recomputed, and what a block needs beside them."""

    none: float
    selective: float
    full: float
    working: float
    pending: float
    """Bytes of a layer between the halves of a split backward pass."""


class FixedCost(NamedTuple):
    """Bytes and seconds that candidates with the same degrees, sharding and offload share, whatever their activations."""

    free_once: float
    """Bytes of a GPU free for activations, where a step has fewer micro batches than twice the pipeline ranks."""
    free_late: float
    """The same where it has more."""
    free_on_host: float
    """Bytes free in a rank's part of host memory."""
    step_s: float
    """Seconds of the optimizer and of offload at the fewest micro batches."""


class CarriedSeconds(NamedTuple):
    """Seconds that carrying activations to the host and back adds to one micro batch at least, whatever is recomputed."""

    layer_s: float
    """Seconds a layer, what is computed again among them."""
    hidden_s: float
    """Seconds that the head may hide of all layers'."""


class Bounds:
    """Lower bounds of one space, each made from exact prices when it is first asked for."""

    def __init__(self, space: Space) -> None:
        self.space, self.problem = space, space.problem
        self.partly = "num_checkpointed_layers_per_stage" in space.pins
        self.messages_count = space.problem.pinned_fields["mesh_order"][-1] == "tensor"
        """Tensor neighbours are next to each other whatever the other degrees, so their messages cost the same."""
        # One value for each set of arguments: a search asks again and again.
        self.layouts = cache(self._layouts)
        self.fixed = cache(self._fixed)
        self.exposed_s = cache(self._exposed_s)
        self.layer_bytes = cache(self._layer_bytes)
        self.added_s = cache(self._added_s)
        self.carried_s = cache(self._carried_s)
        self.bubble = cache(self._bubble)
        self.anything = cache(self._anything)
        self._one = cache(self._one_micro_batch)
        self._pass = cache(self._plain_pass)

    # Groups ---------------------------------------------------------------------------------------------------------

    def groups(self) -> Iterator[MicroBatchGroup]:
        """Yield all micro batch groups of the space."""
        for shape in self.space.shapes():
            for batch in self.space.batches(shape):
                idle = self.bubble(shape.pipeline, batch.schedules, batch.accumulation)
                for flag in self.space.sequence_parallels(shape.tensor):
                    floor_s = self.floor_s(shape, flag, batch, idle)
                    held = (self.in_flight(shape, flag, batch, *schedule) for schedule in batch.schedules)
                    yield MicroBatchGroup(shape, batch, flag, idle, min(held), floor_s)

    def _bubble(self, pipeline: int, schedules: tuple[tuple[Schedule, int], ...], accumulation: int) -> float:
        """Return the smallest bubble of some schedules."""
        return min(bubble_fraction(schedule, pipeline, virtual, accumulation) for schedule, virtual in schedules)

    def in_flight(
        self, shape: Shape, sequence_parallel: bool, batch: BatchOption, schedule: Schedule, virtual: int
    ) -> float:
        """Return the fewest micro batches in flight on the first rank, by what each leaves between forward and backward: under
        zbv some are between the halves of their backward pass, where they may keep less."""
        held = in_flight_of(schedule, shape.pipeline, virtual, batch.accumulation, 0)
        if schedule != "zbv":
            return held
        kept = self.layer_bytes(shape.tensor, shape.context, sequence_parallel, batch.micro)
        return held * min(1.0, kept.pending / kept.none)

    def _layouts(self, pipeline: int) -> Layouts:
        schedules = self.space.schedules(pipeline, accumulation=pipeline) or [("1f1b", 1)]
        kept = {(virtual, schedule == "zbv"): (schedule, virtual) for schedule, virtual in schedules}
        dealt = {
            shares(self.problem.strategy(Choice(pipeline=pipeline, schedule=schedule, virtual=virtual))).by_rank
            for schedule, virtual in kept.values()
        }
        busiest = {
            tuple(one for one in held if not any(one != other and _covers(other, one) for other in held))
            for held in ({share._replace(checkpointed=0, stages=1) for share in by_rank} for by_rank in dealt)
        }
        return Layouts(
            first=min(by_rank[0].layers for by_rank in dealt),
            fewest=min(share.layers for by_rank in dealt for share in by_rank),
            busiest=tuple(busiest),
        )

    # Seconds --------------------------------------------------------------------------------------------------------

    def _one_micro_batch(self, tensor: int, context: int, sequence_parallel: bool, micro: int, kind: str) -> Strategy:
        """Return the strategy of one micro batch on one tensor group."""
        choice = Choice(
            tensor=tensor,
            context=context,
            sequence_parallel=sequence_parallel,
            micro=micro,
            reduce=PER_STEP,
            recompute=kind,
        )
        return self.problem.strategy(choice)

    def _parts(self, tensor: int, context: int, sequence_parallel: bool, micro: int, kind: str) -> list[PassSeconds]:
        """Return the seconds of one micro batch on one tensor group, messages among them where they cost the same everywhere."""
        problem = self.problem
        found = passes(problem.roof, problem.rank_memory, self._one(tensor, context, sequence_parallel, micro, kind))
        return [part for part in found.parts if self.messages_count or part.term in ("compute_s", "recompute_s")]

    def _plain_pass(self, tensor: int, context: int, sequence_parallel: bool, micro: int) -> PassSeconds:
        parts = self._parts(tensor, context, sequence_parallel, micro, "none")
        return PassSeconds("", *(sum(seconds) for seconds in zip(*(part[1:] for part in parts), strict=True)))

    def _added_s(self, tensor: int, context: int, sequence_parallel: bool, micro: int, kind: str) -> float:
        """Return the seconds that recomputing a layer adds to one micro batch."""
        plain, again = (self._parts(tensor, context, sequence_parallel, micro, each) for each in ("none", kind))
        return sum(part.layer + part.checkpointed for part in again) - sum(part.layer for part in plain)

    def floor_s(self, shape: Shape, sequence_parallel: bool, batch: BatchOption, idle: float) -> float:
        """Return the seconds of a step with such a bubble, nothing recomputed and nothing sent between replicas."""
        one = self._pass(shape.tensor, shape.context, sequence_parallel, batch.micro)
        layers = self.problem.arch.num_layers
        total_s = batch.accumulation * one.of(Share(layers, 0, True, True))
        if shape.pipeline == 1:
            return total_s
        busiest = self.layouts(shape.pipeline).busiest
        slowest_s = batch.accumulation * min(max(map(one.of, ranks)) for ranks in busiest)
        return slowest_s + (total_s - slowest_s) / (shape.pipeline - 1) * idle

    def _exposed_s(self, shape: Shape, sharding: Sharding, micro: int) -> float:
        """Return the seconds of gradients and gathers that no compute hides, of a pipeline rank with the fewest layers and
        neither end of the model."""
        problem = self.problem
        if shape.replicas == 1 or problem.cluster.calibration:  # measured rates need not make fewer bytes faster
            return 0.0
        strategy = problem.strategy(Choice(*shape, micro=micro, **sharding._asdict()))
        share = Share(self.layouts(shape.pipeline).fewest, 0, False, False)
        return sent_s(problem.roof, problem.rank_memory, strategy, share).exposed_s

    def least_s(
        self,
        group: MicroBatchGroup,
        sharding: Sharding,
        offload: Offload,
        least: MinimumRecompute,
        *,
        floor_s: float,
        idle: float,
    ) -> float:
        """Return the seconds of a step of any candidate that recomputes at least so much, in a bubble of at least `idle`."""
        # Of stages 0 and 1 all is sent once a step, whatever the micro batch.
        micro = group.batch.micro if sharding.zero >= 2 else self.space.batches(group.shape)[-1].micro
        fixed = self.fixed(group.shape, sharding, without_activations(offload))
        again_s = self.again_s(group, least)
        carried_s = 0.0
        if offload.activations != "none":
            anything = self.anything(group.shape.pipeline)
            one = self.carried_s(
                group.shape.tensor, group.shape.context, group.sequence_parallel, group.batch.micro, anything
            )
            layers = self.layouts(group.shape.pipeline).fewest
            carried_s = group.batch.accumulation * (one.layer_s * layers - one.hidden_s)
        sent = self.exposed_s(group.shape, sharding, micro)
        return floor_s + sent + fixed.step_s + max(again_s, carried_s) + again_s * idle

    def again_s(self, group: MicroBatchGroup, least: MinimumRecompute) -> float:
        """Return the seconds that recomputing adds to a step, at least."""
        kinds, layers = least
        if "none" in kinds or self.partly:
            return 0.0
        key, seconds = (group.shape.tensor, group.shape.context, group.sequence_parallel, group.batch.micro), INFINITE
        fewest = self.layouts(group.shape.pipeline).fewest
        if "selective" in kinds:
            seconds = self.added_s(*key, "selective") * fewest
        if layers is not None:
            seconds = min(seconds, self.added_s(*key, "full") * min(layers, fewest))
        return group.batch.accumulation * seconds

    def _carried_s(
        self, tensor: int, context: int, sequence_parallel: bool, micro: int, anything: MinimumRecompute
    ) -> CarriedSeconds:
        """Return what carrying activations adds under the recomputing that makes it least. Of checkpointed and plain layers any
        mix may be best: seconds are piecewise linear in it, so its ends and kinks are tried."""
        problem = self.problem
        memory, roof, length = problem.rank_memory, problem.roof, problem.sequence_length
        plain = self._one(tensor, context, sequence_parallel, micro, "none")
        shape = memory.shape(plain)
        tokens = shape.tokens(memory.question, plain)
        layer = roof.layer(plain, shape, tokens, length)

        def link_s(kind: str) -> float:
            share = Share(1, int(kind != "none"), False, False)
            kept = memory.micro(self._one(tensor, context, sequence_parallel, micro, kind)).of(share)
            return activations_s(kept, problem.cluster)

        def exposed(link: float) -> float:
            return exposed_s(link, forward_s=layer.forward_s, backward_s=layer.backward_s)

        whole = link_s("none")
        options = [exposed(whole)]
        if "selective" in anything.kinds:
            options.append(exposed(link_s("selective")) + layer.again_selective_s)
        if anything.layers is not None:
            less = whole - link_s("full")
            phases = layer.forward_s, layer.backward_s
            kinks = [(whole - 2 * TIME.offload_hidden * phase) / less for phase in phases] if less else []
            mixes = [mix for mix in (1.0, *kinks) if 0 <= mix <= 1]
            options += [exposed(whole - mix * less) + mix * layer.again_full_s for mix in mixes]
        return CarriedSeconds(min(options), TIME.offload_hidden * roof.head(tokens, shape.split))

    # Bytes ----------------------------------------------------------------------------------------------------------

    def _layer_bytes(self, tensor: int, context: int, sequence_parallel: bool, micro: int) -> LayerBytes:
        def of(kind: str) -> MicroBatchBytes:
            return self.problem.rank_memory.micro(self._one(tensor, context, sequence_parallel, micro, kind))

        none, selective, full = of("none"), of("selective"), of("full")
        kept = none.layer, selective.checkpointed, full.checkpointed, none.working, none.pending
        return LayerBytes(*(num_bytes * SLACK for num_bytes in kept))

    def _anything(self, pipeline: int) -> MinimumRecompute:
        """Return all recomputing that is open."""
        kinds, counts = self.space.recomputes(pipeline, 1)
        return MinimumRecompute(tuple(kinds), 1 if counts else None)

    def least(
        self, group: MicroBatchGroup, sharding: Sharding, offload: Offload, in_flight: float
    ) -> MinimumRecompute | None:
        """Return what must be recomputed at least for the first pipeline rank to hold the activations of so many micro batches,
        on its GPU or on the host; None where nothing can."""
        anything = self.anything(group.shape.pipeline)
        if self.partly:  # fewer than all may be checkpointed: left open here
            return anything
        kinds, counts = anything
        fixed = self.fixed(group.shape, sharding, without_activations(offload))
        kept = self.layer_bytes(group.shape.tensor, group.shape.context, group.sequence_parallel, group.batch.micro)
        first, late = (
            self.layouts(group.shape.pipeline).first,
            group.batch.accumulation >= 2 * group.shape.pipeline,
        )
        free = (fixed.free_late if late else fixed.free_once) - kept.working
        carried = offload.activations != "none"
        if carried:
            # On the host all of them wait; a block at work and the next one are on the GPU.
            few, waiting = min(first, 2), fixed.free_on_host / first / in_flight
            room = min(free / few, waiting)
        else:
            few, room = first, free / first / in_flight
            waiting = room
        if kept.none <= room and "none" in kinds and fixed.free_on_host >= 0:
            return anything
        fitting = tuple([kind for kind in kinds if getattr(kept, kind) <= room])
        if fixed.free_on_host < 0:
            return None
        if kept.full > room or counts is None:
            return MinimumRecompute(fitting, None) if fitting else None
        layers = first * (kept.none - waiting) / (kept.none - kept.full)
        if carried and kept.none > free / few:
            # Or the rest is so small that both are more than all.
            layers = (
                max(layers, (first * kept.none - free) / (kept.none - kept.full))
                if first * kept.full <= free
                else first
            )
        return MinimumRecompute(fitting, max(1, math.ceil(layers * SLACK)))

    def _fixed(self, shape: Shape, sharding: Sharding, away: Offload) -> FixedCost:
        problem, cluster, pipeline = self.problem, self.problem.cluster, shape.pipeline
        last = self.space.batches_of(shape, sharding.zero)[-1]
        layouts = self.layouts(pipeline)
        strategy = problem.strategy(Choice(*shape, micro=last.micro, offload=away, **sharding._asdict()))
        share = Share(layouts.first, 0, True, pipeline == 1)
        budget, length = tensor_budget(cluster), problem.sequence_length
        stands = least_bytes(
            problem.work,
            strategy,
            share,
            cluster,
            piped=pipeline > 1,
            sequence_length=length,
            precision=problem.precision,
        )
        on_host = cluster.host.memory_bytes / min(cluster.gpus_per_node, shape.num_gpus) + ROUNDING
        ends = [share] if pipeline == 1 else [share, Share(0, 0, False, True)]
        memory = problem.rank_memory
        parameters = min(
            stepped_parameters(
                problem.work, shape.tensor, end._replace(layers=layouts.fewest), is_pipelined=pipeline > 1
            )
            for end in ends
        )
        step_s = sum(stepping_s(problem.roof, memory, strategy, memory.shape(strategy), parameters).values())
        return FixedCost(budget - stands.once, budget - stands.late, on_host - stands.host, step_s)


@lru_cache(maxsize=256)
def without_activations(offload: Offload) -> Offload:
    """Return the same offload with activations on the GPU."""
    return replace(offload, activations="none")


def _covers(other: Share, one: Share) -> bool:
    return other.layers >= one.layers and other.embedding >= one.embedding and other.head >= one.head
