"""What a finished run adds to its cluster's calibration, and what the next plan then states."""

from __future__ import annotations

import dataclasses

import pytest

from clusters.calibration import measure
from clusters.calibration.runs import PRIOR_ERROR, append_run, stated_error
from clusters.inventory import local
from clusters.inventory.file import read_mapping, write_cluster
from orchestrator.control import lessons
from orchestrator.control.folder import RunFolder
from orchestrator.planner.plan import plan
from orchestrator.spec import parse_job
from orchestrator.telemetry.records import Event, StepReport, append
from tests.unit.test_clusters import CPU_RATES
from tests.unit.test_run_folder import JOB


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A CPU whose measurement and record live in this test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(local, "nvml_devices", list)
    measured = {field.name: getattr(CPU_RATES, field.name) for field in dataclasses.fields(CPU_RATES)}
    known = {name: value for name, value in measured.items() if value not in (None, 0, "")}
    monkeypatch.setattr(measure, "run_child", lambda *_, **__: known)
    return measure.machine_record(local.available_cores())


def planned(tmp_path, **sections):
    sections = {"training": {"steps": 10, "precision": "fp32"}} | sections
    return plan(parse_job(JOB | sections, directory=tmp_path))


def ran(tmp_path, speeds, *, peak_bytes=None, first=1):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    for number, speed in enumerate(speeds, start=first):
        report = StepReport(
            step=number,
            time_unix_s=float(number),
            loss=1.0,
            learning_rate=1.0,
            gradient_norm=1.0,
            step_s=1.0,
            tokens=1,
            tokens_per_second=2 * speed,
            tokens_per_second_per_gpu=speed,
            mfu=None,
            peak_bytes=10**9,
        )
        append(folder.metrics, report)
    if peak_bytes:
        details = {"peak_bytes": peak_bytes}
        append(folder.events, Event(time_unix_s=0.0, kind="memory_measured", step=first + 1, details=details))
    return folder


def test_a_run_is_measured_on_its_settled_steps(tmp_path):
    folder = ran(tmp_path, [1.0, 2.0, 100.0, 110.0, 90.0, 105.0, 100.0], peak_bytes=7)
    assert lessons.measured(folder, 0) == {"tokens_per_second": 100.0, "peak_bytes": 7.0}
    assert lessons.measured(folder, 1) == {}  # four settled steps are too few


def test_a_run_that_went_on_is_measured_on_its_own_steps(tmp_path):
    ran(tmp_path, [1.0] * 7, peak_bytes=7)
    folder = ran(tmp_path, [2.0] * 7, first=8)
    assert lessons.measured(folder, 7) == {"tokens_per_second": 2.0}  # the bytes are of the plan before


def test_runs_on_this_machine_replace_the_assumed_error(tmp_path, machine):
    before = planned(tmp_path)
    assert before.confidence["throughput_error"] == PRIOR_ERROR["tokens_per_second"] == 0.3
    assert "no finished run" in before.confidence["source"]
    speed, peak = before.tokens_per_second_per_gpu, lessons.predicted(before)["peak_bytes"]
    folder = ran(tmp_path, [0.5 * speed] * 7, peak_bytes=int(peak))
    assert lessons.record(before, folder, 0) is None
    (run,) = read_mapping(machine)["runs"]
    assert run["predicted"] == pytest.approx({"tokens_per_second": speed, "peak_bytes": peak})
    assert run["measured"] == pytest.approx({"tokens_per_second": 0.5 * speed, "peak_bytes": peak}, rel=1e-4)
    after = planned(tmp_path).confidence
    assert after["throughput_error"] == pytest.approx(stated_error([0.5], prior=0.3), abs=1e-4)
    assert after["throughput_error"] > 0.3
    assert after["memory_error"] == pytest.approx(stated_error([0.0], prior=0.05), abs=1e-4)
    assert "error of 1 finished run here" in after["source"]


def test_runs_as_promised_narrow_the_error(tmp_path, machine):
    made = planned(tmp_path)
    folder = ran(tmp_path, [made.tokens_per_second_per_gpu] * 7)
    for _ in range(9):
        lessons.record(made, folder, 0)
    assert planned(tmp_path).confidence["throughput_error"] == pytest.approx(0.15, abs=1e-4)


def test_a_cluster_file_keeps_its_own_runs(tmp_path, machine):
    cluster = local.describe_cpu(CPU_RATES, cores=2, memory_bytes=2**34)
    write_cluster(tmp_path / "here.yaml", cluster)
    made = planned(tmp_path, cluster="here.yaml")
    lessons.record(made, ran(tmp_path, [made.tokens_per_second_per_gpu] * 7), 0)
    assert len(read_mapping(tmp_path / "here.yaml")["runs"]) == 1
    assert not machine.exists()
    assert planned(tmp_path, cluster="here.yaml").confidence["throughput_error"] < 0.3


def test_a_record_that_cannot_be_written_is_told(tmp_path, machine):
    made = planned(tmp_path)
    machine.parent.mkdir(parents=True, exist_ok=True)
    machine.write_text("- no mapping")
    told = lessons.record(made, ran(tmp_path, [1.0] * 7), 0)
    assert told is not None
    assert str(machine) in told
    assert machine.read_text() == "- no mapping"


def test_a_cluster_of_the_catalog_keeps_no_record(tmp_path):
    made = planned(tmp_path, cluster="a100-80gb-1x2")
    assert lessons.record_of(made.job, made) is None


@pytest.mark.parametrize(
    ("strategy", "stated"),
    [
        ({"zero_stage": 3, "tensor_parallel_degree": 1, "pipeline_parallel_degree": 1, "offload": {}}, 0.20),
        ({"zero_stage": 1, "tensor_parallel_degree": 2, "pipeline_parallel_degree": 1, "offload": {}}, 0.20),
        ({"zero_stage": 0, "tensor_parallel_degree": 1, "pipeline_parallel_degree": 1, "offload": {}}, 0.20),
        ({"zero_stage": 1, "pipeline_parallel_degree": 2, "pipeline_schedule": "1f1b", "offload": {}}, 0.20),
        ({"zero_stage": 1, "pipeline_parallel_degree": 2, "pipeline_schedule": "gpipe", "offload": {}}, 0.30),
        (
            {
                "zero_stage": 1,
                "pipeline_parallel_degree": 2,
                "pipeline_schedule": "interleaved_zero_bubble",
                "offload": {},
            },
            0.30,
        ),
        ({"zero_stage": 3, "tensor_parallel_degree": 2, "pipeline_parallel_degree": 1, "offload": {}}, 0.30),
        ({"zero_stage": 2, "pipeline_parallel_degree": 2, "pipeline_schedule": "1f1b", "offload": {}}, 0.30),
        ({"zero_stage": 3, "tensor_parallel_degree": 1, "offload": {"optimizer": "host"}}, 0.40),
    ],
)
def test_a_published_gpu_states_the_error_of_its_kind_of_run(tmp_path, strategy, stated):
    made = planned(tmp_path, cluster="a100-80gb-1x2", strategy=strategy)
    assert made.confidence["throughput_error"] == stated


def test_runs_do_not_narrow_what_is_said_of_offload(tmp_path, machine):
    append_run(machine, {"tokens_per_second": 1.0}, {"tokens_per_second": 1.0}, begin=True)
    made = planned(tmp_path, strategy={"zero_stage": 3, "offload": {"optimizer": "host"}})
    assert made.confidence["throughput_error"] == 0.40
