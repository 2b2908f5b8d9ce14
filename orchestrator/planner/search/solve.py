"""A problem's answer: its one pinned strategy, or the best of the search. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ParamSpec

from clusters.cluster import weaker_links
from orchestrator.planner.problem import Choice, PlanError, Problem, check, check_batch, check_rules
from orchestrator.planner.search.axes import Space, require_candidates
from orchestrator.planner.search.best_first import search
from orchestrator.planner.search.result import SearchResult, Wanted
from strategies.catalog import ENGINES, Limit, unbuilt, unbuilt_pins, wrong_precision
from strategies.price.step_time import Price
from strategies.strategy import Strategy

SLOWER = 0.9
"""Part of a link's bandwidth that is left to it, to see how much a choice depends on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """A priced strategy. `search` is None where everything was pinned."""

    problem: Problem
    strategy: Strategy
    price: Price
    search: SearchResult | None = None
    passed_over: Solution | None = None
    """A bolder strategy, predicted faster by less than what no published run anchors in it may be wrong; or else, where this one
    offloads, the best without (reasons/choice.py)."""

    @property
    def fits(self) -> bool:
        return self.price.memory.fits

    @property
    def tokens_per_second(self) -> float:
        return self.problem.global_batch_size * self.problem.sequence_length / self.price.time.step_s

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens_per_second / self.strategy.num_gpus


def solve(
    problem: Problem,
    *,
    wanted: Wanted | None = None,
    after: SearchResult | None = None,
    near: bool = False,
) -> Solution:
    """The strategy to take. Where nothing fits, the one that is over by least. PlanError where nothing can be at all.

    Args:
        after: an earlier search for the same job on the same GPUs, of which what it found out is used.
        near: find all that a slower link could bring to the top as well (explain.sensitivity).
    """
    check(problem)
    space = Space(problem)
    single = space.single()
    if single is not None:
        check_batch(problem, data=single.data, micro=single.micro)
        strategy = problem.strategy(single)
        check_rules(strategy)
        if problem.built_only and (limit := unbuilt(strategy)) is not None:
            raise _not_built(limit, getattr(strategy, limit.field), strategy.engine)
        _check_precision(strategy, problem)
        return Solution(problem=problem, strategy=strategy, price=problem.price(strategy))
    if problem.built_only:
        _check_built(problem)
    require_candidates(space)
    near_s = (lambda choice: _on_slower_links_s(problem, choice)) if near else None
    found = search(problem, wanted=wanted, after=after, near_s=near_s)
    choice = found.best.choice if found.best else found.closest.choice if found.closest else None
    assert choice is not None, "a space with candidates has a best or a closest one"
    strategy = problem.strategy(choice)
    if problem.built_only and found.best and (limit := unbuilt(strategy)) is not None:
        # The space leaves out what is not built; what is pinned may be unbuilt with what is chosen.
        raise _not_built(limit, getattr(strategy, limit.field), strategy.engine)
    _check_precision(strategy, problem)
    return Solution(problem=problem, strategy=strategy, price=problem.price(strategy), search=found)


@dataclass(frozen=True, slots=True)
class Refused:
    """A question on the side that no strategy answers, and why."""

    reason: str
    fix: str


P = ParamSpec("P")


def ask(how: Callable[P, Solution], *args: P.args, **kwargs: P.kwargs) -> Solution | Refused:
    """Return the answer to a question asked on the side (what would fit, what another size would do): a refusal is an answer
    with its reason, so that it never ends the plan in which it is asked."""
    try:
        return how(*args, **kwargs)
    except PlanError as error:
        reason, _, fix = str(error).partition("\n  to fix: ")
        return Refused(reason, fix)


def _on_slower_links_s(problem: Problem, choice: Choice) -> float:
    """Seconds of a step where the link that matters most is slower."""
    slower = (problem.changed(cluster=weaker) for _, _, weaker in weaker_links(problem.cluster, SLOWER))
    return max((each.time(each.strategy(choice)).step_s for each in slower), default=0.0)


def _check_built(problem: Problem) -> None:
    """PlanError where a pinned choice alone is not built."""
    pins = problem.pins
    for name, limit in unbuilt_pins(pins):
        raise _not_built(limit, pins[name], pins.get("engine", "native"))
    if "zero_stage" in pins:
        _check_precision(
            Strategy(**{each.name: pins[each.name] for each in fields(Strategy) if each.name in pins}), problem
        )


def _check_precision(strategy: Strategy, problem: Problem) -> None:
    if wrong := wrong_precision(strategy, problem.precision):
        told, fix = wrong.split("; ")
        raise PlanError(f"{told}\n  to fix: {fix}")


def _not_built(limit: Limit, value: object, engine: str) -> PlanError:
    if limit.field == "offload":
        value = "of " + ", ".join(k for k in ("optimizer", "parameters", "activations") if getattr(value, k) != "none")
    ahead = ENGINES[engine].plans_ahead
    rest = "; `shardwise plan` still prices it" if ahead else ", or set engine: native"
    return PlanError(
        f"strategy.{limit.field} {value} cannot run: {limit.reason}\n"
        f"  to fix: leave {limit.field} out and let the planner choose{rest}"
    )
