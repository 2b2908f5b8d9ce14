"""`shardwise status [RUN]`: how far the runs of a folder are."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from orchestrator.cli.errors import CommandError, ExitCode
from orchestrator.cli.remote import asked_server, server_option, service, show_job
from orchestrator.cli.runs import chain_folder, chain_folders, directory_option, links_of, run_folder, run_folders

if TYPE_CHECKING:
    from orchestrator.control.folder import RunFolder


WIDE = 200
"""Columns where there is no terminal: a program that reads lines gets one a run."""


@click.command("status")
@click.argument("run", required=False)
@directory_option
@server_option
@click.option("--json", "as_json", is_flag=True, help="Print a list of {name, state, step, steps, loss, ...}.")
def command(run: str | None, directory: str, server: str | None, as_json: bool) -> int:
    """Shows how far RUN is, a name or a run folder, or how far each link of a chain is; without it, all runs of the directory.
    With a service: a job of it."""
    if (url := asked_server(server)) is not None:
        if run is None:
            raise CommandError("status of a service is that of one job", "name it; `shardwise list` shows all")
        with service(url) as client:
            show_job(client.job(run), as_json=as_json)
        return ExitCode.DONE
    chain = None if run is None else chain_folder(run, directory)
    if chain is not None:
        rows = rows_of(chain)
    elif run is not None:
        rows = [status(run_folder(run, directory))]
    else:
        rows = [status(folder) for folder in run_folders(directory)]
        rows += [row for folder in chain_folders(directory) for row in rows_of(folder)]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return ExitCode.DONE
    if not rows:
        click.echo(f"no run in {directory}")
        return ExitCode.DONE
    print_table(rows, width=None if sys.stdout.isatty() else WIDE)
    return ExitCode.DONE


def print_table(rows: list[dict[str, Any]], *, width: int | None = None) -> None:
    """A line a run, in so many columns, or in those of the terminal; where they do not suffice, names go on in a second line."""
    from rich.console import Console
    from rich.table import Table

    each = "worker" if all(row["on_cpu"] for row in rows) else "GPU"
    cells = []
    for row in rows:
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        speed = "" if row["tokens_per_second_per_gpu"] is None else f"{row['tokens_per_second_per_gpu']:,.0f}"
        steps = f"{row['step']:,}" + (f" / {row['steps']:,}" if row["steps"] else "")
        at = row["last_step_unix_s"]
        cells.append((row["name"], row["state"], steps, loss, speed, "" if at is None else ago(time.time() - at)))
    table = Table(box=None, pad_edge=False)
    table.add_column("run", header_style="dim", overflow="fold")  # the one that gives way
    for index, name in enumerate(("state", "step", "loss", f"tokens/s/{each}", "ago"), start=1):
        needed = max(len(name), *(len(line[index]) for line in cells))
        justify: Literal["left", "right"] = "left" if name == "state" else "right"
        table.add_column(name, justify=justify, header_style="dim", no_wrap=True, min_width=needed)
    for line in cells:
        table.add_row(*line)
    Console(highlight=False, width=width).print(table)


def ago(seconds: float) -> str:
    """How long ago the last step was, in the largest unit that fits."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def status(folder: RunFolder) -> dict[str, Any]:
    """Return the status of one run, from its folder. `killed`: nobody runs it, and it never came to an end."""
    from orchestrator.control.folder import holder
    from orchestrator.telemetry.records import Event, finite, read, recent
    from orchestrator.telemetry.report import state_of

    reports, events = recent(folder.metrics), list(read(folder.events, Event))
    state, cause = state_of(events)
    pid = holder(folder)
    if state == "running" and pid is None:
        state = "killed" if events else "not begun"
    plan = json.loads(folder.plan.read_text(encoding="utf-8")) if folder.plan.exists() else {}
    last = reports[-1] if reports else None
    return {
        "name": folder.path.name,
        "state": state,
        "cause": cause,
        "step": last.step if last else 0,
        "steps": plan.get("job", {}).get("steps"),
        "loss": finite(last.loss) if last else None,
        "tokens_per_second_per_gpu": last.tokens_per_second_per_gpu if last else None,
        "last_step_unix_s": last.time_unix_s if last else None,
        "restarts": sum(event.kind == "restart" for event in events),
        "process": pid,
        "on_cpu": plan.get("cluster", {}).get("gpu") == "cpu",
        "directory": str(folder.path.resolve()),
    }


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The status of each link of a chain, in their order; of one that has not begun, what is known."""
    from orchestrator.control.folder import RunFolder

    rows = []
    for name, steps in links_of(folder):
        run: RunFolder = RunFolder(folder / name)
        begun = run.job.exists() or run.events.exists()
        row = status(run) | {"name": f"{folder.name}/{name}"}
        if not begun:
            row |= {"state": "not begun", "steps": steps}
        rows.append(row)
    return rows
