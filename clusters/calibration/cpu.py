"""A benchmark of what one core does while all of them train: run as a child process, which may import torch.

`python -m clusters.calibration.cpu NUM_WORKERS BUDGET_S FOLDER` prints a line of JSON for every step of progress, and
the result in the last. One torch import; the workers are forked from it and pass a barrier before each part, so that
every core is loaded alike, as in a run with one worker a core and one thread a worker.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Barrier
from typing import Any

import torch

from clusters.calibration import benches
from clusters.calibration.benches import DTYPES, LINEAR_SHAPES, Curve
from clusters.calibration.disk import disk_rates
from clusters.calibration.timing import cpu_seconds, mean_curves


def worlds(num_workers: int) -> list[int]:
    """2, 4, 8, ... and all of them."""
    powers = [2**i for i in range(1, 12) if 2**i < num_workers]
    return [*powers, num_workers] if num_workers > 1 else []


def worker(rank: int, num_workers: int, budget_s: float, folder: str, barrier: Barrier, answers: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    curves: dict[str, Curve] = {}
    numbers: dict[str, float] = {}
    latency: dict[str, float] = {}

    seconds = partial(cpu_seconds, budget_s=budget_s)

    def part(what: str) -> None:
        barrier.wait(timeout=120)
        answers.send(("progress", what))

    for name, dtype in DTYPES.items():
        part(f"matmul {name}")
        shapes = LINEAR_SHAPES if name in ("fp32", "bf16") else LINEAR_SHAPES[:2]
        curves[f"matmul_{name}"] = benches.linear_curve(seconds, dtype, shapes)
    part("attention")
    for name in ("fp32", "bf16"):
        curves[f"attention_{name}"] = benches.attention_curve(partial(cpu_seconds, budget_s=budget_s / 2), DTYPES[name])
    part("memory")
    curves["elementwise"] = benches.elementwise_curve(seconds)
    numbers["memory_bytes_per_s"] = benches.copy_bytes_per_s(seconds)
    part("optimizer")
    numbers["optimizer_bytes_per_s"] = benches.optimizer_bytes_per_s(seconds)
    part("small operations")
    numbers["op_overhead_s"] = benches.op_overhead_s(seconds)
    part("one core alone")
    if rank == 0:
        for name in ("fp32", "bf16"):
            curves[f"matmul_{name}_alone"] = benches.linear_curve(seconds, DTYPES[name], LINEAR_SHAPES[:4])
    for world in worlds(num_workers):
        part(f"collectives over {world}")
        if rank < world:
            found = benches.collective_curves(rank, world, f"{folder}/store-{world}", budget_s)
            curves |= found[0]
            latency |= found[1]
    part("done")
    answers.send(("result", {"curves": curves, "numbers": numbers, "latency": latency}))


def measure(num_workers: int, budget_s: float, folder: str, say: Callable[[float, str], None]) -> dict[str, Any]:
    """The fields of a Calibration, as plain values."""
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(num_workers)
    pipes = [fork.Pipe(duplex=False) for _ in range(num_workers)]
    with tempfile.TemporaryDirectory(prefix="shardwise-") as scratch:
        workers = [
            fork.Process(
                target=worker, args=(rank, num_workers, budget_s, scratch, barrier, pipes[rank][1]), daemon=True
            )
            for rank in range(num_workers)
        ]
        for process in workers:
            process.start()
        for _, sender in pipes:
            sender.close()  # so that a dead worker is an end of file and not a wait without end
        num_parts = len(DTYPES) + 5 + len(worlds(num_workers)) + 2
        try:
            results = [_result(pipe[0], say if rank == 0 else None, num_parts) for rank, pipe in enumerate(pipes)]
        finally:
            for process in workers:
                process.join(timeout=10)
                if process.is_alive():
                    process.kill()
    say(1.0, "disk")
    return merged(results) | disk_rates(folder)


def _result(pipe: Connection, say: Callable[[float, str], None] | None, num_parts: int) -> dict[str, Any]:
    done = 0
    while True:
        try:
            kind, value = pipe.recv()
        except EOFError:
            raise RuntimeError("a measuring process died") from None
        if kind == "result":
            return dict(value)
        if say:
            say(done / num_parts, value)
            done += 1


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the workers; what only some measured (a smaller world, one core alone) over those."""
    names = list(dict.fromkeys(name for result in results for name in result["curves"]))
    curves: dict[str, Curve] = {}
    for name in names:
        curves |= mean_curves([{name: r["curves"][name]} for r in results if name in r["curves"]])
    latencies = [result["latency"] for result in results]
    numbers = {name: sum(r["numbers"][name] for r in results) / len(results) for name in results[0]["numbers"]}
    return {
        "matmul_flops": {
            name: max(rate for label in (f"matmul_{name}", f"matmul_{name}_alone") for _, rate in curves.get(label, []))
            for name in DTYPES
            if f"matmul_{name}" in curves
        },
        "elementwise_bytes_per_s": next(rate for size, rate in curves["elementwise"] if size == 2**23),
        "collective_latency_s": {name: max(found.get(name, 0.0) for found in latencies) for name in latencies[0]},
        "curves": curves,
        **numbers,
    }


def serve(
    measure: Callable[[int, float, str, Callable[[float, str], None]], dict[str, Any]], arguments: list[str]
) -> None:
    """The child's end of the protocol, whatever it measures."""
    num_workers, budget_s, folder = int(arguments[1]), float(arguments[2]), arguments[3]
    answers = os.fdopen(os.dup(1), "w")  # torch and gloo may print on stdout
    os.dup2(2, 1)

    def say(fraction: float, what: str) -> None:
        print(json.dumps({"progress": fraction, "what": what}), file=answers, flush=True)

    print(json.dumps({"result": measure(num_workers, budget_s, folder, say)}), file=answers, flush=True)


if __name__ == "__main__":
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    serve(measure, sys.argv)
