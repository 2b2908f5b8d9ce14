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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from orchestrator.control.processes import end_marked, marked_environment, session_folder
from orchestrator.training.limits import Limits

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Host(Protocol):
    """A runtime as the supervisor needs it."""

    def tell(self, **command: Any) -> None:
        """Sends a command; one to a dead host is lost, and `hear` says so."""

    def hear(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message; None where none came in time; {"kind": "gone"} where none can come any more."""

    def end(self, within_s: float) -> list[int]:
        """Ends it and everything that it started; the ids of processes that outlive SIGKILL for so long, because the kernel
        holds them in a read or write that does not come back."""


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
    """`python -m orchestrator.control.ray_runtime` in a session of its own: the terminal's Ctrl-C is for `run` alone. `address`:
    of the Ray cluster that it joins; None: it starts a Ray of its own."""

    def __init__(
        self,
        run_directory: Path,
        *,
        address: str | None = None,
        program: Sequence[str] = ("-m", "orchestrator.control.ray_runtime"),
    ) -> None:
        self.mark, self.session = str(run_directory.resolve()), session_folder(run_directory)
        logs = run_directory.resolve() / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *program, str(logs), str(self.session), *([address] if address else [])]
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
        self._commands: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._sender = threading.Thread(target=self._send, daemon=True)
        self._sender.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                message = json.loads(line)
                self._messages.put({**message, "kind": message["kind"]})
            except (
                ValueError,
                TypeError,
                KeyError,
            ):  # half a line of a process that died, or something that printed there
                self._messages.put({"kind": "garbled", "line": line[:200].decode(errors="replace").rstrip()})
        self._messages.put({"kind": "gone"})

    def _send(self) -> None:
        """A process that is stopped reads nothing, and its pipe is soon full: only this thread waits for it."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it died, which `hear` tells
            while (command := self._commands.get()) is not None:
                self.process.stdin.write(json.dumps(command).encode() + b"\n")
                self.process.stdin.flush()

    def tell(self, **command: Any) -> None:
        self._commands.put(command)

    def hear(self, timeout_s: float) -> dict[str, Any] | None:
        try:
            return self._messages.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def end(self, within_s: float) -> list[int]:
        self.process.kill()
        left = end_marked(
            self.mark, within_s=within_s
        )  # quicker than ray.shutdown, and there is nothing for Ray to save
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=within_s if not left else 0)
        shutil.rmtree(self.session, ignore_errors=True)
        self._commands.put(None)
        for thread, pipe in ((self._sender, self.process.stdin), (self._reader, self.process.stdout)):
            thread.join(timeout=within_s)  # nobody is left to read or write
            assert pipe is not None
            if not thread.is_alive():
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        return left


class Early:
    """The host process, started in the background before it is known whether it is needed."""

    def __init__(self, make: Callable[[], Host]) -> None:
        self._make = make
        self._first: Host | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._first = self._make()
        except BaseException as error:  # told to who asks for the host
            self._error = error

    def start(self) -> Host:
        """The first call has the one that was started early."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        host, self._first = self._first, None
        return host or self._make()

    def end(self) -> None:
        self._thread.join()
        if self._first is not None:
            self._first.end(Limits().kill_s)
