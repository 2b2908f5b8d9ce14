"""The parts of a job file, field by field. Frozen; the words of the YAML are the attributes. The reference and the JSON
Schema are made from this file and job.py: the text under a field is its documentation, with its unit."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from orchestrator.models.architecture import Family, Variant
from orchestrator.models.lora import Target
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

DEFAULTS: Any = dict
"""No keys: read like any section, so that the job's one validator makes its defaults."""

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
    checkpoint: str | None = Field(default=None, examples=["runs/sft"])
    """A run folder (its newest checkpoint) or one checkpoint of it, relative to the job file: training starts from these weights.
    The shape is theirs; where a name or a shape stands beside it, nothing is read to plan."""
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
    variant: Variant | None = Field(default=None, examples=["10b"])
    """Form of family `glm`: GLM-10B's (two-dimensional learned positions, pre-norm, GELU) or GLM-130B's (rotary positions,
    DeepNorm, GeGLU). Absent: `130b`. No other family has variants."""
    dropout: BelowOne = Field(default=0.0, examples=[0.1])
    """Probability of dropping an activation while training, 0 to 1. Only 0 is built."""
    initialize: Literal["weights", "random"] | None = Field(default=None, examples=["random"])
    """Whether training starts from the weights of `path` or `checkpoint`, or from a random state. Absent: `weights` with one of
    them, otherwise `random`."""

    @property
    def has_weights(self) -> bool:
        """Whether training starts from weights that are on the disk."""
        return (self.path is not None or self.checkpoint is not None) and self.initialize != "random"

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class BpeTokenizer(Section):
    """A byte-pair tokenizer that `prepare` trains on the job's own text."""

    bpe: Count = Field(examples=[8192])
    """Vocabulary, in tokens."""


def kind(value: Any) -> str:
    return KEYS if isinstance(value, (dict, Section)) else TEXT


def _files_or_fraction(value: Any) -> str:
    return NUMBER if isinstance(value, (int, float)) else FILES


class DataSpec(Section):
    """The text that the model reads. Needed to prepare or run, not to plan."""

    train: Texts = Field(examples=[["corpus/*.txt"]])
    """Files (.txt, .jsonl, .parquet; of records .json, .jsonl, .parquet), folders or globs, relative to the job file."""
    validation: Annotated[
        Annotated[BelowOne, Tag(NUMBER)] | Annotated[Texts, Tag(FILES)], Discriminator(_files_or_fraction)
    ] = Field(default=0.005, examples=[0.005])
    """Held-out text: files as in `train`, or the fraction of `train` that is set aside, 0 to 1."""
    tokenizer: Annotated[
        Annotated[str, Tag(TEXT), Field(min_length=1)] | Annotated[BpeTokenizer, Tag(KEYS)],
        Discriminator(kind),
    ] = Field(default="byte", examples=["byte"])
    """`byte` (256 tokens), the path of a Hugging Face tokenizer relative to the job file, or `{bpe: 8192}`: train one. Absent
    where training starts from weights: the tokenizer in the folder of `model.path`, or of the run of `model.checkpoint`."""
    template: Literal["auto", "alpaca", "chat", "plain"] = Field(default="auto", examples=["alpaca"])
    """How the tasks that read records write a conversation down: Alpaca's template, the tokenizer's chat template, `plain` (each
    turn a line, nothing else), or `auto`: the chat template where the tokenizer brings one, else Alpaca's."""
    on_bad: Literal["stop", "skip"] = Field(default="stop", examples=["skip"])
    """What the tasks that read records do about those that give no sample, or one longer than `sequence_length`: refuse the data,
    or leave them out. Both tell file, line and number."""


class BatchSpec(Section):
    """What one optimizer step reads. A change of strategy never changes it."""

    global_batch_size: Count = Field(examples=[512])
    """Sequences per optimizer step, over all replicas."""
    sequence_length: Count = Field(examples=[2048])
    """Tokens per sequence."""


class OptimizerSpec(Section):
    """AdamW with decoupled weight decay (arXiv:1711.05101)."""

    name: Literal["adamw", "adamw_8bit"] = Field(default="adamw", examples=["adamw"])
    """The algorithm. adamw_8bit keeps the moments of large matrices in 8 bits with a scale for 256 elements, by bitsandbytes
    (arXiv:2110.02861): 2.03 bytes a parameter instead of 8."""
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


def _targets(value: Any) -> str:
    return FILES if isinstance(value, (list, tuple)) else TEXT


Targets = Annotated[
    tuple[Target, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v), Field(min_length=1)
]


class LoraSpec(Section):
    """LoRA (arXiv:2106.09685): the model is frozen, and small adapters beside its linear layers are trained in its place; of a
    reward model its value head too. peft says r, lora_alpha, lora_dropout and target_modules."""

    rank: Count = Field(default=8, examples=[16])
    """Rank of an adapter's two matrices."""
    alpha: Positive = Field(default=16.0, examples=[32])
    """An adapter's product is multiplied by alpha / rank."""
    dropout: BelowOne = Field(default=0.0, examples=[0.0])
    """Probability of dropping an element of an adapter's input while training, 0 to 1. Only 0 is built."""
    targets: Annotated[
        Annotated[Literal["all-linear"], Tag(TEXT)] | Annotated[Targets, Tag(FILES)], Discriminator(_targets)
    ] = Field(default=("q_proj", "v_proj"), examples=[["q_proj", "v_proj"]])
    """Linear layers of each block that have an adapter, by the names of LLaMA's in transformers, whatever the model's family; or
    `all-linear`. A family without a gate has no `gate_proj`."""


class TrainingSpec(Section):
    """How long and how the model is trained."""

    steps: Count | None = Field(default=None, examples=[1000])
    """Optimizer steps. This or `tokens`; needed to run, and for the cost of a plan."""
    tokens: Count | None = Field(default=None, examples=[300e9])
    """Tokens read in all, rounded up to whole steps. This or `steps`."""
    precision: Precision = Field(default="bf16", examples=["bf16"])
    """Format of the matrix products. fp64 is for proofs."""
    optimizer: OptimizerSpec = Field(
        default_factory=DEFAULTS, validate_default=True, examples=[{"learning_rate": 2.0e-4}]
    )
    """The optimizer and its numbers."""
    lora: LoraSpec | None = Field(default=None, examples=[{"rank": 16, "targets": ["q_proj", "v_proj"]}])
    """Train adapters instead of the model. Absent: the model itself."""
    schedule: ScheduleSpec = Field(
        default_factory=DEFAULTS, validate_default=True, examples=[{"name": "cosine", "warmup_steps": 100}]
    )
    """The learning rate over the steps."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=1234, examples=[1234])
    """Decides the first weights and the order of the samples."""
    evaluate_every: Count | None = Field(default=None, examples=[100])
    """Steps between two losses on the validation text. Absent: at the end alone."""
    compile: Literal[True, False, "auto"] = Field(default=False, examples=[True])
    """torch.compile of each block: true pins `strategy.compile`; auto (where it pays) is not built."""
    z_loss: NotNegative = Field(default=0.0, examples=[1e-4])
    """Weight of the squared log of the softmax normalizer in the loss (PaLM, arXiv:2204.02311, section 5). 0: off."""
    dpo_beta: Positive = Field(default=0.1, examples=[0.1])
    """How strongly dpo holds the model to the weights that it starts from (arXiv:2305.18290, equation 7)."""
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
    context_parallel_degree: Count | None = Field(default=None, examples=[2])
    """GPUs that share each sequence by ring attention; twice as many divide its tokens."""
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
    """Kernel of the attention. flash keeps no scores, math writes them out; fused_softmax is priced, not built."""
    fused_norm: bool | None = Field(default=None, examples=[False])
    """One kernel for each norm: priced, not built. A job that writes it is priced as the stacks of published runs are."""
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
    """How long it must be missed before it counts. Not built: absent."""
    budget_usd: Positive | None = Field(default=None, examples=[5000])
    """Cost of the whole job, in US dollars."""
    finish_within: Seconds | None = Field(default=None, examples=["30d"])
    """Length of the whole job."""


class CheckpointSpec(Section):
    """When and where the state is saved."""

    directory: Annotated[str, Field(min_length=1)] = Field(default="runs", examples=["runs"])
    """Folder of the run folders, relative to the current folder."""
    every: Every = Field(default="10m", validate_default=True, examples=["10m"])
    """Steps, a duration, or auto: sqrt(2 x cost of a save x time between failures of so many GPUs), a minute to an hour."""
    keep: Count = Field(default=3, examples=[3])
    """Checkpoints that are kept, newest first."""


class RecoverySpec(Section):
    """What is done about a failure."""

    max_restarts: CountOrZero = Field(default=10, examples=[10])
    """Restarts since the newest whole checkpoint before the job gives up."""
    on_oom: Literal["stop", "replan"] = Field(default="stop", examples=["replan"])
    """A GPU ran out of memory: give up, or choose a smaller strategy. Only stop is built."""
    on_lost_gpus: Literal["stop", "wait", "replan"] = Field(default="stop", examples=["replan"])
    """GPUs are gone for good: give up, wait for others, or go on with the rest. Only stop is built."""
    on_loss_spike: Literal["stop", "rollback"] | None = Field(default=None, examples=["rollback"])
    """The loss jumped: give up, or go back and pass over the batches. Neither is built. Absent: a loss that is not finite stops
    the run, any other goes on."""


class QueueSpec(Section):
    """How the job waits where many share a cluster. Acts under `shardwise serve`; `run` starts at once, and says so."""

    priority: Annotated[int, Field(ge=-100, le=100)] = Field(default=0, examples=[10])
    """Jobs of a higher priority come first, and preempt those of a lower one; -100 to 100."""
    preemptible: bool = Field(default=True, examples=[False])
    """Whether it may be stopped, after a checkpoint, to make room for a job that comes first; it then waits again."""
    max_wait: Seconds | None = Field(default=None, examples=["2d"])
    """Longest wait for its first start; after it the job fails. Absent: it waits as long as it takes."""
