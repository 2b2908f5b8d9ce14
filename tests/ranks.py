"""Several processes in a test, forked from one that has torch imported: a rank costs its work, not its imports."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

PRELOAD = ["orchestrator.training.worker", "tests.unit.test_checkpoint", "tests.unit.test_training"]


def spawn(function: Callable[..., None], *arguments: Any, world_size: int) -> None:
    """function(rank, *arguments) on each rank; raises what the first that fails raised."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    mp.start_processes(function, args=arguments, nprocs=world_size, start_method="forkserver")
