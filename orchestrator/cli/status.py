"""`shardwise status [RUN]`: how far the runs of a folder are."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.errors import ExitCode
from orchestrator.cli.runs import directory_option, run_folder, run_folders

if TYPE_CHECKING:
    from orchestrator.control.folder import RunFolder


@click.command("status")
@click.argument("run", required=False)
@directory_option
@click.option("--json", "as_json", is_flag=True, help="Print a list of {name, state, step, steps, loss, ...}.")
def command(run: str | None, directory: str, as_json: bool) -> int:
    """Shows how far RUN is, a name or a run folder; without it, all runs of the directory."""
    folders = run_folders(directory) if run is None else [run_folder(run, directory)]
    rows = [status(folder) for folder in folders]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return ExitCode.DONE
    if not rows:
        click.echo(f"no run in {directory}")
        return ExitCode.DONE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, right in [("run", False), ("state", False), ("step", True), ("loss", True), ("tokens/s/GPU", True)]:
        table.add_column(name, justify="right" if right else "left", header_style="dim")
    table.add_column("last step", header_style="dim")
    for row in rows:
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        speed = "" if row["tokens_per_second_per_gpu"] is None else f"{row['tokens_per_second_per_gpu']:,.0f}"
        steps = f"{row['step']:,}" + (f" / {row['steps']:,}" if row["steps"] else "")
        at = row["last_step_unix_s"]
        when = "" if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
        table.add_row(row["name"], row["state"], steps, loss, speed, when)
    Console(highlight=False).print(table)
    return ExitCode.DONE


def status(folder: RunFolder) -> dict[str, Any]:
    """Of one run, from its folder. `killed`: nobody runs it, and it never came to an end."""
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
        "directory": str(folder.path.resolve()),
    }
