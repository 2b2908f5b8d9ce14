"""`run` put together: folder, plan, data, processes, supervisor, metrics, report. What a person sees is the caller's."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.control import lessons
from orchestrator.control.disk import room_told
from orchestrator.control.folder import RunFolder, RunRefused, held, named
from orchestrator.control.host import Early, Host, RayHost
from orchestrator.control.placement import node_of, workers_of
from orchestrator.control.processes import end_marked
from orchestrator.control.recovery import Policy
from orchestrator.control.refusals import cluster_at, discovered, nodes_at, planned_for, refuse_incomplete
from orchestrator.control.supervisor import Ending, Meeting, Stop, Supervisor, Watcher
from orchestrator.control.watch import Pace
from orchestrator.spec import acting
from orchestrator.telemetry import report
from orchestrator.telemetry.history import History
from orchestrator.telemetry.journal import Journal
from orchestrator.telemetry.records import Event, StepReport
from orchestrator.training import manifest
from orchestrator.training.assignment import Assignment
from orchestrator.training.limits import SCALE, Limits, from_environment

if TYPE_CHECKING:
    from orchestrator.planner.plan import Plan
    from orchestrator.spec import Job
    from orchestrator.telemetry.metrics import Metrics


@dataclass(kw_only=True)
class View:
    """The view that the caller shows. Every method may be left as it is."""

    watchers: list[Watcher] = field(default_factory=list)

    def note(self, text: str) -> None:
        """A line for a person."""

    def planned(self, plan: Plan, folder: RunFolder, done: int) -> None:
        """The plan is made; `done` steps are in the checkpoint that the run goes on from."""

    def preparing(self, done_bytes: int, total_bytes: int) -> None:
        """Text is being turned into tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    folder: RunFolder
    ending: Ending
    num_steps: int
    metrics_url: str | None


def run_job(
    job: Job,
    *,
    view: View,
    stop: Stop,
    directory: str | Path | None = None,
    fresh: bool = False,
    metrics_port: int | None = 0,
    began_s: float | None = None,
    address: str | None = None,
    start_host: Callable[[Path], Host] | None = None,
) -> RunResult:
    """Runs a job now, or goes on with it: on this machine, or on a Ray cluster.

    Args:
        address: HOST:PORT of a Ray cluster whose node this machine is; None: this machine alone.
        directory: parent of the run folder; by default the job's checkpoint.directory.
        fresh: start over; what is there is moved aside.
        began_s: when the user's command began, on the monotonic clock; by default now.
        metrics_port: of the Prometheus endpoint on loopback; 0 picks a free one, None opens none.

    Raises SpecError, RunRefused, PlanError, DoesNotFit, DataError; what happens to the run itself is in the result. All that the
    job and this machine tell is refused before the folder is made or a process started."""
    acting.refuse_unbuilt(job)
    clock = Clock(time.monotonic() if began_s is None else began_s)
    refuse_incomplete(job)
    if asked := ", ".join(sorted(job.queue.model_fields_set)):
        view.note(f"queue     {asked}: acts under `shardwise serve` alone; this run starts at once")
    nodes = None if address is None else nodes_at(address)
    here = job.resolved_cluster
    cluster = here or (discovered() if nodes is None or address is None else cluster_at(nodes, address))
    planned = planned_for(job, cluster, nodes)
    clock.lap("plan_s")
    parent = Path(directory or job.checkpoint.directory).resolve()
    folder = RunFolder(parent / job.name, tokens=None if address is None else parent / ".tokens")
    start_host = start_host or partial(RayHost, address=address)
    with named(folder.path), held(folder):
        if left := end_marked(str(folder.path)):  # what a killed `run` left: it may still write
            raise RunRefused(
                f"processes {left} of an earlier run outlive SIGKILL: the kernel holds them in a read or write",
                where=str(folder.path),
                fix="wait until its storage answers again, or give this job another name",
            )
        aside = folder.move_aside() if fresh else None
        if aside is not None:
            view.note(f"starts over; what was there is kept in {aside}")
        is_new = not folder.path.exists()
        try:
            return _in_folder(folder, job, planned, clock, start_host, view=view, stop=stop, metrics_port=metrics_port)
        except BaseException:
            if is_new and folder.give_back(aside) and aside is not None:
                view.note(f"nothing was begun: {folder.path} is as it was")
            raise


def _in_folder(
    folder: RunFolder,
    job: Job,
    planned: Plan,
    clock: Clock,
    start_host: Callable[[Path], Host],
    *,
    view: View,
    stop: Stop,
    metrics_port: int | None,
) -> RunResult:
    folder.check_continuation(job)
    folder.create()
    early = Early(lambda: start_host(folder.path))  # Python and Ray are imported while the checkpoints are looked at
    try:
        return _run(job, planned, folder, early, clock, view=view, stop=stop, metrics_port=metrics_port)
    finally:
        early.end()


def _run(
    job: Job,
    planned: Plan,
    folder: RunFolder,
    early: Early,
    clock: Clock,
    *,
    view: View,
    stop: Stop,
    metrics_port: int | None,
) -> RunResult:
    from orchestrator.telemetry.metrics import Metrics

    limits = read_limits().for_steps_of(planned.price.time.step_s)
    document = planned.to_dict() | {"wanted": job.targets.tokens_per_second_per_gpu}
    on_gpus = planned.cluster.accelerator.kind == "cuda"
    supervisor = _supervisor(job, planned, folder, early, clock, stop, limits, on_gpus=on_gpus)
    resume = manifest.latest(folder.checkpoints, report=lambda event: None, check=False)
    done = resume.step if resume else 0
    assert job.num_steps is not None
    view.planned(planned, folder, done)
    if done >= job.num_steps:
        folder.write_plan(document)
        LiveReport(folder, supervisor.journal).finish(view)
        ending = Ending(kind="finished", step=done, cause="there was nothing left to do")
        return RunResult(folder=folder, ending=ending, num_steps=job.num_steps, metrics_url=None)
    from orchestrator.control import text

    reads = text.text_of(job, folder, resume, note=view.note)
    with contextlib.ExitStack() as stack:
        stack.callback(supervisor.close)
        supervisor.begin()
        index = text.prepared(job, folder, reads, resume, view.preparing, note=view.note)
        clock.lap("prepare_s")
        folder.write_job(job)
        folder.write_plan(document)
        supervisor.assign = assigner(job, planned, folder, str(index.directory), limits, on_gpus=on_gpus)
        supervisor.journal.write(_begun(job, planned, done))
        if reads.changes:
            supervisor.journal.write(text.changed_event(reads, done))
        metrics = Metrics(document, num_gpus=planned.strategy.num_gpus)
        live = LiveReport(folder, supervisor.journal)
        stack.callback(metrics.close)
        url = None if metrics_port is None else served(metrics, metrics_port)
        if url is not None:
            supervisor.journal.write(_event("metrics_endpoint", url, done, address=url))
            view.note(f"metrics   {url}")
        supervisor.watchers = [metrics, live, *view.watchers]
        ending = supervisor.run()
    if ending.kind == "finished" and (told := lessons.record(planned, folder, done)):
        view.note(told)
    live.finish(view)
    return RunResult(folder=folder, ending=ending, num_steps=job.num_steps, metrics_url=url)


def _supervisor(
    job: Job,
    planned: Plan,
    folder: RunFolder,
    early: Early,
    clock: Clock,
    stop: Stop,
    limits: Limits,
    *,
    on_gpus: bool,
) -> Supervisor:
    """The supervisor of the plan's workers, before it is known what they read."""
    num_gpus = planned.strategy.num_gpus
    step_s, parameters = planned.price.time.step_s, planned.solution.problem.work.trains.num_parameters
    return Supervisor(
        folder=folder,
        num_workers=num_gpus,
        num_gpus=num_gpus if on_gpus else 0,
        assign=lambda meeting, resume_from: (),
        per_node=min(num_gpus, planned.cluster.gpus_per_node),
        seen=[
            str(job.directory.resolve() / path) for path in (job.model.path, job.model.checkpoint) if path is not None
        ],
        policy=Policy(max_restarts=job.recovery.max_restarts),
        start_host=early.start,
        stop=stop,
        limits=limits,
        pace=Pace(predicted_step_s=step_s, checkpoint_bytes=12.0 * parameters),
        began_s=clock.began_s,
        phases=clock.laps,
    )


def read_limits() -> Limits:
    try:
        return from_environment()
    except ValueError as error:
        raise RunRefused(str(error), where=f"environment: {SCALE}", fix=f"unset {SCALE}") from None


def served(metrics: Metrics, port: int) -> str:
    try:
        return metrics.serve(port)
    except OSError as error:
        told = f"the metrics cannot be served on port {port}: {error.strerror}"
        raise RunRefused(told, where="--metrics-port", fix="another port, or 0 for any that is free") from None


def assigner(
    job: Job, plan: Plan, folder: RunFolder, data_directory: str, limits: Limits, *, on_gpus: bool
) -> Callable[[Meeting, str | None], Sequence[dict[str, Any]]]:
    """One assignment a rank, whenever a group starts."""
    peak = plan.cluster.accelerator.peak_flops.get(job.training.precision)
    world = plan.strategy.num_gpus
    per_node = min(world, plan.cluster.gpus_per_node)
    on_node = workers_of(world, per_node)

    def assign(meeting: Meeting, resume_from: str | None) -> list[dict[str, Any]]:
        return [
            Assignment(
                job=job.to_mapping(),
                job_directory=str(job.directory.resolve()),
                strategy=plan.strategy,
                rank=rank,
                world_size=world,
                local_rank=rank % per_node,
                run_directory=str(folder.path),
                data_directory=data_directory,
                device="cuda:0" if on_gpus else "cpu",  # Ray shows each worker its own GPU alone
                master_address=meeting.address,
                master_port=meeting.port,
                resume_from=resume_from,
                peak_flops=peak,
                limits=limits,
                # A host optimizer wants the cores that no other worker needs; workers on cores have one each.
                num_threads=max(1, meeting.cores[rank] // on_node[node_of(rank, per_node)]) if on_gpus else 1,
            ).to_mapping()
            for rank in range(world)
        ]

    return assign


class LiveReport:
    """Writes report.html now and then while the run goes on, on a thread of its own: a long history or a slow disk must not keep
    the supervisor from hearing its workers."""

    EVERY_S = 60.0

    def __init__(self, folder: RunFolder, journal: Journal) -> None:
        self.folder, self.journal, self.written = folder, journal, time.monotonic()
        self._history = History(folder.path)
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    def on_step(self, step: StepReport) -> None:
        if self._thread is not None and self._thread.is_alive():
            return
        if self._failure is not None:
            self.journal.write(_event("report_failed", self._failure, step.step))
            self._failure = None
        if time.monotonic() - self.written < self.EVERY_S:
            return
        self.written = time.monotonic()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def on_event(self, event: Event) -> None:
        """A step follows soon."""

    def finish(self, view: View) -> None:
        """The last one, when nothing is written any more; a disk that refuses it is told and fails no run."""
        if self._thread is not None:
            self._thread.join(timeout=self.EVERY_S)
            if self._thread.is_alive():
                view.note("report    is not up to date: the disk is slow")
                return
        self._write()
        if self._failure is not None:
            view.note(f"report    could not be written: {self._failure}; {room_told(self.folder.path)}")

    def _write(self) -> None:
        try:
            self._history.update()
            report.write_of(self._history)
        except OSError as error:
            self._failure = f"report.html: {error.strerror}"


class Clock:
    """Seconds of the phases of a command, from its process's start, on the monotonic clock."""

    def __init__(self, began_s: float) -> None:
        self.began_s = self._mark = began_s
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._mark = now - self._mark, now


def _begun(job: Job, plan: Plan, done: int) -> Event:
    strategy = plan.strategy
    left_out = plan.left_out
    return _event(
        "run",
        f"{'goes on after' if done else 'starts at'} step {done} of {job.num_steps}",
        done,
        num_gpus=strategy.num_gpus,
        zero_stage=strategy.zero_stage,
        micro_batch_size=strategy.micro_batch_size,
        predicted_tokens_per_second_per_gpu=plan.tokens_per_second_per_gpu,
        left_out=None if left_out is None else asdict(left_out.strategy),
    )


def _event(kind: str, cause: str, step: int, **details: Any) -> Event:
    return Event(time_unix_s=time.time(), kind=kind, step=step, cause=cause, details=details)
