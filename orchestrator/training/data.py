"""Prepared tokens as sequences, and the order in which a run sees them.

A folder that `prepare` made holds index.json, the tokenizer, and the tokens of each split as plain little-endian integers in
a few files. The splits are read as one long stream each: sample i is tokens [i S, i S + S], its targets are its inputs one
further.
B micro batch, S sequence.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
INDEX = "index.json"
FORMAT = 2
Files = tuple[tuple[str, int], ...]
"""(file in the folder, tokens in it), in the order of a stream."""
MAX_OPEN_FILES = 64
"""Token files that a dataset has mapped at once. Each mapping holds a file descriptor, and a system allows 1024 by default."""
ENTROPY_TOKENS = 2**28
"""Tokens that an entropy looks at; beyond, evenly spaced parts of the stream stand for all of it."""


class DataError(ValueError):
    """Text, tokens or a tokenizer that cannot be used: the message says which, where, and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One input file, as it was when it was tokenized."""

    path: str
    split: Split
    """Split that its text went to; from a train file a fraction goes to validation."""
    bytes: int
    mtime_ns: int
    sha256: str
    num_documents: int
    num_tokens: Mapping[Split, int]
    """Tokens that it gave to each split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataIndex:
    """The index of a folder of prepared tokens."""

    directory: Path
    dtype: Literal["uint16", "uint32"]
    tokenizer: Mapping[str, Any]
    """kind, vocab_size, end_of_text, fingerprint."""
    sources: tuple[Source, ...]
    """Sources in the order of their tokens."""
    files: Mapping[Split, Files]
    """Files of each split's stream."""
    fingerprint: str
    """Changes when a token, its place or its split changes; the same on every machine."""
    unigram_entropy: float
    """Entropy of the train split, nats per token: the loss of a model that knows only how frequent each token is."""
    row_tokens: int = 0
    """Tokens of a row, where the splits are rows of packed samples (rows.py). 0: they are streams of text."""
    report: str = ""
    """Lines that a person should know of how the data was read: records that were left out, and why."""

    def num_tokens(self, split: Split) -> int:
        return sum(num_tokens for _, num_tokens in self.files[split])

    @property
    def num_documents(self) -> int:
        return sum(source.num_documents for source in self.sources)

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer["vocab_size"])

    def tokens(self, name: str) -> NDArray[Any]:
        """The tokens of one file, memory-mapped. DataError where it cannot be opened."""
        try:
            return np.memmap(self.directory / name, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r")
        except OSError as error:
            raise DataError(
                f"{self.directory / name} cannot be opened ({error.strerror}): prepared tokens must stay while a run "
                "reads them; `shardwise prepare JOB` makes them again"
            ) from None

    def to_mapping(self) -> dict[str, Any]:
        mapping = asdict(self)
        del mapping["directory"]
        plain = json.loads(json.dumps(mapping))
        return {"format": FORMAT, "checksum": _checksum(plain), **plain}


def read_index(directory: Path) -> DataIndex:
    """The index of a prepared folder, its files' sizes checked. DataError where there is none or it is torn."""
    advice = f"delete {directory} and run `shardwise prepare` again"
    try:
        index = index_of(json.loads((directory / INDEX).read_text(encoding="utf-8")), directory)
    except DataError as error:
        raise DataError(f"{error}: {advice}") from None
    except FileNotFoundError:
        raise DataError(f"{directory} holds no prepared tokens: run `shardwise prepare JOB`") from None
    except OSError as error:
        raise DataError(f"{directory / INDEX} cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise DataError(f"{directory / INDEX} is damaged: {advice}") from None
    width = np.dtype(index.dtype).itemsize
    for name, num_tokens in (file for split in SPLITS for file in index.files[split]):
        file = directory / name
        if not file.is_file() or file.stat().st_size != num_tokens * width:
            raise DataError(f"{file} is missing or not {num_tokens * width} bytes long: {advice}")
    return index


def index_of(mapping: dict[str, Any], directory: Path) -> DataIndex:
    """The inverse of DataIndex.to_mapping, through JSON too. DataError for a format that is not known, KeyError, TypeError,
    AttributeError or another ValueError for what is no index, or was altered."""
    written = mapping.pop("format")
    if written not in (1, FORMAT):
        raise DataError(f"{directory} was prepared by another version of shardwise")
    if written == 1:
        _from_format_1(mapping)
    elif mapping.pop("checksum") != _checksum(mapping):
        raise ValueError("altered")
    mapping["sources"] = tuple(Source(**source) for source in mapping["sources"])
    mapping["files"] = {split: tuple((_plain_name(n), int(t)) for n, t in mapping["files"][split]) for split in SPLITS}
    index = DataIndex(directory=directory, **mapping)
    if index.dtype not in ("uint16", "uint32") or not {"kind", "vocab_size", "fingerprint"} <= index.tokenizer.keys():
        raise ValueError("no index")
    return index


def _checksum(mapping: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()


def _plain_name(name: str) -> str:
    if name != os.path.basename(name) or len(name) > 100:
        raise ValueError("a file outside the folder")
    return name


def _from_format_1(mapping: dict[str, Any]) -> None:
    """A folder of format 1 holds one file per input and split."""
    mapping["files"] = {split: [] for split in SPLITS}
    for source in mapping["sources"]:
        shards = source.pop("shards")
        source["num_tokens"] = {split: shards.get(split, ("", 0))[1] for split in SPLITS}
        for split in SPLITS:
            mapping["files"][split] += [shards[split]] if split in shards else []


class TokenDataset:
    """Sequences of one split; any worker may read any of them. Files are mapped when they are read, a few at a time."""

    def __init__(self, directory: Path | str, split: Split, sequence_length: int) -> None:
        """DataError where the split does not fill one sequence."""
        self.index = read_index(Path(directory))
        self.split, self.sequence_length = split, sequence_length
        files = self.index.files[split]
        self._names = [name for name, _ in files]
        self._tokens = lru_cache(MAX_OPEN_FILES)(self.index.tokens)
        self._ends = np.cumsum([num_tokens for _, num_tokens in files], dtype=np.int64)
        self.num_tokens = int(self._ends[-1]) if len(self._ends) else 0
        self.num_samples = max(0, (self.num_tokens - 1) // sequence_length)
        if not self.num_samples:
            raise DataError(
                f"the {split} split in {directory} holds {self.num_tokens} tokens, and one sequence needs "
                f"{sequence_length + 1}: add text to data.{split}, or lower batch.sequence_length"
            )

    def __len__(self) -> int:
        return self.num_samples

    def sequences(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(input_ids_BS, target_ids_BS), each its own memory."""
        tokens = np.empty((len(indices), self.sequence_length + 1), dtype=np.int64)
        for row, index in enumerate(indices):
            if not 0 <= index < self.num_samples:
                raise IndexError(f"sample {index} of {self.num_samples}")
            self._read(int(index) * self.sequence_length, tokens[row])
        return tokens[:, :-1].copy(), tokens[:, 1:].copy()

    def num_targets(self, indices: NDArray[np.int64]) -> int:
        """Target tokens of these sequences: all count."""
        return len(indices) * self.sequence_length

    def inputs(self, indices: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return what the module takes beside the tokens: nothing, a row is one sample."""
        return {}

    def labels(self, indices: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return what the loss takes beside the target ids: nothing."""
        return {}

    def _read(self, first: int, out: NDArray[np.int64]) -> None:
        """Fills `out` with the stream's tokens from `first` on, over the ends of files."""
        file = int(np.searchsorted(self._ends, first, side="right"))
        filled = 0
        while filled < len(out):
            start = first + filled - (int(self._ends[file - 1]) if file else 0)
            part = self._tokens(self._names[file])[start : start + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            file += 1


class Dataset(Protocol):
    """The sequences that training reads: of one length, by their number."""

    index: DataIndex
    sequence_length: int

    def __len__(self) -> int: ...

    def num_targets(self, indices: NDArray[np.int64]) -> int:
        """Return what the loss sums over in these sequences: tokens, or pairs of answers."""

    def sequences(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(input_ids_BS, target_ids_BS), each its own memory; -100 where a target does not count."""

    def inputs(self, indices: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Further inputs of the module, by name (engine.MicroBatch)."""

    def labels(self, indices: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Further inputs of the loss, by name (engine.MicroBatch)."""


def open_datasets(directory: Path | str, sequence_length: int) -> tuple[Dataset, Dataset | None]:
    """Return (train, validation) of a folder of prepared text; None where the held-out text does not fill one sequence."""
    train = TokenDataset(directory, "train", sequence_length)
    held_out = train.index.num_tokens("validation") > sequence_length
    return train, TokenDataset(directory, "validation", sequence_length) if held_out else None


# The order of samples ------------------------------------------------------------------------------------------------


def batch_indices(seed: int, step: int, global_batch_size: int, num_samples: int) -> NDArray[np.int64]:
    """Samples of the global batch of a step, counted from 0: a function of its arguments alone.

    The run goes through the samples epoch by epoch, each epoch in an order of its own, without storing any: an epoch's
    order is a Feistel network on the sample's place (Luby and Rackoff 1988), a permutation of the next power of 4, walked
    until it lands below num_samples (Black and Rogaway 2002). Every sample comes once an epoch; batches run over the
    seam between epochs."""
    if num_samples < 1 or global_batch_size < 1 or step < 0:
        raise ValueError(f"step {step}, global_batch_size {global_batch_size}, num_samples {num_samples}")
    first = step * global_batch_size
    epochs, places = np.divmod(np.arange(first, first + global_batch_size, dtype=np.int64), num_samples)
    indices = np.empty(global_batch_size, dtype=np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        of_epoch = epochs == epoch
        indices[of_epoch] = _permuted(places[of_epoch].astype(np.uint64), num_samples, seed, epoch)
    return indices


_NUM_ROUNDS = 6
_WORD = 2**64 - 1


def _permuted(places: NDArray[np.uint64], num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    half = np.uint64(max(1, ((num_samples - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    key = mixed(np.array([seed & _WORD], dtype=np.uint64))
    key = mixed(key ^ np.array([epoch], dtype=np.uint64))
    keys = [mixed(key + np.uint64(1 + number)) for number in range(_NUM_ROUNDS)]
    found = places.copy()
    outside = np.ones(len(found), dtype=np.bool_)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (mixed(right + round_key) & mask)
        found[outside] = (left << half) | right
        outside = found >= num_samples
    return found.astype(np.int64)


def mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014); arrays wrap around in silence."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


# Entropy -------------------------------------------------------------------------------------------------------------


def unigram_entropy(shards: Iterable[NDArray[Any]], num_tokens: int, vocab_size: int) -> float:
    """Entropy of the tokens' frequencies, nats per token; a model whose loss is below it has learnt more than counts.

    Args:
        num_tokens: of all shards; each shard is let go before the next is asked for.
    """
    if not num_tokens:
        return 0.0
    chunk = 2**22
    keep_every = math.ceil(num_tokens / ENTROPY_TOKENS)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for shard in shards:
        for start in range(0, len(shard), chunk * keep_every):
            counts += np.bincount(shard[start : start + chunk], minlength=vocab_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
