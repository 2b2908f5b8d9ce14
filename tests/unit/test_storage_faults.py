"""Storage that fails, fills up, lies or stalls costs a checkpoint, and never the run or a checkpoint that was whole."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.training import checkpoint
from orchestrator.training.checkpoint import CheckpointFailed, Saver
from orchestrator.training.limits import Limits
from orchestrator.training.manifest import latest, sweep, verify
from tests.ranks import spawn
from tests.unit.test_checkpoint import INFO, names, saved, session, world_of_one, written  # noqa: F401
from tests.unit.test_training import (  # noqa: F401
    NUM_STEPS,
    assignment,
    free_ports,
    job,
    kinds,
    last_checkpoint,
    run,
    strategy,
)

CALLS = ("mkdir", "open", "write", "fsync", "replace", "unlink", "rmdir")
"""Calls of the system that a save writes, renames and deletes by."""


def failing(monkeypatch, folder, error):
    """Makes the call number `state['fails']` inside the folder fail; counts the calls."""
    state = {"number": 0, "fails": -1}

    def wrapped(do):
        def call(target, *arguments, **settings):
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
            writes = do.__name__ != "open" or (arguments and arguments[0] & os.O_CREAT)
            if writes and (str(folder) in path or settings.get("dir_fd")):
                state["number"] += 1
                if state["number"] - 1 == state["fails"]:
                    raise OSError(error, os.strerror(error), path)
            if do.__name__ == "fsync":  # hundreds of them, of which none need be
                return None
            return do(target, *arguments, **settings)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrapped(getattr(os, name)))
    return state


def how_it_failed(pending) -> str | None:
    try:
        pending.wait()
    except CheckpointFailed as error:
        return str(error)
    return None


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_an_error_at_each_write_of_a_checkpoint_leaves_a_whole_one_and_the_next_save_works(
    saved,  # noqa: F811
    tmp_path_factory,
    monkeypatch,
    error,
):
    """Step 3 is written again, so that the older one steps aside, and keep 2 deletes step 1."""
    engine = session()
    template = shutil.copytree(saved, tmp_path_factory.mktemp("template"), dirs_exist_ok=True)
    state = failing(monkeypatch, saved, error)
    failed = pruned = 0
    for fails in itertools.count():
        shutil.rmtree(saved)
        shutil.copytree(template, saved)
        saver = Saver(saved, INFO, keep=2, resumed_from=verify(saved / "step-00000002"))
        state |= {"number": 0, "fails": fails}
        pending = saver.save(engine, step=3, background=False)
        num_calls = state["number"]
        state["fails"] = -1
        told = how_it_failed(pending)
        failed += told is not None
        assert told is None or os.strerror(error) in told
        pruned += pending.prune_error is not None
        assert latest(saved, report=print).step == 3
        assert not list(saved.glob("*.partial")), "no rubbish"
        saver.save(engine, step=4, background=False).wait()
        sweep(saved)
        assert names(saved) == ["step-00000003", "step-00000004"] or (failed and names(saved)[-1] == "step-00000004")
        if fails >= num_calls:
            break
    assert failed >= 12
    assert pruned >= 3, "a failure to delete is told as one, and is none of the checkpoint"


def test_a_checkpoint_that_the_disk_gives_back_altered_takes_no_ones_place(saved, monkeypatch):  # noqa: F811
    write = os.write

    def lying(descriptor, data):
        data = bytes(data)
        is_piece = os.readlink(f"/proc/self/fd/{descriptor}").endswith(".distcp")
        return write(descriptor, data[:-1] + bytes([data[-1] ^ 1]) if is_piece else data)

    monkeypatch.setattr(os, "write", lying)
    pending = checkpoint.save(session(), saved, step=4, info=INFO, keep=1, background=False)
    with pytest.raises(CheckpointFailed, match=r"__0_0\.distcp reads otherwise than it was written"):
        pending.wait()
    assert names(saved) == [f"step-0000000{n}" for n in (1, 2, 3)]


def test_a_file_system_that_fills_up_fails_the_checkpoint_and_room_makes_the_next(world_of_one, tmp_path):  # noqa: F811
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root alone")
    try:
        engine = session()
        checkpoint.save(engine, disk, step=1, info=INFO, background=False).wait()
        filler = disk / "filler"
        filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - 40_000))
        pending = checkpoint.save(engine, disk, step=2, info=INFO, keep=1, background=False)
        with pytest.raises(CheckpointFailed, match="No space left on device"):
            pending.wait()
        filler.unlink()
        assert names(disk) == ["step-00000001"]
        checkpoint.save(engine, disk, step=2, info=INFO, keep=1, background=False).wait()
        assert names(disk) == ["step-00000002"]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_failure_while_old_checkpoints_are_deleted_is_an_event_of_its_own(assignment, monkeypatch):  # noqa: F811
    rmtree = shutil.rmtree

    def refusing(path, *arguments, **settings):
        if str(path).endswith(".deleting") and Path(path).exists():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return rmtree(path, *arguments, **settings)

    monkeypatch.setattr(shutil, "rmtree", refusing)
    outcome, _, events = run(replace(assignment, job=job(checkpoint={"keep": 1})))
    assert (outcome.kind, outcome.checkpoint[-4:]) == ("finished", "0008")
    assert kinds(events).count("checkpoint") == 3
    told = [event.cause for event in events if event.kind == "prune_failed"]
    assert len(told) == 2
    assert "step-00000006 is whole, but an older checkpoint could not be deleted: " in told[0]
    assert "checkpoint_failed" not in kinds(events)


# Storage that stalls --------------------------------------------------------------------------------------------------


class FirstIsShort(Limits):
    """The first checkpoint has a second; the others any time."""

    saves = itertools.count()

    def save(self, *, num_bytes: float, longest_s: float | None) -> float:
        assert num_bytes > 10_000
        return 1.0 if next(self.saves) == 0 else 600.0


def _stalls(rank: int, base, ports: list[int], slow_rank: int, opens_after_step: int | None) -> None:
    """One rank's storage takes nothing from its first checkpoint on; after a step, everything again."""
    torch.set_num_threads(1)
    base = replace(base, rank=rank, limits=FirstIsShort())
    undisturbed = run(replace(base, master_port=ports[0], run_directory=base.run_directory + "-calm", limits=Limits()))
    opened, write, asked = threading.Event(), os.write, itertools.count(1)

    def slow(descriptor, data):
        if rank == slow_rank and "/checkpoints/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            opened.wait()
        return write(descriptor, data)

    def after_each_step() -> None:
        step = next(asked)
        if step == 4:
            time.sleep(1.3)  # the first checkpoint's limit passes while training goes on
        if step == opens_after_step and rank == slow_rank:
            opened.set()
            for thread in threading.enumerate():
                if thread.name == "step-00000003":
                    thread.join(60)

    reports, events = [], []
    os.write = slow
    try:
        outcome = checkpoint_run(replace(base, master_port=ports[1]), reports, events, after_each_step)
    finally:
        opened.set()
        os.write = write
    assert outcome.kind == ("finished" if opens_after_step else "failed")
    if rank != 0:
        return
    assert [report.loss for report in reports] == [report.loss for report in undisturbed[1]], "bit for bit"
    causes = [event.cause for event in events if event.kind == "checkpoint_failed"]
    assert (
        f"step-00000003 could not be written: the storage of rank {slow_rank} had not taken it after 1 s" in causes[0]
    )
    if opens_after_step:
        assert len(causes) == 1
        assert [event.step for event in events if event.kind == "checkpoint"] == [6, 8]
        folder = Path(base.run_directory) / "checkpoints"
        assert [path.name for path in sorted(folder.iterdir())] == ["step-00000006", "step-00000008"]
        verify(folder / "step-00000008")
    else:
        assert f"rank {slow_rank}: the storage has not taken step 3 yet" in causes[1]
        assert "the last checkpoint step-00000008 could not be written" in outcome.cause


def checkpoint_run(assignment, reports, events, after_each_step):  # noqa: F811
    from orchestrator.telemetry.records import StepReport
    from orchestrator.training.worker import train

    def report(record) -> None:
        (reports if isinstance(record, StepReport) else events).append(record)

    return train(assignment, report=report, should_stop=after_each_step)


@pytest.mark.parametrize("slow_rank", [0, 1])
@pytest.mark.parametrize("opens_after_step", [5, None], ids=["for a while", "for ever"])
def test_storage_that_stalls_past_the_limit_costs_a_checkpoint_and_not_the_run(assignment, slow_rank, opens_after_step):  # noqa: F811
    base = replace(assignment, world_size=2, strategy=strategy(2, zero_stage=2))
    spawn(_stalls, base, free_ports(2), slow_rank, opens_after_step, world_size=2)


# Bits that flip ---------------------------------------------------------------------------------------------------------


def flip_bits_of(path) -> None:
    with open(path / "__0_0.distcp", "r+b") as file:
        file.seek(7000)
        byte = file.read(1)[0]
        file.seek(7000)
        file.write(bytes([byte ^ 16]))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_flipped_bit_in_the_newest_checkpoint_changes_no_loss(assignment, keep):  # noqa: F811
    """The run starts over, or goes on from the checkpoint before; what is kept afterwards is whole."""
    assignment = replace(assignment, job=job(checkpoint={"keep": keep, "every": 2}))
    undisturbed = run(replace(assignment, run_directory=assignment.run_directory + "-calm"))[1]
    outcome, before, _ = run(assignment, stop_after=5)
    assert outcome.checkpoint.endswith("step-00000005")
    flip_bits_of(Path(outcome.checkpoint))
    newest = latest(Path(assignment.run_directory) / "checkpoints", report=print, check=False)
    outcome, after, events = run(replace(assignment, resume_from=str(newest.path)))
    assert outcome.kind == "finished"
    (refused,) = [event for event in events if event.kind == "checkpoint_refused"]
    assert "step-00000005 is refused: its file __0_0.distcp was altered" in refused.cause
    start = after[0].step - 1
    assert start == (0 if keep == 1 else 4)
    assert [report.loss for report in before[:start] + after] == [report.loss for report in undisturbed]
    folder = Path(assignment.run_directory) / "checkpoints"
    for path in folder.iterdir():
        verify(path)
    assert len(list(folder.iterdir())) == keep
    assert last_checkpoint(assignment).endswith(f"{NUM_STEPS:08d}")
