"""Seconds of one step by component: the fold of the rooms' cost doors over the slowest pipeline rank.

step_s = compute + recompute + tensor_parallel + data_parallel_exposed + pipeline_bubble + pipeline_transfer + offload
+ optimizer. The terms and their sources: docs/explanation/time-model.md.

For a search, all else equal: a step takes at least (micro batches) x (compute of one on the mean rank) x (1 + bubble_fraction);
compute_s and tensor_parallel_s of one pipeline rank are proportional to gradient_accumulation_steps; sharding (ZeRO, data
parallelism), offload and recomputing only add; more checkpointed layers never take less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from clusters.cluster import Cluster
from orchestrator.planner.memory import MemoryPrice, price_memory
from orchestrator.planner.roofline import Layer, Roofline, roofline
from strategies.constants import TIME, TRANSFER_S, TimeConstants
from strategies.links import all_reduce_s, ring
from strategies.offload import cost as offload
from strategies.pipeline import cost as pipeline
from strategies.strategy import Strategy
from strategies.tensor import cost as tensor
from strategies.workload import Workload
from strategies.zero import cost as zero


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


class Shape(TypedDict):
    """What a job says of its step."""

    global_batch_size: int
    sequence_length: int
    precision: str


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
    job = Shape(global_batch_size=global_batch_size, sequence_length=sequence_length, precision=precision)
    return Price(memory=price_memory(work, strategy, cluster, **job), time=price_time(work, strategy, cluster, **job))


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
    return step_time(roofline(work, cluster, precision), strategy, sequence_length, TIME)


def step_time(roof: Roofline, strategy: Strategy, sequence_length: int, constants: TimeConstants) -> TimePrice:
    """price_time on a roofline in hand; benchmarks.oracle fits the constants through it."""
    work, cluster, element = roof.work, roof.cluster, roof.element
    tokens = strategy.micro_batch_size * sequence_length
    times = strategy.gradient_accumulation_steps
    layer = roof.layer(strategy, tokens, sequence_length)
    again = _again_s(strategy, layer)
    message_s = _message_s(work, strategy, cluster, constants, tokens, element)
    head = roof.head(tokens, strategy.tensor_parallel_degree)

    shares = pipeline.shares(strategy)
    full = strategy.activation_checkpointing == "full"
    plain, once, slowest_s, slowest = layer.forward_s + layer.backward_s, 0.0, -1.0, shares.by_rank[0]
    for share, count in shares.distinct:
        messages = 2 * share.layers + (share.checkpointed if full else 0)
        seconds = share.layers * plain + share.checkpointed * again + messages * message_s + share.head * head
        once += seconds * count
        if seconds > slowest_s:
            slowest_s, slowest = seconds, share
    busy = slowest.layers * plain + slowest.head * head
    recompute = slowest.checkpointed * again
    messages = 2 * slowest.layers + (slowest.checkpointed if full else 0)
    bubble = pipeline.bubble_s(strategy, once_s=once, slowest_s=slowest_s)
    transfer = _transfer_s(work, strategy, cluster, constants, tokens, element)

    parameters = _parameters(work, strategy, slowest)
    data_s, exposed_s = zero.data_parallel_s(
        strategy,
        cluster,
        constants,
        parameters=parameters,
        num_units=slowest.layers + 1,
        element=element,
        compute_s=times * slowest_s,
    )
    optimizer_s, offload_s = _optimizer_s(roof, strategy, parameters, constants)
    if strategy.offload.activations != "none":
        link = offload.activations_s(
            work, strategy, cluster, slowest, tokens=tokens, sequence_length=sequence_length, element=element
        )
        forward = slowest.layers * layer.forward_s + slowest.head * head / 3
        offload_s += times * offload.exposed_s(link, forward_s=forward, backward_s=busy - forward)
    compute_s, recompute_s, tensor_s = times * busy, times * recompute, times * messages * message_s
    return TimePrice(
        step_s=compute_s + recompute_s + tensor_s + exposed_s + bubble + transfer + offload_s + optimizer_s,
        compute_s=compute_s,
        recompute_s=recompute_s,
        tensor_parallel_s=tensor_s,
        data_parallel_s=data_s,
        data_parallel_exposed_s=exposed_s,
        pipeline_bubble_s=bubble,
        pipeline_transfer_s=transfer,
        offload_s=offload_s,
        optimizer_s=optimizer_s,
    )


def _again_s(strategy: Strategy, layer: Layer) -> float:
    """Seconds that one checkpointed layer adds to its backward pass."""
    kind = strategy.activation_checkpointing
    return 0.0 if kind == "none" else layer.again_full_s if kind == "full" else layer.again_selective_s


def _message_s(
    work: Workload, strategy: Strategy, cluster: Cluster, constants: TimeConstants, tokens: int, element: int
) -> float:
    """Seconds of one layer's tensor-parallel messages in one direction: two blocking all-reduces, or their halves with
    sequence parallel. Recomputing a layer sends its forward messages again."""
    size = strategy.tensor_parallel_degree
    if size == 1:
        return 0.0
    stride = 1 if strategy.mesh_order[-1] == "tensor" else strategy.degrees.stride("tensor")
    group = ring(cluster, constants, size=size, stride=stride, num_gpus=strategy.num_gpus)
    num_bytes = tensor.message_bytes_per_layer(work, strategy, tokens=tokens, element=element) / 2
    wait = constants.collective_s if cluster.accelerator.kind == "cuda" else cluster.intra_node.latency_s
    steps = 2 * (size - 1) * group.hop_s
    return 2 * (all_reduce_s(group, num_bytes, messages=0) + wait + steps)


def _transfer_s(
    work: Workload, strategy: Strategy, cluster: Cluster, constants: TimeConstants, tokens: int, element: int
) -> float:
    """Seconds of stage-to-stage messages that no compute hides: each micro batch crosses each of a rank's stages both ways."""
    degree = strategy.pipeline_parallel_degree
    if degree == 1:
        return 0.0
    stride = strategy.num_gpus // degree
    if strategy.num_gpus > cluster.gpus_per_node:  # some neighbours are on two nodes, and the others wait for them
        stride = max(stride, cluster.gpus_per_node)
    pairs = ring(cluster, constants, size=2, stride=stride, num_gpus=strategy.num_gpus)
    hop_bytes = pipeline.transfer_bytes(work, strategy, tokens=tokens, element=element)
    one = 2 * strategy.num_virtual_stages * (hop_bytes / pairs.bytes_per_s + TRANSFER_S)
    fill = (degree - 1) / strategy.num_virtual_stages
    return constants.transfer * (strategy.gradient_accumulation_steps + fill) * one


def _parameters(work: Workload, strategy: Strategy, share: pipeline.Share) -> float:
    """Of the slowest pipeline rank, with the embedding or its tied copy."""
    outside = 0.0
    if share.embedding:
        outside += work.embedding_parameters
    if share.head:
        outside += work.head_parameters
    elif strategy.pipeline_parallel_degree > 1 and not share.embedding:
        outside += work.embedding_parameters  # the first stage's reduction is as late as anybody's
    block = tensor.block_parameters(work, strategy)
    return share.layers * block + outside / strategy.tensor_parallel_degree


def _optimizer_s(
    roof: Roofline, strategy: Strategy, parameters: float, constants: TimeConstants
) -> tuple[float, float]:
    """(the step on the accelerator with its fixed overhead, what offload adds). By bytes: master weights and moments are
    read and written, gradients read for the norm, read for the step and cleared, parameters written."""
    cluster, element = roof.cluster, roof.element
    owned = parameters / zero.group_size(strategy)
    states = zero.state_bytes(parameters, strategy, "fp64" if element == 8 else "bf16")
    away = offload.offloaded(states, strategy, num_owned_parameters=owned, element=element)
    calibration = cluster.calibration
    measured = calibration.optimizer_bytes_per_s if calibration else None
    gradients = 3 * owned * min(4, zero.BYTES[strategy.states][1])
    if measured:
        step = owned * 16 * element / 4 / measured + (gradients + owned * element) / roof.bandwidth
    else:
        step = (
            2 * (away.gpu.master_weights + away.gpu.optimizer_states) + gradients + owned * element
        ) / roof.bandwidth
    if cluster.accelerator.kind == "cuda":
        step += constants.step_s
    if not strategy.offload.any:
        return step, 0.0
    return step, offload.step_s(away, cluster, num_ranks=min(cluster.gpus_per_node, strategy.num_gpus))
