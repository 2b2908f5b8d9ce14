"""`make trace`: the closed form's bytes beside those of the traced step, as a table.

Held to: trace <= plan's tensor_peak_bytes <= 1.05 x trace, for one pipeline rank of each share that differs. `--rooms` prints
compositions of tensor, pipeline, ZeRO and recompute, drawn at random; without it ZeRO and recompute on OPT's sizes.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from clusters.catalog import load_cluster
from orchestrator.models.architecture import CATALOG, Architecture, make_architecture
from orchestrator.models.lora import TARGETS, Lora
from orchestrator.planner.problem import Choice, Problem
from orchestrator.planner.trace.play import trace
from strategies.rooms import impossible
from strategies.shares import shares
from strategies.strategy import Schedule

MEDIUM = make_architecture(
    family="opt", num_layers=8, hidden_size=1024, num_heads=16, ffn_size=4096, vocab_size=8192, max_position=1024
)
"""Parameters, activations and logits of like size: no term hides behind another."""
SCHEDULES: tuple[tuple[Schedule, int], ...] = (
    ("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_zero_bubble", 1), ("interleaved_zero_bubble", 2),
    ("zbv", 2),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    arch: Architecture
    choice: Choice
    accumulation: int = 2
    sequence_length: int = 2048
    precision: str = "bf16"
    lora: Lora | None = None
    task: str = "pretrain"

    def __str__(self) -> str:
        defaults = Choice()._asdict()
        told = [f"{k} {v}" for k, v in self.choice._asdict().items() if v != defaults[k] and k != "offload"]
        task = "" if self.task == "pretrain" else f"{self.task} "
        adapters = "" if self.lora is None else f", lora {' '.join(self.lora.targets)}"
        return f"{self.name} {task}{self.precision} {', '.join(told)}, {self.accumulation} micro batches{adapters}"

    @property
    def problem(self) -> Problem:
        return Problem(
            arch=self.arch,
            cluster=load_cluster("a100-80gb-8x8"),
            global_batch_size=self.choice.data * self.choice.micro * self.accumulation,
            sequence_length=self.sequence_length,
            precision=self.precision,
            lora=self.lora,
            task=self.task,
        )


@dataclass(frozen=True)
class Row:
    case: Case
    pipeline_rank: int
    planned_bytes: int
    traced_bytes: int
    seconds: float
    away: Mapping[str, int]
    """Place (host, nvme) -> bytes traced there."""

    @property
    def ratio(self) -> float:
        return self.planned_bytes / self.traced_bytes

    @property
    def holds(self) -> bool:
        return self.traced_bytes <= self.planned_bytes <= 1.05 * self.traced_bytes

    def __str__(self) -> str:
        rank = f" rank {self.pipeline_rank}" if self.case.choice.pipeline > 1 else ""
        return (
            f"{self.planned_bytes / 2**20:10,.1f} {self.traced_bytes / 2**20:10,.1f} {self.ratio:6.3f} "
            f"{self.seconds:5.1f}  {'' if self.holds else '<-- '}{self.case}{rank}"
        )


def compare(case: Case) -> Iterator[Row]:
    """A pipeline rank of each share that differs: the first, and where backward passes are split, the last too."""
    problem = case.problem
    strategy = problem.strategy(case.choice)
    memory = problem.memory(strategy)
    ranks = {share: rank for rank, share in reversed(list(enumerate(shares(strategy).by_rank)))}
    for rank in sorted({*ranks.values(), *shares(strategy).latest}):
        played = trace(
            case.arch,
            strategy,
            sequence_length=case.sequence_length,
            precision=case.precision,
            lora=case.lora,
            task=case.task,
            pipeline_rank=rank,
            bytes_only=True,
        )
        yield Row(
            case, rank, memory.stages[rank].tensor_peak_bytes, played.tensor_peak_bytes, played.seconds, played.away
        )


def zero_and_recompute(models: str, ranks: str) -> Iterator[Case]:
    for name, size, stage, recompute in itertools.product(
        models.split(","), map(int, ranks.split(",")), range(4), ("none", "selective", "full")
    ):
        choice = Choice(data=size, zero=stage, group=size if stage else 1, recompute=recompute)
        yield Case(name, CATALOG[name], choice)


def rooms(count: int, seed: int, contexts: tuple[int, ...] = (1,)) -> Iterator[Case]:
    """Compositions drawn at random, the same for the same seed."""
    rng, split = random.Random(seed), random.Random(seed)
    made = 0
    while made < count:
        tensor, pipeline, data = rng.choice([1, 2, 4]), rng.choice([1, 2, 4]), rng.choice([1, 2, 8])
        schedule, virtual = rng.choice(SCHEDULES) if pipeline > 1 else ("1f1b", 1)
        context = split.choice(contexts)
        stage = rng.randrange(4) if data * context > 1 else 0
        often = ("per_micro_batch", "per_step")
        choice = Choice(
            tensor=tensor,
            pipeline=pipeline,
            data=data,
            context=context,
            sequence_parallel=tensor > 1 and rng.random() < 0.5,
            schedule=schedule,
            virtual=virtual,
            micro=rng.choice([1, 2]),
            zero=stage,
            group=data * context if stage else 1,
            gather=rng.choice(often) if stage >= 2 else often[0],
            reduce=often[1] if stage >= 2 and pipeline > 1 else rng.choice(often) if stage >= 2 else often[0],
            recompute=rng.choice(["none", "selective", "full"]),
            layers=rng.choice([None, 1]),
        )
        precision, accumulation = rng.choice(["bf16", "fp32"]), rng.choice([1, 4, 8])
        case = Case("medium", MEDIUM, choice, accumulation, 1024, precision)
        if impossible(case.problem.strategy(choice)) is None:
            made += 1
            yield case


BILLIONS: Mapping[str, Architecture] = {
    "opt-1.3b": CATALOG["opt-1.3b"],
    "opt-13b": CATALOG["opt-13b"],
    "gpt3-1.3b": CATALOG["gpt3-1.3b"],
    "gpt3-13b": CATALOG["gpt3-13b"],
    "mpt-1b": make_architecture(family="mpt", num_layers=24, hidden_size=2048, num_heads=16),
    "mpt-13b": make_architecture(family="mpt", num_layers=40, hidden_size=5120, num_heads=40),
    "llama-1b": make_architecture(
        family="llama", num_layers=16, hidden_size=2048, num_heads=32, num_kv_heads=8, ffn_size=8192
    ),
    "llama-13b": CATALOG["llama-13b"],
    "bloom-1b1": CATALOG["bloom-1b1"],
    "bloom-13b": make_architecture(family="bloom", num_layers=40, hidden_size=5120, num_heads=40),
    "glm-1b, as 10b": make_architecture(
        family="glm", variant="10b", num_layers=24, hidden_size=2048, num_heads=32, max_position=2048
    ),
    "glm-13b, as 10b": make_architecture(
        family="glm", variant="10b", num_layers=40, hidden_size=5120, num_heads=40, max_position=2048
    ),
    "glm-1b, as 130b": make_architecture(family="glm", variant="130b", num_layers=24, hidden_size=2048, num_heads=16),
    "glm-13b, as 130b": make_architecture(family="glm", variant="130b", num_layers=40, hidden_size=5120, num_heads=40),
}
"""Every family at about 1B and 13B parameters, in sizes that were published or the family's shape at that size."""
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"data": 8, "zero": 1, "group": 8},
    {"data": 8, "zero": 2, "group": 8, "recompute": "full"},
    {"data": 64, "zero": 3, "group": 64, "micro": 2},
    {"data": 8, "zero": 3, "group": 8, "recompute": "selective"},
    {"tensor": 8, "sequence_parallel": True, "micro": 2},
    {"tensor": 2, "pipeline": 2, "data": 2, "zero": 1, "group": 2, "recompute": "full"},
)


def families(names: str, tasks: str) -> Iterator[Case]:
    """Every family at two sizes, under a few layouts."""
    for task, name, fields in itertools.product(tasks.split(","), BILLIONS, LAYOUTS):
        if any(name.startswith(wanted) for wanted in names.split(",")) and not (
            task != "pretrain" and BILLIONS[name].traits.blank_filling
        ):
            yield Case(name, BILLIONS[name], Choice(**fields), task=task)


WIDE: dict[str, Any] = {"tensor": 4, "sequence_parallel": True, "micro": 2}
PAIR: dict[str, Any] = {"data": 2, "group": 2}
STAGES: dict[str, Any] = {"pipeline": 2, "virtual": 2, "zero": 3, "reduce": "per_step"}
WAITING: dict[str, Any] = {"zero": 2, "reduce": "per_step"}
TURNS: dict[str, Any] = {"pipeline": 4, "schedule": "interleaved_1f1b", "virtual": 2}
ATTENTION = Lora(rank=8, alpha=16.0, targets=("q_proj", "v_proj"))
EVERYWHERE = Lora(rank=8, alpha=16.0, targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
_MEDIUM_ADAPTED = tuple(
    Case("medium", MEDIUM, Choice(**fields), 4, 1024, precision, lora)
    for fields, precision, lora in (
        ({}, "fp32", EVERYWHERE),
        ({"tensor": 4, "sequence_parallel": True}, "bf16", ATTENTION),
        ({"tensor": 2, "recompute": "selective"}, "bf16", EVERYWHERE),
        ({"data": 8, "zero": 1, "group": 8, "micro": 2, "recompute": "full"}, "fp32", EVERYWHERE),
        ({"data": 8, "zero": 2, "group": 8}, "bf16", ATTENTION),
        ({"data": 8, "zero": 3, "group": 8}, "bf16", EVERYWHERE),
        ({"pipeline": 2, "schedule": "zbv", "virtual": 2}, "bf16", EVERYWHERE),
    )
)
LLAMA = make_architecture(
    family="llama", num_layers=3, hidden_size=512, num_heads=8, num_kv_heads=2, vocab_size=4096, max_position=512
)
ADAPTED = (*_MEDIUM_ADAPTED, Case("llama", LLAMA, Choice(), 2, 512, "fp32", replace(EVERYWHERE, targets=TARGETS)))
"""Frozen weights with adapters: what CI plays."""
CASES = tuple(
    Case("medium", MEDIUM, Choice(**fields), accumulation, 1024, precision)
    for fields, accumulation, precision in (
        ({"tensor": 4, "sequence_parallel": True, "recompute": "full"}, 1, "bf16"),
        (WIDE, 1, "fp32"),
        ({"tensor": 2, "data": 2, "zero": 3, "group": 2}, 4, "fp32"),
        ({"data": 8, "zero": 1, "group": 8, "recompute": "selective"}, 4, "bf16"),
        ({"data": 8, "zero": 2, "group": 8, "gather": "per_step", "reduce": "per_step"}, 4, "bf16"),
        ({"pipeline": 2, "tensor": 2, "schedule": "gpipe", "recompute": "selective"}, 4, "bf16"),
        ({"pipeline": 4, "data": 2, "zero": 1, "group": 2}, 8, "bf16"),
        ({**TURNS, "recompute": "selective"}, 8, "fp32"),
        ({"pipeline": 4, "schedule": "interleaved_zero_bubble", "virtual": 2, "recompute": "selective"}, 8, "fp32"),
        ({"pipeline": 2, "schedule": "zbv", "virtual": 2}, 4, "bf16"),
        ({**STAGES, **WIDE, **PAIR, "schedule": "interleaved_zero_bubble", "gather": "per_step"}, 4, "bf16"),
        ({**STAGES, **WIDE, "data": 8, "group": 8, "schedule": "zbv"}, 1, "fp32"),
        ({**STAGES, **PAIR, "pipeline": 4, "zero": 2, "schedule": "interleaved_1f1b"}, 4, "fp32"),
        ({**WAITING, "pipeline": 4, "data": 8, "group": 8, "micro": 2, "recompute": "full", "layers": 1}, 1, "bf16"),
        ({**TURNS, "tensor": 4, "recompute": "selective"}, 8, "bf16"),
        ({"context": 4, "tensor": 2, "sequence_parallel": True}, 1, "bf16"),
        ({"context": 2, "data": 2, "zero": 3, "group": 4}, 4, "fp32"),
        ({"context": 2, "pipeline": 2, "zero": 1, "group": 2, "recompute": "full"}, 4, "bf16"),
        ({"context": 4, "zero": 3, "group": 4, "recompute": "full"}, 2, "fp32"),
    )
)
"""What CI plays."""
FAMILIES = tuple(
    Case(
        name,
        make_architecture(
            **(
                {"num_layers": 4, "hidden_size": 1024, "num_heads": 16, "vocab_size": 8192, "max_position": 1024}
                | shape
            )
        ),
        Choice(**fields),
        sequence_length=1024,
        task=task,
    )
    for name, shape, fields, task in (
        ("gpt", {"family": "gpt"}, {"data": 8, "zero": 3, "group": 8}, "pretrain"),
        ("mpt", {"family": "mpt"}, {"data": 8, "zero": 1, "group": 8, "recompute": "selective"}, "pretrain"),
        ("llama", {"family": "llama"}, {"data": 8, "zero": 3, "group": 8, "recompute": "selective"}, "sft"),
        ("llama, grouped", {"family": "llama", "num_kv_heads": 4}, WIDE, "pretrain"),
        ("bloom", {"family": "bloom"}, {"data": 8, "zero": 3, "group": 8}, "pretrain"),
        ("glm, as 10b", {"family": "glm", "variant": "10b"}, {"data": 8, "zero": 3, "group": 8}, "pretrain"),
        ("glm, as 130b", {"family": "glm"}, {"data": 8, "zero": 2, "group": 8, "recompute": "full"}, "pretrain"),
        ("opt", {"family": "opt"}, {"data": 8, "zero": 1, "group": 8}, "reward"),
    )
)
"""What CI plays of every family and task."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Plan's tensor bytes against the traced step.")
    parser.add_argument("--models", default="opt-125m,opt-1.3b,opt-13b,opt-66b,opt-175b")
    parser.add_argument("--ranks", default="1,8,64")
    parser.add_argument("--rooms", type=int, metavar="N", help="N compositions of all rooms instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--context", action="store_true", help="sequences split over 2 or 4 ranks in the compositions")
    parser.add_argument(
        "--lora", action="store_true", help="the same with adapters on attention, and on every linear layer"
    )
    parser.add_argument(
        "--families", metavar="NAMES", help="models of all families instead, by how names begin: gpt,llama-1b"
    )
    parser.add_argument("--tasks", default="pretrain", help="tasks of --families: pretrain,sft,reward")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    began, ratios, within = time.perf_counter(), [], 0
    print(f"{'plan MiB':>10} {'trace MiB':>10} {'ratio':>6} {'s':>5}")
    contexts = (2, 4) if args.context else (1,)
    if args.families:
        chosen = families(args.families, args.tasks)
    else:
        chosen = rooms(args.rooms, args.seed, contexts) if args.rooms else zero_and_recompute(args.models, args.ranks)
    if args.lora:
        chosen = (replace(case, lora=lora) for case in list(chosen) for lora in (ATTENTION, EVERYWHERE))
    for case in chosen:
        for row in compare(case):
            ratios.append(row.ratio)
            within += row.holds
            print(row, flush=True)
    print(
        f"{within} of {len(ratios)} within [1, 1.05]; median {statistics.median(ratios):.3f}, "
        f"lowest {min(ratios):.4f}, highest {max(ratios):.3f}; {time.perf_counter() - began:.0f} s"
    )
    return 0 if within == len(ratios) else 1


if __name__ == "__main__":
    sys.exit(main())
