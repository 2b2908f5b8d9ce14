"""Ten jobs whose plans are kept as a table. `python -m tests.golden.plans.jobs` writes it anew; its diff is reviewed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.planner.plan import plan
from orchestrator.planner.show.words import strategy_told
from orchestrator.spec import parse_job

TABLE = Path(__file__).with_name("plans.txt")

JOBS: dict[str, dict[str, Any]] = {
    "opt-125m on one T4": {
        "model": "opt-125m",
        "cluster": "t4",
        "training": {"precision": "fp16"},
        "batch": (64, 1024),
    },
    "opt-1.3b on one A100-40": {"model": "opt-1.3b", "cluster": "a100-40gb", "batch": (256, 2048)},
    "opt-6.7b on 8 A100-40": {"model": "opt-6.7b", "cluster": "a100-40gb-1x8", "batch": (512, 2048)},
    "opt-13b on 8 A100-80": {"model": "opt-13b", "cluster": "a100-80gb-1x8", "batch": (512, 2048)},
    "opt-13b on 8 A100-80, no offload": {
        "model": "opt-13b",
        "cluster": "a100-80gb-1x8",
        "batch": (512, 2048),
        "strategy": {"offload": "none"},
    },
    "llama-65b on 64 H100": {"model": "llama-65b", "cluster": "h100-80gb-8x8", "batch": (1024, 2048)},
    "bloom-7b1 on 32 V100-32": {
        "model": "bloom-7b1",
        "cluster": "v100-32gb-8x4",
        "training": {"precision": "fp16"},
        "batch": (512, 2048),
        "strategy": {"offload": "none"},
    },
    "opt-30b on 56 A100-80, after a lost node": {"model": "opt-30b", "cluster": "a100-80gb-7x8", "batch": (512, 2048)},
    "opt-175b on 64 A100-80, no offload": {
        "model": "opt-175b",
        "cluster": "a100-80gb-8x8",
        "batch": (1024, 2048),
        "strategy": {"offload": "none"},
    },
    "opt-175b on 1,024 A100-80, cheapest": {
        "model": "opt-175b",
        "cluster": "a100-80gb-128x8",
        "batch": (1024, 2048),
        "objective": "cheapest",
        "strategy": {"offload": "none"},
    },
}


def row(name: str) -> str:
    """One job's plan as a line: what was chosen, on how many GPUs, peak and speed rounded."""
    changes = dict(JOBS[name])
    sequences, length = changes.pop("batch")
    job = {
        "version": 1,
        "name": "golden",
        "batch": {"global_batch_size": sequences, "sequence_length": length},
    } | changes
    made = plan(parse_job(job), top=0)
    schedule = made.strategy.pipeline_schedule if made.strategy.pipeline_parallel_degree > 1 else "no pipeline"
    return (
        f"{name:<42} {'fits' if made.fits else 'does not fit':<5} {made.price.memory.peak_bytes / 2**30:6.1f} GiB "
        f"{made.tokens_per_second_per_gpu:9,.0f} tokens/s/GPU  {strategy_told(made.strategy)}; {schedule}"
    )


def table() -> str:
    return "\n".join(row(name) for name in JOBS) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"), end="")
