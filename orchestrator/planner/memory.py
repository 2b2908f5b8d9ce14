"""Bytes of every pipeline rank, by component, at the peak of its step: the fold of the rooms' cost doors.

The peak is the largest of four moments, not a sum of maxima: the end of forward with the loss, the head's backward pass, the
last block's, and the optimizer. For the families built here the tensors are those of the code (strategies/zero/apply.py,
engines/loss.py), and benchmarks.trace holds them against the traced step; other families hold what the stacks that published
them held. docs/explanation/memory-model.md.

For a search, all else equal: bytes never fall as micro_batch_size grows at fixed accumulation, never rise with a wider
zero_group_size, and more checkpointed layers (one or more) never hold more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from clusters.cluster import Cluster
from orchestrator.planner.roofline import ELEMENT
from strategies.constants import MEMORY, MemoryConstants
from strategies.offload import cost as offload
from strategies.pipeline import cost as pipeline
from strategies.recompute import cost as recompute
from strategies.strategy import Strategy
from strategies.tensor import cost as tensor
from strategies.workload import Workload
from strategies.zero import cost as zero

CPU_FRAGMENTATION = 0.15
"""Resident set over live tensors, less one, where malloc is left to its defaults."""
CPU_PROCESS_BYTES = 218 * 2**20
"""Resident after the imports."""
COMMUNICATOR_BYTES = 64 * 2**20
"""NCCL's buffers of one communicator beyond the first."""
MEMORY_ERROR = 0.05
"""Margin kept of what the driver reports as total."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """One pipeline rank at its peak, bytes. Names are those of the plan's JSON."""

    pipeline_rank: int
    peak_phase: str
    parameters: int
    gathered_parameters: int
    master_weights: int
    gradients: int
    optimizer_states: int
    activations: int
    logits: int
    communication_buffers: int
    temporary: int
    reserve: int
    tensor_peak_bytes: int
    peak_bytes: int


class Stages(Sequence[StageMemory]):
    """One entry a pipeline rank, worked out when it is read: a search only wants the fullest."""

    def __init__(self, make: Callable[[int], StageMemory], size: int, known: dict[int, StageMemory]) -> None:
        self._make, self._size, self._known = make, size, known

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> StageMemory: ...
    @overload
    def __getitem__(self, index: slice) -> list[StageMemory]: ...
    def __getitem__(self, index: int | slice) -> StageMemory | list[StageMemory]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._size))]
        rank = range(self._size)[index]
        if rank not in self._known:
            self._known[rank] = self._make(rank)
        return self._known[rank]

    def __iter__(self) -> Iterator[StageMemory]:
        return (self[rank] for rank in range(self._size))

    def fullest(self) -> StageMemory:
        """The entry with the largest peak, without working out the others."""
        return max(self._known.values(), key=lambda stage: stage.peak_bytes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stages) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(self[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPrice:
    """All pipeline ranks against the budget, bytes."""

    stages: Stages
    peak_bytes: int
    usable_bytes: int
    host_bytes_per_node: int
    nvme_bytes_per_node: int
    host_usable_bytes: int
    nvme_usable_bytes: int

    @property
    def fits(self) -> bool:
        return (
            self.peak_bytes <= self.usable_bytes
            and self.host_bytes_per_node <= self.host_usable_bytes
            and self.nvme_bytes_per_node <= self.nvme_usable_bytes
        )


def price_memory(
    work: Workload,
    strategy: Strategy,
    cluster: Cluster,
    *,
    global_batch_size: int,
    sequence_length: int,
    precision: str,
    constants: MemoryConstants = MEMORY,
) -> MemoryPrice:
    """Prices a strategy whose `stages` are set."""
    element, kind = ELEMENT[precision], cluster.accelerator.kind
    shares = pipeline.shares(strategy)
    micro = _micro_batch(work, strategy, constants, sequence_length, element)
    away: dict[int, offload.Offloaded] = {}

    def make(rank: int) -> StageMemory:
        held = _held(work, strategy, shares.by_rank[rank], precision)
        away[rank] = held[0]
        return _stage(work, strategy, constants, shares.by_rank[rank], held, micro, rank, element, kind)

    known = {rank: make(rank) for rank in shares.distinct}
    host = max(leaves.host_bytes for leaves in away.values())
    nvme = max(leaves.nvme_bytes for leaves in away.values())
    if strategy.offload.activations == "host":
        host += max(_kept(strategy, share, micro) for share in shares.by_rank) * pipeline.in_flight(strategy, 0)
    calibration = cluster.calibration
    margin = (calibration.memory_error if calibration else None) or MEMORY_ERROR
    ranks_per_node = min(cluster.gpus_per_node, strategy.num_gpus)
    staging = max(
        s.parameters + s.master_weights + s.optimizer_states for s in known.values()
    )  # a checkpoint's one copy
    return MemoryPrice(
        stages=Stages(make, strategy.pipeline_parallel_degree, known),
        peak_bytes=max(stage.peak_bytes for stage in known.values()),
        usable_bytes=int(cluster.accelerator.memory_bytes * (1 - margin)),
        host_bytes_per_node=int((host + staging) * ranks_per_node) if kind == "cuda" else 0,
        nvme_bytes_per_node=int(nvme * ranks_per_node),
        host_usable_bytes=cluster.host.memory_bytes,
        nvme_usable_bytes=cluster.host.nvme_bytes,
    )


@dataclass(slots=True)
class _MicroBatch:
    """Bytes of one micro batch on any rank."""

    tokens: int
    hidden: float
    """One activation of the residual stream."""
    layer: float
    """An uncheckpointed layer's."""
    checkpointed: float
    """A checkpointed layer's."""
    logits: tuple[float, float]
    working: float
    """A block's backward pass beyond what was saved."""
    final: float
    """What the head keeps: the last block's output, its norm's, and a narrower projection."""


def _micro_batch(
    work: Workload, strategy: Strategy, constants: MemoryConstants, sequence_length: int, element: int
) -> _MicroBatch:
    tokens = strategy.micro_batch_size * sequence_length
    hidden = float(tokens * work.hidden_size * element)
    shape = {"tokens": tokens, "sequence_length": sequence_length, "element": element}
    layer = kept = recompute.saved_bytes(work, strategy, constants, selective=False, **shape)
    kind = strategy.activation_checkpointing
    if kind == "full":
        kept = recompute.boundary_bytes(work, strategy, tokens=tokens, element=element)
    elif kind == "selective":
        kept = min(layer, recompute.saved_bytes(work, strategy, constants, selective=True, **shape))
    if work.native:
        working = _native_working(work, strategy, tokens, element)
        working += layer - kept if kind != "none" else 0.0
    else:
        working = constants.working_elements * hidden
        if kind == "full":
            scores = recompute.score_bytes(work, strategy, **shape)
            working += constants.recompute_layers * (layer - constants.score_copies * scores)
            working += constants.recompute_scores * scores
    return _MicroBatch(
        tokens=tokens,
        hidden=hidden,
        layer=layer,
        checkpointed=kept,
        logits=tensor.logit_bytes(work, strategy, constants, tokens=tokens, element=element),
        working=working,
        final=hidden * 2,
    )


def _native_working(work: Workload, strategy: Strategy, tokens: int, element: int) -> float:
    """The feed-forward's backward pass: gradients of ReLU's output and input, of the residual stream and of the norm's
    output, and the down projection's weight gradient."""
    split = strategy.tensor_parallel_degree
    stream = tokens * element * (2 * work.ffn_size / split + 2 * work.hidden_size)
    return stream + work.ffn_size * work.hidden_size / split * element


def _held(
    work: Workload, strategy: Strategy, share: pipeline.Share, precision: str
) -> tuple[offload.Offloaded, float, float, float]:
    """(states of a rank after offload, its parameters, those of one block, those outside the blocks)."""
    block = tensor.block_parameters(work, strategy)
    outside = 0.0
    if share.embedding:
        outside += work.embedding_parameters
    if share.head:
        outside += work.head_parameters
        if work.tied_embeddings and not share.embedding:
            outside += work.vocab_size * work.embedding_size
    outside /= strategy.tensor_parallel_degree
    parameters = share.layers * block + outside
    states = zero.state_bytes(parameters, strategy, precision)
    owned = parameters / zero.group_size(strategy)
    left = offload.offloaded(states, strategy, num_owned_parameters=owned, element=ELEMENT[precision])
    return left, parameters, block, outside


def _kept(strategy: Strategy, share: pipeline.Share, micro: _MicroBatch) -> float:
    """Activations of one micro batch on one rank."""
    return share.checkpointed * micro.checkpointed + (share.layers - share.checkpointed) * micro.layer


def _stage(
    work: Workload,
    strategy: Strategy,
    constants: MemoryConstants,
    share: pipeline.Share,
    held: tuple[offload.Offloaded, float, float, float],
    micro: _MicroBatch,
    rank: int,
    element: int,
    kind: str,
) -> StageMemory:
    left, parameters, block, outside = held
    gpu = left.gpu
    flights = 1.0 if strategy.offload.activations == "host" else pipeline.in_flight(strategy, rank)
    activations = _kept(strategy, share, micro) * flights
    logits = at_head = 0.0
    if share.head:
        logits, at_head = micro.logits
        activations += micro.final

    gathered = zero.gathered_bytes(parameters, block, outside, strategy, element)
    if strategy.offload.parameters != "none" and not gathered:
        gathered = (min(2 * block, parameters - outside) + outside) * element
    unit = max(block, outside)
    scattered = zero.unsharded_gradient_bytes(parameters, unit, strategy, element)
    buffers = zero.all_gather_bytes(unit, strategy, element)
    buckets = temporary = 0.0
    if strategy.zero_stage < 2 and strategy.data_parallel_degree > 1:
        table = work.vocab_size * work.embedding_size / strategy.tensor_parallel_degree
        largest = table if outside else work.ffn_size * work.hidden_size / strategy.tensor_parallel_degree
        one = min(zero.bucket_bytes(largest, strategy, element), gpu.gradients) / zero.group_size(strategy)
        buckets = zero.IN_FLIGHT * one if strategy.zero_stage else 0.0
        temporary = 2 * one if gpu.master_weights else 0.0
    sharded = strategy.zero_stage >= 2
    early = 0.0 if sharded and strategy.gradient_accumulation_steps == 1 else gpu.gradients
    # (phase, gathered, gradients, activations, logits, buffers, temporary)
    moments = (
        ("forward", gathered, early, activations, logits, buffers, 0.0),
        ("backward", gathered, gpu.gradients, activations, at_head, buffers + buckets, scattered + micro.hidden),
        ("backward", gathered, gpu.gradients, activations, 0.0, buffers + buckets, scattered + micro.working),
        ("optimizer", 0.0, gpu.gradients, 0.0, 0.0, buckets, temporary),
    )
    phase, *rest = max(moments, key=_size)
    values = [int(gpu.parameters), int(gpu.master_weights), int(gpu.optimizer_states), *map(int, rest)]
    tensors = sum(values)
    if kind == "cuda":
        reserve = int(tensors * constants.fragmentation + constants.context_bytes)
    else:
        reserve = int(tensors * CPU_FRAGMENTATION + CPU_PROCESS_BYTES)
    return StageMemory(
        pipeline_rank=rank,
        peak_phase=phase,
        parameters=values[0],
        gathered_parameters=values[3],
        master_weights=values[1],
        gradients=values[4],
        optimizer_states=values[2],
        activations=values[5],
        logits=values[6],
        communication_buffers=values[7],
        temporary=values[8],
        reserve=reserve,
        tensor_peak_bytes=tensors,
        peak_bytes=tensors + reserve,
    )


def _size(moment: tuple[str, float, float, float, float, float, float]) -> float:
    return moment[1] + moment[2] + moment[3] + moment[4] + moment[5] + moment[6]
