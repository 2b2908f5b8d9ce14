"""Words for the numbers and choices of a plan: bytes, seconds, rates, strategies, bars of text. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from strategies.rooms import ROOMS
from strategies.strategy import Axis, Strategy

GIB = 2**30
MARGIN = 12
"""Columns of the section names."""
EIGHTHS = " ▏▎▍▌▋▊▉█"
BOLD, DIM, RED, GREEN, YELLOW = "1", "2", "31", "32", "33"
COMPONENTS = (
    ("parameters", "34"),
    ("gathered_parameters", "94"),
    ("master_weights", "36"),
    ("gradients", "35"),
    ("optimizer_states", "32"),
    ("activations", "33"),
    ("logits", "93"),
    ("communication_buffers", "95"),
    ("temporary", "96"),
    ("reserve", "90"),
)
"""Bytes of a stage, with their colours."""


class StepPart(NamedTuple):
    """One part of a step's seconds, as text and pages show it."""

    name: str
    """Its name in the plan's JSON."""
    words: str
    code: str
    """Its colour on a terminal."""
    colour: str
    """Its colour on a page (page.css)."""


TIMES = (
    StepPart("compute_s", "compute", "34", "compute"),
    StepPart("recompute_s", "recompute", "36", "recompute"),
    StepPart("tensor_parallel_s", "tensor messages", "35", "tensor"),
    StepPart("context_parallel_s", "context, not hidden", "95", "context"),
    StepPart("data_parallel_exposed_s", "data parallel, not hidden", "33", "data"),
    StepPart("pipeline_bubble_s", "pipeline bubble", "31", "bubble"),
    StepPart("pipeline_transfer_s", "pipeline transfers", "91", "transfer"),
    StepPart("offload_s", "offload", "93", "offload"),
    StepPart("optimizer_s", "optimizer", "32", "step"),
)
"""Parts of a step; they sum to step_s."""


def painted(text: str, code: str) -> str:
    return f"\033[{code}m{text}\033[0m"


def bar(part: float, whole: float, columns: int) -> str:
    """part of whole as a bar of at most `columns`, in eighths of a column."""
    if whole <= 0 or part <= 0:
        return ""
    eighths = round(min(1.0, part / whole) * columns * 8)
    return "█" * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")


def stacked(parts: Sequence[tuple[float, str]], whole: float, columns: int) -> str:
    """Parts of a whole, one colour each, in whole columns; what is left is dotted, what is over is marked."""
    text, at, total = "", 0, 0.0
    for part, code in parts:
        total += part
        until = round(min(1.0, total / whole) * columns) if whole > 0 else 0
        text += painted("█" * (until - at), code) if until > at else ""
        at = until
    text += painted("·" * (columns - at), DIM)
    return text + (painted(" over", RED) if total > whole else "")


def bytes_told(num_bytes: float) -> str:
    """1.5 GiB; small things in MiB."""
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= 0.1 * GIB else f"{num_bytes / 2**20:,.0f} MiB"


def seconds_told(seconds: float) -> str:
    """12.3 s, 45 ms, 2.1 days."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


LONG_S = 365 * 86400.0
"""A training that takes longer fits in memory and nowhere else."""


def length_told(seconds: float) -> str:
    """95.8 days; 7.2 h below two days, 4.9 years from a year on."""
    years = seconds / LONG_S
    if seconds < 2 * 86400:
        return seconds_told(seconds)
    if years < 1:
        return f"{seconds / 86400:,.1f} days"
    return f"{years:,.1f} years" if years < 100 else f"{years:,.0f} years"


def rate_told(per_second: float) -> str:
    """1,234; below ten with two digits: 0.31."""
    return f"{per_second:,.0f}" if per_second >= 10 or per_second == 0 else f"{per_second:.2g}"


def between_told(low: float, high: float) -> str:
    """Return "1,600 to 2,200": the ends of an interval to two digits, or three where two would be the same."""
    digits = 2 if f"{low:.1e}" != f"{high:.1e}" else 3

    def rounded(value: float) -> str:
        return rate_told(float(f"{value:.{digits - 1}e}"))

    return f"{rounded(low)} to {rounded(high)}"


def probability_told(probability: float) -> str:
    """Return "97 of 100", "over 99 of 100", "under 1 of 100"."""
    if probability > 0.99:
        return "over 99 of 100"
    return "under 1 of 100" if probability < 0.01 else f"{100 * probability:.0f} of 100"


def cases_told(coverage: float) -> str:
    """Return "four of five cases" for 0.8."""
    return "four of five cases" if coverage == 0.8 else f"{100 * coverage:.0f} of 100 cases"


def degrees_told(strategy: Strategy) -> str:
    """Return "tensor 8 x pipeline 4 x data 2", or "one GPU"."""
    degrees = strategy.degrees
    axes: tuple[Axis, ...] = ("tensor", "context", "pipeline", "data")
    return " x ".join(f"{axis} {degrees.size(axis)}" for axis in axes if degrees.size(axis) > 1) or "one GPU"


def all_degrees_told(strategy: Strategy) -> str:
    """Return "tensor 8 x pipeline 4 x data 1", with the degrees that split nothing; a context degree only where it does."""
    degrees = strategy.degrees
    context = f" x context {degrees.context}" if degrees.context > 1 else ""
    return f"tensor {degrees.tensor}{context} x pipeline {degrees.pipeline} x data {degrees.data}"


def choices_told(strategy: Strategy) -> dict[str, str]:
    """Return each room's choice in a few words, by its name; empty where it chose nothing."""
    return {room.name: room.choice_words(strategy) for room in ROOMS}


def strategy_told(strategy: Strategy) -> str:
    """Return a strategy in one line: tensor 8 x pipeline 4 x data 2, micro batch 1, ZeRO 1, ..."""
    told = choices_told(strategy)
    words = [told[name] for name in ("zero", "recompute", "offload")]
    return ", ".join(
        [degrees_told(strategy), f"micro batch {strategy.micro_batch_size}", *(word for word in words if word)]
    )


def sensitivity_told(rows: list[dict[str, Any]], step_s: float) -> list[str]:
    """How firm the choice is, a sentence a link."""
    lines = []
    for row in rows:
        what = f"{row['link']} 10 % slower"
        if row["same_choice"]:
            more = row["step_s"] / step_s - 1
            lines.append(f"{what}: the choice stays, a step takes {more:.1%} longer")
        else:
            lines.append(
                f"{what}: the choice would be {strategy_told(row['strategy'])}, {seconds_told(row['best_step_s'])} a step; "
                f"this one would take {seconds_told(row['step_s'])}"
            )
    return lines


def wrapped(text: str, columns: int) -> list[str]:
    """Lines of at most so many columns, broken at spaces."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > columns:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line]


def met_by(row: dict[str, Any]) -> str:
    """Return which cluster size would meet a target that is missed."""
    if row["would_meet"]:
        return f"would meet: {row['would_meet']}"
    if row["would_meet_alone"]:
        return f"no size within a factor of 8 meets all targets; this one alone: {row['would_meet_alone']}"
    return "no size within a factor of 8 meets it"


def target_told(name: str, value: float | None) -> str:
    """A target's value, or what a plan gets of it, with its unit."""
    if value is None:
        return "unknown"
    if name == "finish_within":
        return seconds_told(value)
    return f"${value:,.0f}" if name == "budget_usd" else f"{value:,.0f}"
