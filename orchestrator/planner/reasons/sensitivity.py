"""How firm a choice is: what would be picked if a link were slower than stated. Pure."""

from __future__ import annotations

from typing import Any

from clusters.cluster import weaker_links
from orchestrator.planner.problem import Choice, Problem
from orchestrator.planner.search.anchors import key_of
from orchestrator.planner.search.candidates import simplicity
from orchestrator.planner.search.result import Wanted
from orchestrator.planner.search.solve import SLOWER, Solution


def sensitivity(solution: Solution, *, wanted: Wanted | None = None) -> list[dict[str, Any]]:
    """Return what would be picked if a link had 10 % less bandwidth than stated, and what the plan would then lose by not
    changing.

    A slower link makes nothing faster: only what was not slower than the choice would then be can take its place."""
    found, problem, wanted = solution.search, solution.problem, wanted or Wanted()
    assert found is not None
    assert found.best is not None
    rows = []
    for where, link, weaker in weaker_links(problem.cluster, SLOWER):
        asked = problem.changed(cluster=weaker)

        def rank(choice: Choice, asked: Problem = asked) -> tuple[Any, ...]:
            step_s = asked.time(asked.strategy(choice)).step_s
            missed = not wanted.met(step_s, choice.num_gpus)
            return missed, key_of(asked, choice, step_s), simplicity(choice), step_s

        kept, chosen = rank(found.best.choice), found.best.choice
        pick = (
            min((near.choice for near in found.near), key=rank, default=chosen)
            if kept[-1] > found.best.step_s
            else chosen
        )
        rows.append(
            {
                "link": link,
                "where": where,
                "bandwidth_factor": SLOWER,
                "same_choice": pick == chosen,
                "strategy": problem.strategy(pick),
                "step_s": kept[-1],
                "best_step_s": rank(pick)[-1],
            }
        )
    return rows
