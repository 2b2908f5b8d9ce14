"""Fits the constants of strategies/constants.py to published runs.

Speed: all fitted TimeConstants at once, by damped least squares on log(predicted / published), errors beyond 15 % counting
linearly. Memory: all fitted MemoryConstants by coordinate descent on a logistic loss of log(peak / usable) against fits or out of
memory. Each constant starts from its neutral value and is held loosely near it (PRIOR). A stack's mean weighs as
it tells about an unseen stack: 1 / (tau^2 + sigma^2 / runs); nothing depends on a source's name."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.published import NOISY, Case, cases
from strategies.constants import MEMORY, TIME, MemoryConstants, TimeConstants, fitted_names, table
from strategies.price.memory import price_memory
from strategies.price.roofline import Roofline
from strategies.price.step_time import step_time

LINEAR_BEYOND = 0.15
"""Log error beyond which a loss grows linearly."""
PRIOR = 0.3
"""Deviation of log(constant / start) that is expected before any run is seen."""
MOST_INDEPENDENT = 3
"""Runs that the runs of one stack count as, at most."""
LINEAR_BEYOND = 0.15
TAU, SIGMA = 0.06, 0.09
"""Deviations of the log error that the loss assumes: between stacks, and of a run within its stack. Between stacks fits leave
some 0.1; half of it makes the mean bias over stacks count more, and left-out stacks come out better (9.6 % for 9.8)."""
FALSE_FIT_WEIGHT = 11.0
"""An out-of-memory that was promised to fit is worse than a layout that was refused."""
SHARPNESS = 0.03
"""Log of peak over usable at which a verdict is as good as certain."""
MOST_RUNS = 100
"""Runs of one source that a fit looks at: of a longer table every second, third, ... run."""
RAN_ALONE = 30
"""Runs that the verdicts of a stack weigh at most, beyond as many as ran out of memory: far below the limit they say little."""
UNFITTED = (*NOISY, "ultra")
"""Sources that no constant is fitted to: repeats that do not agree, and strong scaling of 1B over 512 GPUs."""
NAMES, MEMORY_NAMES = fitted_names(TimeConstants), fitted_names(MemoryConstants)


def start() -> TimeConstants:
    """Return the constants of time from which every fit starts."""
    known = table(TimeConstants)
    return dataclasses.replace(TIME, **{name: known[name].start for name in NAMES})


def memory_start() -> MemoryConstants:
    """Return the constants of memory from which every fit starts."""
    known = table(MemoryConstants)
    return dataclasses.replace(MEMORY, **{name: known[name].start for name in MEMORY_NAMES})


def predict(selected: Sequence[Case], constants: TimeConstants = TIME) -> list[float]:
    """Return the tokens/s/GPU of each case."""
    roofs: dict[tuple[int, int, str], Roofline] = {}
    speeds = []
    for case in selected:
        key = id(case.work), id(case.cluster), case.precision
        roof = roofs.get(key) or roofs.setdefault(key, Roofline(case.work, case.cluster, case.precision, constants))
        speeds.append(case.speed(step_time(roof, case.strategy, case.sequence_length).step_s))
    return speeds


def fills(selected: Sequence[Case], constants: MemoryConstants = MEMORY) -> list[float]:
    """Return the peak over the usable bytes of each case."""
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


def timed() -> list[Case]:
    """Return the runs to whose speed constants are fitted."""
    rows = [case for case in cases() if case.fits and case.source not in UNFITTED]
    return _thinned(rows, MOST_RUNS, least=3)


def settled() -> list[Case]:
    """Return the runs to whose fitting or running out of memory constants are fitted."""
    return _thinned([case for case in cases() if case.verdict and case.source not in UNFITTED], 1000)


def _thinned(rows: Sequence[Case], most: int, *, least: int = 1) -> list[Case]:
    """Return every n-th run of each source, so that none has more than `most`; no source with fewer than `least`."""
    chosen: list[Case] = []
    for source, count in Counter(case.source for case in rows).items():
        if count >= least:
            chosen += [case for case in rows if case.source == source][:: -(-count // most)]
    return chosen


def centred(selected: Sequence[Case]) -> tuple[np.ndarray, np.ndarray]:
    """Return (matrix that makes residuals of runs residuals of a loss, weight of each).

    A residual is the bias of a stack plus the error of a run: what runs of one stack show about each other counts by SIGMA, what
    their mean shows by TAU. The sources of a stack count equally, and a stack as no more than MOST_INDEPENDENT runs, since its
    runs share the choices of one benchmark."""
    runs, of_stack = Counter(case.source for case in selected), Counter(case.stack for case in selected)
    tables = Counter({case.source: case.stack for case in selected}.values())
    stacks = list(dict.fromkeys(case.stack for case in selected))
    part = np.array([1 / tables[case.stack] / runs[case.source] for case in selected])
    count = {stack: min(of_stack[stack], MOST_INDEPENDENT) for stack in stacks}
    member = np.array([[case.stack == stack for case in selected] for stack in stacks], dtype=float)
    means = member * part
    about = np.eye(len(selected)) - member.T @ means
    weight = [part[index] * count[case.stack] / SIGMA**2 for index, case in enumerate(selected)]
    weight += [1 / (TAU**2 + SIGMA**2 / count[stack]) for stack in stacks]
    return np.concatenate([about, means]), np.array(weight)


# Speed ---------------------------------------------------------------------------------------------------------------


class SpeedFit:
    """A fit of all constants of time to runs, of which any may be left out. Jacobians are kept: at the neutral start all fits
    share one."""

    def __init__(self, selected: Sequence[Case]) -> None:
        self.cases = list(selected)
        self.published = np.log([case.tokens_per_second_per_gpu for case in selected])
        known = table(TimeConstants)
        self.origin = np.log([known[name].start or 1.0 for name in NAMES])
        self.low = np.log([known[name].within[0] for name in NAMES])
        self.high = np.log([known[name].within[1] for name in NAMES])
        self._known: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def residuals(self, x: np.ndarray, kept: np.ndarray) -> np.ndarray:
        chosen = [case for case, keep in zip(self.cases, kept, strict=True) if keep]
        return np.log(predict(chosen, constants_of(x))) - self.published[kept]

    def slopes(self, x: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (residuals, their slopes over the logs of the constants)."""
        key = x.tobytes() + kept.tobytes()
        if key not in self._known:
            r = self.residuals(x, kept)
            steps = np.eye(len(x)) * 1e-4
            self._known[key] = r, np.stack([(self.residuals(x + step, kept) - r) / 1e-4 for step in steps], axis=1)
        return self._known[key]

    def loss(self, x: np.ndarray, r: np.ndarray, weight: np.ndarray) -> float:
        robust = 2 * LINEAR_BEYOND**2 * (np.sqrt(1 + (r / LINEAR_BEYOND) ** 2) - 1)
        return float((weight * robust).sum() + ((x - self.origin) ** 2).sum() / PRIOR**2)

    def without(self, left_out: Callable[[Case], bool] | None = None, *, rounds: int = 8) -> TimeConstants:
        """Return the constants that fit all runs but those left out: Gauss and Newton's steps from the neutral start, each the
        robust solution of the linearized problem within the bounds."""
        kept = np.array([left_out is None or not left_out(case) for case in self.cases])
        about, weight = centred([case for case, keep in zip(self.cases, kept, strict=True) if keep])
        everything = np.ones(len(self.cases), dtype=bool)
        x = np.clip(self.origin, self.low, self.high)
        r, slopes = self.slopes(x, everything)
        r, slopes = about @ r[kept], about @ slopes[kept]
        best = self.loss(x, r, weight)
        for _ in range(rounds):
            reach, before = 0.7, best
            for _ in range(5):
                trial = self._step(x, r, slopes, weight, reach)
                tried = about @ self.residuals(trial, kept)
                if self.loss(trial, tried, weight) < best:
                    break
                reach /= 3
            else:
                break
            x, best = trial, self.loss(trial, tried, weight)
            if before - best < 2e-3 * best:
                break
            r, slopes = (about @ found for found in self.slopes(x, kept))
        return constants_of(x)

    def _step(self, x: np.ndarray, r: np.ndarray, slopes: np.ndarray, weight: np.ndarray, reach: float) -> np.ndarray:
        """Return the least of the linearized loss within `reach` of x and within the bounds."""
        low, high = np.maximum(self.low, x - reach) - x, np.minimum(self.high, x + reach) - x
        step = np.zeros(len(x))
        for _ in range(12):
            found = r + slopes @ step
            robust = weight / np.sqrt(1 + (found / LINEAR_BEYOND) ** 2)
            normal = slopes.T @ (robust[:, None] * slopes) + np.eye(len(x)) / PRIOR**2
            gradient = slopes.T @ (robust * r) + (x - self.origin) / PRIOR**2
            free = np.ones(len(x), dtype=bool)
            step = np.zeros(len(x))
            for _ in range(len(x)):
                rest = gradient + normal[:, ~free] @ step[~free]
                step[free] = np.linalg.solve(normal[np.ix_(free, free)], -rest[free])
                out = free & ((step < low) | (step > high))
                if not out.any():
                    break
                step = np.clip(step, low, high)
                free &= ~out
                if not free.any():
                    break
        return np.asarray(x + np.clip(step, low, high))


def constants_of(x: np.ndarray) -> TimeConstants:
    """Return the constants of time whose logs are given, the assumed ones as they are."""
    return dataclasses.replace(TIME, **{name: math.exp(value) for name, value in zip(NAMES, x, strict=True)})


# Memory --------------------------------------------------------------------------------------------------------------


def fit_memory(selected: Sequence[Case], *, rounds: int = 25) -> MemoryConstants:
    """Return the constants of memory that tell best what fits: each up or down by a step that shrinks where neither helps."""
    failed, ran = (Counter(case.stack for case in selected if case.fits == fits) for fits in (False, True))
    share = {stack: min(1.0, (RAN_ALONE + failed[stack]) / ran[stack]) for stack in ran}
    weight = np.array([share[case.stack] if case.fits else FALSE_FIT_WEIGHT for case in selected])
    sign = np.array([1.0 if case.fits else -1.0 for case in selected])
    known = table(MemoryConstants)

    def loss(constants: MemoryConstants) -> float:
        wrong = sign * np.log(fills(selected, constants)) / SHARPNESS
        # Ten times beyond certainty is an outlier: a kernel or an offload that the row does not tell.
        return float((weight * np.minimum(np.logaddexp(0, wrong), 8.0)).sum())

    best = memory_start()
    value, steps = loss(best), dict.fromkeys(MEMORY_NAMES, 0.15)
    for _ in range(rounds):
        for name in MEMORY_NAMES:
            low, high = known[name].within
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
