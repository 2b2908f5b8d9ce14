"""How fast a folder's disk takes a checkpoint and gives it back."""

from __future__ import annotations

import os
import tempfile
import time


def disk_rates(folder: str, num_bytes: int = 2**26) -> dict[str, float]:
    """Bytes per second: written until they are on the disk, and read back without the page cache where that can be."""
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".shardwise-") as file:
        started = time.perf_counter()
        for _ in range(num_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written_s = time.perf_counter() - started
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = time.perf_counter()
        while file.read(2**20):
            pass
        read_s = time.perf_counter() - started
    return {"disk_write_bytes_per_s": num_bytes / written_s, "disk_read_bytes_per_s": num_bytes / read_s}
