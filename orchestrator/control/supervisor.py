"""One run's supervisor: starts the worker group, watches it, asks recovery.py what a failure means, does it, writes it down.

It lives in the `run` process and holds no Ray itself. events.jsonl is its record; what workers report it reads from the
run folder, where they write it themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

from orchestrator.control import placement
from orchestrator.control.disk import DiskWatch
from orchestrator.control.folder import RunFolder
from orchestrator.control.host import Host
from orchestrator.control.recovery import Failure, FailureKind, GiveUp, Policy, on_failure
from orchestrator.control.watch import Pace, Watch, hang, stop_s
from orchestrator.telemetry.journal import Journal, told
from orchestrator.telemetry.records import Event, StepReport, Tail, recent
from orchestrator.training import manifest
from orchestrator.training.assignment import Outcome
from orchestrator.training.limits import Limits
from orchestrator.training.pulse import Sign

TICK_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Where the ranks of a group are and meet."""

    address: str
    port: int
    cores: tuple[int, ...]
    """Cores that the process of each rank may use, on its node."""

    @classmethod
    def of(cls, ready: Mapping[str, Any]) -> Meeting:
        cores = tuple(int(worker["cores"]) for worker in ready["workers"])
        return cls(address=ready["address"], port=ready["port"], cores=cores)


Assign = Callable[[Meeting, str | None], Sequence[Mapping[str, Any]]]
"""(where the ranks meet, checkpoint to go on from) -> one assignment per rank, as mappings."""


class Watcher(Protocol):
    """Who is told what happens, as it happens: the progress bar, the metrics."""

    def on_step(self, report: StepReport) -> None: ...

    def on_event(self, event: Event) -> None: ...


@dataclass(kw_only=True, slots=True)
class Stop:
    """Set by a signal handler: once is checkpoint and stop, Ctrl-C after that is stop now. Before there are workers, once is
    enough."""

    cause: str | None = None
    now: bool = False
    heard: bool = False
    """A supervisor looks at it; until then, an interrupt ends the command where it is."""

    def ask(self, cause: str, *, hurries: bool = False) -> None:
        """`hurries`: where a stop was asked for already, this one does not wait for the checkpoint."""
        if not self.heard:
            raise KeyboardInterrupt
        self.now = self.now or (hurries and self.cause is not None)
        self.cause = self.cause or cause


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a run ended; `lost` is the machinery's fault, `failed` the job's."""

    kind: Literal["finished", "stopped", "failed", "lost"]
    step: int
    cause: str = ""
    num_restarts: int = 0


@dataclass(kw_only=True)
class Supervisor:
    folder: RunFolder
    num_workers: int
    num_gpus: int
    """0: the workers train on CPU cores."""
    assign: Assign
    policy: Policy
    start_host: Callable[[], Host]
    stop: Stop
    per_node: int | None = None
    """Workers on each node, the last one's less where they do not divide; None: all on one."""
    seen: Sequence[str] = ()
    """Paths that all nodes must see."""
    watchers: Sequence[Watcher] = ()
    limits: Limits = field(default_factory=Limits)
    pace: Pace = field(default_factory=Pace)
    """Pace of the run, at first the one that the plan predicts."""
    began_s: float = field(default_factory=time.monotonic)
    """Time at which the user's command began, on the monotonic clock; first_step_s counts from here."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of what the command did before; the event `started` tells them."""
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self._host: Host | None = None
        self._disk = DiskWatch(self.folder.path)
        self.journal = Journal(self.folder.path, on_refusal=lambda error: self._disk.refused(told(error)))
        self._steps: Tail[StepReport] = Tail(self.folder.metrics, StepReport, from_end=True)
        self._events: Tail[Event] = Tail(self.folder.events, Event, from_end=True)
        self._step = 0
        self._attempt_steps = 0
        self._failures: list[Failure] = []
        self._watch = Watch(num_workers=self.num_workers)

    # The life of a run ------------------------------------------------------------------------------------------------

    def begin(self, host: Host | None = None) -> None:
        """Starts the processes; returns at once, so that the data can be prepared meanwhile."""
        if host is not None:
            self._host = host
        elif self._host is None:
            self._host = self.start_host()
        self._host.tell(
            do="begin",
            num_workers=self.num_workers,
            num_gpus=self.num_gpus,
            per_node=self.per_node or self.num_workers,
            seen=list(self.seen),
            limits=asdict(self.limits),
        )

    def run(self) -> Ending:
        """Run from the newest whole checkpoint to the end, through failures. `begin` was called once before."""
        self.stop.heard = True
        while True:
            ended = self._attempt()
            if isinstance(ended, Ending):
                return ended
            self._failures.append(ended)
            details = {"failure": ended.kind, "num_failures": len(self._failures)}
            decision = on_failure(self._failures, self.policy)
            if isinstance(decision, GiveUp):
                return self._ending("lost" if decision.lost_cluster else "failed", decision.reason, details)
            if self.stop.cause is not None:
                return self._ending("stopped", f"{self.stop.cause}; no checkpoint of it, since {ended.cause}", details)
            self._write("restart", ended.cause, {**details, "after_s": decision.after_s})
            if not self._pause(decision.after_s):
                return self._stopped_before_training()
            self.began_s, self.phases = time.monotonic(), {}
            self.begin()

    def close(self) -> None:
        """Ends all processes of the run."""
        if self._host is None:
            return
        left = self._host.end(self.limits.kill_s)
        self._host = None
        if left:
            cause = (
                f"processes {left} outlive SIGKILL: the kernel holds them in a read or write that does not come back"
            )
            self._write("not_ended", cause, {"pids": left})

    # One attempt ------------------------------------------------------------------------------------------------------

    def _attempt(self) -> Ending | Failure:
        manifest.sweep(self.folder.checkpoints)  # no worker is alive
        resume = manifest.latest(self.folder.checkpoints, report=self._append, check=False)
        if (
            resume is not None
            and (recorded := max((report.step for report in recent(self.folder.metrics)), default=0)) < resume.step
        ):
            steps = f"steps {recorded + 1} to {resume.step}"
            self._write("records_missing", f"metrics.jsonl lacks {steps}, which {resume.path.name} contains")
        self._step = max(self._step, resume.step if resume else 0)
        self._attempt_steps = 0
        self._watch = Watch(num_workers=self.num_workers)
        self.pace = replace(self.pace, recent_steps_s=())
        if resume is not None:
            self.pace = replace(self.pace, checkpoint_bytes=float(resume.num_bytes))
        ready = self._hear_until_ready()
        if not isinstance(ready, dict):
            return ready
        self.phases |= ready["phases"]
        checkpoint = None if resume is None else str(resume.path)
        self._tell_of_places(ready["workers"])
        assert self._host is not None
        self._host.tell(do="train", assignments=self.assign(Meeting.of(ready), checkpoint))
        return self._train()

    def _tell_of_places(self, workers: Sequence[Mapping[str, Any]]) -> None:
        """Writes down which ranks are on which node, where there are several."""
        names = list(dict.fromkeys(worker["name"] for worker in workers))
        if self.per_node is None or len(names) == 1:
            return
        nodes = [worker["node"] for worker in workers]
        self._write("placed", placement.told(names, len(nodes), self.per_node), {"nodes": nodes, "names": names})

    def _hear_until_ready(self) -> dict[str, Any] | Ending | Failure:
        deadline = time.monotonic() + self.limits.begin_s
        while time.monotonic() < deadline:
            if self.stop.cause is not None:
                return self._stopped_before_training()
            message = self._hear()
            if message is None:
                continue
            return message if message["kind"] == "ready" else self._failure(message)
        cause = f"the workers did not start in {self.limits.begin_s:.0f} s"
        return self._failure({"kind": "failed", "failure": "no_start", "cause": cause})

    def _train(self) -> Ending | Failure:
        told_at: float | None = None
        self._watch.heard(())
        self._watch.progressed()
        while True:
            message = self._hear()
            if message is not None:
                if message["kind"] == "outcome":
                    return self._after(Outcome(**message["outcome"]))
                return self._failure(message)
            if self.stop.now:
                return self._ending("stopped", f"{self.stop.cause}, twice: stopped without a checkpoint")
            if self.stop.cause is not None and told_at is None:
                assert self._host is not None
                self._host.tell(do="stop", cause=self.stop.cause)
                self._write("stopping", f"{self.stop.cause}: a checkpoint, then the end")
                told_at = self._watch.now_s
            limit_s = stop_s(self.pace, self.limits)
            if told_at is not None and self._watch.now_s - told_at > limit_s:
                return self._ending("stopped", f"{self.stop.cause}: no checkpoint within {limit_s:.0f} s")
            if (cause := self._hangs()) is not None:
                return self._failure({"kind": "failed", "failure": "hang", "cause": cause})

    def _hear(self) -> dict[str, Any] | None:
        assert self._host is not None
        message = self._host.hear(TICK_S)
        self._watch.look(time.monotonic())
        self._catch_up()
        if message is not None and message["kind"] == "garbled":
            cause = f"the process that holds Ray said what is not JSON, which was skipped: {message['line']!r}"
            self._write("line_skipped", cause)
            return None
        if message is not None and message["kind"] == "signs":
            self._watch.heard((int(rank), Sign.from_mapping(sign)) for rank, sign in message["signs"].items())
            return None
        return message

    def _hangs(self) -> str | None:
        """Why the group counts as hung, after it was written down with what each rank was doing."""
        ranks = self._watch.ranks()
        cause = hang(
            ranks,
            host_silent_s=self._watch.host_silent_s,
            quiet_s=self._watch.quiet_s,
            pace=self.pace,
            limits=self.limits,
        )
        if cause is not None:
            self._write("hang", cause, {"ranks": {number: asdict(rank) for number, rank in ranks.items()}})
        return cause

    def _catch_up(self) -> None:
        """Hand what the workers wrote since the last look to the watchers, and what is to be told of the disk."""
        if (cause := self._disk.look()) is not None:
            self._tell_watchers(Event(time_unix_s=time.time(), kind="disk", step=self._step, cause=cause))
        for event in self._events.new():
            if event.kind == "worker_started":
                self.phases |= {f"worker_{name}": seconds for name, seconds in event.details.items()}
            if event.kind == "checkpoint":
                self.pace = self.pace.saved(float(event.details.get("seconds", 0.0)))
            self._watch.progressed()
            self._tell_watchers(event)
        for report in self._steps.new():
            self._step = max(self._step, report.step)
            self._attempt_steps += 1
            self.pace = self.pace.stepped(report.step_s)
            self._watch.progressed()
            self._tell_watchers(report)
            if self._attempt_steps == 1:
                self._tell_of_start(report)

    def _tell_watchers(self, record: Event | StepReport) -> None:
        """One that fails is told nothing more: no screen is a reason to stop training."""
        for watcher in list(self.watchers):
            try:
                watcher.on_event(record) if isinstance(record, Event) else watcher.on_step(record)
            except Exception as error:
                self.watchers = [other for other in self.watchers if other is not watcher]
                name, cause = type(watcher).__name__, f"{type(error).__name__}: {error}"
                self._write(
                    "watcher_dropped", f"{name} is told nothing more ({cause}); training goes on", {"watcher": name}
                )

    def _tell_of_start(self, first: StepReport) -> None:
        seconds = (first.monotonic_s or time.monotonic()) - self.began_s
        details = {**self.phases, "step_s": first.step_s, "first_step_s": seconds, "first_step": first.step}
        self._write("started", f"step {first.step} was done {seconds:.1f} s after the start", details)

    def _after(self, outcome: Outcome) -> Ending | Failure:
        self._step = outcome.step
        if outcome.kind == "failed":
            return Failure(kind=FailureKind.USER_ERROR, cause=outcome.cause or "the job failed", step=outcome.step)
        return self._ending(outcome.kind, outcome.cause or "")

    def _failure(self, message: Mapping[str, Any]) -> Failure:
        """Return the failure of a group that is gone. A host whose Ray is in doubt goes with it."""
        if message["kind"] == "gone":
            message = {"failure": "ray_lost", "cause": "the process that holds Ray died"}
        kind = FailureKind(message["failure"])
        if kind in (FailureKind.RAY_LOST, FailureKind.NO_START, FailureKind.HANG):
            self.close()
        self._catch_up()
        newest = manifest.latest(self.folder.checkpoints, report=lambda event: None, check=False)
        identity = None if newest is None else f"{newest.path.name} of {newest.manifest['time_unix_s']}"
        return Failure(kind=kind, cause=message["cause"], step=self._step, checkpoint=identity)

    # Endings and records ----------------------------------------------------------------------------------------------

    def _stopped_before_training(self) -> Ending:
        return self._ending("stopped", f"{self.stop.cause}: nothing was being trained")

    def _ending(
        self,
        kind: Literal["finished", "stopped", "failed", "lost"],
        cause: str,
        details: Mapping[str, Any] | None = None,
    ) -> Ending:
        self._write(kind, cause, details)
        self._catch_up()
        return Ending(kind=kind, step=self._step, cause=cause, num_restarts=len(self._failures))

    def _pause(self, seconds: float) -> bool:
        """False where the user stopped it meanwhile."""
        deadline = time.monotonic() + seconds
        while self.stop.cause is None and time.monotonic() < deadline:
            self.sleep(TICK_S)
        return self.stop.cause is None

    def _write(self, kind: str, cause: str, details: Mapping[str, Any] | None = None) -> None:
        self._append(Event(time_unix_s=time.time(), kind=kind, step=self._step, cause=cause, details=details or {}))

    def _append(self, event: Event) -> None:
        """Into the file; the watchers hear of it with the next look."""
        self.journal.write(event)
