"""Placement of a plan's workers on the nodes of a Ray cluster: which nodes, which ranks on which. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from clusters.inventory.ray import Node, Unit


def choose(nodes: Sequence[Node], *, num_nodes: int, per_node: int, unit: Unit) -> list[Node] | None:
    """Return nodes with room for so many workers on each, those first that the workers fill up best; None where there are too
    few. All of them or none: a part of a worker group cannot train."""
    able = sorted(
        (node for node in nodes if node.free(unit) >= per_node),
        key=lambda node: (node.free(unit), _order(node.address)),
    )
    return able[:num_nodes] if len(able) >= num_nodes else None


def workers_of(num_workers: int, per_node: int) -> list[int]:
    """Return how many workers each node gets. Ranks fill node after node, so that in `mesh_order` the fastest axis, which is the
    tensor group's, stays inside a node."""
    full, rest = divmod(num_workers, per_node)
    return [per_node] * full + [rest] * bool(rest)


def node_of(rank: int, per_node: int) -> int:
    """Return the number of the node that a rank is on, as the plan's `placement` counts them."""
    return rank // per_node


def told(names: Sequence[str], num_workers: int, per_node: int) -> str:
    """Return who is where, in words: "ranks 0-1 on host-0, ranks 2-3 on host-1"."""
    parts, first = [], 0
    for name, count in zip(names, workers_of(num_workers, per_node), strict=True):
        ranks = f"rank {first}" if count == 1 else f"ranks {first}-{first + count - 1}"
        parts.append(f"{ranks} on {name}")
        first += count
    return ", ".join(parts)


def shortage(nodes: Sequence[Node], *, num_nodes: int, per_node: int, unit: Unit) -> str:
    """Return what is free where `choose` finds too few nodes, node by node."""
    free = "; ".join(f"{node.name} has {node.free(unit)}" for node in nodes) or "it has no live node"
    wanted = f"{num_nodes} node{'s' * (num_nodes > 1)} with {per_node} free {unit}{'s' * (per_node > 1)}"
    return f"{wanted} {'are' if num_nodes > 1 else 'is'} wanted, and of {unit}s that are free {free}"


def _order(address: str) -> list[tuple[int, str]]:
    """Return a key by which 10.0.0.9 comes before 10.0.0.10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", address)]
