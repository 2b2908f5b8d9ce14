"""A live Ray cluster as a Cluster: what its nodes say they have."""

from __future__ import annotations

import dataclasses
import importlib
import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import clusters.catalog.rows as rows
from clusters.calibration.measure import Say
from clusters.cluster import Cluster
from clusters.inventory.local import cpu_cluster

ACCELERATOR_PREFIX = "accelerator_type:"
AMBIGUOUS = {"A100": "a100-40gb", "V100": "v100-16gb", "H100": "h100-80gb"}
"""Ray's name -> the smallest GPU that goes by it: a plan for less memory than there is still fits."""


def discover(address: str, *, gpu: str | None = None, say: Say | None = None) -> Cluster:
    """The cluster at an address. `gpu` says which catalog row its GPUs are, where Ray's own name leaves that open."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a local ray.init turns tokens on, and later starts then refuse
    ray = importlib.import_module("ray")
    already = ray.is_initialized()
    if not already:
        reachable(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}\n"
                f"  to fix: ray status --address {address}"
            ) from None
    try:
        return cluster_of_nodes(ray.nodes(), address=address, gpu=gpu, say=say)
    finally:
        if not already:
            ray.shutdown()


def reachable(address: str, timeout_s: float = 5.0) -> None:
    """ValueError where nobody listens: Ray itself tries for two minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto", or a form that only Ray knows
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s):
            pass
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"no Ray cluster answers at {address}: {reason}\n  to fix: ray start --head there, or the right address"
        ) from None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, order=True)
class NodeShape:
    """The properties that must be equal on all nodes for one plan to serve them all."""

    num_gpus: int
    accelerator_type: str
    num_cores: int
    memory_gib: int
    """Rounded down to 8 GiB: two equal machines report a few megabytes apart."""

    def __str__(self) -> str:
        gpus = f"{self.num_gpus} x {self.accelerator_type or 'GPU of unknown type'}" if self.num_gpus else "no GPU"
        return f"{gpus}, {self.num_cores} cores, about {self.memory_gib} GiB"


def cluster_of_nodes(
    nodes: Sequence[Mapping[str, Any]], *, address: str = "ray", gpu: str | None = None, say: Say | None = None
) -> Cluster:
    """Pure, for GPUs: the cluster of what `ray.nodes()` answered. Dead nodes, and nodes without a GPU beside nodes with
    one (a head node), do not count."""
    alive = [node for node in nodes if node.get("Alive", node.get("alive"))]
    if not alive:
        raise ValueError(f"the Ray cluster at {address} has no live node\n  to fix: ray start --address {address}")
    shapes = [_shape(node) for node in alive]
    with_gpu = [shape for shape in shapes if shape.num_gpus]
    if not with_gpu:
        return _cpu(shapes, address, say)
    kinds = Counter((shape.num_gpus, shape.accelerator_type) for shape in with_gpu)
    if len(kinds) > 1:
        groups = Counter(with_gpu)
        listing = "; ".join(f"{count} node{'s' * (count > 1)} with {shape}" for shape, count in sorted(groups.items()))
        raise ValueError(
            f"the nodes of the Ray cluster at {address} differ: {listing}\n"
            "  to fix: start Ray on equal nodes, or name the part to use, e.g. cluster: a100-80gb-4x8"
        )
    smallest = min(with_gpu, key=lambda shape: (shape.memory_gib, shape.num_cores))
    name, notes = _gpu_name(smallest.accelerator_type, gpu, address)
    row, per_node = rows.accelerator(name), smallest.num_gpus
    host = rows.host(name, per_node)
    memory = min(_memory_bytes(node) for node, shape in zip(alive, shapes, strict=True) if shape.num_gpus)
    return Cluster(
        name=f"{name}-{len(with_gpu)}x{per_node}",
        accelerator=row,
        num_nodes=len(with_gpu),
        gpus_per_node=per_node,
        intra_node=rows.intra_node(name),
        inter_node=rows.inter_node(name, per_node),
        host=dataclasses.replace(host, memory_bytes=memory or host.memory_bytes, num_cores=max(1, smallest.num_cores)),
        usd_per_gpu_hour=row.usd_per_hour,
        notes=notes,
    )


def _cpu(shapes: Sequence[NodeShape], address: str, say: Say | None) -> Cluster:
    """Nodes without GPUs: one accelerator a core, at the rates of the machine that asks."""
    cores = Counter(shape.num_cores for shape in shapes)
    if len(cores) > 1:
        listing = "; ".join(f"{count} x {num} cores" for num, count in sorted(cores.items()))
        raise ValueError(
            f"the nodes of the Ray cluster at {address} differ: {listing}\n"
            "  to fix: start them with equal --num-cpus, or name the part to use, e.g. cluster: cpu-1x2"
        )
    cluster = cpu_cluster(num_nodes=len(shapes), per_node=max(1, shapes[0].num_cores), say=say)
    return dataclasses.replace(cluster, notes=("nodes without GPUs: rates are those measured on this machine",))


def _gpu_name(accelerator_type: str, gpu: str | None, address: str) -> tuple[str, tuple[str, ...]]:
    """The catalog's row of what Ray calls the GPU, and what to tell of it."""
    if gpu is not None:
        rows.row(gpu)
        return gpu, ()
    exact = [name for name in rows.accelerator_names() if accelerator_type in rows.row(name).get("ray_types", ())]
    if exact:
        return exact[0], ()
    if accelerator_type in AMBIGUOUS:
        name = AMBIGUOUS[accelerator_type]
        return name, (
            f"Ray says {accelerator_type}: planned as {name}, the smallest of that name; name yours if larger",
        )
    said = (
        f"Ray calls its GPU {accelerator_type!r}" if accelerator_type else "Ray does not say which GPU its nodes have"
    )
    raise ValueError(
        f"the Ray cluster at {address}: {said}, which is not in the catalog\n"
        "  to fix: name the cluster in the job, as in cluster: a100-80gb-8x8; "
        f"known: {', '.join(rows.accelerator_names())}"
    )


def _shape(node: Mapping[str, Any]) -> NodeShape:
    resources = node.get("Resources") or {}
    kinds = sorted(name[len(ACCELERATOR_PREFIX) :] for name in resources if name.startswith(ACCELERATOR_PREFIX))
    labels = node.get("Labels") or {}
    kind = kinds[0] if kinds else str(labels.get("ray.io/accelerator-type", ""))
    return NodeShape(
        num_gpus=int(resources.get("GPU", 0)),
        accelerator_type=kind,
        num_cores=int(resources.get("CPU", 0)),
        memory_gib=_memory_bytes(node) // rows.GIB // 8 * 8,
    )


def _memory_bytes(node: Mapping[str, Any]) -> int:
    """Ray's `memory` leaves out its object store; together they are what the node gives."""
    resources = node.get("Resources") or {}
    return int(resources.get("memory", 0) + resources.get("object_store_memory", 0))
