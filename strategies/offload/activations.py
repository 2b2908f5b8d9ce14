"""Activations of a block on the host between its forward and its backward pass.

What autograd saves inside a block (with checkpointing its input alone) is copied to the host, storage by storage, and comes
back as a whole while the block behind it goes backward: two blocks' are on the device at once. Under a pipeline several micro
batches wait on the host, each block's of each apart. The CUDA path (a stream of its own) has been run on no GPU yet."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from strategies.engines.engine import Build
from strategies.offload import host
from strategies.offload.chains import chains


class Moved:
    """One storage, of which a copy is on the host."""

    def __init__(self, tensor: Tensor, side: Any) -> None:
        storage = tensor.untyped_storage()
        self.source, self.side, self.device = weakref.ref(storage), side, tensor.device
        whole = tensor.detach().as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0)
        self.copy = host.empty(whole.shape, whole.dtype, tensor.device)
        self._move(whole, self.copy)
        self.back: Tensor | None = None

    def _move(self, source: Tensor, target: Tensor) -> None:
        if self.side is None:
            target.copy_(source)
            return
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            target.copy_(source, non_blocking=True)
        for tensor in (source, target):
            if tensor.is_cuda:
                tensor.record_stream(self.side)

    def ahead(self) -> None:
        """Begins to bring it back."""
        if self.back is None:
            self.back = torch.empty(self.copy.shape, dtype=self.copy.dtype, device=self.device)
            self._move(self.copy, self.back)

    def fetch(self) -> Tensor:
        self.ahead()
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)
        assert self.back is not None
        return self.back


class Away:
    """A block's forward, whose saved tensors leave the device."""

    def __init__(self, forward: Callable[..., Any], side: Any, before: Away | None) -> None:
        self.forward, self.side, self.before = forward, side, before
        self.latest: list[weakref.ref[Moved]] = []
        """Tensors that moved in the latest forward pass. Only autograd keeps it alive."""

    def __call__(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args)
        moved: list[Moved] = []
        latest: dict[int, Moved] = {}

        def pack(tensor: Tensor) -> Any:
            if isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
                return tensor
            key = tensor.untyped_storage()._cdata
            known = latest.get(key)
            if known is None or known.source() is None or known.copy.dtype != tensor.dtype:
                known = latest[key] = Moved(tensor, self.side)
                moved.append(known)
            return known, tensor.shape, tensor.stride(), tensor.storage_offset()

        with saved_tensors_hooks(pack, _unpack):
            output = self.forward(*args)
        mine = self.latest = [weakref.ref(each) for each in moved]
        fed_by = self.before.latest if self.before else []  # of the same micro batch: passes do not mix

        def back(_: Tensor) -> None:
            """The gradient of the output is here: this block's come, if they have not yet, and those of the block before."""
            _ahead(mine)
            _ahead(fed_by)

        output.register_hook(back)
        return output


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    moved, shape, stride, offset = packed
    return moved.fetch().as_strided(shape, stride, offset)  # type: ignore[no-any-return]


def _ahead(references: list[weakref.ref[Moved]]) -> None:
    for reference in references:
        moved = reference()
        if moved is not None:
            moved.ahead()


def move(build: Build) -> None:
    """Every block's activations to the host."""
    side = torch.cuda.Stream() if build.device.type == "cuda" else None
    for chain in chains(build):
        before: Away | None = None
        for block in chain:
            block.forward = before = Away(block.forward, side, before)
