"""A disk that fills up under a run, and has room again: the run loses nothing but what could not be written meanwhile."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time

import pytest
import yaml

from benchmarks import chaos
from orchestrator.control.processes import end_marked
from orchestrator.telemetry.records import Event, StepReport, read, steps

pytestmark = pytest.mark.ray


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield disk
    end_marked(str(disk / "small"))
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while file.write(b"\0" * size):
                    pass
            except OSError:
                continue


def cut_short(file) -> bool:
    """A write that found no room ends at the end of the file's last page."""
    return file.stat().st_size % resource.getpagesize() == 0


def job(directory, steps: int):
    file = chaos.job(directory, name="small", workers=2, steps=steps)
    mapping = yaml.safe_load(file.read_text())
    mapping["checkpoint"]["every"] = 40
    file.write_text(yaml.safe_dump(mapping))
    return file


def start(file, directory):
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "run", str(file), "--directory", str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait(until, run, limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not until():
        assert run.poll() is None, run.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_disk_that_was_full_for_a_while_costs_no_step_and_no_record(small_disk, tmp_path):
    file, folder = job(tmp_path, 300), small_disk / "small"
    run = start(file, small_disk)
    wait(lambda: chaos.last_step(folder) >= 20, run)
    fill(small_disk)
    held_at = chaos.last_step(folder)
    said = ""
    while "disk      step" not in said:  # a line comes, or the run ends
        said += (line := run.stdout.readline())
        assert line, said
    wait(lambda: cut_short(folder / "metrics.jsonl"), run)  # that line also comes before anything is refused
    assert chaos.last_step(folder) <= held_at + 12  # what fits into the last block of the file
    (small_disk / "filler").unlink()
    said += run.communicate(timeout=180)[0]
    assert run.returncode == 0, said
    assert said.count("disk      step") == 1, said
    assert f"free under {folder}" in said
    assert "fault of shardwise" not in said
    assert "Traceback" not in said
    assert [report.step for report in steps(folder / "metrics.jsonl")] == list(range(1, 301))
    assert [report.step for report in read(folder / "metrics.jsonl", StepReport)] == list(range(1, 301))
    (delayed,) = [event for event in read(folder / "events.jsonl", Event) if event.kind == "records_delayed"]
    assert delayed.details["num_lost"] == 0
    assert delayed.details["num_delayed"] >= 1  # how many depends on the machine's speed
    assert "No space left on device" in delayed.cause


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_with_one_clear_error(small_disk, tmp_path):
    file, folder = job(tmp_path, 60), small_disk / "small"
    run = start(file, small_disk)
    wait(lambda: chaos.last_step(folder) >= 20, run)
    fill(small_disk)
    said, _ = run.communicate(timeout=180)
    assert run.returncode == 1, said
    assert "the last checkpoint" in said
    assert "free space" in said
    assert "fault of shardwise" not in said
    assert "Traceback" not in said
    (small_disk / "filler").unlink()
    again, _ = start(file, small_disk).communicate(timeout=180)
    assert "done      step 60 of 60" in again
    assert {report.step for report in steps(folder / "metrics.jsonl")} == set(range(1, 61))


def test_a_disk_that_is_full_from_the_start_is_told_before_anything_runs(small_disk, tmp_path):
    fill(small_disk)
    run = start(job(tmp_path, 20), small_disk)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 1, said
    assert "No space left on device" in said
    assert f"free under {small_disk}" in said
    assert "fault of shardwise" not in said
    assert "Traceback" not in said


# A broken disk -------------------------------------------------------------------------------------------------------

BROKEN = """
import errno, os, sys
names = os.environ["BROKEN"].split(",")
def refuse(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        if any(name in os.path.basename(arguments[0]) for name in names):
            raise OSError(errno.EIO, os.strerror(errno.EIO), arguments[0])
sys.addaudithook(refuse)
"""
"""Python imports it in every process of a run: opening a file of one of these names to write is an error of the disk."""


def run_on_broken(tmp_path, names: str, steps: int):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(BROKEN)
    path = f"{tmp_path / 'broken'}:{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "run", str(job(tmp_path, steps))],
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"BROKEN": names, "PYTHONPATH": path},
        check=False,
    )


@pytest.mark.parametrize("name", [".small.lock", "ray.log", "job.yaml", "plan.json"])
def test_a_disk_that_refuses_what_a_run_needs_to_begin_is_told_as_that(tmp_path, name):
    done = run_on_broken(tmp_path, name, 5)
    assert done.returncode in (1, 2), done.stderr
    assert "Input/output error" in done.stderr
    assert str(tmp_path / "runs") in done.stderr
    assert "fault of shardwise" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_that_takes_no_record_no_report_and_no_log_stops_no_training(tmp_path):
    done = run_on_broken(tmp_path, "metrics.jsonl,events.jsonl,report.html,rank-", 12)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "done      step 12 of 12" in said
    assert "disk      step" in said
    assert "records are in memory alone: events.jsonl: Input/output error" in said
    assert "report    could not be written: report.html: Input/output error" in said
    assert "fault of shardwise" not in said
    assert "Traceback" not in said
    assert (tmp_path / "runs" / "small" / "checkpoints" / "step-00000012" / "manifest.json").exists()
