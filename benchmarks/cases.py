"""What a row of `make parity` trains, and how."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.models.architecture import Architecture, make_architecture
from orchestrator.models.lora import TARGETS, Lora
from strategies.pipeline.stages import cut
from strategies.strategy import MESH_ORDER, Offload, Strategy


@dataclass(frozen=True)
class Task:
    """A model and its one repeated batch."""

    arch: Architecture
    global_batch_size: int
    sequence_length: int
    packed: bool = False
    """Each row holds two samples."""
    loss: Literal["tokens", "reward", "dpo"] = "tokens"
    """What is trained; reward and dpo take the two samples of a packed row for a pair of answers."""
    lora: Lora | None = None

    def __str__(self) -> str:
        """Only what differs from TASK."""
        arch = self.arch
        if self == TASK:
            return ""
        kin = f" {arch.variant}" if arch.variant else ""
        kin += " narrow" * (arch.word_embedding_size is not None) + " untied" * (not arch.tied_embeddings)
        packed = " packed" * self.packed + f" {self.loss}" * (self.loss != "tokens")
        packed += f" lora {' '.join(self.lora.targets)}" if self.lora else ""
        family = f" {arch.family}" * (arch.family != TASK.arch.family)
        return f" of{family}{packed} {arch.num_layers}x{arch.hidden_size}{kin} on {self.global_batch_size}x{self.sequence_length}"


ARCH = make_architecture(
    family="opt", num_layers=4, hidden_size=24, num_heads=4, ffn_size=44, vocab_size=61, max_position=16
)
TASK = Task(ARCH, global_batch_size=7, sequence_length=12)
FAMILIES = {
    name: Task(make_architecture(**{"family": name, "num_layers": 4, "num_heads": 4} | shape), 7, 12)
    for name, shape in {
        "gpt": {"hidden_size": 24, "ffn_size": 44, "vocab_size": 61, "max_position": 16},
        "mpt": {"hidden_size": 24, "ffn_size": 44, "vocab_size": 61},
        "llama": {"hidden_size": 24, "ffn_size": 44, "vocab_size": 61, "num_kv_heads": 2},
        "bloom": {"hidden_size": 24, "ffn_size": 44, "vocab_size": 61},
        "glm": {"hidden_size": 24, "ffn_size": 44, "vocab_size": 61, "variant": "10b", "max_position": 16},
        "glm-130b": {"family": "glm", "hidden_size": 24, "ffn_size": 44, "vocab_size": 61, "tied_embeddings": False},
    }.items()
}
"""The same small task for each other family; LLaMA with grouped-query heads, GLM in both of its forms, on rows with blanks."""
PACKED = tuple(replace(FAMILIES.get(family, TASK), packed=True) for family in ("opt", "llama", "bloom"))
"""One family for each kind of positions, with two samples in a row."""
PAIRS = (replace(PACKED[0], loss="reward"), replace(PACKED[1], loss="dpo"))
LORA = Lora(rank=3, alpha=6.0, targets=("q_proj", "v_proj"))
"""A rank that no group of ranks divides."""
ADAPTED = (
    replace(TASK, lora=LORA),
    replace(FAMILIES["llama"], lora=replace(LORA, targets=TARGETS)),
    replace(PAIRS[0], lora=replace(LORA, targets=("k_proj", "down_proj"))),
)
"""Frozen weights and adapters: on attention alone, on every linear layer, and beside a value head that is trained."""
TASKS = (*FAMILIES.values(), *PACKED, *PAIRS, *ADAPTED)
NOWHERE = Offload()


@dataclass(frozen=True)
class Run:
    """A strategy, done."""

    strategy: Strategy
    precision: str = "fp64"
    task: Task = TASK

    @property
    def world_size(self) -> int:
        return self.strategy.num_gpus

    def __str__(self) -> str:
        return f"{self.precision} world {self.world_size}{told(self.strategy)}{self.task}"


def told(strategy: Strategy) -> str:
    s, words = strategy, ""
    if s.tensor_parallel_degree > 1:
        words += f" tensor {s.tensor_parallel_degree}{' sequence' * s.sequence_parallel}"
    if s.context_parallel_degree > 1:
        words += f" context {s.context_parallel_degree}"
    if s.pipeline_parallel_degree > 1:
        words += f" pipeline {s.pipeline_parallel_degree}x{s.num_virtual_stages} {s.pipeline_schedule}"
    if s.mesh_order != MESH_ORDER:
        words += f" {'-'.join(s.mesh_order)}"
    group = f"/{s.zero_group_size}" if s.zero_stage and s.zero_group_size < s.num_replicas else ""
    words += f" ZeRO {s.zero_stage}{group} {s.activation_checkpointing}"
    if s.activation_checkpointing != "none" and any(x.num_checkpointed_layers < x.num_layers for x in s.stages):
        words += f" {max(x.num_checkpointed_layers for x in s.stages)}"
    words += f" {s.gradient_accumulation_steps}x{s.micro_batch_size}"
    words += "".join(f" {name} per_step" for name in ("gather", "reduce") if getattr(s, name) == "per_step")
    words += f" {s.states}" * (s.states == "mixed_fp32_gradients")
    kinds = {kind: getattr(s.offload, kind) for kind in ("optimizer", "parameters", "activations")}
    words += "".join(f" {kind} on {place}" for kind, place in kinds.items() if place != "none")
    return words + (f" x{s.offload.optimizer_fraction:g}" if s.offload.optimizer_fraction < 1 else "")


@dataclass(frozen=True)
class Case:
    """A run in few words."""

    world_size: int
    zero_stage: int
    recompute: str = "none"
    precision: str = "fp64"
    micro_batch_size: int = 2
    group: int = 0
    """0: all replicas."""
    gather: str = "per_micro_batch"
    reduce: str = "per_micro_batch"
    states: str = ""
    offload: Offload = NOWHERE
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual: int = 1
    schedule: str = "1f1b"
    sequence_parallel: bool = False
    checkpointed: int | None = None
    """Layers of each stage that are computed again; None: all."""
    mesh_order: tuple[str, ...] = MESH_ORDER
    task: Task = TASK

    @property
    def data(self) -> int:
        return self.world_size // (self.tensor * self.pipeline * self.context)

    @property
    def strategy(self) -> Strategy:
        mixed = "mixed" if self.zero_stage < 2 else "sharded_fp32"
        return Strategy(
            data_parallel_degree=self.data,
            tensor_parallel_degree=self.tensor,
            context_parallel_degree=self.context,
            pipeline_parallel_degree=self.pipeline,
            num_virtual_stages=self.virtual,
            pipeline_schedule=self.schedule,  # type: ignore[arg-type]
            sequence_parallel=self.sequence_parallel,
            mesh_order=self.mesh_order,  # type: ignore[arg-type]
            stages=cut(
                self.task.arch.num_layers,
                pipeline=self.pipeline,
                virtual=self.virtual,
                v_shaped=self.schedule == "zbv",
                head_layers=0.0,
                checkpointed=self.checkpointed if self.recompute != "none" else 0,
            ),
            zero_stage=self.zero_stage,
            zero_group_size=self.group or (self.data * self.context if self.zero_stage else 1),
            states=self.states or ("full" if self.precision in ("fp32", "fp64") else mixed),  # type: ignore[arg-type]
            activation_checkpointing=self.recompute,  # type: ignore[arg-type]
            micro_batch_size=self.micro_batch_size,
            gradient_accumulation_steps=self._num_micro_batches,
            gather=self.gather,  # type: ignore[arg-type]
            reduce=self.reduce,  # type: ignore[arg-type]
            offload=self.offload,
        )

    @property
    def _num_micro_batches(self) -> int:
        least = -(-self.task.global_batch_size // (self.data * self.micro_batch_size))
        # Interleaving wants whole rounds of the pipeline: the last ones are filled up.
        return -(-least // self.pipeline) * self.pipeline if self.virtual > 1 else least

    def __str__(self) -> str:
        return str(Run(self.strategy, self.precision, self.task))


@dataclass(frozen=True)
class Trial:
    """One row of the table. Without `then` the case runs through; with it the run is saved halfway and goes on there."""

    case: Case | Run
    then: Case | Run | None = None

    @property
    def kind(self) -> str:
        if any(each and each.strategy.context_parallel_degree > 1 for each in (self.case, self.then)):
            return "context"
        if self.case.task in TASKS:
            return "family"
        if self.then is None:
            return "parity" if isinstance(self.case, Case) else "drawn"
        return "bitwise" if self.then == self.case else "resume"

    @property
    def world_size(self) -> int:
        return max(case.world_size for case in (self.case, self.then) if case)

    def __str__(self) -> str:
        return f"{self.kind:7}  {self.case}" + (f"  ->  {self.then}" if self.kind == "resume" else "")
