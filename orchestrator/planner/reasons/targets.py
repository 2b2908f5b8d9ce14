"""A job's targets: as limits for the search, and held against what was found. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from orchestrator.planner.search.result import Wanted
from orchestrator.planner.search.solve import Refused, Solution, ask, solve
from orchestrator.spec import Job


def limits(
    *,
    tokens_per_step: int,
    num_steps: float | None,
    usd_per_gpu_hour: float | None,
    tokens_per_second_per_gpu: float | None = None,
    finish_within_s: float | None = None,
    budget_usd: float | None = None,
) -> Wanted:
    """Return targets as limits on the seconds of a step and on its GPU-seconds; those of an unknown length or price are none."""
    step_s = gpu_s = float("inf")
    if tokens_per_second_per_gpu is not None:
        gpu_s = tokens_per_step / tokens_per_second_per_gpu
    if num_steps:
        if finish_within_s is not None:
            step_s = finish_within_s / num_steps
        if budget_usd is not None and usd_per_gpu_hour:
            gpu_s = min(gpu_s, budget_usd / usd_per_gpu_hour * 3600 / num_steps)
    return Wanted(step_s=step_s, gpu_s=gpu_s)


def wanted_of(job: Job, usd_per_gpu_hour: float | None, *, only: str | None = None) -> Wanted:
    """Return the job's targets as limits on a step, or one of them by its name."""
    targets, speed = job.targets, job.targets.tokens_per_second_per_gpu
    wanted = {
        "tokens_per_second_per_gpu": None if speed is None else speed * (1 - targets.tolerance),
        "finish_within": targets.finish_within,
        "budget_usd": targets.budget_usd,
    }
    kept = {name: value if only in (None, name) else None for name, value in wanted.items()}
    return limits(
        tokens_per_step=job.tokens_per_step,
        num_steps=job.num_steps,
        usd_per_gpu_hour=usd_per_gpu_hour,
        tokens_per_second_per_gpu=kept["tokens_per_second_per_gpu"],
        finish_within_s=kept["finish_within"],
        budget_usd=kept["budget_usd"],
    )


def judged(job: Job, solution: Solution, cost: dict[str, float | None]) -> list[dict[str, Any]]:
    """[{name, wanted, got, met}]; got is None where the job's length or the price is unknown, and that counts as missed."""
    targets = job.targets
    rows: list[dict[str, Any]] = []

    def add(name: str, wanted: float | None, got: float | None, met: bool) -> None:
        if wanted is not None:
            rows.append({"name": name, "wanted": float(wanted), "got": got, "met": met})

    speed, goal = solution.tokens_per_second_per_gpu, targets.tokens_per_second_per_gpu
    add("tokens_per_second_per_gpu", goal, speed, goal is None or speed >= goal * (1 - targets.tolerance) * (1 - 1e-9))
    for name, key in (("budget_usd", "usd"), ("finish_within", "wall_s")):
        limit, got = getattr(targets, name), cost[key]
        add(name, limit, got, limit is not None and got is not None and got <= limit * (1 + 1e-9))
    return rows


def would_meet(
    solution: Solution, wanted: Wanted, *, sizes: tuple[float, ...] = (2, 4, 8, 0.5, 0.25, 0.125)
) -> str | None:
    """The nearest cluster size on which these limits are kept, each tried by planning; None: not within a factor of 8."""
    problem = solution.problem
    cluster = problem.cluster
    for factor in sorted(sizes, key=lambda size: max(size, 1 / size)):
        nodes = cluster.num_nodes * factor
        per_node = cluster.gpus_per_node
        if nodes < 1:
            per_node, nodes = int(per_node * nodes), 1
        if per_node < 1 or nodes != int(nodes):
            continue
        other = replace(cluster, num_nodes=int(nodes), gpus_per_node=per_node)
        free = problem.without_pins("data_parallel_degree", "zero_group_size", "gradient_accumulation_steps")
        pins = free.pins
        if other.num_gpus < pins.get("tensor_parallel_degree", 1) * pins.get("pipeline_parallel_degree", 1):
            continue
        found = ask(solve, free.changed(cluster=other), wanted=wanted)
        if isinstance(found, Refused):
            continue
        step_s, num_gpus = found.price.time.step_s, found.strategy.num_gpus
        if found.fits and wanted.met(step_s, num_gpus):
            return f"{num_gpus} GPUs: {found.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, {step_s:.3g} s a step"
    return None


def judged_with_hints(job: Job, solution: Solution, cost: dict[str, float | None]) -> list[dict[str, Any]]:
    """Return the targets held against a solution, and what would meet those that are missed.

    Rows are {name, wanted, got, met, would_meet, would_meet_alone}. `would_meet` is the nearest cluster size that meets all
    targets; where none does, `would_meet_alone` is the nearest that meets this one."""
    rows, price = judged(job, solution, cost), solution.problem.cluster.usd_per_gpu_hour
    missed = [row for row in rows if not row["met"]]
    known = all(row["got"] is not None for row in missed)
    every = would_meet(solution, wanted_of(job, price)) if missed and known else None
    hints = {row["name"]: {"would_meet": every, "would_meet_alone": every} for row in missed}
    if known and every is None and len(rows) > 1:
        for name, hint in hints.items():
            hint["would_meet_alone"] = would_meet(solution, wanted_of(job, price, only=name))
    return [row | hints.get(row["name"], {"would_meet": None, "would_meet_alone": None}) for row in rows]
