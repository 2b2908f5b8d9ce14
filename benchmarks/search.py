"""How fast the planner is: `python -m benchmarks.search`. Best plans on growing clusters, pinned plans a second, process wall.

candidates  priced  seconds  ...    one row a question; --peers adds calculon where it can be imported
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from orchestrator.planner.plan import plan
from orchestrator.planner.show.words import strategy_told
from orchestrator.spec import parse_job

QUESTIONS = (  # model, cluster, sequences a step, strategy
    ("opt-13b", "a100-80gb-1x8", 512, {}),
    ("opt-66b", "a100-80gb-8x8", 1024, {}),
    ("opt-175b", "a100-80gb-8x8", 1024, {}),
    ("opt-175b", "a100-80gb-8x8", 1024, {"offload": "none"}),
    ("opt-175b", "a100-80gb-128x8", 2048, {}),
    ("opt-175b", "h100-80gb-2048x8", 4096, {}),
)
PINNED = {
    "engine": "native",
    "data_parallel_degree": 2,
    "tensor_parallel_degree": 8,
    "pipeline_parallel_degree": 4,
    "num_virtual_stages": 1,
    "pipeline_schedule": "1f1b",
    "sequence_parallel": True,
    "zero_stage": 1,
    "zero_group_size": 2,
    "activation_checkpointing": "full",
    "offload": {},
    "micro_batch_size": 1,
}


LONG = {
    "family": "llama", "num_layers": 96, "hidden_size": 12288, "num_heads": 96, "ffn_size": 32768, "vocab_size": 50272,
    "max_position": 8192,
}  # fmt: skip
"""As large as opt-175b; its sequences are long enough for the search to split them."""
WITHOUT = {"context_parallel_degree": 1}
LONG_QUESTIONS = (
    ("a100-80gb-8x8", 256, WITHOUT),
    ("a100-80gb-8x8", 256, {}),
    ("h100-80gb-2048x8", 1024, WITHOUT),
    ("h100-80gb-2048x8", 1024, {}),
)


def job(
    model: str | dict[str, Any], cluster: str, sequences: int, strategy: dict[str, Any], tokens: int = 2048
) -> dict[str, Any]:
    batch = {"global_batch_size": sequences, "sequence_length": tokens}
    return {"version": 1, "name": "bench", "model": model, "batch": batch, "cluster": cluster, "strategy": strategy}


def searches() -> None:
    print(f"{'model':10} {'cluster':17} {'candidates':>12} {'priced':>8} {'best s':>7} {'CPU s':>7} {'+20 s':>7}  best")
    asked = [(question[0], job(*question)) for question in QUESTIONS]
    asked += [("8k 175B", job(LONG, *question, tokens=8192)) for question in LONG_QUESTIONS]
    for model, mapping in asked:
        parsed, cluster = parse_job(mapping), mapping["cluster"]
        before = time.process_time()
        made = plan(parsed, top=0)
        cpu = time.process_time() - before
        found, all_of_it = made.search, plan(parsed, top=20).search
        assert found is not None
        assert all_of_it is not None
        print(
            f"{model:10} {cluster:17} {found.num_candidates:12,} {found.num_priced:8,} {found.seconds:7.3f} {cpu:7.3f} "
            f"{all_of_it.alternatives_seconds:7.3f}  {strategy_told(made.strategy)}"
        )


def pinned(number: int = 2000) -> None:
    parsed = parse_job(job("opt-175b", "a100-80gb-8x8", 1024, PINNED))
    plan(parsed)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(number):
        plan(parsed)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"pinned plans a second: {number / wall:,.0f} by the clock, {number / cpu:,.0f} by CPU time")


def process(example: str = "examples/opt-175b.yaml") -> None:
    times = []
    for _ in range(5):
        before = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "orchestrator.cli", "plan", example], check=False, stdout=subprocess.DEVNULL
        )
        times.append(time.perf_counter() - before)
    print(
        f"shardwise plan {example}: {min(times):.2f} s of process wall at best of 5, {sorted(times)[2]:.2f} in the middle"
    )


def main() -> int:
    searches()
    pinned()
    process()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
