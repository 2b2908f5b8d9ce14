"""Runs one job in the foreground: its screen, the signals that stop it, and its result for a person or a program."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.errors import CommandError, ExitCode

if TYPE_CHECKING:
    from types import FrameType

    from orchestrator.control.run import RunResult
    from orchestrator.control.supervisor import Stop
    from orchestrator.spec import Job


def run_one(
    job: Job,
    *,
    directory: str | None,
    fresh: bool,
    metrics_port: int | None,
    to_stderr: bool,
    address: str | None = None,
    began_s: float | None = None,
) -> dict[str, Any]:
    """Run a job with its screen; the result as summary() has it. Raises CommandError where it is refused."""
    from orchestrator.cli.screen import Screen
    from orchestrator.control.folder import RunRefused
    from orchestrator.control.refusals import DoesNotFit
    from orchestrator.control.run import run_job
    from orchestrator.control.supervisor import Stop
    from orchestrator.planner.show.text import render
    from orchestrator.training.data import DataError

    screen = Screen(job, to_stderr=to_stderr)
    stop = Stop()
    try:
        with interrupts(stop), screen:
            result = run_job(
                job,
                view=screen,
                stop=stop,
                directory=directory,
                fresh=fresh,
                metrics_port=metrics_port,
                address=address,
                began_s=process_began() if began_s is None else began_s,
            )
    except RunRefused as error:
        raise CommandError(error.message, error.fix, where=error.where) from None
    except DataError as error:
        raise CommandError(str(error), where=str(job.file)) from None
    except DoesNotFit as error:
        click.echo(render(error.plan), err=True)
        fix = "see `would fit` above; `shardwise plan` shows all of it"
        raise CommandError("the plan does not fit this machine", fix, ExitCode.DOES_NOT_FIT) from None
    return summary(result, job)


CODES = {
    "finished": ExitCode.DONE,
    "stopped": ExitCode.CANCELLED,
    "failed": ExitCode.FAILED,
    "lost": ExitCode.LOST_CLUSTER,
}


def summary(result: RunResult, job: Job) -> dict[str, Any]:
    """The result as JSON."""
    from orchestrator.telemetry.records import finite, last_of_each_step, recent
    from orchestrator.training.manifest import latest

    whole = latest(result.folder.checkpoints, report=lambda event: None, check=False)
    reports = last_of_each_step(recent(result.folder.metrics))
    last = reports[-1] if reports else None
    speeds = sorted(report.tokens_per_second_per_gpu for report in reports[-100:])
    ending = result.ending
    return {
        "name": job.name,
        "ending": ending.kind,
        "cause": ending.cause,
        "step": ending.step,
        "steps": result.num_steps,
        "restarts": ending.num_restarts,
        "checkpoint_step": None if whole is None else whole.step,
        "loss": None if last is None else finite(last.loss),
        "tokens_per_second_per_gpu": speeds[len(speeds) // 2] if speeds else None,
        "directory": str(result.folder.path),
        "report": str(result.folder.report),
        "exit_code": int(CODES[ending.kind]),
    }


def say(told: dict[str, Any], job_file: str) -> None:
    """The result for a person."""
    from orchestrator.cli.errors import show

    shown = Path(told["directory"])
    with contextlib.suppress(ValueError):
        shown = shown.relative_to(Path.cwd())
    at = f"step {told['step']:,} of {told['steps']:,}"
    match told["ending"]:
        case "finished":
            loss = "" if told["loss"] is None else f", loss {told['loss']:.4f}"
            click.echo(f"done      {at}{loss}")
            if told["cause"]:
                click.echo(f"note      {told['cause']}")
        case "stopped":
            click.echo(f"stopped   at {at}: {told['cause']}\n  to go on: shardwise run {job_file}")
        case _:
            again = (
                f"goes on after step {told['checkpoint_step']:,}"
                if told["checkpoint_step"]
                else "starts over: no checkpoint is whole"
            )
            fix = f"the logs are in {shown / 'logs'}; mended, `shardwise run {job_file}` {again}"
            show(f"stopped at {at}: {told['cause']}", where=str(shown / "events.jsonl"), fix=fix)
    click.echo(f"report    {shown / 'report.html'}")


@contextlib.contextmanager
def interrupts(stop: Stop) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal ask the run to stop; it decides when.

    A signal that is ignored already stays ignored: that is how nohup, and a shell for what it runs behind, ask for it."""
    names = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "the terminal was closed"}
    heeded = [number for number in names if signal.getsignal(number) is not signal.SIG_IGN]

    def handle(number: int, _: FrameType | None) -> None:
        # A terminal that closes sends SIGHUP by way of its shell and by itself, a service manager repeats SIGTERM: only a
        # person at the keyboard means "now" by the second time.
        stop.ask(names[signal.Signals(number)], hurries=number == signal.SIGINT)

    before = {number: signal.signal(number, handle) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def process_began() -> float:
    """Return when this process began, on the monotonic clock: the start that a person waits for includes Python's own."""
    import psutil

    age_s = time.time() - psutil.Process().create_time()
    return time.monotonic() - (age_s if 0 <= age_s < 60 else 0.0)  # more: called from a program that runs since long
