"""Charts of a plan as hand-written SVG: stacked bars, a schedule, a frontier, a heat map. Colours are CSS classes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log2, log10

from strategies.pipeline.timeline import Bar

WIDE, NARROW = 720, 360
"""Widths of a drawing, in its own units: the page scales it, and shows the narrow one on a phone."""


def svg(height: float, body: str, label: str, width: float = WIDE) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label, quote=True)}" '
        f'preserveAspectRatio="xMidYMid meet">{body}</svg>'
    )


def text(x: float, y: float, words: str, css: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(words)}</text>'


def rect(x: float, y: float, width: float, height: float, css: str, title: str = "") -> str:
    tip = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(0.0, width):.2f}" height="{height:.2f}" class="{css}">{tip}</rect>'
    )


def ticks(low: float, high: float, *, about: int = 4) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten apart) between two, some `about` of them."""
    step = 10.0 ** floor(log10((high - low) / about)) if high > low else 1.0
    step *= min((1, 2, 5, 10), key=lambda factor: abs((high - low) / (step * factor) - about))
    return [step * i for i in range(ceil(low / step), floor(high / step) + 1)]


def stacked_bars(
    rows: Sequence[tuple[str, Sequence[tuple[str, float, str, str]]]],
    *,
    limit: float,
    limit_label: str,
    total_label: Sequence[str],
    label: str,
    width: float = WIDE,
) -> str:
    """One bar a row of (name, value, css class, tooltip) parts; a line at the limit."""
    left, right, each = 74.0, 70.0, 26.0
    most = max([limit, *(sum(part[1] for part in parts) for _, parts in rows)]) or 1.0
    scale = (width - left - right) / most
    body, totals = [], []
    for i, (name, parts) in enumerate(rows):
        y, x = 22 + i * each, left
        body.append(text(left - 8, y + 13, name, "axis", "end"))
        for _, value, css, title in parts:
            if value > 0:
                body.append(rect(x, y, max(0.5, value * scale - 1), each - 8, css, title))
                x += value * scale
        totals.append(text(x + 6, y + 13, total_label[i], "axis strong"))
    height = 22 + len(rows) * each + 8
    if limit_label:
        at = left + limit * scale
        body.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="16" y2="{height - 6:.0f}" class="limit"/>')
        body.append(text(at, 11, limit_label, "axis", "end" if at > width * 0.6 else "middle"))
    return svg(height, "".join(body + totals), label, width)


def one_bar(parts: Sequence[tuple[str, float, str, str]], *, label: str, width: float = WIDE) -> str:
    """A single bar over the whole width, a name inside each part that is wide enough."""
    total = sum(part[1] for part in parts) or 1.0
    body, x = [], 0.0
    for name, value, css, title in parts:
        wide = value / total * width
        if wide > 0.3:
            body.append(rect(x, 2, max(0.5, wide - 1.5), 40, css, title))
            if wide > 9 * len(name):
                body.append(text(x + wide / 2, 27, name, "inside", "middle"))
        x += wide
    return svg(44, "".join(body), label, width)


def schedule(bars: Sequence[Bar], ranks: int, label: str, *, width: float = WIDE) -> str:
    """Ranks down, time across: forward, backward and weight gradients, the micro batch in each that has room."""
    left, each = 46.0, max(9.0, min(26.0, 320.0 / ranks))
    end = max(bar.end for bar in bars)
    scale = (width - left) / end
    body = []
    for rank in range(ranks):
        y = rank * each
        body.append(rect(left, y + 1, width - left, each - 3, "idle"))
        if each >= 12 or rank % 4 == 0:
            body.append(text(left - 6, y + each / 2 + 4, f"rank {rank}", "axis", "end"))
    for bar in bars:
        x, wide, y = left + bar.start * scale, (bar.end - bar.start) * scale, bar.rank * each
        shade = " later" if bar.stage >= ranks else ""
        title = f"{bar.kind} of micro batch {bar.micro}, stage {bar.stage}, rank {bar.rank}"
        body.append(rect(x, y + 1, max(0.4, wide - min(0.6, wide / 4)), each - 3, f"{bar.kind}{shade}", title))
        if wide > 13 and each >= 14:
            body.append(text(x + wide / 2, y + each / 2 + 3.5, str(bar.micro), "tiny", "middle"))
    return svg(ranks * each + 4, "".join(body), label, width)


def frontier(
    points: Sequence[tuple[float, float, str, str]], *, limit: float, unit: str, label: str, width: float = WIDE
) -> str:
    """(memory in GiB, speed, css class, tooltip): memory across, speed up; a line at the budget. The axes begin where the
    points do."""
    left, bottom, top, height = 58.0, 36.0, 20.0, 300.0
    speeds, sizes = [point[1] for point in points], [min(point[0], limit * 2) for point in points]
    low_y, high_y = min(speeds) * 0.97, max(speeds) * 1.02
    low_x, high_x = min(sizes) * 0.9, max(limit * 1.06, *sizes)
    body = []

    def place(memory: float, speed: float) -> tuple[float, float]:
        x = left + (min(memory, high_x) - low_x) / (high_x - low_x) * (width - left - 14)
        return x, top + (high_y - speed) / (high_y - low_y) * (height - top - bottom)

    for speed in ticks(low_y, high_y):
        _, y = place(low_x, speed)
        body.append(f'<line x1="{left}" x2="{width - 14}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        body.append(text(left - 6, y + 4, f"{speed:,.4g}" if speed < 1000 else f"{speed:,.0f}", "axis", "end"))
    for memory in ticks(low_x, high_x, about=6 if width > NARROW else 4):
        x, _ = place(memory, low_y)
        body.append(text(x, height - 19, f"{memory:,.4g}", "axis", "middle"))
    body.append(text(width - 14, height - 4, "GiB on the fullest GPU", "axis", "end"))
    body.append(text(4, 10, unit, "axis"))
    at, _ = place(limit, low_y)
    body.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{height - bottom}" class="limit"/>')
    body.append(text(at - 5, height - bottom - 6, "budget", "axis", "end"))
    for memory, speed, css, title in points:
        x, y = place(memory, speed)
        radius = 8 if "chosen" in css else 5
        body.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{css}"><title>{escape(title)}</title></circle>'
        )
    return svg(height, "".join(body), label, width)


def durations(
    lines: Sequence[tuple[str, Sequence[tuple[int, float, str]]]],
    *,
    limit_s: float | None,
    label: str,
    width: float = WIDE,
) -> str:
    """A line a model of (GPUs, seconds, tooltip): GPUs across, days up, both in powers; a line at the deadline."""
    points = [point for _, line in lines for point in line]
    sizes = sorted({num_gpus for num_gpus, _, _ in points})
    days = [seconds / 86400 for _, seconds, _ in points] + ([limit_s / 86400] if limit_s else [])
    low, high = log10(min(days)) - 0.08, log10(max(days)) + 0.12
    left, right, top, height, bottom = 62.0, 84.0, 14.0, 260.0, 40.0

    def at_x(num_gpus: float) -> float:
        place = (log2(num_gpus) - log2(sizes[0])) / (log2(sizes[-1]) - log2(sizes[0])) if len(sizes) > 1 else 0.5
        return left + 10 + place * (width - left - right - 10)

    def at_y(num_days: float) -> float:
        return top + (high - log10(num_days)) / (high - low) * (height - top - bottom)

    body = []
    marks = [factor * 10.0**power for power in range(floor(low), ceil(high) + 1) for factor in (1, 2, 5)]
    for mark in (mark for mark in marks if low <= log10(mark) <= high):
        y = at_y(mark)
        body.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        body.append(text(left - 6, y + 4, f"{mark:,.4g}", "axis", "end"))
    taken = float("-inf")
    for size in sizes:
        if at_x(size) - taken > 26:
            taken = at_x(size)
            body.append(text(taken, height - 22, f"{size:,}", "axis", "middle"))
    body.append(text(width - right, height - 6, "GPUs", "axis", "end"))
    body.append(text(4, 10, "days", "axis"))
    if limit_s:
        y = at_y(limit_s / 86400)
        body.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" class="limit"/>')
        body.append(text(left + 4, y - 5, "deadline", "axis"))
    for i, (name, line) in enumerate(lines):
        css = f"line{i % 6}"
        path = " ".join(f"{at_x(size):.1f},{at_y(seconds / 86400):.1f}" for size, seconds, _ in line)
        body.append(f'<polyline points="{path}" class="{css}"/>')
        for size, seconds, tip in line:
            x, y = at_x(size), at_y(seconds / 86400)
            body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{css}"><title>{escape(tip)}</title></circle>')
        size, seconds, _ = line[-1]
        body.append(text(at_x(size) + 8, at_y(seconds / 86400) + 4, name, "axis strong"))
    return svg(height, "".join(body), label, width)
