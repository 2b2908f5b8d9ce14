"""`make strict`: a slice of the parity matrix on process groups with the rules of NCCL.

Each row trains, evaluates, saves a checkpoint, goes on from it in a new session and trains again; the losses are those of one
plain process. A row that NCCL would hang in fails with where its ranks stood (see nccl_rules.py).
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.cases import ARCH, TASK, Case, Task
from benchmarks.parity import BOUNDS, micro_batches, reference, session_of, steps
from benchmarks.pool import Pool

TIMEOUT_S = 120.0
"""A rank that nobody answers for so long would hang on NCCL; the machine may be busy."""
DEEP = Task(replace(ARCH, num_layers=8), TASK.global_batch_size, TASK.sequence_length)
SCHEDULES = (
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved_1f1b", 2),
    ("interleaved_zero_bubble", 1),
    ("interleaved_zero_bubble", 2),
    ("zbv", 2),
)
STEPS = 2
"""Before the checkpoint; one more after it."""


def rows() -> list[Case]:
    """Every schedule on 2 to 4 ranks, with many micro batches and with the fewest; each ZeRO stage alone, in a group, and under
    each schedule; tensor parallelism with and without the others."""
    plain = Case(world_size=1, zero_stage=0, micro_batch_size=1, task=DEEP)
    cases = []
    for schedule, virtual in SCHEDULES:
        piped = replace(plain, schedule=schedule, virtual=virtual)
        for ranks in (2, 3, 4):
            cases.append(replace(piped, world_size=ranks, pipeline=ranks))
            cases.append(replace(piped, world_size=ranks, pipeline=ranks, micro_batch_size=7))
        cases += [replace(piped, world_size=4, pipeline=2, zero_stage=stage) for stage in (1, 2, 3)]
    cases += [Case(world_size=world, zero_stage=stage) for world, stage in itertools.product((2, 3), range(4))]
    cases += [Case(world_size=4, zero_stage=stage, group=2, micro_batch_size=1) for stage in (1, 2, 3)]
    cases += [Case(world_size=2, zero_stage=0, tensor=2, sequence_parallel=sequence) for sequence in (False, True)]
    cases += [Case(world_size=4, zero_stage=stage, tensor=2, sequence_parallel=True) for stage in range(4)]
    for (schedule, virtual), stage in itertools.product((("1f1b", 1), ("zbv", 2)), (0, 3)):
        cases.append(
            replace(plain, world_size=8, tensor=2, pipeline=2, schedule=schedule, virtual=virtual, zero_stage=stage)
        )
    return cases


def few() -> list[Case]:
    """What CI plays of it: small worlds."""
    told = ("gpipe", 2, 7), ("1f1b", 3, 7), ("interleaved_1f1b", 2, 1), ("zbv", 2, 7)
    piped = [
        case
        for case in rows()
        if case.zero_stage == 0 and case.tensor == 1 and (case.schedule, case.pipeline, case.micro_batch_size) in told
    ]
    alone = [
        Case(world_size=3, zero_stage=1),
        Case(world_size=4, zero_stage=2, group=2, micro_batch_size=1),
        Case(world_size=4, zero_stage=3, tensor=2, sequence_parallel=True),
    ]
    return piped + alone


def play(rank: int, case: Case, folder: str) -> tuple[list[float], float]:
    """(losses of the steps, loss of the evaluation behind the checkpoint) on one rank."""
    checkpoints = dist.new_group(backend="gloo")
    session = session_of(case)
    losses = steps(session, case, rank, STEPS)
    dcp.save(_tensors(session), checkpoint_id=folder, process_group=checkpoints)
    session.close()
    session = session_of(case)
    state = session.state_dict()
    targets = _tensors(session)
    dcp.load(targets, checkpoint_id=folder, process_group=checkpoints)
    session.load_state_dict({n: t if torch.is_tensor(state[n]) else targets[n].item() for n, t in targets.items()})
    evaluated = session.evaluate(micro_batches(case, rank))
    losses += steps(session, case, rank, 1)
    session.close()
    return losses, evaluated.loss / evaluated.num_targets


def _tensors(session: Any) -> dict[str, torch.Tensor]:
    return {name: t if torch.is_tensor(t) else torch.tensor(t) for name, t in session.state_dict().items()}


def judge(pool: Pool, case: Case) -> float:
    """The worst deviation of a loss from the plain run's, in nats. RuntimeError where a rank breaks a rule."""
    expected, _ = reference(case.task, case.precision, STEPS + 1)
    with tempfile.TemporaryDirectory() as folder:
        told = pool.run(play, case, folder, world_size=case.world_size)
    # The one batch is evaluated with the weights that it is trained on next.
    return max(
        abs(got - want)
        for losses, evaluated in told
        for got, want in zip([*losses, evaluated], [*expected, expected[-1]], strict=True)
    )


def main() -> int:
    argparse.ArgumentParser(description="Strategies on process groups with the rules of NCCL.").parse_args()
    cases, failed, began = rows(), 0, time.perf_counter()
    bound = BOUNDS["fp64"][1]
    for case in cases:
        started, wrong = time.perf_counter(), ""
        worst = float("inf")
        try:
            with Pool(case.world_size, backend="strict", timeout_s=TIMEOUT_S) as pool:
                worst = judge(pool, case)
        except RuntimeError as error:
            wrong = str(error)
        passed = worst <= bound
        failed += not passed
        print(f"{'pass' if passed else 'FAIL'} {worst:8.1e} {time.perf_counter() - started:5.1f} s  {case}", flush=True)
        if wrong:
            print(wrong, flush=True)
    print(f"{len(cases) - failed} of {len(cases)} pass in {time.perf_counter() - began:.0f} s; bound {bound:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
