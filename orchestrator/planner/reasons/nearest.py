"""The nearest changes under which a job that does not fit would, each planned. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.planner.problem import Problem
from orchestrator.planner.search.solve import Refused, Solution, ask, solve

MOST_GPUS = 16384
SHORTEST = 128
"""Tokens of the shortest sequence that is tried."""
FREED: dict[str, tuple[str, ...]] = {
    "micro_batch_size": ("micro_batch_size", "gradient_accumulation_steps"),
    "activation_checkpointing": ("activation_checkpointing", "num_checkpointed_layers_per_stage"),
    "zero_stage": ("zero_stage", "zero_group_size", "states", "gather", "reduce"),
    "offload": ("offload",),
}
"""Pins that decide what fits, with those that go with them."""


@dataclass(frozen=True, slots=True)
class Nearest:
    """Changes that would make a job fit."""

    rows: list[dict[str, Any]]
    """The changes, each planned: fewest GPUs first, then the fastest."""
    refused: list[str]
    """Changes that break a rule of what is pinned, each with the rule."""


NOTHING_NEAR = Nearest([], [])


def nearest(solution: Solution) -> Nearest:
    """Changes that would make the job fit, each planned: free one pin, or else all that count; shorten; add GPUs."""
    problem, pins = solution.problem, solution.problem.pins
    if solution.search is None:  # what was settled by convention stays as it was
        problem = problem.changed(pins={**pins, "gather": solution.strategy.gather, "reduce": solution.strategy.reduce})
    one = {name: names for name, names in FREED.items() if name in pins}
    found = [_first_fit([(f"leave out {name}", problem.without_pins(*names))]) for name, names in one.items()]
    if not any(near.rows for near in found) and len(one) > 1:
        freed = problem.without_pins(*(name for names in one.values() for name in names))
        found.append(_first_fit([(f"leave out {', '.join(one)}", freed)]))
    found += [_first_fit(_shorter(problem)), _first_fit(_larger_clusters(problem))]
    rows = sorted(
        (row for near in found for row in near.rows),
        key=lambda row: (row["num_gpus"], -row["tokens_per_second_per_gpu"]),
    )
    return Nearest(rows, [reason for near in found for reason in near.refused])


def _first_fit(changes: Iterable[tuple[str, Problem]]) -> Nearest:
    """Return the first change under which the job fits, or else why the first that was refused was."""
    refused: list[str] = []
    for change, problem in changes:
        found = ask(solve, problem)
        if isinstance(found, Refused):
            refused = refused or [f"{change}: {found.reason}"]
        elif found.fits:
            return Nearest([_near(change, found)], [])
    return Nearest([], refused)


def _near(change: str, found: Solution) -> dict[str, Any]:
    return {
        "change": change,
        "num_gpus": found.strategy.num_gpus,
        "sequence_length": found.problem.sequence_length,
        "strategy": found.strategy,
        "peak_bytes": found.price.memory.peak_bytes,
        "tokens_per_second_per_gpu": found.tokens_per_second_per_gpu,
    }


def _shorter(problem: Problem) -> Iterator[tuple[str, Problem]]:
    """Yield shorter sequences, in halvings, the longest first."""
    length = problem.sequence_length // 2
    while length >= SHORTEST:
        yield f"sequence_length {length}", problem.changed(sequence_length=length)
        length //= 2


def _larger_clusters(problem: Problem) -> Iterator[tuple[str, Problem]]:
    """Yield larger clusters, in doublings of the nodes, with the same pins and more replicas, the smallest first."""
    cluster, pins, factor = problem.cluster, problem.pins, 2
    while factor * cluster.num_gpus <= MOST_GPUS:
        grown = {name: pins[name] * factor for name in ("data_parallel_degree", "zero_group_size") if name in pins}
        larger = problem.without_pins("gradient_accumulation_steps")
        nodes = cluster.num_nodes * factor
        yield (
            f"{nodes} nodes of {cluster.gpus_per_node}",
            larger.changed(
                cluster=replace(cluster, num_nodes=nodes), pins={**larger.pins, **grown}, objective="fastest"
            ),
        )
        factor *= 2
