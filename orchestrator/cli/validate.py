"""shardwise validate JOB: every fault of a job, with its place and its fix."""

from __future__ import annotations

import json

import click

from orchestrator.cli.errors import ExitCode
from orchestrator.spec import Job, SpecError
from orchestrator.spec.acting import unbuilt
from orchestrator.spec.chain import Chain, entries, load
from orchestrator.spec.errors import ErrorEntry, place
from orchestrator.spec.files import missing


@click.command("validate")
@click.argument("job")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print {valid, name, errors[{file, line, column, message, fix}], notes[the same]}.",
)
def command(job: str, as_json: bool) -> int:
    """Checks JOB, a YAML file, and shows all of its faults at once. Nothing is planned or started. A note tells what can be
    planned and not run, such as text that is not here; it leaves the exit code 0."""
    if not as_json:
        loaded = load(job)
        parts = [_summary(loaded)] if isinstance(loaded, Job) else [_chain(loaded), *map(_summary, loaded.links)]
        click.echo("\n".join([*parts, *_notes(loaded)]))
        return ExitCode.DONE
    try:
        loaded = load(job)
    except SpecError as error:
        click.echo(json.dumps({"valid": False, "name": None, "errors": error.errors, "notes": []}, indent=1))
        return error.exit_code
    told = {"valid": True, "name": loaded.name, "errors": [], "notes": notes(loaded)}
    click.echo(json.dumps(told, indent=1))
    return ExitCode.DONE


def notes(job: Job | Chain) -> list[ErrorEntry]:
    """Return what keeps a valid job or chain from running: settings that nothing acts on yet, and files that are not here."""
    return [*unbuilt(job), *missing(job)] if isinstance(job, Job) else entries(job)


def _chain(chain: Chain) -> str:
    way = ", then ".join(
        f"{job.name} ({job.task}{f' from {names}' if (names := ' and '.join(sources)) else ''})"
        for job, sources in zip(chain.links, chain.sources, strict=True)
    )
    return f"{chain.file} is a valid chain: {chain.name}: {way}"


def _notes(job: Job | Chain) -> list[str]:
    return [
        f"note: {entry['message']}; `run` refuses it\n  {place(entry)}\n  to fix: {entry['fix']}"
        for entry in notes(job)
    ]


def _summary(job: Job) -> str:
    from orchestrator.models.architecture import num_parameters

    cluster, steps = job.resolved_cluster, job.num_steps
    where = (
        f"{cluster.name} ({cluster.num_gpus} x {cluster.accelerator.name})" if cluster else "whatever this machine has"
    )
    length = f"{steps:,} steps" if steps else "no length yet"
    pins = len(job.strategy.model_fields_set)
    return (
        f"{job.file} is a valid job: {job.name}\n"
        f"  model     {job.architecture.name or job.architecture.family}, {num_parameters(job.architecture):,} parameters\n"
        f"  batch     {job.batch.global_batch_size:,} sequences of {job.batch.sequence_length:,} tokens, {length}\n"
        f"  cluster   {where}\n"
        f"  strategy  {f'{pins} choices pinned, the rest auto' if pins else 'auto'}"
    )
