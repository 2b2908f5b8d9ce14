"""`shardwise run` on the fairscale engine: real workers, and the run goes on with the native one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from benchmarks import chaos
from orchestrator.control.folder import RunRefused
from orchestrator.control.processes import end_marked
from orchestrator.control.refusals import refuse_uninstalled
from orchestrator.planner.plan import plan
from orchestrator.spec import load_job
from orchestrator.telemetry.records import Event, read, steps
from strategies.engines.installed import is_installed

ERROR = 0.10
"""Of the planned bytes of ZeRO 3 against those that live; measured on two shapes."""


def job_of(directory, num_steps: int, **strategy):
    file = chaos.job(directory, name="small", workers=2, steps=num_steps)
    mapping = yaml.safe_load(file.read_text())
    mapping["strategy"] = {"data_parallel_degree": 2, **strategy}
    mapping["batch"]["global_batch_size"] = 8
    file.write_text(yaml.safe_dump(mapping))
    return file


@pytest.mark.ray
@pytest.mark.skipif(not is_installed("fairscale", "fairscale"), reason="make engine-fairscale")
def test_a_run_begins_on_fairscale_and_goes_on_native(tmp_path):
    folder = tmp_path / "runs" / "small"
    try:
        for num_steps, strategy in ((3, {"engine": "fairscale", "zero_stage": 3}), (5, {"zero_stage": 1})):
            file = job_of(tmp_path, num_steps, **strategy)
            command = [sys.executable, "-m", "orchestrator.cli", "run", str(file), "--json"]
            got = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert got.returncode == 0, got.stderr
            if num_steps == 3:
                planned = json.loads((folder / "plan.json").read_text())
    finally:
        end_marked(str(folder.resolve()))
    assert [report.step for report in steps(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert planned["strategy"]["engine"] == "fairscale"
    measured = next(e for e in read(folder / "events.jsonl", Event) if e.kind == "memory_measured")
    assert planned["memory"]["stages"][0]["tensor_peak_bytes"] == pytest.approx(
        measured.details["peak_bytes"], rel=ERROR
    )


@pytest.mark.parametrize(("zero_stage", "states"), [(1, "mixed"), (2, "mixed"), (3, "sharded_fp32")])
def test_fairscale_is_planned_where_it_is_pinned_and_says_its_error(tmp_path, zero_stage, states):
    file = job_of(tmp_path, 3, engine="fairscale", zero_stage=zero_stage)
    mapping = yaml.safe_load(file.read_text())
    mapping["training"]["precision"] = "bf16"
    mapping["cluster"] = "a100-80gb-1x2"
    file.write_text(yaml.safe_dump(mapping))
    got = plan(load_job(str(file)))
    assert (got.strategy.engine, got.strategy.states) == ("fairscale", states)
    assert got.confidence["memory_error"] >= 0.25
    assert any("fairscale is priced as native" in note for note in got.notes)
    left_open = plan(load_job(str(job_of(tmp_path, 3, zero_stage=zero_stage))))
    assert left_open.strategy.engine == "native"


def test_an_engine_that_is_not_installed_is_refused_before_a_worker_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDWISE_ENGINES", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    job = load_job(str(job_of(tmp_path, 3, engine="fairscale", zero_stage=1)))
    with pytest.raises(RunRefused, match="make engine-fairscale"):
        refuse_uninstalled("fairscale", job)
