"""A table of capacity as one page that opens offline. Pure but for `write_capacity`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from orchestrator.planner.capacity import WISHES, Capacity, Cell, size_told, tokens_told
from orchestrator.planner.reasons.confidence import confidence, error_of
from orchestrator.planner.show import charts
from orchestrator.planner.show.charts import WIDE, rect, svg, text
from orchestrator.planner.show.frame import both, html_document, number, section
from orchestrator.planner.show.words import bytes_told, length_told, rate_told, strategy_told

COLUMNS = ("model", "GPUs", "tokens/s/GPU", "error", "MFU", "time", "dollars", "strategy")


def write_capacity(table: Capacity, path: str | Path) -> None:
    """Write the page of a capacity table."""
    Path(path).write_text(capacity_page(table), encoding="utf-8")


def capacity_page(table: Capacity) -> str:
    """Return the page: what was asked, the heat map, how long each takes, the smallest clusters, and every cell as a row."""
    models = list(table.smallest)
    named = ", ".join(models) if len(models) <= 3 else f"{len(models)} models"
    gpu = table.cluster.accelerator.name
    heading = f"{escape(named)} on {escape(gpu)}"
    if table.question.has_target:
        met = any(found["meets_target"] for found in table.smallest.values())
        heading += (
            ' <span class="good">a size meets the target</span>'
            if met
            else ' <span class="bad">no size meets the target</span>'
        )
    body = _asked(table) + _heat(table) + _durations(table) + _smallest(table) + _cells(table)
    return html_document(f"{named} on {gpu}: capacity", heading, body)


def _asked(table: Capacity) -> str:
    asked, cluster, gpu = table.question, table.cluster, table.cluster.accelerator
    sizes = sorted({cell.num_gpus for cell in table.cells})
    price = cluster.usd_per_gpu_hour
    numbers = [
        number(
            gpu.name,
            f"{sizes[0]:,} to {sizes[-1]:,} GPUs" if len(sizes) > 1 else f"{sizes[0]:,} GPUs",
            f"{table.cluster_told()}. {gpu.source}",
        ),
        number(
            bytes_told(gpu.memory_bytes),
            "memory a GPU",
            "what the driver reports as total; a plan keeps its memory error free",
        ),
    ]
    if asked.tokens:
        numbers.append(
            number(tokens_told(asked.tokens), "tokens of training", f"{asked.tokens:,} tokens, {asked.told()}")
        )
    if price is not None:
        numbers.append(number(f"${price:,.2f}", "a GPU and hour", "dollars are GPU-hours x this price, used GPUs only"))
    errors = sorted({(error_of(cell.best), confidence(cell.best).source) for cell in table.cells if cell.best})
    if errors:
        low, high = errors[0][0], errors[-1][0]
        span = f"± {low:.0%}" if low == high else f"± {low:.0%} to {high:.0%}"
        numbers.append(
            number(
                span, "stated error", "; ".join(dict.fromkeys(f"± {error:.0%}: {source}" for error, source in errors))
            )
        )
    targets = "; ".join(asked.targets_told())
    target = (
        f"<p><b>Target:</b> {escape(targets)}</p>"
        if targets
        else "<p>No target was set: days, dollars or tokens/s/GPU.</p>"
    )
    told = f"<p>{escape(asked.told())}; {escape(table.cluster_told())}</p>"
    return f'<section>{told}{target}<div class="numbers">{"".join(numbers)}</div></section>'


def _heat(table: Capacity) -> str:
    keys = [f'<span class="key f-heat{level}"></span>' for level in range(1, 6)]
    legend = [f"{''.join(keys)}&nbsp;more of the GPU's peak"]
    if any(cell.best and not cell.plain for cell in table.cells):
        legend.append('<span class="key k-offloaded"></span> only with offload')
    if table.question.has_target:
        legend.append('<span class="key k-met"></span> meets the target')
    chart = both(lambda width: heat_map(table.cells, width=width))
    return section(
        "Tokens per second and GPU",
        f'<p class="legend soft">{" ".join(f"<span>{item}</span>" for item in legend)}</p>{chart}',
    )


def _durations(table: Capacity) -> str:
    """Days by number of GPUs, where the length is known."""
    lines = []
    for model in table.smallest:
        timed = [(cell, cell.wall_s) for cell in table.cells if cell.model == model and cell.wall_s is not None]
        points = [
            (cell.num_gpus, wall_s, f"{model} on {cell.num_gpus:,}: {length_told(wall_s)}, {_usd(cell)}")
            for cell, wall_s in timed
        ]
        if points:
            lines.append((model, sorted(points)))
    if not lines:
        return ""
    label = "days of training by number of GPUs"
    chart = both(
        lambda width: charts.durations(lines, limit_s=table.question.finish_within_s, label=label, width=width)
    )
    return section("How long it takes", chart, "Both axes are logarithmic. Hover or tap a point for its price.")


def _smallest(table: Capacity) -> str:
    rows = [
        f"<tr><td><b>{escape(model)}</b></td><td>{WISHES[name]}</td>"
        f'<td class="{"bad" if cell is None or cell.is_long else ""}">{escape(size_told(cell))}</td></tr>'
        for model, found in table.smallest.items()
        for name, cell in found.items()
    ]
    head = "<tr><th>model</th><th>what it does</th><th>smallest number of GPUs</th></tr>"
    return section("Smallest clusters", f"<table>{head}{''.join(rows)}</table>")


def _cells(table: Capacity) -> str:
    head = "".join(f'<th class="{"" if name in ("model", "strategy") else "num"}">{name}</th>' for name in COLUMNS)
    rows = "".join(_row(cell) for cell in table.cells)
    return section("Every cell", f'<table class="stack"><tr>{head}</tr>{rows}</table>')


def _row(cell: Cell) -> str:
    first = f'<tr><td>{escape(cell.model)}</td><td class="num" data-unit="GPUs">{cell.num_gpus:,}</td>'
    if cell.best is None:
        why = f"no answer: {cell.refused.reason}" if cell.refused else "does not fit"
        return f'{first}<td colspan="6" class="bad line">{escape(why)}</td></tr>'
    time = length_told(cell.wall_s) if cell.wall_s is not None else "–"
    good = ' <span class="good">meets the target</span>' if cell.question.has_target and cell.meets else ""
    other = ""
    if cell.best.strategy.offload.any:
        plain = cell.plain
        other = (
            "does not fit without offload"
            if plain is None
            else f"without offload: {rate_told(plain.tokens_per_second_per_gpu)} tokens/s/GPU ± {error_of(plain):.0%}, "
            f"{strategy_told(plain.strategy)}"
        )
        other = f'<div class="soft">{escape(other)}</div>'
    return (
        f'{first}<td class="num" data-unit="tokens/s/GPU">{rate_told(cell.tokens_per_second_per_gpu or 0.0)}</td>'
        f'<td class="num">±&nbsp;{cell.throughput_error:.0%}</td><td class="num" data-unit="MFU">{cell.mfu:.1%}</td>'
        f'<td class="num {"bad" if cell.is_long else ""}">{time}</td><td class="num">{_usd(cell)}</td>'
        f'<td class="line">{escape(strategy_told(cell.best.strategy))}{good}{other}</td></tr>'
    )


def _usd(cell: Cell) -> str:
    return "–" if cell.usd is None else f"${cell.usd:,.0f}"


def heat_map(cells: Sequence[Cell], *, width: float = WIDE) -> str:
    """Models down, GPUs across: the darker, the larger the part of the peak that is used; what does not fit is crossed out."""
    models, sizes = list(dict.fromkeys(c.model for c in cells)), list(dict.fromkeys(c.num_gpus for c in cells))
    left, top, each = 84.0, 26.0, 46.0
    wide = (width - left) / len(sizes)
    most = max((cell.mfu or 0.0 for cell in cells), default=0.0) or 1.0
    body = [
        text(left + (i + 0.5) * wide, 16, f"{size:,}" + (" GPU" + "s" * (size > 1) if i == 0 else ""), "axis", "middle")
        for i, size in enumerate(sizes)
    ]
    for cell in cells:
        x, y = left + sizes.index(cell.num_gpus) * wide, top + models.index(cell.model) * each
        body += _heat_cell(cell, x, y, wide, each, max(1, round((cell.mfu or 0.0) / most * 5)))
    for i, model in enumerate(models):
        body.append(text(left - 8, top + (i + 0.5) * each + 4, model, "axis strong", "end"))
    height = top + len(models) * each + 4
    return svg(height, "".join(body), "tokens per second and GPU, by model and number of GPUs", width)


def _heat_cell(cell: Cell, x: float, y: float, wide: float, each: float, level: int) -> list[str]:
    """A cell's colour, its speed, and how long the training takes, or else its part of the peak."""
    where = f"{cell.model} on {cell.num_gpus}"
    if cell.mfu is None:
        why = cell.refused.reason if cell.refused else "does not fit"
        cross = text(x + wide / 2, y + each / 2 + 4, "does not fit" if wide > 76 else "–", "axis", "middle")
        return [rect(x + 1, y + 1, wide - 2, each - 2, "cold", f"{where}: {why}"), cross]
    tip = (
        f"{where}: {cell.tokens_per_second_per_gpu:,.0f} tokens/s/GPU ± {cell.throughput_error:.0%}, MFU {cell.mfu:.1%}"
        + ("" if cell.plain else ", only with offload")
    )
    css = f"heat{level}" + ("" if cell.plain else " offloaded")
    css += " met" if cell.question.has_target and cell.meets else ""
    told = length_told(cell.wall_s) if cell.wall_s is not None else f"{cell.mfu:.0%}"
    if wide < 6 * len(told) and cell.wall_s is not None:
        told = f"{cell.wall_s / 86400:,.0f} d" if not cell.is_long else told.replace(" years", " y")
    body = [
        rect(x + 1.5, y + 1.5, wide - 3, each - 3, css, tip),
        text(x + wide / 2, y + 20, f"{cell.tokens_per_second_per_gpu:,.0f}", f"on{level}", "middle"),
    ]
    if not cell.is_long:
        return [*body, text(x + wide / 2, y + 36, told, f"tiny on{level}", "middle")]
    plate = min(wide - 8, 6.0 * len(told) + 8)
    return [
        *body,
        rect(x + (wide - plate) / 2, y + 26, plate, 14, "plate", tip),
        text(x + wide / 2, y + 36.5, told, "tiny long", "middle"),
    ]
