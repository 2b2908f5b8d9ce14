"""Tokenizers: text comes back as it went in, documents end, and a wrong one is refused."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter

import pytest
from transformers import AutoTokenizer

from orchestrator.cli import main
from orchestrator.spec import parse_job
from orchestrator.training.data import DataError
from orchestrator.training.examples import Message
from orchestrator.training.inputs import Request
from orchestrator.training.prepare import prepare, prepare_job
from orchestrator.training.templates import chat_template_of
from orchestrator.training.tokenizer import (
    ByteTokenizer,
    check_vocabulary,
    keep_tokenizer,
    kept_tokenizer,
    load_saved,
    load_tokenizer,
    train_bpe,
    unfilled,
)
from tests.mutations import mutated, mutated_bytes

TEXT = "def naïve(x):\n    return 'żółć'  # 漢字 🙂\n"


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(iter([TEXT * 20, "the cat and the hat " * 50]), 300)


def test_text_comes_back_as_it_went_in(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
        assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.end_of_text]) == "a"
        assert max(tokenizer.encode(TEXT)) < tokenizer.vocab_size


def test_a_trained_bpe_packs_text_and_is_the_same_each_time(bpe):
    again = train_bpe(iter([TEXT * 20, "the cat and the hat " * 50]), 300)
    assert again.fingerprint == bpe.fingerprint
    assert bpe.vocab_size == 300
    assert len(bpe.encode("the cat and the hat")) < 10


@pytest.mark.parametrize("layout", ["file", "folder", "vocab and merges"])
def test_a_hugging_face_tokenizer_loads_from_its_file_or_folder(tmp_path, bpe, layout):
    path = tmp_path
    bpe.save(tmp_path)
    if layout == "file":
        path = tmp_path / "tokenizer.json"
    if layout == "vocab and merges":
        bpe.inner.model.save(str(tmp_path))
        (tmp_path / "tokenizer.json").unlink()
    loaded = load_tokenizer(str(path), tmp_path)
    assert loaded.encode(TEXT) == bpe.encode(TEXT)
    assert loaded.end_of_text == bpe.end_of_text


def test_the_configuration_says_which_token_ends_a_text(tmp_path, bpe):
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "the"}}))
    assert load_tokenizer(str(tmp_path), tmp_path).end_of_text == bpe.inner.token_to_id("the")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, r"does not exist; write byte, \{bpe: 8192\} or a tokenizer's folder"),
        ({}, r"holds neither tokenizer\.json nor vocab\.json with merges\.txt"),
        ({"tokenizer.json": "{"}, "is no tokenizer that `tokenizers` can read"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "names no end of a text: put its token into tokenizer_config"),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path, files, message):
    folder = tmp_path / "tokenizer"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer("tokenizer", tmp_path)


def test_a_chat_template_in_a_file_of_its_own_is_read_and_exported(tmp_path, bpe):
    bpe.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for message in messages %}<{{ message.content }}>{% endfor %}")
    found = load_tokenizer(str(tmp_path), tmp_path)
    assert chat_template_of(found).source.startswith("{% for message in messages %}")
    (tmp_path / "out").mkdir()
    found.export(tmp_path / "out", 64)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<hi>"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"chat_template\.jinja cannot be read"):
        load_tokenizer(str(tmp_path), tmp_path)


def test_a_vocabulary_larger_than_the_models_is_refused_with_a_number_that_works():
    check_vocabulary(257, 257)
    with pytest.raises(DataError, match=r"set model\.vocab_size to at least 257 \(264 divides by 8\)"):
        check_vocabulary(257, 256)
    with pytest.raises(DataError, match="bpe is 256; it needs at least 257"):
        train_bpe(iter([TEXT]), 256)


@pytest.mark.parametrize(
    ("tokens", "rows", "warned"),
    [
        (257, 264, False),
        (257, 384, False),
        (257, 512, True),
        (257, 50272, True),
        (50265, 50272, False),
        (50257, 51200, False),
        (32000, 50272, True),
    ],
)
def test_a_vocabulary_that_the_tokenizer_does_not_nearly_fill_is_warned_of_with_both_numbers(tokens, rows, warned):
    told = unfilled(tokens, rows)
    assert (
        (f"the tokenizer has {tokens:,} tokens and the model's vocab_size is {rows:,}" in told) is bool(told) is warned
    )


@pytest.fixture
def folder_of_weights(tmp_path, bpe):
    """A Hugging Face folder, of which `prepare` reads the configuration and the tokenizer alone."""
    folder = tmp_path / "hub"
    folder.mkdir()
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 1000}
    (folder / "config.json").write_text(json.dumps({"model_type": "opt", **shape}))
    bpe.save(folder)
    (tmp_path / "a.txt").write_text(TEXT * 50)
    return folder


def job(folder, model, **data):
    mapping = {"version": 1, "name": "tuned", "model": model, "data": {"train": ["a.txt"], "validation": 0, **data}}
    return parse_job({**mapping, "batch": {"global_batch_size": 2, "sequence_length": 16}}, directory=folder)


@pytest.mark.parametrize(
    ("model", "data", "kind", "notes"),
    [
        ({"path": "hub"}, {}, "hugging_face", ["that of the weights, in hub", "1,000: 700 rows"]),
        ({"path": "hub"}, {"tokenizer": "byte"}, "byte", ["1,000: 743 rows"]),
        ({"path": "hub", "initialize": "random"}, {}, "byte", ["1,000: 743 rows"]),
        ("opt-125m", {"tokenizer": "hub"}, "hugging_face", ["50,272: 49,972 rows"]),
    ],
)
def test_weights_get_their_own_tokenizer_where_the_job_names_none(
    folder_of_weights, tmp_path, monkeypatch, capsys, model, data, kind, notes
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = job(tmp_path, model, **data)
    (tmp_path / "job.yaml").write_text(asked.to_yaml())
    assert main(["prepare", str(tmp_path / "job.yaml"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokenizer"] == kind
    for note, part in zip(told["notes"], notes, strict=True):
        assert part in note


def test_weights_without_a_tokenizer_are_refused_and_never_given_bytes(folder_of_weights, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder_of_weights / "tokenizer.json").unlink()
    told = (
        r"data\.tokenizer is absent, .* \S*hub holds neither tokenizer\.json nor .* Or name it: data\.tokenizer: FOLDER"
    )
    with pytest.raises(DataError, match=told):
        prepare_job(job(tmp_path, {"path": "hub"}))
    assert not (tmp_path / "cache" / "shardwise" / "data").exists()


def test_the_tokenizer_of_the_weights_is_part_of_the_trajectory(folder_of_weights, tmp_path):
    absent, byte = job(tmp_path, {"path": "hub"}), job(tmp_path, {"path": "hub"}, tokenizer="byte")
    assert absent.trajectory_difference(byte) == ["data.tokenizer"]
    assert absent.trajectory_difference(parse_job(absent.to_mapping(), directory=tmp_path)) == []


@pytest.mark.parametrize("tokenizer", ["byte", 300])
def test_prepared_tokens_bring_their_tokenizer_and_a_run_keeps_it(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(TEXT * 50)
    asked = Request(base=tmp_path, train=("a.txt",), tokenizer=tokenizer, validation=0.0)
    index = prepare(asked, directory=tmp_path / "tokens")
    assert prepare(asked, directory=tmp_path / "tokens") == index
    keep_tokenizer(index, tmp_path / "run")
    kept = kept_tokenizer(tmp_path / "run")
    assert kept.fingerprint == load_saved(index.directory, index.tokenizer).fingerprint
    assert kept.decode(kept.encode(TEXT)) == TEXT
    with pytest.raises(DataError, match="holds no tokenizer"):
        kept_tokenizer(tmp_path)


def test_a_tokenizer_altered_after_the_text_was_tokenized_is_refused(tmp_path, bpe):
    (tmp_path / "a.txt").write_text(TEXT * 50)
    asked = Request(base=tmp_path, train=("a.txt",), tokenizer=290, validation=0.0)
    index = prepare(asked, directory=tmp_path / "tokens")
    bpe.save(index.directory)
    with pytest.raises(DataError, match="was altered after the text was tokenized"):
        load_saved(index.directory, index.tokenizer)


# Folders of strangers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_an_altered_folder_gives_a_tokenizer_or_an_error_in_a_sentence_and_runs_nothing(tmp_path, bpe, count):
    whole, altered, exported = (tmp_path / name for name in ("whole", "altered", "exported"))
    whole.mkdir()
    exported.mkdir()
    bpe.save(whole)
    bpe.inner.model.save(str(whole))
    config = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": "a", "chat_template": "{{ messages[0].content }}"}
    (whole / "tokenizer_config.json").write_text(json.dumps(config))
    (whole / "special_tokens_map.json").write_text(json.dumps({"pad_token": "b"}))
    described = load_tokenizer(str(whole), whole).describe()
    rng = random.Random(count)
    outcomes = Counter()
    for _ in range(count):
        shutil.rmtree(altered, ignore_errors=True)
        shutil.copytree(whole, altered)
        if rng.random() < 0.3:
            (altered / "tokenizer.json").unlink()
        file = rng.choice(sorted(altered.iterdir()))
        if file.suffix == ".json" and rng.random() < 0.6:
            file.write_text(json.dumps(mutated(json.loads(file.read_text()), rng)))
        else:
            file.write_bytes(mutated_bytes(file.read_bytes(), rng))
        for load in (lambda: load_tokenizer(str(altered), altered), lambda: load_saved(altered, described)):
            try:
                tokenizer = load()
                tokenizer.decode(tokenizer.encode(TEXT))
                tokenizer.export(exported, 16)
                if "chat_template" in tokenizer.config:
                    chat_template_of(tokenizer).pieces((Message(role="user", content="q"),))
                outcomes["used"] += 1
            except DataError:
                outcomes["refused"] += 1
    assert min(outcomes["used"], outcomes["refused"]) > count // 2


def test_a_panic_of_the_library_is_an_error_in_a_sentence(tmp_path, bpe):
    bpe.save(tmp_path)
    inner = json.loads((tmp_path / "tokenizer.json").read_text())
    first, second = inner["model"]["merges"][0]
    inner["model"]["vocab"][first + second] = inner["model"]["vocab"].pop(first + second)
    inner["pre_tokenizer"] = inner["decoder"] = None
    inner["model"]["continuing_subword_prefix"] = "x" * 1000
    (tmp_path / "tokenizer.json").write_text(json.dumps(inner))
    with pytest.raises(DataError, match="is no tokenizer that `tokenizers` can read: range"):
        load_tokenizer(str(tmp_path), tmp_path)
