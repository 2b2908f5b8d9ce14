"""The list of checkpoints: which are there, which are whole, and which to delete: files and checksums, no torch.

checkpoints/step-00000100.KEY.partial/  while it is written; KEY is another one for every attempt
    __0_0.distcp __1_0.distcp ...       what each rank owns (torch.distributed.checkpoint)
    .metadata                           where each piece of each tensor lies
    manifest.json                       sizes and sha256 of all files, the job, the strategy; written last
checkpoints/step-00000100/              the same folder, renamed when everything in it is on the disk
checkpoints/step-00000100.replaced/     an older checkpoint of that step, until the new one has its name

A manifest holds its checkpoint's place in the run's history: `sequence` counts the checkpoints of a run, `resumed_from`
names the one that the worker group went on from, `first_sequence` is the first number of that group. What lies between
the two was passed over: it was refused as corrupt, or left behind by a rollback.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from clusters.files import sync_folder
from orchestrator.models.architecture import Architecture, num_parameters
from orchestrator.telemetry.records import Event

FORMAT = 1
MANIFEST = "manifest.json"
REPLACED, DELETING, PARTIAL = ".replaced", ".deleting", ".partial"
_NAME = re.compile(r"step-(\d{8,12})(?:\.replaced)?")
_BLOCK_BYTES = 1 << 22
MAX_MANIFEST_BYTES = 1 << 28


class CheckpointRefused(ValueError):
    """A checkpoint that must not be loaded: torn, altered, or of another job; `.name` and `.reason`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"checkpoint {name} is refused: {reason}")
        self.name, self.reason = name, reason


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRef:
    """A checkpoint whose manifest and sizes of files agree."""

    path: Path
    step: int
    manifest: Mapping[str, Any] = field(repr=False)
    verified: bool = False
    """The sha256 of every file was compared with the manifest, so that it need not be done again."""

    @property
    def num_bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())

    @property
    def sequence(self) -> int:
        """Return a checkpoint's place in the run's history, from 1; 0 where it was written before checkpoints were counted."""
        return int(self.manifest.get("sequence", 0))

    @property
    def order(self) -> tuple[int, int]:
        """Sorts checkpoints from oldest to newest; those without a sequence come first, by step."""
        return self.sequence, self.step

    def passed_over(self, other: CheckpointRef) -> bool:
        """Whether the group that wrote this checkpoint went on from one before the other, though the other was there."""
        if other.order >= self.order or other.sequence >= self.manifest.get("first_sequence", 0):
            return False
        origin = self.manifest["resumed_from"]
        return origin is None or other.order > (origin["sequence"], origin["step"])


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
        check: False reads the manifests and the sizes alone; whoever loads the checkpoint verifies the rest.
    """
    readable, refused = survey(directory)
    found: CheckpointRef | None = None
    for ref in reversed(standing(readable)):
        if max_step is not None and ref.step > max_step:
            continue
        try:
            found = verify_files(ref) if check else ref
            break
        except CheckpointRefused as error:
            refused.append((ref.step, ref.path, error))
    for step, path, why in sorted(refused, key=lambda item: item[0], reverse=True):
        if (max_step is None or step <= max_step) and (found is None or step > found.step):
            report(refusal(why, step, path))
    return found


def refusal(error: CheckpointRefused, step: int, path: Path) -> Event:
    """The event that tells of a checkpoint that was refused."""
    advice = "the one before it is used; delete the folder to silence this"
    details = {"checkpoint": str(path), "advice": advice}
    return Event(time_unix_s=time.time(), kind="checkpoint_refused", step=step, cause=str(error), details=details)


def survey(directory: Path) -> tuple[list[CheckpointRef], list[tuple[int, Path, CheckpointRefused]]]:
    """(checkpoints with a sound manifest, oldest first; step, folder and reason of the others)."""
    readable, refused = [], []
    for step, path in _finished(directory):
        try:
            readable.append(read_manifest(path))
        except CheckpointRefused as error:
            refused.append((step, path, error))
    return sorted(readable, key=lambda ref: ref.order), refused


def standing(refs: Iterable[CheckpointRef]) -> list[CheckpointRef]:
    """Return the checkpoints that no later group passed over: a run goes on from these, and counts these when old ones are
    deleted."""
    refs = list(refs)
    return [ref for ref in refs if not any(later.passed_over(ref) for later in refs)]


def before(ref: CheckpointRef) -> Path | None:
    """The newest checkpoint before this one that no later group passed over, by its manifest."""
    readable, _ = survey(ref.path.parent)
    older = [other.path for other in standing(readable) if other.order < ref.order]
    return older[-1] if older else None


def verify(path: Path) -> CheckpointRef:
    """The checkpoint, all its files read and compared with its manifest. Raises CheckpointRefused."""
    return verify_files(read_manifest(path))


def read_manifest(path: Path) -> CheckpointRef:
    """Everything about a checkpoint that can be judged without reading its tensors. Raises CheckpointRefused."""
    name = path.name
    try:
        status = os.stat(path / MANIFEST)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST_BYTES:  # a pipe or device may never end
            raise CheckpointRefused(name, f"its {MANIFEST} is no plain file of at most {MAX_MANIFEST_BYTES} bytes")
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        checksum = manifest.pop("checksum")
        matches = checksum == fingerprint(manifest)
    except FileNotFoundError:
        raise CheckpointRefused(name, f"it has no {MANIFEST}, so it was never finished") from None
    except CheckpointRefused:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise CheckpointRefused(name, f"its {MANIFEST} cannot be read ({error})") from None
    if not matches:
        raise CheckpointRefused(name, f"its {MANIFEST} was altered: the checksum inside does not match")
    if manifest.get("format") != FORMAT:
        raise CheckpointRefused(
            name, f"it has format {manifest.get('format')} and this version of shardwise reads {FORMAT}"
        )
    if fault := _fault(manifest):
        raise CheckpointRefused(name, f"its {MANIFEST} {fault}")
    match = _NAME.fullmatch(name)
    if match and int(match[1]) != manifest["step"]:
        raise CheckpointRefused(name, f"its manifest is that of step {manifest['step']}")
    for file, entry in manifest["files"].items():
        try:
            status = os.stat(path / file)
        except FileNotFoundError:
            raise CheckpointRefused(name, f"its file {file} is missing") from None
        except (OSError, ValueError) as error:
            raise CheckpointRefused(name, f"its file {file} cannot be read ({error})") from None
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointRefused(name, f"its file {file} is no plain file")
        if status.st_size != entry["bytes"]:
            raise CheckpointRefused(name, f"its file {file} has {status.st_size} bytes instead of {entry['bytes']}")
    return CheckpointRef(path=path, step=manifest["step"], manifest=manifest)


def _fault(manifest: Mapping[str, Any]) -> str | None:
    """Return what in a manifest is not of the type that its readers rely on; someone else may have written it."""
    types = {
        "step": int,
        "num_steps": int,
        "job": dict,
        "architecture": dict,
        "strategy": dict,
        "data": dict,
        "files": dict,
    }
    for key, kind in types.items():
        if type(manifest.get(key)) is not kind:
            return f"has no {key} of type {kind.__name__}"
    for file, entry in manifest["files"].items():
        if not file or file in (".", "..") or file != os.path.basename(file):
            return f"names a file outside the folder: {file}"
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or type(entry.get("sha256")) is not str:
            return f"lacks the size or the sha256 of {file}"
    if manifest["step"] < 0 or manifest["num_steps"] < 0:
        return "has a negative step"
    if "sequence" not in manifest:
        return None
    if any(type(manifest.get(key)) is not int or manifest[key] < 1 for key in ("sequence", "first_sequence")):
        return "has no sequence and first_sequence from 1 up"
    origin = manifest.get("resumed_from", "absent")
    if origin is None:
        return None
    keys = ("sequence", "step")
    if not isinstance(origin, dict) or any(type(origin.get(key)) is not int for key in keys):
        return "does not say what it was resumed from"
    return None


def architecture_of(ref: CheckpointRef) -> Architecture:
    """The shape of a checkpoint's model. CheckpointRefused where the manifest tells none, or one with more parameters than
    the files have bytes for: nothing may be made of a size that only a manifest claims."""
    told = ref.manifest["architecture"]
    kinds = {
        "int": (int,),
        "bool": (bool,),
        "float": (int, float),
        "int | None": (int, type(None)),
        "Variant | None": (str, type(None)),
    }
    try:
        arch = Architecture(**told)
        for item in fields(arch):
            if type(getattr(arch, item.name)) not in kinds.get(str(item.type), (str,)):
                raise ValueError(f"{item.name} is {getattr(arch, item.name)!r}")
        # A checkpoint of adapters (training/adapters.py) stands on weights elsewhere, which are weighed when they are read.
        needed = 0 if "lora" in ref.manifest else 2 * num_parameters(arch)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointRefused(ref.path.name, f"its {MANIFEST} tells no architecture: {error}") from None
    if needed > ref.num_bytes:
        raise CheckpointRefused(
            ref.path.name, f"its {MANIFEST} tells of {needed // 2} parameters, for which its files have no room"
        )
    return arch


def verify_files(ref: CheckpointRef) -> CheckpointRef:
    """The checkpoint, verified: all its files are read, unless they were before. Raises CheckpointRefused."""
    if ref.verified:
        return ref
    verify_part(ref, sorted(ref.manifest["files"]))
    return replace(ref, verified=True)


def verify_part(ref: CheckpointRef, names: list[str]) -> None:
    """Reads some of a checkpoint's files and compares their sha256. Raises CheckpointRefused."""
    with ThreadPoolExecutor(max_workers=min(8, len(names) or 1)) as pool:  # hashing releases the interpreter's lock
        for name, got in zip(names, pool.map(lambda name: _sum_of(ref, name), names), strict=True):
            if got != ref.manifest["files"][name]["sha256"]:
                raise CheckpointRefused(ref.path.name, f"its file {name} was altered: sha256 does not match")


def _sum_of(ref: CheckpointRef, name: str) -> str:
    try:
        return sha256(ref.path / name)
    except OSError as error:
        raise CheckpointRefused(ref.path.name, f"its file {name} cannot be read ({error.strerror})") from None


def prune(newest: CheckpointRef, keep: int) -> list[Path]:
    """Deletes all but the last `keep` checkpoints of a run's history; the deleted ones.

    A checkpoint that was passed over does not count, and goes: it was refused, or a rollback left it behind. A folder
    without a sound manifest is left: it does not count, and someone may want to look at it.

    Args:
        newest: was just written and verified; without one, nothing may be deleted.
    """
    if not newest.verified:
        raise ValueError(f"{newest.path.name} was not verified: nothing may be deleted for it")
    refs, _ = survey(newest.path.parent)
    kept = {ref.path for ref in standing(refs)[-max(1, keep) :]} | {newest.path}
    gone = [ref.path for ref in refs if ref.path not in kept and ref.order < newest.order]
    for path in gone:
        remove(path)
    return gone


def sweep(directory: Path) -> list[Path]:
    """Removes what a killed process left half written or half deleted; the folders that are gone. An older checkpoint that
    had stepped aside gets its name back where the new one did not get it. Only where no save is pending."""
    for aside in directory.glob(f"step-*{REPLACED}"):
        final = aside.with_name(aside.name.removesuffix(REPLACED))
        with suppress(OSError):  # it is readable under either name
            if final.exists():
                remove(aside)
            else:
                os.replace(aside, final)
    left = [path for suffix in (PARTIAL, DELETING) for path in directory.glob(f"step-*{suffix}")]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return left


def put_in_place(partial: Path, final: Path) -> None:
    """Gives a whole checkpoint, which is on the disk, its name. One of that name (of a run that went back and came here
    again) steps aside first: at every moment the old one or the new one bears a name that `latest` reads."""
    aside = final.with_name(final.name + REPLACED)
    if final.exists():
        remove_replaced(final)
        os.replace(final, aside)
    os.replace(partial, final)
    sync_folder(final.parent)


def remove_replaced(final: Path) -> None:
    """Deletes what stepped aside for a checkpoint."""
    aside = final.with_name(final.name + REPLACED)
    if aside.exists():
        remove(aside)


def _finished(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that bears the name of a finished checkpoint, oldest first."""
    if not directory.is_dir():
        return []
    return sorted((int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name)))


def remove(path: Path) -> None:
    """Deletes a checkpoint, renamed first: a half-deleted one must not bear a finished one's name."""
    aside = path.with_name(path.name + DELETING)
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    shutil.rmtree(aside)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
        return digest.hexdigest()
