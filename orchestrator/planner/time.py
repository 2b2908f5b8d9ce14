"""Seconds of one step: a roofline with an efficiency curve, collectives on the links they cross, what hides, the bubble.

Constants are few and physical. GPU: fitted together to 336 published runs (MPT, LLaMA, BLOOM, Megatron and InternEvo on
A100 and V100; mean error by source 9 %, bias -8 to +12 %); none is special to a row. CPU and calibrated clusters: from the
measured curves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from clusters.cluster import Cluster
from clusters.hardware import Link
from orchestrator.planner.memory import ELEMENT, MemoryPrice, price_memory
from strategies.offload import cost as offload
from strategies.pipeline import cost as pipeline
from strategies.recompute import cost as recompute
from strategies.strategy import SPLIT_BACKWARD, Strategy
from strategies.tensor import cost as tensor
from strategies.workload import Workload
from strategies.zero import cost as zero

MATMUL_EFFICIENCY = 0.70
"""Of peak, for a product without an edge."""
MATMUL_HALF_SIZE = 300.0
"""Cube root of rows * inputs * outputs at which a product reaches half of that."""
ATTENTION_EFFICIENCY = 0.27
"""Of peak, flash attention on causal FLOPs."""
MEMORY_EFFICIENCY = 0.70
"""Of the datasheet's memory bandwidth, for element-wise kernels."""
FUSED_NORM_SAVES = 0.44
"""Part of the element-wise traffic that fused norms spare."""
LINE_EFFICIENCY = 0.93
"""Bus bandwidth over line rate."""
ELEMENTWISE_PASSES = 1.3
"""Traffic of the element-wise work over that of one kernel an operation: casts, masks and what eager kernels read twice."""
KERNEL_OVERHEAD_S = 7e-6
HIDDEN_PART = 0.51
"""Part of the data-parallel traffic that backward can hide, where it is long enough."""
STEP_OVERHEAD_S = 6.5e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class TimePrice:
    """Seconds of one optimizer step, by component; names are those of the plan's JSON."""

    step_s: float
    compute_s: float
    recompute_s: float
    tensor_parallel_s: float
    data_parallel_s: float
    data_parallel_exposed_s: float
    pipeline_bubble_s: float
    pipeline_transfer_s: float
    offload_s: float
    optimizer_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """What a strategy costs."""

    memory: MemoryPrice
    time: TimePrice


def price(
    work: Workload,
    strategy: Strategy,
    cluster: Cluster,
    *,
    global_batch_size: int,
    sequence_length: int,
    precision: str,
) -> Price:
    """Memory and time of one strategy whose `stages` are set, fit or not. `global_batch_size` is the whole step's."""
    job = {"global_batch_size": global_batch_size, "sequence_length": sequence_length}
    return Price(
        memory=price_memory(work, strategy, cluster, precision=precision, **job),
        time=price_time(work, strategy, cluster, precision=precision, **job),
    )


def price_time(
    work: Workload,
    strategy: Strategy,
    cluster: Cluster,
    *,
    global_batch_size: int,
    sequence_length: int,
    precision: str,
) -> TimePrice:
    """Time of one step. Every replica runs gradient_accumulation_steps micro batches, full or not."""
    tokens = strategy.micro_batch_size * sequence_length
    split, micro_batches = strategy.tensor_parallel_degree, strategy.gradient_accumulation_steps
    degree = strategy.pipeline_parallel_degree
    element = ELEMENT[precision]
    layer = _layer_s(work, cluster, tokens, sequence_length, precision, split, strategy.attention, strategy.fused_norm)
    head = _head_s(work, cluster, tokens, precision, split)
    held = [[s for s in strategy.stages if s.pipeline_rank == rank] for rank in range(degree)]
    layers = [sum(s.num_layers for s in stages) for stages in held]
    has_head = [any(s.head for s in stages) for stages in held]
    slowest = max(range(degree), key=lambda r: layers[r] * 3 * layer + has_head[r] * 3 * head)
    checkpointed = sum(s.num_checkpointed_layers for s in held[slowest])
    busy = 3 * layers[slowest] * layer + 3 * head * has_head[slowest]
    again = {"none": 0.0, "selective": 0.12, "full": 1.0}[strategy.activation_checkpointing] * checkpointed * layer

    message = tensor.message_bytes_per_layer(work, strategy, tokens=tokens, element=element)
    link = _group_link(cluster, split, strategy.degrees.stride("tensor"))
    repeats = 2 + (checkpointed / max(1, layers[slowest]) if strategy.activation_checkpointing == "full" else 0)
    tensor_s = repeats * layers[slowest] * 2 * _ring_s(message / 2, split, link, halves=2) if split > 1 else 0.0

    one = busy + again + tensor_s
    bubble = pipeline.bubble_fraction(strategy) * one * micro_batches if degree > 1 else 0.0
    hop = pipeline.transfer_bytes(work, strategy, tokens=tokens, element=element)
    hop_link = _group_link(cluster, degree, strategy.degrees.stride("pipeline"))
    transfer = 2 * micro_batches * strategy.num_virtual_stages * (hop / hop_link.bytes_per_s + hop_link.latency_s)
    transfer = 0.5 * transfer if degree > 1 else 0.0
    if strategy.pipeline_schedule in SPLIT_BACKWARD:
        transfer *= 0.5

    block = tensor.block_parameters(work, strategy)
    parameters = max(layers) * block + (work.embedding_parameters + work.head_parameters) / split / min(degree, 2)
    data_s, exposed = _data_parallel_s(strategy, cluster, parameters, element, busy * micro_batches)
    owned = parameters / (strategy.zero_group_size if strategy.zero_stage else 1)
    optimizer_s, offload_s = _optimizer_s(strategy, cluster, parameters, owned, precision, element)
    offload_s += micro_batches * _activations_s(
        work, strategy, cluster, layers[slowest], checkpointed, tokens, sequence_length, element, busy
    )
    compute = micro_batches * busy + STEP_OVERHEAD_S * (cluster.accelerator.kind == "cuda")
    recompute_s, tensor_total = micro_batches * again, micro_batches * tensor_s
    return TimePrice(
        step_s=compute + recompute_s + tensor_total + exposed + bubble + transfer + offload_s + optimizer_s,
        compute_s=compute,
        recompute_s=recompute_s,
        tensor_parallel_s=tensor_total,
        data_parallel_s=data_s,
        data_parallel_exposed_s=exposed,
        pipeline_bubble_s=bubble,
        pipeline_transfer_s=transfer,
        offload_s=offload_s,
        optimizer_s=optimizer_s,
    )


def _matmul_rate(cluster: Cluster, precision: str, volume: float) -> float:
    """FLOP/s of a product of rows * inputs * outputs = volume, forward and backward together."""
    measured = cluster.calibration.rate(f"matmul_{precision}", volume) if cluster.calibration else None
    if measured:
        return measured
    size = float(volume ** (1 / 3))
    return cluster.accelerator.peak_flops[precision] * MATMUL_EFFICIENCY * size / (size + MATMUL_HALF_SIZE)


def _elementwise_rate(cluster: Cluster, num_bytes: float) -> float:
    if cluster.calibration:
        measured = cluster.calibration.rate("elementwise", num_bytes) or cluster.calibration.elementwise_bytes_per_s
        if measured:
            return measured
    return cluster.accelerator.memory_bytes_per_s * MEMORY_EFFICIENCY


def _layer_s(
    work: Workload,
    cluster: Cluster,
    tokens: int,
    sequence_length: int,
    precision: str,
    split: int,
    attention: str,
    fused_norm: bool,
) -> float:
    """Forward pass of one layer of one micro batch; backward takes twice as long."""
    element = ELEMENT[precision]
    seconds = 0.0
    for matmul in work.matmuls:
        volume = tokens * matmul.inputs * matmul.outputs / split
        seconds += 2 * volume / _matmul_rate(cluster, precision, volume)
    heads = work.num_heads / split
    score_flops = 2 * 2 * tokens * sequence_length * heads * work.head_dim
    measured = cluster.calibration.rate(f"attention_{precision}", sequence_length) if cluster.calibration else None
    if attention == "flash":
        rate = measured or cluster.accelerator.peak_flops[precision] * ATTENTION_EFFICIENCY
        seconds += score_flops / 2 / rate
    else:
        rate = _matmul_rate(cluster, precision, tokens * sequence_length * work.head_dim)
        passes = 4 if attention == "fused_softmax" else 9
        score_bytes = tokens * sequence_length * heads * element
        seconds += score_flops / rate + passes * score_bytes / _elementwise_rate(cluster, score_bytes)
    spared = 1 - FUSED_NORM_SAVES * fused_norm
    passes = ELEMENTWISE_PASSES if cluster.accelerator.kind == "cuda" else 1.0
    traffic = tokens * work.elementwise_elements * element * spared * passes
    seconds += traffic / _elementwise_rate(cluster, tokens * work.hidden_size * element)
    overhead = cluster.calibration.op_overhead_s if cluster.calibration else None
    launches = work.num_kernels * (overhead or KERNEL_OVERHEAD_S)
    return max(seconds, launches) if cluster.accelerator.kind == "cuda" else seconds + launches


def _head_s(work: Workload, cluster: Cluster, tokens: int, precision: str, split: int) -> float:
    """A third of the output projection's and the loss's forward and backward pass."""
    volume = tokens * work.embedding_size * work.vocab_size / split
    # Logits in fp32: written, read and written by the soft-max, read by the loss; as much again in backward.
    logit_bytes = tokens * work.vocab_size / split * 4
    loss = 6 * logit_bytes / 3 / _elementwise_rate(cluster, logit_bytes)
    return 2 * volume / _matmul_rate(cluster, precision, volume) + loss


def _group_link(cluster: Cluster, size: int, stride: int) -> Link:
    """The link that a group of ranks `stride` apart crosses, with the share of it that one rank gets.

    Between nodes the node's network is shared by all its ranks that talk at once: in a ring through r local neighbours
    one rank's bytes leave the node, so r ranks share one way out."""
    return _link(cluster, size, stride)


@lru_cache(maxsize=4096)
def _shares(gpus_per_node: int, size: int, stride: int) -> int | None:
    """Ranks of one node that share its network in this group's rings; None where the group stays inside."""
    if (size - 1) * stride < gpus_per_node and size * stride <= gpus_per_node:
        return None
    local = max(1, gpus_per_node // stride)
    return max(1, gpus_per_node // local)


def _link(cluster: Cluster, size: int, stride: int) -> Link:
    shares = _shares(cluster.gpus_per_node, size, stride)
    if shares is None:
        return cluster.intra_node
    outer, inner = cluster.inter_node, cluster.intra_node
    rate = outer.bytes_per_s * (1 if outer.measured else LINE_EFFICIENCY) / shares
    inside = inner.bytes_per_s * (1 if inner.measured else LINE_EFFICIENCY)
    return Link(name="network", bytes_per_s=min(rate, inside), latency_s=outer.latency_s, measured=True)


def _ring_s(num_bytes: float, size: int, link: Link, *, halves: int) -> float:
    """A ring's time: `halves` 1 for reduce-scatter or all-gather, 2 for all-reduce; bytes of the whole buffer."""
    if size == 1:
        return 0.0
    rate = link.bytes_per_s * (1 if link.measured else LINE_EFFICIENCY)
    return halves * ((size - 1) / size * num_bytes / rate + link.latency_s)


def _data_parallel_s(
    strategy: Strategy, cluster: Cluster, parameters: float, element: int, busy_s: float
) -> tuple[float, float]:
    """(all of it, what compute does not hide)."""
    size = strategy.data_parallel_degree
    if size == 1:
        return 0.0, 0.0
    gather_bytes, reduce_bytes = zero.message_bytes(parameters, strategy, element)
    stride = strategy.degrees.stride("data")
    group = strategy.zero_group_size if strategy.zero_stage else size
    inner = _collective_link(cluster, group, stride)
    seconds = _ring_s(reduce_bytes, group, inner, halves=1)
    seconds += _ring_s(gather_bytes if strategy.zero_stage else reduce_bytes, group, inner, halves=1)
    if group < size:
        outer = _group_link(cluster, size // group, stride * group)
        seconds += _ring_s(reduce_bytes / group, size // group, outer, halves=2)
    if cluster.accelerator.kind == "cpu" or strategy.zero_stage < 2:
        hidden = 0.0  # our buckets are reduced after backward, and gloo has no stream of its own
    else:
        hidden = min(seconds * HIDDEN_PART, busy_s * 0.9)
    return seconds, seconds - hidden


def _collective_link(cluster: Cluster, size: int, stride: int) -> Link:
    link = _group_link(cluster, size, stride)
    if cluster.calibration and link is cluster.intra_node:
        measured = cluster.calibration.rate(f"all_reduce_{size}", 16 * 2**20)
        if measured:
            return Link(name=link.name, bytes_per_s=measured, latency_s=link.latency_s, measured=True)
    return link


def _activations_s(
    work: Workload,
    strategy: Strategy,
    cluster: Cluster,
    layers: int,
    checkpointed: int,
    tokens: int,
    sequence_length: int,
    element: int,
    busy_s: float,
) -> float:
    """What compute cannot hide of a micro batch's activations going to the host in forward and coming back in backward.
    The link carries them one way at a time, and leaves no more than nine tenths of compute's time to hide in."""
    if strategy.offload.activations == "none":
        return 0.0
    layer = recompute.layer_bytes(work, strategy, tokens=tokens, sequence_length=sequence_length, element=element)
    boundary = recompute.boundary_bytes(work, strategy, tokens=tokens, element=element)
    again = boundary if strategy.activation_checkpointing == "full" else layer
    num_bytes = checkpointed * again + (layers - checkpointed) * layer
    link_s = 2 * num_bytes / (cluster.accelerator.host_link_bytes_per_s * LINE_EFFICIENCY)
    return max(0.0, link_s - 0.9 * busy_s)


def _optimizer_s(
    strategy: Strategy, cluster: Cluster, parameters: float, owned: float, precision: str, element: int
) -> tuple[float, float]:
    """(the step on the accelerator, what offload adds)."""
    states = zero.state_bytes(parameters, strategy, precision)
    away = offload.offloaded(states, strategy, num_owned_parameters=owned, element=element)
    passes = 2 * (away.gpu.master_weights + away.gpu.optimizer_states) + owned * 3 * element
    calibrated = cluster.calibration.optimizer_bytes_per_s if cluster.calibration else None
    rate = calibrated or cluster.accelerator.memory_bytes_per_s * MEMORY_EFFICIENCY
    step = (owned * 16 if calibrated else passes) / rate
    # clipping reads every gradient twice and zeroing writes it once
    step += 3 * states.gradients / _elementwise_rate(cluster, states.gradients)
    if not strategy.offload.any:
        return step, 0.0
    ranks = min(cluster.gpus_per_node, strategy.num_gpus)
    host_rate = cluster.host.memory_bytes_per_s / ranks
    link_s = away.link_bytes / (cluster.accelerator.host_link_bytes_per_s * LINE_EFFICIENCY)
    disk_s = 0.0
    if away.nvme_bytes:
        disk = min(cluster.host.nvme_read_bytes_per_s, cluster.host.nvme_write_bytes_per_s)
        disk_s = 2 * away.nvme_bytes * ranks / disk if disk else float("inf")
    return step, link_s + 2 * away.optimizer_bytes_on_host / host_rate + disk_s
