"""The places where offloaded tensors live, declared as they are made: on a CPU machine host and device are the same memory, so no
tensor's device tells them apart, and what counts bytes (orchestrator/planner/trace/live_bytes.py) asks here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_place: list[str] = []
PLACED = "placed: "
"""Before the name of the place, in a profile."""


@contextmanager
def placed(place: str) -> Iterator[None]:
    """Tensors made inside are of this place: `host` or `nvme`. A profile shows it too."""
    _place.append(place)
    try:
        with torch.profiler.record_function(PLACED + place):
            yield
    finally:
        _place.pop()


def place() -> str | None:
    """Return where a tensor that is being made will live; None: on the device."""
    return _place[-1] if _place else None


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Unfilled host memory; pinned where the device copies faster and asynchronously from it."""
    with placed("host"):
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")
