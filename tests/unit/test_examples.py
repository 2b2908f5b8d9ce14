"""Instruction data: forms are told apart, what is no example is told by file and line, tokens are learned where answers are."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from orchestrator.models.architecture import make_architecture
from orchestrator.models.decoder import Decoder, initialize
from orchestrator.training.collect import Place, collect, judge, split
from orchestrator.training.data import DataError
from orchestrator.training.examples import (
    Conversation,
    Message,
    Preference,
    Prompt,
    conversations,
    preferences,
    prompts,
)
from orchestrator.training.packing import IGNORED, Sample, pack
from orchestrator.training.templates import AlpacaTemplate, ChatTemplate, chat_template_of, encode, samples
from orchestrator.training.tokenizer import ByteTokenizer, load_tokenizer, train_bpe


def said(*texts: str, start: str = "user") -> tuple[Message, ...]:
    """Turns in alternation."""
    roles = ("user", "assistant") if start == "user" else ("system", "user", "assistant")
    offset = 0 if start == "user" else 1
    return tuple(
        Message(role=roles[i] if i < offset else ("user", "assistant")[(i - offset) % 2], content=text)
        for i, text in enumerate(texts)
    )


def node(role: str, text: str, *replies: dict, **more) -> dict:
    return {"role": role, "text": text, "replies": list(replies), **more}


def asks(text: str, answer: str) -> dict:
    return node("prompter", text, node("assistant", answer))


TREE = {
    "message_tree_id": "1",
    "prompt": node(
        "prompter",
        "q",
        node("assistant", "bad", rank=1),
        node("assistant", "good", asks("more", "a1"), asks("other", "a2"), rank=0),
        node("assistant", "worst", rank=2),
        node("assistant", "spam", deleted=True, rank=0),
    ),
}  # fmt: skip


def turn(who: str, text: str) -> dict:
    return {"from": who, "value": text}


# Forms ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, [("user", "Add.\n1 and 2"), ("assistant", "3")]),
        ({"instruction": "给出三个建议。", "input": "", "output": "好。"}, [("user", "给出三个建议。"), ("assistant", "好。")]),
        (
            {"id": "1", "conversations": [turn("human", "a"), turn("gpt", "b"), turn("human", "c")]},
            [("user", "a"), ("assistant", "b")],
        ),
        (
            {"conversations": [turn("human", "你好"), turn("assistant", "你好！")]},
            [("user", "你好"), ("assistant", "你好！")],
        ),
        (
            {"messages": [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]},
            [("system", "s"), ("user", "u"), ("assistant", "a")],
        ),
    ],
    ids=["alpaca", "belle", "sharegpt", "belle turns", "messages"],
)  # fmt: skip
def test_each_form_of_a_conversation_is_known_by_its_keys(record, turns):
    (example,) = conversations(record)
    assert [(message.role, message.text) for message in example.messages] == turns


def test_a_tree_gives_each_way_to_a_last_answer_by_the_best_answers_and_teaches_each_once():
    ways = conversations(TREE)
    assert [[message.content for message in way.messages] for way in ways] == [
        ["q", "good", "more", "a1"],
        ["q", "good", "other", "a2"],
    ]
    learned = [
        [message.content for message in way.messages if message.learn and message.role == "assistant"] for way in ways
    ]
    assert learned == [["good", "a1"], ["a2"]]


def test_a_tree_gives_its_best_answer_against_each_worse_one():
    assert preferences(TREE) == [
        Preference(prompt=said("q"), chosen="good", rejected="bad"),
        Preference(prompt=said("q"), chosen="good", rejected="worst"),
    ]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": "b",
        },
        {
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
        },
    ],
)
def test_a_preference_is_two_texts_or_two_lists_of_messages(record):
    assert preferences(record) == [Preference(prompt=said("q"), chosen="a", rejected="b")]


@pytest.mark.parametrize("record", [{"prompt": "q"}, {"instruction": "q", "output": "a"}, TREE])
def test_a_prompt_is_what_is_asked(record):
    assert prompts(record) == [Prompt(prompt=said("q"))]


# What is no example --------------------------------------------------------------------------------------------------

ALPACA = '{"instruction": "q%d", "input": "", "output": "a"}'
BAD = [
    ("sft", b'{"instruction": "q", "output"', "not JSON", r"is not JSON: Expecting ':' delimiter at column 30"),
    ("sft", b"[1]", "wrong fields", "is a list, not an object with keys"),
    ("sft", b'{"question": "q", "answer": "a"}', "wrong fields", r"has keys question, answer; wanted are instruction and"),
    ("sft", b'{"instruction": "q"}', "wrong fields", "has no output; it has instruction"),
    ("sft", b'{"instruction": "q", "output": 5}', "wrong fields", "output is a number, not a text"),
    ("sft", b'{"instruction": "q", "input": [], "output": "a"}', "wrong fields", "input is a list, not a text"),
    ("sft", b'{"instruction": "q", "output": " \\n"}', "empty answer", "output is empty"),
    ("sft", b'{"instruction": "", "output": "a"}', "empty prompt", "instruction is empty"),
    ("sft", '{"instruction": "q", "output": "答"}'.encode("gb18030"), "not UTF-8", "is not UTF-8, by its byte 0xb4"),
    ("sft", b'{"instruction": "q", "output": "\\ud800"}', "not UTF-8", "half a surrogate pair"),
    ("sft", b'{"conversations": []}', "wrong fields", "conversations is empty, not a list of turns"),
    ("sft", b'{"conversations": [{"from": "human", "value": "q"}]}', "empty answer", "no turn is an answer"),
    ("sft", b'{"conversations": [{"from": "gpt", "value": "a"}]}', "turns", r"conversations\[0\] is the assistant's, where"),
    ("sft", b'{"messages": [{"role": "tool", "content": "q"}]}', "wrong fields", r"messages\[0\]\.role is 'tool'; known are"),
    (
        "sft",
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "r"}]}',
        "turns",
        r"messages\[1\] is the user's, where the assistant's is expected",
    ),
    ("sft", b'{"message_id": "1", "parent_id": null, "text": "q"}', "wrong fields", r"take the file of trees"),
    ("sft", b'{"prompt": {"role": "prompter", "text": "q", "replies": []}}', "empty answer", "no message of the tree"),
    ("sft", b'{"prompt": {"role": "prompter", "text": 1, "replies": []}}', "wrong fields", r"prompt\.text is a number"),
    ("reward", b'{"prompt": "q", "chosen": "a"}', "wrong fields", "has keys prompt, chosen; wanted are prompt, chosen and"),
    ("dpo", b'{"prompt": "q", "chosen": "a", "rejected": "a"}', "no preference", "are the same answer"),
    ("dpo", b'{"prompt": "q", "chosen": "a", "rejected": ""}', "empty answer", "rejected is empty"),
    ("ppo", b'{"prompt": ""}', "empty prompt", "prompt is empty"),
    ("ppo", b'{"text": "q"}', "wrong fields", "has keys text; wanted are prompt, or instruction"),
    ("sft", b"[" * 100_000, "not JSON", "is nested too deeply"),
]  # fmt: skip
GOOD = {
    "sft": '{"instruction": "fine", "output": "a"}',
    "reward": '{"prompt": "fine", "chosen": "a", "rejected": "b"}',
    "ppo": '{"prompt": "fine"}',
}


@pytest.mark.parametrize(("task", "line", "kind", "reason"), BAD)
def test_a_bad_record_is_told_by_file_and_line_and_skipped_only_where_the_policy_says(
    tmp_path, task, line, kind, reason
):
    good = GOOD["reward" if task == "dpo" else task].encode()
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + good + b"\n\n" + line + b"\n")
    skipped = collect([file], task, on_bad="skip")
    (fault,) = skipped.faults
    assert (fault.where, fault.kind, len(skipped.places), skipped.num_records) == (f"{file}:3", kind, 1, 2)
    with pytest.raises(DataError, match=rf"1 bad record \(1 {kind}\)\n  .*a\.jsonl:3: .*{reason}[^\n]*\nmend them"):
        collect([file], task)


def test_bad_records_are_counted_by_kind_and_the_first_are_named(tmp_path):
    lines = [ALPACA % number for number in range(4)] + ["{"] * 6 + ['{"instruction": "q", "output": ""}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as error:
        collect([tmp_path / "a.jsonl"], "sft")
    told = str(error.value).splitlines()
    assert told[0] == "7 bad records (6 not JSON, 1 empty answer)"
    assert [line.split(": ")[0].rpartition(":")[2] for line in told[1:6]] == ["5", "6", "7", "8", "9"]
    assert told[6:] == ["  and 2 more", "mend them, or leave them out by the policy skip"]
    report = collect([tmp_path / "a.jsonl"], "sft", on_bad="skip").report()
    assert report.startswith("4 examples of 11 records\n7 bad records (6 not JSON, 1 empty answer)")
    (tmp_path / "none.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="no example in 1 records: 1 bad record"):
        collect([tmp_path / "none.jsonl"], "sft", on_bad="skip")


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_of_records_is_read_with_the_line_of_each(tmp_path, indent):
    records = [json.loads(ALPACA % number) for number in range(3)] + [{"instruction": "q", "output": ""}]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=indent))
    collected = collect([tmp_path / "a.json"], "sft", on_bad="skip")
    lines = [place.where.rpartition(":")[2] for place in collected.places]
    assert lines == (["2", "7", "12"] if indent else ["1", "1", "1"])
    assert [fault.where.rpartition(":")[2] for fault in collected.faults] == ["17" if indent else "1"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"[{ALPACA % 1},\n{{oops}}]", r"a\.json:2 is not JSON: .*nothing after that can be read: mend it"),
        (f"[{ALPACA % 1}\n{ALPACA % 2}]", r"a\.json:2 is not JSON: , or \] is expected"),
        (f"[{ALPACA % 1}]\nmore", r"a\.json:1 is not JSON: something follows the end"),
        (f"[{ALPACA % 1},", r"a\.json:1 is not JSON: Expecting value"),
    ],
)
def test_a_list_that_is_broken_is_refused_whole_whatever_the_policy(tmp_path, text, told):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=told):
        collect([tmp_path / "a.json"], "sft", on_bad="skip")


def test_a_list_of_mixed_encodings_loses_only_the_records_that_are_not_utf_8(tmp_path):
    parts = ['{"instruction": "问", "output": "答"}'.encode(encoding) for encoding in ("utf-8", "gb18030")]
    (tmp_path / "a.json").write_bytes(b"[\n" + b",\n".join([*parts, (ALPACA % 1).encode()]) + b"\n]")
    collected = collect([tmp_path / "a.json"], "sft", on_bad="skip")
    assert [place.where.rpartition(":")[2] for place in collected.places] == ["2", "4"]
    assert [(fault.where.rpartition(":")[2], fault.kind) for fault in collected.faults] == [("3", "not UTF-8")]


def test_json_with_a_record_a_line_and_parquet_are_read_too(tmp_path):
    (tmp_path / "belle.json").write_text("\n".join(ALPACA % number for number in range(3)))
    pq.write_table(pa.table({"instruction": ["p", "q"], "output": ["a", None]}), tmp_path / "a.parquet")
    collected = collect([tmp_path / "belle.json", tmp_path / "a.parquet"], "sft", on_bad="skip")
    assert len(collected.places) == 4
    assert [(fault.where, fault.reason) for fault in collected.faults] == [
        (f"{tmp_path}/a.parquet:2", "output is null, not a text")
    ]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet after row 0"):
        collect([tmp_path / "a.parquet"], "sft")
    with pytest.raises(DataError, match=r"a\.csv ends in \.csv; known are \.json, \.jsonl, \.parquet"):
        collect([tmp_path / "a.csv"], "sft")
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read: No such file"):
        collect([tmp_path / "gone.jsonl"], "sft")


def test_the_same_example_is_kept_once_whatever_form_it_came_in(tmp_path):
    turns = {"messages": [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "a.jsonl").write_text(f"{ALPACA % 1}\n{ALPACA % 2}\n{json.dumps(turns)}\n{ALPACA % 2}\n")
    collected = collect([tmp_path / "a.jsonl"], "sft")
    file = tmp_path / "a.jsonl"
    assert [place.where for place in collected.places] == [f"{file}:1", f"{file}:2"]
    assert collected.duplicates == ((f"{file}:3", f"{file}:1"), (f"{file}:4", f"{file}:2"))
    assert "2 left out as duplicates" in collected.report()


def test_a_prompt_is_on_one_side_of_the_split_whatever_stands_beside_it():
    places = [
        Place(example=Conversation(messages=said(f"q{number}", answer)), where=f"{number}")
        for number in range(500)
        for answer in ("a", "b")
    ]
    train, held_out = split(places, 0.1, seed=3)
    assert len(train) + len(held_out) == 1000
    assert 0.06 < len(held_out) / 1000 < 0.14
    assert {place.where for place in train}.isdisjoint(place.where for place in held_out)
    assert split(places[::-1][:400], 0.1, seed=3)[1] == [place for place in places[::-1][:400] if place in held_out]
    assert split(places, 0.1, seed=4)[1] != held_out
    assert split(places, 0.0) == (places, [])


# Templates -----------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = """{% if messages[0]['role'] == 'system' %}
    {%- set start = messages[0]['content'] | trim + ' ' %}{%- set turns = messages[1:] %}
{%- else %}{%- set start = '' %}{%- set turns = messages %}{%- endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- if message.role == 'user' %}{{ bos_token + '[INST] ' }}{{ start if loop.first else '' }}{{ message['content'] }} [/INST]
    {%- else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}
{%- endfor %}"""


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A tokenizer whose configuration brings a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_bpe(iter(["a few words of user and assistant to merge " * 50]), 300)
    tokenizer.inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(folder)
    config = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(str(folder), folder)


@pytest.mark.parametrize("source", [CHATML, LLAMA])
@pytest.mark.parametrize("messages", [said("q", "a"), said("be kind", "q", "a", "r", "b", start="system")])
def test_a_chat_template_is_rendered_as_transformers_does_it(bpe, source, messages):
    theirs = PreTrainedTokenizerFast(tokenizer_object=bpe.inner, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    ours = ChatTemplate(source=source, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    plain = [{"role": message.role, "content": message.content} for message in messages]
    for count in (len(messages), len(messages) - 1):
        asked = {"chat_template": source, "tokenize": False, "add_generation_prompt": count < len(messages)}
        text = "".join(piece.text for piece in ours.pieces(messages[:count]))
        assert text == theirs.apply_chat_template(plain[:count], **asked)


def test_only_answers_are_learned_with_what_ends_them(bpe):
    messages = said("be kind", "q", "first", "r", "second", start="system")
    sample = encode(messages, chat_template_of(bpe), bpe)
    learned = "".join(bpe.inner.id_to_token(int(token)) for token in sample.ids[sample.learn])
    assert learned == "first<|im_end|>Ċsecond<|im_end|>Ċ"
    shared = encode(
        (*messages[:2], Message(role="assistant", content="first", learn=False), *messages[3:]),
        chat_template_of(bpe),
        bpe,
    )
    assert shared.ids.tolist() == sample.ids.tolist()
    assert "".join(bpe.inner.id_to_token(int(token)) for token in shared.ids[shared.learn]) == "second<|im_end|>Ċ"


def test_alpacas_template_is_the_published_one():
    (example,) = conversations({"instruction": "Add.", "input": "1 and 2", "output": "3"})
    tokenizer = ByteTokenizer()
    sample = encode(example.messages, AlpacaTemplate(), tokenizer)
    assert tokenizer.decode(sample.ids[~sample.learn]) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:"
    )
    assert sample.ids[sample.learn].tolist() == [ord("3"), 256]
    (plain,) = prompts({"instruction": "Add."})
    assert encode(plain.prompt, AlpacaTemplate(), tokenizer).learn.sum() == 0
    assert tokenizer.decode(encode(plain.prompt, AlpacaTemplate(), tokenizer).ids).endswith("Add.\n\n### Response:")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{% for m in messages %}", "the chat template is none: line 1: Unexpected end of template"),
        (
            "{{ messages.__class__.__mro__ }}",
            "cannot be rendered: access to attribute '__class__' of 'list' object is unsafe",
        ),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "cannot be rendered: access to attribute"),
        ("{{ messages.append(1) }}", "cannot be rendered: access to attribute 'append' of 'list' object is unsafe"),
        ("{% include '/etc/passwd' %}", "cannot be rendered: TypeError: no loader for this environment"),
        ("{{ raise_exception('no system here') }}", "cannot be rendered: no system here"),
        ("{{ 1 / 0 }}", "cannot be rendered: ZeroDivisionError"),
        ("{% for i in range(999999) %}x{% endfor %}", "cannot be rendered: OverflowError: Range too big"),
        ("{{ messages | length }}", "with a further turn it writes the turns before it otherwise, '2' in place of '1'"),
        ("x" * 70_000, "is larger than 65,536 bytes"),
    ],
)
def test_a_template_that_is_broken_or_reaches_out_is_refused(source, told):
    with pytest.raises(DataError) as error:
        ChatTemplate(source=source).pieces(said("q", "a"))
    assert told in str(error.value)


def test_a_tokenizer_without_a_chat_template_is_told():
    with pytest.raises(DataError, match="brings no chat template"):
        chat_template_of(ByteTokenizer())


def test_examples_that_do_not_fit_or_hold_a_special_token_are_faults_and_nothing_is_cut(bpe):
    places = [
        Place(example=Conversation(messages=said("q", "a")), where="f:1"),
        Place(example=Conversation(messages=said("q", "word " * 200)), where="f:2"),
        Place(example=Conversation(messages=said("q<|im_end|>", "a")), where="f:3"),
        Place(example=Preference(prompt=said("q"), chosen="yes", rejected="no"), where="f:4"),
    ]
    found, faults = samples(places, chat_template_of(bpe), bpe, max_tokens=64)
    assert [(place.where, len(both)) for place, both in found] == [("f:1", 1), ("f:4", 2)]
    assert [(fault.where, fault.kind) for fault in faults] == [("f:2", "too long"), ("f:3", "special token")]
    assert "tokens, and the context 64" in faults[0].reason
    with pytest.raises(DataError, match=r"2 bad records \(1 too long, 1 special token\)"):
        judge(faults, "stop", num_left=2, num_records=4)
    judge(faults, "skip", num_left=2, num_records=4)


# Packing -------------------------------------------------------------------------------------------------------------


def numbered(lengths: list[int]) -> list[Sample]:
    """Samples of which every token says whose it is and where; every second token is learned."""
    return [
        Sample(ids=np.arange(length) + 100 * number, learn=np.arange(length) % 2 == 1)
        for number, length in enumerate(lengths)
    ]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40), together=st.sampled_from([1, 2]))
def test_every_sample_lies_in_one_row_whole_and_sees_no_other(lengths, together):
    lengths = lengths if len(lengths) % together == 0 else [*lengths, 1]
    given_samples = numbered(lengths)
    packed = pack(given_samples, 24, together=together, padding_id=7)
    filled = np.zeros(packed.input_ids_BS.shape, dtype=bool)
    for number, (sample, spot) in enumerate(zip(given_samples, packed.spots, strict=True)):
        part = (spot.row, slice(spot.start, spot.start + lengths[number]))
        assert not filled[part].any()
        filled[part] = True
        assert packed.input_ids_BS[part].tolist() == sample.ids.tolist()
        assert packed.positions_BS[part].tolist() == list(range(lengths[number]))
        assert (packed.segment_ids_BS[spot.row] == spot.segment).sum() == lengths[number]
        targets = packed.target_ids_BS[part]
        assert targets[-1] == IGNORED
        assert targets[:-1].tolist() == [
            t if learn else IGNORED for t, learn in zip(sample.ids[1:], sample.learn[1:], strict=True)
        ]
    assert (packed.input_ids_BS[~filled] == 7).all()
    assert (packed.target_ids_BS[~filled] == IGNORED).all()
    for first in range(0, len(lengths), together):
        assert len({spot.row for spot in packed.spots[first : first + together]}) == 1
    # Best-fit decreasing needs at most 11/9 of the best number of rows, and 1 (Johnson 1973).
    assert len(packed.input_ids_BS) <= 11 / 9 * max(1, -(-sum(lengths) // 24)) + 2


def test_packing_fills_rows_and_refuses_what_does_not_fit():
    packed = pack(numbered([3, 7, 5, 2, 8, 5]), 10)
    assert len(packed.input_ids_BS) == 3
    assert pack([], 10).input_ids_BS.shape == (0, 10)
    with pytest.raises(ValueError, match="sample 1 needs 11 tokens of a row of 10"):
        pack(numbered([3, 11]), 10)
    with pytest.raises(ValueError, match="sample 0 needs 12 tokens of a row of 10"):
        pack(numbered([6, 6]), 10, together=2)
    with pytest.raises(ValueError, match="3 samples are no whole number of 2"):
        pack(numbered([1, 1, 1]), 10, together=2)


def test_a_model_gives_packed_samples_the_losses_of_samples_alone():
    shape = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "vocab_size": 1000, "max_position": 16}
    arch = make_architecture(family="opt", **shape)
    model = Decoder(arch)
    initialize(model, arch, seed=1)
    given_samples = numbered([5, 7, 3, 9, 4])
    packed = pack(given_samples, 16)
    with torch.no_grad():
        context = model.context(segment_ids_BS=torch.from_numpy(packed.segment_ids_BS))
        logits_BSV = model(torch.from_numpy(packed.input_ids_BS), context)
        for sample, spot in zip(given_samples, packed.spots, strict=True):
            alone_SV = model(torch.from_numpy(sample.ids)[None])[0]
            together_SV = logits_BSV[spot.row, spot.start : spot.start + len(sample.ids)]
            torch.testing.assert_close(together_SV, alone_SV, atol=1e-5, rtol=1e-5)
