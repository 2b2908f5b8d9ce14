"""The space of strategies that one problem leaves open: each field's values, in the order of the search. Pure.

A pinned field has one value. Values that can only waste are not in the space: a micro batch that neither divides a replica's
share of the batch nor is a power of two, a pipeline that divides neither the layers nor the GPUs, a data-parallel degree that
leaves GPUs idle without saving a micro batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import product
from typing import Any

from orchestrator.planner.problem import Choice, PlanError, Problem
from orchestrator.planner.search.candidates import (
    PER_MICRO_BATCH,
    PER_STEP,
    BatchOption,
    PipelineConfiguration,
    Shape,
    Sharding,
    point,
)
from strategies.catalog import unbuilt, wrong_precision
from strategies.rooms import degrees
from strategies.strategy import INTERLEAVED, Offload, Schedule, Strategy


class Space:
    """Every combination of values of the fields that a problem leaves open."""

    def __init__(self, problem: Problem, *, every_size: bool = False) -> None:
        """`every_size`: smaller data-parallel degrees are candidates too, for objectives that may prefer fewer GPUs."""
        self.problem, self.pins = problem, problem.pins
        self.every_size = every_size
        self.engine = self.pins.get("engine", "native")
        self._batches: dict[Shape, tuple[BatchOption, ...]] = {}
        self._batches_of: dict[tuple[Shape, int, Sharding | None], list[BatchOption]] = {}
        self._schedules: dict[tuple[int, bool], tuple[tuple[tuple[Schedule, int], ...], int]] = {}
        self._shardings: dict[tuple[Shape, bool], dict[int, tuple[Sharding, ...]]] = {}
        self._shardings_of: dict[tuple[Shape, int], list[Sharding]] = {}
        self._offloads: dict[int, list[Offload]] = {}
        self._recomputes: dict[tuple[int, int], tuple[list[str], list[int | None]]] = {}

    def is_alike(self, other: Space) -> bool:
        """Return whether another space differs at most in what may be offloaded, and in how bold its choice is."""
        ours, theirs = (one.problem.without_pins("offload").changed(bold=False) for one in (self, other))
        return ours == theirs and self.every_size == other.every_size

    def _is_built(self, field: str, **choices: Any) -> bool:
        """The engine carries these choices out together. Always, unless only what is built is wanted."""
        if not self.problem.built_only:
            return True
        return unbuilt(Strategy(engine=self.engine, **choices), field=field) is None

    def _kept(self, values: list[Any], field: str) -> list[Any]:
        """The values that the engine carries out; the pinned ones are judged by plan.py, by name."""
        return [value for value in values if self._is_built(field, **{field: value})]

    def _degrees(self, values: list[int], field: str) -> list[int]:
        compiled = self.pins.get("compile", False)
        kept = self._kept(values, field)
        return [value for value in kept if self._is_built("compile", compile=compiled, **{field: value})]

    def offloads_of(self, zero: int, replicas: int) -> list[Offload]:
        """Parameters stream in block by block, as ZeRO 3 gathers them, or on a single replica."""
        if zero == 3 or replicas == 1 or "offload" in self.pins:
            return self._built_offloads(zero)
        return [offload for offload in self._built_offloads(zero) if offload.parameters == "none"]

    def _built_offloads(self, zero: int) -> list[Offload]:
        if zero not in self._offloads:
            # What a recompute that is open still lets out is not left out here.
            again = self.pins.get("activation_checkpointing", "full")
            self._offloads[zero] = [
                offload
                for offload in self.offloads
                if self._is_built("offload", offload=offload, zero_stage=zero, activation_checkpointing=again)
            ]
        return self._offloads[zero]

    @cached_property
    def offloads(self) -> list[Offload]:
        """Simplest first. Parameters leave only together with the optimizer states that are larger."""
        if "offload" in self.pins:
            return [self.pins["offload"]]
        places = ["none", "host"] + (["nvme"] if self.problem.cluster.host.nvme_bytes else [])
        options = [
            Offload(optimizer=optimizer, parameters=parameters, activations=activations)  # type: ignore[arg-type]
            for activations, parameters, optimizer in product(("none", "host"), places, places)
            if places.index(parameters) <= places.index(optimizer)
            # The host steps 32-bit moments.
            and not (self.problem.eight_bit and optimizer != "none")
        ]
        return self._kept(options, "offload")

    @cached_property
    def tensors(self) -> list[int]:
        if "tensor_parallel_degree" in self.pins:
            return [self.pins["tensor_parallel_degree"]]
        heads, most = self.problem.tensor_divides, self.problem.num_gpus
        return self._degrees([n for n in range(1, min(heads, most) + 1) if heads % n == 0], "tensor_parallel_degree")

    @cached_property
    def contexts(self) -> list[int]:
        if "context_parallel_degree" in self.pins:
            return [self.pins["context_parallel_degree"]]
        tried = degrees("context_parallel_degree", self.problem.sequence_length, self.problem.num_gpus)
        return self._degrees(tried, "context_parallel_degree")

    def pipelines(self, tensor: int, context: int = 1) -> list[int]:
        if "pipeline_parallel_degree" in self.pins:
            return [self.pins["pipeline_parallel_degree"]]
        layers, room = self.problem.arch.num_layers, self.problem.num_gpus // (tensor * context)
        values = [n for n in range(1, min(layers, room) + 1) if layers % n == 0 or room % n == 0]
        return self._degrees(values, "pipeline_parallel_degree")

    def datas(self, tensor: int, pipeline: int, context: int = 1) -> list[int]:
        room = self.problem.num_gpus // (tensor * pipeline * context)
        if "data_parallel_degree" in self.pins:
            pinned = self.pins["data_parallel_degree"]
            return [pinned] if pinned <= room else []
        if room == 0:
            return []
        batch = self.problem.global_batch_size
        most = min(room, batch)
        if not self.every_size:
            tried = {most, _tight(batch, most)}
        elif most <= 64:
            tried = {most} | {_tight(batch, degree) for degree in range(1, most + 1)}
        else:
            tried = {most, _tight(batch, most)} | {2**i for i in range(most.bit_length())}
        group = self.pins.get("zero_group_size", 1)
        return sorted(degree for degree in tried if degree * context % group == 0)

    def shapes(self) -> Iterator[Shape]:
        for context, tensor in product(self.contexts, self.tensors):
            for pipeline in self.pipelines(tensor, context):
                for data in self.datas(tensor, pipeline, context):
                    yield Shape(tensor, pipeline, data, context)

    def sequence_parallels(self, tensor: int) -> list[bool]:
        if "sequence_parallel" in self.pins:
            return [self.pins["sequence_parallel"]]
        # No sequence is padded.
        return [False, True] if tensor > 1 and self.problem.sequence_length % tensor == 0 else [False]

    def micros(self, data: int) -> list[int]:
        """Divisors of a replica's share of the batch, and powers of two."""
        problem, pins = self.problem, self.pins
        share = -(-problem.global_batch_size // data)
        accumulation = pins.get("gradient_accumulation_steps")
        if "micro_batch_size" in pins:
            values = [pins["micro_batch_size"]]
        elif accumulation is not None:
            values = [-(-share // accumulation)]
        else:
            values = _micros(share)
        if accumulation is not None:
            values = [micro for micro in values if problem.accumulation(data, micro) == accumulation]
        return values

    def schedules(self, pipeline: int, accumulation: int) -> list[tuple[Schedule, int]]:
        """(schedule, stages per pipeline rank), simplest first."""
        pins, layers = self.pins, self.problem.arch.num_layers
        pinned: Schedule | None = pins.get("pipeline_schedule")
        virtual: int | None = pins.get("num_virtual_stages")
        if pipeline == 1:
            return [(pinned or "1f1b", virtual or 1)]
        options = _schedules(layers, pipeline)
        if pinned is not None and virtual is not None:
            options = [(pinned, virtual)]
        return [
            (schedule, stages)
            for schedule, stages in options
            if (pinned is None or schedule == pinned)
            and (virtual is None or stages == virtual)
            and pipeline * stages <= layers
            and (stages == 1 or schedule not in INTERLEAVED or accumulation % pipeline == 0)
        ]

    def shardings(self, shape: Shape, accumulation: int) -> list[Sharding]:
        pins = self.pins
        stages = [pins["zero_stage"]] if "zero_stage" in pins else [0, 1, 2, 3] if shape.replicas > 1 else [0]
        stages = [zero for zero in stages if self._is_built_stage(zero, shape)]
        return [
            Sharding(zero, group, gather, reduce)
            for zero in stages
            for group in self._groups(zero, shape.tensor, shape.replicas)
            for gather, reduce in self._frequencies(zero, accumulation, shape.pipeline)
        ]

    def _is_built_stage(self, zero: int, shape: Shape) -> bool:
        if not self.problem.built_only:
            return True
        choices: dict[str, Any] = {
            "zero_stage": zero,
            "states": self.problem.states[zero],
            "tensor_parallel_degree": shape.tensor,
            "pipeline_parallel_degree": shape.pipeline,
        }
        computes = wrong_precision(Strategy(engine=self.engine, **choices), self.problem.precision) is None
        return computes and all(self._is_built(field, **choices) for field in ("zero_stage", "states"))

    def _groups(self, zero: int, tensor: int, replicas: int) -> list[int]:
        """Ranks that share one copy: all replicas, or those of one node."""
        if "zero_group_size" in self.pins:
            return [self.pins["zero_group_size"]]
        if zero == 0 or replicas == 1:
            return [1]
        near = max(1, self.problem.cluster.gpus_per_node // tensor)
        inside = next(n for n in range(min(near, replicas), 0, -1) if replicas % n == 0)
        groups = [replicas, inside] if 1 < inside < replicas else [replicas]
        return [
            n for n in groups if self._is_built("zero_group_size", data_parallel_degree=replicas, zero_group_size=n)
        ]

    def _frequencies(self, zero: int, accumulation: int, pipeline: int) -> list[tuple[str, str]]:
        often = zero >= 2
        gathers, reduces = [PER_MICRO_BATCH], [PER_MICRO_BATCH if often else PER_STEP]
        if accumulation > 1:
            gathers = [PER_MICRO_BATCH, PER_STEP] if zero == 3 else gathers
            reduces = [PER_MICRO_BATCH, PER_STEP] if often else reduces
        gathers = [self.pins["gather"]] if "gather" in self.pins else gathers
        if "reduce" in self.pins:
            return list(product(gathers, [self.pins["reduce"]]))
        at = {"zero_stage": zero, "gradient_accumulation_steps": accumulation, "pipeline_parallel_degree": pipeline}
        return list(product(gathers, [value for value in reduces if self._is_built("reduce", reduce=value, **at)]))

    def recomputes(self, pipeline: int, virtual: int) -> tuple[list[str], list[int | None]]:
        """(none and selective as far as open, numbers of layers for full: None is all of them)."""
        key = pipeline, virtual if pipeline > 1 else 1
        if key not in self._recomputes:
            self._recomputes[key] = self._open_recomputes(key[0] * key[1])
        return self._recomputes[key]

    def _open_recomputes(self, num_stages: int) -> tuple[list[str], list[int | None]]:
        kind = self.pins.get("activation_checkpointing")
        pinned: int | None = self.pins.get("num_checkpointed_layers_per_stage")
        if kind is not None:
            return ([kind], []) if kind != "full" else ([], [pinned])
        if pinned is not None:
            return ["none"], [pinned]
        most = -(-self.problem.arch.num_layers // num_stages)
        return self._kept(["none", "selective"], "activation_checkpointing"), [*range(1, most), None]

    def num_recomputes(self, pipeline: int, virtual: int) -> int:
        kinds, counts = self.recomputes(pipeline, virtual)
        return len(kinds) + len(counts)

    def batches(self, shape: Shape) -> tuple[BatchOption, ...]:
        """The micro batches of some degrees, those left out that no schedule or no ZeRO group takes."""
        if shape not in self._batches:
            self._batches[shape] = tuple(self._open_batches(shape))
        return self._batches[shape]

    def batches_of(self, shape: Shape, zero: int, sharding: Sharding | None = None) -> list[BatchOption]:
        """Return the micro batches that a ZeRO stage, or one sharding of it, takes."""
        key = shape, zero, sharding
        if key not in self._batches_of:
            self._batches_of[key] = [
                batch
                for batch in self.batches(shape)
                if (sharding in batch.shardings.get(zero, ()) if sharding else zero in batch.shardings)
            ]
        return self._batches_of[key]

    def shardings_of(self, shape: Shape, zero: int) -> list[Sharding]:
        """Return the shardings that a ZeRO stage takes at any micro batch."""
        key = shape, zero
        if key not in self._shardings_of:
            batches = self.batches_of(shape, zero)
            self._shardings_of[key] = list(dict.fromkeys(one for batch in batches for one in batch.shardings[zero]))
        return self._shardings_of[key]

    def _open_batches(self, shape: Shape) -> Iterator[BatchOption]:
        for micro in self.micros(shape.data):
            accumulation = self.problem.accumulation(shape.data, micro)
            fed = {"pipeline_parallel_degree": shape.pipeline, "gradient_accumulation_steps": accumulation}
            if not self._is_built("gradient_accumulation_steps", **fed):
                continue
            schedules, recomputes = self._scheduled(shape.pipeline, accumulation)
            by_stage = self._by_stage(shape, accumulation)
            if schedules and by_stage:
                yield BatchOption(micro, accumulation, schedules, by_stage, recomputes)

    def _scheduled(self, pipeline: int, accumulation: int) -> tuple[tuple[tuple[Schedule, int], ...], int]:
        """(schedules, recomputes over all of them), the same for all numbers of micro batches that divide alike."""
        key = pipeline, accumulation % pipeline == 0
        if key not in self._schedules:
            schedules = tuple(self.schedules(pipeline, accumulation))
            self._schedules[key] = schedules, sum(self.num_recomputes(pipeline, virtual) for _, virtual in schedules)
        return self._schedules[key]

    def _by_stage(self, shape: Shape, accumulation: int) -> dict[int, tuple[Sharding, ...]]:
        """Shardings by ZeRO stage, the same for all numbers of micro batches but one."""
        key = shape, accumulation > 1
        if key not in self._shardings:
            found: dict[int, tuple[Sharding, ...]] = {}
            for sharding in self.shardings(shape, accumulation):
                found[sharding.zero] = (*found.get(sharding.zero, ()), sharding)
            self._shardings[key] = found
        return self._shardings[key]

    def shape_size(self, shape: Shape) -> int:
        """Candidates that share these degrees."""
        total, offloads = 0, [len(self.offloads_of(zero, shape.replicas)) for zero in range(4)]
        for batch in self.batches(shape):
            total += batch.num_recomputes * sum(len(kept) * offloads[zero] for zero, kept in batch.shardings.items())
        return total * len(self.sequence_parallels(shape.tensor))

    def __iter__(self) -> Iterator[Choice]:
        """Every candidate, one by one: for small spaces and for the tests."""
        for shape in self.shapes():
            for batch, flag in product(self.batches(shape), self.sequence_parallels(shape.tensor)):
                shardings = [sharding for group in batch.shardings.values() for sharding in group]
                for schedule, virtual in batch.schedules:
                    core = PipelineConfiguration(shape, flag, batch.micro, schedule, virtual)
                    kinds, counts = self.recomputes(shape.pipeline, virtual)
                    recomputes = [(kind, self.layers_of(kind)) for kind in kinds] + [
                        ("full", count) for count in counts
                    ]
                    for sharding, (kind, layers) in product(shardings, recomputes):
                        for offload in self.offloads_of(sharding.zero, shape.replicas):
                            yield point(core, sharding, offload, kind, layers)

    def layers_of(self, kind: str) -> int | None:
        """A pinned number of checkpointed layers counts for `selective` too."""
        layers: int | None = self.pins.get("num_checkpointed_layers_per_stage") if kind == "selective" else None
        return layers

    def single(self) -> Choice | None:
        """The one candidate of a fully pinned strategy, None where a choice is left. How often ZeRO gathers and reduces is
        searched with other choices only: alone it takes what its published stacks do."""
        pins = self.pins
        if any(f"{axis}_parallel_degree" not in pins for axis in ("data", "tensor", "pipeline")):
            return None
        tensor, pipeline, data = (pins[f"{axis}_parallel_degree"] for axis in ("tensor", "pipeline", "data"))
        if len(self.contexts) != 1 or "activation_checkpointing" not in pins or "offload" not in pins:
            return None
        if tensor > 1 and "sequence_parallel" not in pins:
            return None
        micros = self.micros(data)
        stages = (pins["zero_stage"],) if "zero_stage" in pins else (0,) if data * self.contexts[0] == 1 else ()
        if len(micros) != 1 or not stages:
            return None
        groups = self._groups(stages[0], tensor, data * self.contexts[0])
        schedules = self.schedules(pipeline, self.problem.accumulation(data, micros[0]))
        if not schedules and "pipeline_schedule" in pins and "num_virtual_stages" in pins:
            # none passes the rules: the rule that the pinned one breaks refuses it by name
            schedules = [(pins["pipeline_schedule"], pins["num_virtual_stages"])]
        if len(groups) != 1 or len(schedules) != 1:
            return None
        gather, reduce = self._frequencies(stages[0], self.problem.accumulation(data, micros[0]), pipeline)[0]
        return Choice(
            tensor=tensor,
            pipeline=pipeline,
            data=data,
            context=self.contexts[0],
            sequence_parallel=pins.get("sequence_parallel", False),
            schedule=schedules[0][0],
            virtual=schedules[0][1],
            micro=micros[0],
            zero=stages[0],
            group=groups[0],
            gather=gather,
            reduce=reduce,
            offload=pins["offload"],
            recompute=pins["activation_checkpointing"],
            layers=pins.get("num_checkpointed_layers_per_stage"),
        )


def _tight(batch: int, data: int) -> int:
    """The smallest degree that leaves no replica more sequences than `data` does."""
    return -(-batch // -(-batch // data))


@lru_cache(maxsize=1024)
def _micros(share: int) -> list[int]:
    divisors = {n for n in range(1, min(share, 4096) + 1) if share % n == 0} | {share}
    return sorted(divisors | {2**i for i in range(share.bit_length())})


@lru_cache(maxsize=4096)
def _schedules(layers: int, pipeline: int) -> list[tuple[Schedule, int]]:
    most = layers // pipeline
    virtual = [v for v in range(2, most + 1) if layers % (pipeline * v) == 0 or v == 2]
    options: list[tuple[Schedule, int]] = [("1f1b", 1), ("gpipe", 1)]
    options += [("interleaved_1f1b", v) for v in virtual]
    options += [("interleaved_zero_bubble", v) for v in [1, *virtual]]
    return options + ([("zbv", 2)] if most >= 2 else [])


def require_candidates(space: Space) -> None:
    """PlanError where the pins leave nothing to price."""
    if next(iter(space), None) is None:
        pinned = ", ".join(f"{key} {value}" for key, value in space.pins.items() if key != "offload")
        raise PlanError(
            f"no strategy has all that is pinned ({pinned}) on {space.problem.num_gpus} GPUs with a global batch of "
            f"{space.problem.global_batch_size}\n  to fix: leave one of them out and let the planner choose it"
        )
