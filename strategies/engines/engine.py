"""An engine as the training loop sees it: it builds a session from a module and a strategy, and the session steps.

An engine receives modules and weight maps as arguments and knows no job, no file and no scheduler.
B micro batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from strategies.strategy import Stage, Strategy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from strategies.engines.mesh import Mesh
    from strategies.engines.sequence import WholeSequence
    from strategies.tensor.region import Region

BUCKET_BYTES = 64 * 2**20
"""Gradients that ZeRO 0 and 1 reduce in one message: large enough for a link's full bandwidth, small beside the states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """One forward pass of one replica."""

    input_ids_BS: Tensor
    target_ids_BS: Tensor
    """Target of each position; -100 where it does not count."""
    weight_B: Tensor
    """1 for a real sequence, 0 for one that only fills up the last micro batch."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that the module's `context` takes beside the tokens, by its name, each [B, ...]: segment_ids_BS of packed
    samples, say. Empty: every row is one sample."""
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that the loss takes beside the target ids, by its name, each [B, ...]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """The result of one optimizer step, the same on every rank."""

    loss: float
    """Summed over the targets of the global batch, divided by their number: nats per token where they are tokens."""
    gradient_norm: float
    """Global, before clipping."""
    skipped: bool = False
    """The loss scaler met an overflow: samples consumed, weights unchanged."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further numbers that the loss tells, by name, each a mean over its targets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The result of a pass over held-out batches, summed over all ranks."""

    loss: float
    """Sum over the targets; nats where they are tokens."""
    num_targets: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Sums over the targets of what else the loss tells."""


class Loss(Protocol):
    """A loss says what is made of the module's output for one micro batch. Sums, never means: ranks and micro batches add."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the K numbers that the loss tells; the first is `loss`."""

    def __call__(self, region: Region, output: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(told_K, trained): sums over the targets, the first without a gradient; `trained` is what backward starts from.

        Args:
            output: the head's, logits_BSV of this rank's part of the vocabulary, say."""

    def num_targets(self, batch: MicroBatch) -> Tensor:
        """How many targets of a micro batch count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSettings:
    """AdamW; the learning rate comes with every step."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit: moments of 8 bits (strategies/zero/adam8.py)."""
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    gradient_clip: float | None = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How tensor parallelism cuts one parameter."""

    shape: torch.Size
    """Shape of the whole parameter."""
    dim: int | None
    """The dimension that is split as torch.chunk splits; None: whole on every rank."""
    size: int
    rank: int
    partial: bool
    """Whole on every rank, but each rank's gradient is a part of a sum."""

    def part(self, whole: Tensor) -> Tensor:
        """Return this rank's part, a view; empty where the rows run out."""
        if self.dim is None:
            return whole
        length = whole.shape[self.dim]
        step = -(-length // self.size)
        start = min(self.rank * step, length)
        return whole.narrow(self.dim, start, min(step, length - start))


@dataclass(frozen=True, kw_only=True, slots=True)
class Requests:
    """The wishes of rooms to each other, and to the session that is built from them all."""

    held: tuple[Stage, ...] = ()
    """Stages of this rank under a pipeline; empty where it runs the whole model."""
    groups: tuple[Any, ...] = ()
    """Process groups that rooms made beside the mesh's: the session closes them."""
    shared_group: Any = None
    """Group of the two ranks that share a tied table; None where none is shared."""
    channels: Mapping[Any, Any] = field(default_factory=dict)
    """Process group of each channel between pipeline stages (pipeline/messages.py)."""
    part: Callable[[MicroBatch], MicroBatch] | None = None
    """Takes what this rank computes of a micro batch; None: all of it."""
    runner: Callable[..., Any] | None = None
    """Makes the runner of a session's micro batches from its build, states and loss."""
    make_states: Callable[[Build, Callable[[str, torch.Size], Tensor]], Any] | None = None
    """Makes the model's states from a build and the weights' first values."""
    num_shards: int = 1
    """Ranks that one copy of the optimizer states is dealt to."""
    num_replicas: int = 1
    """Ranks that hold the same shard."""
    shard_rank: int = 0
    shard_group: Any = None
    replica_group: Any = None
    adam: Callable[[Build, torch.device, torch.dtype], Any] | None = None
    """Makes another optimizer than AdamW with 32-bit moments on the device, from a build, device and dtype of the states."""
    homes: Callable[[Build], Any] | None = None
    """Makes the streams of whole parameters that live on the host or in files; None: they stay on the device."""
    fsdp_offload: Any = None
    """FSDP2's policy for shards that live on the host; None: they stay on the device."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """The module and its plan as the rooms pass them from one to the next while a module is split; realized once, after the
    last room.

    `requests` are wishes of one room to another (offload asks zero for its CPU policy, say)."""

    module: nn.Module
    strategy: Strategy
    precision: str
    device: torch.device
    mesh: Mesh
    """The world, by axis."""
    region: Region
    """The region that the module's parts ask for their products at the borders of a split."""
    sequence: WholeSequence | None = None
    """The sequences that the module's parts ask for their tokens' places and for attention; None: each is whole on this rank."""
    layout: Mapping[str, Layout] = field(default_factory=dict)
    """Layout of each parameter; empty where tensor parallelism splits none."""
    shared: tuple[str, ...] = ()
    """Parameters that another pipeline stage holds too: one parameter, whose gradients are added."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    requests: Requests = field(default_factory=lambda: Requests())
    bucket_bytes: int = BUCKET_BYTES
    deterministic: bool = False


class Session(Protocol):
    """A module that trains under one strategy, on one rank. All calls but `tensors` are collective over the world."""

    module: nn.Module

    def step(self, micro_batches: Sequence[MicroBatch], *, num_targets: int, learning_rate: float) -> StepResult:
        """Forward, loss, backward, clip, optimizer. num_targets counts what the loss sums over in the whole global batch:
        tokens, or pairs of answers.

        Raises FloatingPointError, on every rank and with the weights unchanged, where the loss is not finite, or the
        gradient norm is not and no loss scaler handles it."""

    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> Evaluation:
        """The loss over all ranks, no gradient. Every rank gives as many micro batches, filled up with sequences of
        weight 0."""

    def scores(self, micro_batches: Iterable[MicroBatch], loss: Loss) -> list[Tensor | None]:
        """Return what another loss tells of each micro batch; None on ranks that do not hold the head. Every rank gives as
        many."""

    def state_dict(self) -> dict[str, Any]:
        """Sharded state for torch.distributed.checkpoint: `model.NAME`, `optimizer.exp_avg.NAME`, ... DTensors or
        replicated tensors under names and global shapes that no strategy changes, in the dtype of the master copy,
        so that any strategy and world size loads any other's. Plus Python numbers: `optimizer.step` (steps that changed
        the weights), and of the loss scaler `scaler.scale` and `scaler.good_steps` (1.0 and 0 without one)."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what state_dict() gave, its tensors filled in place by the reader, its numbers replaced."""

    def tensors(self) -> dict[str, list[Tensor]]:
        """The long-lived local tensors by plan component: parameters, master_weights, gradients, optimizer_states,
        communication_buffers. What is not in it and alive is activations, gathered parameters or temporary."""

    def close(self) -> None:
        """Frees groups and temporary files."""
