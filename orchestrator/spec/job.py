"""The job file as one frozen value: its parts (sections.py), and what they stand for."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, PrivateAttr, Tag

from orchestrator.models.architecture import Architecture
from orchestrator.models.lora import TARGETS, Lora, sizes
from orchestrator.spec.errors import MAPPING, ErrorEntry, Fault, Keys, Spot
from orchestrator.spec.ppo_section import PpoSpec
from orchestrator.spec.sections import (
    DEFAULTS,
    BatchSpec,
    CheckpointSpec,
    ClusterSpec,
    DataSpec,
    ModelSpec,
    QueueSpec,
    RecoverySpec,
    Section,
    StrategySpec,
    TargetsSpec,
    TrainingSpec,
    kind,
)
from orchestrator.spec.values import KEYS, TEXT
from strategies.strategy import Offload

if TYPE_CHECKING:
    from clusters.cluster import Cluster


class Job(Section):
    """One training job: what is trained, on what, how, and what is wanted."""

    version: Literal[1] = Field(examples=[1])
    """Version of this format."""
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")] = Field(examples=["opt-1.3b-alpaca"])
    """Name of the run and of its folder: lower case, digits, dot, underscore, hyphen; 63 characters at most."""
    task: Literal["pretrain", "sft", "reward", "dpo", "ppo"] = Field(default="pretrain", examples=["pretrain"])
    """What is learned: from text (pretrain), from answers (sft), from which of two answers is preferred (reward, dpo), or from
    what a reward model says of the model's own answers (ppo)."""
    model: ModelSpec = Field(examples=["opt-1.3b"])
    """The model that is trained."""
    data: DataSpec | None = Field(default=None, examples=[{"train": ["corpus/*.txt"]}])
    """The text. Needed to prepare or run, not to plan."""
    batch: BatchSpec = Field(examples=[{"global_batch_size": 512, "sequence_length": 2048}])
    """What one optimizer step reads."""
    training: TrainingSpec = Field(default_factory=DEFAULTS, validate_default=True, examples=[{"steps": 1000}])
    """How long and how the model is trained."""
    ppo: PpoSpec | None = Field(default=None, examples=[{"reward": {"checkpoint": "runs/reward"}}])
    """What task ppo needs beside; no other task has it."""
    cluster: Annotated[
        Annotated[str, Tag(TEXT), Field(min_length=1)] | Annotated[ClusterSpec, Tag(KEYS)], Discriminator(kind)
    ] = Field(default="auto", examples=["a100-80gb-8x8"])
    """A catalog name (`GPU-NxM`: N nodes of M), a YAML file relative to the job file, `auto` (what this Ray cluster or machine
    has), or keys."""
    strategy: StrategySpec = Field(default_factory=DEFAULTS, validate_default=True, examples=["auto"])
    """How a step is split over the GPUs: `auto`, or any of these keys pinned."""
    objective: Literal["fastest", "cheapest", "fewest_gpus"] = Field(default="fastest", examples=["fastest"])
    """What the planner looks for: most tokens per second, fewest dollars per token, or fewest GPUs."""
    targets: TargetsSpec = Field(
        default_factory=DEFAULTS, validate_default=True, examples=[{"tokens_per_second_per_gpu": 2200}]
    )
    """What is wanted of the run."""
    checkpoint: CheckpointSpec = Field(default_factory=DEFAULTS, validate_default=True, examples=[{"every": "10m"}])
    """When and where the state is saved."""
    recovery: RecoverySpec = Field(default_factory=DEFAULTS, validate_default=True, examples=[{"max_restarts": 10}])
    """What is done about a failure."""
    queue: QueueSpec = Field(default_factory=DEFAULTS, validate_default=True, examples=[{"priority": 10}])
    """How the job waits where many share a cluster."""

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

    def entry(self, fault: Fault) -> ErrorEntry:
        """A finding about what the job says, as SpecError.errors has it, at the value or at the nearest thing around it."""
        keys = fault.path
        while keys and keys not in self._spots:
            keys = keys[:-1]
        line, column = self._spots.get(keys, (None, None))
        return ErrorEntry(file=self._file, line=line, column=column, message=fault.message, fix=fault.fix)

    @property
    def pins(self) -> dict[str, Any]:
        """The fields of the strategy that the job fixes, by their names in strategies.strategy.Strategy. `training.compile: true`
        is `strategy.compile: true`; rows that are no single sample are not split over a context group."""
        pins = {key: value for key, value in self.strategy.__dict__.items() if value is not None}
        if self.strategy.offload is not None:
            left = self.strategy.offload
            pins["offload"] = Offload(
                optimizer=left.optimizer,
                parameters=left.parameters,
                activations=left.activations,
                optimizer_fraction=left.optimizer_fraction,
            )
        if self.training.compile is True:
            pins["compile"] = True
        if self.task != "pretrain" or self.architecture.traits.blank_filling:
            pins.setdefault("context_parallel_degree", 1)
        if self.task == "ppo":  # a response is written token by token: stages would wait for each other
            pins["pipeline_parallel_degree"] = 1
        return pins

    @cached_property
    def architecture(self) -> Architecture:
        """The model's shape."""
        from orchestrator.spec.resolve import resolve_model

        return resolve_model(self.model, self.directory)

    def architecture_of(self, model: ModelSpec) -> Architecture:
        """The shape of another model that the job names."""
        from orchestrator.spec.resolve import resolve_model

        return resolve_model(model, self.directory)

    @cached_property
    def lora(self) -> Lora | None:
        """The adapters that are trained; None where the model itself is."""
        told = self.training.lora
        if told is None:
            return None
        known = [target for target in TARGETS if target in sizes(self.architecture)]
        wanted = known if told.targets == "all-linear" else [target for target in TARGETS if target in told.targets]
        return Lora(rank=told.rank, alpha=told.alpha, targets=tuple(wanted))

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
        return self.model.has_weights

    @property
    def uses_tokenizer_of_weights(self) -> bool:
        """True where the job names no tokenizer and starts from weights: they know no ids but those of their own."""
        return self.data is not None and not self.data.wrote("tokenizer") and self.initializes_from_weights

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
        checkpoint, recovery, queue and the length of the training may differ."""
        mine, theirs = _flat(_trajectory(self)), _flat(_trajectory(other))
        return sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))


def _trajectory(job: Job) -> dict[str, Any]:
    shape = job.architecture
    training = job.training.model_dump(exclude={"steps", "tokens"})
    names = [name for name in shape.__dataclass_fields__ if name not in ("name", "dropout")]
    model = {name: getattr(shape, name) for name in names} | {"dropout": job.model.dropout}
    weights = job.model.path or job.model.checkpoint
    if job.initializes_from_weights:
        model["path"] = weights
    data = job.data.model_dump() if job.data else {}
    if job.uses_tokenizer_of_weights:
        data["tokenizer"] = weights
    parts = {"task": job.task, "model": model, "data": data, "batch": job.batch.model_dump(), "training": training}
    return parts if job.ppo is None else {**parts, "ppo": job.ppo.model_dump()}


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
