"""What a run writes down and serves: records, the ledger of its time, metrics."""

from __future__ import annotations

import math
import shutil
import subprocess
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.telemetry.goodput import BUCKETS, Ledger, ledger_of
from orchestrator.telemetry.metrics import Metrics
from orchestrator.telemetry.records import Event, StepReport, Tail, append, read, steps

REPORT = StepReport(
    step=1,
    time_unix_s=100.0,
    loss=3.0,
    learning_rate=1e-3,
    gradient_norm=0.5,
    step_s=2.0,
    tokens=64,
    tokens_per_second=32.0,
    tokens_per_second_per_gpu=16.0,
    mfu=0.4,
    peak_bytes=1000,
    data_wait_s=0.5,
    engine_s=1.4,
)
PLAN = {
    "wanted": 20.0,
    "throughput": {"tokens_per_second_per_gpu": 18.0},
    "memory": {
        "stages": [
            {
                "pipeline_rank": 0,
                "peak_phase": "forward",
                "parameters": 1,
                "logits": 2,
                "tensor_peak_bytes": 3,
                "peak_bytes": 4,
            },
            {
                "pipeline_rank": 1,
                "peak_phase": "backward",
                "parameters": 5,
                "logits": 6,
                "tensor_peak_bytes": 11,
                "peak_bytes": 12,
            },
        ]
    },
}


def event(kind: str, at: float, **details: object) -> Event:
    return Event(time_unix_s=at, kind=kind, details=details)


# Records -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record", [REPORT, replace(REPORT, mfu=None, loss=math.nan), event("restart", 3.0, failure="ray_lost")]
)
def test_a_record_comes_back_as_it_was(tmp_path, record):
    append(tmp_path / "file.jsonl", record)
    (back,) = read(tmp_path / "file.jsonl", type(record))
    assert repr(back) == repr(record)


@pytest.mark.parametrize("torn", [b'{"step": 2, "time_un', b"\xff\xfe", b"[1]", b'{"kind": 1}', b'{"kind": 1}\n'])
def test_a_torn_line_costs_itself_alone_even_when_a_later_run_appends(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    append(path, REPORT)
    with path.open("ab") as file:
        file.write(torn)
    assert [report.step for report in read(path, StepReport)] == [1]
    append(path, replace(REPORT, step=2))
    assert [report.step for report in read(path, StepReport)] == [1, 2]


def test_unknown_keys_are_for_a_later_version(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"time_unix_s": 1, "kind": "x", "colour": "blue"}\n')
    assert [each.kind for each in read(tmp_path / "events.jsonl", Event)] == ["x"]


def test_a_step_that_was_done_again_counts_as_it_was_done_last(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step, loss in [(1, 3.0), (2, 2.5), (3, 2.4), (2, 2.6), (3, 2.2)]:
        append(path, replace(REPORT, step=step, loss=loss))
    assert [(report.step, report.loss) for report in steps(path)] == [(1, 3.0), (2, 2.6), (3, 2.2)]


def test_a_tail_gives_whole_lines_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path, StepReport)
    assert tail.new() == []
    append(path, REPORT)
    append(path, replace(REPORT, step=2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert [report.step for report in tail.new()] == [1]
    path.write_bytes(whole)
    assert [report.step for report in tail.new()] == [2]
    assert tail.new() == []
    assert Tail(path, StepReport, from_end=True).new() == []


# The ledger ----------------------------------------------------------------------------------------------------------


def at(step: int, end: float, step_s: float = 2.0, wait: float = 0.0) -> StepReport:
    return replace(REPORT, step=step, time_unix_s=end, step_s=step_s, data_wait_s=wait)


@pytest.mark.parametrize(
    ("reports", "events", "spent"),
    [
        ([at(1, 12)], [event("run", 0.0)], {"starting": 10, "training": 2}),
        ([at(1, 12, wait=0.5)], [event("run", 0.0)], {"starting": 10, "training": 1.5, "data_wait": 0.5}),
        ([at(1, 12)], [event("run", 0.0), event("finished", 15.0)], {"starting": 10, "training": 2, "other": 3}),
        (
            [at(1, 12), at(2, 20)],
            [
                event("run", 0.0),
                event("evaluation", 14.0, seconds=1.5, loss=1.0),
                event("checkpoint", 15.0, blocked_s=0.5),
            ],
            {"starting": 10, "training": 4, "evaluation": 1.5, "checkpoint": 0.5, "other": 4},
        ),
        # Two steps, one lost; the step done again is not counted as new.
        (
            [at(1, 12), at(2, 14), at(2, 26), at(3, 28)],
            [event("run", 0.0), event("restart", 16.0)],
            {"starting": 10, "training": 6, "recovering": 10, "redone": 2},
        ),
        # A run killed at 14 and continued at 100: the time between is nobody's.
        (
            [at(1, 12), at(2, 14), at(3, 112)],
            [event("run", 0.0), event("run", 100.0)],
            {"starting": 20, "training": 6},
        ),
    ],
)
def test_buckets_sum_to_the_wall_time(reports, events, spent):
    assert ledger_of(reports, events).totals == pytest.approx({**dict.fromkeys(BUCKETS, 0.0), **spent})


def test_a_ledger_tells_what_each_record_added():
    ledger = Ledger()
    ledger.event(event("run", 0.0))
    assert ledger.step(at(1, 12)) == pytest.approx({"starting": 10.0, "training": 2.0, "data_wait": 0.0})


# Metrics -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def served():
    metrics = Metrics(PLAN, num_gpus=2)
    metrics.on_event(event("run", 90.0))
    metrics.on_step(REPORT)
    metrics.on_event(event("memory_measured", 100.0, components={"parameters": 7, "logits": 8}, peak_bytes=15))
    metrics.on_event(event("checkpoint", 100.5, seconds=0.4, blocked_s=0.1))
    metrics.on_event(event("evaluation", 101.0, loss=2.5, seconds=0.2))
    metrics.on_event(event("restart", 101.0, failure="worker_lost"))
    url = metrics.serve(0)
    with urllib.request.urlopen(url, timeout=10) as answer:
        yield url, answer.read().decode()
    metrics.close()


def test_the_names_of_the_metrics_are_a_contract(served):
    families = {family.name: family.type for family in text_string_to_metric_families(served[1])}
    assert families == {
        "shardwise_tokens_per_second": "gauge",
        "shardwise_tokens_per_second_per_gpu": "gauge",
        "shardwise_target_tokens_per_second_per_gpu": "gauge",
        "shardwise_predicted_tokens_per_second_per_gpu": "gauge",
        "shardwise_mfu_ratio": "gauge",
        "shardwise_step_seconds": "histogram",
        "shardwise_loss": "gauge",
        "shardwise_validation_loss": "gauge",
        "shardwise_learning_rate": "gauge",
        "shardwise_gradient_norm": "gauge",
        "shardwise_tokens": "counter",
        "shardwise_steps": "counter",
        "shardwise_step": "gauge",
        "shardwise_last_step_timestamp_seconds": "gauge",
        "shardwise_memory_bytes": "gauge",
        "shardwise_predicted_memory_bytes": "gauge",
        "shardwise_data_wait_seconds": "counter",
        "shardwise_checkpoint_seconds": "histogram",
        "shardwise_recoveries": "counter",
        "shardwise_gpu_seconds": "counter",
        "shardwise_jobs": "gauge",
    } | {name: "gauge" for name in families if name.endswith("_created")}


def test_the_metrics_have_the_values_of_the_records(served):
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(served[1])
        for sample in family.samples
    }
    expected = {
        ("shardwise_loss",): 3.0,
        ("shardwise_validation_loss",): 2.5,
        ("shardwise_tokens_per_second",): 32.0,
        ("shardwise_tokens_per_second_per_gpu",): 16.0,
        ("shardwise_target_tokens_per_second_per_gpu",): 20.0,
        ("shardwise_predicted_tokens_per_second_per_gpu",): 18.0,
        ("shardwise_mfu_ratio",): 0.4,
        ("shardwise_tokens_total",): 64.0,
        ("shardwise_steps_total",): 1.0,
        ("shardwise_data_wait_seconds_total",): 0.5,
        ("shardwise_step_seconds_sum",): 2.0,
        ("shardwise_checkpoint_seconds_sum",): 0.4,
        ("shardwise_memory_bytes", "logits"): 8.0,
        ("shardwise_predicted_memory_bytes", "logits"): 6.0,
        ("shardwise_recoveries_total", "worker_lost"): 1.0,
        ("shardwise_jobs", "recovering"): 1.0,
        ("shardwise_jobs", "running"): 0.0,
        ("shardwise_gpu_seconds_total", "starting"): 16.0,
        ("shardwise_gpu_seconds_total", "training"): 3.0,
    }
    assert {name: samples[name] for name in expected} == pytest.approx(expected)


def test_the_endpoint_is_on_loopback(served):
    assert served[0].startswith("http://127.0.0.1:")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say_about_the_metrics(served):
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=served[1], text=True, capture_output=True, timeout=30, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_every_metric_is_in_the_reference(served):
    text = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text()
    documented = {line.split("`")[1].split("{")[0] for line in text.splitlines() if line.startswith("| `")}
    families = text_string_to_metric_families(served[1])
    names = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert documented == {name for name in names if not name.endswith("_created")}
