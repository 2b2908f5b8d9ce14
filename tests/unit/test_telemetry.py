"""What a run writes down and serves: records, the ledger of its time, metrics."""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.telemetry.goodput import BUCKETS, Ledger, ledger_of
from orchestrator.telemetry.journal import Journal
from orchestrator.telemetry.metrics import CHECKPOINT_SECONDS, STEP_SECONDS, Metrics
from orchestrator.telemetry.records import Event, StepReport, Tail, append, encode, read, recent, steps
from orchestrator.training.rank_log import Logged

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
    "job": {"name": "small-1"},
    "model": {"name": "opt-125m"},
    "cluster": {"gpu": "cpu"},
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
    "record",
    [
        REPORT,
        replace(REPORT, mfu=None, loss=math.nan, gradient_norm=-math.inf),
        event("restart", 3.0, failure="ray_lost"),
        event("evaluation", 3.0, loss=math.inf, ranks=[{"loss": 1.0}, {"loss": math.nan}]),
    ],
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


def test_a_line_is_json_as_every_program_reads_it_and_keeps_what_was_no_number(tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    append(tmp_path / "metrics.jsonl", replace(REPORT, loss=math.nan, gradient_norm=math.inf))
    values = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (values["loss"], values["gradient_norm"]) == (None, None)
    assert values["not_finite"] == {"loss": "nan", "gradient_norm": "inf"}


def test_a_file_of_an_older_version_is_read_with_its_nan_and_infinity(tmp_path):
    line = json.dumps(asdict(replace(REPORT, loss=math.nan, gradient_norm=math.inf)))
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    (back,) = steps(tmp_path / "metrics.jsonl")
    assert math.isnan(back.loss)
    assert back.gradient_norm == math.inf


@pytest.mark.parametrize(("reports", "fewest"), [(0, 0), (1, 1), (2000, 100)])
def test_the_newest_steps_are_read_from_the_end_of_the_file(tmp_path, reports, fewest):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(encode(replace(REPORT, step=step)) for step in range(1, reports + 1)) + b'{"step": 9')
    found = [report.step for report in recent(path)]
    assert found == list(range(reports + 1 - len(found), reports + 1))
    assert fewest <= len(found) <= 400


# A disk that refuses -------------------------------------------------------------------------------------------------


class Disk:
    """A run folder whose files can be put out of reach: their folder becomes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def refuse(self) -> None:
        self.path.rename(self.path.with_name("aside"))
        self.path.write_text("")

    def take(self) -> None:
        self.path.unlink()
        self.path.with_name("aside").rename(self.path)


def journal_of(disk: Disk, **settings):
    clock = iter(range(100, 10_000))
    refusals: list[OSError] = []
    journal = Journal(disk.path, on_refusal=refusals.append, now=lambda: float(next(clock)), **settings)
    return journal, refusals


def test_what_a_disk_refuses_is_kept_and_written_in_order_with_an_event_that_says_since_when(tmp_path):
    disk = Disk(tmp_path / "run")
    journal, refusals = journal_of(disk)
    journal.write(replace(REPORT, step=1))
    disk.refuse()
    for step in (2, 3, 4):
        journal.write(replace(REPORT, step=step))
    journal.write(event("evaluation", 3.0, loss=2.0))
    assert "4 records are in memory alone" in journal.sync()
    assert len(refusals) == 1  # told once
    disk.take()
    journal.write(replace(REPORT, step=5))
    assert journal.sync() is None
    assert [report.step for report in read(disk.path / "metrics.jsonl", StepReport)] == [1, 2, 3, 4, 5]
    evaluation, delayed = read(disk.path / "events.jsonl", Event)
    assert (evaluation.kind, delayed.kind) == ("evaluation", "records_delayed")
    assert delayed.details == {"from_unix_s": 100.0, "to_unix_s": 101.0, "num_delayed": 5, "num_lost": 0}
    assert "Not a directory, from 1970-01-01 00:01:40 to 1970-01-01 00:01:41 UTC" in delayed.cause


def test_memory_is_bounded_and_the_oldest_steps_give_way_before_any_event(tmp_path):
    disk = Disk(tmp_path / "run")
    journal, _ = journal_of(disk, kept_bytes=8 * len(encode(REPORT)))
    disk.refuse()
    journal.write(event("restart", 1.0))
    for step in range(1, 41):
        journal.write(replace(REPORT, step=step))
    disk.take()
    journal.write(replace(REPORT, step=41))
    written = [report.step for report in read(disk.path / "metrics.jsonl", StepReport)]
    assert written == list(range(42 - len(written), 42))
    assert 5 <= len(written) <= 8
    restart, delayed = read(disk.path / "events.jsonl", Event)
    assert restart.kind == "restart"
    assert delayed.details["num_lost"] == 41 - len(written)
    assert f"{41 - len(written)} of them are lost" in delayed.cause


def test_a_half_line_that_a_full_disk_left_costs_itself_alone(tmp_path):
    """A limit on the size of a file cuts a write short as a full disk does; another process has torn the last line meanwhile."""
    program = """
import resource, signal, sys
from pathlib import Path
from orchestrator.telemetry.journal import Journal
from tests.unit.test_telemetry import REPORT, replace
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
journal = Journal(folder)
journal.write(replace(REPORT, step=1))
size = (folder / "metrics.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
journal.write(replace(REPORT, step=2))
assert (folder / "metrics.jsonl").stat().st_size == size + 100
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.write(replace(REPORT, step=3))
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)
    assert [report.step for report in read(tmp_path / "metrics.jsonl", StepReport)] == [1, 2, 3]


def test_a_rank_writes_its_events_and_a_few_of_its_steps_into_its_log(caplog):
    clock = iter(float(second) for second in range(100))
    passed: list[object] = []
    with caplog.at_level(logging.INFO, logger="shardwise.rank"):
        logged = Logged(passed.append, now=lambda: next(clock))
        for step in range(1, 31):
            logged(replace(REPORT, step=step))
        logged(event("evaluation", 3.0))
    said = [record.message for record in caplog.records]
    assert [int(line.split()[1]) for line in said[:5]] == [1, 2, 3, 4, 5]
    assert 6 <= len(said) <= 9  # then every ten seconds
    assert said[-1].endswith("evaluation: ")
    assert len(passed) == 31


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


def clocked(record, boot: str, jump_s: float = 0.0):
    """The record as it is written now, by a wall clock that is off by so much."""
    at_s = record.time_unix_s
    return replace(record, monotonic_s=at_s, boot=boot, time_unix_s=1e9 + at_s + jump_s)


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_a_clock_that_is_set_an_hour_ahead_or_back_and_set_right_again_books_nothing(jump_s):
    history = [event("run", 0.0), at(1, 12), at(2, 14), at(3, 16), at(4, 18), event("finished", 19.0)]
    jumped = [clocked(record, "a", jump_s * (number in (2, 3))) for number, record in enumerate(history)]
    ledger = ledger_of(
        [record for record in jumped if isinstance(record, StepReport)],
        [record for record in jumped if isinstance(record, Event)],
    )
    assert {bucket: spent for bucket, spent in ledger.totals.items() if spent} == {
        "starting": 10.0,
        "training": 8.0,
        "other": 1.0,
    }


def test_a_machine_that_was_started_anew_between_two_commands_is_told_by_its_boot():
    """Its monotonic clock begins again, so that the second command's times lie before and among those of the first."""
    reports = [clocked(at(1, 112), "a"), clocked(at(2, 114), "a"), clocked(at(3, 113), "b", 500.0)]
    events = [clocked(event("run", 100.0), "a"), clocked(event("run", 101.0), "b", 500.0)]
    totals = ledger_of(reports, events).totals
    assert {bucket: spent for bucket, spent in totals.items() if spent} == {"starting": 20.0, "training": 6.0}


def test_a_journal_writes_both_clocks(tmp_path):
    before = time.monotonic()
    Journal(tmp_path).write(event("run", 5.0))
    (back,) = read(tmp_path / "events.jsonl", Event)
    assert back.time_unix_s == 5.0
    assert before <= back.monotonic_s <= time.monotonic()
    assert back.boot


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
        "shardwise_run_info": "gauge",
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
    }


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


def test_a_run_is_known_by_its_name_and_by_no_label_of_prometheus_own(served):
    samples = [sample for family in text_string_to_metric_families(served[1]) for sample in family.samples]
    (run,) = [sample.labels for sample in samples if sample.name == "shardwise_run_info"]
    assert run == {"name": "small-1", "model": "opt-125m", "accelerator": "cpu", "accelerators": "2"}
    assert not [sample for sample in samples if {"job", "instance"} & set(sample.labels)]


@pytest.mark.parametrize("bounds", [STEP_SECONDS, CHECKPOINT_SECONDS])
def test_a_histogram_has_three_buckets_or_more_in_each_decade(bounds):
    assert list(bounds) == sorted(bounds)
    assert max(after / before for before, after in pairwise(bounds)) <= 2.5 + 1e-9


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
    assert documented == names
