"""The service's controller: plans what is queued, asks the queue, starts a supervisor per job, and takes jobs from lost ones.

It may die at any moment: all that it knows is in the store, and the supervisors go on without it. Only one controller works
on a store at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import psutil

from orchestrator.control import queue
from orchestrator.control.admission import User, admitted
from orchestrator.control.folder import RunFolder, RunRefused
from orchestrator.control.lifecycle import DRIVEN, LEASE_S, Ask, State
from orchestrator.control.processes import end_marked
from orchestrator.control.refusals import DoesNotFit, planned_for, refuse_incomplete
from orchestrator.control.store import Fenced, Refused, Row, Store
from orchestrator.planner.problem import PlanError
from orchestrator.spec import acting
from orchestrator.spec.errors import SpecError
from orchestrator.spec.files import missing

if TYPE_CHECKING:
    from clusters.cluster import Cluster
    from orchestrator.spec import Job

TICK_S = 0.5
PLANNING_S = 1.0
"""Seconds of one tick for plans of new jobs; the rest are planned in the next ones."""
MOST_LOST = 3
"""Supervisors in a row that a job may lose before it has trained."""
MOST_PLANS = 1000
"""Plans that are kept by the job's content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where the service works, and with what."""

    root: Path
    """Folder of all files of jobs."""
    state: Path
    """Folder of the service's own files."""
    cluster: Cluster
    """This machine."""
    users: tuple[User, ...] = ()

    @property
    def database(self) -> Path:
        return self.state / "service.sqlite"

    @property
    def node(self) -> str:
        return socket.gethostname()

    def store(self) -> Store:
        return Store(self.database)

    def folder(self, job: Job) -> RunFolder:
        return RunFolder((self.root / job.checkpoint.directory).resolve() / job.name)

    def job(self, store: Store, name: str) -> Job:
        return admitted(store.text(name).encode(), self.root, name=f"{name}.yaml")


def submit(site: Site, store: Store, text: str, user: User) -> tuple[Row, bool]:
    """Return the job of a submitted text, and whether it is new. SpecError or Refused where it cannot be one.

    Its `queue` acts from here on: priority, preemptible, max_wait."""
    job = admitted(text.encode(), site.root)
    acting.refuse_unbuilt(job)
    refuse_incomplete(job)
    if entries := missing(job):
        raise SpecError(entries)
    wait = job.queue.max_wait
    return store.submit(
        name=job.name,
        user=user.name,
        text=text,
        folder=str(site.folder(job).path),
        digest=hashlib.sha256(job.to_yaml().encode()).hexdigest(),
        now=time.time(),
        priority=job.queue.priority,
        preemptible=job.queue.preemptible,
        max_wait_s=None if wait is None else float(wait),
        num_steps=job.num_steps,
        most_waiting=user.jobs,
    )


@dataclass(kw_only=True)
class Controller:
    site: Site
    reasons: dict[str, str] = field(default_factory=dict)
    """Job -> why it waits, as of the last tick."""
    fault: str | None = None
    """What went wrong in the last tick."""

    def __post_init__(self) -> None:
        self._plans: dict[str, dict[str, Any] | str] = {}
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._stop = threading.Event()

    def run(self) -> None:
        """Tick until `stop`. What goes wrong in one tick is told and tried again in the next."""
        while not self._stop.is_set():
            try:
                with contextlib.closing(self.site.store()) as store:
                    self.tick(store, time.time())
                self.fault = None
            except Exception as error:
                self.fault = f"{type(error).__name__}: {error}"
                traceback.print_exc()
            self._stop.wait(TICK_S)

    def stop(self) -> None:
        self._stop.set()

    def tick(self, store: Store, now: float) -> None:
        for pid, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[pid]
        self._take_from_lost(store, now)
        self._plan(store)
        self._decide(store, now)

    # Supervisors ------------------------------------------------------------------------------------------------------

    def _take_from_lost(self, store: Store, now: float) -> None:
        for row in store.jobs(DRIVEN):
            is_dead = row.holder is not None and not is_alive(row.holder)
            if not is_dead and (row.lease_s or 0.0) > now:
                continue
            cause = "its supervisor died" if is_dead else "its supervisor gave no sign for the length of its lease"
            if row.holder is not None:
                end(row.holder)
            end_marked(row.folder)
            to = State.QUEUED if row.num_lost + 1 < MOST_LOST else State.FAILED
            if to is State.FAILED:
                cause = f"{cause}, {MOST_LOST} times before it trained; see {self._log(row.name)}"
            with contextlib.suppress(Fenced):
                store.lost(row.name, row.token, to, cause, now, is_dead=is_dead)

    def _start(self, store: Store, start: queue.Start, now: float) -> None:
        with contextlib.suppress(Fenced):  # cancelled or paused since it was read
            token = store.start(
                start.name,
                start.gpus,
                start.cause,
                now,
                lease_s=LEASE_S,
                ends_s=start.ends_s,
                backfilled=start.backfilled,
            )
            site = self.site
            command = [sys.executable, "-m", "orchestrator.control.supervise"]
            command += [str(site.database), start.name, str(token), str(site.root)]
            environment = dict(os.environ)
            if site.cluster.accelerator.kind == "cuda":
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for _, gpu in start.gpus)
            log = self._log(start.name)
            log.parent.mkdir(exist_ok=True)
            with log.open("ab") as file:
                child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment,
                    start_new_session=True, cwd=site.root,
                )  # fmt: skip
            self._children[child.pid] = child
            store.renew(start.name, token, now + LEASE_S, holder=identity(child.pid))

    def _log(self, name: str) -> Path:
        return self.site.state / "logs" / f"{name}.log"

    # Plans and the queue ----------------------------------------------------------------------------------------------

    def _plan(self, store: Store) -> None:
        until = time.monotonic() + PLANNING_S
        for row in store.jobs({State.QUEUED}, limit=100):
            with contextlib.suppress(Fenced, Refused):
                found = self._planned(store, row)
                if isinstance(found, str):
                    store.move(row.name, State.FAILED, found, time.time())
                else:
                    cause = f"planned for {found['num_gpus']} GPUs of {self.site.cluster.name}"
                    store.move(row.name, State.PLANNED, cause, time.time(), **found)
            if time.monotonic() > until:
                return

    def _planned(self, store: Store, row: Row) -> dict[str, Any] | str:
        """Return what the queue needs of the job's plan, or why it has none."""
        key = f"{row.digest} {self.site.cluster.name}"
        if key not in self._plans:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[key] = self._plan_of(store, row)
        return self._plans[key]

    def _plan_of(self, store: Store, row: Row) -> dict[str, Any] | str:
        try:
            job = self.site.job(store, row.name)
            made = planned_for(job, job.resolved_cluster or self.site.cluster)
        except DoesNotFit as error:
            memory = error.plan.price.memory
            return f"no plan fits: the best needs {memory.peak_bytes:,} of {memory.usable_bytes:,} bytes a GPU"
        except (RunRefused, SpecError, PlanError) as error:
            return " ".join(str(error).split())
        num_gpus = made.strategy.num_gpus
        return {
            "offer": self.site.cluster.name,
            "num_gpus": num_gpus,
            "num_nodes": -(-num_gpus // made.cluster.gpus_per_node),
            "wall_s": made.cost["wall_s"],
            "wall_error": made.confidence["throughput_error"],
        }

    def _decide(self, store: Store, now: float) -> None:
        driven = store.jobs(DRIVEN)
        held: dict[int, list[queue.Gpu]] = {}
        for gpu, job in store.gpus().items():
            held.setdefault(job, []).append(gpu)
        decision = queue.decide(
            [waiting(row) for row in store.planned()],
            [running(row, tuple(held.get(row.id, ())), now) for row in driven],
            [queue.Node(self.site.node, self.site.cluster.gpus_per_node, self.site.node in store.cordons())],
            now=now,
            quotas={user.name: user.gpus for user in self.site.users if user.gpus is not None},
            usage=store.usage(now),
        )
        self.reasons = dict(decision.reasons)
        for name in decision.expired:
            with contextlib.suppress(Fenced):
                store.move(name, State.FAILED, "waited longer than queue.max_wait", now)
        for preemption in decision.preemptions:
            store.ask(preemption.name, Ask.PREEMPT, preemption.cause, now)
        for start in decision.starts:
            self._start(store, start, now)


def waiting(row: Any) -> queue.Waiting:
    done = row.step / row.num_steps if row.num_steps else 0.0
    return queue.Waiting(
        row.name, row.user, row.num_gpus, row.num_nodes, row.priority, row.queued_s,
        queue.bound_s(row.wall_s, row.wall_error, done), None if row.token else row.max_wait_s,
    )  # fmt: skip


def running(row: Row, gpus: tuple[queue.Gpu, ...], now: float) -> queue.Running:
    since = max(row.saved_s or 0.0, row.started_s or now)
    return queue.Running(
        row.name, row.user, gpus, row.priority, row.ends_s, bool(row.preemptible),
        len(gpus) * (queue.START_S + max(0.0, now - since)), bool(row.backfilled), row.asked is not None,
    )  # fmt: skip


# Processes ------------------------------------------------------------------------------------------------------------


def identity(pid: int) -> str:
    """Return a name of a process that no later process with its number has."""
    with contextlib.suppress(psutil.Error):
        return f"{pid}:{psutil.Process(pid).create_time()}"
    return f"{pid}:gone"


def is_alive(holder: str) -> bool:
    return _process(holder) is not None


def _process(holder: str) -> psutil.Process | None:
    pid, _, began = holder.partition(":")
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(int(pid))
        if str(process.create_time()) == began and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def end(holder: str) -> None:
    """Kill a supervisor, stopped or not, and wait until it is gone."""
    if (process := _process(holder)) is not None:
        with contextlib.suppress(psutil.Error):
            process.kill()
            process.wait(timeout=10)


@contextlib.contextmanager
def alone(site: Site) -> Iterator[None]:
    """One controller works on a state folder at a time; the kernel frees the lock with the process."""
    site.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    file: BinaryIO = (site.state / "lock").open("ab")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunRefused(
                "another `shardwise serve` works on this state", where=str(site.state), fix="stop it, or --state FOLDER"
            ) from None
        yield
