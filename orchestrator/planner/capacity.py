"""Models x numbers of GPUs: what fits, how fast, for how many days and dollars, and the smallest cluster that does. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from clusters.cluster import Cluster
from orchestrator.models.architecture import Architecture
from orchestrator.planner.document import strategy_dict
from orchestrator.planner.problem import PlanError, Problem
from orchestrator.planner.render import strategy_told, wrapped
from orchestrator.planner.result import Wanted
from orchestrator.planner.search.solve import Solution, solve
from strategies.strategy import Offload

ClusterOf = Callable[[int], Cluster]
"""Number of GPUs -> the cluster of that size."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What every cell of the table is asked."""

    global_batch_size: int
    sequence_length: int
    precision: str
    tokens: int | None
    """Length of the training, for days and dollars."""
    tokens_per_second_per_gpu: float | None = None
    finish_within_s: float | None = None
    budget_usd: float | None = None

    @property
    def has_target(self) -> bool:
        return (self.tokens_per_second_per_gpu, self.finish_within_s, self.budget_usd) != (None, None, None)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model on one number of GPUs: the best strategy, and the best without offload where that is another one."""

    model: str
    num_gpus: int
    question: Question
    best: Solution | None
    """None: nothing fits, whatever is offloaded."""
    plain: Solution | None
    """The best that offloads nothing; None: does not fit so."""

    @property
    def fits(self) -> bool:
        return self.best is not None

    @property
    def tokens_per_second_per_gpu(self) -> float | None:
        return self.best.tokens_per_second_per_gpu if self.best else None

    @property
    def mfu(self) -> float | None:
        if self.best is None:
            return None
        problem = self.best.problem
        flops = self.best.tokens_per_second_per_gpu * problem.work.model_flops_per_token(problem.sequence_length)
        return flops / problem.cluster.accelerator.peak_flops[problem.precision]

    @property
    def wall_s(self) -> float | None:
        return self.question.tokens / self.best.tokens_per_second if self.best and self.question.tokens else None

    @property
    def usd(self) -> float | None:
        price = self.best.problem.cluster.usd_per_gpu_hour if self.best else None
        if self.best is None or self.wall_s is None or price is None:
            return None
        return self.wall_s / 3600 * self.best.strategy.num_gpus * price

    @property
    def meets(self) -> bool:
        """Fits, and keeps every target of the question."""
        asked = self.question
        if self.best is None:
            return False
        speed = asked.tokens_per_second_per_gpu
        return (
            (speed is None or self.best.tokens_per_second_per_gpu >= speed)
            and (asked.finish_within_s is None or (self.wall_s is not None and self.wall_s <= asked.finish_within_s))
            and (asked.budget_usd is None or (self.usd is not None and self.usd <= asked.budget_usd))
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "num_gpus": self.num_gpus,
            "fits": self.fits,
            "strategy": strategy_dict(self.best.strategy, stages=False) if self.best else None,
            "peak_bytes": self.best.price.memory.peak_bytes if self.best else None,
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "mfu": self.mfu,
            "wall_s": self.wall_s,
            "usd": self.usd,
            "meets_target": self.meets if self.question.has_target else None,
            "without_offload": {
                "fits": self.plain is not None,
                "tokens_per_second_per_gpu": self.plain.tokens_per_second_per_gpu if self.plain else None,
            },
        }


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The table, and per model the smallest clusters."""

    cells: tuple[Cell, ...]
    smallest: dict[str, dict[str, Cell | None]]
    """model -> fits, fits_without_offload, meets_target -> the cell of the smallest such cluster."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": 1,
            "cells": [cell.to_dict() for cell in self.cells],
            "smallest": {
                model: {name: cell.num_gpus if cell else None for name, cell in found.items()}
                for model, found in self.smallest.items()
            },
        }


def capacity(
    models: Sequence[Architecture], sizes: Sequence[int], *, cluster_of: ClusterOf, question: Question
) -> Capacity:
    """Every model on every number of GPUs; the smallest clusters are then looked for between the sizes."""
    cells, smallest = [], {}
    for arch in models:
        known = {size: price_cell(arch, cluster_of(size), question) for size in sizes}
        cells += list(known.values())
        wishes: dict[str, Callable[[Cell], bool]] = {
            "fits": lambda cell: cell.fits,
            "fits_without_offload": lambda cell: cell.plain is not None,
        }
        if question.has_target:
            wishes["meets_target"] = lambda cell: cell.meets
        smallest[arch.name] = {
            name: _smallest(arch, known, wish, cluster_of, question) for name, wish in wishes.items()
        }
    return Capacity(cells=tuple(cells), smallest=smallest)


def price_cell(arch: Architecture, cluster: Cluster, question: Question) -> Cell:
    """One model on one cluster."""
    problem = Problem(
        arch=arch,
        cluster=cluster,
        global_batch_size=question.global_batch_size,
        sequence_length=question.sequence_length,
        precision=question.precision,
    )
    best: Solution | None
    plain: Solution | None
    try:
        best = solve(problem, wanted=Wanted())
        plain = (
            best
            if not best.strategy.offload.any
            else solve(problem.changed(pins={"offload": Offload()}), after=best.search)
        )
    except PlanError:
        best = plain = None
    return Cell(
        model=arch.name,
        num_gpus=cluster.num_gpus,
        question=question,
        best=best if best and best.fits else None,
        plain=plain if plain and plain.fits else None,
    )


def _smallest(
    arch: Architecture,
    known: dict[int, Cell],
    wish: Callable[[Cell], bool],
    cluster_of: ClusterOf,
    question: Question,
) -> Cell | None:
    """Bisects between the largest size that does not and the smallest that does, in whole nodes, or GPUs of one node."""
    good = next((size for size in sorted(known) if wish(known[size])), None)
    if good is None:
        return None
    low = max((size for size in known if size < good), default=0)
    step = cluster_of(good).gpus_per_node if good > cluster_of(good).gpus_per_node else 1
    while good - low > step:
        middle = low + max(1, (good - low) // 2 // step) * step
        middle = middle // step * step if middle // step * step > low else middle
        if middle >= good:
            break
        if middle not in known:
            known[middle] = price_cell(arch, cluster_of(middle), question)
        if wish(known[middle]):
            good = middle
        else:
            low = middle
    return known[good]


def told(table: Capacity) -> list[str]:
    """Lines of a table of 88 columns: a block a model."""
    lines: list[str] = []
    for model in dict.fromkeys(cell.model for cell in table.cells):
        lines.append(f"{model}")
        lines.append(f"  {'GPUs':>6} {'tokens/s/GPU':>13} {'MFU':>6} {'days':>8} {'dollars':>12}  strategy")
        for cell in (cell for cell in table.cells if cell.model == model):
            lines += _row(cell)
        for name, found in table.smallest[model].items():
            size = "none of these" if found is None else f"{found.num_gpus} GPU{'s' * (found.num_gpus != 1)}"
            lines.append(f"  smallest that {name.replace('_', ' ')}: {size}")
        lines.append("")
    return lines[:-1]


def _row(cell: Cell) -> list[str]:
    if cell.best is None:
        return [f"  {cell.num_gpus:>6} {'does not fit':>13}"]
    days = f"{cell.wall_s / 86400:,.1f}" if cell.wall_s is not None else "-"
    usd = f"${cell.usd:,.0f}" if cell.usd is not None else "-"
    mark = " *" if cell.question.has_target and cell.meets else ""
    first, *rest = wrapped(strategy_told(cell.best.strategy) + mark, 40)
    lines = [
        f"  {cell.num_gpus:>6} {cell.tokens_per_second_per_gpu:>13,.0f} {cell.mfu:>6.1%} {days:>8} {usd:>12}  {first}",
        *(f"{'':53}{line}" for line in rest),
    ]
    if cell.best.strategy.offload.any:
        if cell.plain is None:
            lines.append(f"{'':9}{'-':>13} {'':>6} {'':>8} {'':>12}  without offload it does not fit")
        else:
            plain = cell.plain
            first, *rest = wrapped(f"without offload: {strategy_told(plain.strategy)}", 40)
            lines.append(f"{'':9}{plain.tokens_per_second_per_gpu:>13,.0f} {'':>6} {'':>8} {'':>12}  {first}")
            lines += [f"{'':53}{line}" for line in rest]
    return lines
