"""Prepared tokens: what goes in comes out once, in an order that the seed and the step decide, or a clear error."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.training import shard
from orchestrator.training.data import (
    MAX_OPEN_FILES,
    DataError,
    TokenDataset,
    batch_indices,
    open_datasets,
    read_index,
    unigram_entropy,
)
from orchestrator.training.inputs import Request, versions
from orchestrator.training.prepare import prepare
from tests.mutations import mutated, mutated_bytes

DOCUMENTS = [f"document {number}: " + "words and more words. " * (number % 7) for number in range(300)]
END = 256


def corpus(folder: Path, *, kind: str = "jsonl", documents: list[str] = DOCUMENTS, name: str = "corpus") -> Path:
    file = folder / f"{name}.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": documents}), file)
    else:
        file.write_text("\n".join(documents))
    return file


def request(folder: Path, **fields) -> Request:
    return Request(**{"base": folder, "train": ("corpus.jsonl",), "validation": 0.0} | fields)


def newest(stem: Path) -> Path:
    """The folder of tokens that was made last."""
    return max(versions(stem), key=lambda folder: (folder / "index.json").stat().st_mtime_ns)


def stream(folder: Path, split: str = "train") -> list[int]:
    index = read_index(newest(folder))
    return [int(token) for name, _ in index.files[split] for token in index.tokens(name)]


def test_bytes_and_the_end_of_each_text_are_all_that_is_stored(tmp_path):
    corpus(tmp_path, documents=["ab", "", "ż"])
    index = prepare(request(tmp_path), directory=tmp_path / "tokens")
    assert stream(tmp_path / "tokens") == [97, 98, END, 0xC5, 0xBC, END]
    assert (index.dtype, index.num_documents, index.vocab_size) == ("uint16", 2, 257)
    assert index.unigram_entropy == pytest.approx(4 / 6 * np.log(6) + 2 / 6 * np.log(3))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_of_many_documents_gives_them_in_order(tmp_path, kind):
    corpus(tmp_path, kind=kind)
    prepare(request(tmp_path, train=(f"corpus.{kind}",)), directory=tmp_path / "tokens")
    assert stream(tmp_path / "tokens") == [token for text in DOCUMENTS for token in (*text.encode(), END)]


def test_a_txt_is_one_document_its_byte_order_mark_no_part_of_it(tmp_path):
    (tmp_path / "corpus.txt").write_bytes(b"\xef\xbb\xbfone\ntwo")
    prepare(request(tmp_path, train=("*.txt",)), directory=tmp_path / "tokens")
    assert stream(tmp_path / "tokens") == [*b"one\ntwo", END]


def test_a_txt_larger_than_a_chunk_loses_nothing(tmp_path):
    text = "".join(f"line {number}\n" for number in range(250_000))
    (tmp_path / "corpus.txt").write_text(text)
    prepare(request(tmp_path, train=("corpus.txt",)), directory=tmp_path / "tokens")
    assert stream(tmp_path / "tokens") == [*text.encode(), END]


@pytest.mark.parametrize("fraction", [0.005, 0.1, 0.3, 0.5])
def test_the_held_out_fraction_is_held_out_and_nothing_is_lost(tmp_path, fraction):
    for number in range(4):
        corpus(tmp_path, name=f"part-{number}")
    prepare(request(tmp_path, train=("part-*.jsonl",), validation=fraction), directory=tmp_path / "tokens")
    train, held_out = (stream(tmp_path / "tokens", split) for split in ("train", "validation"))
    assert len(train) + len(held_out) == 4 * sum(len(text) + 1 for text in DOCUMENTS)
    assert held_out.count(END) / (train.count(END) + held_out.count(END)) == pytest.approx(fraction, abs=0.005)


def test_a_long_document_is_held_out_in_pieces(tmp_path):
    text = "".join(f"line {number}\n" for number in range(50_000))
    (tmp_path / "corpus.txt").write_text(text)
    prepare(request(tmp_path, train=("corpus.txt",), validation=0.02), directory=tmp_path / "tokens")
    train, held_out = (stream(tmp_path / "tokens", split) for split in ("train", "validation"))
    assert len(train) + len(held_out) == len(text) + 1
    assert len(held_out) / len(text) == pytest.approx(0.02, rel=0.3)


def test_validation_files_are_a_split_of_their_own(tmp_path):
    corpus(tmp_path)
    corpus(tmp_path, name="held", documents=["held out"])
    prepare(request(tmp_path, validation=("held.jsonl",)), directory=tmp_path / "tokens")
    assert stream(tmp_path / "tokens", "validation") == [*b"held out", END]


def test_processes_make_the_same_folder_as_one_process(tmp_path):
    for number in range(3):
        corpus(tmp_path, name=f"part-{number}")
    asked = request(tmp_path, train=("part-*.jsonl",), validation=0.1)
    one = prepare(asked, directory=tmp_path / "one", num_processes=1)
    two = prepare(asked, directory=tmp_path / "two", num_processes=2)
    assert one.fingerprint == two.fingerprint
    assert stream(tmp_path / "one") == stream(tmp_path / "two")


FEW_DESCRIPTORS = """
import resource, sys
from pathlib import Path
import numpy as np
from orchestrator.training.data import TokenDataset
from orchestrator.training.inputs import Request, versions
from orchestrator.training.prepare import prepare
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
folder = Path(sys.argv[1])
index = prepare(Request(base=folder, train=("corpus",), validation=0.1), directory=folder / "tokens", num_processes=2)
for split in ("train", "validation"):
    data = TokenDataset(index.directory, split, 8)
    inputs, _ = data.sequences(np.random.default_rng(0).permutation(len(data)))
    with open("/proc/self/maps") as maps:
        mapped = sum(".bin" in line for line in maps)
    print(split, len(inputs), mapped)
"""


def test_a_corpus_of_2000_files_is_prepared_and_read_with_256_descriptors(tmp_path):
    (tmp_path / "corpus").mkdir()
    for number in range(2000):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"the text of file {number}")
    done = subprocess.run(
        [sys.executable, "-c", FEW_DESCRIPTORS, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    num_tokens = sum(len(f"the text of file {number}") + 1 for number in range(2000))
    (train, sequences, mapped), (held_out, held_sequences, _) = (line.split() for line in done.stdout.splitlines())
    assert (train, held_out) == ("train", "validation")
    assert num_tokens - 18 <= 8 * (int(sequences) + int(held_sequences)) <= num_tokens
    assert int(mapped) <= MAX_OPEN_FILES


@pytest.mark.parametrize(
    ("tokenizer", "fingerprint", "num_tokens", "streams"),
    [
        ("byte", "6f77181c268ab9e8", (357330, 23220), ("d19f3d787a3bca83", "f05289cbe2911260")),
        (300, "bca3f762db20fe52", (136638, 8656), ("7719aea1e805b981", "2537841f199c4e8d")),
    ],
)
def test_the_stream_of_a_corpus_never_changes(tmp_path, tokenizer, fingerprint, num_tokens, streams):
    """The values are those of the first version: a change breaks the resume of every run there is."""
    (tmp_path / "texts").mkdir()
    for n in range(40):
        if n % 3 == 0:
            corpus(
                tmp_path / "texts", kind="txt", name=f"{n:02}", documents=[f"line {i} of {n}" for i in range(50 * n)]
            )
            if n:
                with open(tmp_path / "texts" / f"{n:02}.txt", "a") as file:
                    file.write("\n")
        else:
            documents = [f"document {i} of {n}: " + "words " * (i % 7) for i in range(9 * n)]
            corpus(tmp_path / "texts", name=f"{n:02}", documents=documents)
    asked = request(tmp_path, train=("texts",), validation=0.05, tokenizer=tokenizer)
    index = prepare(asked, directory=tmp_path / "tokens")
    assert index.fingerprint.startswith(fingerprint)
    for split, tokens, stream_sha256 in zip(("train", "validation"), num_tokens, streams, strict=True):
        data = TokenDataset(index.directory, split, 64)
        inputs, targets = data.sequences(np.arange(len(data)))
        assert data.num_tokens == tokens
        assert hashlib.sha256(inputs.tobytes() + targets.tobytes()).hexdigest().startswith(stream_sha256)


# Used again, made again, gone on with ----------------------------------------------------------------------------------


def test_a_folder_is_used_again_until_something_that_decides_it_changes(tmp_path, monkeypatch):
    file, asked, folder = corpus(tmp_path), request(tmp_path), tmp_path / "tokens"
    made: list[str] = []
    make = shard.make
    monkeypatch.setattr(shard, "make", lambda work, *rest: made.append(work.path) or make(work, *rest))
    changes = {
        "first time": lambda: asked,
        "the same": lambda: asked,
        "touched": lambda: os.utime(file) or asked,
        "other text": lambda: file.write_text('{"text": "other"}\n' * 9) and asked,
        "other split": lambda: request(tmp_path, validation=0.5),
        "more files": lambda: corpus(tmp_path, name="more") and request(tmp_path, train=("*.jsonl",)),
    }
    again = {}
    for name, change in changes.items():
        made.clear()
        prepare(change(), directory=folder)
        again[name] = bool(made)
    assert again == {
        "first time": True,
        "the same": False,
        "touched": False,
        "other text": True,
        "other split": True,
        "more files": True,
    }


def test_an_attempt_cut_short_goes_on_with_the_files_that_are_left(tmp_path, monkeypatch):
    for number in range(3):
        corpus(tmp_path, name=f"part-{number}", documents=[f"text {number}"])
    asked, encoded = request(tmp_path, train=("part-*.jsonl",)), []
    read = shard.corpus.read

    def interrupted(path):
        if path.name == "part-2.jsonl" and len(encoded) == 2:
            encoded.append("interrupted")
            raise KeyboardInterrupt
        encoded.append(path.name)
        return read(path)

    monkeypatch.setattr(shard.corpus, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(asked, directory=tmp_path / "tokens")
    assert versions(tmp_path / "tokens") == []
    prepare(asked, directory=tmp_path / "tokens")
    assert encoded == ["part-0.jsonl", "part-1.jsonl", "interrupted", "part-2.jsonl"]
    assert stream(tmp_path / "tokens") == [token for n in range(3) for token in (*f"text {n}".encode(), END)]
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {newest(tmp_path / "tokens").name, "tokens.lock", *(f"part-{n}.jsonl" for n in range(3))}


def test_what_a_power_cut_tore_of_an_attempt_is_made_again(tmp_path, monkeypatch):
    corpus(tmp_path, name="a", documents=["the first text"])
    corpus(tmp_path, name="b", documents=["the second text"])
    asked = request(tmp_path, train=("*.jsonl",))
    with monkeypatch.context() as patch:
        patch.setattr(shard, "merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(asked, directory=tmp_path / "tokens")
    for torn in (tmp_path / "tokens.partial").glob("*-train.bin"):
        torn.write_bytes(bytes(torn.stat().st_size))
    prepare(asked, directory=tmp_path / "tokens")
    assert stream(tmp_path / "tokens") == [*b"the first text", END, *b"the second text", END]


@pytest.mark.parametrize(
    ("sizes", "grouped"),
    [([], []), ([3], [[0]]), ([9, 1], [[0], [1]]), ([2, 2, 1, 4, 9, 1, 1], [[0, 1, 2], [3], [4], [5, 6]])],
)
def test_files_are_merged_in_order_up_to_a_size(sizes, grouped):
    assert shard.groups(sizes, 5) == grouped


def test_a_folder_with_one_file_of_tokens_per_input_is_read_as_before(tmp_path):
    """Format 1, of the first version."""
    (tmp_path / "a.bin").write_bytes(np.array([1, 2, 3], "<u2").tobytes())
    (tmp_path / "b.bin").write_bytes(np.array([4, 5], "<u2").tobytes())
    source = {"path": "/a.txt", "split": "train", "bytes": 9, "mtime_ns": 0, "sha256": "", "num_documents": 1}
    index = {
        "format": 1,
        "dtype": "uint16",
        "tokenizer": {"kind": "byte", "vocab_size": 257, "end_of_text": 256, "fingerprint": "byte-1"},
        "sources": [{**source, "shards": {"train": [name, count]}} for name, count in (("a.bin", 3), ("b.bin", 2))],
        "fingerprint": "1",
        "unigram_entropy": 1.0,
    }
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert stream(tmp_path) == [1, 2, 3, 4, 5]
    assert read_index(tmp_path).num_tokens("validation") == 0


def test_a_full_disk_leaves_nothing_half_written_and_the_old_folder_as_it_was(tmp_path, monkeypatch):
    corpus(tmp_path)
    before = prepare(request(tmp_path), directory=tmp_path / "tokens")
    corpus(tmp_path, name="more")
    asked = request(tmp_path, train=("*.jsonl",))
    partial = tmp_path / "tokens.partial"
    for full_file, num_finished in (("-train.bin", 0), ("/whole/train-00000.bin", 2), ("/whole/.index.json", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(io, "open", full_disk(io.open, full_file))
            patch.setattr(shard, "open", full_disk(open, full_file), raising=False)
            with pytest.raises(DataError, match="is full: free space, or set XDG_CACHE_HOME"):
                prepare(asked, directory=tmp_path / "tokens")
        assert versions(tmp_path / "tokens") == [before.directory]
        assert read_index(before.directory) == before
        assert len(list(partial.glob("*.json"))) == len(list(partial.glob("*-train.bin"))) == num_finished
    assert prepare(asked, directory=tmp_path / "tokens").num_documents == 2 * before.num_documents
    assert not partial.exists()


def full_disk(open_file, part):
    """`open` on a disk that has no room for files with this part in their path."""

    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(file, mode="r", *rest, **named):
        if part in str(file) and set(mode) & set("wx"):
            open_file(file, mode, *rest, **named).close()
            return Full() if "b" in mode else io.TextIOWrapper(Full(), write_through=True)
        return open_file(file, mode, *rest, **named)

    return opened


def test_progress_ends_with_all_bytes(tmp_path):
    file, told = corpus(tmp_path), []
    prepare(request(tmp_path), directory=tmp_path / "tokens", progress=lambda *pair: told.append(pair))
    assert told == sorted(told)
    assert told[-1] == (file.stat().st_size, file.stat().st_size)


# Errors ----------------------------------------------------------------------------------------------------------------

BAD_CORPORA = [
    ("missing", {}, ("nowhere.txt",), r"nowhere\.txt does not exist \(paths are relative to the job file\)"),
    ("no match", {}, ("*.txt",), r"\*\.txt matches no file that ends in \.txt, \.jsonl, \.parquet"),
    ("other suffix", {"a.pdf": b"x"}, ("a.pdf",), r"a\.pdf ends in \.pdf; known are \.txt, \.jsonl, \.parquet"),
    ("empty folder", {"folder/a.md": b"x"}, ("folder",), r"the folder .*folder holds no file"),
    ("empty file", {"a.txt": b""}, ("a.txt",), r"data\.train holds no text to train on: .*a\.txt gave 0 documents"),
    ("latin-1", {"a.txt": b"fine\nM\xfcnchen"}, ("a.txt",), r"a\.txt is not UTF-8: byte 6 is 0xfc\. Convert it: iconv"),
    ("latin-1 line", {"a.jsonl": b'{"text": "a"}\n{"text": "\xfc"}'}, ("a.jsonl",), r"a\.jsonl is not UTF-8: byte 24"),
    ("no json", {"a.jsonl": b'{"text": "a"}\n{oops'}, ("a.jsonl",), r"a\.jsonl:2 is not JSON"),
    ("deep json", {"a.jsonl": b"[" * 100_000}, ("a.jsonl",), r"a\.jsonl:1 is not JSON: nested too deeply"),
    ("no text", {"a.jsonl": b'{"body": "a"}'}, ("a.jsonl",), r"a\.jsonl:1 has keys body; each line needs a key 'text'"),
    ("a list", {"a.jsonl": b"[1]"}, ("a.jsonl",), r"a\.jsonl:1 has no object; each line needs a key 'text'"),
    ("number", {"a.jsonl": b'{"text": 5}'}, ("a.jsonl",), r"a\.jsonl:1: 'text' is int, not a string"),
    ("surrogate", {"a.jsonl": b'{"text": "x\\ud800"}'}, ("a.jsonl",), r"half a surrogate pair at character 1"),
    ("no parquet", {"a.parquet": b"PAR1 not"}, ("a.parquet",), r"a\.parquet cannot be read as parquet"),
]


@pytest.mark.parametrize(
    ("files", "train", "message"), [case[1:] for case in BAD_CORPORA], ids=[c[0] for c in BAD_CORPORA]
)
def test_a_corpus_that_cannot_be_used_is_refused_by_place(tmp_path, files, train, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(request(tmp_path, train=train), directory=tmp_path / "tokens")
    assert versions(tmp_path / "tokens") == []


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": ["a"]}, "has columns body; it needs one named 'text'"),
        ({"text": [1]}, "column 'text' holds int64, not strings"),
    ],
)
def test_a_parquet_without_text_is_refused(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        prepare(request(tmp_path, train=("a.parquet",)), directory=tmp_path / "tokens")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path):
    corpus(tmp_path).chmod(0)
    with pytest.raises(DataError, match=r"corpus\.jsonl cannot be read: Permission denied"):
        prepare(request(tmp_path), directory=tmp_path / "tokens")


def test_a_file_in_both_splits_is_refused(tmp_path):
    corpus(tmp_path)
    with pytest.raises(DataError, match=r"corpus\.jsonl is in data\.train and in data\.validation"):
        prepare(request(tmp_path, validation=("*.jsonl",)), directory=tmp_path / "tokens")


def test_a_folder_that_is_missing_torn_or_too_small_is_refused_with_advice(tmp_path):
    with pytest.raises(DataError, match=r"holds no prepared tokens: run `shardwise prepare JOB`"):
        read_index(tmp_path)
    corpus(tmp_path)
    index = prepare(request(tmp_path), directory=tmp_path / "tokens")
    folder = index.directory
    with pytest.raises(DataError, match=r"one sequence needs 100001: add text to data\.train, or lower"):
        TokenDataset(folder, "train", 100_000)
    ((name, num_tokens),) = index.files["train"]
    with open(folder / name, "r+b") as file:
        file.truncate(num_tokens)
    with pytest.raises(
        DataError, match=f"is missing or not {2 * num_tokens} bytes long: delete .* `shardwise prepare`"
    ):
        read_index(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        read_index(folder)


def test_an_altered_index_is_refused_and_the_folder_made_again(tmp_path):
    corpus(tmp_path)
    index = prepare(request(tmp_path), directory=tmp_path / "tokens")
    file, rng = index.directory / "index.json", random.Random(1)
    whole = file.read_bytes()
    for number in range(100):
        altered = json.dumps(mutated(json.loads(whole), rng)).encode() if number % 3 else mutated_bytes(whole, rng)
        file.write_bytes(altered)
        if json_of(altered) == json_of(whole):
            continue
        with pytest.raises(DataError, match=r"is damaged|by another version"):
            read_index(index.directory)
    assert prepare(request(tmp_path), directory=tmp_path / "tokens") == index


def json_of(raw: bytes):
    try:
        return json.loads(raw)
    except ValueError:
        return None


# Sequences and their order -----------------------------------------------------------------------------------------------


def test_sequences_follow_one_another_over_the_ends_of_files_and_targets_are_one_further(tmp_path):
    for number in range(5):
        corpus(tmp_path, name=f"part-{number}", documents=["x" * (number + 1)])
    index = prepare(request(tmp_path, train=("part-*.jsonl",)), directory=tmp_path / "tokens")
    tokens = stream(tmp_path / "tokens")
    data = TokenDataset(index.directory, "train", 4)
    inputs, targets = data.sequences(np.arange(len(data)))
    assert len(data) == data.num_samples == (len(tokens) - 1) // 4
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.ravel().tolist() == tokens[: 4 * len(data)]
    assert targets.ravel().tolist() == tokens[1 : 4 * len(data) + 1]
    with pytest.raises(IndexError):
        data.sequences(np.array([len(data)]))


def test_held_out_text_shorter_than_a_sequence_is_no_dataset(tmp_path):
    corpus(tmp_path)
    index = prepare(request(tmp_path), directory=tmp_path / "tokens")
    train, validation = open_datasets(index.directory, 16)
    assert len(train) > 0
    assert validation is None


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    num_samples=st.integers(1, 300),
    global_batch_size=st.integers(1, 50),
)
def test_every_sample_comes_once_an_epoch(seed, num_samples, global_batch_size):
    num_steps = -(-3 * num_samples // global_batch_size)
    order = np.concatenate([batch_indices(seed, step, global_batch_size, num_samples) for step in range(num_steps)])
    for epoch in range(3):
        of_epoch = order[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(of_epoch) == list(range(num_samples))


def test_the_order_is_a_function_of_seed_and_step_and_looks_random():
    now = batch_indices(7, 3, 64, 10**6)
    assert now.tolist() == batch_indices(7, 3, 64, 10**6).tolist()
    assert now[:4].tolist() == [305165, 266804, 12704, 777814]  # a change breaks the resume of every run there is
    assert now.tolist() != batch_indices(8, 3, 64, 10**6).tolist()
    one_batch_as_two = np.concatenate([batch_indices(7, step, 32, 10**6) for step in (6, 7)])
    assert now.tolist() == one_batch_as_two.tolist()
    first, second = (batch_indices(7, epoch, 1000, 1000) for epoch in (0, 1))
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.1
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
    assert (first == np.arange(1000)).sum() < 10


@pytest.mark.parametrize(("tokens", "nats"), [([3] * 8, 0.0), ([0, 1] * 8, np.log(2)), (list(range(16)), np.log(16))])
def test_entropy_is_that_of_the_frequencies(tokens, nats):
    assert unigram_entropy([np.array(tokens, dtype=np.uint16)], len(tokens), 16) == pytest.approx(nats)
