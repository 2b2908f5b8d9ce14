"""`make switch`: checkpoints between engines and strategies, as a table.

A run is saved under A after five steps, loaded under B, and takes five more: its losses are those of the run that no one
disturbed. Beside it, what loading holds at its most on a rank, in live tensors beyond the session's own, and what one
parameter, whole, takes: an engine's states come in one whole parameter at a time, native's shard by shard.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import parity
from benchmarks.cases import ARCH, Case
from benchmarks.engines import HOST, MATH, Row, session_of, steps
from benchmarks.pool import Pool
from orchestrator.planner.trace.live_bytes import LiveBytes

HALF = 5
BOUNDS = {"fp32": 2e-5, "bf16": 3e-2}
"""Nats, of any loss, against the undisturbed native run: the widest bound of the two engines' rows in `make engines`."""


def row(engine: str, case: Case, changes: Mapping[str, Any] | None = None) -> Row:
    return Row(engine, "", case, "", dict(changes or {}))


FULL, HALF_WIDE = Case(2, 0, precision="fp32"), Case(2, 0, precision="bf16")
PIPE = replace(FULL, pipeline=2, micro_batch_size=1)
ENDS: dict[str, Row] = {
    "native ZeRO 1": row("native", replace(FULL, zero_stage=1)),
    "native ZeRO 3": row("native", replace(FULL, zero_stage=3)),
    "native tensor 2": row("native", replace(FULL, tensor=2)),
    "native pipeline 2": row("native", PIPE),
    "fairscale OSS": row("fairscale", replace(FULL, zero_stage=1)),
    "fairscale FSDP": row("fairscale", replace(FULL, zero_stage=3)),
    "colossalai TorchDDP": row("colossalai", FULL),
    "colossalai LowLevelZero 2": row("colossalai", replace(FULL, zero_stage=2)),
    "colossalai tensor 2": row("colossalai", replace(FULL, tensor=2, micro_batch_size=1), MATH),
    "colossalai pipeline 2": row("colossalai", PIPE, MATH),
    "native ZeRO 1, bf16": row("native", replace(HALF_WIDE, zero_stage=1)),
    "colossalai Gemini, bf16": row("colossalai", replace(HALF_WIDE, zero_stage=3)),
    "colossalai Gemini, states on host, bf16": row("colossalai", replace(HALF_WIDE, zero_stage=3), {"offload": HOST}),
    "colossalai ZeRO 2, states on host": row("colossalai", replace(FULL, zero_stage=2), {"offload": HOST}),
    "colossalai tensor 2 x ZeRO 1, bf16": row(
        "colossalai", Case(4, 1, precision="bf16", tensor=2, micro_batch_size=1), MATH
    ),
    "fairscale FSDP, bf16": row("fairscale", replace(HALF_WIDE, zero_stage=3)),
}
CHAINS: list[tuple[str, ...]] = [
    ("native ZeRO 1", "fairscale FSDP", "colossalai LowLevelZero 2", "native ZeRO 3"),
    ("native ZeRO 3", "colossalai LowLevelZero 2"),
    ("colossalai LowLevelZero 2", "native ZeRO 3"),
    ("colossalai TorchDDP", "fairscale OSS"),
    ("fairscale OSS", "colossalai TorchDDP"),
    ("fairscale FSDP", "native tensor 2"),
    ("native tensor 2", "colossalai tensor 2"),
    ("colossalai tensor 2", "native pipeline 2"),
    ("native pipeline 2", "colossalai pipeline 2"),
    ("colossalai pipeline 2", "fairscale FSDP"),
    ("native ZeRO 1, bf16", "colossalai Gemini, bf16"),
    ("colossalai Gemini, bf16", "colossalai Gemini, states on host, bf16"),
    ("native ZeRO 1", "colossalai ZeRO 2, states on host"),
    ("colossalai Gemini, bf16", "colossalai tensor 2 x ZeRO 1, bf16"),
    ("colossalai tensor 2 x ZeRO 1, bf16", "fairscale FSDP, bf16"),
]
"""One switch through all engines and back, and fourteen pairs; steps are shared evenly."""


def part(rank: int, one: Row, count: int, load_from: str, save_to: str) -> tuple[list[float], int]:
    """On one rank: losses, and the bytes that loading held beyond the session's own."""
    session = session_of(one)
    peak = 0
    if load_from:
        held = sum(t.numel() * t.element_size() for tensors in session.tensors().values() for t in tensors)
        with LiveBytes(session.tensors()) as live:
            parity.load(session, load_from)
        peak = live.peak_bytes - held
    losses = steps(session, one.case, rank, count)
    if save_to:
        parity.save(session, save_to)
    session.close()
    return losses, peak


@dataclass(frozen=True)
class Switched:
    chain: tuple[str, ...]
    worst: float
    bound: float
    peak_bytes: int
    """Of loading, on the rank that held most, beyond the session's own."""

    @property
    def passed(self) -> bool:
        return self.worst <= self.bound

    def __str__(self) -> str:
        told = f"{self.worst:8.1e} {self.bound:7.0e} {self.peak_bytes / 1024:8,.0f} KiB"
        return f"{'pass' if self.passed else 'FAIL'} {told}  {'  ->  '.join(self.chain)}"


def switch(pools: Mapping[str, Pool], chain: tuple[str, ...]) -> Switched:
    """Plays a chain; each engine in processes of its own."""
    ends = [ENDS[name] for name in chain]
    precision = ends[0].case.precision
    plain = row("native", Case(2, 1, precision=precision))
    count = 2 * HALF // len(ends) if len(ends) > 2 else HALF
    whole, _ = pools["native"].run(part, plain, count * len(ends), "", "", world_size=2)[0]
    losses: list[float] = []
    peak = 0
    with tempfile.TemporaryDirectory() as folder:
        for index, one in enumerate(ends):
            load_from = f"{folder}/{index}" if index else ""
            save_to = f"{folder}/{index + 1}" if index + 1 < len(ends) else ""
            ranks = pools[one.engine].run(part, one, count, load_from, save_to, world_size=one.case.world_size)
            losses += ranks[0][0]
            peak = max(peak, *(held for _, held in ranks))
    worst = max(abs(a - b) for a, b in zip(losses, whole, strict=True))
    return Switched(chain, worst, BOUNDS[precision], peak)


def pools_of(chains: Sequence[tuple[str, ...]], stack: ExitStack) -> dict[str, Pool]:
    """As many processes an engine as its widest end needs; they end with the stack."""
    sizes = {"native": 2}
    for one in (ENDS[name] for chain in chains for name in chain):
        sizes[one.engine] = max(sizes.get(one.engine, 0), one.case.world_size)
    return {engine: stack.enter_context(Pool(size)) for engine, size in sizes.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Checkpoints between engines and strategies.")
    parser.add_argument("--slice", type=int, help="only so many rows, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chains = random.Random(args.seed).sample(CHAINS, args.slice) if args.slice else CHAINS
    parameters = [p.numel() for p in parity.Decoder(ARCH).parameters()]
    print(f"     {'worst':>8} {'bound':>7} {'loading':>12}")
    result = []
    with ExitStack() as stack:
        pools = pools_of(chains, stack)
        for chain in chains:
            result.append(switch(pools, chain))
            print(result[-1], flush=True)
    states, largest = 12 * sum(parameters) / 1024, 4 * max(parameters) / 1024
    print(f"{sum(one.passed for one in result)} of {len(result)} pass.")
    print(f"Weights and moments take {states:,.0f} KiB whole in fp32, the largest parameter {largest:,.0f} KiB.")
    return 0 if all(one.passed for one in result) else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
