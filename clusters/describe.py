"""A cluster in words: the mapping of a job or of a cluster file -> Cluster, and back.

A cluster file has the keys of an inline cluster, and, where it was measured, whole sections in place of catalog values
(`accelerator`, `host`, `intra_node` and `inter_node` as mappings, `calibration`, `runs`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import clusters.catalog.rows as rows
from clusters.cluster import Cluster
from clusters.hardware import Accelerator, Calibration, Host, Link

INLINE_KEYS = (
    "gpu",
    "nodes",
    "gpus_per_node",
    "intra_node",
    "inter_node_gbps",
    "inter_node_measured_gbps",
    "host_memory_gib",
    "nvme_gib",
    "usd_per_gpu_hour",
)
FILE_KEYS = ("version", "name", "accelerator", "inter_node", "host", "calibration", "runs", "notes")
T = TypeVar("T", Accelerator, Host, Link, Calibration)


def parse(mapping: Mapping[str, Any], *, cpu: Callable[[int, int], Cluster], where: str = "cluster") -> Cluster:
    """The cluster of a mapping. `cpu(nodes, accelerators per node)` describes the machine this runs on."""
    mapping = {key: value for key, value in mapping.items() if value is not None}
    unknown_keys(mapping, (*INLINE_KEYS, *FILE_KEYS), where)
    if mapping.get("version", 1) != 1:
        raise ValueError(f"{where}: version {mapping['version']!r} of a cluster file is unknown\n  to fix: version: 1")
    if not isinstance(mapping.get("gpu"), str):
        raise ValueError(f"{where}: gpu is missing\n  to fix: gpu: one of {', '.join(rows.accelerator_names())}")
    gpu, nodes, per_node = mapping["gpu"], count(mapping, "nodes", where), count(mapping, "gpus_per_node", where)
    try:
        base = _base(mapping, gpu, nodes, per_node, cpu, where)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None
    return _overridden(base, mapping, where)


def _base(
    mapping: Mapping[str, Any], gpu: str, nodes: int, per_node: int, cpu: Callable[[int, int], Cluster], where: str
) -> Cluster:
    """Return the cluster from the sections of a measured file, or else from the catalog."""
    if "accelerator" in mapping:
        for section in ("intra_node", "inter_node", "host"):
            if not isinstance(mapping.get(section), Mapping):
                raise ValueError(f"{section} must be a section where accelerator is one")
        return Cluster(
            name=str(mapping.get("name", gpu)),
            accelerator=section_of(Accelerator, mapping, "accelerator", where),
            num_nodes=nodes,
            gpus_per_node=per_node,
            intra_node=section_of(Link, mapping, "intra_node", where),
            inter_node=section_of(Link, mapping, "inter_node", where),
            host=section_of(Host, mapping, "host", where),
        )
    if gpu == "cpu":
        return cpu(nodes, per_node)
    kind = mapping.get("intra_node")
    row = rows.accelerator(gpu)
    return Cluster(
        name=str(mapping.get("name", f"{gpu}-{nodes}x{per_node}")),
        accelerator=row,
        num_nodes=nodes,
        gpus_per_node=per_node,
        intra_node=rows.intra_node(gpu, None if isinstance(kind, Mapping) else kind),
        inter_node=rows.inter_node(gpu, per_node),
        host=rows.host(gpu, per_node),
        usd_per_gpu_hour=row.usd_per_hour,
    )


def _overridden(base: Cluster, mapping: Mapping[str, Any], where: str) -> Cluster:
    """Return what the mapping says beyond its base."""
    changes: dict[str, Any] = {}
    if "inter_node_gbps" in mapping and "inter_node_measured_gbps" in mapping:
        raise ValueError(f"{where}: inter_node_gbps (line rate) and inter_node_measured_gbps exclude each other")
    for key, measured in (("inter_node_gbps", False), ("inter_node_measured_gbps", True)):
        if key in mapping:
            rate = number(mapping, key, where) * rows.BYTES_PER_S_PER_GBPS
            changes["inter_node"] = rows.link("network", rate, measured=measured, source=key)
    host = base.host
    if "host_memory_gib" in mapping:
        host = dataclasses.replace(host, memory_bytes=int(number(mapping, "host_memory_gib", where) * rows.GIB))
        if base.accelerator.kind == "cpu":
            share = host.memory_bytes // base.gpus_per_node
            changes["accelerator"] = dataclasses.replace(base.accelerator, memory_bytes=share)
    if "nvme_gib" in mapping:
        host = dataclasses.replace(host, nvme_bytes=int(number(mapping, "nvme_gib", where, zero=True) * rows.GIB))
    if "usd_per_gpu_hour" in mapping:
        changes["usd_per_gpu_hour"] = number(mapping, "usd_per_gpu_hour", where, zero=True)
    if "calibration" in mapping:
        changes["calibration"] = section_of(Calibration, mapping, "calibration", where)
    for section in ("intra_node", "inter_node"):
        if isinstance(mapping.get(section), Mapping):
            changes[section] = section_of(Link, mapping, section, where)
    if mapping.get("notes"):
        changes["notes"] = tuple(map(str, mapping["notes"]))
    return dataclasses.replace(base, host=host, **changes)


def to_mapping(cluster: Cluster) -> dict[str, Any]:
    """Return what `parse` reads back as an equal cluster."""
    mapping: dict[str, Any] = {
        "version": 1,
        "name": cluster.name,
        "gpu": cluster.accelerator.name,
        "nodes": cluster.num_nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "accelerator": plain(cluster.accelerator),
        "intra_node": plain(cluster.intra_node),
        "inter_node": plain(cluster.inter_node),
        "host": plain(cluster.host),
    }
    if cluster.usd_per_gpu_hour is not None:
        mapping["usd_per_gpu_hour"] = cluster.usd_per_gpu_hour
    if cluster.calibration is not None:
        mapping["calibration"] = plain(cluster.calibration)
    if cluster.notes:
        mapping["notes"] = list(cluster.notes)
    return mapping


def plain(value: Any) -> Any:
    """Dataclasses, mappings and tuples as what YAML and JSON hold; fields without a value are left out."""
    if dataclasses.is_dataclass(value):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: plain(part) for name, part in pairs if part is not None and part != {}}
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    return value


def section_of(kind: type[T], mapping: Mapping[str, Any], name: str, where: str) -> T:
    """A section as the dataclass whose fields it spells."""
    section, where = mapping[name], f"{where}: {name}"
    if not isinstance(section, Mapping):
        raise ValueError(f"{where} must be a section of keys and values, got {section!r}")
    known = {field.name: field for field in dataclasses.fields(kind)}
    unknown_keys(section, tuple(known), where)
    missing = [
        key
        for key, field in known.items()
        if key not in section and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    values = {key: _typed(section, key, str(known[key].type), where) for key in section}
    for key in ("bytes_per_s", "memory_bytes", "memory_bytes_per_s"):
        if key in values and not values[key]:
            raise ValueError(f"{where}: {key} must be above 0, got 0")
    if "curves" in values:
        try:
            values["curves"] = {
                str(curve): tuple((float(size), float(rate)) for size, rate in points)
                for curve, points in section["curves"].items()
            }
        except (AttributeError, TypeError, ValueError):
            raise ValueError(f"{where}: curves must be name: [[size, rate], ...]") from None
    return kind(**values)


def _typed(section: Mapping[str, Any], key: str, annotation: str, where: str) -> Any:
    """The value, if it is what the field's annotation says."""
    value = section[key]
    if annotation.startswith(("int", "float")):
        exact = number(section, key, where, zero=True)
        if annotation == "int" and exact != int(exact):
            raise ValueError(f"{where}: {key} must be a whole number, got {value!r}")
        return int(exact) if annotation == "int" else exact
    if annotation == "Mapping[str, float]":
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: {key} must hold names and numbers, got {value!r}")
        return {str(name): number(value, name, f"{where}: {key}") for name in value}
    if annotation == "bool" and not isinstance(value, bool):
        raise ValueError(f"{where}: {key} must be true or false, got {value!r}")
    if annotation == "str" and not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be text, got {value!r}")
    if annotation.startswith("Literal") and f"'{value}'" not in annotation.replace('"', "'"):
        raise ValueError(f"{where}: {key} must be one of {annotation[8:-1]}, got {value!r}")
    return value


def unknown_keys(mapping: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in mapping:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where}: unknown key {key!r}{hint}\n  known: {', '.join(known)}")


def number(mapping: Mapping[str, Any], key: str, where: str, *, zero: bool = False) -> float:
    """A finite number above zero (or not below it)."""
    value = mapping[key]
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fine or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{where}: {key} must be a number {'of at least' if zero else 'above'} 0, got {value!r}")
    return float(value)


def count(mapping: Mapping[str, Any], key: str, where: str) -> int:
    value = mapping.get(key, 1)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {key} must be a whole number of at least 1, got {value!r}")
    return value
