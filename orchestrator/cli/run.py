"""`shardwise run JOB`: train now, under a plan, on an embedded Ray or on the nodes of a Ray cluster."""

from __future__ import annotations

import json
import sys

import click

from orchestrator.cli.errors import CommandError
from orchestrator.cli.foreground import run_one, say
from orchestrator.spec.chain import Chain, load


@click.command("run")
@click.argument("job")
@click.option("--fresh", is_flag=True, help="Start over; the folder of the run before is kept under another name.")
@click.option("--directory", metavar="FOLDER", help="Parent of the run folder [default: checkpoint.directory].")
@click.option(
    "--metrics-port", type=click.IntRange(0, 65535), default=0, help="Prometheus port on loopback; 0: any [default: 0]."
)
@click.option(
    "--address",
    metavar="HOST:PORT",
    help="Ray cluster to train on, with token authentication [default: this machine alone].",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON; the progress goes to standard error.")
def command(job: str, fresh: bool, directory: str | None, metrics_port: int, address: str | None, as_json: bool) -> int:
    """Trains JOB on this machine or on a Ray cluster, or goes on where it stopped. Ctrl-C: checkpoint and stop; twice: stop now.

    Exit codes: 0 the last step is done; 1 the job failed; 2 it was refused before anything started; 3 the plan does not fit this
    machine; 4 Ray was lost for good; 5 it was stopped (the same command goes on)."""
    from orchestrator.cli.outlet import silence

    loaded = load(job, directory=directory)
    if isinstance(loaded, Chain):
        from orchestrator.cli.chain import run_chain

        if address is not None:
            raise CommandError(
                f"{loaded.name} is a chain, and chains are run on one machine", "leave --address out", where="--address"
            )
        return run_chain(loaded, fresh=fresh, metrics_port=metrics_port, as_json=as_json)
    told = run_one(
        loaded, directory=directory, fresh=fresh, metrics_port=metrics_port, address=address, to_stderr=as_json
    )
    try:
        if as_json:
            click.echo(json.dumps(told, indent=1))
        else:
            say(told, job)
    except OSError:  # nobody reads any more; the exit code still tells how it ended
        silence(sys.stdout)
        silence(sys.stderr)
    return int(told["exit_code"])
