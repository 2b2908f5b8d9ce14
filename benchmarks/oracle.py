"""The planner's constants against published runs: how wrong, and how wrong on what it has not seen.

    python -m benchmarks.oracle            scores by source, then cross-validated by row and by whole stack
    python -m benchmarks.oracle --fit      fits the constants first, and writes them and their ranges into constants.py

Every fit of the cross-validation starts from the neutral values of the constants (benchmarks/fitting.py)."""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.fitting import MEMORY_NAMES, NAMES, SpeedFit, fills, fit_memory, predict, settled, timed
from benchmarks.published import NOISY, ORDER_ONLY, Case, Score, cases, headline, score
from strategies import constants as home
from strategies.constants import GIB, MEMORY, TIME, MemoryConstants, TimeConstants


def scored(
    selected: Sequence[Case], constants: TimeConstants = TIME, memory: MemoryConstants = MEMORY
) -> dict[str, Score]:
    """Return the scores by source."""
    fits = [fill <= 1 for fill in fills(selected, memory)]
    return score(zip(selected, predict(selected, constants), fits, strict=True))


# Cross-validation ----------------------------------------------------------------------------------------------------


def by_row(fit: SpeedFit, folds: int = 5) -> dict[str, float]:
    """Return the mean error by source, each run predicted by constants that were fitted without it."""
    errors: dict[str, list[float]] = {}
    for fold in range(folds):
        held = {case.id for case in fit.cases[fold::folds]}
        constants = fit.without(lambda case, held=held: case.id in held)  # type: ignore[misc]
        _note(errors, [case for case in fit.cases if case.id in held], constants)
    return {source: statistics.fmean(values) for source, values in errors.items()}


def without_stacks(fit: SpeedFit) -> dict[str, TimeConstants]:
    """Return by stack the constants that were fitted without any run of it."""
    stacks = dict.fromkeys(case.stack for case in fit.cases)
    return {stack: fit.without(lambda case, stack=stack: case.stack == stack) for stack in stacks}  # type: ignore[misc]


def by_stack(fit: SpeedFit, constants: Mapping[str, TimeConstants]) -> dict[str, float]:
    """Return the mean error by source, each predicted by constants that were fitted without its stack."""
    errors: dict[str, list[float]] = {}
    sources = {case.source for case in fit.cases}
    for stack, apart in constants.items():
        _note(errors, [case for case in cases() if case.stack == stack and case.source in sources and case.fits], apart)
    return {source: statistics.fmean(values) for source, values in errors.items()}


def _note(errors: dict[str, list[float]], held: Sequence[Case], constants: TimeConstants) -> None:
    for case, speed in zip(held, predict(held, constants), strict=True):
        errors.setdefault(case.source, []).append(abs(speed / case.tokens_per_second_per_gpu - 1))


# Printing ------------------------------------------------------------------------------------------------------------


def show(scores: dict[str, Score], rows: dict[str, float], stacks: dict[str, float]) -> None:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    print(
        f"{'source':10} {'runs':>5} {'MAPE':>7} {'bias':>7} {'unseen row':>11} {'unseen stack':>14} {'regret':>7} "
        f"{'rho':>6} {'false fits':>11} {'false refusals':>15}"
    )
    for source, entry in scores.items():
        print(
            f"{source:10} {len(entry.errors):5} {percent(entry.mape if entry.errors else None):>7} "
            f"{percent(statistics.fmean(entry.errors) if entry.errors else None):>7} {percent(rows.get(source)):>11} "
            f"{percent(stacks.get(source)):>14} {percent(statistics.fmean(entry.regret) if entry.regret else None):>7} "
            f"{statistics.fmean(entry.spearman) if entry.spearman else math.nan:6.2f} "
            f"{entry.false_fits:5}/{entry.out_of_memory:<5} {entry.false_refusals:7}/{entry.ran:<5}"
        )
    print("headline  ", {key: round(value, 4) for key, value in headline(scores).items()})
    counted = [source for source in stacks if source not in (*NOISY, *ORDER_ONLY)]
    if counted:
        print(
            f"mean over {len(counted)} sources: unseen rows {percent(statistics.fmean(rows[s] for s in counted))}, "
            f"unseen stacks {percent(statistics.fmean(stacks[s] for s in counted))}, "
            f"at worst {percent(max(stacks[s] for s in counted))}"
        )


def write(values: Mapping[str, float], ranges: Mapping[str, tuple[float, float]]) -> None:
    """Put values, and ranges where there are any, into strategies/constants.py, three significant digits each."""
    path = Path(home.__file__)
    text = path.read_text(encoding="utf-8")

    def number(name: str, value: float) -> str:
        return f"{value / GIB:.3g} * GIB" if name == "context_bytes" else f"{value:.3g}"

    for name, value in values.items():
        told = rf"(    {name}: float = fitted\(\s+)([^\n]*),(\s+)\(([^\n]*)\),"
        found = re.search(told, text)
        assert found, name
        span = ", ".join(number(name, end) for end in ranges[name]) if name in ranges else found[4]
        text = text.replace(found[0], f"{found[1]}{number(name, value)},{found[3]}({span}),")
    path.write_text(text, encoding="utf-8")


def spans(without: Mapping[str, TimeConstants], whole: TimeConstants) -> dict[str, tuple[float, float]]:
    """Return of each constant the least and the largest value of all fits."""
    found = {name: [getattr(fit, name) for fit in (whole, *without.values())] for name in NAMES}
    return {name: (min(values), max(values)) for name, values in found.items()}


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit and write the constants")
    parser.add_argument("--quick", action="store_true", help="no cross-validation")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    fit, verdicts = SpeedFit(timed()), settled()
    constants, bytes_of, without = TIME, MEMORY, {} if options.quick else without_stacks(fit)
    if options.fit:
        constants, bytes_of = fit.without(), fit_memory(verdicts)
        ranges = spans(without, constants) if without else {}
        for names, values in ((NAMES, constants), (MEMORY_NAMES, bytes_of)):
            write({name: getattr(values, name) for name in names}, ranges)
            say("\n".join(f"  {name:24} {getattr(values, name):.4g}  {ranges.get(name, '')}" for name in names))
    rows = {} if options.quick else by_row(fit)
    show(scored(cases(), constants, bytes_of), rows, by_stack(fit, without))
    say(
        f"{len(fit.cases)} runs fit {len(NAMES)} constants of time, {len(verdicts)} verdicts {len(MEMORY_NAMES)} of memory; "
        f"{time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
