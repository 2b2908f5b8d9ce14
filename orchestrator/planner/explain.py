"""Why: what a plan's reader should know, why the others lost, what would fit, what a slower link would change. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from clusters.cluster import weaker_links
from orchestrator.planner.confidence import choose, error_of, wider_by
from orchestrator.planner.problem import Choice, Problem
from orchestrator.planner.render import offload_told
from orchestrator.planner.result import Found, SearchResult, Wanted, told_excess
from orchestrator.planner.search.candidates import Shape, simplicity
from orchestrator.planner.search.solve import SLOWER, Refused, Solution, ask
from strategies.price.step_time import Price
from strategies.rooms import without_effect
from strategies.strategy import Offload, Strategy

TOO_LARGE_PART = 4
"""One alternative in so many may be a family that does not fit; the others are strategies that could run."""
AS_FAST = 0.005
"""Slower by less is told as no slower: no model of a step is that good."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Loser:
    """A family's best, and the one reason that it was not taken."""

    strategy: Strategy
    price: Price
    peak_bytes: int
    tokens_per_second_per_gpu: float
    fits: bool
    because: str


def notes(solution: Solution) -> list[str]:
    """Idle GPUs, padding, uneven stages, tensor groups across nodes, settings without effect."""
    return [*_notes(solution)]


def _notes(solution: Solution) -> Iterator[str]:
    strategy, problem = solution.strategy, solution.problem
    yield from problem.cluster.notes
    engine = problem.engine
    if engine.speed_error:
        yield (
            f"engine {strategy.engine} is priced as {engine.semantics}: bytes may be {engine.memory_error:.0%} off or more, "
            f"seconds {engine.speed_error:.0%}"
        )
    idle = problem.cluster.num_gpus - strategy.num_gpus
    if idle:
        yield f"{idle} of {problem.cluster.num_gpus} GPUs stay idle: {_why_idle(problem, strategy)}"
    slots = strategy.micro_batch_size * strategy.gradient_accumulation_steps * strategy.data_parallel_degree
    if slots > problem.global_batch_size:
        yield (
            f"the batch of {problem.global_batch_size} does not divide: {slots - problem.global_batch_size} of {slots} places in "
            "a step's micro batches stay empty"
        )
    layers = {stage.num_layers for stage in strategy.stages}
    if len(layers) > 1:
        yield f"pipeline stages hold {min(layers)} to {max(layers)} layers"
    if strategy.tensor_parallel_degree * strategy.degrees.stride("tensor") > problem.cluster.gpus_per_node:
        yield f"a tensor group of {strategy.tensor_parallel_degree} leaves its node"
    kv_heads = problem.arch.num_kv_heads
    if strategy.tensor_parallel_degree > kv_heads:
        yield f"{kv_heads} key and value heads are copied to a tensor group of {strategy.tensor_parallel_degree}"
    if problem.arch.vocab_size % strategy.tensor_parallel_degree:
        yield f"the vocabulary of {problem.arch.vocab_size} is padded to a multiple of {strategy.tensor_parallel_degree}"
    if problem.pins.get("num_checkpointed_layers_per_stage", 0) > max(layers):
        yield f"a stage has {max(layers)} layers at most: all of them are computed again"
    for rule in without_effect(strategy):
        yield rule.formatted(strategy)
    if solution.passed_over is not None:
        yield from _other_offload(solution, solution.passed_over)


def _other_offload(solution: Solution, other: Solution) -> Iterator[str]:
    """What another choice of offload would change, and how much of that the stated errors cover."""
    ratio = other.tokens_per_second_per_gpu / solution.tokens_per_second_per_gpu
    if other.strategy.offload.any:
        yield (
            f"{offload_told(other.strategy.offload)} is predicted {ratio - 1:.1%} faster, which is inside the "
            f"{wider_by(other, solution):.0%} by which plans with offload are less certain, since no published run anchors them; "
            "it is taken where `offload:` pins it"
        )
    elif 1 - ratio <= error_of(solution):
        yield (
            f"without offload, which no published run anchors: {other.tokens_per_second_per_gpu:,.0f} tokens/s/GPU "
            f"± {error_of(other):.0%}, {1 - ratio:.1%} slower; `offload: none` asks for it"
        )


def _why_idle(problem: Problem, strategy: Strategy) -> str:
    product = strategy.tensor_parallel_degree * strategy.pipeline_parallel_degree
    if "data_parallel_degree" in problem.pins and product * (strategy.data_parallel_degree + 1) <= problem.num_gpus:
        return "the pinned degrees use fewer"
    if strategy.data_parallel_degree >= problem.global_batch_size:
        return f"a batch of {problem.global_batch_size} has work for no more replicas"
    if problem.objective != "fastest":
        return f"more would not be {'cheaper a token' if problem.objective == 'cheapest' else 'fewer'}"
    if product * (strategy.data_parallel_degree + 1) <= problem.num_gpus:
        return "more would not save a micro batch, or would miss a target"
    return f"they do not make another replica of {product}"


# Losers ---------------------------------------------------------------------------------------------------------------


def losers(solution: Solution, *, limit: int) -> list[Loser]:
    """The best of each other family, fastest first; among them the nearest families that would need more memory."""
    found = solution.search
    if found is None or found.best is None or limit < 1:
        return []
    others = [family for family in found.families if family.choice != found.best.choice]
    rows = [_larger(solution, other) for other in _closest(solution, found, max(1, limit // TOO_LARGE_PART))]
    rows += [_slower(solution, other) for other in others[: limit - len(rows)]]
    rows.sort(key=lambda row: -row.tokens_per_second_per_gpu)
    return rows


def _slower(solution: Solution, found: Found) -> Loser:
    strategy = solution.problem.strategy(found.choice)
    price = solution.problem.price(strategy)
    return _loser(solution, strategy, price, True, _because(solution, strategy, price))


def _larger(solution: Solution, choice: Choice) -> Loser:
    """What does not fit, with the chosen strategy's other fields where it has the same degrees: "the same, with ZeRO 1"."""
    best = solution.search.best if solution.search else None
    if best is not None and choice[:3] == best.choice[:3]:
        same = ("sequence_parallel", "schedule", "virtual", "micro", "recompute", "layers")
        choice = choice._replace(**{name: getattr(best.choice, name) for name in same})
    strategy = solution.problem.strategy(choice)
    price = solution.problem.price(strategy)
    away = f", {offload_told(strategy.offload)}" if strategy.offload.any else ""
    return _loser(solution, strategy, price, False, f"ZeRO {strategy.zero_stage}{away}: {told_excess(price.memory)}")


def _closest(solution: Solution, found: SearchResult, limit: int) -> list[Choice]:
    """Of what was too large, the families that look most like the chosen one: the same degrees, then the nearest ZeRO stage. Each
    by its smallest member."""
    chosen = solution.strategy
    degrees = chosen.tensor_parallel_degree, chosen.pipeline_parallel_degree
    rows: dict[Any, Choice] = {}

    def distance(family: tuple[Shape, int, Offload]) -> tuple[int, int, bool]:
        shape, zero, offload = family
        apart = abs(shape.tensor - degrees[0]) + abs(shape.pipeline - degrees[1])
        return apart, abs(zero - chosen.zero_stage), offload != chosen.offload

    for shape, zero, offload in sorted(found.too_large, key=distance):
        key = shape.tensor, shape.pipeline, zero, offload
        if key not in rows and len(rows) < limit:
            rows[key] = found.bounds.smallest(shape, zero, offload)[0]
    return list(rows.values())


def _loser(solution: Solution, strategy: Strategy, price: Price, fits: bool, because: str) -> Loser:
    tokens = solution.problem.global_batch_size * solution.problem.sequence_length
    return Loser(
        strategy=strategy,
        price=price,
        peak_bytes=price.memory.peak_bytes,
        tokens_per_second_per_gpu=tokens / price.time.step_s / strategy.num_gpus,
        fits=fits,
        because=because,
    )


def _because(solution: Solution, strategy: Strategy, price: Price) -> str:
    """The part of the step that grew most against the chosen strategy, as a share of the loser's own step."""
    best, step_s = solution.price.time, price.time.step_s
    parts = {
        "offload_s": (offload_told(strategy.offload), "host link and host optimizer"),
        "pipeline_bubble_s": (f"pipeline {strategy.pipeline_parallel_degree}", "bubble"),
        "tensor_parallel_s": (f"tensor {strategy.tensor_parallel_degree}", "messages"),
        "data_parallel_exposed_s": (
            f"ZeRO {strategy.zero_stage} over {strategy.data_parallel_degree}",
            "waiting for replicas",
        ),
        "recompute_s": (f"{strategy.activation_checkpointing} recompute", "forward again"),
        "pipeline_transfer_s": (f"pipeline {strategy.pipeline_parallel_degree}", "transfers"),
        "optimizer_s": (f"ZeRO {strategy.zero_stage}", "optimizer"),
    }
    if strategy.offload.any and step_s < best.step_s:
        return f"{offload_told(strategy.offload)}: {best.step_s / step_s - 1:.1%} faster, and less certain by more than that"
    grown = {name: getattr(price.time, name) - getattr(best, name) for name in parts}
    name = max(grown, key=lambda part: grown[part])
    more, slower = price.time.compute_s - best.compute_s, step_s / best.step_s - 1
    if max(more, grown[name]) <= 0 or slower < AS_FAST:
        if strategy.num_gpus != solution.strategy.num_gpus:
            return f"{strategy.num_gpus} GPUs, {step_s:.3g} s a step"
        return "as fast, and less simple" if slower < 0.0005 else f"{slower:.1%} slower, and less simple"
    if more > grown[name]:
        return f"{_why_longer(solution.strategy, strategy)}: compute {more / best.compute_s:.1%} longer, step {slower:.1%} slower"
    what, how = parts[name]
    return f"{what}: {how} {getattr(price.time, name) / step_s:.0%} of the step, {slower:.1%} slower"


def _why_longer(chosen: Strategy, strategy: Strategy) -> str:
    """What makes the products of a strategy take longer."""
    if strategy.num_gpus < chosen.num_gpus:
        return f"{chosen.num_gpus - strategy.num_gpus} more GPUs idle"
    if strategy.micro_batch_size < chosen.micro_batch_size:
        return f"micro batch {strategy.micro_batch_size}, smaller products"
    if strategy.tensor_parallel_degree > chosen.tensor_parallel_degree:
        return f"tensor {strategy.tensor_parallel_degree}, smaller products"
    if strategy.pipeline_parallel_degree > chosen.pipeline_parallel_degree:
        return f"pipeline {strategy.pipeline_parallel_degree}, a slowest stage with more work"
    places = strategy.micro_batch_size * strategy.gradient_accumulation_steps * strategy.data_parallel_degree
    return (
        f"micro batch {strategy.micro_batch_size} x {strategy.gradient_accumulation_steps}, {places} places in a step"
    )


# What would fit -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Nearest:
    """What would make a job fit."""

    rows: list[dict[str, Any]]
    """The changes, each planned: fewest GPUs first, then the fastest."""
    refused: list[str]
    """Changes that break a rule of what is pinned, each with the rule."""


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
        found = ask(choose, problem)
        if isinstance(found, Refused):
            refused = refused or [f"{change}: {found.reason}"]
        elif found.fits:
            return Nearest([_near(change, found)], [])
    return Nearest([], refused)


def _near(change: str, found: Solution) -> dict[str, Any]:
    from orchestrator.planner.document import strategy_dict

    return {
        "change": change,
        "num_gpus": found.strategy.num_gpus,
        "sequence_length": found.problem.sequence_length,
        "strategy": strategy_dict(found.strategy, stages=False),
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


# Sensitivity ----------------------------------------------------------------------------------------------------------


def sensitivity(solution: Solution, *, wanted: Wanted | None = None) -> list[dict[str, Any]]:
    """What would be picked if a link had 10 % less bandwidth than stated, and what the plan would then lose by not changing.

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
            return missed, asked.key(step_s, choice.num_gpus), simplicity(choice), step_s

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
