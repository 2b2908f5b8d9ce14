"""A plan as text that a person enjoys: plain lines with bars, 80 to 100 columns, colours by ANSI codes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from orchestrator.planner.plan import Plan
from orchestrator.planner.reasons.alternatives import Alternative
from orchestrator.planner.show.words import (
    BOLD,
    COMPONENTS,
    DIM,
    GREEN,
    MARGIN,
    RED,
    TIMES,
    YELLOW,
    all_degrees_told,
    bar,
    between_told,
    bytes_told,
    cases_told,
    choices_told,
    met_by,
    painted,
    probability_told,
    rate_told,
    seconds_told,
    sensitivity_told,
    stacked,
    strategy_told,
    target_told,
    wrapped,
)
from strategies.zero.cost import sharding_words


def render(plan: Plan, *, width: int = 88, sensitivity: bool = False) -> str:
    """The plan as text."""
    width = max(80, min(100, width))
    sections = [
        _headline(plan),
        _section("strategy", _strategy(plan)),
        _section("memory", _memory(plan, width)),
        _section("models", _models(plan)),
        _section("trace", _trace(plan)),
        _section("step", _time(plan, width)),
        _section("speed", _speed(plan)),
        _section("cost", _cost(plan)),
        _section("targets", _targets(plan)),
        _section("others", _alternatives(plan.alternatives, width)),
        _section(
            "slower", _lines(sensitivity_told(plan.sensitivity, plan.price.time.step_s) if sensitivity else [], width)
        ),
        _section("would fit", _nearest(plan, width)),
        _section("notes", _lines(plan.notes, width)),
        _section("search", _search(plan)),
    ]
    return "\n".join(section for section in sections if section)


def _section(name: str, lines: Iterable[str]) -> str:
    rows = list(lines)
    if not rows:
        return ""
    first, *rest = rows
    return "\n".join([f"  {painted(f'{name:<{MARGIN - 2}}', BOLD)}{first}", *(f"{'':{MARGIN}}{line}" for line in rest)])


def _lines(texts: Iterable[str], width: int) -> Iterator[str]:
    for text in texts:
        yield from wrapped(text, width - MARGIN - 2)


def _headline(plan: Plan) -> str:
    cluster, problem = plan.cluster, plan.solution.problem
    if not plan.fits:
        verdict = painted("does not fit", RED)
    elif not plan.targets_met:
        verdict = painted("fits, and misses a target", YELLOW)
    else:
        verdict = painted("fits", GREEN)
    name = problem.arch.name or f"{problem.work.num_parameters / 1e6:,.0f}M {problem.arch.family}"
    many = f"{cluster.num_nodes} x {cluster.gpus_per_node} " if cluster.num_gpus > 1 else ""
    return f"{painted(plan.job.name, BOLD)}: {name} on {many}{cluster.accelerator.name}: {verdict}\n"


def _strategy(plan: Plan) -> Iterator[str]:
    s, problem = plan.strategy, plan.solution.problem
    degrees = all_degrees_told(s)
    yield painted(f"{degrees} = {s.num_gpus} {'GPU' if s.num_gpus == 1 else 'GPUs'}", BOLD)
    words = choices_told(s)
    recompute = words["recompute"] or "no recompute"
    choices = [sharding_words(s), f"states {s.states}", recompute, words["tensor"]]
    yield ", ".join(choice for choice in choices if choice)
    yield from (words[name] for name in ("schedule", "offload") if words[name])
    yield (
        f"micro batch {s.micro_batch_size} x {s.gradient_accumulation_steps} a step x {s.degrees.data} "
        f"replica{'s' * (s.degrees.data > 1)} "
        f"= {problem.global_batch_size:,} sequences of {problem.sequence_length:,}"
    )


def _models(plan: Plan) -> Iterator[str]:
    """Yield what each model of task ppo is, and what a step with all of them holds and takes."""
    if plan.ppo is None:
        return
    for role in plan.ppo.roles:
        yield f"{role['role']:<10} {role['model']:<16} {bytes_told(role['bytes']):>11}  {role['strategy']}"
    over = plan.ppo.peak_bytes - plan.ppo.usable_bytes
    phase = max(plan.ppo.phases, key=lambda name: plan.ppo.phases[name] if plan.ppo else 0).replace("_", " ")
    verdict = painted(f"{bytes_told(over)} over", RED) if over > 0 else f"{bytes_told(-over)} free"
    yield f"together {bytes_told(plan.ppo.peak_bytes)} a GPU, in {phase}; {verdict}"
    parts = ", ".join(f"{name.replace('_', ' ')} {seconds_told(s)}" for name, s in plan.ppo.seconds.items() if s)
    yield f"a step takes {seconds_told(plan.ppo.step_s)}: {parts}"


def _memory(plan: Plan, width: int) -> Iterator[str]:
    memory = plan.price.memory
    stage = memory.stages.fullest()
    where = f" on pipeline rank {stage.pipeline_rank}" if len(memory.stages) > 1 else ""
    budget = memory.usable_bytes
    over = stage.peak_bytes - budget
    verdict = painted(f"{bytes_told(over)} over", RED) if over > 0 else f"{bytes_told(-over)} free"
    yield f"{bytes_told(stage.peak_bytes)} of {bytes_told(budget)} a GPU{where}, in {stage.peak_phase}; {verdict}"
    yield f"fits in {probability_told(plan.confidence['fits_probability'])} cases"
    columns = width - MARGIN - 2
    yield stacked([(getattr(stage, name), code) for name, code in COMPONENTS], budget, columns - (5 if over > 0 else 0))
    for name, code in COMPONENTS:
        value = getattr(stage, name)
        if value:
            share = painted(bar(value, budget, columns - 36), code)
            yield f"{name.replace('_', ' '):<22} {bytes_told(value):>11}  {share}"
    for name, used, usable in (
        ("host memory", memory.host_bytes_per_node, memory.host_usable_bytes),
        ("NVMe", memory.nvme_bytes_per_node, memory.nvme_usable_bytes),
    ):
        if used > usable or (used and plan.strategy.offload.any):
            text = f"{bytes_told(used)} of {bytes_told(usable)} of each node's {name}"
            yield painted(text, RED) if used > usable else text


def _trace(plan: Plan) -> list[str]:
    return [] if plan.trace is None else trace_told(plan.trace)


def trace_told(trace: dict[str, Any]) -> list[str]:
    """The trace for a person, beside the closed form."""
    if not trace["built"]:
        return [f"not traced: {trace['reason']}", f"closed form {bytes_told(trace['closed_form_bytes'])} of tensors"]
    closed, found = trace["closed_form_bytes"], trace["tensor_peak_bytes"]
    many = trace["num_micro_batches_traced"]
    lines = [
        f"tensors: traced {bytes_told(found)} in {trace['peak_phase']}, closed form {bytes_told(closed)} "
        f"({closed / found - 1:+.1%}); the plan holds the larger",
        *(
            f"  {name.replace('_', ' '):<22} {bytes_told(size):>11}"
            for name, size in sorted(trace["components"].items(), key=lambda item: -item[1])
        ),
        f"{trace['flops'] / 1e12:,.2f} TFLOP a rank in {many} micro batch{'es' * (many > 1)}, recompute included",
    ]
    lines += [f"{kind.replace('_', ' ')}: {bytes_told(size)}" for kind, size in trace["collective_bytes"].items()]
    lines += [f"{place}: {bytes_told(size)}" for place, size in trace["away"].items() if size]
    if len(trace["stages"]) > 1:
        lines[0] = f"pipeline rank {trace['pipeline_rank']}: {lines[0]}"
        lines += [
            f"pipeline rank {stage['pipeline_rank']}: traced {bytes_told(stage['tensor_peak_bytes'])}, "
            f"closed form {bytes_told(stage['closed_form_bytes'])}"
            for stage in trace["stages"]
            if stage["pipeline_rank"] != trace["pipeline_rank"]
        ]
    depths = " and ".join(map(str, trace["num_layers_traced"]))
    return [*lines, f"played at {depths} layers in {trace['seconds']:.1f} s"]


def _time(plan: Plan, width: int) -> Iterator[str]:
    time = plan.price.time
    yield f"{seconds_told(time.step_s)} for {plan.job.tokens_per_step:,} tokens"
    columns = width - MARGIN - 2
    yield stacked([(getattr(time, part.name), part.code) for part in TIMES], time.step_s, columns)
    for name, label, code, _ in TIMES:
        value = getattr(time, name)
        if value > 0.0005 * time.step_s:
            share = painted(bar(value, time.step_s, columns - 46), code)
            yield f"{label:<26} {seconds_told(value):>9}  {value / time.step_s:>5.1%}  {share}"


def _speed(plan: Plan) -> Iterator[str]:
    rates, known = plan.throughput, plan.confidence
    speed = rates["tokens_per_second_per_gpu"]
    ends = [known[f"tokens_per_second_per_gpu_{end}"] for end in ("low", "high")]
    yield (
        painted(f"{rate_told(speed)} tokens/s/GPU", BOLD)
        + f", {between_told(*ends)} in {cases_told(known['coverage'])}"
    )
    learned = plan.cluster.calibration
    if learned is not None and learned.throughput_ratio is not None and not ends[0] <= speed <= ends[1]:
        runs = "the finished run" if learned.num_runs == 1 else f"the {learned.num_runs} finished runs"
        yield f"{runs} here reached {learned.throughput_ratio:.0%} of what was planned, which moves those cases"
    yield (
        f"{rate_told(rates['tokens_per_second'])} tokens/s, MFU {rates['mfu']:.1%}"
        + (f", HFU {rates['hfu']:.1%}" if rates["hfu"] > rates["mfu"] else "")
    )


def _cost(plan: Plan) -> Iterator[str]:
    cost, steps = plan.cost, plan.job.num_steps
    if not steps or cost["wall_s"] is None or cost["gpu_hours"] is None:
        return
    usd = cost["usd"]
    price = f", ${usd:,.2f}" if usd is not None and usd < 100 else f", ${usd:,.0f}" if usd is not None else ""
    tokens = plan.job.tokens_total or 0
    gpu_hours = f"{cost['gpu_hours']:,.0f}" if cost["gpu_hours"] >= 10 else f"{cost['gpu_hours']:.2f}"
    kind = "GPU" if plan.cluster.accelerator.kind == "cuda" else "core"
    yield f"{steps:,} steps, {tokens:,} tokens: {seconds_told(cost['wall_s'])}, {gpu_hours} {kind}-hours{price}"


def _targets(plan: Plan) -> Iterator[str]:
    for row in plan.targets:
        text = f"{row['name']}: wanted {target_told(row['name'], row['wanted'])}, gets {target_told(row['name'], row['got'])}"
        yield painted(f"met     {text}", GREEN) if row["met"] else painted(f"missed  {text}", RED)
        if not row["met"]:
            yield from (f"        {line}" for line in wrapped(met_by(row), 66))


def _alternatives(alternatives: Sequence[Alternative], width: int) -> Iterator[str]:
    for alternative in alternatives:
        speed = f"{rate_told(alternative.tokens_per_second_per_gpu):>8} tokens/s/GPU"
        verdict = "" if alternative.fits else painted(" too large", RED)
        yield f"{speed}, {bytes_told(alternative.peak_bytes)}{verdict}"
        for line in wrapped(strategy_told(alternative.strategy), width - MARGIN - 11):
            yield f"{'':8} {line}"
        for line in wrapped(alternative.because, width - MARGIN - 11):
            yield painted(f"{'':8} {line}", DIM)


def _nearest(plan: Plan, width: int) -> Iterator[str]:
    for row in plan.nearest:
        yield (
            f"{row['change']}: {bytes_told(row['peak_bytes'])} on {row['num_gpus']} GPUs, "
            f"{rate_told(row['tokens_per_second_per_gpu'])} tokens/s/GPU"
        )
    for reason in plan.nearest_refused:
        yield from wrapped(f"no answer for {reason}", width - MARGIN - 2)
    if not plan.fits and not plan.nearest:
        yield f"nothing tried does: not fewer tokens a sequence, not offload, not {16384:,} GPUs"


def _search(plan: Plan) -> Iterator[str]:
    found = plan.search
    if found is not None:
        yield painted(
            f"{found.num_candidates:,} candidates, {found.num_priced:,} priced, the rest rejected by bounds; "
            f"{seconds_told(found.seconds + found.alternatives_seconds)}",
            DIM,
        )
