"""`python -m benchmarks.collectives`: the messages of a training step as the cost doors price them, beside those that the
process groups were given, as a table.

One step of the native engine on gloo, small models, 2 to 8 processes; every rank's messages are counted where torch hands them
to the process group, by kind, group and dtype, padding included. Held to: equal, count by count and byte by byte.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cases import ARCH, LORA, TASK, Case, Run, Task
from benchmarks.drawn import drawn
from benchmarks.matrix import compositions, contexts, offloaded, reductions
from benchmarks.parity import BUCKET_BYTES, NUM_DRAWN, session_of, steps
from benchmarks.pool import Pool
from orchestrator.models.architecture import make_architecture
from orchestrator.models.lora import TARGETS
from orchestrator.models.workloads import workload
from strategies.price.messages import Ledger, Line, ledger
from strategies.sizes import GroupRanks
from strategies.zero.states import DTYPES

KINDS = {
    "allreduce_": "all_reduce",
    "_reduce_scatter_base_": "reduce_scatter",
    "_allgather_base_": "all_gather",
    "send": "send",
    "recv_": "receive",
}
"""c10d's operators -> our words. Any other is counted under its own name, which no cost door prices."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Counted(TorchDispatchMode):
    """What is handed to process groups while it is on: (kind, group, dtype) -> messages and bytes. A group of one rank sends
    nothing."""

    def __init__(self, groups: Mapping[str, str]) -> None:
        """groups: name of a process group -> what it is for."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.groups, self.sent = groups, dict[tuple[str, str, str], Line]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._note(str(func._opname), args)
        return func(*args, **(kwargs or {}))

    def _note(self, operator: str, args: tuple[Any, ...]) -> None:
        place = next(i for i, arg in enumerate(args) if isinstance(arg, torch.ScriptObject))
        group = dist.ProcessGroup.unbox(args[place])
        if group.size() == 1:
            return
        whole = args[1] if operator == "_reduce_scatter_base_" else args[0]  # the larger of output and input
        (tensor,) = [leaf for leaf in tree_leaves(whole) if isinstance(leaf, torch.Tensor)]
        purpose = self.groups.get(group.group_name, group.group_name)
        key = KINDS.get(operator, operator), purpose, NAMES.get(tensor.dtype, str(tensor.dtype))
        before = self.sent.get(key, Line(0, 0))
        self.sent[key] = Line(before.count + 1, before.num_bytes + tensor.nbytes)


def purposes(session: Any) -> dict[str, str]:
    """Name of each of a session's groups -> what it is for."""
    mesh, shared = session.build.mesh, session.build.requests.shared_group
    groups = {axis: mesh.group(axis) for axis in ("pipeline", "tensor", "replicate", "shard")}
    told = {group.group_name: axis for axis, group in groups.items() if group is not None}
    told |= {group.group_name: "world" for group in groups.values() if group and group.size() == dist.get_world_size()}
    if shared is not None:
        told[shared.group_name] = "shared"
    if (sequence := session.build.sequence) is not None:
        told[sequence.ring.group.group_name] = "context"
    told |= {group.group_name: "pipeline" for group in session.build.requests.channels.values()}
    return told | {dist.group.WORLD.group_name: "world"}


def play(rank: int, run: Run) -> Ledger:
    """The messages of one rank's second step: the first may set up what stays."""
    session = session_of(run)
    steps(session, run, rank, 1)
    with Counted(purposes(session)) as counted:
        steps(session, run, rank, 1)
    session.close()
    return dict(sorted(counted.sent.items()))  # type: ignore[arg-type]


def priced(rank: int, run: Run) -> Ledger:
    """What the cost doors say of that rank."""
    strategy = run.strategy
    at, degrees = strategy.degrees.coordinates(rank), strategy.degrees
    inner = degrees.order.index("context") > degrees.order.index("data")
    replica = at["data"] * degrees.context + at["context"] if inner else at["context"] * degrees.data + at["data"]
    shards = strategy.zero_group_size if strategy.zero_stage else 1
    return ledger(
        workload(run.task.arch, run.task.lora, task="reward" if run.task.loss == "reward" else "pretrain"),
        strategy,
        sequence_length=run.task.sequence_length,
        precision=run.precision,
        pipeline_rank=at["pipeline"],
        ranks=GroupRanks(at["tensor"], replica % shards),
        bucket_bytes=BUCKET_BYTES,
    )


def differences(sent: Ledger, expected: Ledger) -> list[str]:
    """What is sent and not priced so, or priced and not sent."""
    told = []
    for key in sorted(sent.keys() | expected.keys()):
        got, said = sent.get(key, Line(0, 0)), expected.get(key, Line(0, 0))
        if got != said:
            told.append(
                f"{' '.join(key)}: sent {got.count} of {got.num_bytes} bytes, priced {said.count} of {said.num_bytes}"
            )
    return told


def judge(pool: Pool, run: Run) -> tuple[list[str], Ledger]:
    """(what differs, rank by rank; the messages of rank 0)."""
    sent = pool.run(play, run, world_size=run.world_size)
    wrong = [f"rank {rank}: {line}" for rank, got in enumerate(sent) for line in differences(got, priced(rank, run))]
    return wrong, sent[0]


NARROW = make_architecture(
    family="opt",
    num_layers=4,
    hidden_size=24,
    num_heads=4,
    ffn_size=44,
    vocab_size=61,
    max_position=16,
    word_embedding_size=10,
    post_norm=True,
)
"""OPT-350M's shape: projections around a narrow table, norms behind the residual, none before the head."""
UNTIED = replace(ARCH, tied_embeddings=False)


def rows() -> list[Run]:
    """ZeRO 0 to 3 alone, in hybrid groups, per step and per micro batch; every composition of the parity matrix, offload among
    it; untied and narrow embeddings; frozen weights with adapters."""
    cases = [
        Case(world_size=world, zero_stage=stage, precision=precision)
        for world, stage, precision in itertools.product((2, 3, 4), range(4), ("bf16", "fp32"))
    ]
    cases += [Case(world_size=4, zero_stage=stage, group=2, micro_batch_size=1) for stage in (1, 2, 3)]
    cases += [
        Case(world_size=4, zero_stage=stage, group=group, micro_batch_size=1, gather=gather, reduce=reduce)
        for stage, group, gather, reduce in itertools.product(
            (2, 3), (0, 2), ("per_step", "per_micro_batch"), ("per_step", "per_micro_batch")
        )
    ]
    cases += [Case(world_size=2, zero_stage=s, precision="bf16", states="mixed_fp32_gradients") for s in (0, 1)]
    cases += [
        Case(world_size=2 * data, zero_stage=stage, tensor=2, sequence_parallel=sequence, recompute=recompute)
        for data, stage, sequence, recompute in itertools.product(
            (1, 2), (0, 1, 3), (False, True), ("none", "selective", "full")
        )
        if data > 1 or stage == 0
    ]
    cases += compositions() + reductions() + offloaded()
    ring = [trial.case for trial in contexts() if trial.then is None]
    found = [Run(case.strategy, case.precision) for case in cases]
    # Buckets are counted exactly for OPT's parameters alone.
    long = replace(TASK, sequence_length=16)
    found += [Run(case.strategy, case.precision, long if case.zero_stage < 2 else case.task) for case in ring]
    some = random.Random(3).sample([case for case in cases if case.world_size > 2], 20)
    for arch, (index, case) in itertools.product((UNTIED, NARROW), enumerate(some)):
        other = replace(case, precision="bf16" if index % 2 else "fp64")
        found.append(Run(other.strategy, other.precision, Task(arch, TASK.global_batch_size, TASK.sequence_length)))
    of_linears = tuple(target for target in TARGETS if target != "gate_proj")
    for targets in (LORA.targets, of_linears, ("k_proj", "down_proj")):
        task = replace(TASK, lora=replace(LORA, targets=targets))
        found += [Run(case.strategy, case.precision, task) for case in some]
    return list(dict.fromkeys(found))


def main() -> int:
    parser = argparse.ArgumentParser(description="Messages priced against messages sent, rank by rank.")
    parser.add_argument("--slice", type=int, help="only so many rows, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="WORDS", help="rows whose name holds these words alone")
    args = parser.parse_args()
    # What the planner draws for small models under memory budgets.
    chosen = rows() + [run for run in drawn(NUM_DRAWN) if run.world_size > 1]
    chosen = [run for run in chosen if args.only in str(run)]
    if args.slice:
        chosen = random.Random(args.seed).sample(chosen, args.slice)
    began, equal = time.perf_counter(), 0
    with Pool(max(run.world_size for run in chosen)) as pool:
        print(f"{'':6} {'kinds':>5} {'messages':>8} {'bytes':>9}  of rank 0")
        for run in chosen:
            wrong, sent = judge(pool, run)
            equal += not wrong
            number, num_bytes = sum(line.count for line in sent.values()), sum(line.num_bytes for line in sent.values())
            print(f"{'DIFFER' if wrong else 'equal':6} {len(sent):5} {number:8} {num_bytes:9}  {run}", flush=True)
            for line in wrong:
                print(f"       {line}", flush=True)
    print(f"{equal} of {len(chosen)} equal on every rank, in {time.perf_counter() - began:.0f} s")
    return 0 if equal == len(chosen) else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
