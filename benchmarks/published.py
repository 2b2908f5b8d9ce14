"""Published training runs as priced cases, and how far the prices are from what was measured.

tests/golden/published.csv holds one run a row, in the words of a job; tests/golden/published.md says where each comes from.
A source is an id prefix. `measure` scores as a reader would: error of tokens/s/GPU by source, regret of running the layout that
the model ranks first, rank correlation, out-of-memory verdicts."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from clusters.catalog import load_cluster
from clusters.cluster import Cluster
from orchestrator.models.architecture import make_architecture
from orchestrator.models.workloads import PUBLISHED, workload
from orchestrator.planner.problem import Problem
from strategies.pipeline.stages import cut
from strategies.strategy import Offload, Strategy
from strategies.workload import Workload

FILE = Path(__file__).resolve().parent.parent / "tests" / "golden" / "published.csv"
NOISY = ("jzv100", "qwen", "bloomrun")
"""Repeats differ by up to 40 %, or too much is left unsaid: listed, not counted."""
ORDER_ONLY = ("ultra", "vtrainS")
"""Grids far past sense (1B over 512 GPUs, launch-bound toys): their order counts, nothing else."""
STACKS = {
    "mosaic": "llm-foundry", "mosaicold": "llm-foundry", "korth": "Selene", "meg21t2": "Selene", "nemo": "Selene",
    "vtrainM": "vTrain", "vtrainS": "vTrain", "bloom": "Jean Zay A100", "bloomrun": "Jean Zay A100",
    "tr3m": "Jean Zay V100", "jzv100": "Jean Zay V100",
}  # fmt: skip
"""Source -> stack, where several sources ran the same code on the same machine; any other source is a stack of its own.
What is left out of a fit is a whole stack: a source's twin would tell all about it."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One published run."""

    id: str
    work: Workload
    strategy: Strategy
    cluster: Cluster
    global_batch_size: int
    sequence_length: int
    precision: str
    tokens_per_second_per_gpu: float
    """0: it ran out of memory."""
    fits: bool
    verdict: bool
    """Whether its fitting says something: the GPU's memory is known and no equal job has the other verdict."""
    group: str
    """Runs of one model, batch and machine that differ in their layout alone."""

    @property
    def source(self) -> str:
        return self.id.split("-")[0]

    @property
    def stack(self) -> str:
        """Return the code and machine that the run shares with others."""
        return STACKS.get(self.source, self.source)

    def speed(self, step_s: float) -> float:
        """Tokens a second and GPU of a step that takes so long."""
        return self.global_batch_size * self.sequence_length / self.strategy.num_gpus / step_s


@lru_cache(maxsize=1)
def cases() -> tuple[Case, ...]:
    with FILE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    verdicts: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for row in rows:
        verdicts[_job(row)].add(row["fits"])
    return tuple(_case(row, settled=len(verdicts[_job(row)]) == 1) for row in rows)


def _job(row: dict[str, str]) -> tuple[str, ...]:
    apart = ("id", "tokens_per_s_per_gpu", "fits", "memory_known", "group")
    return tuple(value for name, value in row.items() if name not in apart)


@lru_cache(maxsize=1024)
def _cluster(gpu: str, nodes: int, per_node: int, gbps: float) -> Cluster:
    shape = {"gpu": gpu, "nodes": nodes, "gpus_per_node": per_node, "intra_node": "nvlink", "inter_node_gbps": gbps}
    return load_cluster(shape)


def _case(row: dict[str, str], *, settled: bool) -> Case:
    def number(name: str) -> int:
        return int(row[name])

    arch = make_architecture(
        family=row["family"],
        num_layers=number("layers"),
        hidden_size=number("hidden"),
        num_heads=number("heads"),
        num_kv_heads=number("kv_heads"),
        ffn_size=number("ffn"),
        vocab_size=number("vocab"),
        max_position=number("sequence_length"),
        tied_embeddings=row["tied"] == "1",
    )
    cluster = _cluster(row["gpu"], number("nodes"), number("gpus_per_node"), float(row["inter_node_gbps"]))
    batch, length = number("global_batch"), number("sequence_length")
    problem = Problem(
        arch=arch, cluster=cluster, global_batch_size=batch, sequence_length=length, precision=row["precision"]
    )
    return Case(
        id=row["id"],
        work=workload(arch, native=arch.family not in PUBLISHED),
        strategy=_strategy(row, problem),
        cluster=cluster,
        global_batch_size=batch,
        sequence_length=length,
        precision=row["precision"],
        tokens_per_second_per_gpu=float(row["tokens_per_s_per_gpu"] or 0),
        fits=row["fits"] != "no",
        verdict=settled and row["memory_known"] == "1",
        group=f"{row['id'].split('-')[0]}/{row['group']}",
    )


def _strategy(row: dict[str, str], problem: Problem) -> Strategy:
    pipeline, virtual = int(row["pipeline"]), int(row["virtual"])
    stage = int(row["zero_stage"])
    sharded = ["per_micro_batch", "per_micro_batch" if stage >= 2 else "per_step"]
    return Strategy(
        data_parallel_degree=int(row["data"]),
        tensor_parallel_degree=int(row["tensor"]),
        pipeline_parallel_degree=pipeline,
        num_virtual_stages=virtual,
        pipeline_schedule="interleaved_1f1b" if virtual > 1 else "1f1b",
        sequence_parallel=row["sequence_parallel"] == "1",
        zero_stage=stage,
        zero_group_size=int(row["zero_group_size"] or 1),
        states=row["states"],  # type: ignore[arg-type]
        gather=sharded[0],  # type: ignore[arg-type]
        reduce=sharded[1],  # type: ignore[arg-type]
        activation_checkpointing=row["recompute"],  # type: ignore[arg-type]
        offload=Offload(**{key: "host" for key in row["offload"].split("+") if key}),  # type: ignore[arg-type]
        micro_batch_size=int(row["micro_batch"]),
        gradient_accumulation_steps=problem.accumulation(int(row["data"]), int(row["micro_batch"])),
        attention=row["attention"],  # type: ignore[arg-type]
        fused_norm=row["fused_norm"] == "1",
        stages=cut(
            problem.arch.num_layers,
            pipeline=pipeline,
            virtual=virtual if pipeline > 1 else 1,
            v_shaped=False,
            head_layers=problem.head_layers,
            checkpointed=0 if row["recompute"] == "none" else None,
        ),
    )


@dataclass(kw_only=True)
class Score:
    """Of one source."""

    errors: list[float]
    """Predicted over published tokens/s/GPU, less one."""
    regret: list[float]
    spearman: list[float]
    false_fits: int = 0
    out_of_memory: int = 0
    false_refusals: int = 0
    ran: int = 0

    @property
    def mape(self) -> float:
        return statistics.fmean(map(abs, self.errors))


Priced = tuple[Case, float, bool]
"""A case, its predicted tokens/s/GPU, whether it is said to fit."""


def score(priced: Iterable[Priced]) -> dict[str, Score]:
    """By source."""
    table: dict[str, Score] = defaultdict(lambda: Score(errors=[], regret=[], spearman=[]))
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for case, speed, fits in priced:
        entry = table[case.source]
        if case.fits:
            entry.errors.append(speed / case.tokens_per_second_per_gpu - 1)
        if case.verdict:
            entry.ran += case.fits
            entry.out_of_memory += not case.fits
            entry.false_fits += fits and not case.fits
            entry.false_refusals += case.fits and not fits
        groups[case.group].append((speed if fits else 0.0, case.tokens_per_second_per_gpu))
    for group, pairs in groups.items():
        best, top = max(published for _, published in pairs), max(speed for speed, _ in pairs)
        if not best or len({published for _, published in pairs}) < 3:
            continue
        entry = table[group.split("/")[0]]
        # A tie is a coin toss, and to refuse everything is the worst answer.
        chosen = statistics.fmean(published for speed, published in pairs if speed == top) if top else 0.0
        entry.regret.append(1 - chosen / best)
        if len({speed for speed, _ in pairs}) > 1:
            entry.spearman.append(statistics.correlation(_ranks([s for s, _ in pairs]), _ranks([p for _, p in pairs])))
    return dict(table)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first, count = {}, defaultdict(int)
    for index, value in enumerate(ordered):
        first.setdefault(value, index)
        count[value] += 1
    return [first[value] + (count[value] - 1) / 2 for value in values]


def headline(table: dict[str, Score]) -> dict[str, float]:
    """Unweighted means over the sources with three runs or more, so that a large sweep drowns no small table."""
    counted = {s: t for s, t in table.items() if s not in NOISY and len(t.errors) >= 3}

    def mean(of: Callable[[Score], float | None], without: tuple[str, ...] = ()) -> float:
        found = [value for s, t in counted.items() if s not in without and (value := of(t)) is not None]
        return statistics.fmean(found)

    return {
        "mape": mean(lambda t: t.mape, ORDER_ONLY),
        "regret": mean(lambda t: statistics.fmean(t.regret) if t.regret else None, ORDER_ONLY),
        "spearman": mean(lambda t: statistics.fmean(t.spearman) if t.spearman else None),
        "false_fit_rate": sum(t.false_fits for t in table.values())
        / max(1, sum(t.out_of_memory for t in table.values())),
        "false_refusal_rate": sum(t.false_refusals for t in table.values())
        / max(1, sum(t.ran for t in table.values())),
    }
