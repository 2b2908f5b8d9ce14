"""Choices that no published run shows, and by how much they must be faster. Pure.

tests/golden/published.csv holds pipelines under 1f1b and interleaved_1f1b, at ZeRO 0 and 1, and ZeRO 2 and 3 alone."""

from __future__ import annotations

import math
from functools import cache

from orchestrator.planner.problem import Choice, Problem
from orchestrator.planner.spread import PAIR
from strategies.strategy import Strategy

VIRTUAL_STAGES_SHOWN = 6
"""Most stages a rank of a published run under interleaved_1f1b."""
MULTIPLE = 1.5
"""Paired deviations (spread.PAIR) by which an unanchored choice must be faster to be taken. Assumed: no simulation of what other
multiples earn has tuned it yet."""


def unanchored(choice: Choice | Strategy) -> tuple[str, ...]:
    """Return which of schedule, sharding, offload and context no published run shows: what the error bar is widened for."""
    if isinstance(choice, Strategy):
        choice = as_choice(choice)
    found = {
        "schedule": lacks_schedule(choice.pipeline, choice.schedule, choice.virtual),
        "sharding": lacks_sharding(choice.tensor, choice.pipeline, choice.zero),
        "offload": choice.offload.any,
        "context": choice.context > 1,
    }
    return tuple(name for name, lacks in found.items() if lacks)


def lacks_schedule(pipeline: int, schedule: str, virtual: int) -> bool:
    """Return whether no published run shows a schedule."""
    shown = {"1f1b": 1, "interleaved_1f1b": VIRTUAL_STAGES_SHOWN}
    return pipeline > 1 and virtual > shown.get(schedule, 0)


def lacks_sharding(tensor: int, pipeline: int, zero: int) -> bool:
    """Return whether no published run shows a ZeRO stage with such degrees."""
    return zero >= 2 and tensor * pipeline > 1


def as_choice(strategy: Strategy) -> Choice:
    """Return what of a strategy may lack an anchor."""
    return Choice(
        tensor=strategy.tensor_parallel_degree,
        pipeline=strategy.pipeline_parallel_degree,
        schedule=strategy.pipeline_schedule,
        virtual=strategy.num_virtual_stages,
        zero=strategy.zero_stage,
        context=strategy.context_parallel_degree,
        offload=strategy.offload,
    )


@cache
def margin(number: int) -> float:
    """Return how many times faster a strategy with so many unanchored choices must be: their errors are independent."""
    return 1 + MULTIPLE * PAIR * math.sqrt(number)


def key_of(problem: Problem, choice: Choice, step_s: float) -> float:
    """Return the number that a choice makes small: what the objective counts, times the margin of what nothing anchors."""
    demanded = 1.0 if problem.bold else margin(len(unanchored(choice)))
    return problem.key(step_s * demanded, choice.num_gpus)
