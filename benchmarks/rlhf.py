"""RLHF plans against DeepSpeed-Chat's published table, and published recipes planned as they were run.

    python -m benchmarks.rlhf            fits, largest models and ordering against tests/golden/rlhf.csv
    python -m benchmarks.rlhf --recipes  Alpaca, LLaMA-65B, OPT-175B with RLHF

tests/golden/rlhf.csv holds DeepSpeed-Chat's rows: a stack, LoRA or not, the actor, GPUs, whether it ran, GPU-hours of step 3 of
131.9 k prompts of 256 tokens with responses of 256. The critic and the reward model are OPT-350M."""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clusters.catalog import load_cluster
from clusters.cluster import Cluster
from orchestrator.models.architecture import CATALOG
from orchestrator.models.lora import Lora
from orchestrator.planner.plan import Plan, plan
from orchestrator.planner.rlhf import Rlhf, RlhfPrice, best
from orchestrator.spec import parse_job
from strategies.strategy import Offload

FILE = Path(__file__).resolve().parent.parent / "tests" / "golden" / "rlhf.csv"
PROMPTS = 131_900
ADAPTERS = Lora(rank=128, alpha=128.0, targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
"""DeepSpeed-Chat's: --actor_lora_dim 128 on the decoder's layers."""
STACKS: Mapping[str, Mapping[str, Any]] = {
    "deepspeed-he": {"activation_checkpointing": "full", "frozen": ("whole", "sharded")},
    "hf-ddp": {"zero_stage": 0, "frozen": ("whole",), "generation": 1},
    "colossal-ai": {"frozen": ("whole",)},
}
"""What each stack pins beside training without tensor parallelism and without an offloaded optimizer. DeepSpeed's hybrid engine
writes in groups of GPUs and may shard frozen weights.
Gemini writes with sharded weights beside whole frozen models."""


@dataclass(frozen=True)
class Row:
    """One published run."""

    id: str
    stack: str
    lora: bool
    model: str
    gpu: str
    num_gpus: int
    fits: bool
    gpu_hours: float | None

    @cached_property
    def cluster(self) -> Cluster:
        per_node = min(8, self.num_gpus)
        return load_cluster(
            {
                "gpu": self.gpu,
                "nodes": self.num_gpus // per_node,
                "gpus_per_node": per_node,
                "inter_node_gbps": 1600,
            }
        )

    @property
    def question(self) -> Rlhf:
        critic = CATALOG["opt-350m"]
        return Rlhf(
            actor=CATALOG[self.model],
            critic=critic,
            reference=CATALOG[self.model],
            reward=critic,
            prompt_tokens=256,
            response_tokens=256,
            rollouts=1024,
            lora=ADAPTERS if self.lora else None,
        )

    def planned(self) -> RlhfPrice:
        pins = {**STACKS[self.stack], "offload": Offload(), "tensor_parallel_degree": 1}
        if self.stack == "colossal-ai":
            pins["generation"] = min(8, self.num_gpus)
        return best(self.question, self.cluster, precision="fp16", pins=pins)

    def gpu_hours_of(self, price: RlhfPrice) -> float:
        return PROMPTS / self.question.rollouts * price.step_s * self.num_gpus / 3600


def rows() -> tuple[Row, ...]:
    with FILE.open(newline="") as file:
        return tuple(
            Row(
                row["id"],
                row["stack"],
                row["lora"] == "yes",
                row["model"],
                row["gpu"],
                int(row["num_gpus"]),
                row["fits"] == "yes",
                float(row["gpu_hours"]) if row["gpu_hours"] else None,
            )
            for row in csv.DictReader(file)
        )


def largest(stack: str, gpu: str, num_gpus: int, *, lora: bool) -> str | None:
    """Return the largest OPT of which a step of PPO fits."""
    found = None
    for name in (name for name in CATALOG if name.startswith("opt-") and name not in ("opt-125m", "opt-350m")):
        if Row("", stack, lora, name, gpu, num_gpus, True, None).planned().fits:
            found = name
    return found


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    def ranks(values: list[float]) -> list[float]:
        return [float(sorted(values).index(value)) for value in values]

    return statistics.correlation(ranks([a for a, _ in pairs]), ranks([b for _, b in pairs]))


def alpaca() -> Plan:
    """Return Alpaca as it was run: LLaMA-7B, 52k samples, three epochs, batches of 128, on 8 A100-80GB under FSDP."""
    return plan(
        parse_job(
            {
                "version": 1,
                "name": "alpaca",
                "task": "pretrain",
                "model": "llama-7b",
                "batch": {"global_batch_size": 128, "sequence_length": 512},
                "training": {"steps": 3 * 52_002 // 128, "precision": "bf16"},
                "cluster": "a100-80gb-1x8",
                "strategy": {
                    "data_parallel_degree": 8,
                    "tensor_parallel_degree": 1,
                    "pipeline_parallel_degree": 1,
                    "zero_stage": 3,
                    "zero_group_size": 8,
                    "micro_batch_size": 4,
                    "activation_checkpointing": "none",
                    "attention": "math",
                    "offload": "none",
                },
            }
        ),
        top=0,
    )


def llama_65b() -> Plan:
    """Return LLaMA-65B on 2,048 A100-80GB (arXiv:2302.13971, section 2.4: about 380 tokens/s/GPU), tensor 8 and 1f1b pinned."""
    return plan(
        parse_job(
            {
                "version": 1,
                "name": "llama-65b",
                "model": "llama-65b",
                "batch": {"global_batch_size": 2048, "sequence_length": 2048},
                "training": {"tokens": 1.4e12, "precision": "bf16"},
                "cluster": {"gpu": "a100-80gb", "nodes": 256, "gpus_per_node": 8, "inter_node_gbps": 1600},
                "strategy": {"tensor_parallel_degree": 8, "pipeline_schedule": "1f1b", "offload": "none"},
            }
        ),
        top=0,
    )


def opt_175b(num_gpus: int) -> RlhfPrice:
    """Return OPT-175B with RLHF and OPT-350M as its critic, on nodes of eight A100-80GB, everything trained."""
    row = Row("", "deepspeed-he", True, "opt-175b", "a100-80gb", num_gpus, True, None)
    return best(row.question, row.cluster)


def compare() -> int:
    wrong, pairs = 0, []
    print(
        f"{'id':16} {'stack':13} {'LoRA':5} {'model':10} {'GPUs':>15} {'ran':>4} {'fits':>5} {'GPU-hours':>10} "
        f"{'planned':>8}  layout"
    )
    for row in rows():
        price = row.planned()
        wrong += price.fits != row.fits
        hours = row.gpu_hours_of(price)
        if row.gpu_hours and price.fits:
            pairs.append((hours, row.gpu_hours))
        print(
            f"{row.id:16} {row.stack:13} {'yes' if row.lora else 'no':5} {row.model:10} {row.num_gpus:>3} {row.gpu:>11} "
            f"{'yes' if row.fits else 'no':>4} {'yes' if price.fits else 'no':>5} {row.gpu_hours or 0:10.1f} {hours:8.1f}  "
            f"{price.peak_bytes / 2**30:5.1f} GiB, {price.told()}{'' if price.fits == row.fits else '  <--'}"
        )
    print(f"{wrong} of {len(rows())} verdicts wrong; rank correlation of GPU-hours {spearman(pairs):.2f}")
    return wrong


def recipes() -> None:
    made = alpaca()
    hours = made.cost["wall_s"] / 3600  # type: ignore[operator]
    print(f"Alpaca: {hours:.2f} h planned at {made.throughput['mfu']:.1%} MFU, 3 h told")
    made = llama_65b()
    print(f"LLaMA-65B on 2,048: {made.tokens_per_second_per_gpu:.0f} tokens/s/GPU, 380 told")
    for num_gpus in (32, 64):
        price = opt_175b(num_gpus)
        size = f"{price.peak_bytes / 2**30:.1f} GiB, {price.step_s:.0f} s"
        print(f"OPT-175B RLHF on {num_gpus}: fits {price.fits}, {size}; {price.told()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", action="store_true")
    if parser.parse_args().recipes:
        recipes()
        return 0
    return 1 if compare() else 0


if __name__ == "__main__":
    raise SystemExit(main())
