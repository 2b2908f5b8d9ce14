"""Everything that a job can name: GPUs, clusters by short name, files, inline descriptions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from clusters.catalog.rows import accelerator, accelerator_names
from clusters.cluster import Cluster

__all__ = ["accelerator", "accelerator_names", "load_cluster"]

_SIZED = re.compile(r"(?P<gpu>.+)-(?P<nodes>[0-9]+)x(?P<per_node>[0-9]+)")
_COUNTED = re.compile(r"(?P<gpu>.+)-(?P<count>[1-9][0-9]{0,5})")
"""A GPU and how many of them, as people write it who do not think of nodes."""


def load_cluster(value: str | Path | Mapping[str, Any], directory: str | Path | None = None) -> Cluster:
    """The cluster that a job's `cluster` names.

    `a100-80gb-8x8` (GPU-NxM: N nodes of M), `a100-80gb` (one GPU), the path of a cluster file (taken from `directory`,
    or else from the current folder), or an inline mapping. ValueError says what is wrong, where, and what is known.
    """
    from clusters import describe

    if isinstance(value, Mapping):
        return describe.parse(value, cpu=_cpu)
    if isinstance(value, Path) or value.endswith((".yaml", ".yml", ".json")) or "/" in value:
        from clusters.inventory.file import read_mapping

        path = Path(directory or "") / Path(value).expanduser()
        return describe.parse(read_mapping(path), cpu=_cpu, where=str(path))
    return _named(value)


@lru_cache(maxsize=256)
def _named(value: str) -> Cluster:
    from clusters import describe

    if value == "auto":
        raise ValueError("cluster: auto is what the machine has: ask clusters.inventory.local.discover")
    sized = _SIZED.fullmatch(value)
    gpu, nodes, per_node = (sized["gpu"], int(sized["nodes"]), int(sized["per_node"])) if sized else (value, 1, 1)
    try:
        return describe.parse(
            {"gpu": gpu, "nodes": nodes, "gpus_per_node": per_node}, cpu=_cpu, where=f"cluster {value}"
        )
    except ValueError as error:
        if sized or "unknown GPU" not in str(error):
            raise
        if (counted := _COUNTED.fullmatch(value)) and counted["gpu"] in accelerator_names():
            count = int(counted["count"])
            shape = f"{count // 8}x8" if count > 8 and count % 8 == 0 else f"1x{count}"
            raise ValueError(
                f"cluster {value}: a number of GPUs without nodes; did you mean {counted['gpu']}-{shape}?"
            ) from None
        raise ValueError(
            f"{error}\n  to fix: one of these, GPU-NxM (8 nodes of 8: a100-80gb-8x8), or a file.yaml"
        ) from None


def _cpu(num_nodes: int, per_node: int) -> Cluster:
    from clusters.inventory.local import cpu_cluster

    return cpu_cluster(num_nodes=num_nodes, per_node=per_node)
