"""Which checkpoints are there, and which of them are whole: files and checksums, no torch.

checkpoints/step-00000100.partial/      while it is written
    __0_0.distcp __1_0.distcp ...       what each rank owns (torch.distributed.checkpoint)
    .metadata                           where each piece of each tensor lies
    manifest.json                       sizes and sha256 of all files, the job, the strategy; written last
checkpoints/step-00000100/              the same folder, renamed when everything in it is on the disk
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.telemetry.records import Event

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_BLOCK_BYTES = 1 << 22


class CheckpointRefused(ValueError):
    """A checkpoint that must not be loaded: torn, altered, or of another job; `.name` and `.reason`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"checkpoint {name} is refused: {reason}")
        self.name, self.reason = name, reason


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRef:
    """A checkpoint that was found whole."""

    path: Path
    step: int
    manifest: Mapping[str, Any] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())


def fingerprint(value: Any) -> str:
    """sha256 of a plain value, by its canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def latest(
    directory: Path, *, report: Callable[[Event], None], max_step: int | None = None, check: bool = True
) -> CheckpointRef | None:
    """The newest checkpoint that is whole; every newer one that is not becomes a `checkpoint_refused` event.

    Args:
        max_step: leave out checkpoints after this step (a rollback).
        check: False reads the manifest and the sizes alone; `load` checks the rest.
    """
    for step, path in reversed(_finished(directory)):
        if max_step is not None and step > max_step:
            continue
        try:
            return verify(path) if check else read_manifest(path)
        except CheckpointRefused as refused:
            details = {
                "checkpoint": str(path),
                "advice": "the one before it is used; delete the folder to silence this",
            }
            report(
                Event(
                    time_unix_s=time.time(), kind="checkpoint_refused", step=step, cause=str(refused), details=details
                )
            )
    return None


def verify(path: Path) -> CheckpointRef:
    """The checkpoint, all its files read and compared with its manifest. Raises CheckpointRefused."""
    ref = read_manifest(path)
    verify_files(ref, list(ref.manifest["files"]))
    return ref


def read_manifest(path: Path) -> CheckpointRef:
    """Everything about a checkpoint that can be judged without reading its tensors."""
    name = path.name
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        checksum = manifest.pop("checksum")
    except FileNotFoundError:
        raise CheckpointRefused(name, f"it has no {MANIFEST}, so it was never finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointRefused(name, f"its {MANIFEST} cannot be read ({error})") from None
    if checksum != fingerprint(manifest):
        raise CheckpointRefused(name, f"its {MANIFEST} was altered: the checksum inside does not match")
    if manifest["format"] != FORMAT:
        raise CheckpointRefused(
            name, f"it has format {manifest['format']} and this version of shardwise reads {FORMAT}"
        )
    match = _NAME.fullmatch(name)
    if match and int(match[1]) != manifest["step"]:
        raise CheckpointRefused(name, f"its manifest is that of step {manifest['step']}")
    for file, entry in manifest["files"].items():
        if file != os.path.basename(file):
            raise CheckpointRefused(name, f"its manifest names a file outside the folder: {file}")
        if not (path / file).is_file():
            raise CheckpointRefused(name, f"its file {file} is missing")
        if (size := (path / file).stat().st_size) != entry["bytes"]:
            raise CheckpointRefused(name, f"its file {file} has {size} bytes instead of {entry['bytes']}")
    return CheckpointRef(path=path, step=manifest["step"], manifest=manifest)


def verify_files(ref: CheckpointRef, names: list[str]) -> None:
    with ThreadPoolExecutor(max_workers=min(8, len(names) or 1)) as pool:  # hashing releases the interpreter's lock
        for name, got in zip(names, pool.map(lambda name: sha256(ref.path / name), names), strict=True):
            if got != ref.manifest["files"][name]["sha256"]:
                raise CheckpointRefused(ref.path.name, f"its file {name} was altered: sha256 does not match")


def prune(directory: Path, keep: int, *, in_use: Iterable[Path] = ()) -> list[Path]:
    """Deletes all but the newest `keep` whole checkpoints, never the only one, never one in use; the deleted ones.

    A folder that is not whole is left: it does not count, and someone may want to look at it."""
    whole = []
    for _, path in _finished(directory):
        try:
            whole.append(read_manifest(path).path)
        except CheckpointRefused:
            continue
    kept = set(in_use)
    gone = [path for path in whole[: -max(1, keep)] if path not in kept]
    for path in gone:
        remove(path)
    return gone


def sweep(directory: Path) -> list[Path]:
    """Removes what a killed process left half written or half deleted. Only where no save is pending."""
    left = [path for suffix in ("partial", "deleting") for path in directory.glob(f"step-*.{suffix}")]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return left


def _finished(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that bears the name of a finished checkpoint, oldest first."""
    if not directory.is_dir():
        return []
    return sorted((int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name)))


def remove(path: Path) -> None:
    """A half-deleted checkpoint must not bear a finished one's name."""
    aside = path.with_name(path.name + ".deleting")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    shutil.rmtree(aside)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
        return digest.hexdigest()
