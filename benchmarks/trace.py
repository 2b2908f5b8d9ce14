"""`make trace`: the closed form's bytes beside those of the traced step, as a table.

Held to: trace <= plan's tensor_peak_bytes <= 1.05 x trace. The table shows where that is so and where it is not yet.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
import warnings

from clusters.catalog import load_cluster
from orchestrator.models.architecture import CATALOG
from orchestrator.planner.problem import Choice, Problem
from orchestrator.planner.trace import trace

SEQUENCE = 2048


def main() -> int:
    parser = argparse.ArgumentParser(description="Plan's tensor bytes against the traced step.")
    parser.add_argument("--models", default="opt-125m,opt-1.3b,opt-13b,opt-66b,opt-175b")
    parser.add_argument("--ranks", default="1,8,64")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    began, ratios = time.perf_counter(), []
    print(f"{'model':9} {'ranks':>5} ZeRO {'recompute':9} {'plan GiB':>9} {'trace GiB':>9} {'ratio':>6} {'s':>5}")
    for name, ranks, stage, recompute in itertools.product(
        args.models.split(","), map(int, args.ranks.split(",")), range(4), ("none", "selective", "full")
    ):
        problem = Problem(
            arch=CATALOG[name],
            cluster=load_cluster("a100-80gb-8x8"),
            global_batch_size=ranks * 2,
            sequence_length=SEQUENCE,
            precision="bf16",
        )
        choice = Choice(data=ranks, zero=stage, group=ranks if stage else 1, micro=1, recompute=recompute)
        strategy = problem.strategy(choice)
        planned = problem.memory(strategy).stages[0].tensor_peak_bytes
        traced = trace(problem.arch, strategy, sequence_length=SEQUENCE, precision="bf16")
        ratio = planned / traced.tensor_peak_bytes
        ratios.append(ratio)
        print(
            f"{name:9} {ranks:5} {stage:4} {recompute:9} {planned / 2**30:9.2f} "
            f"{traced.tensor_peak_bytes / 2**30:9.2f} {ratio:6.3f} {traced.seconds:5.1f}",
            flush=True,
        )
    within = sum(1 <= ratio <= 1.05 for ratio in ratios)
    print(
        f"{within} of {len(ratios)} within [1, 1.05]; median {statistics.median(ratios):.3f}, "
        f"lowest {min(ratios):.3f}, highest {max(ratios):.3f}; {time.perf_counter() - began:.0f} s"
    )
    return 0 if within == len(ratios) else 1


if __name__ == "__main__":
    sys.exit(main())
