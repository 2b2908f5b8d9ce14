"""`shardwise logs RUN`: what a worker printed."""

from __future__ import annotations

from collections import deque

import click

from orchestrator.cli.errors import CommandError, ExitCode
from orchestrator.cli.runs import directory_option, run_folder


@click.command("logs")
@click.argument("run")
@directory_option
@click.option("--rank", type=click.IntRange(0), default=0, show_default=True, help="Whose log.")
@click.option("--ray", is_flag=True, help="In place of a rank's: what the process that holds Ray printed.")
@click.option("-n", "--lines", type=click.IntRange(1), help="Only the last lines.")
def command(run: str, directory: str, rank: int, ray: bool, lines: int | None) -> int:
    """Shows the log of one rank of RUN, a name or a run folder: its start, events, steps now and then, errors."""
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
