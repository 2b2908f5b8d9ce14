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
        self._news: str | None = None

    def look(self) -> str | None:
        """Return what a person is to be told, once; looks at the disk every few seconds."""
        now = self.now()
        if self._looked is None or now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            self._look_at_room()
        news, self._news = self._news, None
        return news

    def _look_at_room(self) -> None:
        try:
            full = room(self.folder)[0] < LOW_BYTES
        except OSError:
            return  # the next write says more
        if full:
            self.refused("the disk is full")
        else:
            self._told = False

    def refused(self, why: str) -> None:
        """A write was refused; the next look tells it."""
        if not self._told:
            self._told = True
            self._news = (
                f"{why}: {room_told(self.folder)}; training goes on, its records wait in memory and checkpoints fail until "
                "the disk takes them: delete what is not needed there, or look at that disk"
            )
