"""What the service lets in: who a token belongs to, and which jobs may name which files."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any, Literal

from orchestrator.spec.errors import Fault, Keys, SpecError, dotted
from orchestrator.spec.job import Job
from orchestrator.spec.parse import job_of
from orchestrator.spec.source import document_of

MOST_JOBS = 10_000
"""Jobs of one user that have not ended, unless the users' file says fewer."""
MOST_NAME_BYTES = 255
"""Bytes of a file's name at most, on every usual file system."""
_KEYS = {"name", "token_sha256", "role", "gpus", "jobs"}


@dataclass(frozen=True, kw_only=True, slots=True)
class User:
    name: str
    role: Literal["admin", "user", "viewer"] = "user"
    """admin: acts on every job and on nodes; user: on jobs of its own; viewer: reads. All of them read all jobs."""
    token_sha256: str = ""
    gpus: int | None = None
    """Quota: GPUs that its jobs may have at a time. None: all."""
    jobs: int = MOST_JOBS
    """Quota: jobs that have not ended."""


LOCAL = User(name="local", role="admin")
"""Who everybody is on a loopback address without a users' file."""


def users_in(path: Path) -> tuple[User, ...]:
    """Return the users of a file. SpecError where it is not as it must be."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _wrong(path, f"the users' file cannot be read: {error.strerror}", "check the path") from None
    listed = document_of(data, str(path)).value.get("users")
    if not isinstance(listed, list) or not listed:
        fix = "write `users: [{name: ada, token_sha256: ..., role: admin}]`"
        raise _wrong(path, "the users' file names no users", fix)
    users = tuple(_user(path, entry) for entry in listed)
    for what in ("name", "token_sha256"):
        if len({getattr(user, what) for user in users}) < len(users):
            raise _wrong(path, f"two users have the same {what}", "give each its own")
    return users


def _user(path: Path, entry: Any) -> User:
    if not isinstance(entry, Mapping) or not entry.keys() <= _KEYS or not {"name", "token_sha256"} <= entry.keys():
        told = f"a user is {{name, token_sha256, role, gpus, jobs}}, not {entry!s:.80}"
        raise _wrong(path, told, "name and token_sha256 are needed, the others may be left out")
    name, digest = entry["name"], entry["token_sha256"]
    if not (isinstance(name, str) and re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name)):
        raise _wrong(path, f"{name!r} is no user's name", "lower case, digits, dot, underscore, hyphen")
    if not (isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest)):
        fix = "printf %s TOKEN | sha256sum; a token of 32 random bytes: openssl rand -hex 32"
        raise _wrong(path, f"token_sha256 of {name} is not 64 hexadecimal digits", fix)
    if entry.get("role", "user") not in ("admin", "user", "viewer"):
        raise _wrong(path, f"{name} has the role {entry['role']!r}", "admin, user or viewer")
    for word in ("gpus", "jobs"):
        value = entry.get(word)
        if word in entry and not (type(value) is int and value >= 0):
            raise _wrong(path, f"`{word}` of {name} is {value!r}", "write a whole number, or leave it out")
    return User(**entry)


def _wrong(path: Path, message: str, fix: str) -> SpecError:
    return SpecError([{"file": str(path), "line": None, "column": None, "message": message, "fix": fix}])


def user_of(token: str, users: Sequence[User]) -> User | None:
    """Return whose token it is. Every user is compared, so that the time tells nothing."""
    digest = hashlib.sha256(token.encode()).hexdigest()
    found = [user for user in users if hmac.compare_digest(user.token_sha256, digest)]
    return found[0] if found else None


# Jobs -----------------------------------------------------------------------------------------------------------------


def admitted(text: bytes, root: Path, *, name: str = "job.yaml") -> Job:
    """Return the job in a submitted text; its relative paths start at the root. Every text in it is held to be a path, before
    any is opened. SpecError holds all faults."""
    document = document_of(text, name)
    faults = list(outside(document.value, root))
    if faults:
        errors = []
        for fault in faults:
            line, column = document.spot(fault)
            errors.append({"file": name, "line": line, "column": column, "message": fault.message, "fix": fault.fix})
        raise SpecError(errors)  # type: ignore[arg-type]
    return job_of(document, directory=root, name=name)


def outside(value: Any, root: Path, path: Keys = ()) -> Iterator[Fault]:
    """Yield a fault for every text in a job that, taken as a path, leaves the root or names something hidden in it."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from outside(each, root, (*path, key))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from outside(each, root, (*path, number))
    elif isinstance(value, str) and not _is_inside(value, root):
        yield Fault(
            path=path,
            message=f"`{dotted(path)}` is not a path inside the service's root",
            fix="a path relative to the root, without `..`, `~` and names that start with a dot",
        )


def _is_inside(text: str, root: Path) -> bool:
    try:
        relative = Path(text)
        if relative.is_absolute():
            relative = relative.relative_to(root)
        if any(part.startswith((".", "~")) or len(part.encode()) > MOST_NAME_BYTES for part in relative.parts):
            return False
        plain = [*relative.parts]
        magic = next((number for number, part in enumerate(plain) if has_magic(part)), len(plain))
        return root.joinpath(*plain[:magic]).resolve().is_relative_to(root)  # where a link in it leads
    except (ValueError, OSError, RuntimeError):  # not under the root; NUL; links in a circle
        return False
