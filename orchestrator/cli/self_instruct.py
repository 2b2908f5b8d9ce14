"""`shardwise self-instruct SEEDS OUT`: a model writes instruction data from seed tasks (arXiv:2212.10560)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from orchestrator.cli.errors import CommandError, ExitCode
from orchestrator.cli.runs import directory_option

if TYPE_CHECKING:
    from orchestrator.training.self_instruct.generator import Generator
    from orchestrator.training.self_instruct.journal import State


@click.command("self-instruct")
@click.argument("seeds", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="A run or a checkpoint; with --endpoint the model's name there.")
@click.option("--endpoint", metavar="URL", help="OpenAI-compatible, https://HOST/v1. The key is in OPENAI_API_KEY.")
@click.option(
    "--api",
    type=click.Choice(["chat", "completions"]),
    help="What the endpoint is asked by.  [default: chat]",
)
@click.option("--count", type=click.IntRange(min=1), default=100, show_default=True, help="Tasks to generate in all.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same prompts.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True, help="Of new instructions."
)
@click.option(
    "--top-p", type=click.FloatRange(min=0, max=1), default=0.5, show_default=True, help="Of new instructions."
)
@click.option(
    "--max-similarity",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.7,
    show_default=True,
    help="ROUGE-L to any other instruction, from which on one is left out.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=120,
    show_default=True,
    help="Seconds for one answer of the endpoint.",
)
@directory_option
@click.option("--json", "as_json", is_flag=True, help="Print {out, journal, tasks, samples, rounds, rejected}.")
def command(
    seeds: Path,
    out: Path,
    model: str,
    endpoint: str | None,
    api: Literal["chat", "completions"] | None,
    count: int,
    seed: int,
    temperature: float,
    top_p: float,
    max_similarity: float,
    timeout: float,
    directory: str,
    as_json: bool,
) -> int:
    """Grows the tasks of SEEDS into --count new ones, written to OUT as Alpaca's JSONL, which `task: sft` reads.

    The model proposes tasks, says which are classifications and writes their instances; what is too similar to another task, or
    asks for more than text, is left out and counted. The same command goes on where it stopped; OUT.journal holds every decision.
    """
    from importlib.util import find_spec

    if find_spec("rapidfuzz") is None:
        raise CommandError("the package rapidfuzz is not installed", fix="pip install 'shardwise[data]'")
    from orchestrator.training.data import DataError
    from orchestrator.training.self_instruct.generator import GeneratorFailed
    from orchestrator.training.self_instruct.journal import journal_of, opened
    from orchestrator.training.self_instruct.loop import Barren, SelfInstruct, Settings, identity
    from orchestrator.training.self_instruct.tasks import read_seeds

    settings = Settings(seed=seed, temperature=temperature, top_p=top_p, max_similarity=max_similarity)
    failure: CommandError | None = None
    try:
        tasks = read_seeds(seeds)
        generator = _local(model, directory, api) if endpoint is None else _remote(endpoint, model, api, timeout)
        with opened(out, identity(tasks, settings, generator)) as journal:
            run = SelfInstruct(tasks, generator, settings, journal)
            try:
                with _progress_bar(journal.state, count, shown=not as_json) as changed:
                    run.grow(count, changed)
            except GeneratorFailed as error:
                failure = CommandError(str(error), error.fix, ExitCode.FAILED)
            except Barren as error:
                fix = f"look at what it wrote, in {journal_of(out)}; try another model, other seeds or another --temperature"
                failure = CommandError(str(error), fix, ExitCode.FAILED)
            state = journal.state
    except DataError as error:
        raise CommandError(str(error)) from None
    click.echo(_told(state, out, count, as_json=as_json))
    if failure is not None:
        raise failure
    return ExitCode.DONE


def _local(source: str, directory: str, api: str | None) -> Generator:
    from orchestrator.cli.generate import load_speaker
    from orchestrator.training.self_instruct.local import LocalGenerator
    from orchestrator.training.templates import template_of

    if api is not None:
        raise CommandError("--api is of an endpoint, and none is named", fix="leave it out, or say --endpoint URL")
    ref, tokenizer, model = load_speaker(Path(source), directory)
    job = ref.manifest["job"]
    answers = job.get("task", "pretrain") != "pretrain"
    template = template_of(tokenizer, (job.get("data") or {}).get("template", "auto")) if answers else None
    name = f"{ref.path.absolute().parent.parent.name}/{ref.path.name}"
    return LocalGenerator(name=name, model=model, tokenizer=tokenizer, template=template)


def _remote(url: str, model: str, api: Literal["chat", "completions"] | None, timeout_s: float) -> Generator:
    from orchestrator.training.self_instruct.endpoint import KEY_VARIABLE, EndpointGenerator

    key = os.environ.get(KEY_VARIABLE, "").strip() or None
    try:
        return EndpointGenerator(url=url, model=model, api=api or "chat", key=key, timeout_s=timeout_s)
    except ValueError as error:
        raise CommandError(str(error)) from None


@contextmanager
def _progress_bar(state: State, count: int, *, shown: bool) -> Iterator[Callable[[State], None]]:
    """A bar of accepted tasks on standard error while a person waits, gone when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield lambda state: None
        return
    columns = (
        TextColumn("new tasks"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rejected]} rejected"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("new tasks", total=count, completed=state.num_accepted, rejected=state.rejected.total())
        yield lambda state: bar.update(task, completed=state.num_accepted, rejected=state.rejected.total())


def _told(state: State, out: Path, count: int, *, as_json: bool) -> str:
    from orchestrator.training.self_instruct.journal import journal_of

    if as_json:
        told = {
            "out": str(out),
            "journal": str(journal_of(out)),
            "tasks": state.num_accepted,
            "samples": state.num_samples,
            "rounds": state.num_rounds,
            "rejected": dict(state.rejected.most_common()),
        }
        return json.dumps(told, ensure_ascii=False, indent=1)
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in state.rejected.most_common())
    return (
        f"{out}: {state.num_accepted:,} of {count:,} tasks, {state.num_samples:,} samples, after {state.num_rounds:,} rounds\n"
        f"  rejected   {state.rejected.total():,}{f': {reasons}' if reasons else ''}"
    )
