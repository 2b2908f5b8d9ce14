"""The error bar of a plan against published runs: whether four of five measured speeds lie inside, whole stacks left out.

    python -m benchmarks.coverage            deviations, coverage by left-out stack, conformal intervals, own runs, bytes
    python -m benchmarks.coverage --write    the same, and writes the deviations into orchestrator/planner/spread.py
    python -m benchmarks.coverage --plot D   the same, and draws the residuals as SVG files into the folder D

ln(measured / predicted) of a run is the bias of its stack and its own error. Each stack is predicted by constants that were
fitted without any run of it, and judged by deviations that were computed without it."""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random

from benchmarks.fitting import SpeedFit, fills, predict, timed
from benchmarks.oracle import without_stacks
from benchmarks.plots import residual_plots
from benchmarks.published import NOISY, ORDER_ONLY, Case, cases
from orchestrator.planner import spread
from orchestrator.planner.reasons.confidence import kind_of
from orchestrator.planner.spread import Belief, after_runs, unseen
from strategies.constants import TIME, TimeConstants, table

NEAR = 0.85
"""Part of the fastest speed of its group from which on a run is like one that a planner would choose."""
FEWEST = 4
"""Verdicts of each kind that a source needs to say how sharply fitting ends."""
BANDS = (0.0, 0.75, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, math.inf)
"""Bounds of peak over usable bytes within which verdicts are counted."""


@dataclass(frozen=True)
class Residual:
    """One run, predicted by constants that were fitted without its stack."""

    case: Case
    log_error: float
    """ln(measured / predicted)."""
    near: bool
    """Within 15 % of the fastest of its group."""

    @property
    def stack(self) -> str:
        return self.case.stack

    @property
    def kind(self) -> str:
        return kind_of(self.case.strategy)


@dataclass(frozen=True)
class Deviations:
    """The numbers of orchestrator/planner/spread.py that published runs decide."""

    stack: float
    num_stacks: int
    row: dict[str, float]
    own: float
    pair: float

    def unseen(self, kind: str) -> Belief:
        return unseen(self.stack, self.row[kind], self.num_stacks)


def residuals(fit: SpeedFit) -> list[Residual]:
    """Return the runs of every stack, predicted without it; what says nothing about speed is left out."""
    best: dict[str, float] = defaultdict(float)
    for case in cases():
        best[case.group] = max(best[case.group], case.tokens_per_second_per_gpu)
    found = []
    for stack, constants in without_stacks(fit).items():
        held = [c for c in cases() if c.stack == stack and c.fits and c.source not in (*NOISY, *ORDER_ONLY)]
        for case, speed in zip(held, predict(held, constants), strict=True):
            measured = case.tokens_per_second_per_gpu
            found.append(Residual(case, math.log(measured / speed), measured >= NEAR * best[case.group]))
    return found


def by_stack(selected: Iterable[Residual]) -> dict[str, list[Residual]]:
    """Return residuals by stack."""
    found: dict[str, list[Residual]] = defaultdict(list)
    for one in selected:
        found[one.stack].append(one)
    return dict(found)


def deviations(selected: Sequence[Residual]) -> Deviations:
    """Return the deviations of residuals: each stack counts alike, however many runs it has.

    The deviation between stacks is that of their mean residuals around 0, less what chance in their runs adds to it."""
    stacks = by_stack(selected)
    means = {stack: statistics.fmean(one.log_error for one in runs) for stack, runs in stacks.items()}

    def within(chosen: Callable[[Residual], bool]) -> float:
        return math.sqrt(statistics.fmean(_variances(stacks.values(), chosen) or [0.0]))

    kinds = {kind: within(lambda one, kind=kind: one.kind == kind) for kind in spread.ROW}  # type: ignore[misc]
    everything = within(lambda _: True)
    noise = statistics.fmean(everything**2 / len(runs) for runs in stacks.values())
    stack = math.sqrt(max(0.0, statistics.fmean(mean**2 for mean in means.values()) - noise))
    groups: dict[str, list[Residual]] = defaultdict(list)
    for one in selected:
        if one.near:
            groups[one.case.group].append(one)
    by_source: dict[str, list[float]] = defaultdict(list)
    for runs in groups.values():
        if len(runs) > 1:
            by_source[runs[0].stack].append(statistics.variance(one.log_error for one in runs))
    pair = math.sqrt(2 * statistics.fmean(statistics.fmean(found) for found in by_source.values()))
    return Deviations(
        stack, len(stacks), {k: v or everything for k, v in kinds.items()}, within(lambda one: one.near), pair
    )


def _variances(stacks: Iterable[Sequence[Residual]], chosen: Callable[[Residual], bool]) -> list[float]:
    groups = ([one.log_error for one in runs if chosen(one)] for runs in stacks)
    return [statistics.variance(errors) for errors in groups if len(errors) > 2]


def covered(belief: Belief, log_errors: Iterable[float]) -> float:
    """Return the part of residuals that lies inside an interval."""
    reach = belief.multiple * belief.deviation
    return statistics.fmean(abs(error - belief.center) <= reach for error in log_errors)


def coverage(selected: Sequence[Residual]) -> dict[str, tuple[float, float, float]]:
    """Return by left-out stack (its coverage, its coverage by the conformal interval, that interval's half-width)."""
    table = {}
    for stack, runs in by_stack(selected).items():
        others = [one for one in selected if one.stack != stack]
        known, half = deviations(others), conformal(others)
        held = [covered(known.unseen(one.kind), [one.log_error]) for one in runs]
        inside = statistics.fmean(abs(one.log_error) <= half for one in runs)
        table[stack] = statistics.fmean(held), inside, half
    return table


def conformal(selected: Sequence[Residual]) -> float:
    """Return the half-width that holds COVERAGE of residuals where stacks are exchangeable: the quantile of their sizes, each
    stack counting alike, one unseen stack counted as infinitely wrong.

    Source: Dunn, Wasserman and Ramdas, arXiv:1809.07441, pooling of conditional distributions."""
    stacks = by_stack(selected)
    level = spread.COVERAGE * (len(stacks) + 1) / len(stacks)
    weighed = sorted((abs(one.log_error), 1 / len(stacks) / len(stacks[one.stack])) for one in selected)
    total = 0.0
    for size, weight in weighed:
        total += weight
        if total >= level:
            return size
    return weighed[-1][0]


def own_runs(selected: Sequence[Residual], num_runs: int, *, draws: int = 200) -> tuple[float, float]:
    """(half-width, coverage as the mean over stacks) of a stack's next run after some runs of its own, drawn at random."""
    random, parts = Random(num_runs), []
    known = deviations(selected)
    half = 0.0
    for runs in by_stack(selected).values():
        near = [one.log_error for one in runs if one.near]
        if len(near) <= num_runs + 1:
            continue
        held = []
        for _ in range(draws):
            *first, following = random.sample(near, num_runs + 1)
            belief = after_runs(
                known.stack, known.own, known.num_stacks, mean=statistics.fmean(first), num_runs=num_runs
            )
            held.append(covered(belief, [following]))
            half = belief.multiple * belief.deviation
        parts.append(statistics.fmean(held))
    return half, statistics.fmean(parts)


# Bytes ---------------------------------------------------------------------------------------------------------------


def verdicts() -> tuple[str, list[tuple[float, bool]]]:
    """(the source with the most verdicts of the rarer kind, its (ln(peak / usable), whether it ran))."""
    settled = [case for case in cases() if case.verdict]
    found: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for case, fill in zip(settled, fills(settled), strict=True):
        found[case.source].append((math.log(fill), case.fits))
    source = max(
        found, key=lambda each: min(sum(ran for _, ran in found[each]), sum(not ran for _, ran in found[each]))
    )
    return source, found[source]


def logistic(told: Sequence[tuple[float, bool]]) -> tuple[float, float]:
    """(center, spread) of the logistic curve under which verdicts are likeliest; none is held for surer than 99 %."""

    def unlikely(center: float, width: float) -> float:
        lost = 0.0
        for x, ran in told:
            p = min(0.99, max(0.01, 1 / (1 + math.exp(max(-500.0, min(500.0, (x - center) / width))))))
            lost -= math.log(p if ran else 1 - p)
        return lost

    grid = [(center / 200, width / 500) for center in range(-20, 41) for width in range(4, 51)]
    return min(grid, key=lambda each: unlikely(*each))


# Constants that nothing anchors ---------------------------------------------------------------------------------------


def unanchored() -> tuple[str, ...]:
    """Return the assumed constants of a GPU's time that change the price of no published run of a known speed."""
    rows = [case for case in cases() if case.fits and case.source not in (*NOISY, *ORDER_ONLY)]
    before, found = predict(rows), []
    for name, known in table(TimeConstants).items():
        if known.start is None and not name.startswith("cpu_"):
            other = next(end for end in known.range if end != getattr(TIME, name))
            if predict(rows, replace(TIME, **{name: other})) == before:
                found.append(name)
    return tuple(found)


# Printing ------------------------------------------------------------------------------------------------------------


def write(values: dict[str, str]) -> None:
    """Put numbers into orchestrator/planner/spread.py."""
    path = Path(spread.__file__)
    text = path.read_text(encoding="utf-8")
    for name, value in values.items():
        text, number = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value}", text)
        assert number == 1, name
    path.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the deviations into orchestrator/planner/spread.py")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the residuals as SVG files")
    options = parser.parse_args(argv)
    found = residuals(SpeedFit(timed()))
    known, stacks = deviations(found), by_stack(found)
    parts = coverage(found)
    say(f"{'stack':15} {'runs':>5} {'bias':>7} {'deviation':>10} {'inside':>7} {'conformal':>10}")
    for stack, runs in stacks.items():
        errors, (inside, conform, half) = [one.log_error for one in runs], parts[stack]
        say(
            f"{stack:15} {len(runs):5} {statistics.fmean(errors):+7.1%} {statistics.pstdev(errors):10.1%} {inside:7.0%} "
            f"{conform:6.0%} of ± {half:.0%}"
        )
    mean, low = statistics.fmean(each[0] for each in parts.values()), sum(each[0] < 0.5 for each in parts.values())
    say(
        f"mean over stacks {mean:.0%} inside, {low} under half (goal 70 to 90 %, at most two); "
        f"conformal {statistics.fmean(each[1] for each in parts.values()):.0%}"
    )
    say(
        f"between stacks {known.stack:.3f}, K {known.num_stacks}; within {known.row}; chosen {known.own:.3f}; "
        f"pair {known.pair:.3f}"
    )
    for kind in known.row:
        belief = known.unseen(kind)
        say(f"an unseen stack, {kind}: {belief.low - 1:+.0%} to {belief.high - 1:+.0%}")
    for number in (1, 3):
        half, part = own_runs(found, number)
        say(f"after {number} run{'s' * (number > 1)} of its own: ± {half:.0%}, {part:.0%} inside")
    source, told = verdicts()
    center, width = logistic(told)
    say(f"fits: verdicts of {source}, half at peak / usable = {math.exp(center):.3f}, spread {width:.3f}")
    for least, most in pairwise(BANDS):
        here = [(x, ran) for x, ran in told if least <= math.exp(x) < most]
        if here:
            stated = statistics.fmean(1 / (1 + math.exp(min(500.0, (x - center) / width))) for x, _ in here)
            say(f"  {least:.2f} to {most:.2f} full: {sum(r for _, r in here)} of {len(here)} ran, {stated:.0%} stated")
    lacking = unanchored()
    say(f"no published run rests on {', '.join(lacking)}")
    if options.write:
        row = ", ".join(f'"{kind}": {value:.3f}' for kind, value in known.row.items())
        numbers = {"STACK": known.stack, "OWN": known.own, "PAIR": known.pair}
        names = ", ".join(f'"{name}"' for name in lacking)
        write(
            {name: f"{value:.3f}" for name, value in numbers.items()}
            | {
                "NUM_STACKS": str(known.num_stacks),
                "ROW": f"{{{row}}}",
                "UNANCHORED": f"({names})  # fmt: skip  # noqa: E501",
            }
            | {"FIT_CENTER, FIT_SPREAD": f"{center:.3f}, {width:.3f}"}
        )
    if options.plot:
        for path in residual_plots(options.plot, [(one.case, one.log_error) for one in found]):
            say(f"wrote {path}")


if __name__ == "__main__":
    main()
