"""Nodes x accelerators x links, and who is whose neighbour."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from clusters.hardware import Accelerator, Calibration, Host, Link


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """A homogeneous cluster: num_nodes nodes of gpus_per_node accelerators."""

    name: str
    accelerator: Accelerator
    num_nodes: int
    gpus_per_node: int
    intra_node: Link
    inter_node: Link
    host: Host
    """The host of each node."""
    usd_per_gpu_hour: float | None = None
    calibration: Calibration | None = None
    notes: tuple[str, ...] = ()
    """Sentences that a reader of the plan should know of this description: an unknown GPU, an ambiguous name."""

    def __post_init__(self) -> None:
        if self.num_nodes < 1 or self.gpus_per_node < 1:
            raise ValueError(f"a cluster has at least one node of one GPU, got {self.num_nodes} x {self.gpus_per_node}")

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    def node_of(self, rank: int) -> int:
        return rank // self.gpus_per_node


def weaker_links(cluster: Cluster, factor: float) -> Iterator[tuple[str, str, Cluster]]:
    """(where, name, the cluster with this one link slower) of each link that it has."""
    for where in ["intra_node"] * (cluster.gpus_per_node > 1) + ["inter_node"] * (cluster.num_nodes > 1):
        link = getattr(cluster, where)
        yield where, link.name, replace(cluster, **{where: replace(link, bytes_per_s=link.bytes_per_s * factor)})
    gpu = cluster.accelerator
    if gpu.kind != "cpu":
        slower = replace(gpu, host_link_bytes_per_s=gpu.host_link_bytes_per_s * factor)
        yield "host_link", "host link", replace(cluster, accelerator=slower)
