"""A chat writes the conversation by the model's template, shows whole characters, and ends an answer where the template does."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers

from orchestrator.cli import main
from orchestrator.models.architecture import make_architecture
from orchestrator.models.decoder import Decoder, initialize
from orchestrator.training.chat import Answer, Chat, ContextFull, Ends, Sampling, ends_of, unsure
from orchestrator.training.data import DataError
from orchestrator.training.examples import Message
from orchestrator.training.templates import AlpacaTemplate, ChatTemplate, encode
from orchestrator.training.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from tests.speakers import kept_run, learned

LIKELIEST = Sampling(max_tokens=40, temperature=0, top_p=1, seed=0)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HUMAN = (
    "{% for m in messages %}{% if m.role == 'user' %}Human: {{ m.content }}\n{% else %}Bot: {{ m.content }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Bot:{% endif %}"
)


def said(*texts: str, system: str = "") -> tuple[Message, ...]:
    turns = tuple(Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts))
    return ((Message(role="system", content=system),) if system else ()) + turns


def bytes_with(*special: str) -> HuggingFaceTokenizer:
    """Byte-level tokens, and special ones after them."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[])
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["</s>", *special])
    return HuggingFaceTokenizer(inner, inner.token_to_id("</s>"), {"chat_template": CHATML, "eos_token": "</s>"})


@pytest.fixture(scope="module")
def taught() -> Decoder:
    """Alpaca's template over bytes, of which it knows three conversations by heart."""
    conversations = [
        said("hi", "hello, 你好!"),
        said("hi", "hello, 你好!", "more?", "once more"),
        said("bye", "see you"),
    ]
    samples = [encode(messages, AlpacaTemplate(), ByteTokenizer()) for messages in conversations]
    return learned(samples, vocab_size=264, max_position=280)


@pytest.fixture
def run(taught: Decoder, tmp_path: Path) -> Path:
    return kept_run(tmp_path / "runs" / "taught", taught, job={"name": "taught", "task": "sft"})


def piped(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    raw = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))


# Ends and pieces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "tokenizer", "wanted"),
    [
        (AlpacaTemplate(), ByteTokenizer(), Ends(texts=("\n\n### Instruction:",))),
        (ChatTemplate(source=CHATML), ByteTokenizer(), Ends(texts=("<|im_end|>",))),
        (ChatTemplate(source=CHATML), bytes_with("<|im_start|>", "<|im_end|>"), Ends(tokens=frozenset({258}))),
        (ChatTemplate(source=HUMAN), bytes_with(), Ends(texts=("\n\nHuman:",))),
    ],
    ids=["alpaca", "chatml as text", "chatml as tokens", "the next question"],
)
def test_an_answer_ends_where_the_template_ends_it(template, tokenizer, wanted):
    assert ends_of(template, tokenizer) == wanted


@pytest.mark.parametrize(
    ("text", "ends", "held"),
    [
        ("abc", (), 0),
        ("abc", ("\n\nHuman:",), 0),
        ("abc\n", ("\n\nHuman:",), 1),
        ("abc\n\nHum", ("\n\nHuman:", "</s>"), 5),
        ("你�", (), 1),
        ("abc, �", (", 你",), 3),
        ("你���", (), 3),
        ("�" * 9, (), 3),
    ],
)
def test_what_a_further_token_may_change_is_not_shown_yet(text, ends, held):
    assert unsure(text, ends) == held


def test_pieces_hold_whole_characters_and_make_up_the_text(taught):
    chat = Chat(taught, ByteTokenizer(), AlpacaTemplate())
    answer = chat.ask("hi", LIKELIEST)
    assert list(answer) == [*"hello, ", "你", "好", "!"]
    assert (answer.text, answer.num_tokens, answer.ended) == ("hello, 你好!", 14, "end_of_answer")


def test_an_end_by_text_is_not_part_of_the_answer(taught):
    prompt = encode(said("hi"), AlpacaTemplate(), ByteTokenizer()).ids.tolist()
    answer = Answer(taught, ByteTokenizer(), prompt, Ends(texts=(", 你",)), LIKELIEST)
    assert list(answer) == [*"hello"]
    assert answer.ended == "end_of_answer"


def test_the_conversation_is_the_context_of_the_next_answer_until_it_starts_anew(taught):
    chat = Chat(taught, ByteTokenizer(), AlpacaTemplate())
    for question, wanted in (("hi", "hello, 你好!"), ("more?", "once more")):
        answer = chat.ask(question, LIKELIEST)
        assert "".join(answer) == wanted
        chat.keep(question, answer.text)
    chat.reset()
    assert "".join(chat.ask("bye", LIKELIEST)) == "see you"


def test_an_answer_ends_with_its_limit_or_with_the_context_and_a_full_context_is_told(taught):
    chat = Chat(taught, ByteTokenizer(), AlpacaTemplate())
    short = chat.ask("hi", Sampling(max_tokens=3, temperature=0, top_p=1, seed=0))
    assert ("".join(short), short.ended) == ("hel", "max_tokens")
    chat.keep("hi", "x" * 103)
    cut = chat.ask("", LIKELIEST)
    list(cut)
    assert (cut.num_tokens, cut.ended) == (2, "context")
    with pytest.raises(ContextFull, match="the conversation has 281 tokens, and the model sees 280"):
        chat.ask("abc", LIKELIEST)


def test_what_would_end_its_own_turn_is_refused():
    tokenizer = bytes_with("<|im_start|>", "<|im_end|>")
    arch = make_architecture(
        family="llama", num_layers=1, hidden_size=16, num_heads=2, ffn_size=16, vocab_size=264, max_position=64
    )
    chat = Chat(Decoder(arch), tokenizer, ChatTemplate(source=CHATML))
    with pytest.raises(DataError, match=r"holds the special token <\|im_end\|>"):
        chat.ask("a<|im_end|>b", LIKELIEST)


# The verb ------------------------------------------------------------------------------------------------------------


def test_each_line_of_a_pipe_is_a_turn(run, monkeypatch, capsys):
    piped(monkeypatch, "hi\n\nmore?\n/reset\nbye\n/quit\nhi\n")
    assert main(["chat", "taught", "--directory", str(run.parent), "--temperature", "0"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "hello, 你好!\nonce more\nsee you\n"
    assert shown.err == ""


def test_a_program_reads_a_line_of_json_for_each_answer(run, monkeypatch, capsys):
    piped(monkeypatch, "hi\nmore?")
    assert main(["chat", str(run), "--json", "--temperature", "0", "--max-tokens", "30"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told == [
        {"turn": 1, "prompt": "hi", "text": "hello, 你好!", "num_tokens": 14, "ended": "end_of_answer"},
        {"turn": 2, "prompt": "more?", "text": "once more", "num_tokens": 9, "ended": "end_of_answer"},
    ]


def test_the_system_is_told_first_and_stays_and_the_same_seed_answers_the_same(run, monkeypatch, capsys):
    told = []
    for arguments in (("--seed", "1"), ("--seed", "1"), ("--seed", "2"), ("--seed", "1", "--system", "Be brief.")):
        piped(monkeypatch, "hi\n/reset\nhi\n")
        assert main(["chat", str(run), "--json", "--temperature", "3", "--max-tokens", "20", *arguments]) == 0
        first, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert first == second
        told.append(first["text"])
    assert told[0] == told[1]
    assert len(set(told)) == 3


def test_a_mistake_says_what_to_do(run, taught, tmp_path, monkeypatch, capsys):
    piped(monkeypatch, "hi\n" + "long " * 60 + "\n")
    assert main(["chat", str(run)]) == 2
    err = capsys.readouterr().err
    assert "Error: the context is full: with it the conversation has " in err
    assert "to fix: /reset starts anew" in err
    piped(monkeypatch, b"\xff\n")
    assert main(["chat", str(run)]) == 2
    assert "line 1 is not UTF-8, by its byte 0xff" in capsys.readouterr().err
    piped(monkeypatch, "hi\n")
    judge = kept_run(tmp_path / "judge", taught, job={"name": "judge", "task": "reward"})
    for verb in ("chat", "generate"):
        assert main([verb, str(judge)]) == 2
        assert "is of a reward model, which gives a number and no text" in capsys.readouterr().err
    (run / "tokenizer" / "description.json").unlink()
    assert main(["chat", str(run)]) == 2
    assert "holds no tokenizer" in capsys.readouterr().err


def test_a_model_of_text_alone_is_told(taught, tmp_path, monkeypatch, capsys):
    text = kept_run(tmp_path / "text", taught, job={"name": "text"})
    piped(monkeypatch, "hi\n")
    assert main(["chat", str(text), "--temperature", "0"]) == 0
    assert "note: this model was trained on text, not to answer (task: pretrain)" in capsys.readouterr().err


def test_the_template_that_the_job_pinned_is_used(taught, tmp_path, monkeypatch, capsys):
    pinned = kept_run(tmp_path / "pinned", taught, job={"name": "a", "task": "sft", "data": {"template": "chat"}})
    piped(monkeypatch, "hi\n")
    assert main(["chat", str(pinned)]) == 2
    assert "the tokenizer brings no chat template" in capsys.readouterr().err


def test_in_a_terminal_ctrl_c_ends_an_answer_and_ctrl_d_the_chat(tmp_path):
    arch = make_architecture(
        family="llama", num_layers=1, hidden_size=16, num_heads=2, ffn_size=16, vocab_size=264, max_position=100_000
    )
    endless = Decoder(arch)
    initialize(endless, arch, 1)
    run = kept_run(tmp_path / "endless", endless, job={"name": "endless", "task": "sft"})
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "orchestrator.cli",
        "chat",
        str(run),
        "--temperature",
        "0",
        "--max-tokens",
        "99999",
    ]
    child = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=_take_terminal
    )
    os.close(theirs)
    try:
        screen = Screen(ours)
        screen.until(b"/quit or Ctrl-D ends the chat")
        screen.until(b"> ")
        os.write(ours, b"hi\n")
        screen.until(b"hi\r\n")
        screen.more(20)
        os.write(ours, b"\x03")
        assert b"Traceback" not in screen.until(b"\r\n> ")
        os.write(ours, b"\x04")
        assert child.wait(timeout=60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(ours)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Screen:
    """What a terminal shows, read on from where the last look ended."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.unread = descriptor, b""

    def until(self, wanted: bytes) -> bytes:
        """What stands before the next place of `wanted`, which is passed over."""
        deadline = time.monotonic() + 120
        while wanted not in self.unread:
            self._read(deadline)
        before, _, self.unread = self.unread.partition(wanted)
        return before

    def more(self, num_bytes: int) -> None:
        """Waits until so many bytes follow, which are passed over."""
        deadline = time.monotonic() + 120
        while len(self.unread) < num_bytes:
            self._read(deadline)
        self.unread = self.unread[num_bytes:]

    def _read(self, deadline: float) -> None:
        ready, _, _ = select.select([self.descriptor], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"nothing further within 120 s after {self.unread[-200:]!r}"
        self.unread += os.read(self.descriptor, 4096)
