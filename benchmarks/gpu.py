"""Native ZeRO, recompute and offload on the GPUs of this machine: tokens/s, MFU and memory beside what the planner predicted.
One JSON, one table.

    python -m benchmarks.gpu                # docs/measurements/gpu-NAME.json
    python -m benchmarks.gpu --dry-run      # a tiny OPT on two CPU processes; chosen by itself where there is no GPU

Needs a checkout, torch (2.11 or later), numpy, PyYAML and pydantic: no network, no installation, no Ray. Every case has
fresh processes, so that none finds the memory that another left, and an out-of-memory ends one case alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.gpu_cases import VARIATIONS, Case, cases, pretended
from clusters.cluster import Cluster
from clusters.inventory.local import Device, cluster_of_devices, nvml_devices
from orchestrator.planner.problem import Problem

FOLDER = Path(__file__).parents[1] / "docs" / "measurements"
MEASURED_STEPS = 6
CASE_TIMEOUT_S = 300.0
PRELOADED = [
    "torch",
    "orchestrator.models.decoder",
    "orchestrator.planner.trace.live_bytes",
    "strategies.engines.native",
]


# Measuring: one process for each GPU ----------------------------------------------------------------------------------


def measure(case: Case, rank: int, store: str) -> dict[str, Any]:
    """What one rank saw of a case."""
    import torch
    import torch.distributed as dist

    from orchestrator.models.decoder import Decoder
    from orchestrator.planner.trace.live_bytes import LiveBytes
    from strategies.engines.engine import MicroBatch
    from strategies.engines.native import build_session

    on_gpu = case.device_type == "cuda"
    # As a run's worker has them: a host optimizer wants the cores that no other rank needs.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // case.strategy.num_gpus) if on_gpu else 1)
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    world = case.strategy.num_gpus
    if world > 1:
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
    generator = torch.Generator(device).manual_seed(0)  # every rank draws the same

    def weights(name: str, shape: Any) -> torch.Tensor:
        if "norm" in name and name.endswith("weight"):
            return torch.ones(shape, device=device)
        return torch.empty(shape, device=device).normal_(0, 0.006, generator=generator)

    with torch.device("meta"):
        module = Decoder(case.arch, attention=case.strategy.attention)
    session = build_session(module, strategy=case.strategy, precision=case.precision, weights=weights, device=device)
    tokens = torch.Generator().manual_seed(rank)
    shape = (case.strategy.micro_batch_size, case.sequence_length + 1)
    batches = []
    for _ in range(case.strategy.gradient_accumulation_steps):
        ids = torch.randint(case.arch.vocab_size, shape, generator=tokens)
        batches.append(MicroBatch(input_ids_BS=ids[:, :-1], target_ids_BS=ids[:, 1:], weight_B=torch.ones(shape[0])))

    def step() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        session.step(batches, num_targets=case.tokens_per_step, learning_rate=1e-4)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for _ in range(case.num_warmup_steps):
        step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = [step() for _ in range(case.num_steps)]
    if on_gpu:
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    else:
        allocated, reserved = None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with LiveBytes(session.tensors(), vocab_size=case.arch.vocab_size) as live:
        step()
    session.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    return {
        "seconds": seconds,
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": reserved,
        "tensor_peak_bytes": live.peak_bytes,
        "components": {name: size for name, size in live.peak.items() if size},
        "peak_phase": live.peak_phase,
    }


def _child(case: Case, rank: int, store: str, pipe: Connection) -> None:
    try:
        pipe.send((measure(case, rank, store), None))
    except BaseException as error:
        pipe.send((None, f"{type(error).__name__}: {error}"))
        traceback.print_exc()


def run(case: Case) -> dict[str, Any]:
    """Every rank's answer folded into one: the slowest rank's time, the fullest rank's memory. RuntimeError on failure."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(case.strategy.num_gpus):
            ours, theirs = context.Pipe()
            process = context.Process(target=_child, args=(case, rank, f"{folder}/store", theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            ranks = _answers(pipes)
        finally:
            for process in processes:
                process.join(timeout=20)
                if process.is_alive():
                    process.kill()
                    process.join()
    fullest = max(ranks, key=lambda answer: int(answer["tensor_peak_bytes"]))
    steps = [max(times) for times in zip(*(answer["seconds"] for answer in ranks), strict=True)]
    return {
        "step_s": statistics.median(steps),
        "steps_s": steps,
        **{key: max((a[key] for a in ranks if a[key] is not None), default=None) for key in MEMORY},
        "tensor_peak_bytes": fullest["tensor_peak_bytes"],
        "components": fullest["components"],
        "peak_phase": fullest["peak_phase"],
    }


MEMORY = ("peak_allocated_bytes", "peak_reserved_bytes")


def _answers(pipes: list[Connection]) -> list[dict[str, Any]]:
    """By rank. The first error ends the wait: the other ranks may hang in a collective."""
    answers: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + CASE_TIMEOUT_S
    while len(answers) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"no answer in {CASE_TIMEOUT_S:.0f} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                answer, error = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} died") from None
            if error is not None:
                raise RuntimeError(f"rank {rank}: {error}")
            answers[rank] = answer
    return [answers[rank] for rank in range(len(pipes))]


# What is measured, and where ------------------------------------------------------------------------------------------


def gpus() -> Cluster | None:
    """This machine's GPUs, by NVML where its Python module is, else by torch. None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    if devices := nvml_devices():
        return cluster_of_devices(devices)
    count = torch.cuda.device_count()
    # Without NVML, peers that reach each other's memory stand for NVLink.
    peers = count > 1 and torch.cuda.can_device_access_peer(0, 1)
    found = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            Device(
                name=properties.name,
                memory_bytes=properties.total_memory,
                num_multiprocessors=properties.multi_processor_count,
                num_nvlinks=int(peers),
                capability=(properties.major, properties.minor),
            )
        )
    return cluster_of_devices(found)


def measured_case(case: Case, problem: Problem) -> dict[str, Any]:
    """A row of the JSON."""
    memory, times = problem.memory(case.strategy), problem.time(case.strategy)
    stage = memory.stages[0]
    world, tokens = case.strategy.num_gpus, case.tokens_per_step
    flops = problem.work.model_flops_per_token(case.sequence_length)
    peak = problem.cluster.accelerator.peak_flops[case.precision]

    def speeds(step_s: float) -> dict[str, float]:
        speed = tokens / step_s / world
        return {"step_s": step_s, "tokens_per_second_per_gpu": speed, "mfu": speed * flops / peak}

    row: dict[str, Any] = {
        "model": case.model,
        "zero_stage": case.strategy.zero_stage,
        "data_parallel_degree": case.strategy.data_parallel_degree,
        "activation_checkpointing": case.strategy.activation_checkpointing,
        "offload": dataclasses.asdict(case.strategy.offload),
        "micro_batch_size": case.strategy.micro_batch_size,
        "gradient_accumulation_steps": case.strategy.gradient_accumulation_steps,
        "sequence_length": case.sequence_length,
        "precision": case.precision,
        "states": case.strategy.states,
        "predicted": speeds(times.step_s)
        | {
            "tensor_peak_bytes": stage.tensor_peak_bytes,
            "peak_bytes": memory.peak_bytes,
            "usable_bytes": memory.usable_bytes,
            "fits": memory.fits,
            "stage": dataclasses.asdict(stage),
            "time": dataclasses.asdict(times),
        },
    }
    if not memory.fits:
        return row | {"skipped": "predicted not to fit"}
    try:
        found = run(case)
    except RuntimeError as error:
        return row | {"error": str(error)[:500]}
    row["measured"] = found | speeds(found["step_s"])
    predicted, measured = row["predicted"], row["measured"]
    row["predicted_over_measured"] = {
        name: predicted[ours] / measured[theirs] if measured[theirs] else None
        for name, ours, theirs in (
            ("tokens_per_second", "tokens_per_second_per_gpu", "tokens_per_second_per_gpu"),
            ("tensor_peak_bytes", "tensor_peak_bytes", "tensor_peak_bytes"),
            ("allocated_bytes", "tensor_peak_bytes", "peak_allocated_bytes"),
            ("reserved_bytes", "peak_bytes", "peak_reserved_bytes"),
        )
    }
    return row


# Saying it ------------------------------------------------------------------------------------------------------------

HEADING = (
    "model     zero recompute offload          b     s | tokens/s/GPU   MFU   allocated  reserved GiB | "
    "predicted over measured: tokens/s  tensors  allocated  reserved"
)


def line(row: dict[str, Any]) -> str:
    head = (
        f"{row['model']:9} {row['zero_stage']:4} {row['activation_checkpointing']:9} {_away(row['offload']):11} "
        f"{row['micro_batch_size']:6} {row['sequence_length']:5} | "
    )
    if "measured" not in row:
        return head + (row.get("skipped") or row["error"])
    found, ratios = row["measured"], row["predicted_over_measured"]

    def gib(value: int | None) -> str:
        return "-" if value is None else f"{value / 2**30:.2f}"

    def ratio(name: str) -> str:
        return "-" if ratios[name] is None else f"{ratios[name]:.2f}"

    return head + (
        f"{found['tokens_per_second_per_gpu']:12,.0f} {found['mfu']:5.2f} "
        f"{gib(found['peak_allocated_bytes']):>11} {gib(found['peak_reserved_bytes']):>13} | "
        f"{ratio('tokens_per_second'):>33} {ratio('tensor_peak_bytes'):>8} "
        f"{ratio('allocated_bytes'):>10} {ratio('reserved_bytes'):>9}"
    )


def _away(offload: dict[str, Any]) -> str:
    return ", ".join(name for name in ("optimizer", "parameters", "activations") if offload[name] != "none") or "-"


def machine(cluster: Cluster) -> dict[str, Any]:
    import torch

    on_gpu = cluster.accelerator.kind == "cuda"
    return {
        "cluster": cluster.name,
        "accelerator": torch.cuda.get_device_name(0) if on_gpu else "cpu",
        "num_gpus": cluster.num_gpus,
        "peak_flops": dict(cluster.accelerator.peak_flops),
        "peak_flops_source": cluster.accelerator.source,
        "notes": list(cluster.notes),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="a tiny OPT on two CPU processes")
    parser.add_argument("--output", type=Path, help="the JSON file; a dry run writes none by itself")
    parser.add_argument("--models", nargs="+", choices=list(VARIATIONS), default=list(VARIATIONS))
    parser.add_argument(
        "--zero-stages", nargs="+", type=int, choices=range(4), help="default: 0, and 1 to 3 over several"
    )
    parser.add_argument("--steps", type=int, default=MEASURED_STEPS, help="measured steps of a case")
    options = parser.parse_args(arguments)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    cluster = None if options.dry_run else gpus()
    dry_run = cluster is None
    if cluster is None:
        print("dry run: two CPU processes, a tiny OPT, numbers that mean nothing" + _why(options.dry_run))
        cluster = pretended()
    output: Path | None = options.output or (None if dry_run else FOLDER / f"gpu-{cluster.name}.json")
    stages = options.zero_stages or ([0, 3] if dry_run else [0, 1, 2, 3] if cluster.num_gpus > 1 else [0])
    steps = min(2, options.steps) if dry_run else options.steps
    document: dict[str, Any] = {"dry_run": dry_run, "machine": machine(cluster), "cases": []}
    print(HEADING, flush=True)
    for case, problem in cases(cluster, zero_stages=stages, models=options.models, num_steps=steps):
        document["cases"].append(measured_case(case, problem))
        print(line(document["cases"][-1]), flush=True)
        if output is not None:  # after every case: what was measured stays, whatever comes
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if output is not None:
        print(f"written: {output}")
    return 1 if any("error" in row for row in document["cases"]) else 0


def _why(asked: bool) -> str:
    return "" if asked else " (torch sees no GPU here)"


if __name__ == "__main__":
    sys.exit(main())
