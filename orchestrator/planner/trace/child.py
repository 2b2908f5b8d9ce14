"""The closed form's third opinion: the plan's own step played on fake devices, in a child process that may import torch.

The trace brings its own fake process group and patches torch, so it never runs in the caller's process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from orchestrator.planner.plan import Plan
from orchestrator.planner.problem import PlanError
from strategies.catalog import unbuilt
from strategies.price.memory import MemoryPrice, Stages, reserve_bytes
from strategies.shares import shares
from strategies.zero.state_bytes import reduces_early

LIMIT_S = 300.0
"""A trace of 175B takes seconds; one that takes this long hangs."""
OF_STAGE = (
    "pipeline_rank", "tensor_peak_bytes", "peak_phase", "components", "away", "flops", "collective_bytes",
    "num_layers_traced", "num_micro_batches_traced", "seconds",
)  # fmt: skip


def with_trace(plan: Plan) -> Plan:
    """The plan with its step traced; it holds the larger of the two peaks. PlanError where the trace itself fails.

    `trace` of the result: {built, reason, stages[]}, a stage for the first pipeline rank of each share that differs, each
    {pipeline_rank, closed_form_bytes, tensor_peak_bytes, peak_phase, components, away, flops, collective_bytes,
    num_layers_traced, num_micro_batches_traced, seconds}, and these fields once more of the stage that holds the most; they
    are null where `built` is false. FLOPs and collectives are one rank's, of the micro batches played."""
    memory = plan.price.memory
    told: dict[str, Any] = {
        "built": False,
        "reason": why_not(plan),
        **dict.fromkeys(OF_STAGE),
        "closed_form_bytes": memory.stages.fullest().tensor_peak_bytes,
        "stages": [],
    }
    if told["reason"] is not None:
        return replace(plan, trace=told)
    by_rank = shares(plan.strategy).by_rank
    firsts = {share: rank for rank, share in reversed(list(enumerate(by_rank)))}
    stages = _child(plan, sorted(firsts.values()))
    for stage in stages:
        stage["closed_form_bytes"] = memory.stages[stage["pipeline_rank"]].tensor_peak_bytes
    told |= max(stages, key=lambda stage: int(stage["tensor_peak_bytes"]))
    told |= {"built": True, "stages": stages, "seconds": sum(stage["seconds"] for stage in stages)}
    more = {s["pipeline_rank"]: s["tensor_peak_bytes"] - s["closed_form_bytes"] for s in stages}
    if max(more.values()) <= 0:
        return replace(plan, trace=told)
    grown = _grown(memory, [max(0, more[firsts[share]]) for share in by_rank], plan.cluster.accelerator.kind)
    solution = replace(plan.solution, price=replace(plan.price, memory=grown))
    return replace(plan, solution=solution, trace=told)


def why_not(plan: Plan) -> str | None:
    """Return what of the plan no trace can play; None where it can."""
    limit = unbuilt(plan.strategy)
    if limit is not None:
        return limit.reason
    problem = plan.solution.problem
    if problem.is_published:
        return (
            "fused_norm describes another stack, and bytes are those of stacks that published, not of the module here"
        )
    on_host = plan.strategy.offload.parameters != "none" and reduces_early(plan.strategy)
    if on_host and plan.cluster.accelerator.kind != "cpu":
        return (
            "FSDP2 copies each shard to the device to gather it and each shard's gradient to the host; on fake devices, as on a "
            "CPU, both places are one memory and no copy is made: not traced"
        )
    return None


def _grown(memory: MemoryPrice, more: Sequence[int], kind: str) -> MemoryPrice:
    """Each pipeline rank with what the trace found beyond the closed form, as temporary bytes."""
    grown = []
    for stage, larger in zip(memory.stages, more, strict=True):
        tensors = stage.tensor_peak_bytes + larger
        reserve = reserve_bytes(tensors, kind)
        temporary, peak = stage.temporary + larger, tensors + reserve
        grown.append(replace(stage, temporary=temporary, tensor_peak_bytes=tensors, reserve=reserve, peak_bytes=peak))
    fullest = max(range(len(grown)), key=lambda rank: grown[rank].tensor_peak_bytes)
    stages = Stages(lambda rank: grown[rank], len(grown), fullest)
    return replace(memory, stages=stages, peak_bytes=grown[fullest].peak_bytes)


def _child(plan: Plan, pipeline_ranks: list[int]) -> list[dict[str, Any]]:
    problem = plan.solution.problem
    asked = {
        "arch": asdict(problem.arch),
        "eight_bit": problem.eight_bit,
        "lora": problem.lora and asdict(problem.lora),
        "strategy": asdict(plan.strategy),
        "sequence_length": problem.sequence_length,
        "precision": problem.precision,
        "task": problem.task,
        "pipeline_ranks": pipeline_ranks,
    }
    command = [sys.executable, "-W", "ignore", "-m", "orchestrator.planner.trace.play"]
    try:
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise PlanError(
            f"the trace took more than {LIMIT_S:.0f} s\n  to fix: plan without --trace: the closed form stands alone"
        ) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise PlanError(f"the trace failed: {last}\n  to fix: plan without --trace: the closed form stands alone")
    answer: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answer
