"""The candidate that is over by least, for where nothing fits. Pure.

Of some degrees and a ZeRO stage, the smallest micro batch, or at ZeRO 2 and 3 the smallest of which a step takes no more than
there are pipeline ranks, with everything offloaded that can be, the widest ZeRO group and everything recomputed (or nothing, of
few layers) holds the fewest bytes; which schedule does depends on how layers are dealt out."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.planner.problem import Choice
from orchestrator.planner.search.axes import Space
from orchestrator.planner.search.bounds import Bounds
from orchestrator.planner.search.candidates import BatchOption, PipelineConfiguration, Shape, TooLarge, excess, point
from strategies.strategy import Offload, Schedule

FEW_LAYERS = 3
"""Layers of a rank of which what is on its way may outweigh what stays: layers gathered ahead, a layer computed again."""


def closest(space: Space, bounds: Bounds) -> TooLarge | None:
    """Return the candidate of a space that is over by least, where none fits; None of an empty space."""
    problem, found = space.problem, None
    for shape in space.shapes():
        for zero in range(4):
            for choice in smallest(space, bounds, shape, zero):
                memory = problem.memory(problem.strategy(choice))
                if found is None or excess(memory) < excess(found.memory):
                    found = TooLarge(choice, memory)
    return found


def smallest(space: Space, bounds: Bounds, shape: Shape, zero: int) -> Iterator[Choice]:
    """Yield the candidates of some degrees and a ZeRO stage of which one holds the fewest bytes."""
    batches, offloads = space.batches_of(shape, zero), space.offloads_of(zero, shape.replicas)
    if not batches or not offloads:
        return
    first = batches[0]
    once = next((batch for batch in batches if batch.accumulation <= shape.pipeline), first)
    # No gradients of ZeRO 2 and 3 wait while all micro batches are held.
    for batch in {first.micro: first, once.micro: once}.values() if zero >= 2 else (first,):
        for offload in _most(offloads):
            yield from _smallest_of(space, bounds, shape, zero, batch, offload)


def _most(offloads: list[Offload]) -> list[Offload]:
    """Return the offloads of which one leaves the fewest bytes on a GPU: all that can go; and without activations, which come
    back two layers at a time where others are already gone."""
    stay = [offload for offload in offloads if offload.activations == "none"]
    return list(dict.fromkeys([offloads[-1], *stay[-1:]]))


def _smallest_of(
    space: Space, bounds: Bounds, shape: Shape, zero: int, batch: BatchOption, offload: Offload
) -> Iterator[Choice]:
    flag = any(space.sequence_parallels(shape.tensor))
    widest = max(sharding.group for sharding in batch.shardings[zero])
    few = bounds.layouts(shape.pipeline).first <= FEW_LAYERS or bounds.partly
    kept: dict[tuple[Schedule, bool], tuple[Schedule, int]] = {}
    for schedule, virtual in batch.schedules:
        kept.setdefault((schedule, virtual > 1), (schedule, virtual))
    for schedule, virtual in kept.values():
        configuration = PipelineConfiguration(shape, flag, batch.micro, schedule, virtual)
        kinds, counts = space.recomputes(shape.pipeline, virtual)
        options = [("full", counts[-1])] if counts else []
        options += [(kind, space.layers_of(kind)) for kind in kinds] if few or not counts else []
        for sharding in batch.shardings[zero]:
            if sharding.group == widest:
                yield from (point(configuration, sharding, offload, kind, layers) for kind, layers in options)
