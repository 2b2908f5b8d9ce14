"""Models x numbers of GPUs: what fits, how fast, for how many days and dollars, and the smallest cluster that does. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from clusters.cluster import Cluster
from orchestrator.models.architecture import Architecture
from orchestrator.planner.problem import Problem
from orchestrator.planner.reasons.choice import without_offload
from orchestrator.planner.reasons.confidence import error_of
from orchestrator.planner.reasons.targets import limits
from orchestrator.planner.search.result import Wanted
from orchestrator.planner.search.solve import Refused, Solution, ask, solve
from orchestrator.planner.show.json import strategy_dict
from orchestrator.planner.show.words import LONG_S, RED, length_told, painted, strategy_told, wrapped

ClusterOf = Callable[[int], Cluster]
"""Number of GPUs -> the cluster of that size."""
WISHES = {"fits": "fits", "fits_without_offload": "fits without offload", "meets_target": "meets every target"}
"""Wishes of which the smallest cluster is looked for, by their names in JSON."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question that every cell of the table is asked."""

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

    def wanted(self, usd_per_gpu_hour: float | None) -> Wanted:
        """Return the targets as limits on a step."""
        tokens_per_step = self.global_batch_size * self.sequence_length
        return limits(
            tokens_per_step=tokens_per_step,
            num_steps=self.tokens / tokens_per_step if self.tokens else None,
            usd_per_gpu_hour=usd_per_gpu_hour,
            tokens_per_second_per_gpu=self.tokens_per_second_per_gpu,
            finish_within_s=self.finish_within_s,
            budget_usd=self.budget_usd,
        )

    def told(self) -> str:
        """300B tokens in batches of 1,024 x 2,048 in bf16."""
        length = f"{tokens_told(self.tokens)} tokens in batches" if self.tokens else "batches"
        return f"{length} of {self.global_batch_size:,} x {self.sequence_length:,} tokens, {self.precision}"

    def targets_told(self) -> list[str]:
        """Return each target in words."""
        told = []
        if self.tokens_per_second_per_gpu is not None:
            told.append(f"at least {self.tokens_per_second_per_gpu:,.0f} tokens/s/GPU")
        if self.finish_within_s is not None:
            told.append(f"done within {length_told(self.finish_within_s)}")
        if self.budget_usd is not None:
            told.append(f"for at most ${self.budget_usd:,.0f}")
        return told


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model on one number of GPUs: the strategy that a plan would take, and the best without offload."""

    model: str
    num_gpus: int
    question: Question
    best: Solution | None
    """None: nothing fits, whatever is offloaded."""
    plain: Solution | None
    """The best that offloads nothing; None: does not fit so."""
    refused: Refused | None = None
    """Why the question has no answer, where it has none."""

    @property
    def fits(self) -> bool:
        return self.best is not None

    @property
    def tokens_per_second_per_gpu(self) -> float | None:
        return self.best.tokens_per_second_per_gpu if self.best else None

    @property
    def throughput_error(self) -> float | None:
        return error_of(self.best) if self.best else None

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
    def is_long(self) -> bool:
        """Fits, and takes over a year."""
        return self.wall_s is not None and self.wall_s >= LONG_S

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
            "throughput_error": self.throughput_error,
            "mfu": self.mfu,
            "wall_s": self.wall_s,
            "usd": self.usd,
            "meets_target": self.meets if self.question.has_target else None,
            "without_offload": {
                "fits": self.plain is not None,
                "tokens_per_second_per_gpu": self.plain.tokens_per_second_per_gpu if self.plain else None,
            },
            "refused_because": self.refused.reason if self.refused else None,
        }


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The table, and per model the smallest clusters."""

    question: Question
    cluster: Cluster
    """The cluster of the largest size that was asked about."""
    cells: tuple[Cell, ...]
    smallest: dict[str, dict[str, Cell | None]]
    """model -> fits, fits_without_offload, meets_target -> the cell of the smallest such cluster."""

    def to_dict(self) -> dict[str, Any]:
        asked, cluster = self.question, self.cluster
        return {
            "version": 1,
            "asked": {
                "gpu": cluster.accelerator.name,
                "gpus_per_node": cluster.gpus_per_node,
                "intra_node_bytes_per_s": cluster.intra_node.bytes_per_s,
                "inter_node_bytes_per_s": cluster.inter_node.bytes_per_s,
                "usd_per_gpu_hour": cluster.usd_per_gpu_hour,
                **{name: getattr(asked, name) for name in asked.__dataclass_fields__},
            },
            "cells": [cell.to_dict() for cell in self.cells],
            "smallest": {
                model: {name: cell.num_gpus if cell else None for name, cell in found.items()}
                for model, found in self.smallest.items()
            },
        }

    def cluster_told(self) -> str:
        """a100-80gb in nodes of 8, nvlink inside and 200 GB/s a node between them, $1.79 a GPU-hour."""
        cluster = self.cluster
        parts = [cluster.accelerator.name]
        if cluster.gpus_per_node > 1:
            parts = [f"{parts[0]} in nodes of {cluster.gpus_per_node}, {cluster.intra_node.name} inside"]
        if cluster.num_nodes > 1:
            parts.append(f"{cluster.inter_node.bytes_per_s / 1e9:,.0f} GB/s a node between them")
        price = cluster.usd_per_gpu_hour
        return ", ".join([*parts, "no known price" if price is None else f"${price:,.2f} a GPU-hour"])


def capacity(
    models: Sequence[Architecture],
    sizes: Sequence[int],
    *,
    cluster_of: ClusterOf,
    question: Question,
    between: Sequence[int] = (),
) -> Capacity:
    """Every model on every number of GPUs, and of each the smallest that does what is wished.

    Args:
        between: numbers of GPUs, ascending, among which the smallest are looked for as well: those of a range."""
    cells, smallest = [], {}
    wishes: dict[str, Callable[[Cell], bool]] = {
        "fits": lambda cell: cell.fits,
        "fits_without_offload": lambda cell: cell.plain is not None,
    }
    if question.has_target:
        wishes["meets_target"] = lambda cell: cell.meets
    among = sorted({*sizes, *between})
    for arch in models:
        known = {size: price_cell(arch, cluster_of(size), question) for size in sizes}
        cells += list(known.values())
        for wish in wishes.values():
            _bisect(arch, known, wish, among, cluster_of, question)
        # Whatever was priced for one wish counts for all: what fits without offload fits.
        smallest[arch.name] = {
            name: min((cell for cell in known.values() if wish(cell)), key=lambda cell: cell.num_gpus, default=None)
            for name, wish in wishes.items()
        }
    return Capacity(question=question, cluster=cluster_of(max(sizes)), cells=tuple(cells), smallest=smallest)


def price_cell(arch: Architecture, cluster: Cluster, question: Question) -> Cell:
    """One model on one cluster."""
    problem = Problem(
        arch=arch,
        cluster=cluster,
        global_batch_size=question.global_batch_size,
        sequence_length=question.sequence_length,
        precision=question.precision,
    )
    best = ask(solve, problem, wanted=question.wanted(cluster.usd_per_gpu_hour))
    found = None if isinstance(best, Refused) or not best.fits else best
    plain = found
    if found is not None and found.strategy.offload.any:
        plain = without_offload(found)
    refused = best if isinstance(best, Refused) else None
    return Cell(model=arch.name, num_gpus=cluster.num_gpus, question=question, best=found, plain=plain, refused=refused)


def _bisect(
    arch: Architecture,
    known: dict[int, Cell],
    wish: Callable[[Cell], bool],
    among: Sequence[int],
    cluster_of: ClusterOf,
    question: Question,
) -> None:
    """Price sizes between the smallest that does what is wished and the largest below that does not, halving."""
    good = min((size for size in known if wish(known[size])), default=None)
    if good is None:
        return
    high = bisect_left(among, good)
    low = bisect_left(among, max((size for size in known if size < good), default=0)) if good > min(known) else high - 1
    while high - low > 1:
        middle = (low + high) // 2
        size = among[middle]
        if size not in known:
            known[size] = price_cell(arch, cluster_of(size), question)
        low, high = (low, middle) if wish(known[size]) else (middle, high)


def tokens_told(tokens: float) -> str:
    """300B, 1.5T, 20M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if tokens >= size:
            return f"{tokens / size:,.4g}{unit}"
    return f"{tokens:,.0f}"


def told(table: Capacity) -> list[str]:
    """Lines of a table of 93 columns: what was asked, then a block a model."""
    lines = [table.cluster_told(), table.question.told()]
    lines += [f"target: {', '.join(table.question.targets_told())}; met where marked *"] * table.question.has_target
    for model in dict.fromkeys(cell.model for cell in table.cells):
        lines += ["", model]
        lines.append(
            f"  {'GPUs':>6} {'tokens/s/GPU':>13} {'error':>6} {'MFU':>6} {'time':>11} {'dollars':>11}  strategy"
        )
        for cell in (cell for cell in table.cells if cell.model == model):
            lines += _row(cell)
        lines += [
            f"  smallest that {WISHES[name]}: {size_told(found)}" for name, found in table.smallest[model].items()
        ]
    return lines


def size_told(cell: Cell | None) -> str:
    """8 GPUs, in 95.8 days."""
    if cell is None:
        return "none of these"
    many = f"{cell.num_gpus:,} GPU{'s' * (cell.num_gpus != 1)}"
    if cell.wall_s is None:
        return many
    return (
        f"{many}, in {length_told(cell.wall_s)}"
        if not cell.is_long
        else f"{many}, but it takes {length_told(cell.wall_s)}"
    )


def _row(cell: Cell) -> list[str]:
    if cell.best is None:
        why = f"no answer: {cell.refused.reason}" if cell.refused else "does not fit"
        return [f"  {cell.num_gpus:>6} {why:>13}"]
    time = length_told(cell.wall_s) if cell.wall_s is not None else "-"
    time = painted(f"{time:>11}", RED) if cell.is_long else f"{time:>11}"
    usd = f"${cell.usd:,.0f}" if cell.usd is not None else "-"
    mark = "*" if cell.question.has_target and cell.meets else ""
    first, *rest = wrapped(strategy_told(cell.best.strategy), 30)
    speed = f"{cell.tokens_per_second_per_gpu:>13,.0f} {f'± {cell.throughput_error:.0%}':>6} {cell.mfu:>6.1%}"
    lines = [
        f"  {cell.num_gpus:>6}{mark:1}{speed} {time} {usd:>11}  {first}",
        *(f"{'':62}{line}" for line in rest),
    ]
    if not cell.best.strategy.offload.any:
        return lines
    if cell.plain is None:
        return [*lines, f"{'':9}{'-':>13} {'':38} without offload it does not fit"]
    first, *rest = wrapped(f"without offload: {strategy_told(cell.plain.strategy)}", 30)
    speed = f"{cell.plain.tokens_per_second_per_gpu:>13,.0f} {f'± {error_of(cell.plain):.0%}':>6}"
    return [*lines, f"{'':9}{speed} {'':31} {first}", *(f"{'':62}{line}" for line in rest)]
