"""Why the others lost: the chosen strategy with each single choice changed. Pure.

Nothing is searched. One choice is changed, what cannot stay with it follows (replicas fill the GPUs, a schedule that does not
take the micro batches gives way to 1f1b), and micro batch and recompute are settled again: the fastest that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from orchestrator.planner.problem import Choice
from orchestrator.planner.search.axes import Space
from orchestrator.planner.search.candidates import (
    BatchOption,
    PipelineConfiguration,
    Shape,
    Sharding,
    excess,
    formatted_excess,
    point,
    simplicity,
)
from orchestrator.planner.search.result import Fits
from orchestrator.planner.search.solve import Solution
from orchestrator.planner.show.words import all_degrees_told, choices_told
from strategies.offload.cost import offload_words
from strategies.price.step_time import Price
from strategies.strategy import Offload, Schedule, Strategy

TOO_LARGE_PART = 4
"""One alternative in so many may be a change that does not fit; the others are strategies that could run."""
AS_FAST = 0.0005
"""Slower by less is as fast: no model of a step is that good."""
TELLING_PART = 0.01
"""Part of a step from which on it is said that it grew."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """The chosen strategy with one choice changed, and the one reason that it was not taken."""

    changed: str
    """The field of the strategy that was changed, by its name in the job file."""
    strategy: Strategy
    price: Price
    peak_bytes: int
    tokens_per_second_per_gpu: float
    fits: bool
    because: str


class Change(NamedTuple):
    """One choice changed; None leaves open what follows from it."""

    field: str
    words: str
    shape: Shape
    sequence_parallel: bool
    zero: int
    schedule: tuple[Schedule, int] | None
    sharding: tuple[str, str] | None
    """How often ZeRO gathers and reduces."""
    offload: Offload
    micro: int | None = None
    recompute: str | None = None


def alternatives(solution: Solution, *, limit: int) -> list[Alternative]:
    """Return the strategies that differ from the chosen one in one choice: fastest first, at most so many, among them the nearest
    of those that would need more memory."""
    found = solution.search
    if found is None or found.best is None or limit < 1:
        return []
    best, space = found.best.choice, Space(solution.problem, every_size=True)
    made: list[Alternative] = []
    seen = {best}
    for change in changes(space, best):
        choice = settled(space, found.fits, change, best)
        if choice is not None and choice not in seen:
            seen.add(choice)
            made.append(_alternative(solution, change, choice, best))
    other = solution.passed_over
    if other is not None and other.fits and other.strategy.offload != solution.strategy.offload:
        made.append(_passed_over(solution, other))
    fast = sorted((one for one in made if one.fits), key=lambda one: -one.tokens_per_second_per_gpu)
    large = sorted((one for one in made if not one.fits), key=lambda one: excess(one.price.memory))
    fast, large = _one_of_each(fast), _one_of_each(large)[: max(1, limit // TOO_LARGE_PART)]
    fast = fast[: limit - len(large)]
    return sorted([*fast, *large], key=lambda one: -one.tokens_per_second_per_gpu)


def _one_of_each(ordered: list[Alternative]) -> list[Alternative]:
    """Return the first of each change, stages a rank and schedules with different numbers of them counted as one."""
    kept: dict[tuple[object, ...], Alternative] = {}
    for one in ordered:
        key: tuple[object, ...] = one.changed, one.because.split(" instead")[0]
        if one.changed in ("pipeline_schedule", "num_virtual_stages"):
            key = one.changed, one.strategy.pipeline_schedule
        kept.setdefault(key, one)
    return list(kept.values())


def changes(space: Space, best: Choice) -> Iterator[Change]:
    """Yield every single change of the chosen strategy that the job leaves open."""
    shape = Shape(best.tensor, best.pipeline, best.data, best.context)
    same = Change(
        field="",
        words="",
        shape=shape,
        sequence_parallel=best.sequence_parallel,
        zero=best.zero,
        schedule=(best.schedule, best.virtual),
        sharding=(best.gather, best.reduce),
        offload=best.offload,
    )
    yield from _other_degrees(space, best, same)
    for schedule, virtual in dict.fromkeys(one for batch in space.batches(shape) for one in batch.schedules):
        if (schedule, virtual) != same.schedule:
            words = schedule if virtual == 1 else f"{schedule} with {virtual} stages a rank"
            name = "pipeline_schedule" if schedule != best.schedule else "num_virtual_stages"
            yield same._replace(field=name, words=words, schedule=(schedule, virtual))
    for zero in range(4):
        if zero != best.zero:
            yield same._replace(field="zero_stage", words=f"ZeRO {zero}", zero=zero, sharding=None)
    for gather, reduce in dict.fromkeys((one.gather, one.reduce) for one in space.shardings_of(shape, best.zero)):
        if (gather, reduce) != same.sharding:
            words = f"gather {gather}, reduce {reduce}".replace("_", " ")
            name = "gather" if gather != best.gather else "reduce"
            yield same._replace(field=name, words=words, sharding=(gather, reduce))
    for flag in space.sequence_parallels(best.tensor):
        if flag != best.sequence_parallel:
            words = f"{'' if flag else 'no '}sequence parallel"
            yield same._replace(field="sequence_parallel", words=words, sequence_parallel=flag)
    yield from _other_offloads(space, best, same)
    for batch in space.batches(shape):
        if batch.micro in (best.micro // 2, best.micro * 2):
            yield same._replace(field="micro_batch_size", words=f"micro batch {batch.micro}", micro=batch.micro)
    kinds, counts = space.recomputes(best.pipeline, best.virtual)
    for kind in (*kinds, *["full"] * bool(counts)):
        if kind != best.recompute:
            words = "no recompute" if kind == "none" else f"{kind} recompute"
            yield same._replace(field="activation_checkpointing", words=words, recompute=kind)


def _other_degrees(space: Space, best: Choice, same: Change) -> Iterator[Change]:
    """Yield other degrees of tensor, pipeline and context parallelism; replicas fill the GPUs."""
    now = Shape(best.tensor, best.pipeline, best.data, best.context)
    others = [("tensor", t, now._replace(tensor=t)) for t in space.tensors if t != now.tensor]
    pipelines = space.pipelines(now.tensor, now.context)
    others += [("pipeline", p, now._replace(pipeline=p)) for p in pipelines if p != now.pipeline]
    others += [("context", c, now._replace(context=c)) for c in space.contexts if c != now.context]
    for word, degree, (tensor, pipeline, _, context) in others:
        datas = space.datas(tensor, pipeline, context)
        if datas:
            yield same._replace(
                field=f"{word}_parallel_degree",
                words=f"{word} {degree}",
                shape=Shape(tensor, pipeline, datas[-1], context),
                sequence_parallel=best.sequence_parallel and tensor > 1,
                zero=best.zero if datas[-1] * context > 1 else 0,
                sharding=None,
            )


def _other_offloads(space: Space, best: Choice, same: Change) -> Iterator[Change]:
    """Yield the same strategy without offload, and the simplest other offload of each kind, where the strategy already offloads
    or is short of memory: whatever leaves a GPU with room to spare is slower."""
    if not best.offload.any and best.recompute == "none":
        return
    seen: set[tuple[bool, ...]] = set()
    for offload in space.offloads_of(best.zero, best.data * best.context):
        kind = offload.optimizer != "none", offload.parameters != "none", offload.activations != "none"
        if offload != best.offload and kind not in seen:
            seen.add(kind)
            yield same._replace(field="offload", words=offload_words(offload) or "no offload", offload=offload)


def settled(space: Space, fits: Fits, change: Change, best: Choice) -> Choice | None:
    """Return the fastest choice with a change that fits, or the one that is over by least; None where there is none."""
    options = list(_options(space, change, best)) or list(_options(space, change._replace(schedule=None), best))
    problem, found, found_s = space.problem, None, float("inf")
    for configuration, sharding in options:
        choice = _least_recomputed(space, fits, configuration, sharding, change)
        if choice is not None:
            step_s = problem.time(problem.strategy(choice)).step_s
            if step_s < found_s:
                found, found_s = choice, step_s
    if found is not None or not options:
        return found
    most = [_most_recomputed(space, *option, change) for option in options[:4]]
    return min(most, key=lambda choice: excess(problem.memory(problem.strategy(choice))))


def _options(space: Space, change: Change, best: Choice) -> Iterator[tuple[PipelineConfiguration, Sharding]]:
    """Yield the micro batches, schedules and shardings that a change leaves open."""
    for batch in space.batches(change.shape):
        if change.micro not in (None, batch.micro):
            continue
        for schedule, virtual in _schedules(batch, change):
            configuration = PipelineConfiguration(
                change.shape, change.sequence_parallel, batch.micro, schedule, virtual
            )
            for sharding in batch.shardings.get(change.zero, ()):
                if change.offload not in space.offloads_of(change.zero, change.shape.replicas):
                    continue
                kept = change.sharding in (None, (sharding.gather, sharding.reduce))
                if kept and (change.field != "micro_batch_size" or sharding.group == best.group):
                    yield configuration, sharding


def _schedules(batch: BatchOption, change: Change) -> list[tuple[Schedule, int]]:
    if change.schedule is None or change.shape.pipeline == 1:
        return list(batch.schedules[:1])
    return [change.schedule] if change.schedule in batch.schedules else []


def _least_recomputed(
    space: Space, fits: Fits, configuration: PipelineConfiguration, sharding: Sharding, change: Change
) -> Choice | None:
    """Return the choice that recomputes as little as fits; None where none fits."""
    kinds, counts = space.recomputes(configuration.shape.pipeline, configuration.virtual)
    for kind in kinds:
        if change.recompute in (None, kind):
            choice = point(configuration, sharding, change.offload, kind, space.layers_of(kind))
            if fits(choice):
                return choice
    if change.recompute not in (None, "full") or not counts:
        return None
    low, high, found = 0, len(counts) - 1, None
    if not fits(point(configuration, sharding, change.offload, "full", counts[high])):
        return None
    while low <= high:
        middle = (low + high) // 2
        choice = point(configuration, sharding, change.offload, "full", counts[middle])
        if fits(choice):
            found, high = choice, middle - 1
        else:
            low = middle + 1
    return found


def _most_recomputed(space: Space, configuration: PipelineConfiguration, sharding: Sharding, change: Change) -> Choice:
    kinds, counts = space.recomputes(configuration.shape.pipeline, configuration.virtual)
    if counts and change.recompute in (None, "full"):
        return point(configuration, sharding, change.offload, "full", counts[-1])
    kind = change.recompute or kinds[-1]
    return point(configuration, sharding, change.offload, kind, space.layers_of(kind))


def _alternative(solution: Solution, change: Change, choice: Choice, best: Choice) -> Alternative:
    problem = solution.problem
    strategy = problem.strategy(choice)
    price = problem.price(strategy)
    tokens = problem.global_batch_size * problem.sequence_length
    if price.memory.fits:
        because = f"{change.words} instead: {_compared(solution, choice, price, best)}"
    else:
        because = f"{change.words} instead: {formatted_excess(price.memory)}"
    return Alternative(
        changed=change.field,
        strategy=strategy,
        price=price,
        peak_bytes=price.memory.peak_bytes,
        tokens_per_second_per_gpu=tokens / price.time.step_s / strategy.num_gpus,
        fits=price.memory.fits,
        because=because,
    )


def _passed_over(solution: Solution, other: Solution) -> Alternative:
    """Return the strategy that the choice passed over, which was searched for it."""
    field, words = difference(solution, other)
    problem = solution.problem
    ours, theirs = (problem.key(one.price.time.step_s, one.strategy.num_gpus) for one in (solution, other))
    gain, better, worse = ours / theirs - 1, "faster", "slower"
    if problem.objective == "cheapest":
        better, worse = "cheaper", "dearer"
    speed = f"{gain:.1%} {better}, and less certain by more than that" if gain > 0 else f"{-gain:.1%} {worse}"
    return Alternative(
        changed=field,
        strategy=other.strategy,
        price=other.price,
        peak_bytes=other.price.memory.peak_bytes,
        tokens_per_second_per_gpu=other.tokens_per_second_per_gpu,
        fits=True,
        because=f"{words} instead: {speed}",
    )


def _compared(solution: Solution, choice: Choice, price: Price, best: Choice) -> str:
    """Return how much slower a choice is and how much more it holds, and which part of its step grew most."""
    chosen, slower = solution.price, price.time.step_s / solution.price.time.step_s - 1
    more = (price.memory.peak_bytes - chosen.memory.peak_bytes) / GIB
    held = f", {abs(more):.1f} GiB {'more' if more > 0 else 'less'}" if abs(more) >= 0.05 else ""
    if choice.num_gpus != best.num_gpus:
        return f"{choice.num_gpus} GPUs, {price.time.step_s:.3g} s a step{held}"
    if slower < -AS_FAST:
        return f"{-slower:.1%} faster{held}, and less certain by more than that or missing a target"
    if slower < AS_FAST:
        return f"as fast{held}{', and less simple' if simplicity(choice) > simplicity(best) else ''}"
    return f"{slower:.1%} slower{held}{_grown(chosen, price, choice)}"


_PARTS = {
    "compute_s": "smaller or fewer products",
    "recompute_s": "forward again",
    "tensor_parallel_s": "tensor messages",
    "context_parallel_s": "waiting for keys and values",
    "data_parallel_exposed_s": "waiting for replicas",
    "pipeline_bubble_s": "bubble",
    "pipeline_transfer_s": "pipeline transfers",
    "offload_s": "host link and host optimizer",
    "optimizer_s": "optimizer",
}
"""Parts of a step, in words."""


def _grown(chosen: Price, price: Price, choice: Choice) -> str:
    grown = {name: getattr(price.time, name) - getattr(chosen.time, name) for name in _PARTS}
    name = max(grown, key=lambda part: grown[part])
    if grown[name] <= 0:
        return ""
    share = getattr(price.time, name) / price.time.step_s
    if share < TELLING_PART:
        return ""
    micro = f"micro batch {choice.micro}, " if name == "compute_s" else ""
    return f"; {micro}{_PARTS[name]} {share:.0%} of the step"


def difference(solution: Solution, other: Solution) -> tuple[str, str]:
    """(the field, words) in which another solution differs most tellingly: offload, then schedule, then sharding."""
    ours, theirs = solution.strategy, other.strategy
    if ours.offload != theirs.offload:
        return "offload", offload_words(theirs.offload) or "no offload"
    words = choices_told(theirs)
    if (ours.pipeline_schedule, ours.num_virtual_stages) != (theirs.pipeline_schedule, theirs.num_virtual_stages):
        return "pipeline_schedule", words["schedule"]
    return "zero_stage", f"ZeRO {theirs.zero_stage} with {all_degrees_told(theirs)}"
