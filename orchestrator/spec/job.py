"""The job file, field by field. Frozen; the words of the YAML are the attributes. The reference and the JSON Schema are
made from this file: the text under a field is its documentation, with its unit."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, PrivateAttr, Tag, model_validator

from orchestrator.models.architecture import Architecture, Family
from orchestrator.spec.errors import MAPPING, Keys, Spot
from orchestrator.spec.values import (
    FILES,
    KEYS,
    NUMBER,
    TEXT,
    BelowOne,
    Count,
    CountOrZero,
    Every,
    Fraction,
    NotNegative,
    Pair,
    Positive,
    Seconds,
    Texts,
)
from strategies.strategy import Attention, Axis, Checkpointing, Engine, Frequency, Place, Schedule, States

if TYPE_CHECKING:
    from clusters.cluster import Cluster

Precision = Literal["bf16", "fp16", "fp32", "fp64"]


class Section(BaseModel):
    """A group of keys. Unknown keys are refused, types are not guessed, nothing changes after it was read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, defer_build=True, allow_inf_nan=False, protected_namespaces=()
    )
    bare_words: ClassVar[str] = ""
    """What may stand in the place of the keys, as a person would say it. Empty: nothing."""

    def wrote(self, key: str) -> bool:
        """True where the job says it, false where it is the default."""
        return key in self.model_fields_set


class ModelSpec(Section):
    """The model that is trained: a catalog name, a Hugging Face folder, or a shape given inline."""

    bare_words: ClassVar[str] = "a catalog name such as opt-1.3b"

    name: str | None = Field(default=None, examples=["opt-1.3b"])
    """Name in the model catalog. `model: opt-1.3b` is short for `model: {name: opt-1.3b}`."""
    path: str | None = Field(default=None, examples=["models/opt-1.3b"])
    """A Hugging Face folder (`config.json` and safetensors), relative to the job file."""
    family: Family | None = Field(default=None, examples=["opt"])
    """Family of an inline shape; it decides norms, positions, biases and activation."""
    num_layers: Count | None = Field(default=None, examples=[24])
    """Transformer blocks."""
    hidden_size: Count | None = Field(default=None, examples=[2048])
    """Width of the residual stream, in elements."""
    num_heads: Count | None = Field(default=None, examples=[32])
    """Attention heads; they divide `hidden_size`."""
    num_kv_heads: Count | None = Field(default=None, examples=[8])
    """Key and value heads (grouped-query attention); they divide `num_heads`. Absent: as many as `num_heads`."""
    ffn_size: Count | None = Field(default=None, examples=[8192])
    """Width of the feed-forward layer, in elements. Absent: as the family has it."""
    vocab_size: Count | None = Field(default=None, examples=[50272])
    """Tokens in the vocabulary."""
    max_position: Count | None = Field(default=None, examples=[2048])
    """Longest sequence that the position table holds, in tokens."""
    tied_embeddings: bool | None = Field(default=None, examples=[True])
    """Whether the head is the transposed embedding. Absent: as the family was published."""
    dropout: BelowOne = Field(default=0.0, examples=[0.1])
    """Probability of dropping an activation while training, 0 to 1."""
    initialize: Literal["weights", "random"] | None = Field(default=None, examples=["random"])
    """Whether training starts from the weights of `path` or from a random state. Absent: `weights` with a `path`,
    otherwise `random`."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class BpeTokenizer(Section):
    """A byte-pair tokenizer that `prepare` trains on the job's own text."""

    bpe: Count = Field(examples=[8192])
    """Vocabulary, in tokens."""


def _kind(value: Any) -> str:
    return KEYS if isinstance(value, (dict, Section)) else TEXT


def _files_or_fraction(value: Any) -> str:
    return NUMBER if isinstance(value, (int, float)) else FILES


class DataSpec(Section):
    """The text that the model reads. Needed to prepare or run, not to plan."""

    train: Texts = Field(examples=[["corpus/*.txt"]])
    """Files (.txt, .jsonl, .parquet), folders or globs, relative to the job file."""
    validation: Annotated[
        Annotated[BelowOne, Tag(NUMBER)] | Annotated[Texts, Tag(FILES)], Discriminator(_files_or_fraction)
    ] = Field(default=0.005, examples=[0.005])
    """Held-out text: files as in `train`, or the fraction of `train` that is set aside, 0 to 1."""
    tokenizer: Annotated[
        Annotated[str, Tag(TEXT), Field(min_length=1)] | Annotated[BpeTokenizer, Tag(KEYS)],
        Discriminator(_kind),
    ] = Field(default="byte", examples=["byte"])
    """`byte` (256 tokens), the path of a Hugging Face tokenizer relative to the job file, or `{bpe: 8192}`: train one."""


class BatchSpec(Section):
    """What one optimizer step reads. A change of strategy never changes it."""

    global_batch_size: Count = Field(examples=[512])
    """Sequences per optimizer step, over all replicas."""
    sequence_length: Count = Field(examples=[2048])
    """Tokens per sequence."""


class OptimizerSpec(Section):
    """AdamW with decoupled weight decay (arXiv:1711.05101)."""

    name: Literal["adamw"] = Field(default="adamw", examples=["adamw"])
    """The algorithm."""
    learning_rate: Positive = Field(default=2.0e-4, examples=[2.0e-4])
    """Peak learning rate, per step."""
    betas: Pair = Field(default=(0.9, 0.95), examples=[[0.9, 0.95]])
    """Decay of the first and second moment, per step, 0 to 1."""
    epsilon: Positive = Field(default=1e-8, examples=[1e-8])
    """Added to the root of the second moment."""
    weight_decay: NotNegative = Field(default=0.1, examples=[0.1])
    """Share of a weight that decays per step and unit of learning rate."""
    gradient_clip: Positive | None = Field(default=1.0, examples=[1.0])
    """Largest global L2 norm of the gradients. `null`: never clipped."""


class ScheduleSpec(Section):
    """The learning rate over the steps."""

    name: Literal["cosine", "linear", "constant"] = Field(default="cosine", examples=["cosine"])
    """Shape of the decay after the warm-up."""
    warmup_steps: CountOrZero = Field(default=100, examples=[100])
    """Steps of linear increase from zero to the peak."""
    final_fraction: Fraction = Field(default=0.1, examples=[0.1])
    """Learning rate at the last step, as a part of the peak."""


class TrainingSpec(Section):
    """How long and how the model is trained."""

    steps: Count | None = Field(default=None, examples=[1000])
    """Optimizer steps. This or `tokens`; needed to run, and for the cost of a plan."""
    tokens: Count | None = Field(default=None, examples=[300e9])
    """Tokens read in all, rounded up to whole steps. This or `steps`."""
    precision: Precision = Field(default="bf16", examples=["bf16"])
    """Format of the matrix products. fp64 is for proofs."""
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec, examples=[{"learning_rate": 2.0e-4}])
    """The optimizer and its numbers."""
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec, examples=[{"name": "cosine", "warmup_steps": 100}])
    """The learning rate over the steps."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=1234, examples=[1234])
    """Decides the first weights and the order of the samples."""
    evaluate_every: Count | None = Field(default=None, examples=[100])
    """Steps between two losses on the validation text. Absent: at the end alone."""
    compile: Literal[True, False, "auto"] = Field(default="auto", examples=["auto"])
    """torch.compile: true, false, or auto (where it pays)."""
    z_loss: NotNegative = Field(default=0.0, examples=[1e-4])
    """Weight of the squared log of the softmax normalizer in the loss (PaLM, arXiv:2204.02311, section 5). 0: off."""
    deterministic: bool = Field(default=False, examples=[True])
    """Kernels that repeat bit for bit on a GPU, slower. A CPU always does."""


class ClusterSpec(Section):
    """A cluster that is described here: equal nodes of equal GPUs."""

    gpu: Annotated[str, Field(min_length=1)] = Field(examples=["a100-80gb"])
    """Name in the accelerator catalog. A plain name is SXM; `a100-80gb-pcie` is the other."""
    nodes: Count | None = Field(default=None, examples=[8])
    """Machines. Absent: 1."""
    gpus_per_node: Count | None = Field(default=None, examples=[8])
    """GPUs in each. Absent: as the catalog has it."""
    intra_node: Literal["nvlink", "pcie"] | None = Field(default=None, examples=["nvlink"])
    """Link between the GPUs of a node. Absent: as the catalog has it."""
    inter_node_gbps: Positive | None = Field(default=None, examples=[1600])
    """Line rate of a node's network cards together, each direction, in 1e9 bits per second."""
    inter_node_measured_gbps: Positive | None = Field(default=None, examples=[1280])
    """Measured bus bandwidth between nodes, in 1e9 bits per second, used as it is."""
    host_memory_gib: Positive | None = Field(default=None, examples=[1024])
    """Main memory of a node, in GiB."""
    nvme_gib: NotNegative | None = Field(default=None, examples=[7000])
    """Local disk of a node for offload, in GiB."""
    usd_per_gpu_hour: NotNegative | None = Field(default=None, examples=[2.5])
    """Price of a GPU, in US dollars per hour."""


class OffloadSpec(Section):
    """What leaves the GPU between its uses. A key that is left out is `none`."""

    bare_words: ClassVar[str] = "none, optimizer, parameters or activations"

    optimizer: Place = Field(default="none", examples=["host"])
    """Master weights and moments."""
    parameters: Place = Field(default="none", examples=["host"])
    """The working copy of the weights."""
    activations: Literal["none", "host"] = Field(default="none", examples=["host"])
    """What the forward pass saves for the backward pass."""
    optimizer_fraction: Fraction = Field(default=1.0, examples=[0.5])
    """Part of the optimizer states that leaves, 0 to 1."""

    @model_validator(mode="before")
    @classmethod
    def _one_word(cls, value: Any) -> Any:
        if value == "none":
            return {}
        return {value: "host"} if value in ("optimizer", "parameters", "activations") else value


class StrategySpec(Section):
    """How a step is split over the GPUs. What is given is pinned; what is absent or `auto` the planner chooses."""

    bare_words: ClassVar[str] = "auto"

    engine: Engine | None = Field(default=None, examples=["native"])
    """Who carries the plan out."""
    data_parallel_degree: Count | None = Field(default=None, examples=[4])
    """Replicas of the model."""
    tensor_parallel_degree: Count | None = Field(default=None, examples=[8])
    """GPUs that share each matrix product; it divides the heads."""
    pipeline_parallel_degree: Count | None = Field(default=None, examples=[2])
    """Groups of GPUs that hold the layers one after the other."""
    context_parallel_degree: Literal[1] | None = Field(default=None, examples=[1])
    """GPUs that share each sequence. Only 1 is accepted today."""
    expert_parallel_degree: Literal[1] | None = Field(default=None, examples=[1])
    """GPUs that share the experts of a layer. Only 1 is accepted today."""
    num_virtual_stages: Count | None = Field(default=None, examples=[2])
    """Slices of the layers that each pipeline rank holds."""
    pipeline_schedule: Schedule | None = Field(default=None, examples=["1f1b"])
    """Order of forward and backward passes over the pipeline."""
    sequence_parallel: bool | None = Field(default=None, examples=[True])
    """Norms and residuals are split over the tensor group along the sequence."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = Field(default=None, examples=[1])
    """What the data-parallel ranks share: 0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters."""
    zero_group_size: Count | None = Field(default=None, examples=[8])
    """Data-parallel ranks that share one copy, neighbours; it divides the data-parallel degree."""
    states: States | None = Field(default=None, examples=["mixed"])
    """In which formats parameters, gradients and optimizer states are kept."""
    gather: Frequency | None = Field(default=None, examples=["per_micro_batch"])
    """How often ZeRO 3 gathers the parameters."""
    reduce: Frequency | None = Field(default=None, examples=["per_step"])
    """How often gradients are reduced over the replicas."""
    mesh_order: (
        Annotated[tuple[Axis, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)] | None
    ) = Field(default=None, examples=[["pipeline", "data", "context", "tensor"]])
    """The axes from the farthest neighbours to the nearest; each once."""
    activation_checkpointing: Checkpointing | None = Field(default=None, examples=["full"])
    """What the backward pass computes again instead of keeping it."""
    num_checkpointed_layers_per_stage: CountOrZero | None = Field(default=None, examples=[10])
    """Layers of each stage that are computed again. Absent: all."""
    offload: OffloadSpec | None = Field(default=None, examples=[{"optimizer": "host"}])
    """What leaves the GPU between its uses."""
    micro_batch_size: Count | None = Field(default=None, examples=[1])
    """Sequences in one forward pass of one replica."""
    gradient_accumulation_steps: Count | None = Field(default=None, examples=[16])
    """Micro batches per replica and step."""
    attention: Attention | None = Field(default=None, examples=["flash"])
    """Kernel of the attention."""
    fused_norm: bool | None = Field(default=None, examples=[False])
    """One kernel for each norm."""
    compile: bool | None = Field(default=None, examples=[False])
    """torch.compile of each block."""

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        if value == "auto":
            return {}
        if isinstance(value, dict):
            return {key: pin for key, pin in value.items() if not (isinstance(pin, str) and pin == "auto")}
        return value


class TargetsSpec(Section):
    """What is wanted of the run. A missed target never stops it; it is said, before and during."""

    tokens_per_second_per_gpu: Positive | None = Field(default=None, examples=[2200])
    """Speed, in tokens per second and GPU."""
    tolerance: Fraction = Field(default=0.1, examples=[0.1])
    """Part of a target that may be missing before it counts as missed."""
    for_: Seconds | None = Field(default=None, alias="for", examples=["10m"])
    """How long it must be missed before it counts."""
    budget_usd: Positive | None = Field(default=None, examples=[5000])
    """Cost of the whole job, in US dollars."""
    finish_within: Seconds | None = Field(default=None, examples=["30d"])
    """Length of the whole job."""


class CheckpointSpec(Section):
    """When and where the state is saved."""

    directory: Annotated[str, Field(min_length=1)] = Field(default="runs", examples=["runs"])
    """Folder of the run folders, relative to the current folder."""
    every: Every = Field(default="10m", validate_default=True, examples=["10m"])
    """Steps, a duration, or auto (from the time of a save and between failures)."""
    keep: Count = Field(default=3, examples=[3])
    """Checkpoints that are kept, newest first."""


class RecoverySpec(Section):
    """What is done about a failure."""

    max_restarts: CountOrZero = Field(default=10, examples=[10])
    """Restarts before the job gives up."""
    on_oom: Literal["stop", "replan"] = Field(default="stop", examples=["replan"])
    """A GPU ran out of memory: give up, or choose a smaller strategy."""
    on_lost_gpus: Literal["stop", "wait", "replan"] = Field(default="stop", examples=["replan"])
    """GPUs are gone for good: give up, wait for others, or go on with the rest."""
    on_loss_spike: Literal["stop", "rollback"] = Field(default="stop", examples=["rollback"])
    """The loss jumped: give up, or go back and pass over the batches."""


class Job(Section):
    """One training job: what is trained, on what, how, and what is wanted."""

    version: Literal[1] = Field(examples=[1])
    """Version of this format."""
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")] = Field(examples=["opt-1.3b-alpaca"])
    """Name of the run and of its folder: lower case, digits, dot, underscore, hyphen; 63 characters at most."""
    task: Literal["pretrain", "sft", "reward", "dpo", "ppo"] = Field(default="pretrain", examples=["pretrain"])
    """What is learned."""
    model: ModelSpec = Field(examples=["opt-1.3b"])
    """The model that is trained."""
    data: DataSpec | None = Field(default=None, examples=[{"train": ["corpus/*.txt"]}])
    """The text. Needed to prepare or run, not to plan."""
    batch: BatchSpec = Field(examples=[{"global_batch_size": 512, "sequence_length": 2048}])
    """What one optimizer step reads."""
    training: TrainingSpec = Field(default_factory=TrainingSpec, examples=[{"steps": 1000}])
    """How long and how the model is trained."""
    cluster: Annotated[
        Annotated[str, Tag(TEXT), Field(min_length=1)] | Annotated[ClusterSpec, Tag(KEYS)], Discriminator(_kind)
    ] = Field(default="auto", examples=["a100-80gb-8x8"])
    """A catalog name (`GPU-NxM`: N nodes of M), a YAML file relative to the job file, `auto` (what this Ray cluster or machine
    has), or keys."""
    strategy: StrategySpec = Field(default_factory=StrategySpec, examples=["auto"])
    """How a step is split over the GPUs: `auto`, or any of these keys pinned."""
    objective: Literal["fastest", "cheapest", "fewest_gpus"] = Field(default="fastest", examples=["fastest"])
    """What the planner looks for: most tokens per second, fewest dollars per token, or fewest GPUs."""
    targets: TargetsSpec = Field(default_factory=TargetsSpec, examples=[{"tokens_per_second_per_gpu": 2200}])
    """What is wanted of the run."""
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec, examples=[{"every": "10m"}])
    """When and where the state is saved."""
    recovery: RecoverySpec = Field(default_factory=RecoverySpec, examples=[{"max_restarts": 10}])
    """What is done about a failure."""

    _directory: Path = PrivateAttr(default=Path())
    _file: str = PrivateAttr(default=MAPPING)
    _spots: dict[Keys, Spot] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Same words, whether they were written out or are the defaults, from whatever file."""
        return isinstance(other, Job) and all(getattr(self, key) == getattr(other, key) for key in Job.model_fields)

    def __hash__(self) -> int:
        return hash((self.name, self.model, self.batch))

    @property
    def directory(self) -> Path:
        """Folder of the job file: data, model and cluster paths are relative to it."""
        return self._directory

    @property
    def file(self) -> str:
        """The job file, or `<mapping>`."""
        return self._file

    def place(self, *keys: str | int) -> str:
        """Where the job says something, for an error message: `jobs/opt-13b.yaml:14:3`, or the file alone."""
        while keys and keys not in self._spots:
            keys = keys[:-1]
        return ":".join(map(str, (self._file, *self._spots.get(keys, ()))))

    @cached_property
    def architecture(self) -> Architecture:
        """The model's shape."""
        from orchestrator.spec.resolve import resolve_model

        return resolve_model(self.model, self.directory)

    @cached_property
    def resolved_cluster(self) -> Cluster | None:
        """The cluster; None for `auto`, which the inventory answers."""
        from orchestrator.spec.resolve import resolve_cluster

        return resolve_cluster(self.cluster, self.directory)

    @cached_property
    def tokens_per_step(self) -> int:
        return self.batch.global_batch_size * self.batch.sequence_length

    @cached_property
    def num_steps(self) -> int | None:
        """Optimizer steps in all; None where the job gives no length."""
        if self.training.tokens is not None:
            return -(-self.training.tokens // self.tokens_per_step)
        return self.training.steps

    @cached_property
    def tokens_total(self) -> int | None:
        """Tokens read in all, whole steps."""
        return None if self.num_steps is None else self.num_steps * self.tokens_per_step

    @property
    def initializes_from_weights(self) -> bool:
        return self.model.path is not None and self.model.initialize != "random"

    def to_mapping(self) -> dict[str, Any]:
        """What the job says, as plain values: parse_job(job.to_mapping()) == job."""
        mapping = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        if mapping["model"].keys() == {"name"}:
            mapping["model"] = mapping["model"]["name"]
        if mapping.get("strategy") == {}:
            mapping["strategy"] = "auto"
        return mapping

    def to_yaml(self) -> str:
        """What the job says, as YAML that load_job reads back; paths as they were written."""
        from orchestrator.spec.source import write_yaml

        return write_yaml(self.to_mapping())

    def trajectory_difference(self, other: Job) -> list[str]:
        """The keys that keep one job from going on where the other stopped, dotted. Strategy, cluster, targets,
        checkpoint, recovery and the length of the training may differ."""
        mine, theirs = _flat(_trajectory(self)), _flat(_trajectory(other))
        return sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))


def _trajectory(job: Job) -> dict[str, Any]:
    shape = job.architecture
    training = job.training.model_dump(exclude={"steps", "tokens"})
    names = [name for name in shape.__dataclass_fields__ if name not in ("name", "dropout")]
    model = {name: getattr(shape, name) for name in names} | {"dropout": job.model.dropout}
    if job.initializes_from_weights:
        model["path"] = job.model.path
    data = job.data.model_dump() if job.data else {}
    return {"task": job.task, "model": model, "data": data, "batch": job.batch.model_dump(), "training": training}


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
