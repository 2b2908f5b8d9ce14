"""The folder for scratch files of offload to NVMe: on a local disk of each node."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

VARIABLE = "SHARDWISE_OFFLOAD_DIRECTORY"
PROC_MOUNTS = Path("/proc/self/mounts")


def folder() -> Path:
    """Return what the variable names, else where Python's temporary files lie (TMPDIR)."""
    return Path(os.environ.get(VARIABLE) or tempfile.gettempdir())


def is_in_memory(path: Path) -> bool:
    """Return whether a folder's file system keeps files in memory: they would save none."""
    if not PROC_MOUNTS.exists():
        return False
    rows = [line.split() for line in PROC_MOUNTS.read_text(encoding="utf-8").splitlines()]
    real = path.resolve()
    holding = [
        (len(row[1]), i, row[2]) for i, row in enumerate(rows) if real.is_relative_to(row[1].replace("\\040", " "))
    ]
    # Of two mounts at one place the later one is seen.
    return bool(holding) and max(holding)[2] in ("tmpfs", "ramfs")


def free_bytes() -> int:
    """Room for scratch files; 0 where there is no such folder on a disk."""
    path = folder()
    if not path.is_dir() or is_in_memory(path):
        return 0
    return shutil.disk_usage(path).free
