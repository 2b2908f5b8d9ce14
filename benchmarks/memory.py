"""`make memory`: the bytes of a training step three times, as a table: priced by the cost doors (plan), played on fake devices
(trace), and allocated by a run on CPU processes (live).

Live bytes are what torch's CPU allocator has given and not got back, in every thread, from before the session is built; the peak
is that of the second step. Nothing of this count is shared with the trace's tracker. Host memory is the same memory here: what
offload puts there is told apart by where it was declared (strategies/offload/host.py), files are their blocks on the disk.

Held to, for one pipeline rank of each share that differs, for host memory and for files: trace <= plan <= 1.05 x trace, and live
within 5 % of the trace.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.cases import Run, Task, told
from benchmarks.parity import LEARNING_RATE, micro_batches, session_of
from benchmarks.pool import Pool
from benchmarks.trace import ATTENTION, EVERYWHERE, SCHEDULES, Case, compare
from orchestrator.models.architecture import make_architecture
from orchestrator.planner.problem import Choice
from strategies.engines.engine import BUCKET_BYTES
from strategies.offload.host import PLACED
from strategies.strategy import Offload

SMALL = make_architecture(
    family="opt", num_layers=8, hidden_size=128, num_heads=4, ffn_size=512, vocab_size=2048, max_position=128
)
"""Parameters, activations and logits of like size; a step takes half a second."""
COUNTED = "the counted step"


class Bytes(NamedTuple):
    """Each at its own peak."""

    device: int
    host: int
    files: int


@contextmanager
def reported() -> Iterator[Callable[[], list[Any]]]:
    """What torch's CPU allocator does in this thread, told by its profiler, with the bytes given to all threads; afterwards, as a
    forest of events. (The profiler alone does not see what gloo's threads give back.)"""
    flag = ctypes.c_bool.in_dll(
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so")), "FLAGS_caffe2_report_cpu_memory_usage"
    )
    gc.collect()
    flag.value = True
    profiled = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    try:
        with profiled:
            yield lambda: profiled.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    finally:
        gc.collect()
        flag.value = False


def peaks(forest: Iterable[Any]) -> tuple[int, int]:
    """Most bytes (on the device, on the host) inside COUNTED, of what was made since the first event."""
    found: list[tuple[int, Any, bool]] = []
    window = range(0)
    stack = [(event, False) for event in forest]
    while stack:
        event, on_host = stack.pop()
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields, on_host))
        elif event.name == COUNTED:
            window = range(event.start_time_ns, event.end_time_ns)
        inside = on_host or event.name == PLACED + "host"
        stack += [(child, inside) for child in event.children]
    found.sort(key=lambda each: each[0])
    before = found[0][1].total_allocated - found[0][1].alloc_size
    host: dict[int, int] = {}
    most = on_host_at_most = held = 0
    for time_ns, change, on_host in found:
        if change.alloc_size > 0 and on_host:
            host[change.ptr] = change.alloc_size
            held += change.alloc_size
        elif change.alloc_size < 0:
            held -= host.pop(change.ptr, 0)
        if time_ns in window:
            most = max(most, change.total_allocated - before - held)
            on_host_at_most = max(on_host_at_most, held)
    return most, on_host_at_most


def play(rank: int, run: Run) -> Bytes:
    """One rank's second step: the first makes what every later one has."""
    mine, tokens = micro_batches(run, rank), run.task.global_batch_size * run.task.sequence_length
    others = _nameless_files()
    with reported() as events:
        session = session_of(run, BUCKET_BYTES)
        for name in ("the first step", COUNTED):
            with record_function(name):
                session.step(mine, num_targets=tokens, learning_rate=LEARNING_RATE)
        files = sum(size for inode, size in _nameless_files().items() if inode not in others)
        session.close()
        del session
    return Bytes(*peaks(events()), files)


def _nameless_files() -> dict[int, int]:
    """Inode -> bytes on the disk of each file without a name that this process has open: scratch files are such."""
    found = {}
    for entry in os.scandir("/proc/self/fd"):
        try:
            if os.readlink(entry.path).endswith("(deleted)"):
                status = os.stat(entry.path)
                found[status.st_ino] = 512 * status.st_blocks
        except FileNotFoundError:  # the folder's own descriptor
            continue
    return found


@dataclass(frozen=True)
class Line:
    """Of one place: a pipeline rank's device, host memory or files of a rank at their most."""

    place: str
    plan: int
    trace: int
    live: int

    @property
    def holds(self) -> bool:
        return self.trace <= self.plan <= 1.05 * self.trace and abs(self.live - self.trace) <= 0.05 * self.trace

    def __str__(self) -> str:
        sizes = "".join(f"{size / 2**20:9.2f}" for size in (self.plan, self.trace, self.live))
        ratios = f"{self.plan / self.trace:7.3f}{self.live / self.trace:7.3f}" if self.trace else f"{'':14}"
        return f"{sizes}{ratios}  {'' if self.holds else '<-- '}{self.place}"


def judge(pool: Pool, case: Case) -> list[Line]:
    problem = case.problem
    strategy = problem.strategy(case.choice)
    task = Task(case.arch, problem.global_batch_size, case.sequence_length, lora=case.lora)
    rows = list(compare(case))
    live: list[Bytes] = pool.run(play, Run(strategy, case.precision, task), world_size=strategy.num_gpus)
    mine = {row.pipeline_rank: live[strategy.degrees.rank({"pipeline": row.pipeline_rank})] for row in rows}
    lines = [
        Line(f"rank {rank}", row.planned_bytes, row.traced_bytes, mine[rank].device)
        for rank, row in zip(mine, rows, strict=True)
    ]
    if strategy.offload.any:
        # On a CPU a node's memory holds the peak and what is offloaded, and nothing for a checkpoint.
        accelerator = replace(problem.cluster.accelerator, kind="cpu")
        price = problem.changed(cluster=replace(problem.cluster, accelerator=accelerator)).memory(strategy)
        ranks = min(problem.cluster.gpus_per_node, strategy.num_gpus)
        planned = price.host_bytes_per_node // ranks - price.peak_bytes, price.nvme_bytes_per_node // ranks
        traced = [max(row.away[place] for row in rows) for place in ("host", "nvme")]
        found = [max(each.host for each in mine.values()), max(each.files for each in mine.values())]
        lines += [Line(*each) for each in zip(("host", "files"), planned, traced, found, strict=True) if any(each[1:])]
    return lines


HOST, NVME = Offload(optimizer="host"), Offload(optimizer="nvme")
ACTIVATIONS = Offload(activations="host")
SHARDS = Offload(optimizer="host", parameters="host")
ALL = Offload(optimizer="host", parameters="host", activations="host")


def rooms() -> Iterator[Case]:
    """Every room by itself, in fp32 and bf16, and compositions."""
    alone: list[tuple[dict[str, Any], int]] = [({"recompute": kind}, 2) for kind in ("none", "selective", "full")]
    alone += [({"recompute": "full", "layers": 3}, 2)]
    alone += [({"data": 2, "zero": stage, "group": 2 if stage else 1}, 2) for stage in range(4)]
    alone += [
        ({"data": 2, "zero": 3, "group": 2, "gather": "per_step", "reduce": "per_step"}, 2),
        ({"tensor": 2}, 2),
        ({"tensor": 2, "sequence_parallel": True}, 2),
    ]
    alone += [({"pipeline": 2, "schedule": schedule, "virtual": virtual}, 4) for schedule, virtual in SCHEDULES]
    alone += [
        ({"offload": offload}, 2)
        for offload in (
            HOST,
            replace(HOST, optimizer_fraction=0.4),
            NVME,
            SHARDS,
            Offload(optimizer="nvme", parameters="nvme"),
            ACTIVATIONS,
        )
    ]
    for fields, accumulation in alone:
        for precision in ("fp32", "bf16"):
            yield _case(fields, accumulation, precision)
    together: list[tuple[dict[str, Any], int, str]] = [
        ({"tensor": 2, "data": 2, "zero": 3, "group": 2, "recompute": "selective"}, 2, "fp32"),
        ({"tensor": 2, "data": 2, "zero": 1, "group": 2, "sequence_parallel": True, "recompute": "full"}, 2, "bf16"),
        ({"data": 4, "zero": 2, "group": 2}, 2, "fp32"),
        ({"pipeline": 2, "data": 2, "zero": 1, "group": 2, "recompute": "selective"}, 4, "bf16"),
        ({"pipeline": 2, "data": 2, "zero": 3, "group": 2}, 4, "fp32"),
        ({"pipeline": 2, "tensor": 2, "schedule": "zbv", "virtual": 2, "sequence_parallel": True}, 4, "fp32"),
        ({"pipeline": 4, "schedule": "interleaved_1f1b", "virtual": 2, "recompute": "full"}, 8, "fp32"),
        ({"pipeline": 2, "tensor": 2, "data": 2, "zero": 1, "group": 2}, 4, "fp32"),
        ({"data": 2, "zero": 1, "group": 2, "offload": ALL, "recompute": "full"}, 2, "bf16"),
        ({"data": 2, "zero": 3, "group": 2, "offload": replace(NVME, activations="host")}, 2, "fp32"),
        ({"data": 2, "zero": 2, "group": 2, "offload": SHARDS}, 2, "bf16"),
        ({"data": 2, "zero": 3, "group": 2, "offload": SHARDS}, 2, "fp32"),
        ({"data": 2, "zero": 3, "group": 2, "offload": ALL, "recompute": "full"}, 2, "bf16"),
        ({"pipeline": 2, "tensor": 2, "offload": ALL}, 4, "fp32"),
        ({"context": 2}, 2, "fp32"),
        ({"context": 2}, 2, "bf16"),
        ({"context": 4, "zero": 1, "group": 4, "recompute": "full"}, 2, "bf16"),
        ({"context": 2, "tensor": 2, "sequence_parallel": True, "recompute": "selective"}, 2, "fp32"),
        ({"context": 2, "data": 2, "zero": 3, "group": 4}, 2, "fp32"),
        ({"context": 2, "data": 2, "zero": 2, "group": 2}, 2, "bf16"),
        ({"context": 2, "pipeline": 2, "schedule": "zbv", "virtual": 2}, 4, "fp32"),
        ({"context": 2, "pipeline": 2, "recompute": "full", "zero": 1, "group": 2}, 4, "bf16"),
        ({"context": 2, "zero": 3, "group": 2, "offload": ALL, "recompute": "full"}, 2, "fp32"),
    ]
    for fields, accumulation, precision in together:
        yield _case(fields, accumulation, precision)
    frozen: list[tuple[dict[str, Any], int, str]] = [
        ({}, 2, "fp32"),
        ({"data": 2, "zero": 2, "group": 2}, 2, "bf16"),
        ({"data": 2, "zero": 3, "group": 2}, 2, "fp32"),
        ({"tensor": 2, "sequence_parallel": True}, 2, "bf16"),
        ({"pipeline": 2}, 4, "fp32"),
    ]
    for fields, accumulation, precision in frozen:
        for lora in (ATTENTION, EVERYWHERE):
            yield replace(_case(fields, accumulation, precision), lora=lora)


def name_of(case: Case) -> str:
    strategy = case.problem.strategy(case.choice)
    adapters = "" if case.lora is None else f" lora {' '.join(case.lora.targets)}"
    return f"{case.precision} world {strategy.num_gpus}{told(strategy)}{adapters}"


def _case(fields: dict[str, Any], accumulation: int, precision: str) -> Case:
    return Case("", SMALL, Choice(micro=2, **fields), accumulation, 128, precision)


def main() -> int:
    parser = argparse.ArgumentParser(description="Bytes planned, traced and allocated, side by side.")
    parser.add_argument("--only", default="", metavar="WORDS", help="rows whose name holds these words alone")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    chosen = [case for case in rooms() if args.only in name_of(case)]
    began, lines = time.perf_counter(), list[Line]()
    print(f"{'plan MiB':>9}{'trace':>9}{'live':>9}{'plan':>7}{'live':>7}  (over trace)")
    with Pool(max(case.choice.num_gpus for case in chosen)) as pool:
        for case in chosen:
            started = time.perf_counter()
            found = judge(pool, case)
            lines += found
            for line in found:
                print(f"{line}  {name_of(case)}", flush=True)
            print(f"{'':43}{time.perf_counter() - started:.1f} s", flush=True)
    held, close = sum(line.holds for line in lines), [line.live / line.trace for line in lines if line.trace]
    print(
        f"{held} of {len(lines)} held; live over trace from {min(close):.4f} to {max(close):.4f}; "
        f"{time.perf_counter() - began:.0f} s"
    )
    return 0 if held == len(lines) else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
