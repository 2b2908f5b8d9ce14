"""The process of one job under the service: does what `run` does, tells the store how far it is, and does what is asked there.

It outlives the controller. It holds the job's lease and fencing token: where it cannot renew the lease, another may have the
job, so it ends its workers and itself.

    python -m orchestrator.control.supervise DATABASE NAME TOKEN ROOT
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.control.admission import admitted
from orchestrator.control.folder import RunFolder, RunRefused
from orchestrator.control.lifecycle import LEASE_S, STOPPED_AS, Ask, State
from orchestrator.control.processes import end_marked
from orchestrator.control.refusals import DoesNotFit
from orchestrator.control.run import RunResult, View, run_job
from orchestrator.control.store import Fenced, Store
from orchestrator.control.supervisor import Stop
from orchestrator.planner.problem import PlanError
from orchestrator.spec.errors import SpecError
from orchestrator.training.data import DataError

if TYPE_CHECKING:
    from types import FrameType

    from orchestrator.planner.plan import Plan
    from orchestrator.spec import Job
    from orchestrator.telemetry.records import Event, StepReport

RENEW_S = 0.5
"""Seconds between two renewals, which are also when it hears what is asked of the job."""


class OtherPlan(Exception):
    """The plan wants other GPUs than the service reserved for it."""


class Driver(View):
    """Tells the store how far the job is, and the job what is asked of it."""

    def __init__(self, database: Path, name: str, token: int, stop: Stop) -> None:
        super().__init__()
        self.watchers.append(self)
        self.store = Store(database, check_same_thread=False)
        self.name, self.token, self.stop = name, token, stop
        self.asked: Ask | None = None
        self.folder: RunFolder | None = None
        self._lock = threading.Lock()
        self._known: dict[str, Any] = {}
        self._state = State.PLACING
        self._renewed = time.monotonic()
        self._ended = threading.Event()

    def advance(self, to: State, cause: str) -> None:
        with self._lock:
            self.store.advance(self.name, self.token, to, cause, time.time(), **self._known)
            self._state, self._known = to, {}

    def renew_on(self) -> None:
        """A thread's work: renew the lease until the end; where that fails for its whole length, all ends here."""
        while not self._ended.wait(RENEW_S):
            try:
                with self._lock:
                    if self._ended.is_set():
                        return
                    asked = self.store.renew(self.name, self.token, time.time() + LEASE_S, **self._known)
                    self._known = {}
                self._renewed = time.monotonic()
                self._heed(asked)
            except Fenced as error:
                self._give_up(str(error))
            except sqlite3.Error as error:
                print(f"the lease could not be renewed: {error}", file=sys.stderr, flush=True)
                if time.monotonic() - self._renewed > 0.8 * LEASE_S:
                    self._give_up("the lease could not be renewed")

    def end_renewals(self) -> None:
        self._ended.set()

    def _heed(self, asked: Ask | None) -> None:
        if asked is None or asked is self.asked:
            return
        self.asked = asked
        os.kill(os.getpid(), signal.SIGTERM)

    def heard(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGTERM, in the main thread: the job checkpoints and stops; a cancelled one stops now."""
        cause = "SIGTERM" if self.asked is None else f"asked to {self.asked}"
        if self.asked is Ask.CANCEL and self.stop.heard:
            self.stop.ask(cause)
        self.stop.ask(cause, hurries=self.asked is Ask.CANCEL)

    def _give_up(self, cause: str) -> None:
        print(f"gives up: {cause}", file=sys.stderr, flush=True)
        if self.folder is not None:
            end_marked(str(self.folder.path))
        os._exit(1)

    # View and watcher -------------------------------------------------------------------------------------------------

    def planned(self, plan: Plan, folder: RunFolder, done: int) -> None:
        self.folder = folder
        with self._lock:
            reserved = self.store.job(self.name).num_gpus
        if plan.strategy.num_gpus != reserved:
            raise OtherPlan(f"the plan wants {plan.strategy.num_gpus} GPUs now, and had {reserved} when it was queued")
        self._known = {"step": done, "num_steps": plan.job.num_steps}

    def on_step(self, report: StepReport) -> None:
        with self._lock:
            self._known |= {
                "step": report.step,
                "loss": report.loss if report.loss == report.loss else None,
                "tokens_per_second_per_gpu": report.tokens_per_second_per_gpu,
            }
        if self._state is not State.RUNNING:
            self.advance(State.RUNNING, f"step {report.step} is done")

    def on_event(self, event: Event) -> None:
        if event.kind == "restart" and self._state is not State.RECOVERING:
            self.advance(State.RECOVERING, event.cause)
        elif event.kind == "checkpoint":
            with self._lock:
                self._known["saved_s"] = event.time_unix_s


def outcome(result: RunResult, asked: Ask | None) -> tuple[State, str]:
    """Return what a job becomes by how its run ended."""
    ending = result.ending
    match ending.kind:
        case "finished":
            return State.SUCCEEDED, f"all {result.num_steps:,} steps are done"
        case "stopped":
            to = State.QUEUED if asked is None else STOPPED_AS[asked]
            return to, f"stopped at step {ending.step:,}: {ending.cause}"
        case _:
            return State.FAILED, ending.cause


def supervised(job: Job, driver: Driver, stop: Stop, root: Path) -> tuple[State, str]:
    """Run the job; return what it becomes and why."""
    try:
        result = run_job(job, view=driver, stop=stop, directory=root / job.checkpoint.directory, metrics_port=None)
        return outcome(result, driver.asked)
    except KeyboardInterrupt:
        return outcome_before(driver.asked)
    except OtherPlan as error:
        return State.QUEUED, str(error)
    except DoesNotFit:
        return State.FAILED, "the plan does not fit this machine any more"
    except (RunRefused, SpecError, PlanError, DataError) as error:
        return State.FAILED, " ".join(str(error).split())
    except OSError as error:
        return State.FAILED, f"{error.strerror or error}: {error.filename or root}"


def outcome_before(asked: Ask | None) -> tuple[State, str]:
    """Return what a job becomes that was stopped before there were workers."""
    return (State.QUEUED if asked is None else STOPPED_AS[asked]), "stopped before training began"


def main(arguments: list[str]) -> int:
    database, name, token, root = Path(arguments[0]), arguments[1], int(arguments[2]), Path(arguments[3])
    stop = Stop()
    driver = Driver(database, name, token, stop)
    signal.signal(signal.SIGTERM, driver.heard)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    to, cause = State.FAILED, "a fault of shardwise"
    try:
        driver.advance(State.STARTING, "its supervisor prepares data and starts workers")
        threading.Thread(target=driver.renew_on, daemon=True).start()
        to, cause = supervised(admitted(driver.store.text(name).encode(), root), driver, stop, root)
    except Fenced as error:
        print(f"gives up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        to, cause = outcome_before(driver.asked)
    except BaseException as error:
        traceback.print_exc()
        cause = f"{cause}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    driver.end_renewals()
    with contextlib.suppress(Fenced):
        driver.advance(to, cause)
    driver.store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
