"""`shardwise run` on the ColossalAI engine: real workers, and the run goes on with the native one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from orchestrator.control.processes import end_marked
from orchestrator.planner.plan import plan
from orchestrator.planner.problem import PlanError
from orchestrator.spec import load_job
from orchestrator.telemetry.records import Event, read, steps
from strategies.engines.installed import is_installed
from tests.ray.test_fairscale_run import job_of

ERROR = 0.25
"""Of the planned bytes against those that live: what the plan itself states of this engine."""


@pytest.mark.ray
@pytest.mark.skipif(not is_installed("colossalai", "colossalai"), reason="make engine-colossalai")
def test_a_run_begins_on_colossalai_and_goes_on_native(tmp_path):
    folder = tmp_path / "runs" / "small"
    try:
        for num_steps, strategy in ((3, {"engine": "colossalai", "zero_stage": 2}), (5, {"zero_stage": 1})):
            file = job_of(tmp_path, num_steps, **strategy)
            command = [sys.executable, "-m", "orchestrator.cli", "run", str(file), "--json"]
            got = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert got.returncode == 0, got.stderr
            if num_steps == 3:
                planned = json.loads((folder / "plan.json").read_text())
    finally:
        end_marked(str(folder.resolve()))
    assert [report.step for report in steps(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert planned["strategy"]["engine"] == "colossalai"
    measured = next(e for e in read(folder / "events.jsonl", Event) if e.kind == "memory_measured")
    assert planned["memory"]["stages"][0]["tensor_peak_bytes"] == pytest.approx(
        measured.details["peak_bytes"], rel=ERROR
    )


@pytest.mark.parametrize(("zero_stage", "reduce"), [(0, "per_step"), (1, "per_step"), (2, "per_micro_batch")])
def test_colossalai_is_planned_where_it_is_pinned(tmp_path, zero_stage, reduce):
    job = load_job(str(job_of(tmp_path, 3, engine="colossalai", zero_stage=zero_stage, micro_batch_size=1)))
    strategy = plan(job).strategy
    assert (strategy.engine, strategy.states, strategy.reduce) == ("colossalai", "full", reduce)
    assert strategy.gradient_accumulation_steps > 1


@pytest.mark.parametrize(
    ("precision", "strategy", "told"),
    [
        (
            "fp32",
            {"zero_stage": 3},
            "training.precision fp32: the colossalai engine at zero_stage 3 computes in bf16, fp16",
        ),
        ("fp64", {"zero_stage": 1}, "training.precision fp64"),
        ("bf16", {"tensor_parallel_degree": 2, "data_parallel_degree": 1}, "attention: math"),
        (
            "fp32",
            {"pipeline_parallel_degree": 2, "data_parallel_degree": 1, "pipeline_schedule": "gpipe"},
            "1f1b alone",
        ),
        ("bf16", {"zero_stage": 1, "compile": True}, "do not compile"),
    ],
)
def test_what_colossalai_cannot_do_is_no_plan(tmp_path, precision, strategy, told):
    file = job_of(tmp_path, 3, engine="colossalai", **strategy)
    mapping = yaml.safe_load(file.read_text())
    mapping["training"]["precision"] = precision
    mapping["cluster"] = "a100-80gb-1x2" if precision == "bf16" else mapping.get("cluster", "auto")
    file.write_text(yaml.safe_dump(mapping))
    with pytest.raises(PlanError, match=told):
        plan(load_job(str(file)))


@pytest.mark.parametrize(
    "strategy",
    [
        {"zero_stage": 2, "data_parallel_degree": 2, "offload": "optimizer"},
        {"zero_stage": 3, "data_parallel_degree": 2, "offload": {"optimizer": "host", "parameters": "host"}},
        {"data_parallel_degree": 1, "tensor_parallel_degree": 2, "attention": "math"},
        {"data_parallel_degree": 1, "tensor_parallel_degree": 2, "pipeline_parallel_degree": 2, "attention": "math"},
    ],
    ids=str,
)
def test_what_its_reference_shows_is_planned_to_the_letter(tmp_path, strategy):
    file = job_of(tmp_path, 3, engine="colossalai", **strategy)
    mapping = yaml.safe_load(file.read_text())
    mapping["training"]["precision"], mapping["cluster"] = "bf16", "a100-80gb-1x4"
    file.write_text(yaml.safe_dump(mapping))
    got = plan(load_job(str(file)), built_only=True).strategy
    for name, value in strategy.items():
        if name != "offload":
            assert getattr(got, name) == value
    assert (got.offload.optimizer == "host") == ("offload" in strategy)


def test_a_pipeline_of_colossalai_is_planned_with_a_micro_batch_for_each_stage(tmp_path):
    pins = {"tensor_parallel_degree": 1, "pipeline_parallel_degree": 2, "data_parallel_degree": 1, "attention": "math"}
    strategy = plan(load_job(str(job_of(tmp_path, 3, engine="colossalai", **pins)))).strategy
    assert strategy.pipeline_schedule == "1f1b"
    assert strategy.gradient_accumulation_steps >= 2
