"""The verbs that are thin clients of `shardwise serve`: submit, list, watch, pause, resume, cancel, nodes, cordon, uncordon."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.errors import CommandError, ExitCode
from orchestrator.cli.remote import ENDS, server_option, service, show_job
from orchestrator.cli.remote import watch as watched

json_option: Callable[[Any], Any] = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command("submit")
@click.argument("job")
@click.option("--wait/--detach", default=False, help="Watch it until it ends, or return at once [default: --detach].")
@server_option
@json_option
def submit(job: str, wait: bool, server: str | None, as_json: bool) -> int:
    """Submits JOB, a YAML file; its paths are those of the service's root. The same job again is the same job.

    With --wait, exit codes: 0 it succeeded; 1 it failed; 5 it was cancelled."""
    try:
        text = Path(job).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        told = getattr(error, "strerror", None) or str(error)
        raise CommandError(f"it cannot be read: {told}", "name a YAML file", where=job) from None
    with service(server) as client:
        made = client.submit(text)
        if not wait:
            show_job(made, as_json=as_json)
            return ExitCode.DONE
        if as_json:
            *_, made = client.watch(made["name"])
            show_job(made, as_json=True)
        else:
            made = watched(client, made["name"])
        return ENDS[made["state"]]


@click.command("list")
@click.option(
    "--state", multiple=True, metavar="STATE", help="Only these: queued, running, failed, ...; may be repeated."
)
@server_option
@json_option
def list_(state: tuple[str, ...], server: str | None, as_json: bool) -> int:
    """Lists the service's jobs, oldest first."""
    with service(server) as client:
        jobs = list(client.jobs(states=state))
    if as_json:
        click.echo(json.dumps(jobs, indent=1))
        return ExitCode.DONE
    if not jobs:
        click.echo("no jobs")
        return ExitCode.DONE
    width = max(len(job["name"]) for job in jobs)
    for job in jobs:
        steps = f"{job['step']:,}" + (f" / {job['num_steps']:,}" if job["num_steps"] else "")
        gpus = "-" if job["num_gpus"] is None else job["num_gpus"]
        click.echo(
            f"{job['name']:<{width}}  {job['state']:<10}  {job['user']}  {gpus:>4} GPUs  {steps:>15}  {job['cause']}"
        )
    return ExitCode.DONE


@click.command("watch")
@click.argument("name")
@server_option
def watch(name: str, server: str | None) -> int:
    """Shows job NAME as it goes on, until it ends. Exit codes: 0 it succeeded; 1 it failed; 5 it was cancelled."""
    with service(server) as client:
        return ENDS[watched(client, name)["state"]]


def _asking(verb: str, text: str) -> click.Command:
    def command(name: str, server: str | None, as_json: bool) -> int:
        with service(server) as client:
            show_job(getattr(client, verb)(name), as_json=as_json)
        return ExitCode.DONE

    command.__doc__ = text
    return click.command(verb)(click.argument("name")(server_option(json_option(command))))


pause = _asking("pause", "Stops job NAME after a checkpoint; `resume` lets it go on.")
resume = _asking("resume", "Puts job NAME, paused or failed, back into the queue.")
cancel = _asking("cancel", "Ends job NAME for good; its newest checkpoint is kept.")


def _show_nodes(nodes: list[dict[str, Any]], as_json: bool) -> int:
    if as_json:
        click.echo(json.dumps(nodes, indent=1))
        return ExitCode.DONE
    for node in nodes:
        held = f"  {', '.join(node['jobs'])}" if node["jobs"] else ""
        cordoned = "  cordoned" if node["cordoned"] else ""
        click.echo(f"{node['name']}  {node['num_free']} of {node['num_gpus']} {node['gpu']} free{cordoned}{held}")
    return ExitCode.DONE


@click.command("nodes")
@server_option
@json_option
def nodes(server: str | None, as_json: bool) -> int:
    """Shows the service's machines, their free GPUs and their jobs."""
    with service(server) as client:
        return _show_nodes(client.nodes(), as_json)


def _cordoning(verb: str, cordoned: bool, text: str) -> click.Command:
    def command(node: str, server: str | None, as_json: bool) -> int:
        with service(server) as client:
            return _show_nodes(client.cordon(node, cordoned=cordoned), as_json)

    command.__doc__ = text
    return click.command(verb)(click.argument("node")(server_option(json_option(command))))


cordon = _cordoning("cordon", True, "Starts no more jobs on NODE; those that run there go on.")
uncordon = _cordoning("uncordon", False, "Starts jobs on NODE again.")
