"""Offload to the host, priced: what leaves the GPU, what the host holds, what crosses the link each step.

Source: ZeRO-Offload, arXiv:2101.06840; ZeRO-Infinity, arXiv:2104.07857. No published A100 run with its whole configuration
was found: these terms have no anchor yet, and the plan's stated error says so."""

from __future__ import annotations

from collections.abc import Mapping

from clusters.cluster import Cluster
from strategies.constants import TIME, TimeConstants
from strategies.price.roofline import Roofline
from strategies.rank import (
    MicroBatchBytes,
    ModelStates,
    Question,
    SavedActivations,
    Shape,
    Share,
    SlowestRank,
    StateBytes,
)
from strategies.room import Room
from strategies.rules import Rule
from strategies.strategy import Offload, Strategy
from strategies.zero.state_bytes import BYTES, SHARDING, gathers

NUM_SLOTS = 3
PIECE_ELEMENTS = 2**21
"""Pieces of the optimizer's states with host buffers at once, and elements of one (adam.py)."""


def offloaded(states: ModelStates, strategy: Strategy, *, element: int) -> ModelStates:
    """Return what stays on the GPU, and what of the optimizer's states, master weights and parameters goes where, by the
    strategy's offload."""
    choice, gpu = strategy.offload, states.gpu
    if not choice.any:
        return states
    away = choice.optimizer_fraction if choice.optimizer != "none" else 0.0
    parameter, gradient, master, _ = BYTES[strategy.states]
    wide = 2 if element == 8 else 1
    with_shards = gathers(strategy) and choice.parameters == "host" and choice.optimizer == "host"
    # What is stepped on the host is stepped there in a master copy, unless the parameters themselves are there, in full.
    masters = gpu.master_weights
    if not master and not with_shards and strategy.states != "pure":
        masters = 4.0 * wide * states.owned
    optimizer = away * (masters + gpu.optimizer_states)
    buffers = 0.0
    if away and not with_shards:
        buffers = buffer_bytes(states.largest, strategy, wide, in_file=choice.optimizer == "nvme")
    parameters = gpu.parameters if choice.parameters != "none" else 0.0
    host = (optimizer if choice.optimizer == "host" else 0.0) + (parameters if choice.parameters == "host" else 0.0)
    nvme = (optimizer if choice.optimizer == "nvme" else 0.0) + (parameters if choice.parameters == "nvme" else 0.0)
    link = away * states.owned * (parameter + min(4, gradient)) * wide
    if choice.parameters != "none":
        link += 2 * parameters * strategy.gradient_accumulation_steps
    left = StateBytes(
        gpu.parameters - parameters, gpu.gradients, gpu.master_weights * (1 - away), gpu.optimizer_states * (1 - away)
    )
    return states._replace(
        gpu=left,
        host_bytes=host + buffers,
        nvme_bytes=nvme,
        link_bytes=link,
        optimizer_bytes_on_host=optimizer,
        streamed=choice.parameters != "none" and not gathers(strategy),
    )


def buffer_bytes(largest: float, strategy: Strategy, wide: int, *, in_file: bool) -> float:
    """Host buffers of the pieces that are on their way: gradient, its widened copy, parameter; master and moments of a file."""
    parameter, gradient, _, _ = BYTES[strategy.states]
    element = min(4, gradient) + (4 if gradient == 2 else 0) + parameter + (12 if in_file else 0)
    return NUM_SLOTS * min(PIECE_ELEMENTS, largest) * element * wide


def host_bytes_per_s(cluster: Cluster, constants: TimeConstants = TIME) -> float:
    """One GPU's share of its way to the host, one direction, while its neighbours use it too."""
    shared = cluster.intra_node.name == "nvlink" and cluster.gpus_per_node >= 8
    return (
        cluster.accelerator.host_link_bytes_per_s * constants.host_link / (constants.gpus_per_uplink if shared else 1)
    )


def step_s(away: ModelStates, cluster: Cluster, *, num_ranks: int, constants: TimeConstants = TIME) -> float:
    """Seconds that a step's offload takes: gradients down and parameters up, the host's AdamW, NVMe both ways. Nothing of
    it is hidden: the next step needs the parameters."""
    host = cluster.host
    link = away.link_bytes / host_bytes_per_s(cluster, constants)
    stepped = 2 * away.optimizer_bytes_on_host * num_ranks / host.memory_bytes_per_s
    disk = 0.0
    if away.nvme_bytes:
        rate = min(host.nvme_read_bytes_per_s, host.nvme_write_bytes_per_s)
        disk = 2 * away.nvme_bytes * num_ranks / rate if rate else float("inf")
    return link + stepped + disk


def activations_s(num_bytes: float, cluster: Cluster, constants: TimeConstants = TIME) -> float:
    """Return the seconds of the host link for one micro batch's activations, down in forward and up in backward: one way at a
    time."""
    return 2 * num_bytes / host_bytes_per_s(cluster, constants)


def exposed_s(link_s: float, *, forward_s: float, backward_s: float, constants: TimeConstants = TIME) -> float:
    """Return the part of activations_s that compute does not hide. The GPU holds two layers' activations and no more, so what
    forward sends down waits for forward's compute, and what backward fetches for backward's."""
    hidden = constants.offload_hidden
    return max(0.0, link_s / 2 - hidden * forward_s) + max(0.0, link_s / 2 - hidden * backward_s)


class Offloading(Room):
    """States and activations that leave the accelerator between their uses."""

    name = "offload"
    reads: Mapping[str, tuple[str, ...]] = {
        "model_states": ("offload", *SHARDING, "gradient_accumulation_steps"),
        "saved": ("offload",),
        "update_s": ("offload", "num_gpus"),
        "step_s": ("offload", "micro_batch_size", "gradient_accumulation_steps", "attention", "fused_norm", "compile"),
    }
    without_effect = (
        Rule(
            fields=("offload",),
            applies=lambda s: s.offload.optimizer_fraction < 1 and s.offload.optimizer == "none",
            reason="offload.optimizer_fraction has no effect where the optimizer states stay on the GPU",
            fix="leave it out",
        ),
    )
    apply = ("strategies.offload.apply:apply",)

    def model_states(
        self, question: Question, strategy: Strategy, shape: Shape, share: Share, states: ModelStates
    ) -> ModelStates:
        return offloaded(states, strategy, element=question.element)

    def saved(
        self, strategy: Strategy, shape: Shape, share: Share, rank: int, micro: MicroBatchBytes, saved: SavedActivations
    ) -> SavedActivations:
        if strategy.offload.activations == "none":
            return saved
        # A block at work and the one that comes back from the host meanwhile; at the head none has come yet.
        two = 2 * max(micro.layer * (share.checkpointed < share.layers), micro.checkpointed)
        return saved._replace(one=min(saved.one, two), come_back=True, host_bytes=saved.one)

    def update_s(self, roof: Roofline, strategy: Strategy, states: ModelStates) -> Mapping[str, float]:
        if not strategy.offload.any:
            return {}
        num_ranks = min(roof.cluster.gpus_per_node, strategy.num_gpus)
        return {"offload_s": step_s(states, roof.cluster, num_ranks=num_ranks, constants=roof.constants)}

    def step_s(
        self, roof: Roofline, question: Question, strategy: Strategy, shape: Shape, rank: SlowestRank
    ) -> Mapping[str, float]:
        if strategy.offload.activations == "none":
            return {}
        tokens, share = shape.tokens(question, strategy), rank.share
        layer = roof.layer(strategy, shape, tokens, question.sequence_length)
        head = share.head * roof.head(tokens, shape.split)
        exposed = exposed_s(
            activations_s(rank.saved_bytes, roof.cluster, roof.constants),
            forward_s=share.layers * layer.forward_s + head / 3,
            backward_s=share.layers * layer.backward_s + head * 2 / 3,
            constants=roof.constants,
        )
        return {"offload_s": strategy.gradient_accumulation_steps * exposed}

    def choice_words(self, strategy: Strategy) -> str:
        return offload_words(strategy.offload)


def offload_words(offload: Offload) -> str:
    """Return "offload optimizer to host, parameters to host"; empty where nothing leaves."""
    if not offload.any:
        return ""
    kinds = [kind for kind in ("optimizer", "parameters", "activations") if getattr(offload, kind) != "none"]
    return "offload " + ", ".join(f"{kind} to {getattr(offload, kind)}" for kind in kinds)


ROOM = Offloading()
