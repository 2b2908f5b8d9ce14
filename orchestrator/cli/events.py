"""`shardwise events RUN`: what happened to a run, with causes."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from orchestrator.cli.errors import ExitCode
from orchestrator.cli.remote import asked_server, clock, server_option, service
from orchestrator.cli.runs import directory_option, run_folder


@click.command("events")
@click.argument("run")
@directory_option
@server_option
@click.option("--kind", metavar="KIND", help="Only these: restart, checkpoint, evaluation, ...")
@click.option("--json", "as_json", is_flag=True, help="Print a list of {time_unix_s, kind, step, cause, details}.")
def command(run: str, directory: str, server: str | None, kind: str | None, as_json: bool) -> int:
    """Shows the events of RUN, a name or a run folder, oldest first. With a service: a job's transitions there."""
    if (url := asked_server(server)) is not None:
        with service(url) as client:
            told = [event for event in client.events(run) if kind is None or event["kind"] == kind]
        if as_json:
            click.echo(json.dumps(told, indent=1))
        for one in () if as_json else told:
            click.echo(f"{clock(one['time_unix_s'])}  {one['kind']:<18}  {one['cause']}")
        return ExitCode.DONE
    from orchestrator.telemetry.records import Event, finite, read

    events = [event for event in read(run_folder(run, directory).events, Event) if kind is None or event.kind == kind]
    if as_json:
        click.echo(json.dumps([finite(asdict(event)) for event in events], indent=1))
        return ExitCode.DONE
    for event in events:
        step = "" if event.step is None else event.step
        click.echo(f"{clock(event.time_unix_s)}  {step:>8}  {event.kind:<18}  {event.cause}")
    return ExitCode.DONE
