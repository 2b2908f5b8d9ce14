"""The supervisor against a host that plays a script: no Ray, no process."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.control.folder import RunFolder
from orchestrator.control.recovery import Policy
from orchestrator.control.supervisor import Ending, Stop, Supervisor
from orchestrator.control.watch import Pace
from orchestrator.telemetry.records import Event, StepReport, append, read
from orchestrator.training import manifest
from orchestrator.training.limits import Limits
from orchestrator.training.pulse import Sign

WORKERS = [{"node": 0, "name": "host-0 (10.0.0.1)", "cores": 2}, {"node": 1, "name": "host-1 (10.0.0.2)", "cores": 2}]
READY = {"kind": "ready", "address": "127.0.0.1", "port": 1234, "workers": WORKERS, "phases": {"ray_s": 0.1}}
LOST = {"kind": "failed", "failure": "worker_lost", "cause": "the process of rank 1 of 2 died"}
GONE = {"kind": "gone"}


def outcome(kind: str, step: int, cause: str | None = None) -> dict[str, Any]:
    return {"kind": "outcome", "outcome": {"kind": kind, "step": step, "cause": cause, "checkpoint": None}}


def report(step: int) -> StepReport:
    return StepReport(
        step=step,
        time_unix_s=100.0 + step,
        loss=1.0,
        learning_rate=0.1,
        gradient_norm=1.0,
        step_s=1.0,
        tokens=8 * step,
        tokens_per_second=8.0,
        tokens_per_second_per_gpu=4.0,
        mfu=None,
        peak_bytes=1,
    )


class ScriptedHost:
    """Says one line of the script at each look; a callable is done first, and silence follows it."""

    def __init__(self, script: list[dict[str, Any] | Callable[[], None]]) -> None:
        self.script, self.told, self.ended = script, [], False

    def tell(self, **command: Any) -> None:
        self.told.append(command["do"])

    def hear(self, timeout_s: float) -> dict[str, Any] | None:
        line = self.script.pop(0)
        if callable(line):
            line()
            return None
        return line

    def end(self, within_s: float) -> list[int]:
        self.ended = True
        return []


@pytest.fixture
def supervise(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()

    def make(*scripts: list[Any], stop: Stop | None = None, policy: Policy | None = None):
        hosts = [ScriptedHost(script) for script in scripts]
        waiting = list(hosts)
        supervisor = Supervisor(
            folder=folder,
            num_workers=2,
            num_gpus=0,
            assign=lambda meeting, resume_from: [],
            policy=policy or Policy(first_wait_s=0.0),
            start_host=lambda: waiting.pop(0),
            stop=stop or Stop(),
            sleep=lambda seconds: None,
        )
        supervisor.begin()
        return supervisor, hosts

    make.folder = folder
    return make


def kinds(folder: RunFolder) -> list[str]:
    return [event.kind for event in read(folder.events, Event)]


def test_a_run_without_a_failure(supervise):
    supervisor, (host,) = supervise(
        [READY, lambda: append(supervise.folder.metrics, report(1)), outcome("finished", 1)]
    )
    assert supervisor.run() == Ending(kind="finished", step=1)
    assert host.told == ["begin", "train"]
    assert kinds(supervise.folder) == ["started", "finished"]


def test_ranks_on_several_nodes_are_told_with_their_nodes_before_training(supervise):
    supervisor, _ = supervise([READY, outcome("finished", 1)])
    supervisor.per_node = 1
    assert supervisor.run().kind == "finished"
    event = next(read(supervise.folder.events, Event))
    assert (event.kind, event.cause) == ("placed", "rank 0 on host-0 (10.0.0.1), rank 1 on host-1 (10.0.0.2)")
    assert event.details["nodes"] == [0, 1]


def test_the_time_to_the_first_step_does_not_follow_a_wall_clock_that_is_set(supervise, monkeypatch):
    first = replace(report(1), time_unix_s=1e12, monotonic_s=107.5)
    supervisor, _ = supervise([READY, lambda: append(supervise.folder.metrics, first), outcome("finished", 1)])
    supervisor.began_s = 100.0
    supervisor.run()
    started = next(read(supervise.folder.events, Event))
    assert (started.kind, started.details["first_step_s"]) == ("started", 7.5)


def test_a_dead_worker_is_answered_by_a_new_group_in_the_same_ray(supervise):
    supervisor, (host,) = supervise([READY, LOST, READY, outcome("finished", 3)])
    assert supervisor.run() == Ending(kind="finished", step=3, num_restarts=1)
    assert host.told == ["begin", "train", "begin", "train"]
    restart = next(read(supervise.folder.events, Event))
    assert (restart.kind, restart.cause, restart.details["failure"]) == ("restart", LOST["cause"], "worker_lost")


@pytest.mark.parametrize("death", [GONE, {"kind": "failed", "failure": "ray_lost", "cause": "Ray's raylet died"}])
@pytest.mark.parametrize("ready", [True, False], ids=["in training", "at the start"])
def test_a_dead_ray_is_answered_by_a_new_host(supervise, death, ready):
    supervisor, (first, second) = supervise([*[READY] * ready, death], [READY, outcome("finished", 3)])
    assert supervisor.run() == Ending(kind="finished", step=3, num_restarts=1)
    assert first.ended
    assert second.told == ["begin", "train"]


def test_a_mistake_of_the_user_ends_the_run_at_once(supervise):
    supervisor, _ = supervise([READY, outcome("failed", 4, "step 5: the loss is nan")])
    assert supervisor.run() == Ending(kind="failed", step=4, cause="step 5: the loss is nan", num_restarts=1)
    assert kinds(supervise.folder) == ["failed"]


def test_one_stop_is_a_checkpoint_and_an_end(supervise):
    stop = Stop()
    supervisor, (host,) = supervise(
        [READY, lambda: stop.ask("Ctrl-C"), lambda: None, outcome("stopped", 7, "Ctrl-C")], stop=stop
    )
    assert supervisor.run() == Ending(kind="stopped", step=7, cause="Ctrl-C")
    assert host.told == ["begin", "train", "stop"]


def test_two_stops_end_at_once(supervise):
    stop = Stop()
    supervisor, _ = supervise([READY, lambda: stop.ask("Ctrl-C"), lambda: stop.ask("Ctrl-C", hurries=True)], stop=stop)
    ending = supervisor.run()
    assert (ending.kind, "without a checkpoint" in ending.cause) == ("stopped", True)


def test_a_stop_while_the_workers_start_or_a_restart_waits_ends_at_once(supervise):
    stop = Stop()
    supervisor, _ = supervise([lambda: stop.ask("Ctrl-C")], stop=stop)
    assert supervisor.run().kind == "stopped"
    stop = Stop()
    supervisor, _ = supervise([READY, LOST], stop=stop, policy=Policy())
    supervisor.assign = lambda port, resume_from: [stop.ask("Ctrl-C")]  # type: ignore[func-returns-value, list-item]
    assert supervisor.run().kind == "stopped"


def test_restarts_are_counted_anew_after_each_whole_checkpoint(supervise):
    """One failure a day, for longer than max_restarts days; then the same with no checkpoint in between."""

    def save(step: int) -> None:
        files = {"tensors": {"bytes": 1, "sha256": manifest.sha256(supervise.folder.job)}}
        written = {"format": manifest.FORMAT, "step": step, "time_unix_s": float(step), "files": files, "num_steps": 9}
        written |= {"job": {}, "architecture": {}, "strategy": {}, "data": {}}
        path = supervise.folder.checkpoints / manifest.checkpoint_name(step)
        path.mkdir(parents=True)
        (path / "tensors").write_text("x")
        checksum = manifest.fingerprint(written)
        (path / manifest.MANIFEST).write_text(json.dumps({**written, "checksum": checksum}))

    supervise.folder.job.write_text("x")
    day = [[READY, lambda step=step: save(step), LOST] for step in range(1, 8)]
    crashes = [[READY, LOST]] * 2
    script = [line for lines in [*day, *crashes] for line in lines]
    supervisor, _ = supervise(script, policy=Policy(max_restarts=2, first_wait_s=0.0))
    ending = supervisor.run()
    assert (ending.kind, ending.num_restarts) == ("failed", 9)
    assert "3 failures since checkpoint step-00000007 are more than recovery.max_restarts: 2" in ending.cause


def said(*phases: str) -> dict[str, Any]:
    return {
        "kind": "signs",
        "signs": {str(rank): Sign(count=1, phase=phase, step=5).to_mapping() for rank, phase in enumerate(phases)},
    }


def test_a_group_without_a_sign_of_life_is_ended_with_its_host_and_started_again(supervise, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("orchestrator.control.supervisor.time.monotonic", lambda: float(next(clock)))
    hung = [READY, *[said("step", "data") for _ in range(200)]]
    supervisor, (first, second) = supervise(hung, [READY, outcome("finished", 9)])
    supervisor.limits = replace(Limits(), first_step_s=50.0, answer_s=10.0)
    assert supervisor.run() == Ending(kind="finished", step=9, num_restarts=1)
    assert first.ended
    assert second.told == ["begin", "train"]
    hang, restart, _ = read(supervise.folder.events, Event)
    assert (hang.kind, restart.kind, restart.details["failure"]) == ("hang", "restart", "hang")
    assert "no sign of life for 51 s" in restart.cause
    assert hang.details["ranks"]["1"]["sign"]["phase"] == "data"


def test_a_line_that_is_no_message_is_skipped_with_an_event(supervise):
    garbled = {"kind": "garbled", "line": '{"kind": "outc'}
    supervisor, _ = supervise([READY, garbled, outcome("finished", 9)])
    assert supervisor.run().kind == "finished"
    assert kinds(supervise.folder) == ["line_skipped", "finished"]


def test_a_large_checkpoint_is_waited_for_when_the_user_stops(supervise, monkeypatch):
    """2 TB at 100 MB/s: hours, where a constant gave minutes."""
    clock = itertools.count(step=0.5)
    monkeypatch.setattr("orchestrator.control.supervisor.time.monotonic", lambda: next(clock))
    stop = Stop()
    script = [READY, lambda: stop.ask("Ctrl-C"), *[said("checkpoint", "checkpoint") for _ in range(3000)]]
    supervisor, _ = supervise([*script, outcome("stopped", 7, "Ctrl-C")], stop=stop)
    supervisor.pace = Pace(checkpoint_bytes=2e12)
    assert supervisor.run() == Ending(kind="stopped", step=7, cause="Ctrl-C")


def test_a_failure_while_the_user_stops_ends_the_run_and_says_that_the_checkpoint_is_missing(supervise):
    stop = Stop()
    supervisor, _ = supervise([READY, lambda: stop.ask("Ctrl-C"), LOST], stop=stop)
    ending = supervisor.run()
    assert ending.kind == "stopped"
    assert f"Ctrl-C; no checkpoint of it, since {LOST['cause']}" in ending.cause


class Fails:
    """A watcher whose screen is gone."""

    def __init__(self, error: Exception) -> None:
        self.error, self.told = error, 0

    def on_step(self, report: StepReport) -> None:
        self.told += 1
        raise self.error

    def on_event(self, event: Event) -> None:
        self.told += 1
        raise self.error


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error"), ValueError("x")]
)
def test_a_watcher_that_fails_is_dropped_with_an_event_and_training_goes_on(supervise, error):
    supervisor, _ = supervise(
        [READY, lambda: append(supervise.folder.metrics, report(1)), lambda: None, outcome("finished", 1)]
    )
    failing, sound = Fails(error), Fails(error)
    sound.on_step = sound.on_event = lambda record: None  # type: ignore[method-assign]
    supervisor.watchers = [failing, sound]
    assert supervisor.run() == Ending(kind="finished", step=1)
    assert (failing.told, supervisor.watchers) == (1, [sound])
    dropped = [event for event in read(supervise.folder.events, Event) if event.kind == "watcher_dropped"]
    assert [event.details["watcher"] for event in dropped] == ["Fails"]
    assert str(error) in dropped[0].cause


def test_an_interrupt_before_there_are_workers_ends_the_command_where_it_is():
    with pytest.raises(KeyboardInterrupt):
        Stop().ask("Ctrl-C")


def test_a_group_that_never_starts_is_given_up_by_a_bounded_wait(supervise):
    supervisor, hosts = supervise([], [], [])
    supervisor.limits = Limits(begin_s=0.0)
    ending = supervisor.run()
    assert (ending.kind, ending.num_restarts) == ("lost", 3)
    assert all(host.ended for host in hosts)
