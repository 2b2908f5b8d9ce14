"""A run's folder: who may write into it, and which job may go on in it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from clusters.catalog import load_cluster
from orchestrator.cli import main
from orchestrator.control.disk import DiskWatch
from orchestrator.control.folder import RunFolder, RunRefused, held, holder, refused_lock
from orchestrator.control.processes import end_marked, is_stopped, marked, marked_environment
from orchestrator.control.refusals import refuse_elsewhere
from orchestrator.spec import parse_job

JOB = {
    "version": 1,
    "name": "small",
    "model": {
        "family": "opt",
        "num_layers": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "vocab_size": 264,
        "max_position": 64,
    },
    "data": {"train": ["text.txt"]},
    "batch": {"global_batch_size": 4, "sequence_length": 64},
    "training": {"steps": 10, "seed": 7},
}


def job(**sections: object):
    return parse_job(JOB | sections)


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "small")
    folder.create()
    folder.write_job(job())
    return folder


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"training": {"steps": 1000, "seed": 7}},
        {"strategy": {"zero_stage": 3}, "cluster": "h100-80gb-8x2", "checkpoint": {"every": 5}},
        {"targets": {"tokens_per_second_per_gpu": 100}, "recovery": {"max_restarts": 3}},
    ],
)
def test_a_job_with_the_same_trajectory_goes_on(folder, sections):
    folder.check_continuation(job(**sections))


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"training": {"steps": 10, "seed": 8}}, "training.seed: 7 -> 8"),
        ({"model": JOB["model"] | {"num_layers": 3}}, "model.num_layers: 2 -> 3"),
        ({"batch": {"global_batch_size": 8, "sequence_length": 64}}, "batch.global_batch_size: 4 -> 8"),
        ({"data": {"train": ["other.txt"]}}, "data.train: ('text.txt',) -> ('other.txt',)"),
    ],
)
def test_a_job_with_another_trajectory_is_refused_with_the_difference_and_the_way_out(folder, sections, told):
    with pytest.raises(RunRefused) as refused:
        folder.check_continuation(job(**sections))
    assert told in refused.value.message
    assert "--fresh" in refused.value.fix


@pytest.mark.parametrize("text", ["", "- 1", "version: [", "version: 1\nname: small\n", "\x00"])
def test_a_job_file_that_cannot_be_read_is_told_and_not_overwritten(folder, text):
    folder.job.write_text(text)
    with pytest.raises(RunRefused, match="cannot be read"):
        folder.check_continuation(job())


def test_a_folder_without_a_job_is_free(tmp_path):
    RunFolder(tmp_path / "new").check_continuation(job())


def test_fresh_moves_the_old_folder_aside_each_time(folder):
    first = folder.move_aside()
    folder.create()
    second = folder.move_aside()
    assert folder.move_aside() is None
    assert first != second
    assert (first / "job.yaml").exists()


def test_two_runs_of_one_job_cannot_collide(folder):
    with held(folder), pytest.raises(RunRefused, match=f"runs already, in process {os.getpid()}"), held(folder):
        pass
    with held(folder):
        pass


def test_a_look_takes_no_lock_that_could_refuse_a_run(folder):
    """A look that never ends; a `run` that starts meanwhile is not refused, and is seen."""
    look = (
        "import signal, sys; from pathlib import Path; from orchestrator.control import folder\n"
        "folder.struct.unpack = lambda *_: (print('looking', flush=True), signal.pause())\n"
        "folder.holder(folder.RunFolder(Path(sys.argv[1])))"
    )
    with held(folder):
        pass
    looking = subprocess.Popen([sys.executable, "-c", look, str(folder.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert looking.stdout.readline() == "looking\n"
        assert holder(folder) is None
        with held(folder):
            assert holder(folder) == os.getpid()
        assert holder(folder) is None
    finally:
        looking.kill()
        looking.communicate(timeout=10)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.EAGAIN, "runs already, in process 12"),
        (errno.ENOLCK, "its file system knows no locks"),
        (errno.EOPNOTSUPP, "its file system knows no locks"),
        (errno.EIO, "cannot be locked: Input/output error"),
    ],
)
def test_a_refused_lock_is_told_as_what_it_is(folder, number, told):
    assert told in refused_lock(OSError(number, os.strerror(number)), folder, "12").message


def test_a_run_that_was_refused_leaves_nothing_and_gives_back_what_was_moved_aside(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "small")
    with held(folder):
        folder.create()
        assert folder.give_back(None)
    assert not (tmp_path / "runs").exists()
    folder.create()
    folder.write_job(job())
    aside = folder.move_aside()
    folder.create()
    assert folder.give_back(aside)
    assert folder.job.exists()
    assert not folder.give_back(None)  # something was begun in it


def test_the_lock_of_a_killed_run_is_free(folder):
    take = (
        "import os, sys; from pathlib import Path; from orchestrator.control.folder import RunFolder, held\n"
        "with held(RunFolder(Path(sys.argv[1]))): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", take, str(folder.path)], check=False, timeout=60)
    with held(folder):
        pass


def test_processes_are_found_by_their_mark_and_ended():
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    mine = subprocess.Popen(sleeper, env=marked_environment("/runs/mine"))
    other = subprocess.Popen(sleeper, env=marked_environment("/runs/mine2"))
    try:
        assert [process.pid for process in marked("/runs/mine")] == [mine.pid]
        mine.send_signal(signal.SIGSTOP)
        while not is_stopped(mine.pid):
            time.sleep(0.01)
        assert not is_stopped(other.pid)
        assert end_marked("/runs/mine") == []
        assert mine.poll() is not None
        assert marked("/runs/mine") == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait(timeout=10)
        mine.wait(timeout=10)


@pytest.mark.parametrize(
    ("cluster", "told"),
    [("a100-80gb-2x8", "is 2 nodes and `run` without --address trains on one"), ("a100-80gb", "is for 1 GPUs")],
)
def test_a_cluster_that_is_not_this_machine_is_refused(cluster, told, monkeypatch):
    monkeypatch.setattr("clusters.inventory.local.nvml_devices", list)
    with pytest.raises(RunRefused) as refused:
        refuse_elsewhere(load_cluster(cluster), 1, job(cluster=cluster))
    assert told in refused.value.message
    assert "cluster: auto" in refused.value.fix


@pytest.mark.parametrize(
    ("text", "told", "fix"),
    [
        ("training: {precision: fp32}", "the job says no length", "training.steps"),
        ("training: {steps: 3, precision: fp32}", "the job has no data", "data: {train:"),
        ("training: {steps: 3, precision: fp32}\ndata: {train: [nothing-here.txt]}", "nothing-here.txt", ""),
        (
            "training: {steps: 3, precision: fp32}\ndata: {train: [job.yaml]}\nstrategy: {engine: colossalai, compile: true}",
            "ColossalAI's hooks do not compile",
            "engine: native",
        ),
        (
            "training: {steps: 3, precision: fp32}\ndata: {train: [job.yaml]}\n"
            "strategy: {tensor_parallel_degree: 2, compile: true}",
            "torch.compile of blocks that talk to a tensor group",
            "leave compile out",
        ),
    ],
)
def test_run_refuses_what_it_cannot_do_before_it_writes(tmp_path, monkeypatch, capfd, text, told, fix):
    model = "model: {family: opt, num_layers: 2, hidden_size: 64, num_heads: 4, vocab_size: 264, max_position: 64}"
    batch = "batch: {global_batch_size: 4, sequence_length: 64}"
    cluster = "cluster: {gpu: cpu, nodes: 1, gpus_per_node: 2}"
    (tmp_path / "job.yaml").write_text(f"version: 1\nname: refused\n{model}\n{batch}\n{cluster}\n{text}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["run", "job.yaml"]) == 2
    error = capfd.readouterr().err
    assert told in error
    assert fix in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()
    assert not marked(str((tmp_path / "runs" / "refused").resolve()))


def test_a_disk_in_trouble_is_told_once_each_time_with_what_is_free(tmp_path):
    clock = [0.0]
    watch = DiskWatch(tmp_path, now=lambda: clock[0])
    assert watch.look() is None
    watch.refused("events.jsonl: Input/output error")
    watch.refused("events.jsonl: Input/output error")
    told = watch.look()
    assert told.startswith("events.jsonl: Input/output error: ")
    assert f"MiB are free under {tmp_path}; training goes on" in told
    assert watch.look() is None
    clock[0] = 10.0
    assert watch.look() is None  # it has room: the next refusal is news
    watch.refused("events.jsonl: Input/output error")
    assert watch.look() is not None
