"""report.html: made from the run folder alone, self-contained, true to the files."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from orchestrator.telemetry import report
from orchestrator.telemetry.history import History, Steps
from orchestrator.telemetry.records import Event, append, encode
from tests.unit.test_telemetry import REPORT

STAGE = {
    "pipeline_rank": 0,
    "peak_phase": "backward",
    "parameters": 400,
    "gradients": 100,
    "activations": 0,
    "reserve": 300,
    "tensor_peak_bytes": 500,
    "peak_bytes": 800,
}
PLAN = {
    "job": {"name": "opt <b>&", "steps": 4, "global_batch_size": 8, "sequence_length": 8, "precision": "fp32"},
    "model": {"name": "opt-tiny", "num_parameters": 1000},
    "cluster": {"name": "cpu-1x2", "gpu": "cpu"},
    "strategy": {
        "num_gpus": 2,
        "engine": "native",
        "data_parallel_degree": 2,
        "tensor_parallel_degree": 1,
        "pipeline_parallel_degree": 1,
        "zero_stage": 2,
        "states": "full",
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "activation_checkpointing": "none",
        "offload": {"optimizer": "host", "parameters": "none", "activations": "none", "optimizer_fraction": 1.0},
        "attention": "flash",
    },
    "memory": {"usable_bytes": 2000, "peak_bytes": 800, "stages": [STAGE, STAGE | {"peak_bytes": 10, "parameters": 1}]},
    "time": {"step_s": 1.0, "compute_s": 0.9, "optimizer_s": 0.1},
    "throughput": {"tokens_per_second_per_gpu": 20.0},
    "cost": {"usd": None},
    "confidence": {"source": "measured here", "throughput_error": 0.1, "memory_error": 0.05},
    "wanted": 32.0,
    "notes": ["one GPU stays idle"],
}


def step(number: int, **changes: object):
    return replace(REPORT, step=number, time_unix_s=110.0 + 2 * number, **changes)


def data_of(folder):
    history = History(folder)
    history.update()
    return report.data_of(history)


@pytest.fixture
def folder(tmp_path):
    """Four steps; step 3 was done again after a restart."""
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))

    def event(kind: str, at: float, step: int, cause: str = "", **details: object) -> None:
        append(tmp_path / "events.jsonl", Event(time_unix_s=at, kind=kind, step=step, cause=cause, details=details))

    event("run", 100.0, 0)
    event("started", 112.0, 1, ray_s=3.0, workers_s=2.0, step_s=2.0, first_step_s=12.0)
    for number, loss in [(1, 3.0), (2, 2.8), (3, 2.6)]:
        append(tmp_path / "metrics.jsonl", step(number, loss=loss))
    event("memory_measured", 114.0, 2, components={"parameters": 380, "other": 60}, peak_bytes=440, rss_bytes=999)
    event("restart", 117.0, 3, "</script><script>alert(1)</script>", failure="worker_lost")
    append(tmp_path / "metrics.jsonl", step(3, loss=2.5))
    append(tmp_path / "metrics.jsonl", step(4, loss=math.nan))
    event("evaluation", 119.0, 4, loss=2.7, seconds=0.1)
    event("finished", 120.0, 4)
    return tmp_path


def test_the_page_shows_what_the_files_say(folder):
    data = data_of(folder)
    assert (data["name"], data["state"]) == ("opt <b>&", "finished")
    assert data["series"]["step"] == [1, 2, 3, 4]
    assert data["series"]["loss"] == [3.0, 2.8, 2.5, None]  # NaN is no number of JSON
    assert data["validation"] == [[4, 2.7]]
    assert [mark["step"] for mark in data["restarts"]] == [3]
    assert (data["predicted_speed"], data["target_speed"]) == (20.0, 32.0)
    assert data["speed_hint"] == "Median 16: -20% of the plan, -50% of the target."
    assert "It was restarted 1 time; no step was lost." in data["lead"]
    assert dict(data["ledger"]["parts"])["recovering"] > 0
    assert data["events"][0]["kind"] == "finished"
    assert dict(data["plan"])["offload"] == "optimizer to host"
    assert dict(data["plan"])["note"] == "one GPU stays idle"
    assert data["start"] == [("ray_s", 3.0), ("workers_s", 2.0), ("first_step_s", 2.0)]


def test_memory_is_compared_by_component_on_the_fullest_gpu(folder):
    memory = data_of(folder)["memory"]
    rows = {row["name"]: (row["predicted"], row["measured"]) for row in memory["rows"]}
    assert rows == {"parameters": (400, 380), "gradients": (100, 0), "other": (0, 60), "all tensors": (500, 440)}
    assert "-12.0% against the plan" in memory["hint"]


def test_the_page_is_one_file_that_asks_for_nothing(folder):
    text = report.write(folder).read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest""", text)
    assert re.findall(r"https?://[^\s\"'<]+", text) == ["http://www.w3.org/2000/svg"]  # a name, never opened


@pytest.mark.parametrize(("gpu", "spoken", "unspoken"), [("cpu", "worker", "GPU"), ("a100-80gb", "GPU", "worker")])
def test_the_page_speaks_of_gpus_where_there_are_some(folder, gpu, spoken, unspoken):
    (folder / "plan.json").write_text(json.dumps(PLAN | {"notes": [], "cluster": {"name": "mine", "gpu": gpu}}))
    data = data_of(folder)
    data.pop("events")
    assert f"Tokens/s/{spoken}" in json.dumps(data)
    assert not re.search(rf"\b{unspoken}s?\b", json.dumps(data))
    assert (folder / "plan.json").exists()


def test_text_of_a_run_cannot_become_markup(folder):
    class Scripts(HTMLParser):
        count = 0

        def handle_starttag(self, tag, attributes):
            self.count += tag == "script"

    text = report.write(folder).read_text(encoding="utf-8")
    parser = Scripts()
    parser.feed(text)
    assert parser.count == 2  # the data and the program
    assert "<title>opt &lt;b&gt;&amp;</title>" in text


@pytest.mark.parametrize("files", [(), ("metrics.jsonl",), ("events.jsonl",)])
def test_a_run_that_has_hardly_begun_has_a_report(folder, files):
    for name in {"metrics.jsonl", "events.jsonl"} - set(files):
        (folder / name).unlink()
    data = data_of(folder)
    assert report.page(data)
    assert data["memory"]["measured_peak"] == (440 if "events.jsonl" in files else None)


@pytest.mark.parametrize(
    ("kinds", "state"),
    [
        (["run", "finished"], "finished"),
        (["run", "stopped"], "stopped"),
        (["run", "failed"], "failed"),
        (["run", "stopped", "run"], "running"),
        ([], "running"),
    ],
)
def test_the_state_is_that_of_the_last_command(kinds, state):
    assert report.state_of([Event(time_unix_s=1.0, kind=kind) for kind in kinds])[0] == state


def test_a_long_run_is_thinned_to_what_a_screen_shows(folder):
    reports = [step(number) for number in range(1, 5001)]
    series = report.series(Steps.of(reports))
    assert len(series["step"]) <= report.POINTS
    assert series["step"][-1] == 5000


def test_a_live_report_reads_what_was_added_and_shows_what_a_whole_reading_shows(folder):
    """Piece by piece, with a restart and a second command in between; at each moment as if read anew."""
    metrics, events = (folder / "metrics.jsonl").read_bytes(), (folder / "events.jsonl").read_bytes()
    grown = folder / "grown"
    grown.mkdir()
    (grown / "plan.json").write_text(json.dumps(PLAN))
    history = History(grown)
    for part in (0.0, 0.3, 0.5, 0.8, 1.0):  # of each file, lines torn anywhere
        (grown / "metrics.jsonl").write_bytes(metrics[: int(part * len(metrics))])
        (grown / "events.jsonl").write_bytes(events[: int(part * len(events))])
        history.update()
    shown = report.data_of(history)
    for name in ("footer", "ledger"):  # the ledger of pieces cut anywhere may book a moment elsewhere
        shown.pop(name)
    whole = data_of(folder)
    assert shown == {name: whole[name] for name in shown}


def test_a_history_of_many_pieces_has_the_ledger_of_one(folder, monkeypatch):
    whole = History(folder)
    whole.update()
    monkeypatch.setattr("orchestrator.telemetry.history.PIECE_BYTES", 300)
    pieces = History(folder)
    pieces.update()
    assert pieces.ledger.totals == whole.ledger.totals
    assert list(pieces.steps()["step"]) == [1, 2, 3, 3, 4]


def test_a_long_report_is_kept_up_to_date_for_a_fraction_of_reading_it_anew(tmp_path):
    """Of 100,000 steps: 1.0 s of CPU at first, 0.02 s for each report after it. In memory: some bytes a step, no object."""
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(encode(step(number)) for number in range(1, 20_001)))
    history = History(tmp_path)
    began = time.process_time()
    history.update()
    first_s = time.process_time() - began
    append(tmp_path / "metrics.jsonl", step(20_001))
    began = time.process_time()
    history.update()
    report.write_of(history)
    assert time.process_time() - began < first_s / 2
    assert len(history.steps()) == 20_001
    assert sum(values.nbytes for values in history.steps().columns.values()) == 20_001 * 12 * 8


MEASURE = """<script>
const holes = [];
for (const grid of document.querySelectorAll(".grid")) {
  const cells = [...grid.children].map(cell => cell.getBoundingClientRect()).filter(box => box.height);
  for (const one of cells) for (const other of cells)
    if (Math.abs(one.top - other.top) < 1 && one.bottom - other.bottom > 1) holes.push([other.left, other.bottom]);
}
for (const column of document.querySelectorAll(".column")) {
  const last = column.lastElementChild.getBoundingClientRect();
  if (column.getBoundingClientRect().bottom - last.bottom > 1) holes.push([last.left, last.bottom]);
}
const memory = [...document.querySelectorAll("h2")].find(title => title.textContent == "Memory by component");
const wide = document.documentElement.scrollWidth - window.innerWidth;
const cards = [...document.querySelectorAll(".grid")].map(grid => grid.children.length);
document.title = JSON.stringify({holes, wide, cards, memory: Boolean(memory)});
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="looks at the page in Chromium, which is not installed")
@pytest.mark.parametrize("width", [1200, 500])
def test_no_card_of_the_page_leaves_a_hole_beside_its_neighbour(folder, tmp_path, width):
    measured = tmp_path / "measured.html"
    measured.write_text(report.write(folder).read_text(encoding="utf-8").replace("</body>", MEASURE + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    shown = subprocess.run(
        [
            "chromium",
            *flags,
            f"--user-data-dir={tmp_path / 'browser'}",
            f"--window-size={width},2000",
            "--dump-dom",
            measured.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    title = re.search(r"<title>(.*?)</title>", shown)
    assert title is not None, shown[:500]
    seen = json.loads(html.unescape(title[1]))
    assert seen["memory"]
    assert max(seen["cards"]) > 6
    assert seen["holes"] == []
    assert seen["wide"] <= 0
