"""What no strategy of a group can beat, in seconds and in bytes, from a few exact prices of single points. Pure.

The bounds hold for any model in which

- a step takes at least (micro batches) x (time of one on the slowest pipeline rank), and the bubble, in which one passes through
  the other ranks, and sharding, offload and recomputing only add to it;
- the first pipeline rank, going back through a block, holds its states, what `standing` counts and that block's work beside the
  activations of min(m, p) micro batches, or of two layers where all others wait on the host;
- more checkpointed layers hold fewer bytes, and take longer where activations stay on the GPU.

tests/unit/test_search.py holds the search against brute force, which needs none of this, and every bound against prices.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from operator import itemgetter

from orchestrator.planner.problem import Choice
from orchestrator.planner.search.activation_offload import least_carried_s
from orchestrator.planner.search.axes import Space
from orchestrator.planner.search.candidates import (
    PER_STEP,
    Batch,
    Busy,
    Core,
    Fewest,
    Fixed,
    Kept,
    Least,
    Lot,
    Pass,
    Rest,
    Row,
    Shape,
    Sharding,
    point,
)
from orchestrator.planner.search.extremes import Extremes
from strategies.constants import TIME
from strategies.model.cost import stepped_parameters
from strategies.pipeline.cost import tied_s
from strategies.price.memory import ROUNDING, least_bytes, tensor_budget
from strategies.price.step_time import TimePrice, passes, sent_s, stepping_s
from strategies.rank import MicroBatchBytes, PassSeconds, Share
from strategies.shares import shares
from strategies.strategy import Offload, Strategy

INFINITE = float("inf")
SLACK = 1 - 1e-9
"""Bounds are a hair below, so that rounding never puts one above what it bounds."""


class Bounds(Extremes):
    """Lower bounds of one space, each made from exact prices when it is first asked for."""

    def __init__(self, space: Space) -> None:
        super().__init__(space)
        self._ones: dict[tuple[int, bool, int, str], Strategy] = {}
        self._passes: dict[tuple[int, bool, int], Pass] = {}
        self._keeps: dict[tuple[int, bool, int], Kept] = {}
        self._added: dict[tuple[int, bool, int, str], float] = {}
        self._fewest: dict[tuple[Shape, int, int], Fewest] = {}
        self._lots: dict[tuple[Shape, int, Sharding | None], list[tuple[float, Lot]]] = {}
        self._lots_by_batch: dict[tuple[Shape, int], list[Lot]] = {}
        self._fixed: dict[tuple[Shape, int, Sharding | None, Offload], Fixed] = {}
        self._rests: dict[tuple[Shape, bool, int, Sharding, Offload], Rest] = {}
        self._busy: dict[tuple[Shape, bool, int], Busy] = {}
        self._floors: dict[Shape, float] = {}
        self._carries: dict[tuple[int, bool, int, Least], tuple[float, float]] = {}
        self._anything: dict[int, Least] = {}
        self.partly = "num_checkpointed_layers_per_stage" in space.pins
        self.messages_count = space.problem.pinned_fields["mesh_order"][-1] == "tensor"
        """Tensor neighbours are next to each other whatever the other degrees, so their messages cost the same."""

    def _one(self, tensor: int, sequence_parallel: bool, micro: int, kind: str) -> Strategy:
        """One micro batch on one tensor group."""
        key = tensor, sequence_parallel, micro, kind
        if key not in self._ones:
            choice = Choice(
                tensor=tensor, sequence_parallel=sequence_parallel, micro=micro, reduce=PER_STEP, recompute=kind
            )
            self._ones[key] = self.problem.strategy(choice)
        return self._ones[key]

    def micro_pass(self, tensor: int, sequence_parallel: bool, micro: int) -> Pass:
        key = tensor, sequence_parallel, micro
        if key not in self._passes:
            self._passes[key] = self._make_pass(*key)
        return self._passes[key]

    def _make_pass(self, tensor: int, sequence_parallel: bool, micro: int) -> Pass:
        found = self._passes_of(tensor, sequence_parallel, micro, "none")
        return Pass(
            sum(part.layer for part in found), sum(part.embedding for part in found), sum(part.head for part in found)
        )

    def _passes_of(self, tensor: int, sequence_parallel: bool, micro: int, kind: str) -> list[PassSeconds]:
        """Return the seconds of one micro batch on one tensor group, whose messages count where they cost the same everywhere."""
        problem = self.problem
        found = passes(problem.roof, problem.rank_memory, self._one(tensor, sequence_parallel, micro, kind))
        return [part for part in found.parts if self.messages_count or part.term in ("compute_s", "recompute_s")]

    def kept(self, tensor: int, sequence_parallel: bool, micro: int) -> Kept:
        key = tensor, sequence_parallel, micro
        if key not in self._keeps:
            none, selective, full = (self._micro_bytes(*key, kind) for kind in ("none", "selective", "full"))
            kept = none.layer, selective.checkpointed, full.checkpointed, none.working
            self._keeps[key] = Kept(*(num_bytes * SLACK for num_bytes in kept))
        return self._keeps[key]

    def _micro_bytes(self, tensor: int, sequence_parallel: bool, micro: int, kind: str) -> MicroBatchBytes:
        return self.problem.rank_memory.micro(self._one(tensor, sequence_parallel, micro, kind))

    def added_s(self, tensor: int, sequence_parallel: bool, micro: int, kind: str) -> float:
        """Seconds that recomputing a layer adds to one micro batch."""
        added = self._added.get((tensor, sequence_parallel, micro, kind))
        if added is None:
            plain, added_to = (self._passes_of(tensor, sequence_parallel, micro, each) for each in ("none", kind))
            added = sum(part.layer + part.checkpointed for part in added_to) - sum(part.layer for part in plain)
            self._added[tensor, sequence_parallel, micro, kind] = added
        return added

    # Seconds --------------------------------------------------------------------------------------------------------

    def busy_s(self, shape: Shape, sequence_parallel: bool, micro: int) -> Busy:
        key = shape, sequence_parallel, micro
        if key not in self._busy:
            one, times = (
                self.micro_pass(shape.tensor, sequence_parallel, micro),
                self.problem.accumulation(shape.data, micro),
            )
            slowest_s = one.slowest_s(self.busiest(shape.pipeline))
            self._busy[key] = Busy(times * one.whole_s(self.problem.arch.num_layers), times * slowest_s)
        return self._busy[key]

    def floor_s(self, shape: Shape, sequence_parallel: bool, micro: int, idle: float) -> float:
        """Seconds of a step with such a bubble, nothing recomputed."""
        return self.busy_s(shape, sequence_parallel, micro).floor_s(shape.pipeline, idle)

    def shape_s(self, shape: Shape) -> float:
        """Seconds of a step of any strategy of these degrees: the slowest pipeline rank at work, and its bubble."""
        if shape not in self._floors:
            flags = self.space.sequence_parallels(shape.tensor)
            idle = [(batch.micro, self.least_of(shape.pipeline, batch)[0]) for batch in self.space.batches(shape)]
            self._floors[shape] = min(
                (self.floor_s(shape, flag, *each) for flag in flags for each in idle), default=0.0
            )
        return self._floors[shape]

    def _exposed_s(self, shape: Shape, sharding: Sharding, batches: list[Batch]) -> list[float]:
        """Seconds of gradients and gathers that no compute hides, of a pipeline rank with the fewest layers and neither end of
        the model, by batch. A straight line in the micro batches, level where all is sent once a step."""
        low = self._sent_s(shape, sharding, batches[-1].micro)
        fewest, most = batches[-1].accumulation, batches[0].accumulation
        if fewest == most or (sharding.gather == sharding.reduce == PER_STEP) or sharding.zero < 2:
            return [low] * len(batches)
        slope = (self._sent_s(shape, sharding, batches[0].micro) - low) / (most - fewest)
        return [low + slope * (batch.accumulation - fewest) for batch in batches]

    def _sent_s(self, shape: Shape, sharding: Sharding, micro: int) -> float:
        problem = self.problem
        if shape.data == 1 or problem.cluster.calibration:  # measured rates need not make fewer bytes faster
            return 0.0
        strategy = problem.strategy(Choice(*shape, micro=micro, **sharding._asdict()))
        share = Share(self.rank_layers(shape.pipeline)[1], 0, False, False)
        return sent_s(problem.roof, problem.rank_memory, strategy, share).exposed_s

    def family_s(self, shape: Shape, zero: int, away: Offload, offloads: tuple[Offload, ...]) -> float:
        """Seconds of a step of any member of these families; INFINITE where none fits."""
        fixed, best = self.fixed(shape, zero, None, away), INFINITE
        for floor_s, lot in self.lots(shape, zero):
            if floor_s + fixed.step_s >= best:
                break
            for offload in offloads:
                _, added_s = self.added(lot, offload, fixed)
                best = min(best, floor_s + fixed.step_s + added_s)
        return best

    def added(self, lot: Lot, offload: Offload, fixed: Fixed) -> tuple[Least | None, float]:
        """(what must be recomputed at least, seconds that this, carrying activations, and the bubble of both add to the lot's
        floor); (None, INFINITE) where nothing fits."""
        least = self.least(lot, offload, fixed, lot.flights)
        if least is None:
            return None, INFINITE
        again_s = self.again_s(lot, least)
        return least, self.extra_s(lot, offload, again_s) + again_s * lot.idle

    def lots(self, shape: Shape, zero: int, sharding: Sharding | None = None) -> list[tuple[float, Lot]]:
        """Micro batches with and without sequence parallelism, and the seconds that a step of each takes at least, before the
        optimizer's, with any sharding or one: the least first."""
        key = shape, zero, sharding
        if key not in self._lots:
            batches = self.space.batches_of(shape, zero, sharding)
            exposed = self._exposed_s(shape, sharding, batches) if sharding else [0.0] * len(batches)
            found = [
                (lot.floor_s + exposed_s, lot)
                for batch, exposed_s in zip(batches, exposed, strict=True)
                for lot in self._lots_of(shape, batch)
            ]
            self._lots[key] = sorted(found, key=itemgetter(0))
        return self._lots[key]

    def _lots_of(self, shape: Shape, batch: Batch) -> list[Lot]:
        """Shared by all shardings."""
        key = shape, batch.micro
        if key not in self._lots_by_batch:
            idle, flights = self.least_of(shape.pipeline, batch)
            late, (first, fewest) = batch.accumulation >= 2 * shape.pipeline, self.rank_layers(shape.pipeline)
            self._lots_by_batch[key] = [
                Lot(
                    shape=shape,
                    floor_s=self.floor_s(shape, flag, batch.micro, idle),
                    batch=batch,
                    sequence_parallel=flag,
                    idle=idle,
                    flights=flights,
                    late=late,
                    kept=self.kept(shape.tensor, flag, batch.micro),
                    first=first,
                    fewest=fewest,
                    anything=self.anything(shape.pipeline),
                )
                for flag in self.space.sequence_parallels(shape.tensor)
            ]
        return self._lots_by_batch[key]

    def least(self, lot: Lot, offload: Offload, fixed: Fixed, flights: float) -> Least | None:
        """What must be recomputed at least for the first pipeline rank to hold the activations of so many micro batches,
        on its GPU or on the host; None where nothing can."""
        anything = lot.anything
        if self.partly:  # fewer than all may be checkpointed: left open here
            return anything
        kinds, counts = anything
        kept, first = lot.kept, lot.first
        free = (fixed.free_late if lot.late else fixed.free_once) - kept.working
        carried = offload.activations != "none"
        if carried:
            # On the host all of them wait; a block at work and the next one are on the GPU.
            few, waiting = min(first, 2), fixed.free_on_host / first / flights
            room = min(free / few, waiting)
        else:
            few, room = first, free / first / flights
            waiting = room
        if kept.none <= room and "none" in kinds:
            return anything
        fitting = tuple([kind for kind in kinds if getattr(kept, kind) <= room])
        if kept.full > room or counts is None:
            return Least(fitting, None) if fitting else None
        layers = first * (kept.none - waiting) / (kept.none - kept.full)
        if carried and kept.none > free / few:
            # Or the rest is so small that both are more than all.
            layers = (
                max(layers, (first * kept.none - free) / (kept.none - kept.full))
                if first * kept.full <= free
                else first
            )
        return Least(fitting, max(1, math.ceil(layers * SLACK)))

    # Bytes ----------------------------------------------------------------------------------------------------------

    def fewest(self, shape: Shape, batches: list[Batch]) -> Fewest:
        """Shardings of some degrees take all micro batches, or all but one that is a step's only one, or that one."""
        key = shape, batches[0].micro, len(batches)
        if key not in self._fewest:
            self._fewest[key] = self._find_fewest(shape, batches)
        return self._fewest[key]

    def _find_fewest(self, shape: Shape, batches: list[Batch]) -> Fewest:
        first, (kinds, layers) = self.rank_layers(shape.pipeline)[0], self.anything(shape.pipeline)
        opens = ("none", "selective", "full") if self.partly else (*kinds, *["full"] * (layers is not None))
        few, once, stay, here, waiting = min(first, 2), False, INFINITE, INFINITE, INFINITE
        for batch in batches:
            once = once or batch.accumulation < 2 * shape.pipeline
            flights = self.least_of(shape.pipeline, batch)[1]
            for flag in self.space.sequence_parallels(shape.tensor):
                kept = self.kept(shape.tensor, flag, batch.micro)
                one = min(getattr(kept, kind) for kind in opens)
                waiting = min(waiting, first * one * flights)
                stay = min(stay, first * one * flights + kept.working)
                here = min(here, few * one + kept.working)
        return Fewest(once, stay, here, waiting)

    def anything(self, pipeline: int) -> Least:
        """All recomputing that is open."""
        if pipeline not in self._anything:
            kinds, counts = self.space.recomputes(pipeline, 1)
            self._anything[pipeline] = Least(tuple(kinds), 1 if counts else None)
        return self._anything[pipeline]

    def again_s(self, lot: Lot, least: Least) -> float:
        """Seconds that recomputing adds to a step, at least."""
        kinds, layers = least
        if "none" in kinds or self.partly:
            return 0.0
        key, seconds = (lot.shape.tensor, lot.sequence_parallel, lot.batch.micro), INFINITE
        if "selective" in kinds:
            seconds = self.added_s(*key, "selective") * lot.fewest
        if layers is not None:
            seconds = min(seconds, self.added_s(*key, "full") * min(layers, lot.fewest))
        return lot.batch.accumulation * seconds

    def extra_s(self, lot: Lot, offload: Offload, again_s: float) -> float:
        """Seconds that recomputing, which takes so many, and carrying activations to the host and back add at least."""
        if offload.activations == "none":
            return again_s
        a_layer, hidden = self.carried_s(lot.shape.tensor, lot.sequence_parallel, lot.batch.micro, lot.anything)
        return max(again_s, lot.batch.accumulation * (a_layer * lot.fewest - hidden))

    def rest(self, row: Row) -> Rest:
        """A row's, priced under the first schedule with as little recomputed as is open."""
        away = stays(row.offload)  # what they cost is in extra_s
        key = row.shape, row.sequence_parallel, row.micro, row.sharding, away
        if key not in self._rests:
            schedule, virtual = row.batch.schedules[0]
            core = Core(row.shape, row.sequence_parallel, row.micro, schedule, virtual)
            kinds, counts = self.space.recomputes(row.shape.pipeline, virtual)
            kind, layers = (kinds[0], self.space.layers_of(kinds[0])) if kinds else ("full", counts[0])
            strategy = self.problem.strategy(point(core, row.sharding, away, kind, layers))
            time = self.problem.time(strategy)
            # The first schedule has the fewest stages a rank, and transfers.
            self._rests[key] = Rest(
                time.step_s - time.pipeline_bubble_s - self._avoidable_s(strategy, row.batch),
                self._hideable_s(time, row.zero),
                time.compute_s + time.recompute_s + time.tensor_parallel_s,
            )
        return self._rests[key]

    def row_s(self, row: Row, rest: Rest, least: Least, idle: float) -> float:
        """Seconds of a step of a row's members with such a bubble."""
        again_s = self.again_s(row.lot, least)
        is_open = "none" in self.space.recomputes(row.shape.pipeline, 1)[0]
        extra_s = self.extra_s(row.lot, row.offload, again_s) if is_open else 0.0
        busy = self.busy_s(row.shape, row.sequence_parallel, row.micro)
        bubble_s = (again_s + max(0.0, busy.total_s - rest.slowest_s) / max(1, row.shape.pipeline - 1)) * idle
        return rest.step_s + extra_s - min(rest.hideable_s, extra_s) + bubble_s

    def _avoidable_s(self, strategy: Strategy, batch: Batch) -> float:
        """Of a strategy's messages, what another schedule of the batch may not have: under zbv one rank holds both ends of the
        model, where layers are not dealt evenly the slowest rank may hold neither, and with several stages a rank replicas of a
        shard wait for a step's last micro batch."""
        problem, degree, seconds = self.problem, strategy.pipeline_parallel_degree, 0.0
        roof, memory = problem.roof, problem.rank_memory
        if degree > 1 and any(schedule == "zbv" for schedule, _ in batch.schedules):
            seconds += tied_s(roof, strategy, shares(strategy).by_rank[0], memory.shape(strategy).split)
        if degree > 1 and any(problem.arch.num_layers % (degree * virtual) for _, virtual in batch.schedules):
            for part in passes(roof, memory, strategy).parts:
                if part.term == "tensor_parallel_s":
                    seconds += strategy.gradient_accumulation_steps * (part.embedding + part.head)
        waits = strategy.zero_stage >= 2 and strategy.zero_group_size < strategy.data_parallel_degree
        if degree > 1 and waits and any(virtual > 1 for _, virtual in batch.schedules):
            once = replace(strategy, num_virtual_stages=2)
            seconds += max(0.0, problem.time(strategy).data_parallel_s - problem.time(once).data_parallel_s)
        return seconds

    def _hideable_s(self, time: TimePrice, zero: int) -> float:
        """Of the waiting for replicas, what more compute can hide: ZeRO 2 and 3 talk in the middle of it."""
        if zero < 2:
            return 0.0
        return max(0.0, time.data_parallel_exposed_s - time.data_parallel_s * (1 - TIME.hidden_sharded))

    def carried_s(self, tensor: int, sequence_parallel: bool, micro: int, anything: Least) -> tuple[float, float]:
        """least_carried_s of one micro batch on one tensor group."""
        key = tensor, sequence_parallel, micro, anything
        if key not in self._carries:
            kinds = dict.fromkeys(("none", *anything.kinds, *["full"] * (anything.layers is not None)))
            strategies = {kind: self._one(tensor, sequence_parallel, micro, kind) for kind in kinds}
            self._carries[key] = least_carried_s(self.problem, strategies)
        return self._carries[key]

    def fixed(self, shape: Shape, zero: int, sharding: Sharding | None, away: Offload) -> Fixed:
        """With any sharding of the ZeRO stage or one."""
        key = shape, zero, sharding, away
        if key not in self._fixed:
            self._fixed[key] = (
                self._make_fixed(shape, sharding, away) if sharding else self._any_fixed(shape, zero, away)
            )
        return self._fixed[key]

    def _any_fixed(self, shape: Shape, zero: int, away: Offload) -> Fixed:
        best, *others = (self.fixed(shape, zero, sharding, away) for sharding in self.kindest(shape, zero))
        for other in others:  # the optimizer's seconds are the same
            once, late, on_host, _ = map(max, best, other)
            best = Fixed(once, late, on_host, best.step_s)
        return best

    def _make_fixed(self, shape: Shape, sharding: Sharding, away: Offload) -> Fixed:
        problem, cluster, pipeline = self.problem, self.problem.cluster, shape.pipeline
        last = self.space.batches_of(shape, sharding.zero)[-1]
        first, fewest = self.rank_layers(pipeline)
        strategy = problem.strategy(Choice(*shape, micro=last.micro, offload=away, **sharding._asdict()))
        share = Share(first, 0, True, pipeline == 1)
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
            stepped_parameters(problem.work, shape.tensor, end._replace(layers=fewest), is_pipelined=pipeline > 1)
            for end in ends
        )
        step_s = sum(stepping_s(problem.roof, memory, strategy, memory.shape(strategy), parameters).values())
        return Fixed(budget - stands.once, budget - stands.late, on_host - stands.host, step_s)


@lru_cache(maxsize=256)
def stays(offload: Offload) -> Offload:
    """The same without activations."""
    return replace(offload, activations="none")
