"""The planner's constants against published runs: how wrong, and how wrong on what it has not seen.

    python -m benchmarks.oracle            scores by source, then cross-validated by row and by whole source
    python -m benchmarks.oracle --fit      fits the constants first and writes them into strategies/constants.py

Speed: all TimeConstants at once, by damped least squares on log(predicted / published), every source with the same weight and
errors beyond 15 % counting linearly, each constant held loosely (PRIOR) near the value it starts from. Memory: MemoryConstants
by coordinate descent on a logistic loss of log(peak / usable) against fits or out of memory."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.published import NOISY, ORDER_ONLY, Case, Score, cases, headline, score
from strategies import constants as home
from strategies.constants import GIB, MEMORY, TIME, MemoryConstants, TimeConstants
from strategies.price.memory import price_memory
from strategies.price.roofline import Roofline
from strategies.price.step_time import step_time

BOUNDS: dict[str, tuple[float, float]] = {
    "matmul": (0.5, 1.0), "flash": (0.3, 1.0), "score_products": (0.2, 1.0), "memory": (0.6, 0.92), "nvlink": (0.6, 0.85),
    "network": (0.5, 0.95), "hidden": (0.02, 0.95), "hidden_sharded": (0.3, 0.98), "transfer": (0.1, 1.0),
    "collective_s": (30e-6, 100e-6), "step_s": (1e-3, 50e-3), "score_copies": (2.0, 4.0), "sharded_logit_bytes": (2.0, 10.0),
    "recompute_layers": (1.0, 3.0), "recompute_scores": (2.0, 12.0), "working_elements": (2.0, 12.0),
    "context_bytes": (1.5 * GIB, 5 * GIB),
    "fragmentation": (0.01, 0.08), "unfused_norm_elements": (4.0, 9.0),
}  # fmt: skip
"""What is physical: nobody reaches more than a benchmark of the part alone."""
PRIOR = 0.005
"""Weight of (log constant / start) squared against a source's mean squared log error."""
LINEAR_BEYOND = 0.15
ORDER_WEIGHT = 0.25
"""Of vtrainS beside a source that counts: small models on few GPUs, all that shows what launches cost."""
FALSE_FIT_WEIGHT = 11.0
"""An out-of-memory that was promised to fit is worse than a layout that was refused."""
SHARPNESS = 0.03
"""Log of peak over usable at which a verdict is as good as certain."""
NAMES = tuple(field.name for field in dataclasses.fields(TimeConstants))
MEMORY_NAMES = tuple(field.name for field in dataclasses.fields(MemoryConstants))


def predict(selected: Sequence[Case], constants: TimeConstants = TIME) -> list[float]:
    """Tokens/s/GPU of each case."""
    roofs: dict[tuple[int, int, str], Roofline] = {}
    speeds = []
    for case in selected:
        key = id(case.work), id(case.cluster), case.precision
        roof = roofs.get(key) or roofs.setdefault(key, Roofline(case.work, case.cluster, case.precision, constants))
        speeds.append(case.speed(step_time(roof, case.strategy, case.sequence_length).step_s))
    return speeds


def fills(selected: Sequence[Case], constants: MemoryConstants = MEMORY) -> list[float]:
    """Peak over usable bytes of each case."""
    found = []
    for case in selected:
        memory = price_memory(
            case.work,
            case.strategy,
            case.cluster,
            global_batch_size=case.global_batch_size,
            sequence_length=case.sequence_length,
            precision=case.precision,
            constants=constants,
        )
        found.append(memory.peak_bytes / memory.usable_bytes)
    return found


def table(
    selected: Sequence[Case], constants: TimeConstants = TIME, memory: MemoryConstants = MEMORY
) -> dict[str, Score]:
    fits = [fill <= 1 for fill in fills(selected, memory)]
    return score(zip(selected, predict(selected, constants), fits, strict=True))


# Fitting speed -------------------------------------------------------------------------------------------------------


def weights(selected: Sequence[Case]) -> np.ndarray:
    """Every source weighs the same, whatever its number of runs."""
    counts: dict[str, int] = {}
    for case in selected:
        counts[case.source] = counts.get(case.source, 0) + 1
    each = [(ORDER_WEIGHT if case.source in ORDER_ONLY else 1.0) / counts[case.source] for case in selected]
    return np.array(each) / sum(each)


def fit_speed(selected: Sequence[Case], start: TimeConstants = TIME, *, rounds: int = 25) -> TimeConstants:
    """Levenberg-Marquardt on the logs of the constants, with weights that make large errors count linearly."""
    published = np.log([case.tokens_per_second_per_gpu for case in selected])
    weight = weights(selected)
    origin = np.log([getattr(start, name) for name in NAMES])
    low = np.log([BOUNDS.get(name, (1e-12, 1e12))[0] for name in NAMES])
    high = np.log([BOUNDS.get(name, (1e-12, 1e12))[1] for name in NAMES])

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.log(predict(selected, _constants(x))) - published

    def loss(x: np.ndarray, r: np.ndarray) -> float:
        robust = 2 * LINEAR_BEYOND**2 * (np.sqrt(1 + (r / LINEAR_BEYOND) ** 2) - 1)
        return float((weight * robust).sum() + PRIOR**2 * ((x - origin) ** 2).sum())

    x, damping = np.clip(origin, low, high), 1e-3
    r = residuals(x)
    best = loss(x, r)
    for _ in range(rounds):
        slopes = np.stack([(residuals(x + step) - r) / 1e-4 for step in np.eye(len(x)) * 1e-4], axis=1)
        robust = weight / np.sqrt(1 + (r / LINEAR_BEYOND) ** 2)
        normal = slopes.T @ (robust[:, None] * slopes) + PRIOR**2 * np.eye(len(x))
        gradient = slopes.T @ (robust * r) + PRIOR**2 * (x - origin)
        for _ in range(6):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), gradient)
            trial = np.clip(x - np.clip(step, -0.5, 0.5), low, high)
            tried = residuals(trial)
            if loss(trial, tried) < best:
                break
            damping *= 5
        else:
            return _constants(x)
        gained, best = best - loss(trial, tried), loss(trial, tried)
        x, r, damping = trial, tried, max(1e-6, damping / 5)
        if gained < 1e-5 * best:
            break
    return _constants(x)


def _constants(x: np.ndarray) -> TimeConstants:
    return TimeConstants(**{name: math.exp(value) for name, value in zip(NAMES, x, strict=True)})


# Fitting memory ------------------------------------------------------------------------------------------------------


def fit_memory(selected: Sequence[Case], start: MemoryConstants = MEMORY, *, rounds: int = 25) -> MemoryConstants:
    """Coordinate descent: each constant up or down by a step that shrinks where neither helps."""
    counts: dict[str, int] = {}
    for case in selected:
        counts[case.source] = counts.get(case.source, 0) + 1
    # Sources without an out-of-memory say little: they weigh like 30 runs however many they are.
    weight = np.array(
        [
            (1.0 if case.fits else FALSE_FIT_WEIGHT)
            * min(1.0, (600 if case.source == "aa" else 30) / counts[case.source])
            for case in selected
        ]
    )
    sign = np.array([1.0 if case.fits else -1.0 for case in selected])

    def loss(constants: MemoryConstants) -> float:
        wrong = sign * np.log(fills(selected, constants)) / SHARPNESS
        # Ten times beyond certainty is an outlier: a kernel or an offload that the row does not tell.
        return float((weight * np.minimum(np.logaddexp(0, wrong), 8.0)).sum())

    best, value, steps = start, loss(start), dict.fromkeys(MEMORY_NAMES, 0.15)
    for _ in range(rounds):
        for name in MEMORY_NAMES:
            low, high = BOUNDS.get(name, (1e-12, 1e12))
            for sign_of_step in (1, -1):
                moved = min(high, max(low, getattr(best, name) * math.exp(sign_of_step * steps[name])))
                trial = dataclasses.replace(best, **{name: moved})
                tried = loss(trial) if moved != getattr(best, name) else math.inf
                if tried < value:
                    best, value = trial, tried
                    break
            else:
                steps[name] /= 2
        if max(steps.values()) < 0.01:
            break
    return best


# Cross-validation ----------------------------------------------------------------------------------------------------


def by_row(selected: Sequence[Case], constants: TimeConstants, folds: int = 5) -> dict[str, float]:
    """MAPE by source, each row predicted by constants that were fitted without it."""
    errors: dict[str, list[float]] = {}
    for fold in range(folds):
        rest = [case for index, case in enumerate(selected) if index % folds != fold]
        held = [case for index, case in enumerate(selected) if index % folds == fold]
        _note(errors, held, fit_speed(rest, constants, rounds=6))
    return {source: statistics.fmean(values) for source, values in errors.items()}


def by_source(selected: Sequence[Case], constants: TimeConstants) -> dict[str, float]:
    """MAPE by source, each source predicted by constants that were fitted without any of it."""
    errors: dict[str, list[float]] = {}
    for source in dict.fromkeys(case.source for case in selected if case.source not in ORDER_ONLY):
        rest = [case for case in selected if case.source != source]
        held = [case for case in selected if case.source == source]
        _note(errors, held, fit_speed(rest, constants, rounds=10))
    return {source: statistics.fmean(values) for source, values in errors.items()}


def _note(errors: dict[str, list[float]], held: Sequence[Case], constants: TimeConstants) -> None:
    for case, speed in zip(held, predict(held, constants), strict=True):
        errors.setdefault(case.source, []).append(abs(speed / case.tokens_per_second_per_gpu - 1))


def fitted_on() -> tuple[list[Case], list[Case]]:
    """(runs that fit the speed, runs that fit the memory)."""
    ran: dict[str, int] = {}
    for case in cases():
        ran[case.source] = ran.get(case.source, 0) + case.fits
    speed = [
        case
        for index, case in enumerate(cases())
        if case.fits
        and case.source not in (*NOISY, "ultra")
        and ran[case.source] >= 3
        # a quarter of the launch-bound toys is enough to see what launches cost
        and (case.source != "vtrainS" or index % 4 == 0)
    ]
    memory = [
        case
        for index, case in enumerate(cases())
        if case.verdict and case.source not in NOISY and (case.source != "ultra" or index % 10 == 0)
    ]
    return speed, memory


# Printing ------------------------------------------------------------------------------------------------------------


def show(scores: dict[str, Score], rows: dict[str, float], sources: dict[str, float]) -> None:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    print(
        f"{'source':10} {'runs':>5} {'MAPE':>7} {'bias':>7} {'unseen row':>11} {'unseen source':>14} {'regret':>7} "
        f"{'rho':>6} {'false fits':>11} {'false refusals':>15}"
    )
    for source, entry in scores.items():
        print(
            f"{source:10} {len(entry.errors):5} {percent(entry.mape if entry.errors else None):>7} "
            f"{percent(statistics.fmean(entry.errors) if entry.errors else None):>7} {percent(rows.get(source)):>11} "
            f"{percent(sources.get(source)):>14} {percent(statistics.fmean(entry.regret) if entry.regret else None):>7} "
            f"{statistics.fmean(entry.spearman) if entry.spearman else math.nan:6.2f} "
            f"{entry.false_fits:5}/{entry.out_of_memory:<5} {entry.false_refusals:7}/{entry.ran:<5}"
        )
    print("headline  ", {key: round(value, 4) for key, value in headline(scores).items()})
    counted = [source for source in sources if source not in (*NOISY, *ORDER_ONLY)]
    if counted:
        print(
            f"mean over {len(counted)} sources: unseen rows {percent(statistics.fmean(rows[s] for s in counted))}, "
            f"unseen sources {percent(statistics.fmean(sources[s] for s in counted))}"
        )


def write(constants: TimeConstants | MemoryConstants) -> None:
    """Puts the values into strategies/constants.py, three significant digits each."""
    path = Path(home.__file__)
    text = path.read_text(encoding="utf-8")
    for name, value in dataclasses.asdict(constants).items():
        number = f"{value / GIB:.3g} * GIB" if name == "context_bytes" else f"{value:.3g}"
        text = re.sub(rf"(    {name}: float = ).*", rf"\g<1>{number}", text)
    path.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit and write the constants")
    parser.add_argument("--quick", action="store_true", help="no cross-validation")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    speed, memory = fitted_on()
    constants, bytes_of = TIME, MEMORY
    if options.fit:
        constants, bytes_of = fit_speed(speed), fit_memory(memory)
        for fitted in (constants, bytes_of):
            write(fitted)
            say("\n".join(f"  {name:24} {value:.4g}" for name, value in dataclasses.asdict(fitted).items()))
    rows = {} if options.quick else by_row(speed, constants)
    sources = {} if options.quick else by_source(speed, constants)
    show(table(cases(), constants, bytes_of), rows, sources)
    say(
        f"{len(speed)} runs fit {len(NAMES)} constants of time, {len(memory)} verdicts {len(MEMORY_NAMES)} of memory; "
        f"{time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
