"""Residuals of left-out stacks as SVG: by stack, by size of model, by number of GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.published import Case
from orchestrator.planner import spread

WIDE, HIGH, LEFT, TOP, REACH = 720, 320, 56, 28, 0.6
"""Pixels of a plot, and the largest |ln(measured / predicted)| that it shows; what is beyond stands at its edge."""
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")

Point = tuple[Case, float]


def residual_plots(folder: Path, points: Sequence[Point]) -> list[Path]:
    """Write the plots into a folder and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    axes: dict[str, tuple[str, Callable[[Case], float]]] = {
        "parameters": ("parameters", lambda case: case.work.num_parameters),
        "gpus": ("GPUs", lambda case: case.strategy.num_gpus),
        "tokens": ("tokens of a micro batch", lambda case: case.strategy.micro_batch_size * case.sequence_length),
    }
    paths = []
    for name, (label, of) in axes.items():
        path = folder / f"residuals-{name}.svg"
        path.write_text(plot(points, label, of), encoding="utf-8")
        paths.append(path)
    return paths


def plot(points: Sequence[Point], label: str, of: Callable[[Case], float]) -> str:
    """Return ln(measured / predicted) over the logarithm of something, a colour a stack, the interval of a plan behind."""
    stacks = list(dict.fromkeys(case.stack for case, _ in points))
    values = [math.log10(of(case)) for case, _ in points]
    least, most = math.floor(min(values)), math.ceil(max(values))
    wide, high = WIDE - LEFT - 150, HIGH - TOP - 40

    def x(value: float) -> float:
        return LEFT + wide * (value - least) / max(1, most - least)

    def y(error: float) -> float:
        return TOP + high * (0.5 - max(-REACH, min(REACH, error)) / (2 * REACH))

    belief = spread.unseen(spread.STACK, spread.ROW["dense"], spread.NUM_STACKS)
    reach = belief.multiple * belief.deviation
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDE}" height="{HIGH}" fill="white"/>',
        f'<rect x="{LEFT}" y="{y(reach):.1f}" width="{wide}" height="{y(-reach) - y(reach):.1f}" fill="#eee"/>',
        f'<text x="{LEFT}" y="16">measured over predicted tokens/s/GPU, whole stacks left out; grey: four of five cases</text>',
    ]
    for factor in (0.6, 0.8, 1.0, 1.25, 1.6):
        at = y(math.log(factor))
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + wide}" y1="{at:.1f}" y2="{at:.1f}" stroke="#bbb"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{factor:g}</text>')
    for power in range(least, most + 1):
        parts.append(f'<text x="{x(power):.1f}" y="{TOP + high + 16}" text-anchor="middle">1e{power}</text>')
    parts.append(f'<text x="{LEFT + wide / 2:.0f}" y="{HIGH - 6}" text-anchor="middle">{label}</text>')
    for (case, error), value in zip(points, values, strict=True):
        colour = COLOURS[stacks.index(case.stack) % len(COLOURS)]
        parts.append(f'<circle cx="{x(value):.1f}" cy="{y(error):.1f}" r="2.2" fill="{colour}" fill-opacity="0.6"/>')
    for index, stack in enumerate(stacks):
        top = TOP + 8 + 16 * index
        parts.append(f'<circle cx="{LEFT + wide + 16}" cy="{top}" r="4" fill="{COLOURS[index % len(COLOURS)]}"/>')
        parts.append(f'<text x="{LEFT + wide + 26}" y="{top + 4}">{stack}</text>')
    return "\n".join([*parts, "</svg>", ""])
