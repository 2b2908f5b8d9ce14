"""shardwise schema: what an editor needs to complete and check a job file."""

from __future__ import annotations

import json

import click

from orchestrator.cli.errors import ExitCode


@click.command("schema")
def command() -> int:
    """Prints the JSON Schema (draft 2020-12) of a job file."""
    from orchestrator.spec.reference import json_schema

    click.echo(json.dumps(json_schema(), indent=1))
    return ExitCode.DONE
