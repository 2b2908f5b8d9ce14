"""The script of `export slurm`, run by bash as slurmd does it, with the real `shardwise`: only Slurm itself is played."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from orchestrator.cli import main
from orchestrator.control.processes import end_marked
from orchestrator.telemetry.records import Event, read
from orchestrator.training.manifest import latest

JOB = {
    "version": 1,
    "name": "turns",
    "model": {"family": "opt", "num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 259, "max_position": 64},
    "data": {"train": ["corpus.txt"], "tokenizer": "byte"},
    "batch": {"global_batch_size": 4, "sequence_length": 32},
    "training": {"steps": 1_000_000, "precision": "fp32"},
    "cluster": {"gpu": "cpu", "gpus_per_node": 1},
}  # fmt: skip


def turn(script: Path, environment: dict[str, str], metrics: Path, sent: signal.Signals) -> int:
    """Starts the script in a process group of its own, waits until it trains, sends what Slurm sends; its exit code."""
    begun = metrics.stat().st_size if metrics.exists() else 0
    batch = subprocess.Popen(["bash", str(script)], env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size > begun):
        assert batch.poll() is None, "the script ended before it trained"
        time.sleep(0.1)
    if sent == signal.SIGUSR1:
        batch.send_signal(sent)  # --signal=B:USR1: the batch shell alone
    else:
        os.killpg(batch.pid, sent)  # scancel: all processes of the batch step
    return batch.wait(timeout=120)


@pytest.mark.slow
@pytest.mark.ray
def test_a_slurm_script_saves_before_its_time_limit_asks_for_another_turn_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("\n".join(f"{n} squared is {n * n}." for n in range(2000)))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    assert main(["export", "slurm", "job.yaml", "--output", "job.sh"]) == 0
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, program in (
        ("shardwise", f'exec {sys.executable} -m orchestrator.cli "$@"'),
        ("scontrol", f'echo "$@" >> {tmp_path / "asked"}'),
    ):
        (bin_ / name).write_text(f"#!/usr/bin/env bash\n{program}\n")
        (bin_ / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    run = tmp_path / "runs" / "turns"
    saved: list[int] = []
    try:
        for sent, code in ((signal.SIGUSR1, 0), (signal.SIGTERM, 5)):
            assert turn(tmp_path / "job.sh", environment, run / "metrics.jsonl", sent) == code
            whole = latest(run / "checkpoints", report=lambda event: None)
            assert whole is not None
            saved.append(whole.step)
    finally:
        end_marked(str(run.resolve()))
    assert (tmp_path / "asked").read_text() == "requeue 42\n"
    assert 0 < saved[0] < saved[1]
    causes = [event.cause for event in read(run / "events.jsonl", Event) if event.kind == "run"]
    assert causes[1] == f"goes on after step {saved[0]} of 1000000"
