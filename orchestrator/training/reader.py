"""Reads a checkpoint's tensors and runs nothing that is written in it, whoever wrote it.

torch.distributed.checkpoint writes an index, `.metadata`, as a pickle, and each piece of a tensor as torch.save does: a zip
archive of a small pickle and raw bytes. Torch's own reader would unpickle the index with any class that it names, and has
byte entries that it unpickles too. Here `unpickle.py` reads both kinds of pickle and calls nothing that they name; an entry
that is no tensor is refused; and the bytes are read straight into memory that the model's own tensors need, never more.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from orchestrator.training.manifest import CheckpointRef, CheckpointRefused
from orchestrator.training.unpickle import METADATA_NAMES, PIECE_NAMES, Properties, Record, SavedTensor, unpickle

METADATA = ".metadata"
MAX_METADATA_BYTES = 1 << 30
"""Bytes of the index at most; 100,000 pieces take about 20 MB."""
MAX_PICKLE_BYTES = 1 << 16
"""Bytes of the pickle beside a piece's bytes at most; torch.save writes about 200."""
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes): a part of a tensor."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor, and where in which file it lies."""

    box: Box
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a checkpoint; its pieces cover it, each element once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Reader:
    """The tensors of one checkpoint, by name. Raises CheckpointRefused where anything is not as we write it."""

    def __init__(self, ref: CheckpointRef) -> None:
        self.ref, self.name = ref, ref.path.name
        sizes = {file: int(entry["bytes"]) for file, entry in ref.manifest["files"].items()}
        try:
            if sizes[METADATA] > MAX_METADATA_BYTES:
                raise ValueError(f"it has more than {MAX_METADATA_BYTES} bytes")
            metadata = unpickle((ref.path / METADATA).read_bytes(), METADATA_NAMES)
            self.entries = dict(_entries(metadata, sizes))
        except Exception as error:  # an interpreter of bytes that a stranger chose may raise anything
            raise CheckpointRefused(self.name, f"its {METADATA} cannot be read ({_told(error)})") from None

    def refuse_unfit(self, targets: Mapping[str, Tensor]) -> None:
        """Raises CheckpointRefused where a tensor is missing or has another shape; no tensor was touched then."""
        if missing := sorted(targets.keys() - self.entries.keys()):
            raise CheckpointRefused(
                self.name, f"it lacks {len(missing)} tensors of this model, {missing[0]} among them"
            )
        for name, tensor in targets.items():
            if (shape := self.entries[name].shape) != tuple(tensor.shape):
                raise CheckpointRefused(
                    self.name, f"its {name} has shape {list(shape)}, this model's {list(tensor.shape)}"
                )

    @torch.no_grad()
    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Fills tensors by name, of a DTensor this rank's part. Files are opened once, pieces read in their order."""
        self.refuse_unfit(targets)
        wanted: dict[str, list[tuple[Piece, Entry, Box, Tensor]]] = {}
        for name, tensor in targets.items():
            entry = self.entries[name]
            for box, local in _parts(tensor):
                for piece in entry.pieces:
                    if (common := overlap(box, piece.box)) is not None:
                        wanted.setdefault(piece.file, []).append((piece, entry, common, _narrowed(local, box, common)))
        for file, reads in sorted(wanted.items()):
            try:
                descriptor = os.open(self.ref.path / file, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    for piece, entry, common, target in sorted(reads, key=lambda read: read[0].offset):
                        target.copy_(_read(descriptor, piece, entry.dtype, common))
                finally:
                    os.close(descriptor)
            except Exception as error:  # zipfile, pickle and struct raise many kinds on bytes that a stranger chose
                raise CheckpointRefused(self.name, f"its file {file} cannot be read ({_told(error)})") from None


# Pieces and boxes -----------------------------------------------------------------------------------------------------


def _parts(tensor: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """(where it lies in the whole, memory) of what this rank holds of a tensor."""
    if not isinstance(tensor, DTensor):
        yield ((0,) * tensor.dim(), tuple(tensor.shape)), tensor.detach()
        return
    whole: Any = tensor
    for chunk in whole.__create_chunk_list__():
        yield (tuple(chunk.offsets), tuple(chunk.sizes)), tensor.to_local().detach()


def overlap(a: Box, b: Box) -> Box | None:
    """Return what two boxes have in common; None for nothing."""
    offsets = tuple(max(x, y) for x, y in zip(a[0], b[0], strict=True))
    ends = [min(x + n, y + m) for x, n, y, m in zip(a[0], a[1], b[0], b[1], strict=True)]
    sizes = tuple(end - offset for end, offset in zip(ends, offsets, strict=True))
    return None if any(size <= 0 for size in sizes) else (offsets, sizes)


def _narrowed(tensor: Tensor, box: Box, inner: Box) -> Tensor:
    """The view of an inner box in a tensor that fills a box."""
    for axis, (offset, size) in enumerate(zip(*inner, strict=True)):
        tensor = tensor.narrow(axis, offset - box[0][axis], size)
    return tensor


def _read(descriptor: int, piece: Piece, dtype: torch.dtype, wanted: Box) -> Tensor:
    """A box of a piece, from its archive; whole rows, so that no more is read than a reshard needs along axis 0."""
    view = _Window(descriptor, piece.offset, piece.length)
    with zipfile.ZipFile(view) as archive:
        members = {
            info.filename.rpartition("/data/")[2]: info for info in archive.infolist() if "/data/" in info.filename
        }
        if list(members) != ["0"]:
            raise ValueError("a piece is not one tensor")
        raw = members["0"]
        top = raw.filename.removesuffix("/data/0")
        described = _member(archive, f"{top}/data.pkl", MAX_PICKLE_BYTES)
        if _member(archive, f"{top}/byteorder", 16) != b"little":
            raise ValueError("a piece is not little-endian")
    _check_piece(unpickle(described, PIECE_NAMES), dtype, piece.box[1])
    if raw.compress_type != zipfile.ZIP_STORED or raw.file_size != _num_bytes(piece.box[1], dtype):
        raise ValueError(f"a piece has {raw.file_size} bytes instead of {_num_bytes(piece.box[1], dtype)}")
    header = view.at(raw.header_offset, 30)
    if header[:4] != b"PK\x03\x04":
        raise ValueError("a piece has no header")
    start = raw.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    sizes = piece.box[1]
    first, rows, row_bytes = 0, 1, _num_bytes(sizes, dtype)
    if sizes:
        first, rows = wanted[0][0] - piece.box[0][0], wanted[1][0]
        row_bytes = _num_bytes(sizes[1:], dtype)
    held = torch.empty((rows, *sizes[1:]) if sizes else (), dtype=dtype)
    view.into(start + first * row_bytes, held)
    box = ((wanted[0][0], *piece.box[0][1:]), (rows, *sizes[1:])) if sizes else piece.box
    return _narrowed(held, box, wanted)


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
        raise ValueError(f"{name} is compressed or too long")
    return archive.read(info)


def _check_piece(described: Any, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """The pickle beside the bytes must say what the index says: these sizes, this dtype, one row after the other."""
    if type(described) is not SavedTensor or not isinstance(described.storage, tuple):
        raise ValueError("a piece is no tensor")
    tag, kind, key, _, numel = described.storage
    strides: list[int] = []
    step = 1
    for size in reversed(sizes):
        strides.insert(0, step)
        step *= size
    same_strides = all(
        size == 1 or got == want for size, got, want in zip(sizes, described.stride, strides, strict=True)
    )
    if (tag, kind, key, described.offset, described.size) != ("storage", dtype, "0", 0, sizes) or not same_strides:
        raise ValueError(f"a piece is not a contiguous {dtype} of {list(sizes)}")
    if numel != step:
        raise ValueError("a piece's storage is not its tensor's")


def _num_bytes(sizes: tuple[int, ...], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for size in sizes:
        count *= size
    return count


class _Window(io.RawIOBase):
    """A part of a file, as a file, for zipfile; it cannot be read beyond its ends."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self.descriptor, self.offset, self.length, self.position = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if position < 0:
            raise ValueError("a place before the start of a piece")
        self.position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.length - self.position)
        got = self.at(self.position, left if size is None or size < 0 else min(size, left))
        self.position += len(got)
        return got

    def at(self, position: int, size: int) -> bytes:
        if not 0 <= position <= position + size <= self.length:
            raise ValueError("a place outside its piece")
        return os.pread(self.descriptor, size, self.offset + position)

    def into(self, position: int, tensor: Tensor) -> None:
        """Fills a contiguous tensor with the bytes at a place."""
        if not 0 <= position <= position + tensor.nbytes <= self.length:
            raise ValueError("bytes outside their piece")
        if not tensor.nbytes:
            return
        flat: Any = tensor.view(-1).view(torch.uint8).numpy()
        buffer = memoryview(flat)
        done = 0
        while done < len(buffer):
            got = os.preadv(self.descriptor, [buffer[done:]], self.offset + position + done)
            if not got:
                raise ValueError("the file ends inside a piece")
            done += got


# The index ------------------------------------------------------------------------------------------------------------


def _entries(metadata: Any, file_sizes: Mapping[str, int]) -> Iterator[tuple[str, Entry]]:
    """The tensors that an unpickled index describes. ValueError where it is not as FileSystemWriter writes it."""
    held, places = _of(metadata, "Metadata", "state_dict_metadata", "storage_data")
    if type(held) is not dict or type(places) is not dict:
        raise ValueError("no tables of tensors and places")
    for name, value in held.items():
        if type(name) is not str or _kind(value) != "TensorStorageMetadata":
            raise ValueError(f"{name} is {_kind(value)}, and a checkpoint of ours holds tensors alone")
    found: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
    for index, place in places.items():
        fqn, offset = _of(index, "MetadataIndex", "fqn", "offset")
        file, start, length = _of(place, "_StorageInfo", "relative_path", "offset", "length")
        if place.__dict__.get("transform_descriptors") or type(fqn) is not str:
            raise ValueError("a place that is transformed or has no name")
        if type(file) is not str or file not in file_sizes:
            raise ValueError(f"a foreign file: {file}")
        if type(start) is not int or type(length) is not int or not 0 <= start <= start + length <= file_sizes[file]:
            raise ValueError(f"a place outside {file}")
        found[fqn, _numbers(offset)] = (file, start, length)
    for name, value in held.items():
        properties, size, chunks = _of(value, "TensorStorageMetadata", "properties", "size", "chunks")
        dtype = properties.state[0] if isinstance(properties, Properties) and properties.state else None
        if type(dtype) is not torch.dtype or type(chunks) is not list:
            raise ValueError(f"{name} has no dtype or no pieces")
        boxes = [
            (_numbers(offsets), _numbers(sizes))
            for offsets, sizes in (_of(chunk, "ChunkStorageMetadata", "offsets", "sizes") for chunk in chunks)
        ]
        shape = _numbers(size)
        check_cover(name, shape, boxes)
        pieces = tuple(
            Piece(box, *found[name, box[0]]) for box in boxes if _num_bytes(box[1], dtype)
        )  # one of no element holds nothing to read
        yield name, Entry(dtype, shape, pieces)


def check_cover(name: str, shape: tuple[int, ...], boxes: list[Box]) -> None:
    """ValueError unless the boxes cover a tensor of this shape, each element once: a gap would be filled with nothing."""
    volume = 0
    filled = []
    for offsets, sizes in boxes:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise ValueError(f"a piece of {name} has another number of axes")
        if any(offset + size > end for offset, size, end in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"a piece of {name} reaches beyond it")
        if (count := _num_bytes(sizes, torch.uint8)) > 0:
            volume += count
            filled.append((offsets, sizes))
    if volume != _num_bytes(shape, torch.uint8):
        raise ValueError(f"the pieces of {name} do not cover it")
    filled.sort()
    cut = [axis for axis in range(len(shape)) if len({(box[0][axis], box[1][axis]) for box in filled}) > 1]
    # Cut along one axis, as nearly always, neighbours are enough.
    step = 1 if len(cut) == 1 else len(filled)
    for index, box in enumerate(filled):
        if any(overlap(box, other) for other in filled[index + 1 : index + 1 + step]):
            raise ValueError(f"the pieces of {name} overlap")


def _numbers(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or any(type(number) is not int or not 0 <= number < 2**62 for number in value):
        raise ValueError("sizes that are no numbers")
    return value


def _kind(value: Any) -> str:
    return type(value).kind if isinstance(value, Record) else type(value).__name__


def _of(value: Any, kind: str, *names: str) -> list[Any]:
    """Fields of a record that was unpickled in the place of a class."""
    if _kind(value) != kind:
        raise ValueError(f"{_kind(value)} where {kind} belongs")
    return [value.__dict__.get(name) for name in names]


def _told(error: Exception) -> str:
    if isinstance(error, KeyError):
        return "an entry or an instruction that no checkpoint of ours contains"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error) or type(error).__name__
