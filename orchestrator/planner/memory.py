"""Bytes of every pipeline rank, by component, at the peak of its step. A fold of the rooms' cost doors.

The peak is the largest of three moments: the end of forward (all activations and the loss), the start of backward's work
on a block, and the optimizer; not a sum of maxima. b micro batch, s sequence, h hidden, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace

from clusters.cluster import Cluster
from strategies.offload import cost as offload
from strategies.pipeline import cost as pipeline
from strategies.recompute import cost as recompute
from strategies.strategy import Strategy
from strategies.tensor import cost as tensor
from strategies.workload import Workload
from strategies.zero import cost as zero

ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
"""Bytes of an activation."""
CUDA_CONTEXT_BYTES = int(0.75 * 2**30)
"""Driver context and library workspaces of one process."""
COMMUNICATOR_BYTES = 100 * 2**20
"""Buffers of one NCCL communicator."""
FRAGMENTATION = {"cuda": 0.03, "cpu": 0.15}
"""Reserved over allocated, less one: A100 runs show 0.02 to 0.06; on CPU the resident set grows 15 % above live tensors."""
CPU_PROCESS_BYTES = 218 * 2**20
"""Resident after the imports."""
MEMORY_ERROR = 0.02
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


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPrice:
    """All pipeline ranks against the budget, bytes."""

    stages: tuple[StageMemory, ...]
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
) -> MemoryPrice:
    """Prices a strategy whose `stages` are set. Never falls as micro_batch_size grows at fixed accumulation."""
    kind = cluster.accelerator.kind
    degree = strategy.pipeline_parallel_degree
    stages: list[StageMemory] = []
    host = nvme = 0.0
    for rank in range(degree):
        if 1 < rank < degree - 1 and strategy.num_virtual_stages == 1 and _same_share(strategy, rank):
            stages.append(replace(stages[-1], pipeline_rank=rank))  # holds less in flight; the one before bounds it
            continue
        stage, offloaded = _stage(work, strategy, rank, sequence_length, precision, kind)
        stages.append(stage)
        host, nvme = max(host, offloaded.host_bytes), max(nvme, offloaded.nvme_bytes)
    margin = (
        cluster.calibration.memory_error if cluster.calibration and cluster.calibration.memory_error else MEMORY_ERROR
    )
    ranks_per_node = min(cluster.gpus_per_node, strategy.num_gpus)
    staging = max(s.parameters + s.master_weights + s.optimizer_states for s in stages)  # one copy for the checkpoint
    return MemoryPrice(
        stages=tuple(stages),
        peak_bytes=max(stage.peak_bytes for stage in stages),
        usable_bytes=int(cluster.accelerator.memory_bytes * (1 - margin)),
        host_bytes_per_node=int((host + staging) * ranks_per_node) if kind == "cuda" else 0,
        nvme_bytes_per_node=int(nvme * ranks_per_node),
        host_usable_bytes=cluster.host.memory_bytes,
        nvme_usable_bytes=cluster.host.nvme_bytes,
    )


def _same_share(strategy: Strategy, rank: int) -> bool:
    return strategy.stages[rank].num_layers == strategy.stages[rank - 1].num_layers


def _stage(
    work: Workload, strategy: Strategy, rank: int, sequence_length: int, precision: str, kind: str
) -> tuple[StageMemory, offload.Offloaded]:
    element = ELEMENT[precision]
    held = [stage for stage in strategy.stages if stage.pipeline_rank == rank]
    layers = sum(stage.num_layers for stage in held)
    checkpointed = sum(stage.num_checkpointed_layers for stage in held)
    embedding, head = any(s.embedding for s in held), any(s.head for s in held)
    split = strategy.tensor_parallel_degree
    block = tensor.block_parameters(work, strategy)
    tied_copy = work.vocab_size * work.embedding_size if head and not embedding and work.tied_embeddings else 0
    outside = (work.embedding_parameters * embedding + (work.head_parameters + tied_copy) * head) / split
    parameters = layers * block + outside
    states = zero.state_bytes(parameters, strategy, precision)
    owned = parameters / (strategy.zero_group_size if strategy.zero_stage else 1)
    left = offload.offloaded(states, strategy, num_owned_parameters=owned, element=element)
    gpu = left.gpu
    tokens = strategy.micro_batch_size * sequence_length

    full_layer = recompute.layer_bytes(work, strategy, tokens=tokens, sequence_length=sequence_length, element=element)
    kept = _kept_bytes(work, strategy, layers, checkpointed, tokens, element, full_layer)
    flights = pipeline.in_flight(strategy, rank)
    if strategy.offload.activations == "host":
        flights = 1.0
    boundary = tokens * work.hidden_size * element
    activations = kept * flights + (boundary if head else 0)
    logits = 12.0 * tokens * work.vocab_size / split * (2 if precision == "fp64" else 1) if head else 0.0

    gathered = zero.gathered_bytes(parameters, block, outside, strategy, element)
    unsharded = zero.unsharded_gradient_bytes(parameters, block, outside, strategy, element)
    # Backward through one block: its gradients in flight, and what recompute makes again of a checkpointed one.
    width = max(work.ffn_size, 2 * work.hidden_size) / split
    working = tokens * element * (2 * width + 2 * work.hidden_size)
    again = full_layer if strategy.activation_checkpointing == "full" and checkpointed else 0.0
    weight_gradient = work.ffn_size * work.hidden_size / split * element
    own = strategy.zero_stage < 2
    grads_in_forward = gpu.gradients if own or strategy.gradient_accumulation_steps > 1 else 0.0
    fixed = gpu.parameters + gpu.master_weights + gpu.optimizer_states
    bucket = max(block, outside) * element * (2 if strategy.zero_stage == 1 and strategy.zero_group_size > 1 else 0)
    step_temporary = owned * 4 * (gpu.master_weights > 0) + bucket

    # (components that differ between the moments): activations, logits, gathered, gradients, buffers, temporary
    moments = {
        "forward": (activations, logits, gathered, grads_in_forward, 0.0, 0.0),
        "backward": (activations, 0.0, gathered, gpu.gradients, unsharded, working + again + weight_gradient),
        "optimizer": (0.0, 0.0, 0.0, gpu.gradients, bucket, step_temporary - bucket),
    }
    phase = max(moments, key=lambda name: sum(moments[name]))
    acts, logit, gather, grads, buffers, temporary = moments[phase]
    total = fixed + sum(moments[phase])
    reserve = total * FRAGMENTATION[kind] + (_cuda_reserve(strategy) if kind == "cuda" else CPU_PROCESS_BYTES)
    values = [gpu.parameters, gather, gpu.master_weights, grads, gpu.optimizer_states, acts, logit, buffers, temporary]
    whole = [int(value) for value in values]
    return (
        StageMemory(
            pipeline_rank=rank,
            peak_phase=phase,
            parameters=whole[0],
            gathered_parameters=whole[1],
            master_weights=whole[2],
            gradients=whole[3],
            optimizer_states=whole[4],
            activations=whole[5],
            logits=whole[6],
            communication_buffers=whole[7],
            temporary=whole[8],
            reserve=int(reserve),
            tensor_peak_bytes=sum(whole),
            peak_bytes=sum(whole) + int(reserve),
        ),
        left,
    )


def _kept_bytes(
    work: Workload, strategy: Strategy, layers: int, checkpointed: int, tokens: int, element: int, full_layer: float
) -> float:
    """Activations of one micro batch on one rank."""
    if strategy.activation_checkpointing == "none":
        return layers * full_layer
    if strategy.activation_checkpointing == "selective":
        plain = replace(strategy, activation_checkpointing="none") if checkpointed < layers else strategy
        rest = 0.0
        if checkpointed < layers:
            sequence = tokens // strategy.micro_batch_size
            rest = recompute.layer_bytes(work, plain, tokens=tokens, sequence_length=sequence, element=element)
        return checkpointed * full_layer + (layers - checkpointed) * rest
    boundary = recompute.boundary_bytes(work, strategy, tokens=tokens, element=element)
    return checkpointed * boundary + (layers - checkpointed) * full_layer


def _cuda_reserve(strategy: Strategy) -> float:
    groups = sum(
        degree > 1
        for degree in (
            strategy.data_parallel_degree,
            strategy.tensor_parallel_degree,
            strategy.pipeline_parallel_degree,
        )
    )
    return CUDA_CONTEXT_BYTES + (groups + (strategy.num_gpus > 1)) * COMMUNICATOR_BYTES
