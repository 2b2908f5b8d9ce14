"""`shardwise logs RUN`: what a worker printed."""

from __future__ import annotations

from collections import deque

import click

from orchestrator.cli.errors import CommandError, ExitCode
from orchestrator.cli.remote import asked_server, server_option, service
from orchestrator.cli.runs import directory_option, run_folder


@click.command("logs")
@click.argument("run")
@directory_option
@click.option("--rank", type=click.IntRange(0), default=0, show_default=True, help="Whose log.")
@click.option("--ray", is_flag=True, help="In place of a rank's: what the process that holds Ray printed.")
@server_option
@click.option("-f", "--follow", is_flag=True, help="Of a job of a service: go on until it ends.")
@click.option("-n", "--lines", type=click.IntRange(1), help="Only the last lines.")
def command(run: str, directory: str, rank: int, ray: bool, server: str | None, follow: bool, lines: int | None) -> int:
    """Shows the log of one rank of RUN, a name or a run folder: its start, events, steps now and then, errors. With a service:
    of a job of it."""
    if (url := asked_server(server)) is not None:
        return _of_service(url, run, rank, ray=ray, follow=follow, lines=lines)
    if follow:
        raise CommandError("only a job of a service can be followed", "--server URL, or leave --follow out")
    folder = run_folder(run, directory)
    path = folder.logs / ("ray.log" if ray else f"rank-{rank:04d}.log")
    if not path.exists():
        known = ", ".join(sorted(file.name for file in folder.logs.glob("*.log")))
        raise CommandError(
            f"there is no log {path.name}", f"known: {known or 'none'}", ExitCode.NOT_FOUND, where=str(folder.logs)
        )
    with path.open(encoding="utf-8", errors="replace") as file:
        shown = deque(file, maxlen=lines)
    for line in shown:
        click.echo(line, nl=False)
    if not shown:
        click.echo(f"{path.name} is empty: nothing was printed", err=True)
    return ExitCode.DONE


def _of_service(url: str, name: str, rank: int, *, ray: bool, follow: bool, lines: int | None) -> int:
    if ray or (follow and lines):
        what = "--ray is" if ray else "--follow with --lines is"
        raise CommandError(f"{what} not offered by a service", "leave it out")
    with service(url) as client:
        pieces = client.logs(name, rank=rank, follow=follow)
        if lines:
            pieces = iter("".join(pieces).splitlines(keepends=True)[-lines:])
        for piece in pieces:
            click.echo(piece, nl=False)
    return ExitCode.DONE
