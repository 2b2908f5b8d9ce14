"""The share of a checkpoint that a rank writes: a copy of its share of the state, and the files that hold it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from orchestrator.training.manifest import sha256
from orchestrator.training.reader import METADATA
from strategies.offload.files import copied


class CheckpointFailed(RuntimeError):
    """A checkpoint that could not be written; those before it are untouched."""


# The copy of the state -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Staged:
    """A part of a tensor in host memory, and where it lies in the whole."""

    local: torch.Tensor
    shape: torch.Size
    offsets: tuple[int, ...]


def stage(state: Mapping[str, Any], owner_of: Mapping[str, int], rank: int) -> dict[str, Staged]:
    """Return this rank's share, copied: later steps do not change it. Scalars become tensors, so that nothing is pickled."""
    staged = {}
    for index, (name, held) in enumerate(sorted(state.items())):
        value = as_tensor(held)
        if not isinstance(value, DTensor):
            if owner_of[name] == rank:
                staged[name] = Staged(copied(value.detach()), value.shape, (0,) * value.dim())
        elif _owns_replica(value, index):
            sharded: Any = value.detach()
            (chunk,) = sharded.__create_chunk_list__()
            staged[name] = Staged(copied(sharded.to_local()), value.shape, tuple(chunk.offsets))
    return staged


def as_tensor(value: Any) -> torch.Tensor:
    """A Python number as a tensor that holds it exactly."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def _owns_replica(tensor: DTensor, index: int) -> bool:
    """Whether this rank writes its copy of a shard that other ranks hold too; the turns go round with the index."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    return all(
        coordinate[axis] == index % tensor.device_mesh.size(axis)
        for axis, placement in enumerate(tensor.placements)
        if placement.is_replicate()
    )


@dataclass(frozen=True, slots=True)
class Shares:
    """Who writes what."""

    owner_of: Mapping[str, int]
    """Rank that writes each tensor that several hold whole: the least loaded of its holders."""
    num_bytes: int
    """Bytes of all tensors, each once."""


def shares_of(tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None) -> Shares:
    """The same on every rank. Collective."""
    mine = {name: (value.nbytes, isinstance(value, DTensor)) for name, value in tensors.items()}
    ranks: list[dict[str, tuple[int, bool]]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(ranks, mine, group=group)
    sizes = {name: num_bytes for held in ranks for name, (num_bytes, _) in held.items()}
    loads = [0] * len(ranks)
    owner_of = {}
    for name in sorted({name for held in ranks for name, (_, is_sharded) in held.items() if not is_sharded}):
        owner = min((rank for rank, held in enumerate(ranks) if name in held), key=lambda rank: (loads[rank], rank))
        owner_of[name] = owner
        loads[owner] += sizes[name]
    return Shares(owner_of, sum(sizes.values()))


# Files -------------------------------------------------------------------------------------------------------------------


BUFFER_BYTES = 1 << 20
"""Shorter writes are gathered: torch.save makes a dozen for every tensor."""


class Written(io.RawIOBase):
    """A new file that is hashed as it is written, and on the disk when it is closed; what the disk then gives back is
    compared: a checkpoint that was written wrongly must not take the place of a sound one."""

    def __init__(self, path: Path) -> None:
        self.path, self.num_bytes, self.digest = path, 0, hashlib.sha256()
        self.held = bytearray()
        self.fault: OSError | None = None
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.num_bytes

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.num_bytes += len(view)
        if len(view) < BUFFER_BYTES:
            self.held += view
        if len(self.held) >= BUFFER_BYTES or len(view) >= BUFFER_BYTES:
            self._write_held()
        if len(view) >= BUFFER_BYTES:
            self._write(view)
        return len(view)

    def _write_held(self) -> None:
        held, self.held = self.held, bytearray()
        self._write(memoryview(held))

    def _write(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                done += os.write(self.descriptor, view[done:])
            except OSError as error:
                self.fault = error
                raise

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._write_held()
                os.fsync(self.descriptor)
                if hasattr(os, "posix_fadvise"):  # out of the page cache: the next read comes from the disk
                    os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(self.descriptor)
        if self.fault is not None:
            raise self.fault from None  # torch.save tells it as an error of its own
        if kind is None and sha256(self.path) != self.digest.hexdigest():
            raise CheckpointFailed(f"{self.path.name} reads otherwise than it was written")

    @property
    def entry(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        return {"bytes": self.num_bytes, "sha256": self.digest.hexdigest()}


def write_share(staged: Mapping[str, Staged], partial: Path, rank: int) -> dict[str, Any]:
    """Writes a rank's tensors, and a list of where each lies for rank 0; the manifest's entries of its files."""
    partial.mkdir(parents=True, exist_ok=True)
    data = data_of(rank)
    if not staged:
        return {}
    pieces = []
    with Written(partial / data) as file:
        for name, piece in staged.items():
            start = file.tell()
            local = piece.local.contiguous()
            if local.untyped_storage().nbytes() != local.nbytes:
                local = local.clone()
            torch.save(local, cast("IO[bytes]", file))
            pieces.append(
                {
                    "name": name,
                    "dtype": str(local.dtype).removeprefix("torch."),
                    "shape": list(piece.shape),
                    "offsets": list(piece.offsets),
                    "sizes": list(local.shape),
                    "place": [data, start, file.tell() - start],
                }
            )
    with Written(partial / _list_of(rank)) as told_by:
        told_by.write(json.dumps(pieces).encode())
    return {data: file.entry}


def data_of(rank: int) -> str:
    return f"__{rank}_0.distcp"


def _list_of(rank: int) -> str:
    return f"__{rank}_0.json"


def write_index(partial: Path, ranks: Sequence[int]) -> dict[str, Any]:
    """Rank 0: torch's index of all pieces, from the lists of the ranks, which go; its entry in the manifest."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places = {}
    for file in (partial / _list_of(rank) for rank in ranks):
        for piece in json.loads(file.read_bytes()):
            name, offsets = piece["name"], torch.Size(piece["offsets"])
            properties = TensorProperties(dtype=getattr(torch, piece["dtype"]))
            entry = tensors.setdefault(name, TensorStorageMetadata(properties, torch.Size(piece["shape"]), []))
            places[MetadataIndex(name, offsets)] = _StorageInfo(*piece["place"])
            entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(piece["sizes"])))
        file.unlink()
    with Written(partial / METADATA) as index:
        index.write(pickle.dumps(Metadata({**tensors}, storage_data=places, version="1.0.0"), protocol=4))
    return {METADATA: index.entry}


def told(error: BaseException) -> str:
    """An error in one line."""
    return str(error) if isinstance(error, CheckpointFailed) else f"{type(error).__name__}: {error}"
