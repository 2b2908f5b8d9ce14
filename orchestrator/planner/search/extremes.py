"""The members of a group that hold the fewest bytes, and the kindest of its schedules. Pure.

Of one (degrees, ZeRO stage, offload) family, the smallest micro batch, or at ZeRO 2 and 3 the smallest of which a step takes no
more than there are ranks, with everything recomputed (or nothing, of few layers), sequence parallel, the widest ZeRO group, and
talk after every micro batch (or not, of few layers) holds the fewest bytes; of the schedules 1F1B, or one that deals the layers
out otherwise or computes the weights apart."""

from __future__ import annotations

from orchestrator.planner.problem import Choice
from orchestrator.planner.search.axes import Space
from orchestrator.planner.search.candidates import (
    PER_MICRO_BATCH,
    PER_STEP,
    Batch,
    Core,
    Leanest,
    Shape,
    Sharding,
    point,
)
from strategies.pipeline.cost import bubble_fraction, in_flight_of
from strategies.rank import Share
from strategies.shares import shares
from strategies.strategy import Offload, Place, Schedule

FEW_LAYERS = 3
"""Of a rank, that what is on its way may outweigh what stays: layers gathered ahead, a layer computed again."""


class Extremes:
    """Of one space."""

    def __init__(self, space: Space) -> None:
        self.space, self.problem = space, space.problem
        self._layouts: dict[int, tuple[tuple[Schedule, int], ...]] = {}
        self._least_of: dict[tuple[int, tuple[tuple[Schedule, int], ...], int], tuple[float, float]] = {}
        self._rank_layers: dict[int, tuple[int, int]] = {}
        self._busiest: dict[int, list[list[tuple[int, bool, bool]]]] = {}

    def layouts(self, pipeline: int) -> tuple[tuple[Schedule, int], ...]:
        """Schedules of which one holds the fewest bytes: 1F1B; zero-bubble, which computes a block's weights apart; zbv, whose
        first rank has the head as well; gpipe; and where layers are not dealt out evenly or only some are recomputed, every
        number of stages a rank can have."""
        if pipeline not in self._layouts:
            layers = self.problem.arch.num_layers
            partly = "num_checkpointed_layers_per_stage" in self.space.pins
            kept: dict[tuple[int, str], tuple[Schedule, int]] = {}
            for schedule, virtual in self.space.schedules(pipeline, accumulation=pipeline):
                even = layers % pipeline == 0 and layers % (pipeline * virtual) == 0 and not partly
                apart = schedule if schedule in ("zbv", "gpipe", "interleaved_zero_bubble") else ""
                key = (1 if even and schedule != "zbv" else virtual, apart)
                if key not in kept or schedule == "1f1b":
                    kept[key] = schedule, virtual
            self._layouts[pipeline] = tuple(kept.values()) or (("1f1b", 1),)
        return self._layouts[pipeline]

    def least_of(self, pipeline: int, batch: Batch) -> tuple[float, float]:
        """(the smallest bubble, the fewest micro batches in flight) of a batch's schedules."""
        key = pipeline, batch.schedules, batch.accumulation
        if key not in self._least_of:
            idle = min(
                bubble_fraction(schedule, pipeline, virtual, batch.accumulation)
                for schedule, virtual in batch.schedules
            )
            held = min(
                in_flight_of(schedule, pipeline, virtual, batch.accumulation, 0)
                for schedule, virtual in batch.schedules
            )
            self._least_of[key] = idle, held
        return self._least_of[key]

    def rank_layers(self, pipeline: int) -> tuple[int, int]:
        """(layers of the first pipeline rank, of the rank that has the fewest), the least of any layout."""
        if pipeline not in self._rank_layers:
            layouts = [[share.layers for share in shares] for shares in self._shares(pipeline)]
            self._rank_layers[pipeline] = min(held[0] for held in layouts), min(min(held) for held in layouts)
        return self._rank_layers[pipeline]

    def _shares(self, pipeline: int) -> list[tuple[Share, ...]]:
        """What the pipeline ranks of each layout hold."""
        choices = [
            Choice(pipeline=pipeline, schedule=schedule, virtual=virtual)
            for schedule, virtual in self.layouts(pipeline)
        ]
        return [shares(self.problem.strategy(choice)).by_rank for choice in choices]

    def busiest(self, pipeline: int) -> list[list[tuple[int, bool, bool]]]:
        """Of each layout the ranks of which one is the slowest: (layers, embedding, head)."""
        if pipeline not in self._busiest:
            layouts = {
                frozenset((share.layers, share.embedding, share.head) for share in held)
                for held in self._shares(pipeline)
            }
            self._busiest[pipeline] = [
                [one for one in held if not any(one != other and _covers(other, one) for other in held)]
                for held in layouts
            ]
        return self._busiest[pipeline]

    def smallest(self, shape: Shape, zero: int, offload: Offload) -> list[Choice]:
        """The members of a family of which one holds the fewest bytes, the likeliest first."""
        space, flag = self.space, any(self.space.sequence_parallels(shape.tensor))
        batches = self.space.batches_of(shape, zero)
        leanest = self._leanest_of(shape, batches[0], zero, flag)
        once = next((batch for batch in batches if batch.accumulation <= shape.pipeline), batches[0])
        if zero >= 2 and once is not batches[0]:  # no gradients wait while all micro batches are held
            leanest = [*leanest, *self._leanest_of(shape, once, zero, flag)]
        choices = []
        for core, sharding in leanest:
            kinds, counts = space.recomputes(shape.pipeline, core.virtual)
            # One layer computed again can need more than is left out of few.
            few = self.rank_layers(shape.pipeline)[0] <= FEW_LAYERS or "num_checkpointed_layers_per_stage" in space.pins
            for kind in [*["full"] * bool(counts), *(kinds if few or not counts else [])]:
                layers = counts[-1] if kind == "full" else space.layers_of(kind)
                choices.append(point(core, sharding, offload, kind, layers))
        return choices

    def _leanest_of(self, shape: Shape, batch: Batch, zero: int, flag: bool) -> list[Leanest]:
        shardings = self.widest(shape, batch.shardings[zero])
        return [found for sharding in shardings for found in self.leanest(shape, sharding, batch.micro, flag)]

    def kindest(self, shape: Shape, zero: int) -> list[Sharding]:
        """Of a ZeRO stage those, open or not, of which one leaves a rank the most bytes beside its activations, and the optimizer
        the least to do."""
        group = max(sharding.group for sharding in self.space.shardings_of(shape, zero))
        one = Sharding(zero, group, PER_MICRO_BATCH, PER_MICRO_BATCH if zero >= 2 else PER_STEP)
        if zero == 2 and shape.pipeline > 1:
            # Whole gradients that wait can be less than the gathered parameters that stay.
            return [one, one._replace(reduce=PER_STEP)]
        return [one]

    def widest(self, shape: Shape, shardings: tuple[Sharding, ...]) -> list[Sharding]:
        """Of a ZeRO stage's, those of which one holds the fewest bytes."""
        widest = max(sharding.group for sharding in shardings)
        kept = [sharding for sharding in shardings if sharding.group == widest]
        if widest > 1 and self.rank_layers(shape.pipeline)[0] > FEW_LAYERS:
            often = any(sharding.gather == PER_MICRO_BATCH for sharding in kept)
            kept = [one for one in kept if not often or one.gather == PER_MICRO_BATCH]
            if shape.pipeline == 1:  # a pipeline's gradients reduced once a step are not there in all of forward
                kept = [max(kept, key=lambda one: one.reduce == PER_MICRO_BATCH)]
        return kept

    def leanest(self, shape: Shape, sharding: Sharding, micro: int, sequence_parallel: bool) -> list[Leanest]:
        """The schedules of which one holds the fewest bytes at a micro batch. Not every schedule here can run this many micro
        batches: as a bound it holds all the same."""
        layouts = self.layouts(shape.pipeline)
        if sharding.zero < 2 and len(layouts) > 1:  # gpipe is lean where no gradients of ZeRO 2 and 3 wait in forward
            layouts = tuple(layout for layout in layouts if layout[0] != "gpipe")
        if sharding.zero >= 2 and self.problem.accumulation(shape.data, micro) == shape.pipeline > 1:
            # Of many stages a rank the last has its gradients when most activations are gone.
            most = dict(
                sorted(self.space.schedules(shape.pipeline, accumulation=shape.pipeline), key=lambda one: one[1])
            )
            layouts = tuple(dict.fromkeys((*layouts, *most.items())))
        return [
            Leanest(Core(shape, sequence_parallel, micro, schedule, virtual), sharding) for schedule, virtual in layouts
        ]

    def hungriest(self, shape: Shape, zero: int, activations: Place) -> Choice:
        """The member of a ZeRO stage that puts most into host memory."""
        batch = self.space.batches(shape)[-1]
        sharding = self.widest(shape, batch.shardings[zero])[0]
        core = self.leanest(shape, sharding, batch.micro, False)[0].core
        offload = Offload(optimizer="host", parameters="host", activations=activations)  # type: ignore[arg-type]
        return point(core, sharding._replace(group=1), offload, "none", None)


def _covers(other: tuple[int, bool, bool], one: tuple[int, bool, bool]) -> bool:
    return all(more >= less for more, less in zip(other, one, strict=True))
