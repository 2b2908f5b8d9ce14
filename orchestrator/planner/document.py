"""A plan's JSON. The names are a contract: docs/reference/plan.md. Pure."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from orchestrator.models.architecture import num_parameters
from strategies.strategy import Strategy

if TYPE_CHECKING:
    from orchestrator.planner.plan import Plan

VERSION = 1


def document(plan: Plan) -> dict[str, Any]:
    """The whole contract, design order."""
    return {
        "version": VERSION,
        "fits": plan.fits,
        "job": _job(plan),
        "model": _model(plan),
        "cluster": _cluster(plan),
        "strategy": strategy_dict(plan.strategy),
        "memory": _memory(plan),
        "time": _fields(plan.price.time),
        "throughput": plan.throughput,
        "cost": plan.cost,
        "placement": placement(plan.strategy, plan.cluster.gpus_per_node),
        "confidence": plan.confidence,
        "alternatives": [
            {
                "strategy": strategy_dict(loser.strategy, stages=False),
                "fits": loser.fits,
                "peak_bytes": loser.peak_bytes,
                "tokens_per_second_per_gpu": loser.tokens_per_second_per_gpu,
                "rejected_because": loser.because,
            }
            for loser in plan.alternatives
        ],
        "sensitivity": [row | {"strategy": strategy_dict(row["strategy"], stages=False)} for row in plan.sensitivity],
        "targets_met": plan.targets_met,
        "targets": plan.targets,
        "search": _search(plan),
        "notes": plan.notes,
        "nearest": plan.nearest,
        "nearest_refused": plan.nearest_refused,
        **({} if plan.trace is None else {"trace": plan.trace}),
    }


def strategy_dict(strategy: Strategy, *, stages: bool = True) -> dict[str, Any]:
    """The strategy's fields by their names; without the list of stages where only the choice matters."""
    fields = _fields(strategy)
    del fields["stages"]
    fields |= {
        "mesh_order": list(strategy.mesh_order),
        "offload": _fields(strategy.offload),
        "num_gpus": strategy.num_gpus,
    }
    if stages:
        fields["stages"] = [_fields(stage) for stage in strategy.stages]
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
                "tensor": at["tensor"],
                "pipeline": at["pipeline"],
            }
        )
    return rows


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _job(plan: Plan) -> dict[str, Any]:
    job = plan.job
    return {
        "name": job.name,
        "task": job.task,
        "global_batch_size": job.batch.global_batch_size,
        "sequence_length": job.batch.sequence_length,
        "precision": job.training.precision,
        "steps": job.num_steps,
        "objective": job.objective,
    }


def _model(plan: Plan) -> dict[str, Any]:
    arch = plan.solution.problem.arch
    names = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_size", "vocab_size", "tied_embeddings")
    shape = {name: getattr(arch, name) for name in names}
    return {
        "name": arch.name or f"{arch.family} (inline)",
        "family": arch.family,
        "num_parameters": num_parameters(arch),
        **shape,
    }


def _cluster(plan: Plan) -> dict[str, Any]:
    cluster = plan.cluster
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


def _memory(plan: Plan) -> dict[str, Any]:
    memory = _fields(plan.price.memory)
    return memory | {"stages": [_fields(stage) for stage in plan.price.memory.stages]}


def _search(plan: Plan) -> dict[str, Any]:
    found = plan.search
    if found is None:
        return {
            "candidates": 1,
            "priced": 1,
            "feasible": int(plan.fits),
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
