"""The catalog's rows: one YAML file a GPU, read one at a time and once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from clusters.hardware import Accelerator, Host, Link
from clusters.yaml_text import read_yaml

FOLDER = Path(__file__).parent
GIB = 2**30
BYTES_PER_S_PER_GBPS = 1e9 / 8

LATENCY_S = {"nvlink": 20e-6, "pcie": 25e-6, "network": 30e-6}
"""Assumed until calibrated: the smallest NCCL collective over two neighbours. Published training stacks show more for
whole calls (45 to 67 us on two A100 over NVLink: vTrain's and Galvatron's tables), launch and sync included."""


@lru_cache(maxsize=1)
def accelerator_names() -> tuple[str, ...]:
    """Every name that `gpu` may have."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


@lru_cache(maxsize=64)
def row(name: str) -> Mapping[str, Any]:
    path = FOLDER / f"{name}.yaml"
    if not name.replace("-", "").isalnum() or not path.is_file():
        near = difflib.get_close_matches(name.lower(), accelerator_names(), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown GPU {name!r}{hint}\n  known: {', '.join(accelerator_names())}")
    parsed: Mapping[str, Any] = read_yaml(path.read_text(encoding="utf-8"))
    return parsed


@lru_cache(maxsize=64)
def accelerator(name: str) -> Accelerator:
    """A GPU of the catalog. `cpu` has no stored peaks: clusters.inventory.local measures it."""
    data = row(name)
    if "peak_flops" not in data:
        raise ValueError(f"{name} has no datasheet: it is measured where it runs\n  to fix: cluster: auto")
    return Accelerator(
        name=name,
        kind="cuda",
        memory_bytes=data["memory_bytes"],
        memory_bytes_per_s=data["memory_bytes_per_s"],
        peak_flops=data["peak_flops"],
        host_link_bytes_per_s=data["host_link_bytes_per_s"],
        usd_per_hour=data["usd_per_hour"],
        num_multiprocessors=data["num_multiprocessors"],
        source=data["source"],
    )


def by_device_name(device: str) -> str | None:
    """The catalog's name of what NVML calls the device."""
    names = (name for name in accelerator_names() if device in row(name).get("device_names", ()))
    return next(names, None)


def link(kind: str, bytes_per_s: float, *, measured: bool = False, source: str = "") -> Link:
    return Link(name=kind, bytes_per_s=bytes_per_s, latency_s=LATENCY_S[kind], measured=measured, source=source)


def intra_node(name: str, kind: str | None = None) -> Link:
    """The link between two GPUs of a node: NVLink where the GPU has it, unless PCIe is asked for."""
    data = row(name)
    if kind not in (None, "nvlink", "pcie"):
        raise ValueError(f"intra_node is nvlink or pcie, not {kind!r}")
    if kind == "nvlink" and "nvlink_bytes_per_s" not in data:
        raise ValueError(f"{name} has no NVLink\n  to fix: intra_node: pcie, or another gpu")
    if kind == "pcie" or "nvlink_bytes_per_s" not in data:
        return link("pcie", data["host_link_bytes_per_s"], source=data["source"])
    return link("nvlink", data["nvlink_bytes_per_s"], source=data["source"])


def node_share(name: str, gpus_per_node: int) -> float:
    """The part of the usual node that so many of its GPUs are sold with."""
    return float(min(1.0, gpus_per_node / row(name)["node"]["gpus"]))


def inter_node(name: str, gpus_per_node: int) -> Link:
    node = row(name)["node"]
    line_rate = node["inter_node_gbps"] * node_share(name, gpus_per_node) * BYTES_PER_S_PER_GBPS
    return link("network", line_rate, source=node["source"])


def host(name: str, gpus_per_node: int) -> Host:
    """Return the host of the node, or of the part of it that belongs to so many GPUs."""
    node, share = row(name)["node"], node_share(name, gpus_per_node)
    return Host(
        memory_bytes=int(node["host_memory_gib"] * share * GIB),
        memory_bytes_per_s=node["host_memory_bytes_per_s"] * share,
        num_cores=max(1, int(node["num_cores"] * share)),
        nvme_bytes=int(node["nvme_gib"] * share * GIB),
        nvme_read_bytes_per_s=node["nvme_read_bytes_per_s"] * share,
        nvme_write_bytes_per_s=node["nvme_write_bytes_per_s"] * share,
    )
