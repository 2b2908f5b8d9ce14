"""`make parity`: every strategy of the native engine against one plain process, as a table.

The reference is a loop of plain torch (torch.optim.AdamW, torch's clip), not our engine. Cases of one world size share
one group of processes, so that a case costs its steps and not its imports.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from orchestrator.models.architecture import make_architecture
from orchestrator.models.opt import OPT, initial_weights
from strategies.engines.engine import MicroBatch, OptimizerSettings
from strategies.engines.native import build_session
from strategies.strategy import Strategy

ARCH = make_architecture(
    family="opt", num_layers=3, hidden_size=24, num_heads=3, ffn_size=44, vocab_size=61, max_position=16
)
GLOBAL_BATCH, SEQUENCE, SEED = 7, 12, 5
LEARNING_RATE = 1e-2
# epsilon 1e-6: with 1e-8 Adam turns rounding of vanishing gradients into steps of full size.
OPTIMIZER = OptimizerSettings(betas=(0.9, 0.95), epsilon=1e-6, weight_decay=0.1, gradient_clip=1.0)
BOUNDS = {"fp64": (20, 1e-10, 1e-9), "fp32": (3, 1e-5, None), "bf16": (10, 5e-2, None)}
"""Steps, bound on losses, bound on final weights."""


@dataclass(frozen=True)
class Case:
    world_size: int
    zero_stage: int
    recompute: str = "none"
    precision: str = "fp64"
    micro_batch_size: int = 2
    group: int = 0
    gather: str = "per_micro_batch"
    reduce: str = "per_micro_batch"

    @property
    def strategy(self) -> Strategy:
        accumulation = -(-GLOBAL_BATCH // (self.world_size * self.micro_batch_size))
        return Strategy(
            data_parallel_degree=self.world_size,
            zero_stage=self.zero_stage,
            zero_group_size=self.group or (self.world_size if self.zero_stage else 1),
            activation_checkpointing=self.recompute,  # type: ignore[arg-type]
            states="full" if self.precision in ("fp32", "fp64") else "mixed" if self.zero_stage < 2 else "sharded_fp32",
            micro_batch_size=self.micro_batch_size,
            gradient_accumulation_steps=accumulation,
            gather=self.gather,  # type: ignore[arg-type]
            reduce=self.reduce,  # type: ignore[arg-type]
        )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """One repeated batch: fresh random targets would keep the loss near ln V and hide wrong gradients."""
    ids = torch.randint(0, ARCH.vocab_size, (GLOBAL_BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(SEED))
    return ids[:, :-1], ids[:, 1:]


def micro_batches(case: Case, rank: int) -> list[MicroBatch]:
    """This replica's share; what is missing is filled up with sequences of weight 0."""
    inputs, targets = batch()
    size, steps = case.micro_batch_size, case.strategy.gradient_accumulation_steps
    result = []
    for i in range(steps):
        rows = [(i * case.world_size + rank) * size + j for j in range(size)]
        weight = torch.tensor([1.0 if row < GLOBAL_BATCH else 0.0 for row in rows])
        rows = [min(row, GLOBAL_BATCH - 1) for row in rows]
        result.append(MicroBatch(input_ids_BS=inputs[rows], target_ids_BS=targets[rows], weight_B=weight))
    return result


def reference(precision: str, num_steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of one process, in plain torch; bf16 is held against fp32."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    module, value = OPT(ARCH).to(dtype), initial_weights(ARCH, SEED)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(value(name, parameter.shape))
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    vectors = [p for p in module.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.epsilon,
    )
    inputs, targets = batch()
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), OPTIMIZER.gradient_clip or 0.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in module.named_parameters()}


def session_of(case: Case) -> Any:
    with torch.device("meta"):
        module = OPT(ARCH)
    return build_session(
        module,
        strategy=case.strategy,
        precision=case.precision,
        weights=initial_weights(ARCH, SEED),
        optimizer=OPTIMIZER,
    )


def steps(session: Any, case: Case, rank: int, count: int) -> list[float]:
    mine = micro_batches(case, rank)
    return [
        session.step(mine, num_target_tokens=GLOBAL_BATCH * SEQUENCE, learning_rate=LEARNING_RATE).loss
        for _ in range(count)
    ]


def whole(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model's weights out of a sharded state, on every rank."""
    prefix = "model."
    return {
        name.removeprefix(prefix): (t.full_tensor() if hasattr(t, "full_tensor") else t).clone()
        for name, t in state.items()
        if name.startswith(prefix)
    }


def _play(rank: int, world_size: int, store: str, cases: list[Case], queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    for case in cases:
        started = time.perf_counter()
        session = session_of(case)
        losses = steps(session, case, rank, BOUNDS[case.precision][0])
        weights = whole(session.state_dict())
        if rank == 0:
            queue.put((case, losses, {k: v.numpy() for k, v in weights.items()}, time.perf_counter() - started))
        session.close()
        dist.barrier()
    dist.destroy_process_group()


def run(cases: list[Case]) -> list[tuple[Case, float, float | None, float]]:
    """(case, worst deviation of a loss, of a weight, seconds) of each; one group of processes a world size."""
    context = mp.get_context("spawn")
    results = []
    references = {precision: reference(precision, BOUNDS[precision][0]) for precision in {c.precision for c in cases}}
    for world_size in sorted({case.world_size for case in cases}):
        mine = [case for case in cases if case.world_size == world_size]
        with tempfile.TemporaryDirectory() as folder:
            queue = context.Queue()
            store = str(Path(folder) / "store")
            processes = [
                context.Process(target=_play, args=(rank, world_size, store, mine, queue)) for rank in range(world_size)
            ]
            for process in processes:
                process.start()
            try:
                for _ in mine:
                    case, losses, weights, seconds = queue.get(timeout=180)
                    expected, expected_weights = references[case.precision]
                    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
                    worst_weight = max(
                        float((torch.from_numpy(weights[name]) - value).abs().max())
                        for name, value in expected_weights.items()
                    )
                    results.append((case, worst, worst_weight, seconds))
            finally:
                for process in processes:
                    process.join(timeout=30)
                    if process.is_alive():
                        process.kill()
    return results


def passed(case: Case, loss: float, weight: float | None) -> bool:
    _, loss_bound, weight_bound = BOUNDS[case.precision]
    return loss <= loss_bound and (weight_bound is None or (weight or 0.0) <= weight_bound)


def matrix() -> list[Case]:
    """ZeRO 0..3 x recompute x world size in fp64; fp32 and bf16; hybrid groups; gather and reduce once a step."""
    cases = [
        Case(world_size=world, zero_stage=stage, recompute=recompute, precision=precision)
        for precision, world, stage, recompute in itertools.product(
            ("fp64", "fp32", "bf16"), (1, 2, 4), (0, 1, 2, 3), ("none", "selective", "full")
        )
    ]
    cases += [Case(world_size=3, zero_stage=stage) for stage in range(4)]
    cases += [Case(world_size=4, zero_stage=stage, group=2) for stage in (1, 2, 3)]
    cases += [
        Case(world_size=2, zero_stage=stage, micro_batch_size=1, gather=gather, reduce=reduce)
        for stage in (2, 3)
        for gather, reduce in (
            ("per_step", "per_micro_batch"),
            ("per_micro_batch", "per_step"),
            ("per_step", "per_step"),
        )
    ]
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(description="Every strategy of the native engine against one process.")
    parser.add_argument("--slice", type=int, help="only so many cases, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cases = matrix()
    if args.slice:
        cases = random.Random(args.seed).sample(cases, args.slice)
    print(f"{'world':>5} {'ZeRO':>4} {'group':>5} {'recompute':9} {'precision':9} {'gather/reduce':31} "
          f"{'loss':>8} {'weights':>8} {'s':>5}")  # fmt: skip
    failures = 0
    for case, loss, weight, seconds in run(cases):
        good = passed(case, loss, weight)
        failures += not good
        print(f"{case.world_size:5} {case.zero_stage:4} {case.strategy.zero_group_size:5} {case.recompute:9} "
              f"{case.precision:9} {case.gather + ' / ' + case.reduce:31} {loss:8.1e} {weight or 0.0:8.1e} {seconds:5.1f} "
              f"{'pass' if good else 'FAIL'}")  # fmt: skip
    print(f"{len(cases) - failures} of {len(cases)} pass; bounds (steps, loss, weights): {BOUNDS}")
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
