"""A problem is what a planner is asked: a model's work, a cluster, a batch, and the choices that are not free. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from clusters.cluster import Cluster
from orchestrator.models.architecture import Architecture, block_parameters
from orchestrator.models.lora import Lora
from orchestrator.models.workloads import PUBLISHED, workload
from strategies.catalog import ENGINES, Capability
from strategies.constants import MEMORY
from strategies.pipeline.stages import cut
from strategies.price.memory import MemoryPrice, price_memory
from strategies.price.rank_memory import RankMemory, rank_memory
from strategies.price.roofline import Roofline, roofline
from strategies.price.step_time import Price, TimePrice, price_time
from strategies.rooms import impossible, misfit
from strategies.strategy import MESH_ORDER, Offload, Schedule, States, Strategy
from strategies.workload import Workload

ONE_GPU = 1e9
"""Seconds that one GPU more weighs when the fewest are wanted: longer than any step."""


class PlanError(ValueError):
    """A job that no plan can be made for: what, where, and how to fix it."""


class Choice(NamedTuple):
    """One point of the space: the fields that a search varies. The rest of a Strategy follows from it and the problem."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    sequence_parallel: bool = False
    schedule: Schedule = "1f1b"
    virtual: int = 1
    micro: int = 1
    zero: int = 0
    group: int = 1
    gather: str = "per_micro_batch"
    reduce: str = "per_micro_batch"
    offload: Offload = Offload()
    recompute: str = "none"
    layers: int | None = None
    """Checkpointed layers of each stage; None: all."""

    @property
    def num_gpus(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question to the planner. `pins` holds the strategy fields that the user wrote, by the job file's names."""

    arch: Architecture
    cluster: Cluster
    global_batch_size: int
    sequence_length: int
    precision: str
    lora: Lora | None = None
    """Adapters that are trained in the place of the model."""
    eight_bit: bool = False
    """The optimizer's moments take 8 bits."""
    pins: Mapping[str, Any] = field(default_factory=dict)
    task: str = "pretrain"
    objective: str = "fastest"
    built_only: bool = False
    bold: bool = False
    """Take every predicted gain as it is, also of choices that no published run anchors (search/anchors.py)."""
    max_gpus: int | None = None
    """Use at most so many of the cluster's GPUs."""

    @property
    def is_published(self) -> bool:
        """Return whether the job describes a stack that others published: it says of what kernels the norms are made, which
        no engine here lets a job choose."""
        return "fused_norm" in self.pins and not self.built_only and self.arch.family in PUBLISHED

    @cached_property
    def work(self) -> Workload:
        return workload(self.arch, self.lora, task=self.task, native=not self.is_published, eight_bit=self.eight_bit)

    @cached_property
    def tensor_divides(self) -> int:
        """Return the number of heads that a tensor group must divide: of the project's module those of keys and values, which
        other stacks copy."""
        return self.arch.num_heads if self.is_published else self.arch.num_kv_heads

    @cached_property
    def engine(self) -> Capability:
        """Native unless another is pinned: the planner chooses none by itself."""
        return ENGINES[self.pins.get("engine", "native")]

    @cached_property
    def num_gpus(self) -> int:
        return min(self.cluster.num_gpus, self.max_gpus or self.cluster.num_gpus)

    @cached_property
    def head_layers(self) -> float:
        """FLOPs of the output projection in units of a block: 2 V h against 2 P + 2 s h (causal attention) a token."""
        arch = self.arch
        width = arch.word_embedding_size or arch.hidden_size
        return self.work.num_outputs * width / (block_parameters(arch) + self.sequence_length * arch.hidden_size)

    @cached_property
    def pinned_fields(self) -> dict[str, Any]:
        """Fields of Strategy that no search varies."""
        pins = self.pins
        given = {
            key: pins[key] for key in ("engine", "mesh_order", "attention", "fused_norm", "compile") if key in pins
        }
        return {"mesh_order": MESH_ORDER, **given}

    @cached_property
    def roof(self) -> Roofline:
        """Return what an accelerator and its links do for the model."""
        return roofline(self.work, self.cluster, self.precision)

    @cached_property
    def rank_memory(self) -> RankMemory:
        """Return what a rank holds of the model."""
        return rank_memory(self.work, self.precision, self.sequence_length, MEMORY)

    def changed(self, **changes: Any) -> Problem:
        return replace(self, **changes)

    def without_pins(self, *names: str) -> Problem:
        return replace(self, pins={key: value for key, value in self.pins.items() if key not in names})

    def accumulation(self, data: int, micro: int) -> int:
        """Micro batches per replica and step: the smallest number that covers the global batch."""
        return -(-self.global_batch_size // (data * micro))

    def key(self, step_s: float, num_gpus: int) -> float:
        """Return the number that the objective makes small."""
        if self.objective == "cheapest":
            return step_s * num_gpus
        return step_s + num_gpus * ONE_GPU if self.objective == "fewest_gpus" else step_s

    @cached_property
    def states(self) -> tuple[States, ...]:
        """Return the formats of the states by ZeRO stage, as the engine keeps them; strategies/zero/state_bytes.py has their
        bytes."""
        pinned: States | None = self.pins.get("states")
        if pinned is None and self.precision in ("fp32", "fp64"):
            pinned = "full"
        return self.engine.states if pinned is None else (pinned,) * 4

    def strategy(self, choice: Choice) -> Strategy:
        """The choice as the value that the cost doors and the engine read."""
        c = choice
        checkpointed = 0 if c.recompute == "none" else c.layers
        v_shaped, virtual = (c.schedule == "zbv", c.virtual) if c.pipeline > 1 else (False, 1)
        stages = cut(self.arch.num_layers, c.pipeline, virtual, v_shaped, self.head_layers, checkpointed)
        return Strategy(
            data_parallel_degree=c.data,
            tensor_parallel_degree=c.tensor,
            context_parallel_degree=c.context,
            pipeline_parallel_degree=c.pipeline,
            num_virtual_stages=c.virtual,
            pipeline_schedule=c.schedule,
            sequence_parallel=c.sequence_parallel,
            zero_stage=c.zero,
            zero_group_size=c.group,
            states=self.states[c.zero],
            gather=c.gather,  # type: ignore[arg-type]
            reduce=c.reduce,  # type: ignore[arg-type]
            activation_checkpointing=c.recompute,  # type: ignore[arg-type]
            offload=c.offload,
            micro_batch_size=c.micro,
            gradient_accumulation_steps=self.accumulation(c.data, c.micro),
            stages=stages,
            **self.pinned_fields,
        )

    def time(self, strategy: Strategy) -> TimePrice:
        return price_time(
            self.work,
            strategy,
            self.cluster,
            global_batch_size=self.global_batch_size,
            sequence_length=self.sequence_length,
            precision=self.precision,
        )

    def price(self, strategy: Strategy) -> Price:
        return Price(memory=self.memory(strategy), time=self.time(strategy))

    def memory(self, strategy: Strategy) -> MemoryPrice:
        return price_memory(
            self.work,
            strategy,
            self.cluster,
            global_batch_size=self.global_batch_size,
            sequence_length=self.sequence_length,
            precision=self.precision,
        )


def check(problem: Problem) -> None:
    """PlanError where the pins cannot be together on this model and this cluster, whatever else is chosen.

    The degrees and the batch are checked here as well as in the job file: a cluster may have shrunk since."""
    pins, cluster, arch = problem.pins, problem.cluster, problem.arch
    if problem.precision not in cluster.accelerator.peak_flops:
        known = ", ".join(sorted(cluster.accelerator.peak_flops))
        raise PlanError(
            f"training.precision {problem.precision} cannot run on {cluster.accelerator.name}\n  to fix: one of {known}"
        )
    degrees = [pins.get(f"{axis}_parallel_degree", 1) for axis in ("data", "tensor", "pipeline", "context")]
    needed, context = math.prod(degrees), degrees[3]
    if needed > problem.num_gpus:
        words = f" x context {context}" if context > 1 else ""
        raise PlanError(
            f"data {degrees[0]} x tensor {degrees[1]} x pipeline {degrees[2]}{words} needs {needed} GPUs, "
            f"{cluster.name} has {problem.num_gpus}\n  to fix: smaller degrees, or leave one out and let the planner choose it"
        )
    if arch.num_heads % degrees[1]:
        fits = [n for n in range(1, arch.num_heads + 1) if arch.num_heads % n == 0]
        raise PlanError(
            f"tensor_parallel_degree {degrees[1]} does not divide the model's {arch.num_heads} heads\n"
            f"  to fix: one of {', '.join(map(str, fits))}"
        )
    if told := misfit(Strategy(context_parallel_degree=context), problem.sequence_length):
        raise PlanError(told)
    stages = degrees[2] * (pins.get("num_virtual_stages", 1) if degrees[2] > 1 else 1)
    if stages > arch.num_layers:
        raise PlanError(
            f"{stages} pipeline stages are more than the model's {arch.num_layers} layers\n"
            f"  to fix: pipeline_parallel_degree x num_virtual_stages of at most {arch.num_layers}"
        )
    if problem.precision in ("fp32", "fp64") and pins.get("states", "full") != "full":
        raise PlanError(
            f"states {pins['states']} keeps 16-bit parameters, training.precision is {problem.precision}\n"
            "  to fix: states: full, or leave it out"
        )


def check_batch(problem: Problem, *, data: int, micro: int) -> None:
    """PlanError where a pinned accumulation contradicts the batch (rooms.md: global <= micro x m x dp < global + micro x dp)."""
    wanted = problem.pins.get("gradient_accumulation_steps")
    needed = problem.accumulation(data, micro)
    if wanted is not None and wanted != needed:
        raise PlanError(
            f"gradient_accumulation_steps {wanted}, micro_batch_size {micro} and data_parallel_degree {data} do not make the "
            f"global batch of {problem.global_batch_size}\n  to fix: gradient_accumulation_steps: {needed}, or leave one out"
        )


def check_rules(strategy: Strategy) -> None:
    """PlanError where the strategy breaks the compatibility table."""
    rule = impossible(strategy)
    if rule is not None:
        raise PlanError(f"{rule.formatted(strategy)}\n  to fix: {rule.fix}")
