"""Files that several processes write: whole or not at all, one writer at a time, on the disk before their name is."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Writes a text so that a reader sees the old file or the new one, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        publish(part, path)
    finally:
        part.unlink(missing_ok=True)


def publish(partial: Path, final: Path) -> None:
    """Renames a finished file or folder into place. Its content is on the disk before the name, and the name at the return:
    otherwise a power cut may leave the final name on an empty file."""
    sync(partial)
    os.replace(partial, final)
    sync_folder(final.parent)


def sync(path: Path) -> None:
    """Brings a file, or a folder with all that is in it, onto the disk."""
    if path.is_dir():
        for inner in sorted(path.iterdir()):
            sync(inner)
        sync_folder(path)
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder onto the disk: a rename is there when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for other processes that hold the lock beside the file. OSError where the folder cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
