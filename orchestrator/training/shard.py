"""One input file -> one file of tokens per split, in a process of its own; then all of them -> few large files. Pure of any job.

A train file gives a fraction of its pieces to validation. A piece is a document, or a stretch of a long one; every
1/fraction-th is held out, counted from a phase that differs from file to file, so that many small files give their
share too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from clusters.files import write_atomically
from orchestrator.training import corpus
from orchestrator.training.data import SPLITS, DataError, Files, Source, Split
from orchestrator.training.tokenizer import Tokenizer

MERGED_BYTES = 2**30
"""Bytes of a merged file at most, unless the tokens of one input are more: many small files cost a system call each at every
turn."""
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
    """Part of the pieces, held out for validation."""
    phase: float
    """0 to 1, where the count towards the next held-out piece starts."""
    piece_tokens: int
    """A longer document is cut into pieces of this size."""
    dtype: str
    tokenizer: str
    """Fingerprint of the tokenizer."""

    @property
    def stem(self) -> str:
        """Name of the shard: that of the input, so that a second attempt finds it whatever stands beside it."""
        return hashlib.sha256(f"{self.split}/{self.path}".encode()).hexdigest()[:16]

    def file(self, split: Split) -> str:
        """Name of the file that holds the tokens which this input gives to a split."""
        return f"{self.stem}-{split}.bin"


def make(work: Work, tokenizer: Tokenizer, directory: Path, progress: Callable[[int], None] | None = None) -> Source:
    """Tokenizes one file, unless an earlier attempt did. Raises DataError, and OSError where the folder is at fault.

    Args:
        progress: called with the bytes of the file that are done.
    """
    done = _finished(work, directory)
    if done is not None:
        return done
    before = _digest(Path(work.path))
    files = {split: directory / work.file(split) for split in SPLITS}
    for file in files.values():
        file.unlink(missing_ok=True)  # a prepared folder may hold a link to it
    try:
        with open(files["train"], "xb") as train, open(files["validation"], "xb") as validation:
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
    except BaseException:
        for file in files.values():
            file.unlink(missing_ok=True)
        raise
    source = Source(
        path=work.path,
        split=work.split,
        bytes=work.bytes,
        mtime_ns=work.mtime_ns,
        sha256=before,
        num_documents=writer.num_documents,
        num_tokens=writer.num_tokens,
    )
    # Not synced: that would cost more than the tokens of a small file. What a power cut tears, the checksums tell.
    note = {"work": asdict(work), "source": asdict(source), "crc32": writer.crc32}
    (directory / f"{work.stem}.json").write_text(json.dumps(note), encoding="utf-8")
    return source


def merge(works: Sequence[Work], sources: Sequence[Source], directory: Path, target: Path) -> dict[Split, Files]:
    """Writes what `make` left in a folder one after the other into few files in another; they are not synced.

    What is there stays, so that an attempt which is cut short here only merges again."""
    files: dict[Split, Files] = {}
    for split in SPLITS:
        shards = [
            (directory / work.file(split), source.num_tokens[split])
            for work, source in zip(works, sources, strict=True)
            if source.num_tokens[split]
        ]
        width = np.dtype(works[0].dtype).itemsize
        merged: list[tuple[str, int]] = []
        for number, group in enumerate(groups([num_tokens * width for _, num_tokens in shards], MERGED_BYTES)):
            name = f"{split}-{number:05d}.bin"
            _join([shards[place][0] for place in group], target / name)
            merged.append((name, sum(shards[place][1] for place in group)))
        files[split] = tuple(merged)
    return files


def groups(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Places of sizes that follow one another, in groups whose sum is at most `most`, or that are one alone."""
    grouped: list[list[int]] = []
    total = 0
    for place, size in enumerate(sizes):
        if not grouped or total + size > most:
            grouped.append([])
            total = 0
        grouped[-1].append(place)
        total += size
    return grouped


def _join(parts: Sequence[Path], target: Path) -> None:
    if len(parts) == 1:
        with contextlib.suppress(OSError):  # a file system without links
            os.link(parts[0], target)
            return
    with open(target, "wb") as joined:
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, joined, 1 << 20)


def write_json(file: Path, value: Any) -> None:
    """Writes a value as JSON, whole or not at all."""
    write_atomically(file, json.dumps(value))


def _finished(work: Work, directory: Path) -> Source | None:
    """Return what an earlier attempt left, if nothing that decides it has changed."""
    try:
        note = json.loads((directory / f"{work.stem}.json").read_text(encoding="utf-8"))
        if note["work"] != asdict(work):
            return None
        if any(_crc32(directory / work.file(split)) != note["crc32"][split] for split in SPLITS):
            return None
        return Source(**note["source"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


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
    crc32: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    """Checksum of what each split's file holds."""
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
        raw = tokens.tobytes()
        self.files[split].write(raw)
        self.crc32[split] = zlib.crc32(raw, self.crc32[split])
        self.num_tokens[split] += len(tokens)
        self._held, self._num_held = [], 0

    def _split(self) -> Split:
        count, fraction, phase = self._num_pieces, self.work.fraction, self.work.phase
        self._num_pieces += 1
        if self.work.split == "validation":
            return "validation"
        held_out = math.floor(phase + (count + 1) * fraction) > math.floor(phase + count * fraction)
        return "validation" if held_out else "train"
