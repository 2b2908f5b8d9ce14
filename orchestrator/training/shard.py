"""One input file -> one file of tokens per split, whole or not there. Runs in a process of its own; pure of any job.

A train file gives a fraction of its pieces to validation. A piece is a document, or a stretch of a long one; every
1/fraction-th is held out, counted from a phase that differs from file to file, so that many small files give their
share too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from clusters.files import publish, write_atomically
from orchestrator.training import corpus
from orchestrator.training.data import SPLITS, DataError, Source, Split
from orchestrator.training.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1 << 20
_BATCH_TEXTS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """All that decides what a file's tokens are and where they go."""

    path: str
    split: Split
    bytes: int
    mtime_ns: int
    fraction: float
    """Of the pieces, held out for validation."""
    phase: float
    """0 to 1, where the count towards the next held-out piece starts."""
    piece_tokens: int
    """A longer document is cut into pieces of this size."""
    dtype: str
    tokenizer: str
    """Its fingerprint."""

    @property
    def stem(self) -> str:
        """Name of the shard: that of the input, so that a second attempt finds it whatever stands beside it."""
        return hashlib.sha256(f"{self.split}/{self.path}".encode()).hexdigest()[:16]


def make(work: Work, tokenizer: Tokenizer, directory: Path, progress: Callable[[int], None] | None = None) -> Source:
    """Tokenizes one file, unless an earlier attempt did. Raises DataError, and OSError where the folder is at fault.

    Args:
        progress: called with the bytes of the file that are done.
    """
    done = _finished(work, directory)
    if done is not None:
        return done
    before = _digest(Path(work.path))
    partial = {split: directory / f"{work.stem}-{split}.partial" for split in SPLITS}
    try:
        with open(partial["train"], "wb") as train, open(partial["validation"], "wb") as validation:
            writer = _Writer(work, {"train": train, "validation": validation})
            for text, ids in _encoded(Path(work.path), tokenizer):
                writer.add(ids)
                if text.ends_document:
                    writer.end_document(tokenizer.end_of_text)
                if progress is not None:
                    progress(text.bytes_done)
        stat = os.stat(work.path)
        if (stat.st_size, stat.st_mtime_ns) != (work.bytes, work.mtime_ns):
            raise DataError(f"{work.path} changed while it was read: run prepare again when nothing writes to it")
        shards: dict[Split, tuple[str, int]] = {}
        for split in SPLITS:
            if writer.num_tokens[split]:
                shards[split] = (f"{work.stem}-{split}.bin", writer.num_tokens[split])
                publish(partial[split], directory / shards[split][0])
    finally:
        for file in partial.values():
            file.unlink(missing_ok=True)
    source = Source(
        path=work.path,
        split=work.split,
        bytes=work.bytes,
        mtime_ns=work.mtime_ns,
        sha256=before,
        num_documents=writer.num_documents,
        shards=shards,
    )
    write_json(directory / f"{work.stem}.json", {"work": asdict(work), "source": asdict(source)})
    return source


def write_json(file: Path, value: Any) -> None:
    """Writes a value as JSON, whole or not at all."""
    write_atomically(file, json.dumps(value))


def _finished(work: Work, directory: Path) -> Source | None:
    """What an earlier attempt left, if nothing that decides it has changed."""
    try:
        note = json.loads((directory / f"{work.stem}.json").read_text(encoding="utf-8"))
        if note["work"] != asdict(work):
            return None
        source = note["source"]
        shards = {split: (str(name), int(tokens)) for split, (name, tokens) in source["shards"].items()}
        width = np.dtype(work.dtype).itemsize
        if any((directory / name).stat().st_size != tokens * width for name, tokens in shards.values()):
            return None
        return Source(**{**source, "shards": shards})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _encoded(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[corpus.Text, NDArray[Any]]]:
    """The file's texts with their ids, encoded by the batch: a tokenizer works on a batch with several threads."""
    batch: list[corpus.Text] = []
    size = 0
    for text in corpus.read(path):
        batch.append(text)
        size += len(text.text)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_TEXTS:
            yield from zip(batch, tokenizer.encode_batch([text.text for text in batch]), strict=True)
            batch, size = [], 0
    yield from zip(batch, tokenizer.encode_batch([text.text for text in batch]), strict=True)


@dataclass
class _Writer:
    """Cuts documents into pieces and gives each to its split."""

    work: Work
    files: dict[Split, IO[bytes]]
    num_tokens: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    num_documents: int = 0
    _num_pieces: int = 0
    _held: list[NDArray[Any]] = field(default_factory=list)
    _num_held: int = 0

    def add(self, ids: NDArray[Any]) -> None:
        """More of the document; whole pieces leave as they fill, but never the last token's."""
        while self._num_held + len(ids) > self.work.piece_tokens:
            room = self.work.piece_tokens - self._num_held
            self._hold(ids[:room])
            ids = ids[room:]
            self._leave()
        self._hold(ids)

    def end_document(self, end_of_text: int) -> None:
        if self._num_held:  # a text of no tokens is no document
            self._hold(np.array([end_of_text]))
            self._leave()
            self.num_documents += 1

    def _hold(self, ids: NDArray[Any]) -> None:
        if len(ids):
            self._held.append(ids)
            self._num_held += len(ids)

    def _leave(self) -> None:
        split = self._split()
        tokens = np.concatenate(self._held).astype(np.dtype(self.work.dtype).newbyteorder("<"))
        self.files[split].write(tokens.tobytes())
        self.num_tokens[split] += len(tokens)
        self._held, self._num_held = [], 0

    def _split(self) -> Split:
        count, fraction, phase = self._num_pieces, self.work.fraction, self.work.phase
        self._num_pieces += 1
        if self.work.split == "validation":
            return "validation"
        held_out = math.floor(phase + (count + 1) * fraction) > math.floor(phase + count * fraction)
        return "validation" if held_out else "train"
