"""What a job names -> what it is: the model's shape, the cluster. ValueError where there is no such thing."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.models.architecture import Architecture, find_architecture, make_architecture

if TYPE_CHECKING:
    from clusters.cluster import Cluster
    from orchestrator.spec.sections import ClusterSpec, ModelSpec

SHAPE = (
    "family",
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "ffn_size",
    "vocab_size",
    "max_position",
    "tied_embeddings",
    "variant",
)
MANIFEST = "manifest.json"
NEEDED = ("family", "num_layers", "hidden_size", "num_heads")


def resolve_model(model: ModelSpec, directory: Path) -> Architecture:
    """The model's shape, its dropout that of the job."""
    if model.path is not None:
        from orchestrator.spec.hugging_face import read_architecture

        shape = read_architecture(directory / Path(model.path).expanduser())
    elif model.name is not None:
        shape = find_architecture(model.name)
    elif model.checkpoint is not None and model.family is None:
        shape = _of_checkpoint(directory / Path(model.checkpoint).expanduser())
    else:
        return _inline(*(getattr(model, word) for word in SHAPE), model.dropout)
    if shape.dropout == model.dropout:
        return shape
    from dataclasses import replace

    return replace(shape, dropout=model.dropout)


def _of_checkpoint(folder: Path) -> Architecture:
    """The shape that a checkpoint's manifest tells. It is only read: whoever loads the weights verifies them."""
    files = [folder / MANIFEST] if (folder / MANIFEST).is_file() else [*folder.glob(f"checkpoints/step-*/{MANIFEST}")]
    found = []
    for file in files:
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            place = (manifest.get("sequence", 0), manifest["step"])
            found.append((place, Architecture(**manifest["architecture"])))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    if not found:
        raise ValueError(f"{folder} holds no checkpoint whose manifest can be read")
    return max(found, key=lambda each: each[0])[1]


@lru_cache(maxsize=64)
def _inline(*values: Any) -> Architecture:
    given = {word: value for word, value in zip(SHAPE, values, strict=False) if value is not None}
    return make_architecture(**given, dropout=values[-1])


def resolve_cluster(cluster: str | ClusterSpec, directory: Path) -> Cluster | None:
    """The cluster; None for `auto`: only the inventory knows what is there."""
    if cluster == "auto":
        return None
    if isinstance(cluster, str):
        from clusters.catalog import load_cluster

        return load_cluster(cluster, directory)
    return _inline_cluster(tuple(cluster.model_dump(exclude_none=True).items()))


@lru_cache(maxsize=64)
def _inline_cluster(items: tuple[tuple[str, Any], ...]) -> Cluster:
    from clusters.catalog import load_cluster

    return load_cluster(dict(items))
