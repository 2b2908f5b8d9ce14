"""`shardwise run` from end to end: real Ray, real workers, two of them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from benchmarks import chaos
from clusters.calibration.measure import cpu_calibration, machine_record
from clusters.inventory.file import read_mapping
from clusters.inventory.local import available_cores
from orchestrator.control.processes import end_marked, marked
from orchestrator.telemetry.records import Event, read, steps

pytestmark = pytest.mark.ray


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """With a cache of its own, so that these runs teach this machine nothing; what was measured of it is copied."""
    cpu_calibration(available_cores())
    before = machine_record(available_cores()).parent
    cache = tmp_path / "cache" / "shardwise"
    cache.mkdir(parents=True)
    for file in before.glob("cpu-*.json"):
        shutil.copy(file, cache)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path
    end_marked(str((tmp_path / "runs" / "small").resolve()))


def with_steps(file, steps: int):
    mapping = yaml.safe_load(file.read_text())
    mapping["training"]["steps"] = steps
    file.write_text(yaml.safe_dump(mapping))


def run_to_its_end(file):
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "run", str(file), "--json"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_a_run_is_stopped_by_ctrl_c_and_goes_on_to_its_end(workspace):
    file = chaos.job(workspace, name="small", workers=2, steps=100_000)
    folder = workspace / "runs" / "small"
    run = chaos.start(file, workspace / "log")
    deadline = time.monotonic() + 120
    while chaos.last_step(folder) < 3 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 5, (workspace / "log").read_text()
    stopped_at = steps(folder / "metrics.jsonl")[-1].step
    assert stopped_at >= 3
    assert (folder / "checkpoints" / f"step-{stopped_at:08d}" / "manifest.json").exists()
    for rank in (0, 1):
        log = (folder / "logs" / f"rank-{rank:04d}.log").read_text()
        for told in (f"rank {rank} of 2: process ", "join ", "step 1  loss ", f"stopped at step {stopped_at}: Ctrl-C"):
            assert told in log, log
    assert (folder / "logs" / "ray.log").read_text() == ""  # nothing went wrong

    with_steps(file, stopped_at + 8)
    again = run_to_its_end(file)
    assert again.returncode == 0, again.stderr
    assert f"after step {stopped_at:,} of {stopped_at + 8:,}" in again.stderr
    result = json.loads(again.stdout)
    assert (result["ending"], result["step"], result["restarts"]) == ("finished", stopped_at + 8, 0)
    reports = steps(folder / "metrics.jsonl")
    assert [report.step for report in reports] == list(range(1, stopped_at + 9))
    (run,) = read_mapping(machine_record(available_cores()))["runs"]  # the finished one; the stopped one tells nothing
    assert set(run["predicted"]) == set(run["measured"]) == {"tokens_per_second", "peak_bytes"}
    assert reports[-1].loss < reports[0].loss
    kinds = [event.kind for event in read(folder / "events.jsonl", Event)]
    assert [kind for kind in kinds if kind in ("run", "started", "stopped", "resumed", "finished")] == [
        *("run", "started", "stopped"),
        *("run", "resumed", "started", "finished"),
    ]
    assert {"job.yaml", "plan.json", "events.jsonl", "metrics.jsonl", "report.html", "checkpoints", "logs"} <= {
        path.name for path in folder.iterdir()
    }
    assert (folder / "logs" / "rank-0001.log").exists()
    assert marked(str(folder.resolve())) == []


def test_a_run_goes_on_under_another_split(workspace):
    """Two pipeline stages, then two halves of every product, with states in files and on the host: the losses are those of two
    replicas all along."""
    file = chaos.job(workspace, name="small", workers=2, steps=9)
    splits = [
        {
            "pipeline_parallel_degree": 2,
            "pipeline_schedule": "1f1b",
            "micro_batch_size": 1,
            "offload": {"optimizer": "nvme", "parameters": "host", "activations": "host"},
        },
        {"tensor_parallel_degree": 2, "sequence_parallel": True, "offload": {"optimizer": "host"}},
        {"data_parallel_degree": 2, "zero_stage": 3},
    ]
    losses = {}
    for name, strategies in (("small", splits), ("small-plain", splits[2:])):
        for number, split in enumerate(strategies, start=4 - len(strategies)):
            mapping = yaml.safe_load(file.read_text()) | {"name": name, "strategy": split}
            mapping["training"]["steps"] = 3 * number
            mapping["training"]["schedule"] = {"name": "constant", "warmup_steps": 0}
            file.write_text(yaml.safe_dump(mapping))
            done = run_to_its_end(file)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["step"] == 3 * number
        losses[name] = [report.loss for report in steps(workspace / "runs" / name / "metrics.jsonl")]
    assert len(losses["small"]) == 9
    assert losses["small"] == pytest.approx(losses["small-plain"], rel=1e-4)
