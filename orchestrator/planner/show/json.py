"""A plan's JSON. The names are a contract: docs/reference/plan.md. Pure."""

from __future__ import annotations

import dataclasses
from typing import Any

from clusters.cluster import Cluster
from orchestrator.models.architecture import Architecture, num_parameters
from orchestrator.planner.reasons.alternatives import Alternative
from orchestrator.planner.search.result import SearchResult
from orchestrator.spec import Job
from strategies.price.memory import MemoryPrice
from strategies.strategy import Strategy

VERSION = 1


def strategy_dict(strategy: Strategy, *, stages: bool = True) -> dict[str, Any]:
    """The strategy's fields by their names; without the list of stages where only the choice matters."""
    fields = fields_dict(strategy)
    del fields["stages"]
    fields |= {
        "mesh_order": list(strategy.mesh_order),
        "offload": fields_dict(strategy.offload),
        "num_gpus": strategy.num_gpus,
    }
    if stages:
        fields["stages"] = [fields_dict(stage) for stage in strategy.stages]
    return fields


def placement(strategy: Strategy, gpus_per_node: int) -> list[dict[str, int]]:
    """Rank by rank, nodes filled in order: which node, which GPU of it, which coordinates."""
    degrees = strategy.degrees
    rows = []
    for rank in range(strategy.num_gpus):
        at = degrees.coordinates(rank)
        rows.append(
            {
                "rank": rank,
                "node": rank // gpus_per_node,
                "local_rank": rank % gpus_per_node,
                "data": at["data"],
                "context": at["context"],
                "tensor": at["tensor"],
                "pipeline": at["pipeline"],
            }
        )
    return rows


def fields_dict(value: Any) -> dict[str, Any]:
    """Return a dataclass as a dictionary, its values as they are."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def job_dict(job: Job) -> dict[str, Any]:
    """Return what a job asks for."""
    return {
        "name": job.name,
        "task": job.task,
        "global_batch_size": job.batch.global_batch_size,
        "sequence_length": job.batch.sequence_length,
        "precision": job.training.precision,
        "steps": job.num_steps,
        "objective": job.objective,
    }


def model_dict(arch: Architecture) -> dict[str, Any]:
    """Return a model's name, size and shape."""
    names = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_size", "vocab_size", "tied_embeddings")
    shape = {name: getattr(arch, name) for name in names}
    return {
        "name": arch.name or f"{arch.family} (inline)",
        "family": arch.family,
        "num_parameters": num_parameters(arch),
        **shape,
    }


def cluster_dict(cluster: Cluster) -> dict[str, Any]:
    """Return a cluster's GPUs and links."""
    return {
        "name": cluster.name,
        "num_gpus": cluster.num_gpus,
        "gpu": cluster.accelerator.name,
        "kind": cluster.accelerator.kind,
        "num_nodes": cluster.num_nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "memory_bytes": cluster.accelerator.memory_bytes,
        "usd_per_gpu_hour": cluster.usd_per_gpu_hour,
        "intra_node": {"name": cluster.intra_node.name, "bytes_per_s": cluster.intra_node.bytes_per_s},
        "inter_node": {"name": cluster.inter_node.name, "bytes_per_s": cluster.inter_node.bytes_per_s},
        "calibrated": cluster.calibration is not None,
    }


def memory_dict(memory: MemoryPrice) -> dict[str, Any]:
    """Return the bytes of all pipeline ranks against the budget."""
    return fields_dict(memory) | {"stages": [fields_dict(stage) for stage in memory.stages]}


def alternative_dict(one: Alternative) -> dict[str, Any]:
    """Return a strategy that was not taken, and why."""
    return {
        "strategy": strategy_dict(one.strategy, stages=False),
        "changed": one.changed,
        "fits": one.fits,
        "peak_bytes": one.peak_bytes,
        "tokens_per_second_per_gpu": one.tokens_per_second_per_gpu,
        "rejected_because": one.because,
    }


def with_strategies(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with their strategies as JSON, without the list of stages."""
    return [row | {"strategy": strategy_dict(row["strategy"], stages=False)} for row in rows]


def search_dict(found: SearchResult | None, *, fits: bool) -> dict[str, Any]:
    """Return what a search looked at and rejected; of a fully pinned strategy, itself."""
    if found is None:
        return {
            "candidates": 1,
            "priced": 1,
            "feasible": int(fits),
            "seconds": 0.0,
            "alternatives_seconds": 0.0,
            "rejected": [],
        }
    return {
        "candidates": found.num_candidates,
        "priced": found.num_priced,
        "feasible": found.num_feasible,
        "seconds": found.seconds,
        "alternatives_seconds": found.alternatives_seconds,
        "rejected": [
            {"group": group.group, "candidates": group.candidates, "reason": group.reason} for group in found.rejections
        ],
    }
