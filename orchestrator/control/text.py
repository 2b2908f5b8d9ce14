"""The text of a run is pinned when it begins, so that files which come or change later neither end it nor slip into it.

A run that did a step goes on with the tokens that it began with while they are there. Where they are gone they are made again; if
the text is another by then, a run that has a checkpoint is refused, file by file, and one that has none begins anew with it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusters.files import write_atomically
from orchestrator.control.folder import RunFolder, RunRefused
from orchestrator.telemetry.records import Event
from orchestrator.training.data import DataError, DataIndex, index_of, read_index
from orchestrator.training.inputs import Request, changes, few, files_of, notes, request_of, versions

if TYPE_CHECKING:
    from orchestrator.spec import Job
    from orchestrator.training.manifest import CheckpointRef
    from orchestrator.training.prepare import Progress

MAX_CHANGES = 100
"""Files in one event."""
PINNED = "data.json"
"""File in a run's folder: the index of its tokens, and where they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """The text that a run will read."""

    index: DataIndex | None
    """Tokens that are there already. None: they are to be prepared."""
    changes: tuple[str, ...] = ()
    """Sentences of what is different from when the run began, file by file."""


def text_of(
    job: Job, folder: RunFolder, resume: CheckpointRef | None, *, note: Callable[[str], None] = lambda line: None
) -> Text:
    """Decides what the run reads, and notes it where the text changed; nothing is tokenized.

    Raises DataError where there is no text, and RunRefused where the checkpoint is of a text that is gone."""
    text = _decided(job, folder, resume)
    if text.changes:
        note(f"text      {told(text)}")
    return text


def _decided(job: Job, folder: RunFolder, resume: CheckpointRef | None) -> Text:
    request = request_of(job, folder.tokens)
    pinned = read_pinned(folder) or _found(request, resume)
    if pinned is None or not (resume or has_stepped(folder)):
        files_of(request)
        return Text(index=None)
    changed = tuple(changes(request, pinned))
    try:
        index = read_index(pinned.directory)
        if index.fingerprint == pinned.fingerprint:
            return Text(index=index, changes=changed)
    except DataError:
        pass  # deleted, or damaged: made again where the text is the same
    if changed and resume is not None:
        raise _refused(job, folder, f"{few(changed)}; the tokens it began with are gone from {pinned.directory}")
    files_of(request)
    return Text(index=None, changes=changed)


def prepared(
    job: Job,
    folder: RunFolder,
    text: Text,
    resume: CheckpointRef | None,
    progress: Progress,
    *,
    note: Callable[[str], None] = lambda line: None,
) -> DataIndex:
    """The tokens of the run, made now unless they are there, and pinned; what a person should know of them is noted.

    Raises RunRefused where they are not the checkpoint's."""
    index = text.index or _prepared(job, folder, resume, progress)
    for line in notes(request_of(job, folder.tokens), index):
        note(f"tokens    {line}")
    return index


def _prepared(job: Job, folder: RunFolder, resume: CheckpointRef | None, progress: Progress) -> DataIndex:
    from orchestrator.training.prepare import prepare_job

    index = prepare_job(job, progress=progress, cache=folder.tokens)
    if resume is not None and resume.manifest["data"].get("tokens") != index.fingerprint:
        pinned = read_pinned(folder)
        changed = few(changes(request_of(job, folder.tokens), pinned)) if pinned else ""
        raise _refused(job, folder, changed or "which file changed is not on record")
    write_pinned(folder, index)
    return index


def told(text: Text) -> str:
    """Return what the run does about text that changed since it began. Empty: nothing changed."""
    if not text.changes:
        return ""
    changed = f"the text changed since the run began ({few(text.changes)})"
    if text.index is None:
        return f"{changed}; no step was saved, so it begins anew with the text as it is now"
    return (
        f"{changed}; the run goes on with the tokens that it began with. To train on the text as it is now: --fresh, "
        "or another name"
    )


def changed_event(text: Text, step: int) -> Event:
    """The event of a run whose text changed, with the first of the files."""
    details = {"changes": list(text.changes[:MAX_CHANGES])}
    return Event(time_unix_s=time.time(), kind="text_changed", step=step, cause=told(text), details=details)


def has_stepped(folder: RunFolder) -> bool:
    return folder.metrics.exists() and folder.metrics.stat().st_size > 0


def write_pinned(folder: RunFolder, index: DataIndex) -> None:
    write_atomically(folder.path / PINNED, json.dumps({"directory": str(index.directory), **index.to_mapping()}))


def read_pinned(folder: RunFolder) -> DataIndex | None:
    """The index of the tokens that the run began with, wherever they are now. None: it is not on record."""
    try:
        mapping: dict[str, Any] = json.loads((folder.path / PINNED).read_text(encoding="utf-8"))
        return index_of(mapping, Path(mapping.pop("directory")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _found(request: Request, resume: CheckpointRef | None) -> DataIndex | None:
    """The tokens that a checkpoint was trained on, where the run does not say: it began before runs pinned their text."""
    for folder in versions(request.directory) if resume else ():
        with contextlib.suppress(DataError):
            index = read_index(folder)
            if resume is not None and resume.manifest["data"].get("tokens") == index.fingerprint:
                return index
    return None


def _refused(job: Job, folder: RunFolder, difference: str) -> RunRefused:
    return RunRefused(
        f"{job.name} cannot go on with another text than it was trained on: {difference}",
        where=str(folder.path),
        fix="put the files back as they were, give the job another name, or start over: shardwise run JOB --fresh "
        "(the old folder is kept, under another name)",
    )
