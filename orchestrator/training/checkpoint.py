"""Checkpoints that are whole or not there: sharded, written in the background, resharded on load.

`manifest.py` says what a checkpoint's folder holds and which folders are whole, `saving.py` writes one, `reader.py` reads
its tensors; here a session is filled from one, and the ranks agree.

Trust: a checkpoint is read only after the sizes and sha256 of all its files match its manifest, so a torn write, a
flipped bit or a file swapped by mistake is refused by name. The manifest is not signed: someone who may write into the
folder can write a matching one. Nothing from it is executed even then; `reader.py` says how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.training.manifest import (
    CheckpointRef,
    CheckpointRefused,
    latest,
    prune,
    sha256,
    sweep,
    verify,
    verify_files,
    verify_part,
)
from orchestrator.training.reader import Reader
from orchestrator.training.saving import CheckpointInfo, PendingSave, Saver, save
from orchestrator.training.share import CheckpointFailed, as_tensor

if TYPE_CHECKING:
    from strategies.engines.engine import Session

__all__ = [
    "CheckpointFailed",
    "CheckpointInfo",
    "CheckpointRef",
    "CheckpointRefused",
    "PendingSave",
    "Reader",
    "Saver",
    "latest",
    "load",
    "prune",
    "read_into",
    "save",
    "sha256",
    "sweep",
    "verify",
    "verify_together",
]

T = TypeVar("T")


def load(session: Session, ref: CheckpointRef, *, group: dist.ProcessGroup | None = None) -> None:
    """Fills the session from a checkpoint of any strategy and world size; each rank reads what its shards need.

    The ranks verify the files together, unless that was done, before any of them reads a tensor. Raises
    CheckpointRefused, on every rank alike."""
    state = dict(session.state_dict())
    targets = {name: as_tensor(value) for name, value in state.items()}
    read_into(targets, ref, group=group)
    for name, value in state.items():
        state[name] = targets[name] if torch.is_tensor(value) else type(value)(targets[name].item())
    session.load_state_dict(state)


def read_into(targets: Mapping[str, Tensor], ref: CheckpointRef, *, group: dist.ProcessGroup | None = None) -> None:
    """Fills tensors by name from a checkpoint; names that are not asked for are not read. Collective over the group, where
    there is one. Raises CheckpointRefused."""
    ref = verify_together(ref, group=group)
    _together(lambda: Reader(ref).fill(targets), ref.path, group)


def verify_together(ref: CheckpointRef, *, group: dist.ProcessGroup | None = None) -> CheckpointRef:
    """The checkpoint, verified: each rank hashes its part of the files, unless they were hashed before. Collective over
    the group, where there is one. Raises CheckpointRefused, on every rank alike."""
    if ref.verified:
        return ref
    if not dist.is_initialized():
        return verify_files(ref)
    mine = sorted(ref.manifest["files"])[dist.get_rank(group) :: dist.get_world_size(group)]
    _together(lambda: verify_part(ref, mine), ref.path, group)
    return replace(ref, verified=True)


def _together(act: Callable[[], T], path: Path, group: dist.ProcessGroup | None) -> T:
    """Return what act gives on this rank, where it raises CheckpointRefused on none; else that, on all. No rank waits for one
    that has left."""
    if not dist.is_initialized():
        return act()
    result: list[T] = []
    reason: str | None = None
    try:
        result.append(act())
    except CheckpointRefused as error:
        reason = error.reason
    reasons: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reasons, reason, group=group)
    if told := [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason is not None]:
        raise CheckpointRefused(path.name, "; ".join(told) if len(reasons) > 1 else told[0].removeprefix("rank 0: "))
    return result[0]
