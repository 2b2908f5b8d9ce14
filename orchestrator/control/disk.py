"""Looks whether the disk under a run folder is full, and says so for a person."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

LOOK_EVERY_S = 5.0
LOW_BYTES = 2**18
"""Less room than this is a full disk: the next block of a file may be refused."""


def room(path: Path) -> tuple[int, int]:
    """(free, all) bytes of the file system that a path lies on, or would lie on, as far as this user may use them."""
    while not path.exists() and path != path.parent:
        path = path.parent
    told = os.statvfs(path)
    return told.f_frsize * (told.f_bfree if os.geteuid() == 0 else told.f_bavail), told.f_frsize * told.f_blocks


def room_told(path: Path) -> str:
    """How much is free, for a person."""
    try:
        free, whole = room(path)
    except OSError as error:
        return f"the disk under {path} cannot be asked: {error.strerror}"
    return f"{free / 2**20:,.1f} of {whole / 2**20:,.0f} MiB are free under {path}"


class DiskWatch:
    """Tells once that a disk is full, and again when it is full again."""

    def __init__(self, folder: Path, *, now: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.now = folder, now
        self._looked: float | None = None
        self._told = False

    def look(self) -> str | None:
        """What a person is to be told, if there is something new; looks every few seconds."""
        now = self.now()
        if self._looked is not None and now - self._looked < LOOK_EVERY_S:
            return None
        self._looked = now
        try:
            full = room(self.folder)[0] < LOW_BYTES
        except OSError:
            return None  # the next write says more
        if not full:
            self._told = False
            return None
        return self.refused("the disk is full")

    def refused(self, why: str) -> str | None:
        """The same for a write that was refused."""
        if self._told:
            return None
        self._told = True
        return (
            f"{why}: {room_told(self.folder)}; training goes on, its records wait in memory and checkpoints fail until there "
            "is room: delete what is not needed there"
        )
