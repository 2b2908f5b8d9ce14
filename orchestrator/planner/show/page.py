"""A plan as one page that opens offline: hand-written SVG, no request to anywhere."""

from __future__ import annotations

from html import escape
from pathlib import Path

from orchestrator.planner.plan import Plan
from orchestrator.planner.show import charts
from orchestrator.planner.show.formulas import headline_formulas, memory_formulas, time_formulas
from orchestrator.planner.show.frame import both, formula_list, html_document, number, section
from orchestrator.planner.show.words import (
    COMPONENTS,
    TIMES,
    all_degrees_told,
    between_told,
    bytes_told,
    cases_told,
    choices_told,
    met_by,
    probability_told,
    rate_told,
    seconds_told,
    sensitivity_told,
    strategy_told,
    target_told,
)
from strategies.pipeline.timeline import timeline
from strategies.zero.cost import sharding_words

GIB = 2**30
MOST_BARS = 40
"""Pipeline ranks drawn; of more, the first, the last and the fullest stay."""
COLOURS = dict(
    zip(
        [name for name, _ in COMPONENTS],
        (
            "parameters",
            "gathered",
            "master",
            "gradients",
            "optimizer",
            "activations",
            "logits",
            "buffers",
            "temporary",
            "reserve",
        ),
        strict=True,
    )
) | {part.name: part.colour for part in TIMES}


def write_page(plan: Plan, path: str | Path) -> None:
    """Writes the plan's page."""
    Path(path).write_text(page(plan), encoding="utf-8")


def page(plan: Plan) -> str:
    """The plan's page."""
    problem = plan.solution.problem
    name = problem.arch.name or f"{problem.work.num_parameters / 1e6:,.0f}M {problem.arch.family}"
    where = f"{plan.cluster.num_nodes} x {plan.cluster.gpus_per_node} {plan.cluster.accelerator.name}"
    if not plan.fits:
        verdict = '<span class="bad">does not fit</span>'
    else:
        verdict = '<span class="good">fits</span>' if plan.targets_met else '<span class="bad">misses a target</span>'
    sections = [
        _summary(plan),
        _memory(plan),
        _time(plan),
        _schedule(plan),
        _frontier(plan),
        _alternatives(plan),
        _nearest(plan),
        _targets(plan),
        _sensitivity(plan),
        _notes(plan),
    ]
    heading = f"{escape(plan.job.name)}: {escape(name)} on {escape(where)} {verdict}"
    return html_document(f"{plan.job.name}: plan", heading, "".join(part for part in sections if part))


def _summary(plan: Plan) -> str:
    rates, cost, formulas, s = plan.throughput, plan.cost, headline_formulas(plan), plan.strategy
    peak, known = plan.price.memory.peak_bytes, plan.confidence
    numbers = [
        number(rate_told(rates["tokens_per_second_per_gpu"]), "tokens/s/GPU", formulas["speed"]),
        number(
            between_told(known["tokens_per_second_per_gpu_low"], known["tokens_per_second_per_gpu_high"]),
            f"tokens/s/GPU in {cases_told(known['coverage'])}",
            formulas["error"],
        ),
        number(f"{rates['mfu']:.1%}", "MFU", formulas["mfu"]),
        number(bytes_told(peak), f"of {bytes_told(plan.price.memory.usable_bytes)} a GPU", formulas["peak"]),
        number(probability_told(known["fits_probability"]), "cases fit", f"rests on {known['fits_source']}"),
    ]
    if rates["hfu"] > rates["mfu"]:
        numbers.insert(3, number(f"{rates['hfu']:.1%}", "HFU", formulas["hfu"]))
    if cost["wall_s"] is not None:
        numbers.append(number(seconds_told(cost["wall_s"]), f"{plan.job.num_steps:,} steps", formulas["wall"]))
    if cost["usd"] is not None:
        numbers.append(number(f"${cost['usd']:,.0f}", f"{cost['gpu_hours']:,.0f} GPU-hours", formulas["usd"]))
    words = choices_told(s)
    choices = [
        f"{all_degrees_told(s)} = {s.num_gpus} GPUs",
        sharding_words(s),
        words["schedule"],
        words["recompute"] or "no recompute",
        words["tensor"],
        words["offload"],
        f"micro batch {s.micro_batch_size} x {s.gradient_accumulation_steps} a step",
    ]
    body = f'<div class="numbers">{"".join(numbers)}</div>'
    return f"<section><p>{escape('; '.join(choice for choice in choices if choice))}</p>{body}</section>"


def _memory(plan: Plan) -> str:
    memory, formulas = plan.price.memory, memory_formulas(plan)
    fullest = memory.stages.fullest()
    keep = {0, len(memory.stages) - 1, fullest.pipeline_rank}
    stages = [
        s
        for s in memory.stages
        if len(memory.stages) <= MOST_BARS or s.pipeline_rank in keep or s.pipeline_rank % 4 == 0
    ]
    rows = []
    for stage in stages:
        parts = [
            (name, getattr(stage, name) / GIB, f"f-{COLOURS[name]}", f"{name}: {bytes_told(getattr(stage, name))}")
            for name, _ in COMPONENTS
        ]
        rows.append((f"rank {stage.pipeline_rank}" if len(memory.stages) > 1 else "every GPU", parts))
    chart = both(
        lambda width: charts.stacked_bars(
            rows,
            limit=memory.usable_bytes / GIB,
            limit_label=f"budget {memory.usable_bytes / GIB:.1f} GiB",
            total_label=[f"{stage.peak_bytes / GIB:.1f} GiB" for stage in stages],
            label="memory of each pipeline rank against the budget",
            width=width,
        )
    )
    listed = formula_list(
        (COLOURS[name], name.replace("_", " "), bytes_told(getattr(fullest, name)), formulas[name])
        for name, _ in COMPONENTS
        if getattr(fullest, name)
    )
    host = ""
    if plan.strategy.offload.any:
        of = bytes_told(memory.host_usable_bytes)
        host = f"<p>Each node's host memory holds {bytes_told(memory.host_bytes_per_node)} of {of}"
        host += f", its NVMe {bytes_told(memory.nvme_bytes_per_node)}.</p>" if memory.nvme_bytes_per_node else ".</p>"
    where = f"on pipeline rank {fullest.pipeline_rank} " if len(memory.stages) > 1 else ""
    return section(
        "Memory", chart + listed + host, f"At its fullest {where}in {fullest.peak_phase}; the list is that GPU's."
    )


def _time(plan: Plan) -> str:
    time, formulas = plan.price.time, time_formulas(plan)
    rows = [(part.name, part.words, getattr(time, part.name)) for part in TIMES if getattr(time, part.name) > 0]
    parts = [(label, value, f"f-{COLOURS[name]}", f"{label}: {seconds_told(value)}") for name, label, value in rows]
    bar = both(lambda width: charts.one_bar(parts, label="the parts of a step", width=width))
    listed = formula_list(
        (COLOURS[name], label, f"{seconds_told(value)} · {value / time.step_s:.1%}", formulas[name])
        for name, label, value in rows
    )
    return section(f"A step: {seconds_told(time.step_s)}", bar + listed, formulas["step_s"])


def _schedule(plan: Plan) -> str:
    s, time = plan.strategy, plan.price.time
    if s.degrees.pipeline == 1 or s.degrees.pipeline > 64:
        return ""
    shown = min(s.gradient_accumulation_steps, max(4, 2 * s.degrees.pipeline))
    if s.num_virtual_stages > 1 and s.pipeline_schedule != "zbv":
        shown = max(s.degrees.pipeline, shown // s.degrees.pipeline * s.degrees.pipeline)
    again = time.recompute_s / time.compute_s * 3 if time.compute_s else 0.0
    bars = timeline(s, num_micro_batches=shown, recompute=again)
    label = f"{s.pipeline_schedule}: {shown} of {s.gradient_accumulation_steps} micro batches"
    key = '<p class="soft"><span class="forward-key">forward blue, backward green'
    key += ", weight gradients amber" if any(bar.kind == "weights" for bar in bars) else ""
    key += "; paler: a rank's later stages; grey: the bubble. Numbers are micro batches.</span></p>"
    return section(
        "Pipeline schedule",
        key + both(lambda width: charts.schedule(bars, s.degrees.pipeline, label, width=width)),
        label,
    )


def _frontier(plan: Plan) -> str:
    alternatives = plan.alternatives
    if not alternatives:
        return ""
    points = [
        (
            alternative.peak_bytes / GIB,
            alternative.tokens_per_second_per_gpu,
            "dot" if alternative.fits else "dot large",
            f"{strategy_told(alternative.strategy)}: {bytes_told(alternative.peak_bytes)}, "
            f"{rate_told(alternative.tokens_per_second_per_gpu)} tokens/s/GPU",
        )
        for alternative in alternatives
    ]
    mine = plan.price.memory.peak_bytes
    speed = rate_told(plan.tokens_per_second_per_gpu)
    chosen = f"chosen: {strategy_told(plan.strategy)}: {bytes_told(mine)}, {speed} tokens/s/GPU"
    points.append((mine / GIB, plan.tokens_per_second_per_gpu, "dot chosen", chosen))
    limit = plan.price.memory.usable_bytes / GIB
    chart = both(
        lambda width: charts.frontier(
            points, limit=limit, unit="tokens/s/GPU", label="memory against speed", width=width
        )
    )
    return section(
        "Memory against speed",
        chart,
        "The best of each family; blue is chosen, hollow does not fit. Hover or tap for the strategy.",
    )


def _alternatives(plan: Plan) -> str:
    rows = [
        f'<tr><td class="num" data-unit="tokens/s/GPU,">{rate_told(alternative.tokens_per_second_per_gpu)}</td>'
        f'<td class="num" data-unit="GiB">{alternative.peak_bytes / GIB:,.1f}</td>'
        f'<td class="line">{escape(strategy_told(alternative.strategy))}</td>'
        f'<td class="line {"why" if alternative.fits else "bad"}">{escape(alternative.because)}</td></tr>'
        for alternative in plan.alternatives
    ]
    if not rows:
        return ""
    head = (
        '<tr><th class="num">tokens/s/GPU</th><th class="num">GiB</th><th>strategy</th><th>rejected because</th></tr>'
    )
    search = plan.search
    note = ""
    if search is not None:
        note = (
            f"{search.num_candidates:,} candidates: {search.num_priced:,} priced, {search.num_candidates - search.num_priced:,} "
            f"rejected by bounds in groups, each with one reason; {seconds_told(search.seconds)}."
        )
    return section("Why the others lost", f'<table class="stack">{head}{"".join(rows)}</table>', note)


def _nearest(plan: Plan) -> str:
    rows = [
        f'<tr><td>{escape(row["change"])}</td><td class="num">{row["num_gpus"]}</td>'
        f'<td class="num">{row["peak_bytes"] / GIB:,.1f}</td>'
        f'<td class="num">{rate_told(row["tokens_per_second_per_gpu"])}</td></tr>'
        for row in plan.nearest
    ]
    if plan.fits:
        return ""
    head = '<tr><th>change</th><th class="num">GPUs</th><th class="num">GiB</th><th class="num">tokens/s/GPU</th></tr>'
    table = (
        f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>' if rows else "<p>Nothing that was tried.</p>"
    )
    refused = "".join(f"<p>No answer for {escape(reason)}</p>" for reason in plan.nearest_refused)
    return section("What would fit", table + refused)


def _targets(plan: Plan) -> str:
    rows = []
    for row in plan.targets:
        name = row["name"]
        got = target_told(name, row["got"])
        verdict = (
            '<td class="good line">met</td>'
            if row["met"]
            else f'<td class="bad line">missed; {escape(met_by(row))}</td>'
        )
        rows.append(
            f'<tr><td>{escape(name)}</td><td class="num" data-unit="wanted,">{target_told(name, row["wanted"])}</td>'
            f'<td class="num" data-unit="is what it gets">{got}</td>{verdict}</tr>'
        )
    head = '<tr><th>target</th><th class="num">wanted</th><th class="num">gets</th><th></th></tr>'
    return section("Targets", f'<table class="stack">{head}{"".join(rows)}</table>') if rows else ""


def _sensitivity(plan: Plan) -> str:
    lines = sensitivity_told(plan.sensitivity, plan.price.time.step_s)
    return section("How firm is the choice", "".join(f"<p>{escape(line)}</p>" for line in lines)) if lines else ""


def _notes(plan: Plan) -> str:
    return section("Notes", "".join(f"<p>{escape(note)}</p>" for note in plan.notes)) if plan.notes else ""
