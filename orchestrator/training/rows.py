"""Examples of a task -> rows of packed samples in a folder, and the dataset that reads them.

    FOLDER/
      index.json           as for text, with row_tokens: the tokens of a row
      train-rows.bin       tokens of the rows, one after the other
      train-learn.bin      a byte for each token: 1 where the model is trained to write the one after it
      train-segments.bin   two bytes for each token: which sample of its row it belongs to
      train-pairs.bin      of reward and dpo: for each row P pairs of [chosen, rejected], four bytes each; -1 is none

B rows, S tokens of a row, P pairs of a row.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.training.collect import Place, collect, judge, split, told
from orchestrator.training.data import SPLITS, DataError, DataIndex, Files, Source, Split, read_index
from orchestrator.training.inputs import Request, few
from orchestrator.training.packing import IGNORED, Packed, Sample, pack
from orchestrator.training.templates import samples, template_of, written
from orchestrator.training.tokenizer import Tokenizer

PAIRED = ("reward", "dpo")
"""Tasks whose examples are two answers to one prompt."""


def make(
    request: Request, tokenizer: Tokenizer, train: Sequence[Path], held_out: Sequence[Path], whole: Path
) -> DataIndex:
    """Writes the rows of a request into the folder `whole`, and returns their index. Raises DataError where the data cannot be
    used: with file and line of what is bad, unless the request skips it."""
    template = template_of(tokenizer, request.template)
    places, reports = _places(request, train, held_out)
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    files: dict[Split, Files] = {}
    digest = hashlib.sha256(f"{request.task}/{request.sequence_length}/{tokenizer.fingerprint}".encode())
    digest.update(f"/{request.response_length}".encode() if request.response_length else b"")
    sources = Counter[tuple[str, Split]]()
    row_pairs = 0
    for name in SPLITS:
        room = request.sequence_length - request.response_length
        made, faults = samples(places[name], template, tokenizer, max_tokens=room)
        judge(faults, request.on_bad, num_left=len(made) if name == "train" else 1, num_records=len(places[name]))
        if faults:
            reports.append(f"left out of {name}: {told(faults)}")
        for place, of_example in made:
            sources[place.where.rpartition(":")[0], name] += sum(len(sample.ids) for sample in of_example)
        flat = [sample for _, of_example in made for sample in of_example]
        together = 2 if request.task in PAIRED else 1
        packed = pack(
            flat,
            request.sequence_length,
            together=together,
            padding_id=tokenizer.end_of_text,
            alone=request.task == "ppo",
        )
        pairs = _pairs(packed, flat, ends=request.task == "reward") if together == 2 else None
        arrays = _arrays(packed, dtype, pairs)
        for kind, array in arrays.items():
            array.tofile(whole / f"{name}-{kind}.bin")
            digest.update(array.tobytes())
        row_pairs = row_pairs if pairs is None else max(row_pairs, pairs.shape[1])
        files[name] = ((f"{name}-rows.bin", arrays["rows"].size),) if flat else ()
    return DataIndex(
        directory=whole,
        dtype="uint16" if dtype == "uint16" else "uint32",
        tokenizer={**tokenizer.describe(), "validation": request.fraction},
        sources=tuple(_source(path, "train", sources, places) for path in train)
        + tuple(_source(path, "validation", sources, places) for path in held_out),
        files=files,
        fingerprint=digest.hexdigest(),
        unigram_entropy=0.0,
        row_tokens=request.sequence_length,
        report="\n".join(reports),
    )


def texts(request: Request, train: Sequence[Path]) -> Iterator[str]:
    """The texts of a request's examples, as a BPE is trained on them: without what a template adds."""
    for place in collect(train, request.task, on_bad=request.on_bad).places:
        for messages in written(place):
            yield from (message.text for message in messages)


def _places(
    request: Request, train: Sequence[Path], held_out: Sequence[Path]
) -> tuple[dict[Split, Sequence[Place]], list[str]]:
    """The examples of each split, and what a person should know of how they were read."""
    found = collect(train, request.task, on_bad=request.on_bad)
    if not held_out:
        learned, tested = split(found.places, request.fraction)
        if not learned:
            raise DataError(
                f"data.validation: {request.fraction} holds all of {few(train)} out: nothing is left to train on"
            )
        return {"train": learned, "validation": tested}, [found.report()]
    tested_on = collect(held_out, request.task, on_bad=request.on_bad)
    reports = [found.report(), f"held out: {tested_on.report()}"]
    return {"train": found.places, "validation": tested_on.places}, reports


def _pairs(packed: Packed, flat: Sequence[Sample], *, ends: bool) -> NDArray[np.int32]:
    """[rows, P, 2]: of each pair, [chosen, rejected], the places of the last tokens, or the segments of the row."""
    by_row: dict[int, list[tuple[int, int]]] = {}
    for number in range(0, len(flat), 2):
        both = packed.spots[number : number + 2]
        values = [
            spot.start + len(sample.ids) - 1 if ends else spot.segment
            for spot, sample in zip(both, flat[number : number + 2], strict=True)
        ]
        by_row.setdefault(both[0].row, []).append((values[0], values[1]))
    most = max((len(pairs) for pairs in by_row.values()), default=1)
    result = np.full((len(packed.input_ids_BS), most, 2), -1, dtype=np.int32)
    for row, pairs in by_row.items():
        result[row, : len(pairs)] = pairs
    return result


def _arrays(packed: Packed, dtype: str, pairs: NDArray[np.int32] | None) -> dict[str, NDArray[Any]]:
    """Return what the files hold, by the word in their names."""
    arrays: dict[str, NDArray[Any]] = {
        "rows": packed.input_ids_BS.astype(np.dtype(dtype).newbyteorder("<")),
        "learn": (packed.target_ids_BS != IGNORED).astype(np.uint8),
        "segments": packed.segment_ids_BS.astype("<u2"),
    }
    return arrays if pairs is None else {**arrays, "pairs": pairs.astype("<i4")}


def _source(
    path: Path, name: Split, tokens: Mapping[tuple[str, Split], int], places: Mapping[Split, Sequence[Place]]
) -> Source:
    stat = os.stat(path)
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    count = sum(place.where.rpartition(":")[0] == str(path) for split_name in SPLITS for place in places[split_name])
    return Source(
        path=str(path),
        split=name,
        bytes=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        sha256=sha256,
        num_documents=count,
        num_tokens={split_name: tokens.get((str(path), split_name), 0) for split_name in SPLITS},
    )


def open_rows(directory: Path | str, sequence_length: int) -> tuple[RowDataset, RowDataset | None]:
    """Return (train, validation) of a folder of rows; None where no row is held out."""
    index = read_index(Path(directory))
    held_out = RowDataset(index, "validation", sequence_length) if index.num_tokens("validation") else None
    return RowDataset(index, "train", sequence_length), held_out


class RowDataset:
    """Packed rows of one split, memory-mapped; any worker may read any of them."""

    def __init__(self, index: DataIndex, split: Split, sequence_length: int) -> None:
        """DataError where the rows are of another length, or a file is missing or torn."""
        if index.row_tokens != sequence_length:
            raise DataError(
                f"the rows in {index.directory} have {index.row_tokens} tokens, and batch.sequence_length is "
                f"{sequence_length}: run `shardwise prepare` again"
            )
        self.index, self.split, self.sequence_length = index, split, sequence_length
        self.num_tokens = index.num_tokens(split)
        count, shape = self.num_tokens // sequence_length, (-1, sequence_length)
        self._rows = self._map("rows", f"<u{np.dtype(index.dtype).itemsize}", count).reshape(shape)
        self._learn = self._map("learn", "u1", count).reshape(shape)
        self._segments = self._map("segments", "<u2", count).reshape(shape)
        has_pairs = (index.directory / f"{split}-pairs.bin").exists()
        self._pairs = self._map("pairs", "<i4", count).reshape(count, -1, 2) if has_pairs else None
        self.reference_BP2: NDArray[np.float64] | None = None
        """Tensor of dpo: the log-probability of each answer under the weights that training began with, [rows, P, 2]."""
        counts = self._learn.sum(1, dtype=np.int64) if self._pairs is None else (self._pairs[:, :, 0] >= 0).sum(1)
        self._counts: NDArray[np.int64] = counts

    def _map(self, kind: str, dtype: str, count: int) -> NDArray[Any]:
        file = self.index.directory / f"{self.split}-{kind}.bin"
        try:
            array: NDArray[Any] = np.memmap(file, dtype=dtype, mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read ({error}): run `shardwise prepare` again") from None
        if len(array) % count or (kind != "pairs" and len(array) != count * self.sequence_length):
            raise DataError(f"{file} is torn: delete its folder and run `shardwise prepare` again")
        return array

    def __len__(self) -> int:
        return len(self._rows)

    def num_targets(self, indices: NDArray[np.int64]) -> int:
        """Tokens that are learned, or pairs, in these rows."""
        return int(self._counts[indices].sum())

    def sequences(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(input_ids_BS, target_ids_BS), each its own memory."""
        inputs = self._rows[indices].astype(np.int64)
        following = np.concatenate([inputs[:, 1:], np.full((len(inputs), 1), IGNORED)], 1)
        return inputs, np.where(self._learn[indices] == 1, following, IGNORED)

    def inputs(self, indices: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return what the module takes beside the tokens."""
        return {"segment_ids_BS": self._segments[indices].astype(np.int64)}

    def labels(self, indices: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return what the loss takes beside the target ids."""
        labels: dict[str, NDArray[Any]] = {}
        if self._pairs is not None:
            labels["pairs_BP2"] = self._pairs[indices].astype(np.int64)
        if self.reference_BP2 is not None:
            labels["reference_BP2"] = self.reference_BP2[indices]
        return labels

    @property
    def num_pairs_of_a_row(self) -> int:
        """P; 0 where the task has no pairs."""
        return 0 if self._pairs is None else int(self._pairs.shape[1])
