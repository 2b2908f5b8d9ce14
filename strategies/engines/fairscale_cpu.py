"""The parts that fairscale 0.4.13 needs to run without a GPU: it takes CUDA's streams for granted.

Patches this process's torch.cuda and Tensor, so it is installed only in a worker that runs fairscale on a CPU."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from strategies.engines.installed import engine_module


class _Stream:
    def wait_stream(self, _: Any) -> None:
        """All work is done in order on a CPU."""

    def synchronize(self) -> None:
        """Wait for nothing: a CPU has no streams."""


def install() -> None:
    """Once a process."""
    torch_cuda: Any = torch.cuda
    if isinstance(torch_cuda.current_stream, _Current):
        return
    # gloo refuses the two-dimensional input that fairscale gives NCCL's fused reduce-scatter.
    engine_module("fairscale", "fairscale.internal.reduce_scatter_bucketer").enable_nccl_base_collectives = False
    current = _Current()
    torch_cuda.current_stream = current
    torch_cuda.stream = lambda _: contextlib.nullcontext()
    torch_cuda.synchronize = lambda *_, **__: None
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda self, _: None
    # Host memory is the device's here: offloading runs its code and moves nothing.
    tensor.pin_memory = tensor.cuda = lambda self, *_, **__: self
    fsdp: Any = engine_module("fairscale", "fairscale.nn").FullyShardedDataParallel
    set_up = fsdp._setup_streams

    def with_streams(self: Any) -> None:
        if self._is_root and not self._streams:
            set_up(self)
            self._streams.update(dict.fromkeys(("fp32_to_fp16", "all_gather", "post_backward"), current()))

    fsdp._setup_streams = with_streams


class _Current:
    def __init__(self) -> None:
        self.stream = _Stream()

    def __call__(self, *_: Any, **__: Any) -> _Stream:
        return self.stream
