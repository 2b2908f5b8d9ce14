"""A conversation with a model: what was said, written by its template, and the answer to it, piece by piece.

The template that a model was taught by also says where an answer ends: by a special token, or by the text that begins the next
turn, if not by the end of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.models.decoder import Decoder
from orchestrator.training.data import DataError
from orchestrator.training.examples import Message, Messages
from orchestrator.training.generate import generate
from orchestrator.training.templates import Template, encode, special_tokens
from orchestrator.training.tokenizer import HuggingFaceTokenizer, Tokenizer

MAX_BYTES = 4
"""Bytes of a character in UTF-8 at most. What a tokenizer gives for fewer of its bytes is U+FFFD, once or for each."""
Ended = Literal["end_of_answer", "max_tokens", "context", "interrupted"]


class ContextFull(ValueError):
    """A conversation that leaves no room for an answer."""

    def __init__(self, num_tokens: int, max_position: int) -> None:
        told = f"with it the conversation has {num_tokens:,} tokens, and the model sees {max_position:,}"
        super().__init__(f"the context is full: {told}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are drawn: see generate.generate."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ends:
    """The ends of an answer beside the end of the text. None of it belongs to the answer."""

    tokens: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()


class Answer:
    """The continuation of a prompt, as an iterator over pieces of text. No piece ends within a character, nor within
    what may become an end. Afterwards `text`, `num_tokens` and `ended` say what it was; `interrupted`: nobody read to the end.

    Raises ContextFull where the prompt leaves no room. The answer ends with the context, before its beginning is forgotten."""

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, prompt: Sequence[int], ends: Ends, sampling: Sampling
    ) -> None:
        self.text, self.num_tokens = "", 0
        self.ended: Ended = "interrupted"
        self._tokenizer, self._ends = tokenizer, ends
        room = model.arch.max_position - len(prompt)
        if room < 1:
            raise ContextFull(len(prompt), model.arch.max_position)
        self._limit = min(sampling.max_tokens, room)
        self._at_limit: Ended = "max_tokens" if sampling.max_tokens <= room else "context"
        self._tokens = generate(
            model,
            prompt,
            max_tokens=self._limit,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
        )

    def __iter__(self) -> Iterator[str]:
        ids: list[int] = []
        text, met = "", False
        for token in self._tokens:
            if met := token in self._ends.tokens:
                break
            ids.append(token)
            self.num_tokens = len(ids)
            text = self._tokenizer.decode(ids)
            places = [at for end in self._ends.texts if (at := text.find(end)) >= 0]
            if met := bool(places):
                text = text[: min(places)]
                break
            yield from self._grown(text[: len(text) - unsure(text, self._ends.texts)])
        yield from self._grown(text)
        self.ended = self._at_limit if len(ids) == self._limit and not met else "end_of_answer"

    def _grown(self, text: str) -> Iterator[str]:
        if new := text[len(self.text) :]:
            self.text += new
            yield new


def unsure(text: str, ends: Sequence[str]) -> int:
    """How many characters at the end of a text further tokens may change, or make a part of one of the ends."""
    whole = text.rstrip("�")
    half = min(len(text) - len(whole), MAX_BYTES - 1)
    before = text[: len(text) - half]
    return half + max((n for end in ends for n in range(1, len(end)) if before.endswith(end[:n])), default=0)


def ends_of(template: Template, tokenizer: Tokenizer) -> Ends:
    """Return what a template writes between an answer and the next question: the first special token, or its text where it has
    none."""
    answer, question = "\x02answer\x03", "\x02question\x03"
    said = (("user", question), ("assistant", answer), ("user", question))
    pieces = template.pieces(tuple(Message(role=role, content=text) for role, text in said))  # type: ignore[arg-type]
    _, _, after = pieces[1].text.partition(answer)
    following, _, _ = pieces[2].text.partition(question)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        special = {tokenizer.inner.token_to_id(token) for token in special_tokens(tokenizer)}
        found = next((token for token in tokenizer.encode(after + following) if token in special), None)
        if found is not None:
            return Ends(tokens=frozenset({found}))
    text = after.rstrip() or (after + following).rstrip()
    return Ends(texts=(text,) if text else ())


class Chat:
    """A conversation: the system's words, if any, then questions and answers in turn."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, template: Template, *, system: str = "") -> None:
        """Raises DataError where the model answers no conversation, or `system` cannot be written."""
        if model.arch.traits.blank_filling:
            raise DataError(
                f"a model of family {model.arch.family} fills blanks and holds no conversation: `shardwise generate` lets it "
                "fill in the rest of a text"
            )
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._ends = ends_of(template, tokenizer)
        self._refuse_special(system)
        self._before: Messages = (Message(role="system", content=system),) if system else ()
        self._turns: Messages = ()

    @property
    def num_answers(self) -> int:
        return len(self._turns) // 2

    def ask(self, question: str, sampling: Sampling) -> Answer:
        """The answer to a question after all that was said; `keep` makes both a part of it. Each answer has its own seed.

        Raises ContextFull, and DataError where the question cannot be written by the template."""
        self._refuse_special(question)
        prompt = encode(
            (*self._before, *self._turns, Message(role="user", content=question)), self._template, self._tokenizer
        )
        sampling = replace(sampling, seed=sampling.seed + self.num_answers)
        return Answer(self._model, self._tokenizer, prompt.ids.tolist(), self._ends, sampling)

    def keep(self, question: str, answer: str) -> None:
        """Makes a question and the answer to it a part of the conversation."""
        self._turns += (Message(role="user", content=question), Message(role="assistant", content=answer))

    def reset(self) -> None:
        """Forgets all but the system's words."""
        self._turns = ()

    def _refuse_special(self, text: str) -> None:
        if hidden := sorted(token for token in special_tokens(self._tokenizer) if token in text):
            raise DataError(f"{text[:40]!r} holds the special token {hidden[0]}, by which it would end its own turn")
