"""Standard output as a place that may go away or stop reading, which is no reason to stop what is told there."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from typing import Any, TextIO

MAX_PENDING = 1000
"""Pieces of text that wait for a reader, such as a terminal after Ctrl-S; later ones are left out until it reads again."""
DRAIN_S = 1.0
"""Longest wait at the end for what is still to be written."""


class Outlet:
    """A text stream whose `write` and `flush` neither raise nor block: a thread of its own does the writing.

    `lost` says why nothing arrives any more, once a write failed: the reader of a pipe has gone, the terminal was closed."""

    def __init__(self, stream: TextIO | None) -> None:
        self.lost: str | None = None if stream is not None else "it was closed from the start"
        self._stream = stream
        self._pending: queue.Queue[str | None] = queue.Queue(MAX_PENDING)
        self._writer = threading.Thread(target=self._write_on, name="outlet", daemon=True)
        self._writer.start()

    def write(self, text: str) -> int:
        if self.lost is None:
            with contextlib.suppress(queue.Full):
                self._pending.put_nowait(text)
        return len(text)

    def flush(self) -> None:
        """The thread flushes after every piece."""

    def close(self) -> None:
        """Waits a moment until all is written."""
        with contextlib.suppress(queue.Full):
            self._pending.put(None, timeout=DRAIN_S)
            self._writer.join(timeout=DRAIN_S)

    def __getattr__(self, name: str) -> Any:
        """isatty, encoding, fileno: those of the stream."""
        return getattr(self._stream, name)

    def _write_on(self) -> None:
        while (text := self._pending.get()) is not None:
            if self.lost is not None or self._stream is None:
                continue
            try:
                self._write(self._stream, text)
            except (OSError, ValueError) as error:  # ValueError: it was closed in this process
                self.lost = (error.strerror if isinstance(error, OSError) else None) or str(error)
                silence(self._stream)

    def _write(self, stream: TextIO, text: str) -> None:
        """Past Python's own buffer, whose lock a write that never ends would hold at the exit of the process."""
        try:
            descriptor = stream.fileno()
        except OSError:  # a stream in memory
            stream.write(text)
            return
        stream.flush()
        rest = text.encode(stream.encoding, "replace")
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def silence(stream: TextIO | None) -> None:
    """Leads a stream that cannot be written into nothing, so that Python's own flush at the exit does not fail."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())  # type: ignore[union-attr]
        os.close(nothing)
