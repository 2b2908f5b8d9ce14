"""kill -9 at random moments: does a run always resume, never from a torn checkpoint, with the losses of an undisturbed one?

    python -m benchmarks.chaos [--kills 20] [--seed 0] [--workers 3] [--steps 400] [--directory FOLDER]

One job is trained undisturbed, then once more while its processes are killed: a worker, the raylet, the `run` process,
or all of them at once (a power cut), while it starts, trains or writes a checkpoint. `run` restarts what it can by itself;
where it was killed itself, it is called again. All losses, those of steps done again included, are compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from orchestrator.control.processes import end_marked, marked
from orchestrator.telemetry.records import Event, StepReport, read

ROOT = Path(__file__).parents[1]
TARGETS = ("worker", "raylet", "run", "everything")
MOMENTS = ("checkpoint", "step", "start")
EVERY = 5
"""Steps between two checkpoints."""
LIMIT_S = 180.0
"""Longest wait for a run to make its first new step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    target: str
    moment: str
    step: int
    """Last step on record when it struck."""
    back_s: float
    """From the kill to the next step on record."""
    redone: int
    """Steps that were done again for it."""


def job(directory: Path, *, name: str, workers: int, steps: int) -> Path:
    """A job small enough to be killed often, with a checkpoint every few steps."""
    text = directory / "text.txt"
    if not text.exists():
        text.write_text("\n".join(f"{n} squared is {n * n} and cubed is {n**3}" for n in range(4000)))
    mapping = {
        "version": 1,
        "name": name,
        "model": {
            "family": "opt",
            "num_layers": 2,
            "hidden_size": 64,
            "num_heads": 4,
            "ffn_size": 256,
            "vocab_size": 264,
            "max_position": 64,
        },
        "data": {"train": [str(text)], "tokenizer": "byte"},
        "batch": {"global_batch_size": 2 * workers, "sequence_length": 64},
        "training": {
            "steps": steps,
            "precision": "fp32",
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"warmup_steps": 5},
        },
        "cluster": {"gpu": "cpu", "nodes": 1, "gpus_per_node": workers},
        "strategy": {"data_parallel_degree": workers, "zero_stage": 2, "micro_batch_size": 1},
        "checkpoint": {"directory": str(directory / "runs"), "every": EVERY, "keep": 2},
        "recovery": {"max_restarts": 1000},
    }
    file = directory / f"{name}.yaml"
    file.write_text(yaml.safe_dump(mapping))
    return file


def start(file: Path, log: Path) -> psutil.Popen:
    with log.open("a") as out:
        return psutil.Popen(
            [sys.executable, "-m", "orchestrator.cli", "run", str(file), "--json"],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def victims(target: str, run: psutil.Popen, folder: Path, rng: random.Random) -> list[psutil.Process]:
    """The processes to kill; none where the target is not there yet."""
    if target == "run":
        return [run]
    mine = marked(str(folder.resolve()))
    if target == "everything":
        return [run, *mine]
    word = {"worker": "ray::TrainingWorker", "raylet": "/raylet/raylet"}[target]
    found = []
    for process in mine:
        try:
            if word in " ".join(process.cmdline()[:1]):
                found.append(process)
        except psutil.Error:
            continue
    return [rng.choice(found)] if found else []


def last_step(folder: Path) -> int:
    return max((report.step for report in read(folder / "metrics.jsonl", StepReport)), default=0)


def num_reports(folder: Path) -> int:
    return sum(1 for _ in read(folder / "metrics.jsonl", StepReport))


def starts(folder: Path) -> list[Event]:
    """The first step of each worker group that came to one."""
    return [event for event in read(folder / "events.jsonl", Event) if event.kind == "started"]


def is_over(run: psutil.Popen) -> bool:
    return run.poll() is not None


def strike(run: psutil.Popen, folder: Path, target: str, moment: str, rng: random.Random) -> bool:
    """Waits for the moment and kills; False where the run was over before it came."""
    deadline = time.monotonic() + LIMIT_S
    delay_s = rng.uniform(0.0, 5.0) if moment == "start" else rng.uniform(0.0, 0.1)
    enough = num_reports(folder) + rng.randint(1, 2 * EVERY)
    checkpoints = folder / "checkpoints"
    while moment != "start" and num_reports(folder) < enough:
        if is_over(run) or time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    time.sleep(delay_s)
    while moment == "checkpoint" and not list(checkpoints.glob("*.partial")):
        if is_over(run) or time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    while not (found := victims(target, run, folder, rng)):
        if is_over(run) or time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    for process in found:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return not is_over(run) or target in ("run", "everything")


def disturb(file: Path, folder: Path, *, kills: int, rng: random.Random, log: Path) -> Iterator[Kill]:
    """Runs the job to its end through the kills; raises where it does not come back."""
    run = start(file, log)
    try:
        plan = [(TARGETS[n % len(TARGETS)], MOMENTS[n % len(MOMENTS)]) for n in range(kills)]
        rng.shuffle(plan)
        for target, moment in plan:
            if not strike(run, folder, target, moment, rng):
                break
            struck, at, before = time.monotonic(), last_step(folder), len(starts(folder))
            if target in ("run", "everything"):
                run.wait(timeout=30)
                run = start(file, log)
            while len(starts(folder)) == before and not is_over(run):
                if time.monotonic() - struck > LIMIT_S:
                    raise RuntimeError(f"no step within {LIMIT_S:.0f} s after a kill of {target}; see {log}")
                time.sleep(0.02)
            first = starts(folder)[-1].details["first_step"]
            back_s, redone = time.monotonic() - struck, max(0, at - first + 1)
            yield Kill(target=target, moment=moment, step=at, back_s=back_s, redone=redone)
        if run.wait(timeout=600) != 0:
            raise RuntimeError(f"the run ended with exit code {run.returncode}; see {log}")
    finally:
        if not is_over(run):
            run.kill()
        end_marked(str(folder.resolve()))


def undisturbed(file: Path, folder: Path, log: Path) -> dict[int, float]:
    run = start(file, log)
    try:
        if run.wait(timeout=600) != 0:
            raise RuntimeError(f"the undisturbed run ended with exit code {run.returncode}; see {log}")
    finally:
        if not is_over(run):
            run.kill()
        end_marked(str(folder.resolve()))
    return {report.step: report.loss for report in read(folder / "metrics.jsonl", StepReport)}


def differences(folder: Path, wanted: dict[int, float]) -> list[str]:
    """What is not as in the undisturbed run: each loss that was ever reported, bit for bit, and no step missing."""
    reports = list(read(folder / "metrics.jsonl", StepReport))
    wrong = [
        f"step {report.step}: {report.loss!r} instead of {wanted.get(report.step)!r}"
        for report in reports
        if report.loss != wanted.get(report.step)
    ]
    missing = sorted(wanted.keys() - {report.step for report in reports})
    return wrong + ([f"no report of steps {missing}"] if missing else [])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--directory", type=Path, help="of jobs, runs and logs; by default a new temporary one")
    given = parser.parse_args(arguments)
    directory = given.directory or Path(tempfile.mkdtemp(prefix="chaos-"))
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    log = directory / "run.log"
    calm = job(directory, name="calm", workers=given.workers, steps=given.steps)
    wild = job(directory, name="wild", workers=given.workers, steps=given.steps)
    print(f"{given.workers} workers, {given.steps} steps, seed {given.seed}, in {directory}", flush=True)
    wanted = undisturbed(calm, directory / "runs" / "calm", log)
    print(
        f"{'kill':>4}  {'what':<10}  {'while':<10}  {'at step':>7}  {'back after':>10}  {'done again':>10}", flush=True
    )
    folder = directory / "runs" / "wild"
    kills = []
    for kill in disturb(wild, folder, kills=given.kills, rng=random.Random(given.seed), log=log):
        kills.append(kill)
        print(
            f"{len(kills):>4}  {kill.target:<10}  {kill.moment:<10}  {kill.step:>7}  {kill.back_s:>8.1f} s  {kill.redone:>10}",
            flush=True,
        )
    wrong = differences(folder, wanted)
    refused = [event for event in read(folder / "events.jsonl", Event) if event.kind == "checkpoint_refused"]
    print("\n".join(wrong[:10]) if wrong else f"all {len(wanted)} losses bit for bit those of the undisturbed run")
    summary = {
        "kills": len(kills),
        "wanted_kills": given.kills,
        "different": len(wrong),
        "checkpoints_refused": len(refused),
        "median_back_s": sorted(kill.back_s for kill in kills)[len(kills) // 2] if kills else None,
    }
    print(json.dumps(summary))
    return 1 if wrong or refused or len(kills) < given.kills else 0


if __name__ == "__main__":
    sys.exit(main())
