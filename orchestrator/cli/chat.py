"""`shardwise chat SOURCE`: a conversation with a trained model, in a terminal or line by line from a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.cli.errors import CommandError, ExitCode
from orchestrator.cli.generate import load_speaker
from orchestrator.cli.runs import directory_option

if TYPE_CHECKING:
    from orchestrator.training.chat import Answer, Chat, Sampling

ANEW = "/reset starts anew"


@click.command("chat")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--system", default="", metavar="TEXT", help="What the model is told before the conversation.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of an answer at most."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.7,
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
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same answers.")
@directory_option
@click.option("--json", "as_json", is_flag=True, help="Print {turn, prompt, text, num_tokens, ended} for each answer.")
def command(
    source: Path,
    system: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    directory: str,
    as_json: bool,
) -> int:
    """Talks with the newest whole checkpoint of SOURCE, a run's name or folder, or with the checkpoint SOURCE.

    The conversation is written by the chat template of the run's tokenizer, else by Alpaca's. Where standard input is no
    terminal, each line of it is one turn of the user. /reset starts anew, /quit or the end of the input ends the chat, Ctrl-C an
    answer."""
    from orchestrator.training.chat import Chat, Sampling
    from orchestrator.training.data import DataError
    from orchestrator.training.templates import template_of

    ref, tokenizer, model = load_speaker(source, directory)
    data = ref.manifest["job"].get("data") or {}
    try:
        template = template_of(tokenizer, data.get("template", "auto"))
        chat = Chat(model, tokenizer, template, system=system)
    except DataError as error:
        raise CommandError(str(error)) from None
    if ref.manifest["job"].get("task", "pretrain") == "pretrain":
        click.echo(
            "note: this model was trained on text, not to answer (task: pretrain); `generate` goes on from a text",
            err=True,
        )
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    typed = sys.stdin.isatty()
    if typed:
        click.echo(f"{ref.path}: Ctrl-C ends an answer, {ANEW}, /quit or Ctrl-D ends the chat", err=True)
    for line in _typed() if typed else _piped():
        if line == "/quit":
            break
        if line == "/reset":
            chat.reset()
        elif typed:
            try:
                _turn(chat, line, sampling, as_json=as_json, typed=True)
            except CommandError as error:
                click.echo(f"{error.message}; {error.fix}" if error.fix else error.message, err=True)
        else:
            _turn(chat, line, sampling, as_json=as_json, typed=False)
    return ExitCode.DONE


def _turn(chat: Chat, question: str, sampling: Sampling, *, as_json: bool, typed: bool) -> None:
    """One question and its answer, shown as it comes. CommandError where it cannot be asked."""
    from orchestrator.training.chat import ContextFull
    from orchestrator.training.data import DataError

    try:
        answer = chat.ask(question, sampling)
    except ContextFull as error:
        raise CommandError(str(error), f"{ANEW}, and a lower --max-tokens leaves room for more turns") from None
    except DataError as error:
        raise CommandError(str(error)) from None
    try:
        for piece in answer:
            if not as_json:
                click.echo(piece, nl=False)
                sys.stdout.flush()
    except KeyboardInterrupt:
        if not typed:
            raise
    chat.keep(question, answer.text)
    click.echo(json.dumps(_told(chat, question, answer), ensure_ascii=False) if as_json else "")
    if answer.ended == "context" and not as_json:
        click.echo(f"(the context is full, and the answer was cut: {ANEW})", err=True)


def _told(chat: Chat, question: str, answer: Answer) -> dict[str, object]:
    return {
        "turn": chat.num_answers,
        "prompt": question,
        "text": answer.text,
        "num_tokens": answer.num_tokens,
        "ended": answer.ended,
    }


def _typed() -> Iterator[str]:
    """Lines that a person types. Ctrl-C gives up a line, Ctrl-D ends them."""
    import readline  # noqa: F401  (the keys of `input`: history, editing)

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            continue
        if line:
            yield line


def _piped() -> Iterator[str]:
    """Lines of standard input that hold something."""
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise CommandError(f"line {number} is not UTF-8, by its byte 0x{raw[error.start]:02x}") from None
        if line:
            yield line
