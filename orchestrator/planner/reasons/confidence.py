"""How wrong a plan may be: an interval of its speed that holds four of five cases, and the probability that it fits. Pure.

The model is that of benchmarks.coverage: ln(measured / predicted) is the bias of a stack and the error of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from clusters.calibration.runs import PRIOR_ERROR
from orchestrator.planner import spread
from orchestrator.planner.problem import Problem
from orchestrator.planner.search.anchors import VIRTUAL_STAGES_SHOWN, lacks_schedule, unanchored
from orchestrator.planner.search.likely import UNIFORM, fits_probability
from orchestrator.planner.search.solve import Solution
from orchestrator.planner.spread import Belief
from strategies.constants import TIME, TimeConstants, table
from strategies.price.roofline import Roofline
from strategies.price.step_time import TimePrice, step_time
from strategies.strategy import Strategy
from strategies.zero.state_bytes import reduces_early

KINDS = {"sharded": "ZeRO 2 and 3 without tensor or pipeline parallelism", "dense": "tensor, pipeline, replicated"}
"""Kinds of runs by their spread, in words."""
TELLING = 0.001
"""Part of a step from which on an unknown constant counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Confidence:
    """A plan's confidence: its interval of speed, its probability to fit, and what both rest on."""

    source: str
    throughput_error: float
    """Half the width of the interval over the predicted speed."""
    memory_error: float
    coverage: float
    """Part of all cases that the interval is made to hold."""
    tokens_per_second_per_gpu_low: float
    tokens_per_second_per_gpu_high: float
    widened_by: list[str]
    """What no published run anchors, priced at the ends of its range."""
    fits_probability: float
    fits_source: str


def confidence(solution: Solution) -> Confidence:
    """Return what is known of a plan's errors: from the cluster's finished runs, or else from published ones."""
    problem, strategy = solution.problem, solution.strategy
    source, belief = _belief(problem, strategy)
    widened = list(_unknown(problem, strategy, solution.price.time))
    extra = [math.log(high / low) / UNIFORM for _, low, high in widened]
    shift = -sum(math.log(low * high) / 2 for _, low, high in widened)
    if widened:
        source = f"{source}; widened for {', '.join(name for name, *_ in widened)}, which no published run anchors"
    measured, engine = problem.cluster.calibration, problem.engine
    memory = (measured.memory_error if measured else None) or PRIOR_ERROR["peak_bytes"]
    if engine.speed_error:
        source = f"{source}; engine {strategy.engine} priced as {engine.semantics}"
        extra.append(engine.speed_error / belief.multiple)
        memory = max(memory, engine.memory_error)
    belief = belief._replace(center=belief.center + shift, deviation=math.hypot(belief.deviation, *extra))
    speed, (probability, why) = solution.tokens_per_second_per_gpu, fits_probability(problem, solution.price.memory)
    return Confidence(
        source=source,
        throughput_error=(belief.high - belief.low) / 2,
        memory_error=memory,
        coverage=spread.COVERAGE,
        tokens_per_second_per_gpu_low=speed * belief.low,
        tokens_per_second_per_gpu_high=speed * belief.high,
        widened_by=[name for name, *_ in widened],
        fits_probability=probability,
        fits_source=why,
    )


def kind_of(strategy: Strategy) -> str:
    """Return the kind of a strategy, by which runs of one stack differ from each other."""
    split = strategy.tensor_parallel_degree * strategy.pipeline_parallel_degree > 1
    return "sharded" if reduces_early(strategy) and not split else "dense"


def _belief(problem: Problem, strategy: Strategy) -> tuple[str, Belief]:
    """(source, what is believed of measured over predicted speed), apart from what nothing anchors."""
    measured, gpu, kind = problem.cluster.calibration, problem.cluster.accelerator, kind_of(strategy)
    stack, row, own = spread.STACK, spread.ROW[kind], spread.OWN
    told = f"{spread.NUM_STACKS} stacks left out of the fit ({KINDS[kind]})"
    if gpu.name.split("-")[0] not in spread.KNOWN_GPUS:
        stack = math.hypot(stack, spread.OTHER_GPU)
        told += ", and hardly any run on this GPU"
    if measured is not None and gpu.kind == "cpu":
        stack, row, own = spread.MEASURED_STACK, spread.MEASURED_ROW, spread.MEASURED_ROW
        told = "error assumed"
    origin = measured.source if measured is not None else f"catalog: {gpu.source}"
    if measured is not None and measured.throughput_ratio is not None:
        runs = f"{measured.num_runs} finished run{'' if measured.num_runs == 1 else 's'}"
        own = max(own, measured.throughput_deviation or 0.0)  # a machine whose load changes tells less by each run
        belief = spread.after_runs(
            stack, own, spread.NUM_STACKS, mean=math.log(measured.throughput_ratio), num_runs=measured.num_runs
        )
        return f"{origin}; {told}, and {runs} here: {measured.throughput_ratio - 1:+.1%} measured", belief
    none = ": no finished run has been compared with its plan here" if measured is not None else ""
    return f"{origin}; {told}{none}", spread.unseen(stack, row, spread.NUM_STACKS)


def _unknown(problem: Problem, strategy: Strategy, time: TimePrice) -> Iterator[tuple[str, float, float]]:
    """Yield (what nothing anchors, step over the predicted one at its better end, the same at its worse end)."""
    lacking, step_s = unanchored(strategy), time.step_s
    for name in spread.UNANCHORED:
        low, high = sorted(
            _step_s(problem, strategy, name, value) / step_s for value in table(TimeConstants)[name].range
        )
        if high > low * (1 + TELLING):
            yield name, low, high
    if "sharding" in lacking and time.data_parallel_s > 0:
        rest = step_s - time.data_parallel_exposed_s
        yield "what hides of ZeRO's traffic", rest / step_s, (rest + time.data_parallel_s) / step_s
    virtual = strategy.num_virtual_stages
    if virtual > VIRTUAL_STAGES_SHOWN and lacks_schedule(
        strategy.pipeline_parallel_degree, strategy.pipeline_schedule, virtual
    ):
        longer = time.pipeline_bubble_s * (virtual / VIRTUAL_STAGES_SHOWN - 1)
        yield f"more than {VIRTUAL_STAGES_SHOWN} stages a rank", 1.0, 1 + longer / step_s


def _step_s(problem: Problem, strategy: Strategy, name: str, value: float) -> float:
    """Return the seconds of a step where one constant has another value."""
    assert name in {field.name for field in fields(TimeConstants)}
    constants = replace(TIME, **{name: value})
    roof = Roofline(problem.work, problem.cluster, problem.precision, constants)
    return step_time(roof, strategy, problem.sequence_length).step_s


def error_of(solution: Solution) -> float:
    """Return half the width of the interval of a solution's speed, over the predicted one."""
    return confidence(solution).throughput_error
