"""Hosts on one machine: each a process tree with its own network, hostname, process ids, /tmp, /dev/shm and home.

They are joined by a switch that nothing outside them reaches. They share the machine's disk except /tmp, /dev/shm and HOME;
what lies there is a host's own, so a folder under /tmp is seen by all of them only where it is `shared`. It needs root on
Linux with iproute2 and util-linux; `forbidden` says why it does not work where it does not.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

READY_S = 20.0
TOOLS = ("ip", "unshare", "nsenter", "mount")


@functools.cache
def forbidden() -> str | None:
    """Return why hosts cannot be made here; None where they can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "namespaces of network and process ids need root on Linux"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not installed (iproute2, util-linux)"
    if Path(sys.executable).is_relative_to("/tmp"):
        return "this Python lies under /tmp, of which every host has its own"
    name = f"try-{os.getpid()}"
    made = _sh("ip", "netns", "add", name, check=False)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    tried = _sh(*_unshared(name), "mount", "-t", "tmpfs", "tmpfs", "/tmp", check=False)
    _sh("ip", "netns", "del", name, check=False)
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else None


class Hosts:
    """Hosts 0 to `count` - 1 at 10.77.0.10 and on, until the end of a `with`.

    Args:
        shared: a folder that all of them see at its own path, like a network file system.
        name: prefix of namespaces and links, at most 8 characters: two sets at one time need two."""

    def __init__(self, count: int, *, shared: Path | None = None, name: str | None = None) -> None:
        self.count, self.shared, self.name = count, shared, name or f"h{os.getpid() % 10**6}"
        self._switch = f"{self.name}-sw"
        self._holders: dict[int, subprocess.Popen[str]] = {}
        self._started: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Hosts:
        try:
            _sh("ip", "netns", "add", self._switch)
            _sh("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
            _sh("ip", "-n", self._switch, "link", "set", "br0", "up")
            for index in range(self.count):
                self.add(index)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for index in list(self._holders):
            self.kill(index)
        _sh("ip", "netns", "del", self._switch, check=False)

    def address(self, index: int) -> str:
        return f"10.77.0.{10 + index}"

    def add(self, index: int) -> None:
        """Switch a host on."""
        name, link = self._namespace(index), f"{self.name}-{index}"
        _sh("ip", "netns", "add", name)
        _sh("ip", "link", "add", link, "netns", self._switch, "type", "veth", "peer", "name", "eth0", "netns", name)
        _sh("ip", "-n", self._switch, "link", "set", link, "master", "br0", "up")
        _sh("ip", "-n", name, "addr", "add", f"{self.address(index)}/24", "dev", "eth0")
        for each in ("lo", "eth0"):
            _sh("ip", "-n", name, "link", "set", each, "up")
        keep = back = ""
        if self.shared is not None:
            keep = f"mount --bind {self.shared} /media && "
            back = f"mkdir -p {self.shared} && mount --bind /media {self.shared} && "
        script = (
            f"{keep}mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm && mkdir -p /tmp/home && {back}"
            f"hostname host-{index} && echo ready && exec sleep infinity"
        )
        holder = subprocess.Popen(
            [*_unshared(name), "sh", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._holders[index] = holder
        assert holder.stdout is not None
        if holder.stdout.readline().strip() != "ready":
            holder.kill()
            raise RuntimeError(f"host-{index} did not come up: {holder.communicate()[1]}")

    def start(
        self,
        index: int,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        stdout: int | IO[Any] = subprocess.DEVNULL,
        stderr: int | IO[Any] = subprocess.STDOUT,
    ) -> subprocess.Popen[Any]:
        """Start a command on a host; it ends with the host at the latest."""
        inside = ["nsenter", "--target", str(self._init(index)), "--mount", "--uts", "--ipc", "--net", "--pid", "--"]
        started = subprocess.Popen(
            [*inside, "sh", "-c", 'cd "$0" && exec "$@"', os.getcwd(), *command],  # nsenter ends up in the root folder
            env={**os.environ, "HOME": "/tmp/home", "TMPDIR": "/tmp", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        self._started.append(started)
        return started

    def cable(self, index: int, *, plugged: bool) -> None:
        """Pull the network cable of a host, or plug it in."""
        _sh("ip", "-n", self._switch, "link", "set", f"{self.name}-{index}", "up" if plugged else "down")

    def kill(self, index: int) -> None:
        """Cut the power of a host: every process dies at once, its /tmp and home go with it."""
        holder = self._holders.pop(index)
        with contextlib.suppress(OSError):
            os.kill(_child_of(holder.pid) or holder.pid, signal.SIGKILL)  # the init of its process ids: all go with it
        try:
            holder.wait(timeout=READY_S)
        except subprocess.TimeoutExpired:
            holder.kill()
        holder.communicate()
        _sh("ip", "netns", "del", self._namespace(index), check=False)
        _sh("ip", "-n", self._switch, "link", "del", f"{self.name}-{index}", check=False)
        for started in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(timeout=0.01 if self._holders else READY_S)

    def _namespace(self, index: int) -> str:
        return f"{self.name}-host{index}"

    def _init(self, index: int) -> int:
        """The process of the host that has number 1 inside."""
        pid = _child_of(self._holders[index].pid)
        assert pid is not None, f"host-{index} is gone"
        return pid


def _unshared(namespace: str) -> list[str]:
    return [
        *("ip", "netns", "exec", namespace),
        *("unshare", "--mount", "--uts", "--pid", "--ipc", "--fork", "--mount-proc", "--kill-child"),
    ]


def _child_of(pid: int) -> int | None:
    """The one child of a process: `ip netns exec` becomes `unshare`, whose child is the first process of the host."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    return None


def _sh(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=check, capture_output=True, text=True)
