"""Writes checkpoints behind the training: slow storage costs a checkpoint, never the run.

The training thread copies the state to host memory. A thread of each rank then writes the rank's share, syncs it, and reads
it back; rank 0 collects what the ranks report, writes the index and the manifest, and renames the folder into place.

The threads talk by keys in the store of the process group, small JSON that is polled, and never by a collective: one of
those would be broken by a rank whose storage is slow, and gloo then closes the connections for good. Rank 0 alone decides
how a save ended, once, at its limit at the latest; the other ranks read its verdict when they need it.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from clusters.files import sync_folder
from orchestrator.training.limits import Limits
from orchestrator.training.manifest import (
    FORMAT,
    MANIFEST,
    PARTIAL,
    CheckpointRef,
    checkpoint_name,
    fingerprint,
    latest,
    prune,
    put_in_place,
    remove_replaced,
    survey,
)
from orchestrator.training.share import (
    CheckpointFailed,
    Shares,
    Written,
    as_tensor,
    data_of,
    shares_of,
    stage,
    told,
    write_index,
    write_share,
)

if TYPE_CHECKING:
    from strategies.engines.engine import Session

POLL_S = (0.002, 0.25)
"""Between two looks into the store: first, and at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointInfo:
    """The facts that a checkpoint tells of itself besides its tensors; plain data, for JSON."""

    job: Mapping[str, Any]
    """The job that wrote it, as parse_job takes it: a run continues where the two jobs' trajectories are equal."""
    architecture: Mapping[str, Any]
    """Shape of the model, so that the weights can be read without the job's surroundings."""
    num_steps: int
    """Length of that run; it shapes the schedule, and may differ from the run that reads it."""
    strategy: Mapping[str, Any]
    data: Mapping[str, str]
    """Fingerprints of what was trained on: tokenizer, tokens, and the frozen weights beside which adapters are trained."""
    lora: Mapping[str, Any] | None = None
    """Adapters that it holds in the place of a model, and the weights that they stand on (adapters.py)."""


class PendingSave:
    """A checkpoint on its way to the disk. The state was copied: training may go on."""

    def __init__(
        self, step: int, path: Path, *, ask: Callable[[], dict[str, Any] | None], written: Callable[[float], None]
    ) -> None:
        self.step, self.path = step, path
        self.blocked_s = 0.0
        """How long training stood still for the copy."""
        self.seconds = 0.0
        """Seconds from the call to the rename."""
        self.prune_error: str | None = None
        """Why older checkpoints could not be deleted; on rank 0."""
        self.started = time.perf_counter()
        self.give_up_at = math.inf
        """Without rank 0's word until then, rank 0 is gone or hangs; on its perf_counter."""
        self._ask, self._written = ask, written
        self._verdict: dict[str, Any] | None = None

    def done(self) -> bool:
        """Whether wait() returns at once."""
        self._verdict = self._verdict or self._ask()
        return self._verdict is not None

    def wait(self) -> Path:
        """The finished checkpoint. Raises CheckpointFailed, on every rank alike, at the limit at the latest."""
        polling = Polling(self.give_up_at)
        while not self.done():
            if not polling.sleep():
                raise RuntimeError(f"rank 0 did not say how checkpoint {self.path.name} ended: it is gone, or hangs")
        assert self._verdict is not None
        self.seconds = self._verdict["seconds"]
        if (error := self._verdict["error"]) is not None:
            raise CheckpointFailed(f"checkpoint {self.path.name} could not be written: {error}")
        self._written(self.seconds)
        return self.path


class Polling:
    """Waits that grow, up to a deadline."""

    def __init__(self, deadline: float) -> None:
        self.deadline, self.next_s = deadline, POLL_S[0]

    def sleep(self) -> bool:
        """False, and at once, where the deadline has passed."""
        left = self.deadline - time.perf_counter()
        if left <= 0:
            return False
        time.sleep(min(self.next_s, left))
        self.next_s = min(POLL_S[1], self.next_s * 1.5)
        return True


class Saver:
    """Writes the checkpoints of one worker group. Every rank has one, made at the same place.

    Args:
        keep: checkpoints of the run's history to leave after each one; None leaves all.
        resumed_from: what this group went on from.
        group: a gloo group for what is agreed once, while no checkpoint is written. None: the default group.
    """

    def __init__(
        self,
        directory: Path,
        info: CheckpointInfo,
        *,
        keep: int | None = None,
        resumed_from: CheckpointRef | None = None,
        group: dist.ProcessGroup | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.directory, self.info, self.keep, self.group = directory, info, keep, group
        self.limits = limits or Limits()
        self.longest_s: float | None = None
        """Names of the checkpoints that were written; the same on every rank."""
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.origin = resumed_from and {
            "name": resumed_from.path.name,
            "step": resumed_from.step,
            "sequence": resumed_from.sequence,
        }
        store = _get_default_store()
        number = store.add(f"savers of rank {self.rank}", 1)  # the same on every rank
        self.store = PrefixStore(f"saver {number}", store)
        if self.rank == 0:
            self.store.set("key", uuid.uuid4().hex[:8])
        self.key = self.store.get("key").decode()
        """Folder of this group alone: a process of an earlier one that still writes does it into another folder."""
        self.num_saves = 0
        self.first_sequence = self.sequence = 0
        """Rank 0: known with the first save. Reading the folder may take long."""
        self.shares: Shares | None = None
        self.writing: threading.Thread | None = None
        self.writing_step = 0
        self.past: list[_Attempt] = []
        """Rank 0: those whose keys are in the store."""
        self.left: list[_Attempt] = []
        """Rank 0: failed attempts whose folder some rank may still write into."""

    def save(self, session: Session, *, step: int, background: bool = True) -> PendingSave:
        """Copies this rank's share of the state to host memory, then writes it in a thread. Called on every rank at the
        same step; it raises nothing that only one rank sees.

        Every replicated tensor has one owner, so host memory holds the state once over all ranks, not once per rank."""
        self.num_saves += 1
        state = session.state_dict()
        if self.shares is None:
            self.shares = shares_of({name: as_tensor(value) for name, value in state.items()}, self.group)
        attempt = _Attempt(self, self.num_saves, step, self.limit_s())
        pending = attempt.pending
        if self.writing is not None and self.writing.is_alive():
            # Its copy of the state is still held; a second one might not fit.
            attempt.report(error=f"the storage has not taken step {self.writing_step} yet")
            if self.rank == 0:
                self.past.append(attempt)
                attempt.decide(f"rank 0: the storage has not taken step {self.writing_step} yet")
            return pending
        failure: str | None = None
        try:
            staged = stage(state, self.shares.owner_of, self.rank)
        except Exception as error:  # no room for the copy, say: told to all ranks as what it is
            staged, failure = {}, told(error)
        pending.blocked_s = time.perf_counter() - pending.started
        # Not a daemon's work to outlive the process: what is not renamed does not count.
        self.writing = threading.Thread(target=attempt.run, args=(staged, failure), name=pending.path.name, daemon=True)
        self.writing_step = step
        self.writing.start()
        if not background:
            self.writing.join()
        return pending

    def learn(self, seconds: float) -> None:
        self.longest_s = max(seconds, self.longest_s or 0.0)

    def limit_s(self) -> float:
        assert self.shares is not None
        return self.limits.save(num_bytes=self.shares.num_bytes, longest_s=self.longest_s)

    def place(self) -> dict[str, Any]:
        """The next place in the run's history, for a manifest; rank 0's thread asks. None is given twice."""
        if not self.first_sequence:
            there, _ = survey(self.directory)
            self.first_sequence = 1 + max((ref.sequence for ref in there), default=0)
            self.sequence = self.first_sequence - 1
        self.sequence += 1
        return {
            "sequence": self.sequence,
            "first_sequence": self.first_sequence,
            "resumed_from": self.origin,
        }


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
    """One checkpoint more behind the newest that is there, by a saver of its own; else the arguments are those of Saver."""
    newest = latest(directory, report=lambda event: None, check=False)
    saver = Saver(directory, info, keep=keep, resumed_from=newest, group=group)
    return saver.save(session, step=step, background=background)


class _Attempt:
    """One save on one rank."""

    def __init__(self, saver: Saver, number: int, step: int, limit_s: float) -> None:
        self.saver, self.number, self.step, self.limit_s = saver, number, step, limit_s
        final = saver.directory / checkpoint_name(step)
        self.partial = final.with_name(f"{final.name}.{saver.key}-{number}{PARTIAL}")
        self.pending = PendingSave(step, final, ask=self.verdict, written=saver.learn)
        self.deadline = self.pending.started + limit_s
        self.pending.give_up_at = self.deadline + saver.limits.answer_s
        self._decided = threading.Lock()
        self._verdict: dict[str, Any] | None = None

    # What the ranks say to each other -----------------------------------------------------------------------------------

    def report(self, *, files: Mapping[str, Any] | None = None, error: str | None = None) -> None:
        """Says that this rank will not write into the folder any more; what it wrote, or why it could not."""
        self.saver.store.set(f"{self.number} rank {self.saver.rank}", json.dumps({"files": files, "error": error}))

    def reported(self, rank: int) -> dict[str, Any] | None:
        return self._get(f"{self.number} rank {rank}")

    def verdict(self) -> dict[str, Any] | None:
        """How the save ended; None while that is open. On rank 0 the limit ends it, whatever its thread hangs in."""
        if self.saver.rank != 0:
            return self._get(f"{self.number} verdict")
        if self._verdict is None and time.perf_counter() > self.deadline:
            self.decide(self._too_late())
        return self._verdict

    def decide(self, error: str | None) -> None:
        """Rank 0: the first decision stands."""
        with self._decided:
            if self._verdict is None:
                verdict = {"error": error, "seconds": time.perf_counter() - self.pending.started}
                self.saver.store.set(f"{self.number} verdict", json.dumps(verdict))
                self._verdict = verdict

    def _get(self, key: str) -> dict[str, Any] | None:
        if not self.saver.store.check([key]):
            return None
        value: dict[str, Any] = json.loads(self.saver.store.get(key))
        return value

    def _too_late(self) -> str:
        late = [str(rank) for rank in range(self.saver.size) if self.reported(rank) is None] or ["0"]
        ranks = f"rank {late[0]}" if len(late) == 1 else f"ranks {', '.join(late)}"
        return f"the storage of {ranks} had not taken it after {self.limit_s:.0f} s"

    # The thread of each rank --------------------------------------------------------------------------------------------

    def run(self, staged: dict[str, Any], failure: str | None) -> None:
        """Writes this rank's share; on rank 0, the checkpoint. Whatever happens is told."""
        try:
            if failure is not None:
                raise CheckpointFailed(failure)
            files = write_share(staged, self.partial, self.saver.rank)
            staged.clear()
            self.report(files=files)
        except BaseException as error:  # whoever waits must learn of anything
            staged.clear()
            self.report(error=told(error))
        if self.saver.rank == 0:
            self._conclude()

    def _conclude(self) -> None:
        """Rank 0: collects the reports, publishes, and cleans up behind what failed."""
        self.saver.past.append(self)
        try:
            self._tidy()
            self._forget()
            self._publish(self._collected())
        except BaseException as error:
            self.decide(told(error))
            self.saver.left.append(self)
            polling = Polling(self.deadline)
            while not self._tidy() and polling.sleep():
                continue

    def _collected(self) -> dict[str, Any]:
        """The files of all ranks. Raises CheckpointFailed with what went wrong, as soon as it is known."""
        polling = Polling(self.deadline)
        while True:
            reports = [self.reported(rank) for rank in range(self.saver.size)]
            errors = [f"rank {rank}: {got['error']}" for rank, got in enumerate(reports) if got and got["error"]]
            if errors:
                raise CheckpointFailed("; ".join(errors))
            if all(reports):
                return {name: entry for got in reports if got for name, entry in got["files"].items()}
            if not polling.sleep():
                raise CheckpointFailed(self._too_late())

    def _publish(self, files: dict[str, Any]) -> None:
        saver, info = self.saver, self.saver.info
        files |= write_index(self.partial, [rank for rank in range(saver.size) if data_of(rank) in files])
        manifest = {
            "format": FORMAT,
            "step": self.step,
            **saver.place(),
            "time_unix_s": time.time(),
            "job": dict(info.job),
            "architecture": dict(info.architecture),
            "num_steps": info.num_steps,
            "strategy": dict(info.strategy),
            "data": dict(info.data),
            **({"lora": dict(info.lora)} if info.lora is not None else {}),
            "world_size": saver.size,
            "torch": torch.__version__,
            "files": files,
        }
        with Written(self.partial / MANIFEST) as file:
            file.write(json.dumps(manifest | {"checksum": fingerprint(manifest)}, indent=1).encode())
        sync_folder(self.partial)
        if self.verdict() is not None:  # too late: training went on without it
            raise CheckpointFailed("the limit has passed")
        put_in_place(self.partial, self.pending.path)
        if self._verdict is None:
            self._delete_old(CheckpointRef(path=self.pending.path, step=self.step, manifest=manifest, verified=True))
        self.decide(None)

    def _delete_old(self, newest: CheckpointRef) -> None:
        """A failure here is no failure of the checkpoint, which is whole."""
        try:
            remove_replaced(newest.path)
            if self.saver.keep is not None:
                prune(newest, self.saver.keep)
        except OSError as error:
            self.pending.prune_error = f"{error.filename or newest.path.parent}: {error.strerror or error}"

    def _tidy(self) -> bool:
        """Rank 0: removes the folders of failed attempts that no rank writes into any more; whether none is left."""
        waiting = []
        for attempt in self.saver.left:
            if all(attempt.reported(rank) is not None for rank in range(self.saver.size)):
                shutil.rmtree(attempt.partial, ignore_errors=True)
            else:
                waiting.append(attempt)
        self.saver.left = waiting
        return not waiting

    def _forget(self) -> None:
        """Rank 0: deletes the keys of attempts before the last; every rank has read their verdict to come here."""
        for attempt in self.saver.past[:-2]:
            if attempt not in self.saver.left:
                self.saver.past.remove(attempt)
                for name in ("verdict", *(f"rank {rank}" for rank in range(self.saver.size))):
                    self.saver.store.delete_key(f"{attempt.number} {name}")
