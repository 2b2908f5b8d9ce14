"""How wrong the plans of a kind have been, and what that decides: a gain of offload that its wider error covers is none. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from clusters.calibration.runs import PRIOR_ERROR
from orchestrator.planner.problem import Problem
from orchestrator.planner.search.axes import Space
from orchestrator.planner.search.result import Found, SearchResult, Wanted
from orchestrator.planner.search.solve import Refused, Solution, ask, solve
from strategies.strategy import Offload, Strategy
from strategies.zero.cost import ROOM as zero
from strategies.zero.state_bytes import reduces_early

PUBLISHED_GPUS = {"sharded": ("a100", "a800", "h100"), "dense": ("a100", "a800")}
"""GPUs on which published runs of a kind were left out of the fit and then predicted (python -m benchmarks.oracle).
Sharded: ZeRO 2 and 3 without tensor or pipeline parallelism; dense: all else."""
PUBLISHED_ERROR = 0.20
"""Stated for what published runs show, relative error of tokens/s/GPU. Whole sources left out of the fit were predicted with mean
errors of 4.3 to 19 %, and a stack of its own is one more source: a mean over sources would promise too much."""
UNPUBLISHED_ERROR = 0.30
"""Assumed where the GPU has published runs of the kind, and none with this schedule, these virtual stages or this combination."""
OFFLOAD_ERROR = 0.40
"""Assumed where something is offloaded: no published run with its whole configuration anchors those terms."""
OTHER_GPU_ERROR = 0.50
"""Assumed on a GPU whose published runs of that kind are not in the fit; of two stacks on V100 one came out 8 % off, one 51 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Confidence:
    """A plan's confidence: where its constants come from, and the relative errors that it states."""

    source: str
    throughput_error: float
    memory_error: float


def confidence(problem: Problem, strategy: Strategy) -> Confidence:
    """Return the errors to state for a strategy: of the cluster's finished runs, or else of published runs and assumptions."""
    source, speed = _speed_error(problem, strategy)
    if strategy.offload.any:
        source = f"{source}; offload terms without a published anchor"
        speed = max(speed, OFFLOAD_ERROR)
    measured = problem.cluster.calibration
    memory = measured.memory_error if measured else None
    memory = PRIOR_ERROR["peak_bytes"] if memory is None else memory
    engine = problem.engine
    if engine.speed_error:
        source = f"{source}; engine {strategy.engine} priced as {engine.semantics}"
        speed, memory = max(speed, engine.speed_error), max(memory, engine.memory_error)
    return Confidence(source=source, throughput_error=speed, memory_error=memory)


def _speed_error(problem: Problem, strategy: Strategy) -> tuple[str, float]:
    """(source, error) of tokens/s without offload: a measured machine's finished runs come before any published one."""
    measured, gpu = problem.cluster.calibration, problem.cluster.accelerator
    if measured is not None and measured.throughput_error is not None:
        runs = f"{measured.num_runs} finished run{'' if measured.num_runs == 1 else 's'}"
        return f"{measured.source}; error of {runs} here", measured.throughput_error
    if measured is not None:
        told = "error assumed: no finished run has been compared with its plan here"
        return f"{measured.source}; {told}", PRIOR_ERROR["tokens_per_second"]
    split = strategy.degrees.tensor * strategy.degrees.pipeline > 1
    kind = "sharded" if reduces_early(strategy) and not split else "dense"
    words = {"sharded": "ZeRO 2 and 3", "dense": "tensor, pipeline, replicated"}[kind]
    if gpu.name.split("-")[0] not in PUBLISHED_GPUS[kind]:
        told = f"error assumed: no published run of this kind ({words}) on this GPU"
        return f"catalog: {gpu.source}; {told}", OTHER_GPU_ERROR
    if what := unpublished(strategy):
        return f"catalog: {gpu.source}; error assumed: no published run has {what}", UNPUBLISHED_ERROR
    return f"catalog: {gpu.source}; error of published runs left out of the fit ({words})", PUBLISHED_ERROR


def _kind_error(strategy: Strategy) -> float:
    """Return the error of a kind of strategy where its GPU is well known."""
    if strategy.offload.any:
        return OFFLOAD_ERROR
    return UNPUBLISHED_ERROR if unpublished(strategy) else PUBLISHED_ERROR


def unpublished(strategy: Strategy) -> str | None:
    """Return the part of a strategy that no published run on A100 or H100 shows; None: each part has one.

    tests/golden/published.csv holds pipelines under 1f1b with one stage a rank, at ZeRO 0 and 1, and ZeRO 2 and 3 alone."""
    if strategy.degrees.pipeline > 1:
        if strategy.num_virtual_stages > 1:
            return f"{strategy.num_virtual_stages} virtual stages a rank"
        if strategy.pipeline_schedule != "1f1b":
            return f"the schedule {strategy.pipeline_schedule}"
    if reduces_early(strategy):
        if strategy.degrees.pipeline > 1:
            return f"{zero.choice_words(strategy)} under a pipeline"
        if strategy.degrees.tensor > 1:
            return f"{zero.choice_words(strategy)} with tensor parallelism"
    return None


# The choice -----------------------------------------------------------------------------------------------------------


def choose(
    problem: Problem,
    *,
    wanted: Wanted | None = None,
    after: SearchResult | None = None,
    near: bool = False,
) -> Solution:
    """Return the strategy to take: what `solve` finds, or under `fastest` the best without offload, where the gain of offload
    is smaller than the difference of their stated errors. PlanError where nothing can be at all. Arguments: those of `solve`."""
    found = solve(problem, wanted=wanted, after=after, near=near)
    plain = without_offload(found, wanted=wanted, near=near)
    if plain is None:
        return found
    gain = plain.price.time.step_s / found.price.time.step_s - 1
    if problem.objective != "fastest" or gain > wider_by(found, plain):
        return replace(found, passed_over=plain)
    return replace(plain, problem=problem, search=_searched(found, plain), passed_over=found)


def without_offload(found: Solution, *, wanted: Wanted | None = None, near: bool = False) -> Solution | None:
    """Return the best strategy that offloads nothing, where the one found does though it need not; None where none fits and keeps
    the targets that the one found keeps."""
    problem, wanted = found.problem, wanted or Wanted()
    if found.search is None or not found.fits or not found.strategy.offload.any or "offload" in problem.pins:
        return None
    asked = problem.changed(pins={**problem.pins, "offload": Offload()})
    plain = ask(solve, asked, wanted=wanted, after=found.search, near=near)
    if isinstance(plain, Refused) or not plain.fits:
        return None
    met, was_met = (wanted.met(one.price.time.step_s, one.strategy.num_gpus) for one in (plain, found))
    return plain if met or not was_met else None


def _searched(found: Solution, plain: Solution) -> SearchResult | None:
    """Return the search of the faster strategy with the one without offload as its best."""
    if found.search is None:
        return None
    best, near = (plain.search.best, plain.search.near) if plain.search else (None, [])
    if best is None:  # all but offload was pinned
        choice = Space(plain.problem).single()
        assert choice is not None, "what was answered without a search is one choice"
        best = Found(choice, plain.price.time.step_s)
    return replace(found.search, best=best, near=near)


def wider_by(found: Solution, plain: Solution) -> float:
    """Return how much less certain the speed of one solution is than another's on the same machine: the difference of their
    stated errors, or of their kinds' where what is not known of the GPU hides it."""
    stated = error_of(found) - error_of(plain)
    return max(stated, _kind_error(found.strategy) - _kind_error(plain.strategy))


def error_of(solution: Solution) -> float:
    """Return the relative error of tokens/s that is stated for a solution."""
    return confidence(solution.problem, solution.strategy).throughput_error
