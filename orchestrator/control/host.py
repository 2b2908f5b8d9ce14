"""The parent's side of the process that holds Ray: start it, talk to it in JSON lines, end it and all it started."""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from orchestrator.control.processes import end_marked, marked_environment, session_folder

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Host(Protocol):
    """What the supervisor needs of a runtime."""

    def tell(self, **command: Any) -> None:
        """Sends a command; one to a dead host is lost, and `hear` says so."""

    def hear(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message; None where none came in time; {"kind": "gone"} where none can come any more."""

    def end(self) -> None:
        """Ends it and everything that it started."""


@contextlib.contextmanager
def held_back(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Blocks signals in this thread and so, for good, in every process that is started meanwhile and in all of theirs.

    A service manager sends SIGTERM to all processes of a job at once: Ray and the workers must live on until `run`, which
    gets it too, has had its checkpoint. They are ended by SIGKILL."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class RayHost:
    """`python -m orchestrator.control.ray_runtime` in a session of its own: the terminal's Ctrl-C is for `run` alone."""

    def __init__(self, run_directory: Path) -> None:
        self.mark, self.session = str(run_directory.resolve()), session_folder(run_directory)
        logs = run_directory.resolve() / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "orchestrator.control.ray_runtime", str(logs), str(self.session)]
        with (logs / "ray.log").open("a") as log, held_back(ENDING_SIGNALS):
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=marked_environment(self.mark),
                start_new_session=True,
            )
        self._messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._messages.put(json.loads(line))
        self._messages.put({"kind": "gone"})

    def tell(self, **command: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
        except (BrokenPipeError, OSError):
            return

    def hear(self, timeout_s: float) -> dict[str, Any] | None:
        try:
            return self._messages.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def end(self) -> None:
        self.process.kill()
        self.process.wait(timeout=10)
        end_marked(self.mark)  # quicker than ray.shutdown, and there is nothing for Ray to save
        shutil.rmtree(self.session, ignore_errors=True)
        self._reader.join(timeout=10)  # nobody is left to write
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
