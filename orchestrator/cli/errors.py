"""The answers of a command: exit codes, and how an error is shown."""

from __future__ import annotations

import contextlib
import errno
import sys
import tempfile
import time
import traceback
from enum import IntEnum
from pathlib import Path

MAX_SHOWN = 50
"""Faults of one job on a terminal; `validate --json` has all of them."""


class ExitCode(IntEnum):
    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    DOES_NOT_FIT = 3
    LOST_CLUSTER = 4
    CANCELLED = 5
    NOT_FOUND = 6
    NOT_ALLOWED = 7


STORAGE_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOLCK, errno.ESTALE}
)
"""Error numbers of a file system where the fault is neither the program's nor the job's."""


class CommandError(Exception):
    """A command that cannot go on: what, where, and how to fix it. Shown without a traceback."""

    def __init__(self, message: str, fix: str = "", exit_code: int = ExitCode.BAD_INPUT, *, where: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.fix = fix
        self.exit_code = exit_code


def show(message: str, *, where: str = "", fix: str = "") -> None:
    """Error: what / where / to fix: ..., on standard error."""
    lines = [f"Error: {message}"]
    lines += [f"  {line.strip()}" for line in where.splitlines()]
    if fix:
        first, *rest = fix.splitlines()
        lines += [f"  to fix: {first}", *(f"    {line.strip()}" for line in rest)]
    with contextlib.suppress(OSError):  # the terminal was closed; the exit code still tells
        print("\n".join(lines), file=sys.stderr)


def answer(error: BaseException) -> int:
    """Shows what went wrong; the exit code that it means."""
    from orchestrator.spec.errors import SpecError, place

    if isinstance(error, SpecError):
        for entry in error.errors[:MAX_SHOWN]:
            show(entry["message"], where=place(entry), fix=entry["fix"])
        if len(error.errors) > 1:
            more = f", the first {MAX_SHOWN} shown" if len(error.errors) > MAX_SHOWN else ""
            print(f"{len(error.errors)} errors in {error.errors[0]['file']}{more}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    if isinstance(error, CommandError):
        show(error.message, where=error.where, fix=error.fix)
        return int(error.exit_code)
    planning = sys.modules.get("orchestrator.planner.plan")  # loaded already if a PlanError can be here
    if planning is not None and isinstance(error, planning.PlanError):
        message, _, rest = str(error).partition("\n")
        where, _, fix = rest.partition("to fix: ")
        show(message, where=where.strip(), fix=fix.strip())
        return int(getattr(error, "exit_code", ExitCode.BAD_INPUT))
    if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
        return _storage(error)
    return _unexpected(error)


def _storage(error: OSError) -> int:
    """A disk that is full, broken or not ours: no fault of shardwise's and none of the job's."""
    from orchestrator.control.disk import room_told

    path = Path(str(error.filename)) if error.filename else Path.cwd()
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "free space there" if full else "look at that disk and who may write there"
    show(f"{error.strerror}: {path}", where=room_told(path.resolve()), fix=f"{fix}, or write to another disk")
    return ExitCode.FAILED


def _unexpected(error: BaseException) -> int:
    """One line for the user; the traceback goes into a file that a report can carry."""
    prefix = f"shardwise-{time.strftime('%Y%m%d-%H%M%S')}-"
    try:
        with tempfile.NamedTemporaryFile("w", prefix=prefix, suffix=".log", delete=False, encoding="utf-8") as log:
            log.write(f"{sys.argv}\n")
            log.writelines(traceback.format_exception(error))
        name = log.name
    except OSError:  # no file takes it
        traceback.print_exception(error)
        name = "what is printed above"
    text = str(error).splitlines()
    show(
        f"{type(error).__name__}: {text[0] if text else 'no message'}",
        where="this is a fault of shardwise, not of your job",
        fix=f"report it with {name}, where the traceback is",
    )
    return ExitCode.FAILED
