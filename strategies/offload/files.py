"""Scratch files for what is offloaded to NVMe: one a rank and kind, without a name, so that no crash leaves one behind.

They lie in SHARDWISE_OFFLOAD_DIRECTORY, else where Python's temporary files do (TMPDIR): a folder on a local disk of each
node. A folder in memory (tmpfs) is refused: it would save nothing. Nothing is synced: a checkpoint is the durable copy."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from clusters.inventory import scratch
from clusters.inventory.scratch import VARIABLE
from strategies.offload.host import placed

LINE = 64
"""A tensor begins at whole cache lines: pages (as of a disk read past the cache) would cost half of one a tensor."""


def scratch_directory() -> Path:
    """The folder. Raises ValueError where there is none, or it is in memory."""
    folder = scratch.folder()
    if not folder.is_dir():
        raise ValueError(f"{VARIABLE} {folder} is no folder; make it, on a local disk, or unset the variable")
    if scratch.is_in_memory(folder):
        raise ValueError(
            f"offload to nvme would write to {folder}, which is in memory; set {VARIABLE} to a folder on a local disk"
        )
    return folder


def padded(num_bytes: int) -> int:
    return -(-num_bytes // LINE) * LINE


class ScratchFile:
    """Tensors at fixed places in a file: as views of a mapping, and by reads and writes that leave the interpreter free.

    Both go through the page cache and see each other. In a trace (fake tensors) there is no file."""

    def __init__(self, capacity_bytes: int) -> None:
        self.used_bytes = 0
        self.is_fake = isinstance(torch.empty(0), FakeTensor)
        if self.is_fake:
            return
        folder = scratch_directory()
        try:
            self.descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError:  # a file system without nameless files
            self.descriptor, name = tempfile.mkstemp(dir=folder)
            os.unlink(name)
        os.ftruncate(self.descriptor, padded(capacity_bytes))
        self.folder = folder
        # A shared mapping is no memory of the process: its pages are the page cache's.
        self.storage = torch.UntypedStorage.from_file(
            f"/proc/self/fd/{self.descriptor}", shared=True, nbytes=padded(capacity_bytes)
        )

    def tensor(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The next place in the file, zeros. Raises ValueError where the disk has no room for it."""
        num_bytes = shape.numel() * dtype.itemsize
        if self.is_fake or not num_bytes:
            with placed("nvme"):
                return torch.zeros(shape, dtype=dtype)
        try:
            os.posix_fallocate(self.descriptor, self.used_bytes, num_bytes)
        except OSError as error:
            raise ValueError(
                f"offload to nvme finds no room for {num_bytes} bytes more in {self.folder} ({error.strerror}); "
                f"free some, or set {VARIABLE} to a folder on a larger local disk"
            ) from None
        with placed("nvme"):
            made: Tensor = torch.empty(0, dtype=dtype).set_(self.storage, self.used_bytes // dtype.itemsize, shape)  # type: ignore[call-overload]
        self.used_bytes += padded(num_bytes)
        return made

    def read(self, place: Tensor, into: Tensor) -> None:
        """Reads what stands at the place of a tensor of this file into memory."""
        self._all(os.preadv, place, into)

    def write(self, place: Tensor, source: Tensor) -> None:
        self._all(os.pwritev, place, source)

    def _all(self, move: Any, place: Tensor, memory: Tensor) -> None:
        flat: Any = memory.detach().view(-1).view(torch.uint8).numpy()
        buffer = memoryview(flat)
        offset, done = int(place.storage_offset()) * place.itemsize, 0
        while done < len(buffer):
            moved = move(self.descriptor, [buffer[done:]], offset + done)
            if not moved:
                raise OSError(f"the scratch file in {self.folder} ends at {offset + done} bytes")
            done += moved

    def read_ahead(self, place: Tensor) -> None:
        """Asks the system to fetch a tensor before it is used."""
        if not self.is_fake and place.numel():
            os.posix_fadvise(
                self.descriptor, int(place.storage_offset()) * place.itemsize, place.nbytes, os.POSIX_FADV_WILLNEED
            )

    def close(self) -> None:
        """Frees the room on the disk as soon as the last mapped tensor is gone."""
        if not self.is_fake and self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def copied(tensor: Tensor) -> Tensor:
    """A copy on the host; of a tensor that lives in a file, in another file: memory does not grow."""
    if tensor.device.type != "cpu" or tensor.untyped_storage().filename is None:
        return tensor.to("cpu", copy=True)
    file = ScratchFile(tensor.nbytes)
    copy = file.tensor(tensor.shape, tensor.dtype)
    copy.copy_(tensor)
    file.close()  # the mapping holds it
    return copy
