"""Seconds of one step by component: the fold of the rooms' cost doors over the slowest pipeline rank.

step_s = compute + recompute + tensor_parallel + data_parallel_exposed + pipeline_bubble + pipeline_transfer + offload
+ optimizer. The terms and their sources: docs/explanation/time-model.md.

For a search, all else equal: a step takes at least (micro batches) x (compute of one on the slowest rank) and the bubble of
the others; compute_s and tensor_parallel_s of one pipeline rank are proportional to gradient_accumulation_steps; sharding (ZeRO,
data parallelism), offload and recomputing only add; more checkpointed layers never take less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from clusters.cluster import Cluster
from strategies.constants import TIME, TRANSFER_S, TimeConstants
from strategies.engines.engine import BUCKET_BYTES
from strategies.links import all_reduce_s, blocking_s
from strategies.offload import cost as offload
from strategies.pipeline import cost as pipeline
from strategies.price.memory import MemoryPrice, price_memory
from strategies.price.roofline import Layer, Roofline, roofline
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
    again = again_s(strategy, layer)
    talk = tensor_s(roof, strategy, tokens)
    head = roof.head(tokens, strategy.tensor_parallel_degree)

    shares = pipeline.shares(strategy)
    plain, once, slowest_s, slowest = layer.forward_s + layer.backward_s, 0.0, -1.0, shares.by_rank[0]
    for share, count in shares.distinct:
        seconds = share.layers * plain + share.checkpointed * again + talk.of(share) + share.head * head
        once += seconds * count
        if seconds > slowest_s:
            slowest_s, slowest = seconds, share
    busy = slowest.layers * plain + slowest.head * head
    recompute = slowest.checkpointed * again
    bubble = pipeline.bubble_s(strategy, once_s=once, slowest_s=slowest_s)
    transfer = _transfer_s(roof, strategy, shares, tokens)
    data_s, exposed_s = _gradients_s(roof, strategy, slowest, compute_s=times * slowest_s)
    stepped_s, offload_s = optimizer_s(roof, strategy, stepped(work, strategy, slowest), constants)
    if strategy.offload.activations != "none":
        link = offload.activations_s(
            work, strategy, cluster, slowest, tokens=tokens, sequence_length=sequence_length, element=element
        )
        forward = slowest.layers * layer.forward_s + slowest.head * head / 3
        offload_s += times * offload.exposed_s(link, forward_s=forward, backward_s=busy - forward)
    compute_s, recompute_s, talk_s = times * busy, times * recompute, times * talk.of(slowest)
    return TimePrice(
        step_s=compute_s + recompute_s + talk_s + exposed_s + bubble + transfer + offload_s + stepped_s,
        compute_s=compute_s,
        recompute_s=recompute_s,
        tensor_parallel_s=talk_s,
        data_parallel_s=data_s,
        data_parallel_exposed_s=exposed_s,
        pipeline_bubble_s=bubble,
        pipeline_transfer_s=transfer,
        offload_s=offload_s,
        optimizer_s=stepped_s,
    )


def again_s(strategy: Strategy, layer: Layer) -> float:
    """Seconds that one checkpointed layer adds to its backward pass."""
    kind = strategy.activation_checkpointing
    return 0.0 if kind == "none" else layer.again_full_s if kind == "full" else layer.again_selective_s


class Talk(NamedTuple):
    """Seconds of tensor.messages."""

    layer: float = 0.0
    again: float = 0.0
    embedding: float = 0.0
    head: float = 0.0

    def of(self, share: pipeline.Share) -> float:
        """One micro batch through what a pipeline rank holds."""
        return (
            share.layers * self.layer
            + share.checkpointed * self.again
            + share.embedding * self.embedding
            + share.head * self.head
        )


SILENT = Talk()


def tensor_s(roof: Roofline, strategy: Strategy, tokens: int) -> Talk:
    """The tensor group's messages, which block."""
    size = strategy.tensor_parallel_degree
    if size == 1:
        return SILENT
    stride = 1 if strategy.mesh_order[-1] == "tensor" else strategy.degrees.stride("tensor")
    kind, num_gpus = strategy.activation_checkpointing, strategy.num_gpus
    key = tokens, size, stride, num_gpus, strategy.sequence_parallel, kind, strategy.states
    known = roof.talk.get(key)
    if known is None:
        sent = tensor.messages(roof.work, strategy, tokens=tokens, element=roof.element)
        group, wait_s = roof.links.ring(size, stride, num_gpus), _wait_s(roof)
        known = Talk(*(sum(blocking_s(group, message, wait_s) for message in part) for part in sent))
        roof.talk[key] = known
    return known


def _wait_s(roof: Roofline) -> float:
    cluster = roof.cluster
    return roof.links.constants.collective_s if cluster.accelerator.kind == "cuda" else cluster.intra_node.latency_s


def _gradients_s(
    roof: Roofline, strategy: Strategy, slowest: pipeline.Share, *, compute_s: float
) -> tuple[float, float]:
    """What is sent once a step, or for the sake of ZeRO: (all of it, what compute does not hide)."""
    # The first stage's reduction is as late as anybody's.
    embedding = slowest.embedding or not (slowest.head or strategy.pipeline_parallel_degree == 1)
    key = (
        *(slowest.layers, embedding, slowest.head, strategy.engine, strategy.states, strategy.mesh_order),
        *(strategy.data_parallel_degree, strategy.tensor_parallel_degree, strategy.pipeline_parallel_degree),
        *(strategy.context_parallel_degree, strategy.sequence_parallel, strategy.zero_stage, strategy.zero_group_size),
        *(strategy.gather, strategy.reduce, strategy.num_virtual_stages > 1),
        strategy.gradient_accumulation_steps if strategy.zero_stage >= 2 else 0,
    )
    known = roof.gradients.get(key)
    if known is None:
        known = roof.gradients[key] = sent_s(roof, strategy, slowest._replace(embedding=embedding))
    seconds, exposed_s = known
    return seconds, exposed_s if strategy.zero_stage < 2 else max(exposed_s, seconds - compute_s)


def sent_s(roof: Roofline, strategy: Strategy, share: pipeline.Share) -> tuple[float, float]:
    """(all of it, what no compute hides, however long it is)."""
    work, element, links, num_gpus = roof.work, roof.element, roof.links, strategy.num_gpus
    bucket_bytes = BUCKET_BYTES if work.native else links.constants.bucket_bytes
    sent = zero.messages(work, strategy, share, element=element, bucket_bytes=bucket_bytes)
    seconds, exposed_s = zero.data_parallel_s(strategy, links, sent)
    reduced, wait_s, blocking = zero.gradient_element(strategy, element), _wait_s(roof), 0.0
    for message in tensor.gradient_message(work, strategy, share, element=reduced):
        stride = 1 if strategy.mesh_order[-1] == "tensor" else strategy.degrees.stride("tensor")
        group = links.ring(strategy.tensor_parallel_degree, stride, num_gpus)
        blocking += blocking_s(group, message, wait_s)
    for message in zero.norm_message(strategy):
        blocking += all_reduce_s(links.ring(num_gpus, 1, num_gpus), message.num_bytes)
    return seconds + blocking, exposed_s + blocking


def _transfer_s(roof: Roofline, strategy: Strategy, shares: pipeline.Shares, tokens: int) -> float:
    """Seconds of stage-to-stage messages that no compute hides, of the rank with the most borders: it sends and receives at
    the same time; and once a step of a tied table's gradient."""
    degree = strategy.pipeline_parallel_degree
    if degree == 1:
        return 0.0
    num_gpus, per_node = strategy.num_gpus, roof.cluster.gpus_per_node
    # Where some neighbours are on two nodes, the others wait for them.
    stride = num_gpus // degree if num_gpus <= per_node else max(num_gpus // degree, per_node)
    pairs = roof.links.ring(2, stride, num_gpus)
    sent, _ = pipeline.messages(roof.work, strategy, shares.most_borders, tokens=tokens, element=roof.element)
    one = sent.num_bytes / pairs.bytes_per_s + sent.count * TRANSFER_S
    fill = (degree - 1) / strategy.num_virtual_stages
    crossing_s = roof.links.constants.transfer * (strategy.gradient_accumulation_steps + fill) * one
    return crossing_s + tied_s(roof, strategy)


def tied_s(roof: Roofline, strategy: Strategy) -> float:
    """Seconds of a tied table's gradient between the ranks of the first and the last stage."""
    degree, num_gpus, first = strategy.pipeline_parallel_degree, strategy.num_gpus, pipeline.shares(strategy).by_rank[0]
    shards = strategy.zero_group_size if strategy.zero_stage else 1
    key = degree, num_gpus, first.head, strategy.tensor_parallel_degree, shards, strategy.states
    known = roof.tied.get(key)
    if known is None:
        reduced, known = zero.gradient_element(strategy, roof.element), 0.0
        for message in pipeline.shared_message(roof.work, strategy, first, element=reduced):
            ends = roof.links.ring(2, (degree - 1) * (num_gpus // degree), num_gpus)
            known += all_reduce_s(ends, message.num_bytes) + _wait_s(roof)
        roof.tied[key] = known
    return known


def stepped(work: Workload, strategy: Strategy, share: pipeline.Share) -> float:
    """Parameters of the slowest pipeline rank, with the embedding or its tied copy, as the optimizer steps them."""
    outside = 0.0
    if share.embedding:
        outside += work.embedding_parameters
    if share.head:
        outside += work.head_parameters
    elif strategy.pipeline_parallel_degree > 1 and not share.embedding:
        outside += work.embedding_parameters  # the first stage's reduction is as late as anybody's
    block = tensor.block_parameters(work, strategy)
    return share.layers * block + outside / strategy.tensor_parallel_degree


def optimizer_s(roof: Roofline, strategy: Strategy, parameters: float, constants: TimeConstants) -> tuple[float, float]:
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
