"""A cluster file: one you do not have yet, written by hand, or a measured one, written by `calibrate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from clusters import describe
from clusters.cluster import Cluster
from clusters.files import write_atomically
from clusters.yaml_text import read_foreign_yaml

MAX_FILE_BYTES = 4 * 2**20
HEADER = "# Written by `shardwise calibrate`; finished runs append to `runs`. Units: bytes, seconds, FLOPs.\n"


def read_mapping(path: str | Path) -> Mapping[str, Any]:
    """The file as it is. ValueError where it cannot be read, or is no mapping."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path}: larger than {MAX_FILE_BYTES // 2**20} MiB: this is no cluster file")
        mapping = read_foreign_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{path}: cannot read the cluster file: {reason}\n  to fix: a path that exists") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ValueError(f"{place}: not read as YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{path}: a cluster file holds keys and values (gpu, nodes, gpus_per_node, ...)")
    return mapping


def write_cluster(path: str | Path, cluster: Cluster) -> None:
    write_mapping(path, describe.to_mapping(cluster))


def write_mapping(path: str | Path, mapping: Mapping[str, Any]) -> None:
    """Atomic: a reader sees the old file or the new one."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text = yaml.dump(dict(mapping), None, dumper, sort_keys=False, width=120, default_flow_style=None)
    write_atomically(Path(path), HEADER + text)
