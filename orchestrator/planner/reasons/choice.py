"""The strategy to take, and the bolder one beside it: a gain that no published run anchors must be larger than chance. Pure.

The rule itself is the search's key (search/anchors.py): seconds of a step times the margin of what nothing anchors, among what
fits with a probability of at least 0.9."""

from __future__ import annotations

import math
from dataclasses import replace

from orchestrator.planner.problem import Problem
from orchestrator.planner.reasons.alternatives import AS_FAST
from orchestrator.planner.search.anchors import margin, unanchored
from orchestrator.planner.search.result import SearchResult, Wanted
from orchestrator.planner.search.solve import Refused, Solution, ask, solve
from strategies.strategy import Offload

START_S = 120.0
"""From the start of a run to its first step: processes, imports, compilation of kernels. Assumed."""
STEPS_TO_TELL = 7
"""Steps of a run from which its speed is told (control/lessons.py)."""


def choose(
    problem: Problem,
    *,
    wanted: Wanted | None = None,
    after: SearchResult | None = None,
    near: bool = False,
) -> Solution:
    """Return what `solve` finds, and beside it in `passed_over` the bolder strategy that is predicted faster, or else, where the
    one found offloads, the best that does not. PlanError where nothing can be at all. Arguments: those of `solve`."""
    found = solve(problem, wanted=wanted, after=after, near=near)
    if found.search is None or not found.fits:
        return found
    bolder = ask(solve, problem.changed(bold=True), wanted=wanted, after=found.search)
    if not isinstance(bolder, Refused) and gain(found, bolder) > AS_FAST:
        return replace(found, passed_over=bolder)
    return replace(found, passed_over=without_offload(found, wanted=wanted))


def gain(found: Solution, other: Solution) -> float:
    """Return by which part of the found objective another solution is better, as priced."""
    keys = (one.problem.key(one.price.time.step_s, one.strategy.num_gpus) for one in (found, other))
    return next(keys) / next(keys) - 1


def demanded(found: Solution, bolder: Solution) -> float:
    """Return the gain that the bolder solution would have to show."""
    ours, theirs = (margin(len(unanchored(one.strategy))) for one in (found, bolder))
    return theirs / ours - 1


def minutes_to_tell(*solutions: Solution) -> int:
    """Return the minutes in which runs of a few steps would tell the speed of each."""
    return math.ceil(sum(START_S + STEPS_TO_TELL * one.price.time.step_s for one in solutions) / 60)


def without_offload(found: Solution, *, wanted: Wanted | None = None) -> Solution | None:
    """Return the best strategy that offloads nothing, where the one found does though it need not; None where none fits and keeps
    the targets that the one found keeps."""
    problem, wanted = found.problem, wanted or Wanted()
    if found.search is None or not found.fits or not found.strategy.offload.any or "offload" in problem.pins:
        return None
    asked = problem.changed(pins={**problem.pins, "offload": Offload()})
    plain = ask(solve, asked, wanted=wanted, after=found.search)
    if isinstance(plain, Refused) or not plain.fits:
        return None
    met, was_met = (wanted.met(one.price.time.step_s, one.strategy.num_gpus) for one in (plain, found))
    return plain if met or not was_met else None
