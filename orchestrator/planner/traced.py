"""The closed form's third opinion: the plan's own step played on fake devices, in a child process that may import torch.

The trace brings its own fake process group and patches torch, so it never runs in the caller's process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from orchestrator.planner.memory import MemoryPrice, Stages, reserve_bytes
from orchestrator.planner.problem import PlanError
from strategies.catalog import unbuilt

if TYPE_CHECKING:
    from orchestrator.planner.plan import Plan

LIMIT_S = 300.0
"""A trace of 175B takes seconds; one that takes this long hangs."""


def with_trace(plan: Plan) -> Plan:
    """The plan with its step traced; it holds the larger of the two peaks. PlanError where the trace itself fails.

    `trace` of the result: {built, reason, closed_form_bytes, tensor_peak_bytes, peak_phase, components, flops,
    collective_bytes, num_layers_traced, num_micro_batches_traced, seconds}; the numbers are null where `built` is false.
    FLOPs and collectives are one rank's, of the micro batches played."""
    closed = plan.price.memory.stages[0].tensor_peak_bytes
    told: dict[str, Any] = {
        "built": False,
        "reason": why_not(plan),
        "closed_form_bytes": closed,
        **dict.fromkeys((
            "tensor_peak_bytes", "peak_phase", "components", "flops", "collective_bytes", "num_layers_traced",
            "num_micro_batches_traced", "seconds",
        )),
    }  # fmt: skip
    if told["reason"] is not None:
        return replace(plan, trace=told)
    told |= _child(plan) | {"built": True}
    larger = told["tensor_peak_bytes"] - closed
    if larger <= 0:
        return replace(plan, trace=told)
    memory = _grown(plan.price.memory, larger, plan.cluster.accelerator.kind)
    solution = replace(plan.solution, price=replace(plan.price, memory=memory))
    return replace(plan, solution=solution, trace=told)


def why_not(plan: Plan) -> str | None:
    """What of the plan no trace can play; None where it can."""
    limit = unbuilt(plan.strategy)
    if limit is not None:
        return limit.reason
    problem = plan.solution.problem
    if problem.arch.family != "opt":
        return f"the family {problem.arch.family} is priced, its module is not built yet"
    for axis in ("tensor", "pipeline"):
        if getattr(plan.strategy, f"{axis}_parallel_degree") > 1:
            return f"the trace does not play {axis} parallelism yet"
    if plan.strategy.offload.any:
        return "on fake devices the host's memory and the GPU's look alike: offload is not traced yet"
    return None


def _grown(memory: MemoryPrice, larger: int, kind: str) -> MemoryPrice:
    """The one pipeline rank with what the trace found beyond the closed form, as temporary bytes."""
    stage = memory.stages[0]
    tensors = stage.tensor_peak_bytes + larger
    reserve = reserve_bytes(tensors, kind)
    grown = replace(
        stage,
        temporary=stage.temporary + larger,
        tensor_peak_bytes=tensors,
        reserve=reserve,
        peak_bytes=tensors + reserve,
    )
    return replace(memory, stages=Stages(lambda _: grown, 1, 0), peak_bytes=grown.peak_bytes)


def _child(plan: Plan) -> dict[str, Any]:
    problem = plan.solution.problem
    asked = {
        "arch": asdict(problem.arch),
        "strategy": asdict(plan.strategy),
        "sequence_length": problem.sequence_length,
        "precision": problem.precision,
    }
    command = [sys.executable, "-W", "ignore", "-m", "orchestrator.planner.trace"]
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
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
