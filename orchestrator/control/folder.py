"""A run's folder: what lies where, one `run` at a time, and whether it may be continued."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from clusters.files import write_atomically
from orchestrator.spec import Job, SpecError, parse_job
from orchestrator.telemetry.records import EVENTS, METRICS


class RunRefused(ValueError):
    """A folder that cannot be used for this job: what, where, and how to fix it."""

    def __init__(self, message: str, *, where: str, fix: str) -> None:
        super().__init__(f"{message}\n  {where}\n  to fix: {fix}")
        self.message, self.where, self.fix = message, where, fix


@dataclass(frozen=True, slots=True)
class RunFolder:
    """runs/NAME/{job.yaml, plan.json, events.jsonl, metrics.jsonl, report.html, checkpoints/, logs/}"""

    path: Path
    tokens: Path | None = None
    """Folder of prepared tokens; None: the user's cache, which other machines do not see."""

    @property
    def job(self) -> Path:
        return self.path / "job.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def events(self) -> Path:
        return self.path / EVENTS

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def create(self) -> None:
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunRefused(
                f"the run folder cannot be made: {error.strerror}",
                where=str(self.path),
                fix="checkpoint.directory: a folder that you may write, or --directory FOLDER",
            ) from None

    def write_job(self, job: Job) -> None:
        text = f"# The job of this run. Its paths are relative to {job.directory.resolve()}\n"
        write_atomically(self.job, text + yaml.safe_dump(job.to_mapping(), sort_keys=False))

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        write_atomically(self.plan, json.dumps(plan, indent=1))

    def move_aside(self) -> Path | None:
        """Makes room for a fresh run; nothing is deleted."""
        if not self.path.exists():
            return None
        stamp = time.strftime("%Y%m%d-%H%M%S")
        aside = self.path.with_name(f"{self.path.name}.before-{stamp}")
        number = 1
        while aside.exists():
            number += 1
            aside = self.path.with_name(f"{self.path.name}.before-{stamp}-{number}")
        os.replace(self.path, aside)
        return aside

    def give_back(self, aside: Path | None) -> bool:
        """Remove this new folder where nothing was begun in it, and put back what was moved aside for it."""
        if self.job.exists() or self.events.exists():
            return False
        shutil.rmtree(self.path, ignore_errors=True)
        if aside is not None:
            os.replace(aside, self.path)
        return True

    def check_continuation(self, job: Job) -> None:
        """Raises RunRefused where the job here had another trajectory: model, data, batch, seed or training."""
        if not self.job.exists():
            return
        remedy = "or start over: shardwise run JOB --fresh (the old folder is kept, under another name)"
        try:
            before = parse_job(yaml.safe_load(self.job.read_text(encoding="utf-8")), directory=job.directory)
            keys = job.trajectory_difference(before)
        except (SpecError, yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as error:
            first = str(error).splitlines()[0]
            raise RunRefused(
                f"the job of the run that is here cannot be read: {first}",
                where=str(self.job),
                fix=f"repair it, {remedy}",
            ) from None
        if keys:
            changes = "; ".join(f"{key}: {_value(before, key)} -> {_value(job, key)}" for key in keys)
            raise RunRefused(
                f"{job.name} was begun with another trajectory: {changes}",
                where=str(self.job),
                fix=f"set {'it' if len(keys) == 1 else 'these'} back, give the job another name, {remedy}",
            )


def _value(job: Job, key: str) -> object:
    """Return what a job has under a dotted key of trajectory_difference; of the model, its resolved shape."""
    section, *rest = key.split(".")
    value: Any = getattr(job, section, None)
    if section == "model" and rest and hasattr(job.architecture, rest[0]):
        value = job.architecture
    for name in rest:
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
    return value


def lock_of(folder: RunFolder) -> Path:
    """Return the path of the lock, beside the folder and not in it: `--fresh` moves the folder aside."""
    return folder.path.with_name(f".{folder.path.name}.lock")


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Gives a path to an OSError that names none, as those of a write that a full disk refuses."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


_LOCK_RECORD = "hhqqi4x"
"""struct flock of Linux: type, whence, start, length, process."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""Error numbers of a file system that knows no locks."""


def holder(folder: RunFolder) -> int | None:
    """The process whose `run` holds the folder now, if one does; 0 where its number is unknown.

    It asks the kernel who holds the lock and takes none itself: a look must not refuse a `run` that starts meanwhile."""
    try:
        with lock_of(folder).open() as file:
            answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _whole_file(fcntl.F_WRLCK))
            if struct.unpack(_LOCK_RECORD, answer)[0] == fcntl.F_UNLCK:
                return None
            return int(file.read().strip() or 0)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in NO_LOCKS:  # so nobody can hold one
            return None
        raise


def _whole_file(kind: int) -> bytes:
    return struct.pack(_LOCK_RECORD, kind, os.SEEK_SET, 0, 0, 0)


@contextmanager
def held(folder: RunFolder) -> Iterator[None]:
    """One `run` at a time. The kernel frees the lock with the process, however it ends: none is ever stale. Where no run came
    of it, nothing of it is left."""
    path = lock_of(folder)
    is_new = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(path, folder)
    except OSError as error:
        raise RunRefused(
            f"the run folder cannot be made: {error.strerror}",
            where=str(folder.path),
            fix="checkpoint.directory: a folder that you may write, or --directory FOLDER",
        ) from None
    with file:
        with contextlib.suppress(OSError):  # the number is for messages; a full disk is told by what must be written
            os.ftruncate(file.fileno(), 0)
            file.write(f"{os.getpid()}\n".encode())
        try:
            yield
        finally:
            if not folder.path.exists():
                path.unlink(missing_ok=True)
                if is_new:
                    with contextlib.suppress(OSError):  # others have put something into it
                        path.parent.rmdir()


def _locked(path: Path, folder: RunFolder) -> BinaryIO:
    """The open lock file, locked. One that was removed before it was locked is opened anew."""
    while True:
        file: BinaryIO = path.open("ab+", buffering=0)
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, _whole_file(fcntl.F_WRLCK))
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            file.close()
            continue
        except OSError as error:
            file.seek(0)
            process = file.read().decode().strip() or "unknown"
            file.close()
            raise refused_lock(error, folder, process) from None
        file.close()


def refused_lock(error: OSError, folder: RunFolder, process: str) -> RunRefused:
    """Return what a refused lock means: another run, or a file system that is not fit for one."""
    if error.errno in (errno.EAGAIN, errno.EACCES):
        return RunRefused(
            f"this job runs already, in process {process}",
            where=str(folder.path),
            fix="wait for it or stop it (Ctrl-C there), or give this job another name",
        )
    why = "its file system knows no locks" if error.errno in NO_LOCKS else error.strerror
    return RunRefused(
        f"the run folder cannot be locked: {why}",
        where=str(folder.path),
        fix="checkpoint.directory: a folder on another file system, or --directory FOLDER",
    )
