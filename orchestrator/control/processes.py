"""The processes of a run, found and ended by a mark in their environment.

Every process that a run starts inherits the mark, so none is missed however it was forked, and a process that got a dead
one's id does not bear it.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil

MARK = "SHARDWISE_RUN"
GROUP_MARK = "SHARDWISE_GROUP"
"""Mark of the workers on a Ray cluster. It is another than MARK: where several nodes are one machine, what ends the workers of
one must not end the process that holds Ray."""


def marked_environment(mark: str) -> dict[str, str]:
    """Return the environment of a process to be started. SPT_NOENV: a process that retitles itself leaves its environment
    readable."""
    return {**os.environ, MARK: mark, "SPT_NOENV": "1"}


def marked(mark: str, *, name: str = MARK) -> list[psutil.Process]:
    """Live processes with this mark, this one left out."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.pid != os.getpid() and process.environ().get(name) == mark
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def end_marked(mark: str, *, within_s: float = 10.0, name: str = MARK) -> list[int]:
    """Kills them all and waits until they are gone; the ids of those that are not by then. The kernel keeps a process for as
    long as it waits for a disk; what it had still to run of its own program, it does not run any more."""
    deadline = time.monotonic() + within_s
    while found := marked(mark, name=name):
        if time.monotonic() > deadline:
            return [process.pid for process in found]
        for process in found:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(found, timeout=min(1.0, within_s))
    return []


def end(pids: list[int], *, within_s: float = 5.0) -> None:
    """Kills processes that are ours and known alive a moment ago; waits until they are gone."""
    processes = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            process.kill()
            processes.append(process)
        except psutil.Error:
            continue
    psutil.wait_procs(processes, timeout=within_s)


def gone(pids: list[int], *, within_s: float) -> bool:
    """Waits until none of these processes is left; False where one still is."""
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            processes.append(psutil.Process(pid))
    return not psutil.wait_procs(processes, timeout=within_s)[1]


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal, or by a debugger."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return False


def session_folder(run_directory: Path) -> Path:
    """Return where Ray keeps the sockets and logs of a run: one short path per run folder (a socket's path has 107 characters),
    inside a folder that only this user may enter."""
    import hashlib

    home = Path("/tmp") / f"shardwise-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    status = home.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or home.is_symlink():
        raise PermissionError(f"{home} must be a folder of yours that nobody else may enter (chmod 700)")
    return home / hashlib.sha256(str(run_directory.resolve()).encode()).hexdigest()[:8]
