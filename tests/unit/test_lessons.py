"""What a finished run adds to its cluster's calibration, and what the next plan then states."""

from __future__ import annotations

import dataclasses
import math

import pytest

from clusters.calibration import measure
from clusters.calibration.runs import stated_error
from clusters.inventory import local
from clusters.inventory.file import read_mapping, write_cluster
from orchestrator.control import lessons
from orchestrator.control.folder import RunFolder
from orchestrator.planner import spread
from orchestrator.planner.plan import plan
from orchestrator.planner.reasons.confidence import kind_of
from orchestrator.planner.show.text import render
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


def test_a_run_on_this_machine_moves_and_narrows_the_interval(tmp_path, machine):
    before = planned(tmp_path)
    speed, peak = before.tokens_per_second_per_gpu, lessons.predicted(before)["peak_bytes"]
    assert "no finished run" in before.confidence["source"]
    assert before.confidence["tokens_per_second_per_gpu_low"] == pytest.approx(0.72 * speed, rel=0.02)
    folder = ran(tmp_path, [0.7 * speed] * 7, peak_bytes=int(peak))
    assert lessons.record(before, folder, 0) is None
    (run,) = read_mapping(machine)["runs"]
    assert run["predicted"] == pytest.approx({"tokens_per_second": speed, "peak_bytes": peak})
    assert run["measured"] == pytest.approx({"tokens_per_second": 0.7 * speed, "peak_bytes": peak}, rel=1e-4)
    after = planned(tmp_path).confidence
    assert after["throughput_error"] < before.confidence["throughput_error"]
    assert after["tokens_per_second_per_gpu_low"] < 0.7 * speed < after["tokens_per_second_per_gpu_high"] < speed
    assert after["memory_error"] == pytest.approx(stated_error([0.0], prior=0.05), abs=1e-4)
    assert "1 finished run here: -30.0% measured" in after["source"]


def test_runs_that_differ_from_each_other_narrow_little_and_are_told(tmp_path, machine):
    made = planned(tmp_path)
    for part in (0.05, 0.06, 0.08):
        lessons.record(made, ran(tmp_path / f"{part}", [part * made.tokens_per_second_per_gpu] * 7), 0)
    after = planned(tmp_path)
    low, high = (after.confidence[f"tokens_per_second_per_gpu_{end}"] for end in ("low", "high"))
    assert high / low > 0.08 / 0.05  # the runs' own spread, not that of runs on a quiet machine
    assert high < after.tokens_per_second_per_gpu
    assert "the 3 finished runs here reached 6% of what was planned" in render(after)


def test_runs_as_promised_narrow_the_error_to_that_of_one_run(tmp_path, machine):
    made = planned(tmp_path)
    folder = ran(tmp_path, [made.tokens_per_second_per_gpu] * 7)
    errors = [made.confidence["throughput_error"]]
    for _ in range(9):
        lessons.record(made, folder, 0)
        errors.append(planned(tmp_path).confidence["throughput_error"])
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(1.34 * spread.MEASURED_ROW, rel=0.07)


def test_a_cluster_file_keeps_its_own_runs(tmp_path, machine):
    cluster = local.describe_cpu(CPU_RATES, cores=2, memory_bytes=2**34)
    write_cluster(tmp_path / "here.yaml", cluster)
    made = planned(tmp_path, cluster="here.yaml")
    lessons.record(made, ran(tmp_path, [made.tokens_per_second_per_gpu] * 7), 0)
    assert len(read_mapping(tmp_path / "here.yaml")["runs"]) == 1
    assert not machine.exists()
    assert planned(tmp_path, cluster="here.yaml").confidence["throughput_error"] < made.confidence["throughput_error"]


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


BATCH = {"global_batch_size": 64, "sequence_length": 2048}
DENSE = {
    "attention": "math",
    "zero_stage": 1,
    "tensor_parallel_degree": 1,
    "pipeline_parallel_degree": 2,
    "pipeline_schedule": "1f1b",
    "offload": {},
}


@pytest.mark.parametrize(
    ("changed", "widened"),
    [
        ({}, []),
        ({"pipeline_parallel_degree": 1, "tensor_parallel_degree": 2}, []),
        ({"pipeline_parallel_degree": 1, "zero_stage": 3}, []),
        ({"pipeline_schedule": "interleaved_1f1b", "num_virtual_stages": 4, "micro_batch_size": 1}, []),
        (
            {"pipeline_schedule": "interleaved_1f1b", "num_virtual_stages": 12, "micro_batch_size": 1},
            ["more than 6 stages a rank"],
        ),
        ({"pipeline_schedule": "interleaved_zero_bubble", "num_virtual_stages": 1}, ["split_s"]),
        ({"zero_stage": 3}, ["what hides of ZeRO's traffic"]),
        (
            {"pipeline_parallel_degree": 1, "zero_stage": 3, "offload": {"optimizer": "host"}},
            ["host_link", "gpus_per_uplink"],
        ),
    ],
)
def test_what_no_published_run_anchors_widens_the_interval_of_a_strategy(tmp_path, changed, widened):
    made = planned(tmp_path, cluster="a100-80gb-1x8", model="opt-1.3b", batch=BATCH, strategy=DENSE | changed)
    got = made.confidence
    assert list(got["widened_by"]) == widened
    kind = kind_of(made.strategy)
    belief = spread.unseen(spread.STACK, spread.ROW[kind], spread.NUM_STACKS)
    speed = made.tokens_per_second_per_gpu
    wide = math.log(got["tokens_per_second_per_gpu_high"] / got["tokens_per_second_per_gpu_low"])
    assert (wide > math.log(belief.high / belief.low) + 1e-9) == bool(widened)
    if not widened:
        assert got["tokens_per_second_per_gpu_low"] == pytest.approx(speed * belief.low)
        assert got["throughput_error"] == pytest.approx((belief.high - belief.low) / 2)


def test_students_t_of_the_table_is_that_of_the_books():
    # 90th percentiles of Student's distribution, any table.
    for degrees, t in ((3, 1.638), (4, 1.533), (7, 1.415), (10, 1.372), (30, 1.310)):
        assert spread.t_multiple(degrees) == pytest.approx(t, rel=0.01)


@pytest.mark.parametrize(("num_runs", "half"), [(0, 0.214), (1, 0.146), (3, 0.126), (100, 0.104)])
def test_own_runs_take_away_the_stacks_part_of_the_error(num_runs, half):
    belief = (
        spread.after_runs(0.106, 0.08, 8, mean=0.0, num_runs=num_runs) if num_runs else spread.unseen(0.106, 0.1, 8)
    )
    assert belief.multiple * belief.deviation == pytest.approx(half, abs=0.003)


def test_a_plan_at_its_limit_fits_in_so_many_of_a_hundred_cases(tmp_path):
    small = planned(tmp_path, cluster="a100-80gb-1x8", model="opt-1.3b").confidence
    assert small["fits_probability"] > 0.99
    assert "traced" in small["fits_source"]
    bloom = {"family": "bloom", "num_layers": 40, "hidden_size": 5120, "num_heads": 40, "vocab_size": 32000}
    made = planned(tmp_path, cluster="a100-80gb-1x8", model=bloom, strategy={"fused_norm": False})
    fill = made.price.memory.peak_bytes / made.price.memory.usable_bytes
    known = made.confidence
    assert known["fits_probability"] == pytest.approx(
        1 / (1 + math.exp((math.log(fill) - spread.FIT_CENTER) / spread.FIT_SPREAD))
    )
    assert "Aleph Alpha" in known["fits_source"]
