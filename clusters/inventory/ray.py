"""A live Ray cluster as a Cluster: what its nodes have free, in equal blocks.

    python -m clusters.inventory.ray HOST:PORT      # its nodes as JSON; `ask` runs this as a child process

A child asks, because a process that has spoken to a Ray keeps its threads and may hang or die with it.
"""

from __future__ import annotations

import dataclasses
import importlib
import ipaddress
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import clusters.catalog.rows as rows
from clusters.calibration.measure import Say
from clusters.cluster import Cluster
from clusters.inventory.local import cpu_cluster

ACCELERATOR_PREFIX = "accelerator_type:"
AMBIGUOUS = {"A100": "a100-40gb", "V100": "v100-16gb", "H100": "h100-80gb"}
"""Ray's name -> the smallest GPU that goes by it: a plan for less memory than there is still fits."""
TIMEOUT_S = 60.0
Unit = Literal["GPU", "CPU"]
"""Ray's name of what one worker takes: a GPU with a CPU beside it, or a CPU."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A live node of a Ray cluster, and what of it no job has taken."""

    node_id: str
    address: str
    hostname: str
    num_gpus: int
    num_cores: int
    free_gpus: int
    free_cores: int
    accelerator_type: str
    """Ray's name of its GPU; empty where Ray does not say."""
    memory_bytes: int

    @property
    def name(self) -> str:
        return f"{self.hostname} ({self.address})" if self.hostname else self.address or self.node_id[:8]

    def free(self, unit: Unit) -> int:
        """Return how many workers find room on it; each takes a CPU of Ray's, and on a GPU cluster a GPU beside it."""
        return min(self.free_gpus, self.free_cores) if unit == "GPU" else self.free_cores


def ask(address: str) -> list[Node]:
    """Return the live nodes of the cluster at an address. ValueError where none answers, where it takes no token, or where it is
    of another version of Ray or Python."""
    reachable(address)
    done = subprocess.run(
        [sys.executable, "-m", "clusters.inventory.ray", address],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    answer = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}
    if "nodes" not in answer:
        last = (done.stderr.strip().splitlines() or [f"it ended with exit code {done.returncode}"])[-1]
        raise ValueError(answer.get("error") or f"the Ray cluster at {address} cannot be asked: {last}")
    return [node_of(node) for node in answer["nodes"] if node["Alive"]]


def main(address: str) -> None:
    """Print the nodes as ray.nodes() tells them, each with what it has free under "Available"; or the error."""
    try:
        print(json.dumps({"nodes": _nodes(address)}), flush=True)
    except ValueError as error:
        print(json.dumps({"error": str(error)}), flush=True)


def _nodes(address: str) -> list[dict[str, Any]]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray
    from ray.exceptions import AuthenticationError

    usage, state, raylet = (
        importlib.import_module(f"ray.{name}") for name in ("_common.usage.usage_lib", "_private.state", "_raylet")
    )
    try:
        raylet.GcsClient(address=address)
    except AuthenticationError:
        pass  # as it should be: it was asked without a token
    else:
        raise ValueError(
            f"the Ray cluster at {address} takes commands from anyone who reaches it: it asks for no token\n"
            "  to fix: start all its nodes with RAY_AUTH_MODE=token and one token (ray get-auth-token --generate)"
        )
    os.environ["RAY_AUTH_MODE"] = "token"
    raylet.Config.initialize("")
    fix = "to fix: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token with the token of that cluster"
    if not raylet.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        raise ValueError(f"the Ray cluster at {address} asks for a token, and this process has none\n  {fix}")
    try:
        known = usage.get_cluster_metadata(raylet.GcsClient(address=address))
    except AuthenticationError:
        raise ValueError(f"the Ray cluster at {address} refuses the token that this process has\n  {fix}") from None
    theirs = known.get("ray_version"), known.get("python_version")
    mine = ray.__version__, platform.python_version()
    if theirs != mine:
        raise ValueError(
            f"the cluster at {address} is Ray {theirs[0]} on Python {theirs[1]}, and this is Ray {mine[0]} on Python {mine[1]}\n"
            "  to fix: the same versions on all nodes, those of the environment in which Shardwise is installed"
        )
    asked = state.GlobalState()
    asked._initialize_global_state(
        raylet.GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
    )
    free = asked.available_resources_per_node()
    return [node | {"Available": free.get(node["NodeID"], {})} for node in asked.node_table()]


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


def node_of(node: Mapping[str, Any]) -> Node:
    """Return a node of what `ray.nodes()` answers; where "Available" is not told, all of it is free."""
    resources = node.get("Resources") or {}
    free = node.get("Available", resources)
    kinds = sorted(name[len(ACCELERATOR_PREFIX) :] for name in resources if name.startswith(ACCELERATOR_PREFIX))
    return Node(
        node_id=str(node.get("NodeID", "")),
        address=str(node.get("NodeManagerAddress", "")),
        hostname=str(node.get("NodeManagerHostname", "")),
        num_gpus=int(resources.get("GPU", 0)),
        num_cores=int(resources.get("CPU", 0)),
        free_gpus=int(free.get("GPU", 0)),
        free_cores=int(free.get("CPU", 0)),
        accelerator_type=kinds[0] if kinds else str((node.get("Labels") or {}).get("ray.io/accelerator-type", "")),
        # Ray's `memory` leaves out its object store; together they are what the node gives.
        memory_bytes=int(resources.get("memory", 0) + resources.get("object_store_memory", 0)),
    )


def blocks(free: Sequence[int]) -> list[tuple[int, int]]:
    """Return (nodes, workers on each) of all equal blocks, the one with most workers first, of two with as many the one on
    fewer nodes."""
    sizes = {size for size in free if size > 0}
    found = [(sum(each >= size for each in free), size) for size in sizes]
    return sorted(found, key=lambda block: (-block[0] * block[1], block[0]))


def cluster_of_nodes(
    nodes: Sequence[Node], *, address: str = "ray", gpu: str | None = None, say: Say | None = None
) -> Cluster:
    """Return the largest equal block of what is free. Pure, for GPUs. Nodes without a GPU beside nodes with one (a head node) do
    not count.

    Args:
        gpu: the catalog's row of its GPUs, where Ray's own name leaves that open."""
    if not nodes:
        raise ValueError(f"the Ray cluster at {address} has no live node\n  to fix: ray start --address {address}")
    with_gpu = [node for node in nodes if node.num_gpus]
    kinds = sorted({node.accelerator_type for node in with_gpu})
    if len(kinds) > 1:
        listing = "; ".join(_told([node for node in with_gpu if node.accelerator_type == kind]) for kind in kinds)
        raise ValueError(
            f"the GPUs of the Ray cluster at {address} differ: {listing}\n"
            "  to fix: start Ray on nodes with equal GPUs, or name the part to use, e.g. cluster: a100-80gb-4x8"
        )
    unit: Unit = "GPU" if with_gpu else "CPU"
    able = with_gpu or list(nodes)
    found = blocks([node.free(unit) for node in able])
    if not found:
        raise ValueError(
            f"nothing is free on the Ray cluster at {address}: {_told(able)}\n"
            f"  to fix: wait until another job ends (ray status --address {address})"
        )
    (num_nodes, per_node), notes = found[0], []
    if left := sum(node.free(unit) for node in able) - num_nodes * per_node:
        notes.append(f"{left} free {unit}s are left out: the plan takes equal blocks, {num_nodes} nodes of {per_node}")
    chosen = [node for node in able if node.free(unit) >= per_node]
    if unit == "CPU":
        cluster = cpu_cluster(num_nodes=num_nodes, per_node=per_node, say=say)
        notes.append("nodes without GPUs: rates are those measured on this machine")
        return dataclasses.replace(cluster, notes=tuple(notes))
    name, ambiguous = _gpu_name(kinds[0], gpu, address)
    row, host = rows.accelerator(name), rows.host(name, per_node)
    memory, cores = min(node.memory_bytes for node in chosen), min(node.num_cores for node in chosen)
    return Cluster(
        name=f"{name}-{num_nodes}x{per_node}",
        accelerator=row,
        num_nodes=num_nodes,
        gpus_per_node=per_node,
        intra_node=rows.intra_node(name),
        inter_node=rows.inter_node(name, per_node),
        host=dataclasses.replace(host, memory_bytes=memory or host.memory_bytes, num_cores=max(1, cores)),
        usd_per_gpu_hour=row.usd_per_hour,
        notes=(*ambiguous, *notes),
    )


def _told(nodes: Sequence[Node]) -> str:
    """Nodes in words: how many, what each has, what of that is free."""
    if not any(node.num_gpus for node in nodes):
        return f"{len(nodes)} nodes with {sum(node.num_cores for node in nodes)} CPUs, no CPU of them free"
    gpus, kind = sum(node.num_gpus for node in nodes), nodes[0].accelerator_type or "GPU of unknown type"
    free = sum(node.free("GPU") for node in nodes)
    return f"{len(nodes)} node{'s' * (len(nodes) > 1)} with {gpus} x {kind}, {free} of them free (each takes a CPU of Ray's too)"


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


def is_of_this_machine(node: Node) -> bool:
    """Return whether a node's address is one of this machine's."""
    import psutil

    mine = {entry.address.split("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    try:
        return ipaddress.ip_address(node.address).is_loopback or node.address in mine
    except ValueError:
        return node.address == socket.gethostname()


if __name__ == "__main__":
    main(sys.argv[1])
