"""What the verbs of the service share: its address, its refusals as exit codes, a job in one line."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.errors import CommandError, ExitCode

if TYPE_CHECKING:
    from orchestrator.client import Client

CODES = {
    0: ExitCode.LOST_CLUSTER,
    401: ExitCode.NOT_ALLOWED,
    403: ExitCode.NOT_ALLOWED,
    404: ExitCode.NOT_FOUND,
}
ENDS = {"succeeded": ExitCode.DONE, "failed": ExitCode.FAILED, "cancelled": ExitCode.CANCELLED}

server_option: Callable[[Any], Any] = click.option(
    "--server", metavar="URL", help="Address of `shardwise serve` [default: SHARDWISE_SERVER]."
)


@contextlib.contextmanager
def service(server: str | None) -> Iterator[Client]:
    """The service's client; what the service refuses becomes an error of the command."""
    from orchestrator.client import Client, ServiceError
    from orchestrator.spec.errors import SpecError

    try:
        yield Client(server)
    except ServiceError as error:
        if error.errors and "file" in error.errors[0]:
            raise SpecError(error.errors) from None  # type: ignore[arg-type]
        code = CODES.get(error.code, ExitCode.FAILED if error.code >= 500 else ExitCode.BAD_INPUT)
        raise CommandError(error.message, error.fix, code) from None


def asked_server(server: str | None) -> str | None:
    """Return the service that a verb of both run folders and services is for; None: the folders."""
    import os

    return server or os.environ.get("SHARDWISE_SERVER")


def line(job: dict[str, Any]) -> str:
    """A job in one line."""
    steps = f"  step {job['step']:,}" + (f" / {job['num_steps']:,}" if job["num_steps"] else "") if job["step"] else ""
    loss = "" if job["loss"] is None else f"  loss {job['loss']:.4f}"
    speed = job["tokens_per_second_per_gpu"]
    told = f"  {speed:,.0f} tokens/s/GPU" if speed is not None and job["state"] == "running" else ""
    asked = f" ({job['asked']} was asked for)" if job["asked"] else ""
    return f"{job['name']}: {job['state']}{asked}{steps}{loss}{told}  {job['cause']}"


def show_job(job: dict[str, Any], *, as_json: bool) -> None:
    click.echo(json.dumps(job, indent=1) if as_json else line(job))


def watch(client: Client, name: str) -> dict[str, Any]:
    """Show a job until it ends, live on a terminal and a line for each change elsewhere; return its last state."""
    from rich.console import Console

    console = Console(highlight=False)
    job: dict[str, Any] = {}
    if console.is_terminal:
        with console.status("") as status:
            for job in client.watch(name):
                status.update(line(job))
    else:
        before = None
        for job in client.watch(name):
            if (job["state"], job["cause"]) != before:
                click.echo(line(job))
            before = job["state"], job["cause"]
    if console.is_terminal:
        click.echo(line(job))
    return job


def clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
