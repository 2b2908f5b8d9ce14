"""Notes for the reader of a plan: idle GPUs, padding, settings without effect, another choice of offload. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.planner.problem import Problem
from orchestrator.planner.reasons.alternatives import Alternative, difference
from orchestrator.planner.reasons.choice import demanded, gain, minutes_to_tell
from orchestrator.planner.reasons.confidence import error_of
from orchestrator.planner.search.anchors import unanchored
from orchestrator.planner.search.likely import fits_probability
from orchestrator.planner.search.solve import Solution
from orchestrator.planner.show.words import probability_told
from strategies.rooms import without_effect
from strategies.strategy import Strategy
from strategies.zero.eight_bit import fraction

FULL, SURE = 0.97, 0.99
"""Part of the usable memory from which on, and probability to fit below which, a plan is tight."""
STEP_DOWN = 0.97
"""Part of a tight plan's peak that a step down holds at most."""


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
    if problem.lora is not None:
        lora = problem.lora
        yield (
            f"LoRA of rank {lora.rank} on {', '.join(lora.targets)}: {problem.work.trains.num_parameters:,} of "
            f"{problem.work.num_parameters:,} parameters are trained"
        )
    if problem.eight_bit:
        part = fraction(problem.work, 0, False, False)
        yield f"8-bit moments of {part:.1%} of the trained parameters, 32-bit ones of the rest: vectors and small matrices"
    idle = problem.cluster.num_gpus - strategy.num_gpus
    if idle:
        yield f"{idle} of {problem.cluster.num_gpus} GPUs stay idle: {_why_idle(problem, strategy)}"
    slots = strategy.micro_batch_size * strategy.gradient_accumulation_steps * strategy.degrees.data
    if slots > problem.global_batch_size:
        yield (
            f"the batch of {problem.global_batch_size} does not divide: {slots - problem.global_batch_size} of {slots} places in "
            "a step's micro batches stay empty"
        )
    layers = {stage.num_layers for stage in strategy.stages}
    if len(layers) > 1:
        yield f"pipeline stages hold {min(layers)} to {max(layers)} layers"
    if strategy.degrees.tensor * strategy.degrees.stride("tensor") > problem.cluster.gpus_per_node:
        yield f"a tensor group of {strategy.degrees.tensor} leaves its node"
    if problem.is_published:
        yield (
            f"`fused_norm` describes another stack: bytes and messages are those of stacks that published runs of family "
            f"{problem.arch.family}, not those of the module that trains here; leave fused_norm out for these"
        )
    kv_heads = problem.arch.num_kv_heads
    if strategy.degrees.tensor > kv_heads:
        yield f"{kv_heads} key and value heads are copied to a tensor group of {strategy.degrees.tensor}"
    if problem.arch.vocab_size % strategy.degrees.tensor:
        yield f"the vocabulary of {problem.arch.vocab_size} is padded to a multiple of {strategy.degrees.tensor}"
    if problem.pins.get("num_checkpointed_layers_per_stage", 0) > max(layers):
        yield f"a stage has {max(layers)} layers at most: all of them are computed again"
    for rule in without_effect(strategy):
        yield rule.formatted(strategy)
    if solution.passed_over is not None:
        yield from _passed_over(solution, solution.passed_over)


def _passed_over(solution: Solution, other: Solution) -> Iterator[str]:
    """Yield what a bolder strategy would gain if it holds, and what would settle it; or what it costs to offload nothing."""
    _, words = difference(solution, other)
    if (faster := gain(solution, other)) > 0:
        lacking = ", ".join(unanchored(other.strategy))
        minutes = minutes_to_tell(solution, other)
        yield (
            f"{words} is predicted {faster:.1%} better; no published run anchors its {lacking}, so it is taken from a gain of "
            f"{demanded(solution, other):.0%} on; runs of both for {minutes} minutes would settle it, pins take it"
        )
    elif -faster <= error_of(solution):
        yield (
            f"without offload, which no published run anchors: {other.tokens_per_second_per_gpu:,.0f} tokens/s/GPU "
            f"± {error_of(other):.0%}, {-faster:.1%} slower; `offload: none` asks for it"
        )


def tight_notes(solution: Solution, others: Sequence[Alternative]) -> list[str]:
    """Return the note that a plan is tight, with the first step down: the fastest alternative that leaves more room."""
    memory = solution.price.memory
    probability, source = fits_probability(solution.problem, memory)
    if not memory.fits or (probability >= SURE and memory.peak_bytes <= FULL * memory.usable_bytes):
        return []
    roomy = [one for one in others if one.fits and one.peak_bytes <= STEP_DOWN * memory.peak_bytes]
    down = max(roomy, key=lambda one: one.tokens_per_second_per_gpu, default=None)
    told = f"; first step down: {down.because}" if down else ""
    return [
        f"tight: {memory.peak_bytes / memory.usable_bytes:.0%} of the usable memory, fits in {probability_told(probability)} "
        f"cases by {source}{told}"
    ]


def _why_idle(problem: Problem, strategy: Strategy) -> str:
    product = strategy.degrees.tensor * strategy.degrees.pipeline * strategy.degrees.context
    if "data_parallel_degree" in problem.pins and product * (strategy.degrees.data + 1) <= problem.num_gpus:
        return "the pinned degrees use fewer"
    if strategy.degrees.data >= problem.global_batch_size:
        return f"a batch of {problem.global_batch_size} has work for no more replicas"
    if problem.objective != "fastest":
        return f"more would not be {'cheaper a token' if problem.objective == 'cheapest' else 'fewer'}"
    if product * (strategy.degrees.data + 1) <= problem.num_gpus:
        return "more would not save a micro batch, or would miss a target"
    return f"they do not make another replica of {product}"
