"""The loop trains, says what it did, stops when asked, and goes on bit for bit where it stopped."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from orchestrator.telemetry.records import Event, StepReport, read, steps
from orchestrator.training.assignment import Assignment
from orchestrator.training.batches import Share
from orchestrator.training.data import DataIndex, Source
from orchestrator.training.loop import Loop
from orchestrator.training.manifest import latest
from orchestrator.training.worker import main, train
from strategies.strategy import Strategy
from tests.ranks import spawn

NUM_STEPS = 8
SEQUENCE = 12
JOB = {
    "version": 1,
    "name": "tiny",
    "model": {
        "family": "opt",
        "num_layers": 2,
        "hidden_size": 24,
        "num_heads": 3,
        "ffn_size": 44,
        "vocab_size": 264,
        "max_position": 16,
    },
    "data": {"train": ["corpus.txt"]},
    "batch": {"global_batch_size": 7, "sequence_length": SEQUENCE},
    "training": {
        "steps": NUM_STEPS,
        "precision": "fp32",
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"name": "cosine", "warmup_steps": 2, "final_fraction": 0.1},
    },
    "checkpoint": {"every": 3, "keep": 5},
}


def prepared(directory: Path, *, tokenizer: str = "byte-1", tokens: str = "tokens-1") -> str:
    """A folder as `prepare` leaves it: a text that repeats, so that there is something to learn."""
    directory.mkdir()
    sources = []
    for split, length in (("train", 4000), ("validation", 500)):
        (np.arange(length) * 7 % 61).astype("<u2").tofile(directory / f"{split}.bin")
        num_tokens = {"train": 0, "validation": 0} | {split: length}
        source = Source(
            path=split, split=split, bytes=length, mtime_ns=0, sha256="", num_documents=1, num_tokens=num_tokens
        )
        sources.append(source)
    index = DataIndex(
        directory=directory,
        dtype="uint16",
        tokenizer={"kind": "byte", "vocab_size": 257, "end_of_text": 256, "fingerprint": tokenizer},
        sources=tuple(sources),
        files={"train": (("train.bin", 4000),), "validation": (("validation.bin", 500),)},
        fingerprint=tokens,
        unigram_entropy=math.log(61),
    )
    (directory / "index.json").write_text(json.dumps(index.to_mapping()))
    return str(directory)


def job(**changes):
    """JOB with some keys of its sections changed."""
    return {**JOB, **{key: {**JOB[key], **value} for key, value in changes.items()}}


def strategy(world, zero_stage=0, micro_batch_size=2):
    return Strategy(
        data_parallel_degree=world,
        zero_stage=zero_stage,
        zero_group_size=world if zero_stage else 1,
        states="full",
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=-(-7 // (world * micro_batch_size)),
    )


@pytest.fixture
def assignment(tmp_path):
    return Assignment(
        job=JOB,
        job_directory=str(tmp_path),
        strategy=strategy(1),
        rank=0,
        world_size=1,
        run_directory=str(tmp_path / "run"),
        data_directory=prepared(tmp_path / "data"),
        peak_flops=1e12,
    )


def run(assignment, *, stop_after=None):
    """(outcome, step reports, events) of a worker in this process."""
    reports, events = [], []
    asked = itertools.count(assignment_step(assignment) + 1)
    outcome = train(
        assignment,
        report=lambda record: (reports if isinstance(record, StepReport) else events).append(record),
        should_stop=lambda: "a test asks" if next(asked) == stop_after else None,
    )
    return outcome, reports, events


def assignment_step(assignment):
    return int(assignment.resume_from[-8:]) if assignment.resume_from else 0


def kinds(events):
    return [event.kind for event in events]


def last_checkpoint(assignment):
    ref = latest(Path(assignment.run_directory) / "checkpoints", report=lambda event: None)
    return ref and str(ref.path)


# What a run leaves ---------------------------------------------------------------------------------------------------


def test_a_run_learns_reports_every_step_and_leaves_checkpoints(assignment):
    outcome, reports, events = run(replace(assignment, job=job(training={"evaluate_every": 4})))
    assert (outcome.kind, outcome.step, outcome.cause) == ("finished", NUM_STEPS, None)
    assert outcome.checkpoint == last_checkpoint(assignment)
    assert [report.step for report in reports] == list(range(1, NUM_STEPS + 1))
    assert reports[0].loss == pytest.approx(math.log(264), rel=0.02)
    assert reports[-1].loss < reports[0].loss - 0.5
    assert reports[-1].tokens == NUM_STEPS * 7 * SEQUENCE
    assert reports[1].learning_rate == 1e-2, "the peak, at the last step of the warm-up"
    assert reports[-1].learning_rate == pytest.approx(1e-3)
    for report in reports:
        assert report.step_s >= report.engine_s + report.data_wait_s
        assert report.tokens_per_second_per_gpu == pytest.approx(7 * SEQUENCE / report.step_s)
        assert 0 < report.mfu < 1
        assert report.peak_bytes > 2**20
    assert kinds(events).count("checkpoint") == 3, "steps 3 and 6, and the end"
    evaluations = [event for event in events if event.kind == "evaluation"]
    assert [event.step for event in evaluations] == [4, NUM_STEPS]
    assert evaluations[-1].details["loss"] == pytest.approx(reports[-1].loss, abs=0.7)
    (memory,) = [event for event in events if event.kind == "memory_measured"]
    assert memory.step == 2
    assert memory.details["components"]["parameters"] > 0
    assert not list(Path(assignment.run_directory, "checkpoints").glob("*.partial"))


def test_the_interval_of_auto_is_told_predicted_then_measured(assignment, monkeypatch):
    _, _, events = run(replace(assignment, job=job(checkpoint={"every": "auto"})))
    (told,) = [event for event in events if event.kind == "checkpoint_interval"]
    assert told.step == 0
    assert 60 <= told.details["seconds"] <= 3600
    assert "(predicted)" in told.cause
    assert kinds(events).count("checkpoint") == 1, "the end alone: eight steps take no minute"
    for bound in ("SHORTEST_S", "LONGEST_S"):
        monkeypatch.setattr(f"orchestrator.training.schedule.{bound}", 1e-6)
    again = replace(assignment, run_directory=f"{assignment.run_directory}-2", job=job(checkpoint={"every": "auto"}))
    _, _, events = run(again)
    assert kinds(events).count("checkpoint") > 1
    told = [event for event in events if event.kind == "checkpoint_interval"]
    assert "(predicted)" in told[0].cause
    assert "(measured)" in told[1].cause


def test_the_second_of_two_equal_runs_has_the_same_losses(assignment, tmp_path):
    first = run(assignment)[1]
    second = run(replace(assignment, run_directory=str(tmp_path / "again"), measure_memory=False))[1]
    assert [report.loss for report in first] == [report.loss for report in second]


@pytest.mark.parametrize(
    ("num_replicas", "micro", "wanted"),
    [
        (1, 7, [[0, 1, 2, 3, 4, 5, 6]]),
        (1, 4, [[0, 1, 2, 3], [4, 5, 6, None]]),
        (2, 2, [[0, 1], [4, 5]]),
        (3, 2, [[0, 1], [6, None]]),
        (8, 1, [[0]]),
    ],
)
def test_the_first_replica_gets_every_so_manieth_slice_and_fills_up_the_last(num_replicas, micro, wanted):
    share = Share(replica=0, num_replicas=num_replicas, micro_batch_size=micro, device=torch.device("cpu"))
    assert share.rows(7) == wanted


@pytest.mark.parametrize("micro", [1, 2, 3])
@pytest.mark.parametrize("num_replicas", [1, 2, 5, 9])
def test_the_replicas_share_every_sequence_once_and_step_equally_often(num_replicas, micro):
    shares = [
        Share(replica=replica, num_replicas=num_replicas, micro_batch_size=micro, device=torch.device("cpu")).rows(7)
        for replica in range(num_replicas)
    ]
    assert len({len(rows) for rows in shares}) == 1
    seen = [row for rows in shares for micro_batch in rows for row in micro_batch if row is not None]
    assert sorted(seen) == list(range(7))


# Stopping and going on -----------------------------------------------------------------------------------------------


def test_a_run_that_is_asked_to_stop_checkpoints_and_goes_on_from_there(assignment):
    undisturbed = run(replace(assignment, run_directory=assignment.run_directory + "-2"))[1]
    outcome, before, events = run(assignment, stop_after=5)
    assert (outcome.kind, outcome.step, outcome.cause) == ("stopped", 5, "a test asks")
    assert kinds(events)[-1] == "checkpoint"
    outcome, after, events = run(replace(assignment, resume_from=last_checkpoint(assignment)))
    assert outcome.kind == "finished"
    assert "resumed" in kinds(events)
    assert [report.loss for report in before + after] == [report.loss for report in undisturbed]


def test_a_run_that_is_asked_to_stop_at_its_last_step_is_finished(assignment):
    assert run(assignment, stop_after=NUM_STEPS)[0].kind == "finished"


def test_a_run_that_is_already_done_is_finished_at_once(assignment):
    run(assignment)
    outcome, reports, _ = run(replace(assignment, resume_from=last_checkpoint(assignment)))
    assert (outcome.kind, outcome.step, reports) == ("finished", NUM_STEPS, [])
    assert outcome.checkpoint == last_checkpoint(assignment)


def test_a_longer_run_goes_on_and_tells_how_the_learning_rate_jumps(assignment):
    run(assignment)
    longer = replace(assignment, job=job(training={"steps": 12}), resume_from=last_checkpoint(assignment))
    outcome, reports, events = run(longer)
    assert (outcome.kind, [report.step for report in reports]) == ("finished", [9, 10, 11, 12])
    (change,) = [event for event in events if event.kind == "schedule_changed"]
    assert "12 steps long instead of 8" in change.cause
    assert change.details["learning_rate_before"] == pytest.approx(1e-3)
    assert change.details["learning_rate"] == reports[0].learning_rate


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"job": job(training={"optimizer": {"learning_rate": 2e-2}})}, "training.optimizer.learning_rate"),
        ({"job": job(batch={"global_batch_size": 14})}, "batch.global_batch_size"),
        ({"job": job(model={"ffn_size": 48})}, "model.ffn_size"),
        ({"job": job(training={"steps": 6})}, "it is of step 8 and the job ends at 6; set training.steps higher"),
    ],
)
def test_a_checkpoint_of_another_trajectory_is_refused_with_the_difference(assignment, changes, told):
    run(assignment)
    outcome, reports, events = run(replace(assignment, resume_from=last_checkpoint(assignment), **changes))
    assert (outcome.kind, reports, kinds(events)) == ("failed", [], ["refused"])
    assert "step-00000008" in outcome.cause
    assert told in outcome.cause


@pytest.mark.parametrize(("what", "told"), [("tokenizer", "another tokenizer"), ("tokens", "other text")])
def test_a_checkpoint_of_other_data_is_refused(assignment, tmp_path, what, told):
    run(assignment)
    other = prepared(tmp_path / "other", **{what: "another"})
    outcome, *_ = run(replace(assignment, resume_from=last_checkpoint(assignment), data_directory=other))
    assert outcome.kind == "failed"
    assert f"it was trained with {told} than" in outcome.cause
    assert "--fresh" in outcome.cause


# Failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"job": job(training={"steps": None})}, "training.steps"),
        ({"job": job(model={"vocab_size": 64}, data={"tokenizer": "a-folder"})}, "the tokenizer has 257 tokens"),
        ({"job": job(batch={"sequence_length": 5000}, model={"max_position": 5000})}, "add text"),
        ({"strategy": Strategy(pipeline_parallel_degree=2, states="full")}, "pipeline_parallel_degree"),
    ],
)
def test_a_mistake_of_the_users_is_a_failed_outcome_with_the_way_out(assignment, changes, told):
    outcome, reports, events = run(replace(assignment, **changes))
    assert (outcome.kind, reports, kinds(events)) == ("failed", [], ["refused"])
    assert told in outcome.cause


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step_and_samples(assignment):
    wild = replace(assignment, job=job(training={"optimizer": {"learning_rate": 1e30, "gradient_clip": None}}))
    outcome, reports, events = run(wild)
    assert outcome.kind == "failed"
    assert outcome.step == len(reports) < NUM_STEPS
    last = events[-1]
    assert (last.kind, last.step) == ("not_finite", outcome.step + 1)
    assert len(last.details["samples"]) == 7
    assert f"step {last.step}: the" in outcome.cause


def test_a_checkpoint_that_fails_is_an_event_and_the_last_one_a_failure(assignment):
    checkpoints = Path(assignment.run_directory) / "checkpoints"
    checkpoints.parent.mkdir()
    checkpoints.write_text("a file in the way")
    outcome, reports, events = run(assignment)
    assert len(reports) == NUM_STEPS, "training goes on"
    assert kinds(events).count("checkpoint_failed") == 3
    assert outcome.kind == "failed"
    assert "the last checkpoint step-00000008 could not be written" in outcome.cause


def test_the_error_of_a_worker_is_told_before_its_groups_are_taken_down_which_may_abort(assignment, monkeypatch):
    def abort():
        raise AssertionError("taken down")

    def fail(self, batch):
        raise KeyError("the true error")

    monkeypatch.setattr(Loop, "_step", fail)
    take_down = torch.distributed.destroy_process_group
    monkeypatch.setattr(torch.distributed, "destroy_process_group", abort)
    with pytest.raises(KeyError, match="the true error"):
        train(assignment, report=lambda record: None, should_stop=lambda: None, ends_with_process=True)
    take_down()


# Several workers ------------------------------------------------------------------------------------------------------


def free_ports(count):
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _rank(rank: int, world: int, base: Assignment, ports: list[int], losses: list[float]) -> None:
    """Asked on its last rank to stop after step 5; goes on under the same strategy and under another."""
    base = replace(base, rank=rank, world_size=world, strategy=strategy(world, zero_stage=2))
    whole = run(replace(base, master_port=ports[0], run_directory=base.run_directory + "-whole"))
    half = run(replace(base, master_port=ports[1]), stop_after=5 if rank == world - 1 else None)
    again = replace(base, resume_from=half[0].checkpoint)
    resumed = run(replace(again, master_port=ports[2], run_directory=base.run_directory + "-same"))
    other = run(replace(again, master_port=ports[3], strategy=strategy(world, zero_stage=1, micro_batch_size=1)))
    assert [outcome.kind for outcome in (whole[0], half[0], resumed[0], other[0])] == ["finished", "stopped"] + [
        "finished"
    ] * 2
    assert half[0].step == 5
    if rank == 0:
        assert [r.loss for r in half[1] + resumed[1]] == [r.loss for r in whole[1]], "bit for bit"
        assert [r.loss for r in half[1] + other[1]] == pytest.approx(losses, rel=1e-4)
        assert [r.loss for r in whole[1]] == pytest.approx(losses, rel=1e-4)
    else:
        assert whole[1:] == ([], []), "rank 0 alone reports"


def test_four_workers_stop_together_and_go_on_bit_for_bit(assignment):
    losses = [report.loss for report in run(replace(assignment, run_directory=assignment.run_directory + "-one"))[1]]
    base = replace(assignment, run_directory=assignment.run_directory + "-four")
    spawn(_rank, 4, base, free_ports(4), losses, world_size=4)


def _killed(rank: int, base: Assignment, ports: list[int]) -> None:
    """An undisturbed run; then one that a process leaves by kill -9, just when a checkpoint is being written."""
    base = replace(base, rank=rank)
    undisturbed = run(replace(base, master_port=ports[0], run_directory=base.run_directory + "-undisturbed"))
    if rank == 0:
        torch.save([report.loss for report in undisturbed[1]], base.run_directory + ".losses")

    asked = itertools.count(1)

    def leave() -> None:
        if next(asked) == 13 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError):
        train(replace(base, master_port=ports[1]), report=lambda record: None, should_stop=leave)


def _resumed(rank: int, base: Assignment, port: int) -> None:
    outcome, reports, _ = run(replace(base, rank=rank, master_port=port, resume_from=last_checkpoint(base)))
    assert outcome.kind == "finished"
    if rank == 0:
        undisturbed = torch.load(base.run_directory + ".losses")
        assert len(undisturbed) == 20
        assert reports[0].step in (10, 13), "what was being written when the process died counts only if it is whole"
        assert [report.loss for report in reports] == undisturbed[reports[0].step - 1 :]


def test_three_workers_of_which_one_is_killed_go_on_from_the_last_whole_checkpoint_bit_for_bit(assignment):
    base = replace(assignment, world_size=3, strategy=strategy(3, zero_stage=3), job=job(training={"steps": 20}))
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        spawn(_killed, base, free_ports(2), world_size=3)
    spawn(_resumed, base, free_ports(1)[0], world_size=3)


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_as_a_program_it_writes_what_the_supervisor_would(assignment, tmp_path, capsys, monkeypatch):
    file = tmp_path / "assignment.json"
    file.write_text(json.dumps(assignment.to_mapping()))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main([str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "finished"
    folder = Path(assignment.run_directory)
    assert [report.step for report in steps(folder / "metrics.jsonl")] == list(range(1, NUM_STEPS + 1))
    assert "checkpoint" in kinds(read(folder / "events.jsonl", Event))
    assert main([]) == 2


@pytest.mark.usefixtures("signals")
def test_as_a_program_it_leaves_a_signal_ignored_that_was_ignored(assignment, tmp_path):
    file = tmp_path / "assignment.json"
    file.write_text(json.dumps(assignment.to_mapping()))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert main([str(file)]) == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
