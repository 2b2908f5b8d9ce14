"""Checkpoints that are whole or not there: sharded, written in the background, resharded on load.

`manifest.py` says what a checkpoint's folder holds and which folders are whole; here tensors go in and out.

Trust: a checkpoint is read only after the sizes and sha256 of all its files match its manifest, so a torn write, a
flipped bit or a file swapped by mistake is refused by name. The manifest is not signed: someone who may write into the
folder can write a matching one. Nothing from it is executed even then: tensors are read with weights_only, and
`.metadata`, which torch writes as a pickle, by an unpickler that knows torch's metadata classes and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_loader import load as read_shards
from torch.distributed.checkpoint.state_dict_saver import save as write_shards
from torch.distributed.tensor import DTensor

from orchestrator.training.manifest import (
    FORMAT,
    MANIFEST,
    CheckpointRef,
    CheckpointRefused,
    checkpoint_name,
    fingerprint,
    latest,
    prune,
    remove,
    sha256,
    sweep,
    verify,
    verify_files,
)
from orchestrator.training.reader import Reader
from strategies.offload.files import copied

if TYPE_CHECKING:
    from strategies.engines.engine import Session

__all__ = [
    "CheckpointFailed",
    "CheckpointInfo",
    "CheckpointRef",
    "CheckpointRefused",
    "PendingSave",
    "latest",
    "load",
    "prune",
    "read_into",
    "save",
    "sweep",
    "verify",
]

T = TypeVar("T")
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)  # it makes two records a tensor, for nobody


class CheckpointFailed(RuntimeError):
    """A checkpoint that could not be written; those before it are untouched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointInfo:
    """What a checkpoint says of itself besides its tensors; plain data, for JSON."""

    job: Mapping[str, Any]
    """The job that wrote it, as parse_job takes it: a run continues where the two jobs' trajectories are equal."""
    architecture: Mapping[str, Any]
    """Shape of the model, so that the weights can be read without the job's surroundings."""
    num_steps: int
    """Length of that run; it shapes the schedule, and may differ from the run that reads it."""
    strategy: Mapping[str, Any]
    data: Mapping[str, str]
    """Fingerprints of what was trained on: tokenizer, tokens."""


# Writing ------------------------------------------------------------------------------------------------------------


class PendingSave:
    """A checkpoint on its way to the disk. The state was copied: training may go on."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path
        self.blocked_s = 0.0
        """How long training stood still for the copy."""
        self.seconds = 0.0
        """From the call to the rename."""
        self._finished = threading.Event()
        self._error: str | None = None

    def done(self) -> bool:
        return self._finished.is_set()

    def wait(self) -> Path:
        """The finished checkpoint. Raises CheckpointFailed, on every rank alike."""
        self._finished.wait()
        if self._error is not None:
            raise CheckpointFailed(f"checkpoint {self.path.name} could not be written: {self._error}")
        return self.path

    def _run(self, work: Callable[[], None], started: float) -> None:
        try:
            work()
        except BaseException as error:  # CheckpointException is no Exception; whoever waits must learn of anything
            self._error = _told(error)
        self.seconds = time.perf_counter() - started
        self._finished.set()


def save(
    session: Session,
    directory: Path,
    *,
    step: int,
    info: CheckpointInfo,
    keep: int | None = None,
    background: bool = True,
    group: dist.ProcessGroup | None = None,
) -> PendingSave:
    """Copies this rank's share of the state to host memory, then writes it in a thread; collective over `group`.

    Every replicated tensor has one owner, so host memory holds the state once over all ranks, not once per rank.

    Args:
        keep: finished checkpoints to leave after this one; None leaves all.
        group: a gloo group that nothing else uses while a save is pending. None: the default group (background=False).
    """
    started = time.perf_counter()
    final = directory / checkpoint_name(step)
    partial = directory / f"{final.name}.partial"
    pending = PendingSave(step, final)

    def prepare() -> None:
        if dist.get_rank(group) == 0:
            directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()

    def write() -> None:
        try:
            _write_shards(staged, partial, group)
            own_files = _together(lambda: _hash_own_files(partial, dist.get_rank(group)), group)
            files = {name: entry for files in own_files for name, entry in files.items()}
            _together(lambda: _publish(partial, final, files, step, info, keep, group), group)
        except BaseException:
            if dist.get_rank(group) == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    try:
        _together(prepare, group)
    except CheckpointFailed as error:
        pending._error = _told(error)
        pending._finished.set()
        return pending
    staged = _stage(session.state_dict(), group)
    pending.blocked_s = time.perf_counter() - started
    if background:
        # Not a daemon's work to outlive the process: what is not renamed does not count.
        threading.Thread(target=pending._run, args=(write, started), name=final.name, daemon=True).start()
    else:
        pending._run(write, started)
    return pending


class _Staged:
    """A shard in host memory that torch.distributed.checkpoint takes for a piece of a global tensor."""

    def __init__(self, local: torch.Tensor, items: list[Any]) -> None:
        self.local, self.items = local, items

    def __create_write_items__(self, fqn: str, _: object) -> list[Any]:
        return self.items


class _Planner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        held = self.state_dict[index.fqn]
        return held.local if isinstance(held, _Staged) else super().lookup_object(index)


def _stage(state: Mapping[str, Any], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """This rank's share, copied: later steps do not change it. Scalars become tensors, so that nothing is pickled."""
    tensors = {name: _as_tensor(value) for name, value in state.items()}
    whole = {name: value.nbytes for name, value in tensors.items() if not isinstance(value, DTensor)}
    owners = _owners(whole, group)
    staged: dict[str, Any] = {}
    for index, (name, value) in enumerate(sorted(tensors.items())):
        if isinstance(value, DTensor):
            if _owns_replica(value, index):
                local = copied(value.to_local().detach())
                shard: Any = value.detach()
                staged[name] = _Staged(local, shard.__create_write_items__(name, shard))
        elif owners[name] == dist.get_rank(group):
            staged[name] = copied(value.detach())
    return staged


def _as_tensor(value: Any) -> torch.Tensor:
    """A Python number as a tensor that holds it exactly."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def _owns_replica(tensor: DTensor, index: int) -> bool:
    """Whether this rank writes its copy of a shard that other ranks hold too; the turns go round with the index."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    return all(
        coordinate[axis] == index % tensor.device_mesh.size(axis)
        for axis, placement in enumerate(tensor.placements)
        if placement.is_replicate()
    )


def _owners(whole: Mapping[str, int], group: dist.ProcessGroup | None) -> dict[str, int]:
    """Which rank writes each tensor that several hold whole: the least loaded of its holders."""
    holders: list[Mapping[str, int]] = _together(lambda: whole, group)
    loads = [0] * len(holders)
    owners = {}
    for name in sorted({name for held in holders for name in held}):
        owner = min((rank for rank, held in enumerate(holders) if name in held), key=lambda rank: (loads[rank], rank))
        owners[name] = owner
        loads[owner] += holders[owner][name]
    return owners


def _write_shards(staged: dict[str, Any], partial: Path, group: dist.ProcessGroup | None) -> None:
    write_shards(
        staged,
        storage_writer=FileSystemWriter(partial, sync_files=True),
        planner=_Planner(flatten_state_dict=False, flatten_sharded_tensors=False),
        process_group=group,
    )


def _hash_own_files(partial: Path, rank: int) -> dict[str, dict[str, Any]]:
    names = [path.name for path in sorted(partial.glob(f"__{rank}_*"))]
    if rank == 0:
        names.append(".metadata")
    return {name: {"bytes": (partial / name).stat().st_size, "sha256": sha256(partial / name)} for name in names}


def _publish(
    partial: Path,
    final: Path,
    files: Mapping[str, Any],
    step: int,
    info: CheckpointInfo,
    keep: int | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Rank 0: the manifest, then the rename, each on the disk before the next."""
    if dist.get_rank(group) != 0:
        return
    manifest = {
        "format": FORMAT,
        "step": step,
        "time_unix_s": time.time(),
        "job": dict(info.job),
        "architecture": dict(info.architecture),
        "num_steps": info.num_steps,
        "strategy": dict(info.strategy),
        "data": dict(info.data),
        "world_size": dist.get_world_size(group),
        "torch": torch.__version__,
        "files": dict(files),
    }
    with open(partial / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(manifest | {"checksum": fingerprint(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(partial)
    if final.exists():  # written again after a resume from before it: the older one gives way
        remove(final)
    os.replace(partial, final)
    _sync_folder(final.parent)
    if keep is not None:
        prune(final.parent, keep)


# Loading ------------------------------------------------------------------------------------------------------------


def load(session: Session, ref: CheckpointRef, *, group: dist.ProcessGroup | None = None) -> None:
    """Fills the session from a checkpoint of any strategy and world size; each rank reads what its shards need.

    The ranks check the files' sums together, each its part, before any of them reads a tensor.
    Raises CheckpointRefused.
    """
    state = dict(session.state_dict())
    # Scalars travel as tensors (see _stage).
    targets = {name: _as_tensor(value) for name, value in state.items()}
    read_into(targets, ref, group=group)
    for name, value in state.items():
        if not torch.is_tensor(value):
            state[name] = type(value)(targets[name].item())
    session.load_state_dict(state)


def read_into(targets: dict[str, Any], ref: CheckpointRef, *, group: dist.ProcessGroup | None = None) -> None:
    """Fills tensors by name from a checkpoint; names that are not asked for are not read. Collective over the group."""
    alone = not dist.is_initialized()
    rank, world = (0, 1) if alone else (dist.get_rank(group), dist.get_world_size(group))
    mine = sorted(ref.manifest["files"])[rank::world]
    if alone:
        verify_files(ref, mine)
    else:
        try:
            _together(lambda: verify_files(ref, mine), group)
        except CheckpointFailed as error:
            raise CheckpointRefused(ref.path.name, str(error)) from None
    reader = Reader(ref)
    reader.refuse_unfit(targets)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            read_shards(
                targets,
                storage_reader=reader,
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=group,
                no_dist=alone,
            )
    except CheckpointException as error:
        raise CheckpointRefused(ref.path.name, f"it cannot be read: {_told(error)}") from None


# Small tools --------------------------------------------------------------------------------------------------------


def _together(act: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Each rank acts; all get all results, or all raise CheckpointFailed with all errors: none waits for another."""
    result: tuple[Any, str | None]
    try:
        result = (act(), None)
    except Exception as error:
        result = (None, f"rank {dist.get_rank(group)}: {_told(error)}")
    results: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(results, result, group=group)
    if errors := [error for _, error in results if error is not None]:
        raise CheckpointFailed("; ".join(errors))
    return [value for value, _ in results]


def _told(error: BaseException) -> str:
    """An error in one line: torch's CheckpointException holds those of the ranks."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {_told(cause)}" for rank, (cause, _) in sorted(error.failures.items()))
    if isinstance(error, CheckpointRefused):
        return error.reason
    if isinstance(error, CheckpointFailed):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _sync_folder(path: Path) -> None:
    """A rename is on the disk when its folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
