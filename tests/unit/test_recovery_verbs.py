"""status, events and logs of local run folders."""

from __future__ import annotations

import json

import pytest

from orchestrator.cli import main
from orchestrator.cli.status import ago, print_table
from orchestrator.control.folder import RunFolder, held
from orchestrator.telemetry.records import Event, append
from tests.unit.test_telemetry import REPORT


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(tmp_path / "runs" / "small")
    folder.create()
    folder.job.write_text("name: small\n")
    folder.write_plan({"job": {"steps": 9}})
    append(folder.events, Event(time_unix_s=1.0, kind="run", step=0, cause="starts"))
    append(folder.events, Event(time_unix_s=2.0, kind="restart", step=1, cause="rank 1 died"))
    append(folder.metrics, REPORT)
    (folder.logs / "rank-0000.log").write_text("one\ntwo\nthree\n")
    return folder


def answer(capsys, *arguments: str):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_state_tells_a_live_run_from_a_killed_and_an_ended_one(folder, capsys):
    (row,) = answer(capsys, "status")
    assert (row["name"], row["state"], row["step"], row["steps"], row["restarts"]) == ("small", "killed", 1, 9, 1)
    with held(folder):
        assert answer(capsys, "status", "small")[0]["state"] == "running"
    append(folder.events, Event(time_unix_s=3.0, kind="stopped", step=1, cause="Ctrl-C"))
    (row,) = answer(capsys, "status", "small")
    assert (row["state"], row["cause"]) == ("stopped", "Ctrl-C")
    assert main(["status"]) == 0
    assert "1 / 9" in capsys.readouterr().out


def test_events_are_told_with_their_causes(folder, capsys):
    assert [event["kind"] for event in answer(capsys, "events", "small")] == ["run", "restart"]
    assert [event["cause"] for event in answer(capsys, "events", "runs/small", "--kind", "restart")] == ["rank 1 died"]
    assert main(["events", "small"]) == 0
    assert "rank 1 died" in capsys.readouterr().out


def test_logs_are_shown_by_rank(folder, capsys):
    assert main(["logs", "small", "-n", "2"]) == 0
    assert capsys.readouterr().out == "two\nthree\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["status", "smal"], "did you mean small?"),
        (["events", "other"], "known: small"),
        (["logs", "small", "--rank", "7"], "known: rank-0000.log"),
        (["logs", "x", "--directory", "nowhere"], "--directory FOLDER"),
    ],
)
def test_what_is_not_there_is_exit_code_6_with_what_is(folder, capsys, arguments, told):
    assert main(arguments) == 6
    assert told in capsys.readouterr().err


ROW = {"state": "stopped", "step": 4646, "steps": 100_000, "loss": 0.97841, "tokens_per_second_per_gpu": 782.4}


@pytest.mark.parametrize("width", [75, 80, 250])
def test_a_narrow_terminal_wraps_the_names_and_no_number(width, capsys):
    rows = [ROW | {"name": name, "on_cpu": True, "last_step_unix_s": 0.0} for name in ("a", 40 * "long")]
    print_table(rows, width=width)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    assert sum("stopped  4,646 / 100,000  0.9784              782" in line for line in lines) == 2
    assert "".join(line.split()[0] for line in lines[2:]) == 40 * "long"


@pytest.mark.parametrize(("on_cpu", "unit"), [(True, "tokens/s/worker"), (False, "tokens/s/GPU")])
def test_runs_on_cores_alone_are_not_told_in_gpus(on_cpu, unit, capsys):
    print_table([ROW | {"name": "a", "on_cpu": on_cpu, "last_step_unix_s": None}])
    assert unit in capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("seconds", "told"), [(-3, "0 s"), (59.4, "59 s"), (150, "2 m"), (7200, "2 h"), (172800, "2 d")]
)
def test_a_time_ago_is_told_in_one_unit(seconds, told):
    assert ago(seconds) == told
