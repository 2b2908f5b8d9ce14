"""Conversations -> text -> tokens: Alpaca's template, or a chat template as tokenizers bring it (jinja2, in a sandbox).

A template gives pieces; a piece is learned or not. Pieces are tokenized apart, as a model meets them when it answers: the prompt
is there whole before the first token of the answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import numpy as np

from orchestrator.training.collect import Fault, Place
from orchestrator.training.data import DataError
from orchestrator.training.examples import Conversation, Message, Messages, Preference
from orchestrator.training.packing import Sample
from orchestrator.training.tokenizer import HuggingFaceTokenizer, Tokenizer

MAX_TEMPLATE_BYTES = 2**16


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A stretch of text, and whether the model is trained to write it."""

    text: str
    learn: bool


class Template(Protocol):
    """How a conversation is written down."""

    @property
    def ends_text(self) -> bool:
        """Whether the end of a text follows the last answer and is learned; a chat template writes its own."""

    def pieces(self, messages: Messages) -> list[Piece]:
        """The text of a conversation that ends with an answer, or of a prompt up to where the answer begins."""
        ...


class AlpacaTemplate:
    """The template of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, train.py), further turns in the same form."""

    ends_text = True
    WITH_INPUT = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
    )
    WITHOUT_INPUT = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )

    def pieces(self, messages: Messages) -> list[Piece]:
        pieces = []
        asked = ""
        for number, message in enumerate(messages):
            match message.role:
                case "system":
                    asked = f"{message.content}\n\n"
                case "user":
                    if number == 0:
                        asked = self.WITH_INPUT if message.context else self.WITHOUT_INPUT
                    asked += f"### Instruction:\n{message.content}\n\n"
                    asked += f"### Input:\n{message.context}\n\n" if message.context else ""
                    pieces.append(Piece(text=f"{asked}### Response:", learn=False))
                case _:
                    pieces.append(Piece(text=message.content, learn=message.learn))
                    asked = "\n\n"
        return pieces


class PlainTemplate:
    """Each turn on a line of its own, and nothing else: for small models and short rows."""

    ends_text = True

    def pieces(self, messages: Messages) -> list[Piece]:
        pieces = []
        for number, message in enumerate(messages):
            answer = message.role == "assistant"
            before = "\n" if number and not answer else ""
            after = "" if answer else "\n"
            pieces.append(Piece(text=f"{before}{message.text}{after}", learn=answer and message.learn))
        return pieces


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A jinja2 template over `messages`, `bos_token`, `eos_token` and `add_generation_prompt`, as transformers renders it."""

    source: str
    bos_token: str = ""
    eos_token: str = ""
    ends_text: bool = False
    _compiled: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_compiled", _compiled(self.source))

    def pieces(self, messages: Messages) -> list[Piece]:
        """DataError where the template cannot be rendered, or writes what came before otherwise when more follows."""
        pieces: list[Piece] = []
        written = ""
        for number, message in enumerate(messages):
            if message.role == "assistant":
                before = self._render(messages[:number], add_generation_prompt=True)
                after = self._render(messages[: number + 1], add_generation_prompt=False)
                _refuse_other(before, written)
                _refuse_other(after, before)
                pieces += [
                    Piece(text=before[len(written) :], learn=False),
                    Piece(text=after[len(before) :], learn=message.learn),
                ]
                written = after
        if messages[-1].role != "assistant":
            before = self._render(messages, add_generation_prompt=True)
            _refuse_other(before, written)
            pieces.append(Piece(text=before[len(written) :], learn=False))
        return pieces

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        import jinja2

        try:
            return str(
                self._compiled.render(
                    messages=[{"role": message.role, "content": message.text} for message in messages],
                    bos_token=self.bos_token,
                    eos_token=self.eos_token,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template cannot be rendered: {error}") from None
        except (
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            OverflowError,
        ) as error:  # of the template's own acts
            raise DataError(f"the chat template cannot be rendered: {type(error).__name__}: {error}") from None


def chat_template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template that a tokenizer's configuration brings. DataError where it brings none."""
    config = tokenizer.config if isinstance(tokenizer, HuggingFaceTokenizer) else {}
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        raise DataError("the tokenizer brings no chat template: use Alpaca's, or give one")
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    tokens = {
        word: tokenizer.inner.id_to_token(token) or ""
        for word in ("bos", "eos")
        if (token := tokenizer.special_ids[f"{word}_token_id"]) is not None
    }
    return ChatTemplate(source=source, bos_token=tokens.get("bos", ""), eos_token=tokens.get("eos", ""))


def template_of(tokenizer: Tokenizer, wanted: str = "auto") -> Template:
    """The template that `data.template` names: alpaca, chat, plain, or auto, which is the tokenizer's chat template where it
    brings one, else Alpaca's. DataError where a chat template is wanted and there is none."""
    if wanted == "plain":
        return PlainTemplate()
    brings = isinstance(tokenizer, HuggingFaceTokenizer) and "chat_template" in tokenizer.config
    if wanted == "chat" or (wanted == "auto" and brings):
        return chat_template_of(tokenizer)
    return AlpacaTemplate()


def _compiled(source: str) -> Any:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if len(source.encode("utf-8", errors="replace")) > MAX_TEMPLATE_BYTES:
        raise DataError(f"the chat template is larger than {MAX_TEMPLATE_BYTES:,} bytes")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **named: json.dumps(value, ensure_ascii=False, **named)
    environment.globals["raise_exception"] = _raise
    # Without strftime_now: templates that know today fall back to a fixed day, and samples stay the same tomorrow.
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"the chat template is none: line {error.lineno}: {error.message}") from None


def _raise(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _refuse_other(text: str, beginning: str) -> None:
    if not text.startswith(beginning):
        same = next((i for i, (one, other) in enumerate(zip(text, beginning, strict=False)) if one != other), len(text))
        raise DataError(
            "the chat template cannot be trained with: with a further turn it writes the turns before it otherwise, "
            f"{text[same : same + 30]!r} in place of {beginning[same : same + 30]!r}"
        )


# Tokens --------------------------------------------------------------------------------------------------------------


def encode(messages: Messages, template: Template, tokenizer: Tokenizer) -> Sample:
    """The tokens of a conversation, learned where an answer is."""
    pieces = [piece for piece in template.pieces(messages) if piece.text]
    encoded = tokenizer.encode_batch([piece.text for piece in pieces])
    ids = [np.asarray(part, dtype=np.int64) for part in encoded]
    learn = [np.full(len(part), piece.learn) for part, piece in zip(ids, pieces, strict=True)]
    last = messages[-1]
    if template.ends_text and last.role == "assistant":
        ids.append(np.array([tokenizer.end_of_text], dtype=np.int64))
        learn.append(np.array([last.learn]))
    return Sample(ids=np.concatenate(ids), learn=np.concatenate(learn).astype(np.bool_))


def samples(
    places: Sequence[Place], template: Template, tokenizer: Tokenizer, *, max_tokens: int
) -> tuple[list[tuple[Place, list[Sample]]], list[Fault]]:
    """(each example that fits with its samples, those that do not): one sample of a conversation or a prompt, two of a
    preference, the chosen answer first. Nothing is cut: an example longer than the context is a fault, and so is a text that
    holds a special token, by which it could end its own turn. The caller judges the faults (collect.judge)."""
    special = special_tokens(tokenizer)
    found: list[tuple[Place, list[Sample]]] = []
    faults: list[Fault] = []
    for place in places:
        turns = written(place)
        texts = {text for messages in turns for message in messages for text in (message.content, message.context)}
        if hidden := sorted(token for token in special if any(token in text for text in texts)):
            reason = f"holds the special token {hidden[0]}"
            faults.append(Fault(where=place.where, kind="special token", reason=reason))
            continue
        both = [encode(messages, template, tokenizer) for messages in turns]
        if (length := sum(len(sample.ids) for sample in both)) > max_tokens:
            reason = f"has {length:,} tokens, and the context {max_tokens:,}"
            faults.append(Fault(where=place.where, kind="too long", reason=reason))
            continue
        found.append((place, both))
    return found, faults


def written(place: Place) -> list[Messages]:
    """The conversations of an example, each a sample: both of a preference."""
    match place.example:
        case Conversation(messages=messages):
            return [messages]
        case Preference(prompt=prompt, chosen=chosen, rejected=rejected):
            return [(*prompt, Message(role="assistant", content=answer)) for answer in (chosen, rejected)]
        case _:
            return [place.example.prompt]


def special_tokens(tokenizer: Tokenizer) -> frozenset[str]:
    """The texts that a tokenizer reads as one special token, wherever they stand. Bytes have none."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return frozenset()
    added = tokenizer.inner.get_added_tokens_decoder().values()
    return frozenset(token.content for token in added if token.special)
