"""Messages between ranks: what they send each other, which link a group of them talks over, and how long a collective takes on
it. Pure.

Source: ring algorithms, arXiv:1802.05799 and nccl-tests' notion of bus bandwidth. A ring enters and leaves each node once, so
a group of r local ranks has the network of r cards; all groups of a node talk at the same time and share it."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from clusters.cluster import Cluster
from clusters.hardware import Calibration, Link
from strategies.constants import TimeConstants

Kind = Literal["all_reduce", "reduce_scatter", "all_gather", "send", "receive"]
Group = Literal["tensor", "context", "shard", "replicate", "pipeline", "shared", "world"]
"""The axes of the mesh; `shared` are the first and last stage of a pipeline that hold one table; `world` is everybody."""
BETWEEN_TWO: tuple[Group, ...] = ("pipeline", "context")
"""The groups whose messages go between two of their ranks."""


class Message(NamedTuple):
    """Messages of one kind that a rank takes part in."""

    kind: Kind
    group: Group
    element: int
    """Bytes of one element."""
    num_bytes: float
    """Bytes of all of them: the whole buffer of a reduce-scatter (in) or an all-gather (out), padding included."""
    count: float = 1  # type: ignore[assignment]

    def times(self, number: float) -> Message:
        return self._replace(num_bytes=self.num_bytes * number, count=self.count * number)


class Ring(NamedTuple):
    """A group's way of talking."""

    size: int
    bytes_per_s: float
    """Bus bandwidth: a reduce-scatter or an all-gather of B bytes takes (size - 1) / size * B / bytes_per_s."""
    hop_s: float
    """One step of the ring."""
    inside: bool
    """Within one node."""
    measured: Calibration | None = None
    """Curves of this very cluster, where the group stays within a node."""

    def bus_rate(self, kind: str, num_bytes: float) -> float | None:
        """Bus bytes/s of one message, latency included; None: not measured for this kind and size of group."""
        return self.measured.rate(f"{kind}_{self.size}", num_bytes) if self.measured else None


def ring(cluster: Cluster, constants: TimeConstants, *, size: int, stride: int, num_gpus: int) -> Ring:
    """The ring of `size` ranks that stand `stride` apart, where all such groups of `num_gpus` ranks talk at once."""
    per_node = cluster.gpus_per_node
    inner, outer = cluster.intra_node, cluster.inter_node
    reached = constants.pcie if inner.name == "pcie" else constants.nvlink
    rate = inner.bytes_per_s * (1.0 if inner.measured else reached)
    span = size * stride
    # A group that does not divide the node straddles two of them somewhere.
    if cluster.num_nodes == 1 or (span <= per_node and per_node % span == 0):
        return Ring(size, rate, _hop_s(inner, constants), True, cluster.calibration)
    local = max(1, min(size, per_node // stride))
    groups = min(per_node, num_gpus) / local
    network = outer.bytes_per_s * (1.0 if outer.measured else constants.network) / max(1.0, groups)
    # A ring leaves each node once: of `local` steps one goes over the network.
    hop_s = _hop_s(inner, constants) * (local - 1) / local + _hop_s(outer, constants) / local
    return Ring(size, min(rate, network), hop_s, False)


def _hop_s(link: Link, constants: TimeConstants) -> float:
    """Return the seconds of one step of a ring over a link."""
    if link.name == "shared_memory":
        return 0.0
    known = {"pcie": constants.pcie_hop_s, "network": constants.network_hop_s}
    return known.get(link.name, constants.nvlink_hop_s)


class Links:
    """A cluster's rings; keeps them, for a search asks again and again."""

    __slots__ = ("_rings", "cluster", "constants")

    def __init__(self, cluster: Cluster, constants: TimeConstants) -> None:
        self.cluster, self.constants = cluster, constants
        self._rings: dict[tuple[int, int, int], Ring] = {}

    def ring(self, size: int, stride: int, num_gpus: int) -> Ring:
        key = size, stride, num_gpus
        known = self._rings.get(key)
        if known is None:
            known = self._rings[key] = ring(self.cluster, self.constants, size=size, stride=stride, num_gpus=num_gpus)
        return known


def half_s(group: Ring, num_bytes: float, *, messages: float = 1.0, kind: str = "all_gather") -> float:
    """Seconds of a reduce-scatter or an all-gather (`kind`) of a whole buffer, sent in so many messages."""
    steps = group.size - 1
    if rate := group.bus_rate(kind, num_bytes / max(1.0, messages)):
        return steps / group.size * num_bytes / rate
    return steps / group.size * num_bytes / group.bytes_per_s + messages * steps * group.hop_s


def all_reduce_s(group: Ring, num_bytes: float, *, messages: float = 1.0) -> float:
    """Seconds of an all-reduce: twice the bytes of a half; latency by trees, which NCCL takes for it."""
    steps = group.size - 1
    if rate := group.bus_rate("all_reduce", num_bytes / max(1.0, messages)):
        return 2 * steps / group.size * num_bytes / rate
    depth = 2 * math.log2(group.size) if group.size > 1 else 0.0
    return 2 * steps / group.size * num_bytes / group.bytes_per_s + messages * depth * group.hop_s


def blocking_s(group: Ring, message: Message, wait_s: float) -> float:
    """Seconds of messages that nothing hides, each of which waits `wait_s` for its group (the halves of an all-reduce half of
    that) and walks the ring."""
    each, steps = message.num_bytes / message.count, group.size - 1
    if message.kind == "all_reduce":
        one = all_reduce_s(group, each, messages=0) + wait_s + 2 * steps * group.hop_s
    else:
        one = half_s(group, each, messages=0, kind=message.kind) + wait_s / 2 + steps * group.hop_s
    return message.count * one
