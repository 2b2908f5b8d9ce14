"""Clocks and samples of a micro benchmark."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable


def cpu_seconds(operation: Callable[[], object], *, budget_s: float) -> float:
    """Median CPU seconds of a call on this thread.

    CPU time, because another program that takes the core for a moment is no property of the machine. On an idle machine
    the two clocks agree within 1 %.
    """
    return statistics.median(_samples(operation, budget_s))


def quartile(samples: list[float]) -> float:
    """The lower one: for wall seconds of waiting on others, where CPU time says nothing and other programs disturb."""
    return sorted(samples)[len(samples) // 4]


def _samples(operation: Callable[[], object], budget_s: float) -> list[float]:
    """One warm-up, then calls until the budget is spent: at least 2 unless the wall clock runs far past it."""
    operation()
    samples: list[float] = []
    started = time.perf_counter()
    while True:
        before = time.thread_time()
        operation()
        samples.append(time.thread_time() - before)
        elapsed = time.perf_counter() - started
        if (len(samples) >= 2 and elapsed >= budget_s) or elapsed > 4 * budget_s:
            return samples


def mean_curves(curves: Iterable[dict[str, list[list[float]]]]) -> dict[str, list[list[float]]]:
    """Point by point over the workers; only points that every worker measured."""
    per_worker = list(curves)
    merged: dict[str, list[list[float]]] = {}
    for name in per_worker[0]:
        points = [{size: rate for size, rate in curves.get(name, [])} for curves in per_worker]  # noqa: C416
        sizes = sorted(set.intersection(*(set(worker) for worker in points)))
        if sizes:
            merged[name] = [[size, statistics.fmean(worker[size] for worker in points)] for size in sizes]
    return merged
