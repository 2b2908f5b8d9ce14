"""Short runs for the benches: a job on real text, by `shardwise run` or by the same worker under torchrun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clusters.calibration.measure import WORKER_ENVIRONMENT
from orchestrator.planner.plan import Plan, plan
from orchestrator.spec import parse_job
from orchestrator.spec.job import Job
from orchestrator.telemetry.records import EVENTS, METRICS, Event, StepReport, read, steps
from orchestrator.training.assignment import Assignment
from orchestrator.training.prepare import prepare_job

TIMEOUT_S = 3600
TEXT_BYTES = 4_000_000
SMALL = {
    "family": "opt",
    "num_layers": 4,
    "hidden_size": 256,
    "num_heads": 4,
    "ffn_size": 1024,
    "vocab_size": 264,
    "max_position": 256,
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a finished run left."""

    plan: Plan
    reports: list[StepReport]
    events: list[Event]

    def details(self, kind: str) -> dict[str, Any]:
        """Of the newest event of a kind. LookupError where the run told none."""
        found = [event.details for event in self.events if event.kind == kind]
        if not found:
            raise LookupError(f"the run told no event {kind}; it told {', '.join(e.kind for e in self.events)}")
        return dict(found[-1])


def corpus(folder: Path) -> Path:
    """Real text that every machine with Python has: its standard library, the first megabytes."""
    path = folder / "corpus.txt"
    if not path.exists():
        library = Path(sysconfig.get_paths()["stdlib"])
        text = bytearray()
        for file in sorted(library.glob("*.py")):
            text += file.read_bytes()
            if len(text) >= TEXT_BYTES:
                break
        path.write_bytes(bytes(text).decode("utf-8", errors="ignore").encode())
    return path


def make_job(
    folder: Path,
    name: str,
    *,
    model: str | dict[str, Any],
    num_steps: int,
    global_batch_size: int,
    sequence_length: int,
    strategy: dict[str, Any],
    precision: str = "fp32",
) -> Job:
    corpus(folder)
    mapping = {
        "version": 1,
        "name": name,
        "model": model,
        "data": {"train": ["corpus.txt"], "validation": 0.02},
        "batch": {"global_batch_size": global_batch_size, "sequence_length": sequence_length},
        "training": {"steps": num_steps, "precision": precision, "optimizer": {"learning_rate": 1e-4}},
        "cluster": "auto",
        "strategy": strategy,
        "checkpoint": {"directory": str(folder / "runs"), "every": num_steps + 1},
    }
    return parse_job(mapping, directory=folder)


def by_torchrun(job: Job) -> Run:
    """The worker as a plain process, or under torchrun where the plan has several."""
    made = plan(job, built_only=True)
    world = made.strategy.num_gpus
    directory = Path(job.checkpoint.directory) / f"{job.name}-torchrun"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    assignment = Assignment(
        job=job.to_mapping(),
        job_directory=str(job.directory),
        strategy=made.strategy,
        rank=0,
        world_size=world,
        run_directory=str(directory),
        data_directory=str(prepare_job(job).directory),
        peak_flops=made.cluster.accelerator.peak_flops.get(job.training.precision),
    )
    if assignment.device == "cpu" and made.cluster.accelerator.kind == "cuda":
        assignment = replace(assignment, device="cuda:0")
    file = directory / "assignment.json"
    file.write_text(json.dumps(assignment.to_mapping()), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    _call([*launcher, "-m", "orchestrator.training.worker", str(file)], job.directory)
    return _left(made, directory)


def by_shardwise(job: Job) -> Run:
    """`shardwise run`: embedded Ray, actors, supervisor."""
    made = plan(job, built_only=True)
    file = job.directory / f"{job.name}.yaml"
    file.write_text(json.dumps(job.to_mapping()), encoding="utf-8")  # JSON is YAML
    _call(["-m", "orchestrator.cli", "run", "--fresh", str(file)], job.directory)
    return _left(made, Path(job.checkpoint.directory) / job.name)


def _call(arguments: list[str], folder: Path) -> None:
    """RuntimeError with the end of what it printed."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | WORKER_ENVIRONMENT | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout[-3000:]}")


def _left(made: Plan, directory: Path) -> Run:
    run = Run(plan=made, reports=steps(directory / METRICS), events=list(read(directory / EVENTS, Event)))
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)  # gigabytes, for a model of 125 million parameters
    return run
