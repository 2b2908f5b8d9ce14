"""A process group with the rules of NCCL, over gloo, for tests on CPUs. Importing it makes the backend `strict` known to torch.

gloo forgives what NCCL does not. Here, as there:
1. The first use of a communicator is a rendezvous: each member waits for all others. A message between two ranks has a
   communicator of its own, that of the pair within its group, as torch makes it on NCCL for messages that are not batched.
2. What is issued on one communicator is issued in the same order on every member: same operation, size, dtype and ends.
3. A send completes only when its receive is posted.
What breaks a rule raises RuleBroken, which shows where in the code both sides stand. A group asked for with
backend="gloo" (decisions, checkpoints) keeps gloo's rules, as it does beside NCCL.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store
from torch.utils._pytree import tree_leaves

POLL_S = 0.002
LAST_S = 2.0
"""For the others, whose time is up as well, to tell where they are."""
FRAMES = 12
"""Of a stack, the innermost that are told."""
LEFT_OUT = ("/torch/", "/multiprocessing/", "<", __file__)
"""Files whose frames say nothing of who asked."""


class RuleBroken(RuntimeError):
    """NCCL would hang, or mix up messages."""


class StrictGroup(dist.ProcessGroup):
    """One group of ranks; see the module."""

    limit = timedelta(minutes=30)
    """Longest wait for another rank: that of the default group, which torch does not hand on to the groups made after it."""
    everyone: Store
    """Of the default group."""

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.inner = ProcessGroupGloo(PrefixStore("gloo", store), rank, size, timeout=timeout)
        self.store = PrefixStore("rules", store)
        self.known_as: Any = ""
        self.number: Counter[str] = Counter()
        """Communicator -> operations issued on it."""

    def getBackendName(self) -> str:
        return "strict"

    @property
    def group_name(self) -> Any:
        """The name under which torch knows the group, or knew it until it was destroyed."""
        self.known_as = dist.distributed_c10d._world.pg_names.get(self, self.known_as)
        return self.known_as

    def allreduce(self, tensors: Any, opts: Any) -> Any:
        return self._together("all_reduce", opts.reduceOp.op.name, tensors, lambda: self.inner.allreduce(tensors, opts))

    def broadcast(self, tensors: Any, opts: Any) -> Any:
        return self._together("broadcast", opts.rootRank, tensors, lambda: self.inner.broadcast(tensors, opts))

    def reduce(self, tensors: Any, opts: Any) -> Any:
        return self._together("reduce", opts.rootRank, tensors, lambda: self.inner.reduce(tensors, opts))

    def allgather(self, outputs: Any, inputs: Any, opts: Any) -> Any:
        return self._together("all_gather", "", inputs, lambda: self.inner.allgather(outputs, inputs, opts))

    def all_gather_single(self, output: Tensor, part: Tensor, opts: Any) -> Any:
        return self._together("all_gather", "", part, lambda: self.inner._allgather_base(output, part, opts))

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, opts: Any) -> Any:
        call = lambda: self.inner._reduce_scatter_base(output, whole, opts)  # noqa: E731
        return self._together("reduce_scatter", opts.reduceOp.op.name, output, call)

    # torch before 2.13 has these two names.
    _allgather_base, _reduce_scatter_base = all_gather_single, reduce_scatter_single

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> Any:
        return self._together("gather", opts.rootRank, inputs, lambda: self.inner.gather(outputs, inputs, opts))

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> Any:
        return self._together("scatter", opts.rootRank, outputs, lambda: self.inner.scatter(outputs, inputs, opts))

    def barrier(self, opts: Any) -> Any:
        return self._together("barrier", "", (), lambda: self.inner.barrier(opts))

    def send(self, tensors: Any, target: int, tag: int) -> Any:
        return self._between(self.rank(), target, tensors, lambda: self.inner.send(tensors, target, tag))

    def recv(self, tensors: Any, source: int, tag: int) -> Any:
        return self._between(source, self.rank(), tensors, lambda: self.inner.recv(tensors, source, tag))

    def _together(self, kind: str, how: object, tensors: Any, call: Callable[[], Any]) -> Any:
        does = f"{kind} {how} of {_told(tensors)} in {self.group_name}".replace("  ", " ")
        self._issue("all", range(self.size()), does)
        return call()

    def _between(self, source: int, target: int, tensors: Any, call: Callable[[], Any]) -> Any:
        pair = "-".join(map(str, sorted((source, target))))
        does = f"{_told(tensors)} from {source} to {target} in {self.group_name}"
        place = self._issue(pair, (source, target), does)
        self.store.set(f"{place}/{self.rank()}", "1")
        other, what = (target, "receive") if self.rank() == source else (source, "send")
        return Exchange(call(), lambda: self._await([f"{place}/{other}"], f"waits for the {what} of {does}"))

    def _issue(self, communicator: str, members: Iterable[int], does: str) -> str:
        """The place of an operation among those of its communicator, once it is the same there for all."""
        number = self.number[communicator]
        self.number[communicator] += 1
        place, mine = f"{communicator}/{number}", json.dumps([self.rank(), does, _stack()])
        if number == 0:
            self.store.set(f"{communicator}/here/{self.rank()}", "1")
            here = [f"{communicator}/here/{member}" for member in members]
            self._await(here, f"opens the communicator {communicator} for {does}")
        rank, theirs, stack = json.loads(self.store.compare_set(place, "", mine))
        if theirs != does:
            raise RuleBroken(
                f"operation {number} of the communicator {communicator} is not the same on all members.\n"
                f"Rank {self.rank()} issues {does}, at\n{_stack()}\nRank {rank} issued {theirs}, at\n{stack}"
            )
        return place

    def _await(self, keys: list[str], what: str) -> None:
        deadline = time.monotonic() + self.limit.total_seconds()
        while not self.store.check(keys):  # the file store's own wait keeps no limit
            if time.monotonic() > deadline:
                self._give_up(keys, what)
            time.sleep(POLL_S)

    def _give_up(self, keys: list[str], what: str) -> None:
        """Raises RuleBroken; the store of the default group tells who else of the world is stuck, and where."""
        everyone, rank = StrictGroup.everyone, dist.get_rank()
        everyone.set(f"stuck/{rank}", f"Rank {rank} {what}, at\n{_stack()}")
        time.sleep(LAST_S)
        missing = [key for key in keys if not self.store.check([key])]
        stuck = [f"stuck/{rank}" for rank in range(dist.get_world_size())]
        told = "\n".join(everyone.get(key).decode() for key in stuck if everyone.check([key]))
        raise RuleBroken(f"nobody came in {self.limit} ({', '.join(missing)}).\n{told}")


class Exchange:
    """The work of a send or a receive."""

    def __init__(self, inner: Any, met: Callable[[], None]) -> None:
        self.inner, self.met = inner, met

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Waits for the other end to be issued and then for gloo."""
        self.met()
        return bool(self.inner.wait())


def _told(tensors: Any) -> str:
    found = [each for each in tree_leaves(tensors) if isinstance(each, torch.Tensor)]
    return " + ".join(f"{each.numel()} {str(each.dtype).removeprefix('torch.')}" for each in found) or "nothing"


def _stack() -> str:
    frame: Any = sys._getframe(1)
    lines: list[str] = []
    while frame is not None and len(lines) < FRAMES:
        name = frame.f_code.co_filename
        if not any(part in name for part in LEFT_OUT):
            lines.append(f"    {name}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return "\n".join(lines)


def _make(store: Store, rank: int, size: int, timeout: timedelta) -> StrictGroup:
    if not dist.is_initialized():
        StrictGroup.limit, StrictGroup.everyone = timeout, store
    return StrictGroup(store, rank, size, StrictGroup.limit)


if "strict" not in dist.Backend.backend_list:
    dist.Backend.register_backend("strict", _make, devices=["cpu"])
