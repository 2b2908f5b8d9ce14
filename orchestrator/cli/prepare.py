"""`shardwise prepare JOB`: the job's text as tokens, made once and found again by every run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from orchestrator.cli.errors import CommandError, ExitCode
from orchestrator.spec import load_job

if TYPE_CHECKING:
    from orchestrator.training.prepare import Progress


@click.command("prepare")
@click.argument("job")
@click.option("--json", "as_json", is_flag=True, help="Print {directory, tokenizer, train_tokens, ...}.")
def command(job: str, as_json: bool) -> int:
    """Tokenizes the text of JOB. What is prepared already is used as it is; an attempt cut short goes on."""
    from orchestrator.training.data import DataError
    from orchestrator.training.inputs import notes, request_of, versions
    from orchestrator.training.prepare import prepare_job

    loaded = load_job(job)
    try:
        with progress_bar(shown=not as_json) as progress:
            index = prepare_job(loaded, progress=progress)
    except DataError as error:
        raise CommandError(str(error), where=str(loaded.file)) from None
    told = {
        "directory": str(index.directory),
        "tokenizer": index.tokenizer["kind"],
        "vocab_size": index.vocab_size,
        "num_files": len(index.sources),
        "num_documents": index.num_documents,
        "train_tokens": index.num_tokens("train"),
        "validation_tokens": index.num_tokens("validation"),
        "unigram_entropy": index.unigram_entropy,
        "fingerprint": index.fingerprint,
        "notes": notes(request_of(loaded), index),
    }
    if as_json:
        click.echo(json.dumps(told, indent=1))
        return ExitCode.DONE
    click.echo(
        f"{loaded.name}: {told['num_documents']:,} documents of {told['num_files']:,} files, "
        f"{told['train_tokens']:,} tokens to train on and {told['validation_tokens']:,} held out\n"
        f"  tokenizer  {told['tokenizer']}, {told['vocab_size']:,} tokens; a model that only counts them has a loss of "
        f"{index.unigram_entropy:.3f} nats\n"
        f"  kept in    {told['directory']}"
    )
    if empty := [source.path for source in index.sources if not source.num_documents]:
        click.echo(f"  no text in {', '.join(empty[:3])}" + (f" and {len(empty) - 3} more" if len(empty) > 3 else ""))
    if older := [str(folder) for folder in versions(request_of(loaded).directory) if folder != index.directory]:
        click.echo(
            f"  before     {', '.join(older)}: the text as it was; delete it when no run that began with it goes on"
        )
    for note in told["notes"]:
        click.echo(f"  {note}")
    return ExitCode.DONE


@contextmanager
def progress_bar(*, shown: bool) -> Iterator[Progress | None]:
    """A bar of bytes on standard error while a person waits, gone when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("tokenizing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
