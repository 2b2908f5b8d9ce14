"""A pool of processes that form torch process groups of any size up to theirs, one after another: imports are paid once."""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

TIMEOUT_S = 240.0
GRACE_S = 20.0
"""That the others get once a rank has failed."""
PRELOADED = ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "strategies.engines.native"]


class Pool:
    """`with Pool(4) as pool: pool.run(function, argument, world_size=3)` -> what each rank returned.

    function(rank, *arguments) is found by its import name; a world of one has no process group.

    Args:
        backend: of the process groups: gloo, or strict (see nccl_rules.py).
        timeout_s: longest wait for another rank.
    """

    def __init__(self, num_processes: int, *, backend: str = "gloo", timeout_s: float = 1800.0) -> None:
        # The children of a fork server share its imports.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.folder = tempfile.TemporaryDirectory()
        self.num_groups = 0
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, backend, timeout_s), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, world_size: int) -> list[Any]:
        self.num_groups += 1
        store = str(Path(self.folder.name) / f"store-{self.num_groups}")
        for rank, pipe in enumerate(self.pipes[:world_size]):
            pipe.send((function, arguments, rank, world_size, store))
        results: list[Any] = [None] * world_size
        errors, left = [], {pipe: rank for rank, pipe in enumerate(self.pipes[:world_size])}
        while left:
            # A rank that failed often leaves the others waiting for it.
            ready = wait(left, GRACE_S if errors else TIMEOUT_S)
            if not ready:
                silent = ", ".join(map(str, left.values()))
                raise RuntimeError("\n".join([*errors, f"of {world_size} ranks {silent} said nothing more"]))
            for pipe in ready:
                rank = left.pop(pipe)  # type: ignore[call-overload]
                try:
                    results[rank], error = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    error = "its process ended"
                if error is not None:
                    errors.append(f"rank {rank} of {world_size}: {error}")
        if errors:
            raise RuntimeError("\n".join(errors))
        return results

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=1 if error else 30)
            if process.is_alive():
                process.kill()
                process.join()
        self.folder.cleanup()


def _serve(pipe: Connection, backend: str, timeout_s: float) -> None:
    import torch
    import torch.distributed as dist

    if backend == "strict":
        import benchmarks.nccl_rules  # noqa: F401
    torch.set_num_threads(1)
    gc.freeze()  # what the imports left is not looked through after every run
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    while True:
        try:
            function, arguments, rank, world_size, store = pipe.recv()
        except EOFError:
            return
        result, error = None, None
        try:
            if world_size > 1:
                dist.init_process_group(
                    backend,
                    init_method=f"file://{store}",
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=timeout_s),
                )
            result = function(rank, *arguments)
        except BaseException:
            error = traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # a group lives, and its threads poll, as long as anything of its run does
        pipe.send((result, error))
