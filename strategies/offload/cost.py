"""Offload to the host, priced: what leaves the GPU, what the host holds, what crosses the link each step.

Source: ZeRO-Offload, arXiv:2101.06840; ZeRO-Infinity, arXiv:2104.07857. No published A100 run with its whole configuration
was found: these terms have no anchor yet, and the plan's stated error says so."""

from __future__ import annotations

from typing import NamedTuple

from clusters.cluster import Cluster
from strategies.constants import MEMORY
from strategies.pipeline.cost import Share
from strategies.recompute.cost import boundary_bytes, saved_bytes
from strategies.strategy import Strategy
from strategies.workload import Workload
from strategies.zero.cost import BYTES, StateBytes, gathers

READS = ("offload",)
HOST_LINK = 0.75
"""Reached of the host link's rate with pinned memory: 24 of 31.5 GB/s on PCIe 4.0 x16 (nvbandwidth)."""
GPUS_PER_UPLINK = 2
"""GPUs behind one PCIe switch of an eight-GPU NVLink board, which share its x16 uplink to the host (DGX A100 and DGX H100
system architecture: four switches for eight GPUs). All of them offload at the same time."""
HIDDEN = 0.9
"""Of a phase's compute, what copies to and from the host can hide behind."""
NUM_SLOTS = 3
PIECE_ELEMENTS = 2**21
"""Pieces of the optimizer's states with host buffers at once, and elements of one (adam.py)."""


class Offloaded(NamedTuple):
    """Of one rank: bytes that leave the GPU, and where to; bytes a step over the host link, each way."""

    gpu: StateBytes
    host_bytes: float
    nvme_bytes: float
    link_bytes: float
    optimizer_bytes_on_host: float
    """States that the host's own AdamW steps."""


def offloaded(
    states: StateBytes,
    strategy: Strategy,
    *,
    num_owned_parameters: float,
    element: int,
    largest: float = PIECE_ELEMENTS,
) -> Offloaded:
    """Optimizer states and master weights, and parameters, by the strategy's offload; `largest` elements has one shard."""
    choice = strategy.offload
    if not choice.any:
        return Offloaded(states, 0.0, 0.0, 0.0, 0.0)
    away = choice.optimizer_fraction if choice.optimizer != "none" else 0.0
    parameter, gradient, master, _ = BYTES[strategy.states]
    wide = 2 if element == 8 else 1
    with_shards = gathers(strategy) and choice.parameters == "host" and choice.optimizer == "host"
    # What is stepped on the host is stepped there in a master copy, unless the parameters themselves are there, in full.
    masters = states.master_weights
    if not master and not with_shards and strategy.states != "pure":
        masters = 4.0 * wide * num_owned_parameters
    optimizer = away * (masters + states.optimizer_states)
    buffers = 0.0
    if away and not with_shards:
        buffers = buffer_bytes(largest, strategy, wide, in_file=choice.optimizer == "nvme")
    parameters = states.parameters if choice.parameters != "none" else 0.0
    host = (optimizer if choice.optimizer == "host" else 0.0) + (parameters if choice.parameters == "host" else 0.0)
    nvme = (optimizer if choice.optimizer == "nvme" else 0.0) + (parameters if choice.parameters == "nvme" else 0.0)
    link = away * num_owned_parameters * (parameter + min(4, gradient)) * wide
    if choice.parameters != "none":
        link += 2 * parameters * strategy.gradient_accumulation_steps
    gpu = StateBytes(
        states.parameters - parameters,
        states.gradients,
        states.master_weights * (1 - away),
        states.optimizer_states * (1 - away),
    )
    return Offloaded(gpu, host + buffers, nvme, link, optimizer)


def buffer_bytes(largest: float, strategy: Strategy, wide: int, *, in_file: bool) -> float:
    """Host buffers of the pieces that are on their way: gradient, its widened copy, parameter; master and moments of a file."""
    parameter, gradient, _, _ = BYTES[strategy.states]
    element = min(4, gradient) + (4 if gradient == 2 else 0) + parameter + (12 if in_file else 0)
    return NUM_SLOTS * min(PIECE_ELEMENTS, largest) * element * wide


def host_bytes_per_s(cluster: Cluster) -> float:
    """One GPU's share of its way to the host, one direction, while its neighbours use it too."""
    shared = cluster.intra_node.name == "nvlink" and cluster.gpus_per_node >= 8
    return cluster.accelerator.host_link_bytes_per_s * HOST_LINK / (GPUS_PER_UPLINK if shared else 1)


def step_s(away: Offloaded, cluster: Cluster, *, num_ranks: int) -> float:
    """Seconds that a step's offload takes: gradients down and parameters up, the host's AdamW, NVMe both ways. Nothing of
    it is hidden: the next step needs the parameters."""
    host = cluster.host
    link = away.link_bytes / host_bytes_per_s(cluster)
    stepped = 2 * away.optimizer_bytes_on_host * num_ranks / host.memory_bytes_per_s
    disk = 0.0
    if away.nvme_bytes:
        rate = min(host.nvme_read_bytes_per_s, host.nvme_write_bytes_per_s)
        disk = 2 * away.nvme_bytes * num_ranks / rate if rate else float("inf")
    return link + stepped + disk


def activations_s(
    work: Workload,
    strategy: Strategy,
    cluster: Cluster,
    share: Share,
    *,
    tokens: int,
    sequence_length: int,
    element: int,
) -> float:
    """Seconds of the host link for one micro batch's activations, down in forward and up in backward: one way at a time."""
    layer = saved_bytes(
        work, strategy, MEMORY, selective=False, tokens=tokens, sequence_length=sequence_length, element=element
    )
    kind, kept = strategy.activation_checkpointing, layer
    if kind == "full":
        kept = boundary_bytes(work, strategy, tokens=tokens, element=element)
    elif kind == "selective":
        kept = saved_bytes(
            work, strategy, MEMORY, selective=True, tokens=tokens, sequence_length=sequence_length, element=element
        )
    num_bytes = share.checkpointed * kept + (share.layers - share.checkpointed) * layer
    return 2 * num_bytes / host_bytes_per_s(cluster)


def exposed_s(link_s: float, *, forward_s: float, backward_s: float) -> float:
    """Of activations_s, what compute does not hide. The GPU holds two layers' activations and no more, so what forward sends
    down waits for forward's compute, and what backward fetches for backward's."""
    return max(0.0, link_s / 2 - HIDDEN * forward_s) + max(0.0, link_s / 2 - HIDDEN * backward_s)
