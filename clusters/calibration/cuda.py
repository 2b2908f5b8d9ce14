"""A benchmark of what one GPU and the links between them do: run as a child process, which may import torch.

Written to the same benches as the CPU's, and NOT YET RUN on a GPU: no machine with one was at hand. Same protocol as
clusters.calibration.cpu: `python -m clusters.calibration.cuda NUM_GPUS BUDGET_S FOLDER`.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.queues import Queue
from typing import Any

import torch

from clusters.calibration import benches
from clusters.calibration.benches import DTYPES, Curve
from clusters.calibration.cpu import serve, worlds
from clusters.calibration.disk import disk_rates
from clusters.calibration.timing import quartile

LINEAR_SHAPES = ((512, 768, 768), (2048, 768, 3072), (2048, 2048, 8192), (4096, 4096, 16384), (8192, 8192, 28672))
SEQUENCE_LENGTHS = (512, 1024, 2048, 4096, 8192)
ELEMENTWISE_BYTES = (2**16, 2**20, 2**23, 2**26, 2**28)
COLLECTIVE_BYTES = (2**12, 2**18, 2**22, 2**25, 2**28)
PINNED_BYTES = 2**28


def gpu_seconds(operation: Callable[[], object], *, budget_s: float, device: str) -> float:
    """Lower quartile of the seconds of a call on the device, by CUDA events: from first kernel to last."""
    operation()
    torch.cuda.synchronize(device)
    samples: list[float] = []
    started = time.perf_counter()
    while len(samples) < 3 or (time.perf_counter() - started < budget_s and len(samples) < 1000):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        operation()
        last.record()
        last.synchronize()
        samples.append(first.elapsed_time(last) / 1e3)
    return quartile(samples)


def host_seconds(operation: Callable[[], object], *, budget_s: float, device: str) -> float:
    """Return seconds by the host's clock, drained at the end: what launching costs where kernels are too small to hide it."""

    def drained() -> float:
        before = time.perf_counter()
        operation()
        torch.cuda.synchronize(device)
        return time.perf_counter() - before

    drained()
    started = time.perf_counter()
    samples = [drained(), drained(), drained()]
    while time.perf_counter() - started < budget_s:
        samples.append(drained())
    return quartile(samples)


def one_gpu(budget_s: float, device: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Curves and numbers of one GPU; the others of the node share nothing with it but power."""
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    seconds = partial(gpu_seconds, budget_s=budget_s, device=device)
    low = ("bf16", "fp16") if torch.cuda.get_device_capability(device) >= (8, 0) else ("fp16",)
    curves: dict[str, Curve] = {}
    for name in ("fp32", *low):
        say(f"matmul {name}")
        shapes = LINEAR_SHAPES if name != "fp32" else LINEAR_SHAPES[:4]
        curves[f"matmul_{name}"] = benches.linear_curve(seconds, DTYPES[name], shapes, device)
        say(f"attention {name}")
        curves[f"attention_{name}"] = benches.attention_curve(seconds, DTYPES[name], SEQUENCE_LENGTHS, device)
    say("memory")
    curves["elementwise"] = benches.elementwise_curve(seconds, ELEMENTWISE_BYTES, device)
    numbers = {
        "memory_bytes_per_s": benches.copy_bytes_per_s(seconds, 2**28, device),
        "elementwise_bytes_per_s": next(rate for size, rate in curves["elementwise"] if size == 2**26),
        "optimizer_bytes_per_s": benches.optimizer_bytes_per_s(seconds, size=2**23, device=device),
        "op_overhead_s": benches.op_overhead_s(partial(host_seconds, budget_s=budget_s, device=device), device=device),
    }
    say("host link")
    best = {name: max(rate for _, rate in curves[f"matmul_{name}"]) for name in ("fp32", *low)}
    return {"curves": curves, "matmul_flops": best, "host_link_bytes_per_s": host_link(seconds, device), **numbers}


def host_link(seconds: Callable[[Callable[[], object]], float], device: str) -> float:
    """Bytes per second of pinned copies, the slower direction."""
    pinned = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(PINNED_BYTES, dtype=torch.uint8, device=device)
    to_device = seconds(lambda: there.copy_(pinned, non_blocking=True))
    to_host = seconds(lambda: pinned.copy_(there, non_blocking=True))
    return PINNED_BYTES / max(to_device, to_host)


def collective_worker(rank: int, world: int, store: str, budget_s: float, answers: Queue[Any]) -> None:
    torch.cuda.set_device(rank)
    found = benches.collective_curves(rank, world, store, budget_s, COLLECTIVE_BYTES, f"cuda:{rank}")
    if rank == 0:
        answers.put(found)


def collectives(world: int, budget_s: float) -> tuple[dict[str, Curve], dict[str, float]]:
    """NCCL over so many GPUs of this node, a process each; spawned, since CUDA does not survive a fork."""
    spawn = multiprocessing.get_context("spawn")
    answers: Queue[Any] = spawn.Queue()
    with tempfile.TemporaryDirectory(prefix="shardwise-") as folder:
        workers = [
            spawn.Process(
                target=collective_worker, args=(rank, world, f"{folder}/store", budget_s, answers), daemon=True
            )
            for rank in range(world)
        ]
        for process in workers:
            process.start()
        found: tuple[dict[str, Curve], dict[str, float]] = answers.get(timeout=180)
        for process in workers:
            process.join(timeout=30)
        return found


def measure(num_gpus: int, budget_s: float, folder: str, say: Callable[[float, str], None]) -> dict[str, Any]:
    """The fields of a Calibration, and host_link_bytes_per_s beside them."""
    if num_gpus > torch.cuda.device_count():
        raise RuntimeError(f"torch sees {torch.cuda.device_count()} GPUs, {num_gpus} are to be measured")
    num_parts, done = 8 + len(worlds(num_gpus)), 0

    def part(what: str) -> None:
        nonlocal done
        say(min(1.0, done / num_parts), what)
        done += 1

    result = one_gpu(budget_s, "cuda:0", part)
    result["collective_latency_s"] = {}
    for world in worlds(num_gpus):
        part(f"collectives over {world}")
        curves, latency = collectives(world, budget_s)
        result["curves"] |= curves
        result["collective_latency_s"] |= latency
    say(1.0, "disk")
    return result | disk_rates(folder)


if __name__ == "__main__":
    serve(measure, sys.argv)
