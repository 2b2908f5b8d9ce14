"""`make engines`: ColossalAI's plugins and fairscale's wrappers against the native engine, as a table.

Ten steps of one job at one precision, epsilon 1e-6. A row passes where the losses stay near native's and where something
shows that the engine really split or moved what its name says. One pool of processes an engine: their shims for the CPU must not
meet.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch

from benchmarks import parity
from benchmarks.cases import ARCH, TASK, Case
from benchmarks.pool import Pool
from strategies.engines.native import build_session as build_native
from strategies.strategy import Offload, Strategy

NUM_STEPS, LEARNING_RATE = 10, 3e-3
HOST, ALL_HOST = Offload(optimizer="host"), Offload(optimizer="host", parameters="host")
INPUTS = Offload(activations="host")
MATH = {"attention": "math"}
TOTAL = sum(p.numel() for p in parity.Decoder(ARCH).parameters())
SHARED = 0.7
"""Part of a whole that a rank of two or more may hold of what is split: a half, and what padding adds."""


RUNS: list[int] = []
"""Forward passes of the first block's feed-forward in this process."""


@dataclass(frozen=True)
class Row:
    engine: str
    plugin: str
    case: Case
    proof: str
    """What `prove` shows."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the strategy beside the case's."""

    @property
    def strategy(self) -> Strategy:
        return strategy_of(self.engine, self.case, self.changes)

    @property
    def tolerance(self) -> float:
        """Nats, on any of the ten losses."""
        if self.case.precision in ("fp32", "fp64"):
            return 2e-5 if self.case.precision == "fp32" else 1e-6
        return 3e-2 if self.case.pipeline > 1 else 1e-2 if self.case.tensor > 1 else 5e-3

    def __str__(self) -> str:
        return f"{self.engine:10} {self.plugin:34} {self.case.world_size} {self.case.precision}"


def strategy_of(engine: str, case: Case, changes: dict[str, Any] | None = None) -> Strategy:
    """The case's strategy in the words of an engine that keeps and reduces as it must."""
    low = case.precision in ("bf16", "fp16")
    strategy = replace(case.strategy, engine=engine, **(changes or {}))  # type: ignore[arg-type]
    if engine == "native":
        return strategy
    flat = engine == "fairscale" and strategy.zero_stage == 3
    often = (strategy.zero_stage >= 2 and engine == "colossalai") or flat
    return replace(
        strategy,
        states="full" if not low else "sharded_fp32" if flat else "mixed",
        reduce="per_micro_batch" if often else "per_step",
        gather="per_micro_batch",
    )


def rows() -> list[Row]:
    """Every plugin that can work on a CPU."""
    result = []
    for precision in ("fp32", "bf16", "fp16"):
        result.append(Row("colossalai", "TorchDDP", Case(2, 0, precision=precision), "replicated"))
        for stage in (1, 2):
            proof = "states and gradients" if stage == 2 else "states"
            case = Case(2, stage, precision=precision)
            result.append(Row("colossalai", f"LowLevelZero {stage}", case, proof))
    for stage in (1, 2):
        case = Case(2, stage, precision="fp32")
        result += [
            Row("colossalai", f"LowLevelZero {stage}, 3 ranks", replace(case, world_size=3), "states"),
            Row("colossalai", f"LowLevelZero {stage}, optimizer on host", case, "masters apart", {"offload": HOST}),
            Row("colossalai", f"LowLevelZero {stage}, full recompute", replace(case, recompute="full"), "recomputed"),
        ]
    result.append(Row("colossalai", "TorchDDP", Case(2, 0), "replicated"))
    case = Case(2, 3, precision="bf16", micro_batch_size=4)
    result += [
        Row("colossalai", "Gemini static", case, "chunks"),
        Row("colossalai", "Gemini static, 2 micro batches", replace(case, micro_batch_size=2), "chunks"),
        Row("colossalai", "Gemini, optimizer on host", case, "chunks on host", {"offload": HOST}),
        Row("colossalai", "Gemini, all on host", case, "chunks on host", {"offload": ALL_HOST}),
        Row("colossalai", "Gemini static, 3 ranks", replace(case, world_size=3, micro_batch_size=3), "chunks"),
        Row("colossalai", "Gemini static", replace(case, precision="fp16"), "chunks"),
        Row("colossalai", "Gemini, full recompute", replace(case, recompute="full"), "recomputed"),
    ]
    for precision in ("fp32", "bf16"):
        case = Case(2, 0, precision=precision, micro_batch_size=1)
        result += [
            Row("colossalai", "Hybrid, tensor 2", replace(case, tensor=2), "tensor", MATH),
            Row("colossalai", "Hybrid, pipeline 2", replace(case, pipeline=2), "stages", MATH),
            Row(
                "colossalai",
                "Hybrid, tensor 2 x pipeline 2",
                replace(case, world_size=4, tensor=2, pipeline=2),
                "both",
                MATH,
            ),
            Row("colossalai", "Hybrid, tensor 2 x data 2", replace(case, world_size=4, tensor=2), "tensor", MATH),
        ]
    case = Case(4, 1, precision="bf16", micro_batch_size=1)
    result += [
        Row("colossalai", "Hybrid, tensor 2 x ZeRO 1", replace(case, tensor=2), "tensor", MATH),
        Row("colossalai", "Hybrid, pipeline 2 x ZeRO 1", replace(case, pipeline=2), "stages", MATH),
    ]
    for precision in ("fp32", "bf16"):
        for stage, name in ((1, "OSS under DDP"), (2, "OSS, ShardedDataParallel"), (3, "FullyShardedDataParallel")):
            proof = "parameters" if stage == 3 else "states"
            result.append(Row("fairscale", name, Case(2, stage, precision=precision), proof))
    case = Case(2, 3, precision="fp32")
    result += [
        Row("fairscale", "FSDP, parameters and states on host", case, "gradients on host", {"offload": ALL_HOST}),
        Row("fairscale", "FSDP, checkpoint_wrapper", replace(case, recompute="full"), "recomputed"),
        Row(
            "fairscale", "FSDP, its inputs on host", replace(case, recompute="full"), "recomputed", {"offload": INPUTS}
        ),
        Row("fairscale", "OSS under DDP", Case(2, 1), "states"),
    ]
    return result


def session_of(row: Row) -> Any:
    warnings.simplefilter("ignore")
    with torch.device("meta"):
        module = parity.Decoder(ARCH)
    if row.proof == "recomputed":
        module.blocks[0].mlp.register_forward_pre_hook(lambda *_: RUNS.append(1))
    native = row.engine == "native"
    build: Any = build_native if native else import_module(f"strategies.engines.{row.engine}").build_session
    return build(
        module,
        strategy=row.strategy,
        precision=row.case.precision,
        weights=parity.initial_weights(ARCH, parity.SEED),
        optimizer=parity.OPTIMIZER,
    )


def play(rank: int, row: Row) -> tuple[list[float], dict[str, float], float]:
    """On one rank: losses of the steps, and of an evaluation halfway; what it holds, counted in elements; seconds, the imports
    of a first session included."""
    started = time.perf_counter()
    RUNS.clear()
    session = session_of(row)
    losses = steps(session, row.case, rank, NUM_STEPS // 2)
    found = session.evaluate(parity.micro_batches(row.case, rank))
    losses += [*steps(session, row.case, rank, NUM_STEPS // 2), found.loss / found.num_targets]
    held = {kind: float(sum(t.numel() for t in tensors)) for kind, tensors in session.tensors().items()}
    held |= _peculiar(session, row)
    session.close()
    return losses, held, time.perf_counter() - started


def steps(session: Any, case: Case, rank: int, count: int) -> list[float]:
    mine = parity.micro_batches(case, rank)
    tokens = TASK.global_batch_size * TASK.sequence_length
    return [session.step(mine, num_targets=tokens, learning_rate=LEARNING_RATE).loss for _ in range(count)]


def _peculiar(session: Any, row: Row) -> dict[str, float]:
    states = session.states
    found: dict[str, float] = {}
    if row.engine == "native":
        return found
    parameters = [parameter.detach() for parameter in states.parameters.values()]
    if row.proof == "replicated":
        found["sum"] = float(torch.stack([p.double().abs().sum() for p in parameters]).sum())
    if row.proof == "recomputed":
        # The evaluation runs once, and nothing again.
        found["runs"] = (len(RUNS) / row.strategy.gradient_accumulation_steps - 1) / NUM_STEPS
    if row.proof == "masters apart":
        shared = {p.untyped_storage().data_ptr() for p in parameters}
        apart = [s.master for s in states.shards if s.master.untyped_storage().data_ptr() not in shared]
        found["apart"] = float(sum(t.numel() for t in apart))
    if row.proof == "chunks on host":
        found["host_bytes"] = float(states.optimizer.chunk_manager.total_mem["cpu"])
        found["device_bytes"] = float(states.optimizer.chunk_manager.total_mem["cuda"])
    if row.proof == "gradients on host":
        found["on_host"] = float(sum(p._cpu_grad.numel() for p in states.parameters.values()))
    return found


def prove(row: Row, held: Sequence[dict[str, float]]) -> tuple[bool, str]:
    """(shown, in words) from what each rank holds."""
    most = {kind: max(rank.get(kind, 0.0) for rank in held) for kind in held[0]}
    part = {kind: value / TOTAL for kind, value in most.items()}
    if row.proof == "replicated":
        same = len({rank["sum"] for rank in held}) == 1
        return same, "ranks saw different sequences and hold the same weights"
    moments = part["optimizer_states"] / 2
    if row.proof == "states":
        return moments < SHARED, f"a rank holds {moments:.0%} of the moments"
    if row.proof == "states and gradients":
        shown = moments < SHARED and 0 < part["gradients"] < SHARED
        return shown, f"a rank holds {moments:.0%} of the moments, {part['gradients']:.0%} of the gradients"
    if row.proof == "parameters":
        shown = max(moments, part["parameters"]) < SHARED
        return shown, f"a rank holds {part['parameters']:.0%} of the parameters"
    if row.proof == "masters apart":
        return 0.3 < part["apart"] < SHARED, f"{part['apart']:.0%} of the parameters has fp32 masters in memory apart"
    if row.proof == "chunks":
        shown = part["parameters"] < SHARED
        return shown, f"a rank holds {part['parameters']:.0%} of the 16-bit chunks, {moments:.0%} of the moments"
    if row.proof == "chunks on host":
        # A rank's fp32 masters, 4 bytes an element, and its 16-bit pieces, 2.
        rest = 0 if row.strategy.offload.parameters == "host" else 2
        shown = most["host_bytes"] >= (6 - rest) * TOTAL / 2 and most["device_bytes"] <= SHARED * rest * TOTAL
        told = f"Gemini counts {most['host_bytes']:,.0f} B on the host, {most['device_bytes']:,.0f} B on the device"
        return shown, told
    if row.proof in ("tensor", "stages", "both"):
        # Norms, positions and some biases are whole under tensor parallelism; the tied table is on both end stages.
        bound = SHARED * (0.75 if row.proof == "both" else 1)
        shown = part["parameters"] < bound and moments < bound / (2 if row.case.zero_stage else 1)
        return shown, f"a rank holds {part['parameters']:.0%} of the parameters, {moments:.0%} of the moments"
    if row.proof == "recomputed":
        return most["runs"] == 2, f"a block runs {most['runs']:g} times forward in a micro batch"
    if row.proof == "gradients on host":
        return 0.3 < part["on_host"] < SHARED, f"{part['on_host']:.0%} of the gradients lands in host memory"
    raise ValueError(f"no proof is known by the name {row.proof!r}")


@dataclass(frozen=True)
class Verdict:
    row: Row
    worst: float
    """Of ten losses and one evaluation's, against native, nats."""
    shown: bool
    told: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.shown and self.worst <= self.row.tolerance

    def __str__(self) -> str:
        told = f"{self.worst:8.1e} {self.row.tolerance:7.0e} {self.seconds:5.1f}  {self.told}"
        return f"{'pass' if self.passed else 'FAIL'} {self.row} {told}"


class Judge:
    """Plays rows; native's losses once for each precision, in processes that see no other engine."""

    def __init__(self, native: Pool, engine: Pool) -> None:
        self.native, self.engine = native, engine
        self.known: dict[str, list[float]] = {}

    def __call__(self, row: Row) -> Verdict:
        precision = row.case.precision
        if precision not in self.known:
            plain = Row("native", "ZeRO 1", Case(2, 1, precision=precision), "")
            self.known[precision] = self.native.run(play, plain, world_size=2)[0][0]
        ranks = self.engine.run(play, row, world_size=row.case.world_size)
        losses, _, seconds = ranks[0]
        worst = max(abs(a - b) for a, b in zip(losses, self.known[precision], strict=True))
        shown, told = prove(row, [held for _, held, _ in ranks])
        return Verdict(row, worst, shown, told, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description="ColossalAI and fairscale against the native engine.")
    parser.add_argument("--slice", type=int, help="only so many rows, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("colossalai", "fairscale"))
    args = parser.parse_args()
    chosen = [row for row in rows() if args.only in (None, row.engine)]
    if args.slice:
        chosen = random.Random(args.seed).sample(chosen, args.slice)
    verdicts = []
    print(f"{'':4} {'engine':10} {'plugin':34} ranks {'':3} {'worst':>5} {'bound':>7} {'s':>5}  shown")
    for engine in ("colossalai", "fairscale"):
        mine = [row for row in chosen if row.engine == engine]
        if not mine:
            continue
        with Pool(2) as native, Pool(max(row.case.world_size for row in mine)) as pool:
            judge = Judge(native, pool)
            for row in mine:
                verdicts.append(judge(row))
                print(verdicts[-1], flush=True)
    passed = sum(verdict.passed for verdict in verdicts)
    print(f"{passed} of {len(verdicts)} pass: losses within the bound of native's over {NUM_STEPS} steps, and shown.")
    return 0 if passed == len(verdicts) else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
