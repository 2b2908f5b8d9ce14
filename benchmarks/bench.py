"""`make bench`: what the project claims of its speed and of its predictions, as ratios measured in one run.

python -m benchmarks.bench                       # all sections
python -m benchmarks.bench speed --compiled      # one of: speed, overhead, startup, prediction
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import runs
from benchmarks.runs import SMALL, by_shardwise, by_torchrun, make_job
from strategies.catalog import ENGINES

SHAPES = ((1, 512), (2, 256), (1, 256))
"""Sequences of a micro batch, tokens of a sequence."""
SPEED_BOUND, OVERHEAD_BOUND, STARTUP_BOUND_S = 0.95, 0.01, 7.0
TOKENS_BOUND, BYTES_BOUND = 0.25, 0.10
SETTLED = 2
"""Steps that count for no time: the first allocates, the second is played under the counting of bytes."""

PRICED = (
    "parameters",
    "gathered_parameters",
    "master_weights",
    "gradients",
    "optimizer_states",
    "activations",
    "logits",
    "communication_buffers",
    "temporary",
)


def speed(options: argparse.Namespace, _: Path) -> list[dict[str, Any]]:
    """Our step over Hugging Face's."""
    import torch

    from benchmarks.speed import measure

    torch.set_num_threads(1)
    rows = []
    print(
        "precision  mode      ours s  fraction of peak  Hugging Face s  fraction  | ratio   of fractions  of CPU time"
    )
    for compiled in (False, True) if options.compiled else (False,):
        for precision in ("fp32", "bf16"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row = measure(
                    options.model,
                    precision=precision,
                    sequence_length=options.sequence_length,
                    num_steps=options.steps,
                    compiled=compiled,
                )
            mine, theirs = row["ours"], row["hugging_face"]
            print(
                f"{precision:9}  {'compiled' if compiled else 'eager':8} {mine['wall_s']:7.2f} "
                f"{mine['fraction_of_peak']:17.2f} {theirs['wall_s']:15.2f} {theirs['fraction_of_peak']:9.2f}  | "
                f"{row['ratio']:5.2f} {row['ratio_of_fractions']:14.2f} {row['ratio_of_cpu_time']:12.2f}",
                flush=True,
            )
            rows.append(row | {"met": max(row["ratio"], row["ratio_of_fractions"]) >= SPEED_BOUND})
    return rows


def overhead(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Time of a step outside the engine's step function; the whole run beside the same loop under torchrun."""
    job = make_job(
        folder,
        "overhead",
        model=SMALL,
        num_steps=30,
        global_batch_size=16,
        sequence_length=256,
        strategy={"data_parallel_degree": 2, "zero_stage": 2, "micro_batch_size": 8},
    )
    rows = []
    for name, start in (("shardwise run", by_shardwise), ("torchrun", by_torchrun)):
        reports = start(job).reports[SETTLED:]
        outside = 1 - sum(r.engine_s for r in reports) / sum(r.step_s for r in reports)
        step_s = statistics.median(r.step_s for r in reports)
        print(f"{name:14} step {step_s:.3f} s, outside the engine {100 * outside:.2f} %", flush=True)
        rows.append({"by": name, "step_s": step_s, "outside": outside, "met": outside < OVERHEAD_BOUND})
    print(f"{'ratio':14} {rows[0]['step_s'] / rows[1]['step_s']:.3f} (run over torchrun, median step)")
    return rows


def startup(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """From the command to the end of the first step, by phase; the second of two runs, whose text is prepared."""
    job = make_job(
        folder,
        "startup",
        model=SMALL,
        num_steps=2,
        global_batch_size=4,
        sequence_length=128,
        strategy={"data_parallel_degree": 2, "zero_stage": 2, "micro_batch_size": 2},
    )
    by_shardwise(job)
    phases = by_shardwise(job).details("started")
    total = float(phases.pop("first_step_s"))
    for name, seconds in phases.items():
        print(f"{name:14} {seconds:6.2f} s")
    print(f"{'first step':14} {total:6.2f} s after the command (aim: under {STARTUP_BOUND_S:.0f})")
    return [{"first_step_s": total, "phases": phases, "met": total < STARTUP_BOUND_S}]


def prediction(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Predicted over measured, for OPT-125M on this CPU."""
    start: Callable[..., runs.Run] = by_shardwise if options.ray else by_torchrun
    rows = []
    print(
        "workers  zero  b     s | tokens/s measured  predicted  ratio | tensor GiB measured  predicted  ratio | RSS GiB"
    )
    for world in (1, 2):
        for micro, length in SHAPES:
            job = make_job(
                folder,
                f"prediction-{world}-{micro}x{length}",
                model=options.model,
                num_steps=SETTLED + options.steps,
                global_batch_size=world * micro,
                sequence_length=length,
                strategy={
                    "data_parallel_degree": world,
                    "zero_stage": 0 if world == 1 else 2,
                    "micro_batch_size": micro,
                    "activation_checkpointing": "none",
                },
            )
            run = start(job)
            row = compared(run, world=world, micro=micro, length=length)
            rows.append(row)
            print(
                f"{world:7} {row['zero_stage']:5} {micro:2} {length:5} | {_told(row)} | {row['rss_bytes'] / 2**30:7.2f}",
                flush=True,
            )
            if not row["met"]:
                print(_components(row), flush=True)
    return rows


MEDIUM = SMALL | {"num_layers": 8, "hidden_size": 512, "num_heads": 8, "ffn_size": 2048}
ENGINE_ROWS = (
    *(("native", zero, "fp32") for zero in range(4)),
    *(("fairscale", zero, "fp32") for zero in (1, 2, 3)),
    *(("colossalai", zero, "fp32") for zero in (0, 1, 2)),
    ("native", 3, "bf16"),
    ("colossalai", 3, "bf16"),
)


def engines(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Predicted over measured for each engine, whose plans rest on the native one's cost: two workers, 25 M parameters."""
    rows = []
    print("engine      ZeRO  precision | tokens/s measured  predicted  ratio | tensor GiB measured  predicted  ratio")
    for engine, zero, precision in ENGINE_ROWS:
        job = make_job(
            folder,
            f"{engine}-{zero}-{precision}",
            model=MEDIUM,
            num_steps=SETTLED + options.steps,
            global_batch_size=8,
            sequence_length=256,
            precision=precision,
            strategy={
                "engine": engine,
                "data_parallel_degree": 2,
                "zero_stage": zero,
                "micro_batch_size": 4,
                "activation_checkpointing": "none",
            },
        )
        row = compared(by_torchrun(job), world=2, micro=4, length=256) | {"engine": engine, "precision": precision}
        speed, memory = row["tokens_per_second"], row["tensor_peak_bytes"]
        stated = ENGINES[engine]
        row["met"] = abs(speed["ratio"] - 1) <= (stated.speed_error or TOKENS_BOUND) and abs(memory["ratio"] - 1) <= (
            stated.memory_error or BYTES_BOUND
        )
        rows.append(row)
        print(f"{engine:11} {zero:4}  {precision:9} | {_told(row)}", flush=True)
    return rows


def compared(run: runs.Run, *, world: int, micro: int, length: int) -> dict[str, Any]:
    found = run.details("memory_measured")
    stage = run.plan.price.memory.stages[0]
    measured = statistics.median(r.tokens_per_second for r in run.reports[SETTLED:])
    components = {name: size for name, size in found["components"].items() if size}
    names = [*components, *(name for name in PRICED if getattr(stage, name) and name not in components)]
    row = {
        "workers": world,
        "zero_stage": run.plan.strategy.zero_stage,
        "micro_batch_size": micro,
        "sequence_length": length,
        "tokens_per_second": _pair(run.plan.tokens_per_second, measured),
        "tensor_peak_bytes": _pair(stage.tensor_peak_bytes, found["peak_bytes"]),
        "peak_phase": {"predicted": stage.peak_phase, "measured": found["phase"]},
        "components": {name: [getattr(stage, name, 0), components.get(name, 0)] for name in names},
        "rss_bytes": found["rss_bytes"],
    }
    row["met"] = (
        abs(row["tokens_per_second"]["ratio"] - 1) <= TOKENS_BOUND
        and abs(row["tensor_peak_bytes"]["ratio"] - 1) <= BYTES_BOUND
    )
    return row


def _told(row: dict[str, Any]) -> str:
    """Tokens a second and GiB, each measured, predicted and as a ratio."""
    speed, memory = row["tokens_per_second"], row["tensor_peak_bytes"]
    return (
        f"{speed['measured']:17.1f} {speed['predicted']:10.1f} {speed['ratio']:6.2f} | "
        f"{memory['measured'] / 2**30:19.3f} {memory['predicted'] / 2**30:10.3f} {memory['ratio']:6.3f}"
    )


def _pair(predicted: float, measured: float) -> dict[str, float]:
    return {"predicted": predicted, "measured": measured, "ratio": predicted / measured}


def _components(row: dict[str, Any]) -> str:
    told = [
        f"{name} {predicted / 2**20:.0f}/{measured / 2**20:.0f}"
        for name, (predicted, measured) in row["components"].items()
    ]
    phases = row["peak_phase"]
    return f"        MiB predicted/measured at {phases['predicted']}/{phases['measured']}: {', '.join(told)}"


SECTIONS: dict[str, Callable[[argparse.Namespace, Path], list[dict[str, Any]]]] = {
    "speed": speed,
    "overhead": overhead,
    "startup": startup,
    "prediction": prediction,
    "engines": engines,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--compiled", action="store_true", help="speed: torch.compile as well")
    parser.add_argument("--ray", action="store_true", help="prediction: by `shardwise run` instead of plain workers")
    parser.add_argument("--model", default="opt-125m")
    parser.add_argument("--sequence-length", type=int, default=512, help="speed: tokens of its one sequence")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a case of speed and prediction")
    parser.add_argument("--output", type=Path, help="write the rows as JSON too")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        parser.error(f"unknown section {unknown[0]}: choose of {', '.join(SECTIONS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    document: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="shardwise-bench-") as folder:
        for name in options.sections or SECTIONS:
            load, cores = os.getloadavg()[0], os.cpu_count() or 1
            busy = (
                f" (the machine is busy: load {load:.1f} on {cores} cores; seconds are not its own)" if load > 1 else ""
            )
            print(f"\n{name}: {(SECTIONS[name].__doc__ or '').strip()}{busy}", flush=True)
            started = time.perf_counter()
            document[name] = SECTIONS[name](options, Path(folder))
            print(f"{name} took {time.perf_counter() - started:.0f} s")
    if options.output is not None:
        options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    missed = [name for name, rows in document.items() if not all(row["met"] for row in rows)]
    print(f"\n{'missed: ' + ', '.join(missed) if missed else 'all bounds are met'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
