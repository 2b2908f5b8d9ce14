"""`shardwise generate SOURCE --prompt TEXT`: what a trained model goes on to say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.cli.convert import find_checkpoint
from orchestrator.cli.errors import CommandError, ExitCode
from orchestrator.cli.runs import directory_option

if TYPE_CHECKING:
    from orchestrator.models.decoder import Decoder
    from orchestrator.training.manifest import CheckpointRef
    from orchestrator.training.tokenizer import Tokenizer


@click.command("generate")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="Text to go on from. Absent: the start of a text.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=100, show_default=True, help="New tokens at most.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.8,
    show_default=True,
    help="Lower is likelier and duller; 0 always takes the likeliest token.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1),
    default=0.95,
    show_default=True,
    help="Draw from the likeliest tokens that together have this probability.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same text.")
@directory_option
@click.option("--json", "as_json", is_flag=True, help="Print {checkpoint, step, prompt, text, num_tokens, ended}.")
def command(
    source: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    directory: str,
    as_json: bool,
) -> int:
    """Samples text from the newest whole checkpoint of SOURCE, a run's name or folder, or from the checkpoint SOURCE."""
    from orchestrator.training.blanks import specials_of
    from orchestrator.training.generate import fill, generate

    ref, tokenizer, model = load_speaker(source, directory)
    go_on: Callable[..., Iterator[int]] = generate
    if model.arch.traits.blank_filling:
        go_on = partial(fill, specials=specials_of(tokenizer, model.arch.vocab_size))
    try:
        new = list(
            go_on(
                model,
                tokenizer.encode(prompt) or [tokenizer.end_of_text],
                max_tokens=max_tokens,
                vocab_size=tokenizer.vocab_size,
                end_of_text=tokenizer.end_of_text,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            )
        )
    except ValueError as error:
        raise CommandError(str(error)) from None
    text = tokenizer.decode(new)
    told = {
        "checkpoint": str(ref.path),
        "step": ref.step,
        "prompt": prompt,
        "text": text,
        "num_tokens": len(new),
        "ended": "max_tokens" if len(new) == max_tokens else "end_of_text",
    }
    click.echo(json.dumps(told, ensure_ascii=False, indent=1) if as_json else prompt + text)
    return ExitCode.DONE


def load_speaker(source: Path, directory: str) -> tuple[CheckpointRef, Tokenizer, Decoder]:
    """The newest whole checkpoint of a run, or the checkpoint at a path, with its tokenizer and its model. CommandError where
    there is none."""
    from orchestrator.training.data import DataError
    from orchestrator.training.generate import load_model
    from orchestrator.training.manifest import CheckpointRefused
    from orchestrator.training.tokenizer import kept_tokenizer

    ref = find_checkpoint(source, directory)
    try:
        tokenizer = kept_tokenizer(ref.path.absolute().parent.parent)
        model = load_model(ref)
    except (DataError, CheckpointRefused) as error:
        raise CommandError(str(error)) from None
    if tokenizer.fingerprint != ref.manifest["data"].get("tokenizer"):
        raise CommandError(
            f"the tokenizer beside {ref.path} is not the one that the checkpoint was trained with",
            fix="put the run folder's `tokenizer` back as it was",
        )
    return ref, tokenizer, model
