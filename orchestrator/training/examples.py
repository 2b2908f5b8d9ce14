"""Examples that a model is taught beside plain text: conversations, preferences between answers, prompts; and the records that
hold them.

Pure: a parsed record in, examples out, or BadRecord with the reason. The forms are told apart by their keys:

    Alpaca, BELLE       {instruction, input, output}
    ShareGPT            {conversations: [{from: human, value}, {from: gpt, value}, ...]}
    messages            {messages: [{role: user, content}, {role: assistant, content}, ...]}
    Open-Assistant      {prompt: {text, role: prompter, replies: [{text, role: assistant, rank, replies: [...]}, ...]}}
    preferences         {prompt, chosen, rejected}: each a text or a list of messages
    prompts             {prompt} or {instruction, input}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
_ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
_FORMS = (
    "instruction and output (Alpaca, BELLE), conversations (ShareGPT), messages, or prompt with replies (an Open-Assistant "
    "tree)"
)


class BadRecord(ValueError):
    """A record that holds no example: `.kind` to count it by, and the reason as a sentence."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    context: str = ""
    """Alpaca's `input`: what the instruction is about. Empty: nothing."""
    learn: bool = True
    """Whether an answer is trained on. Conversations of one tree share their first answers, and each is learned once."""

    @property
    def text(self) -> str:
        """Content and context, for a template that knows no context."""
        return f"{self.content}\n{self.context}" if self.context else self.content


Messages = tuple[Message, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns of which the answers are learned; the last one is an answer."""

    messages: Messages

    @property
    def prompt(self) -> Messages:
        """Return what comes before the first answer."""
        return self.messages[: next(i for i, message in enumerate(self.messages) if message.role == "assistant")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """Two answers to one prompt, of which a person preferred the first."""

    prompt: Messages
    chosen: str
    rejected: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt that a model is to answer."""

    prompt: Messages


Example = Conversation | Preference | Prompt


def conversations(record: Any) -> list[Example]:
    """The conversations of a record, for sft: one, or of a tree every way from its prompt to a last answer.

    Where a tree has several answers to one turn, the best-ranked is taken. A last turn without an answer is left out."""
    keys = _keys(record)
    if "instruction" in keys:
        answer = _text(record, "output", what="answer")
        return [Conversation(messages=(_instruction(record), Message(role="assistant", content=answer)))]
    if "conversations" in keys or "messages" in keys:
        return [
            Conversation(messages=_answered(_turns(record, "conversations" if "conversations" in keys else "messages")))
        ]
    if _is_tree(record):
        learned: set[int] = set()
        ways = [_once(way, learned) for way in _ways(_node(record["prompt"], "prompt"))]
        if not ways:
            raise BadRecord("empty answer", "no message of the tree is answered")
        return [Conversation(messages=way) for way in ways]
    raise _unknown(record, _FORMS)


def preferences(record: Any) -> list[Example]:
    """The preferences of a record, for reward models and DPO. Of a tree: the best-ranked answer against each that is worse."""
    keys = _keys(record)
    if _is_tree(record):
        pairs = list(_ranked_pairs(_node(record["prompt"], "prompt"), ()))
        if not pairs:
            raise BadRecord("no preference", "no two answers of the tree have different ranks")
        return list(pairs)
    if not {"chosen", "rejected"} <= keys:
        raise _unknown(record, "prompt, chosen and rejected, or prompt with replies (an Open-Assistant tree)")
    if isinstance(record["chosen"], list) and isinstance(record["rejected"], list) and "prompt" not in keys:
        chosen, rejected = (_turns(record, word) for word in ("chosen", "rejected"))
        prompt, answers = chosen[:-1], (chosen[-1], rejected[-1])
        if rejected[:-1] != prompt or any(answer.role != "assistant" for answer in answers):
            raise BadRecord("wrong fields", "chosen and rejected are not the same turns up to one last answer")
        texts = [answer.content for answer in answers]
    else:
        prompt = _prompt(record)
        texts = [_answer(record, word) for word in ("chosen", "rejected")]
    if texts[0] == texts[1]:
        raise BadRecord("no preference", "chosen and rejected are the same answer")
    return [Preference(prompt=prompt, chosen=texts[0], rejected=texts[1])]


def prompts(record: Any) -> list[Example]:
    """The prompt of a record, for PPO."""
    keys = _keys(record)
    if "instruction" in keys:
        return [Prompt(prompt=(_instruction(record),))]
    if _is_tree(record):
        node = _node(record["prompt"], "prompt")
        return [Prompt(prompt=(Message(role="user", content=node.text),))]
    if "prompt" in keys:
        return [Prompt(prompt=_prompt(record))]
    raise _unknown(record, "prompt, or instruction")


PARSERS: Mapping[str, Callable[[Any], list[Example]]] = {
    "sft": conversations,
    "reward": preferences,
    "dpo": preferences,
    "ppo": prompts,
}
"""Parsers by the task that reads the examples."""


def _keys(record: Any) -> set[str]:
    if not isinstance(record, dict):
        raise BadRecord("wrong fields", f"is {_kind(record)}, not an object with keys")
    return set(record)


def _unknown(record: Mapping[str, Any], wanted: str) -> BadRecord:
    if {"message_id", "parent_id"} <= record.keys():
        told = "is one message of a flat Open-Assistant file: take the file of trees (*.trees.jsonl)"
        return BadRecord("wrong fields", told)
    return BadRecord("wrong fields", f"has keys {', '.join(map(str, record)) or '(none)'}; wanted are {wanted}")


def _kind(value: Any) -> str:
    kinds = ((bool, "true or false"), (str, "a text"), (int | float, "a number"), (list, "a list"), (dict, "an object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def _text(record: Mapping[str, Any], key: str, *, what: str = "text", where: str = "") -> str:
    name = f"{where}{key}"
    if key not in record:
        raise BadRecord("wrong fields", f"has no {name}; it has {', '.join(map(str, record))}")
    value = record[key]
    if not isinstance(value, str):
        raise BadRecord("wrong fields", f"{name} is {_kind(value)}, not a text")
    if not value.strip():
        raise BadRecord(f"empty {what}", f"{name} is empty")
    return value


def _instruction(record: Mapping[str, Any]) -> Message:
    context = record.get("input")
    if context is not None and not isinstance(context, str):
        raise BadRecord("wrong fields", f"input is {_kind(context)}, not a text")
    content = _text(record, "instruction", what="prompt")
    return Message(role="user", content=content, context=context if context and context.strip() else "")


def _turns(record: Mapping[str, Any], key: str) -> Messages:
    """The turns of a list: at most one of the system's first, then users' and assistants' in alternation."""
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise BadRecord("wrong fields", f"{key} is {'empty' if turns == [] else _kind(turns)}, not a list of turns")
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        where = f"{key}[{number}]"
        if not isinstance(turn, dict):
            raise BadRecord("wrong fields", f"{where} is {_kind(turn)}, not an object")
        names = ("from", "value") if "from" in turn else ("role", "content")
        said = turn.get(names[0])
        role = _ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise BadRecord("wrong fields", f"{where}.{names[0]} is {said!r}; known are {', '.join(_ROLES)}")
        content = _text(turn, names[1], what="answer" if role == "assistant" else "prompt", where=f"{where}.")
        wanted = ("system", "user") if not messages else ("user",) if messages[-1].role != "user" else ("assistant",)
        if role not in wanted:
            told = f"{where} is the {role}'s, where the {' or '.join(wanted)}'s is expected"
            raise BadRecord("turns", told)
        messages.append(Message(role=role, content=content))
    return tuple(messages)


def _answered(messages: Messages) -> Messages:
    """The turns up to the last answer."""
    while messages and messages[-1].role != "assistant":
        messages = messages[:-1]
    if not messages:
        raise BadRecord("empty answer", "no turn is an answer")
    return messages


def _prompt(record: Mapping[str, Any]) -> Messages:
    if isinstance(record.get("prompt"), list):
        messages = _turns(record, "prompt")
        if messages[-1].role != "user":
            raise BadRecord("turns", f"prompt ends with the {messages[-1].role}'s turn, not with the user's")
        return messages
    return (Message(role="user", content=_text(record, "prompt", what="prompt")),)


def _answer(record: Mapping[str, Any], key: str) -> str:
    """A text, or the last of a list of messages that is one answer alone."""
    value = record[key]
    if not isinstance(value, list):
        return _text(record, key, what="answer")
    if len(value) != 1 or not isinstance(value[0], dict) or _ROLES.get(str(value[0].get("role"))) != "assistant":
        raise BadRecord("wrong fields", f"{key} is not one message of the assistant's, where prompt is given apart")
    return _text(value[0], "content", what="answer", where=f"{key}[0].")


# Open-Assistant trees ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Node:
    role: Role
    text: str
    rank: float
    """Lower is better."""
    replies: tuple[_Node, ...]


def _is_tree(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("prompt"), dict) and "replies" in record["prompt"]


def _node(value: Any, where: str) -> _Node:
    """A message and what answers it, without what was deleted."""
    if not isinstance(value, dict):
        raise BadRecord("wrong fields", f"{where} is {_kind(value)}, not an object")
    role = _ROLES.get(str(value.get("role")))
    if role not in ("user", "assistant"):
        raise BadRecord("wrong fields", f"{where}.role is {value.get('role')!r}, neither prompter nor assistant")
    text = _text(value, "text", what="answer" if role == "assistant" else "prompt", where=f"{where}.")
    replies = value.get("replies") or []
    if not isinstance(replies, list):
        raise BadRecord("wrong fields", f"{where}.replies is {_kind(replies)}, not a list")
    nodes = tuple(
        _node(reply, f"{where}.replies[{number}]")
        for number, reply in enumerate(replies)
        if not (isinstance(reply, dict) and reply.get("deleted"))
    )
    if any(node.role == role for node in nodes):
        raise BadRecord("turns", f"a reply to {where} is of the same role, {value.get('role')}")
    rank = value.get("rank")
    order = float(rank) if isinstance(rank, int | float) and not isinstance(rank, bool) else float("inf")
    return _Node(role=role, text=text, rank=order, replies=nodes)


def _message(node: _Node) -> Message:
    return Message(role=node.role, content=node.text)


def _ways(node: _Node) -> Iterator[tuple[_Node, ...]]:
    """Yield the ways from a user's message to every last answer, by the best answer to each."""
    if not node.replies:
        return
    best = min(node.replies, key=lambda reply: reply.rank)
    further = [way for reply in best.replies for way in _ways(reply)]
    for way in further or [()]:
        yield (node, best, *way)


def _once(way: Sequence[_Node], learned: set[int]) -> Messages:
    """The messages of a way; an answer that an earlier way has taught is not learned again."""
    messages = []
    for node in way:
        messages.append(replace(_message(node), learn=id(node) not in learned))
        learned.add(id(node))
    return tuple(messages)


def _ranked_pairs(node: _Node, before: Messages) -> Iterator[Preference]:
    prompt = (*before, _message(node))
    if node.replies:
        best = min(node.replies, key=lambda reply: reply.rank)
        for reply in node.replies:
            if best.rank < reply.rank < float("inf") and reply.text != best.text:
                yield Preference(prompt=prompt, chosen=best.text, rejected=reply.text)
    for reply in node.replies:
        for further in reply.replies:
            yield from _ranked_pairs(further, (*prompt, _message(reply)))
