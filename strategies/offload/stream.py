"""Whole parameters that live on the host, or in a file, and come to the device where they are at work.

A unit is a block; what stands outside the blocks is one more, and stays from its forward to the end of its backward pass
(under a pipeline, where other passes come between, it goes after each). A block comes while the one before it computes: two are
there at once. Like FSDP2, this resizes a parameter's storage and leaves the tensor, which autograd has saved, as it is. The
CUDA path (a stream of its own) has been run on no GPU yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from strategies.engines.engine import Build
from strategies.offload import host
from strategies.offload.chains import chains
from strategies.offload.files import ScratchFile, padded


class Unit:
    """Parameters that come and go together."""

    def __init__(self, parameters: list[nn.Parameter], homes: dict[nn.Parameter, Tensor], streams: Streams) -> None:
        self.parameters, self.homes, self.streams = parameters, homes, streams
        self.frozen = not all(parameter.requires_grad for parameter in parameters)
        self.here = False
        self.arrived: Any = None
        """CUDA event."""
        self.awaited = 0
        """Gradients that this backward pass has still to bring."""

    def ahead(self) -> None:
        """Begins to bring the unit."""
        if self.here:
            return
        self.here, side = True, self.streams.side
        for parameter in self.parameters:
            parameter.untyped_storage().resize_(parameter.numel() * parameter.itemsize)
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        with (
            torch.no_grad(),
            torch.cuda.stream(side),
            _unsafe_preserve_version_counter(tuple(self.parameters)),
        ):
            for parameter in self.parameters:
                parameter.copy_(self.homes[parameter], non_blocking=True)
        if side is not None:
            self.arrived = side.record_event()

    def fetch(self, following: Unit | None = None) -> None:
        """Brings the unit, and begins with the one that is used next."""
        self.ahead()
        if self.arrived is not None:
            torch.cuda.current_stream().wait_event(self.arrived)
            self.arrived = None
        if following is not None:
            following.ahead()

    def read_ahead(self) -> None:
        if self.streams.file is not None:
            for parameter in self.parameters:
                self.streams.file.read_ahead(self.homes[parameter])

    def release(self) -> None:
        if self.arrived is not None:  # what is still on its way must not write into freed memory
            torch.cuda.current_stream().wait_event(self.arrived)
            self.arrived = None
        self.here = False
        for parameter in self.parameters:
            parameter.untyped_storage().resize_(0)

    def expect(self) -> None:
        """A backward pass begins to use the unit."""
        self.awaited = sum(parameter.requires_grad for parameter in self.parameters)

    def came(self, parameter: Tensor) -> None:
        """A gradient arrived; behind the last one nothing of this backward pass reads the unit, unless some of it is frozen:
        then the pass through the block before lets it go."""
        self.awaited -= 1
        if self.awaited == 0 and not self.frozen:
            self.release()


class Streams:
    """The homes of a module's parameters, and the hooks that bring them."""

    def __init__(self, build: Build, *, to_file: bool) -> None:
        module: Any = build.module
        everything = list(module.parameters())
        self.pipelined = build.strategy.degrees.pipeline > 1
        self.side = torch.cuda.Stream() if build.device.type == "cuda" else None
        self.file = ScratchFile(sum(padded(p.numel() * p.itemsize) for p in everything)) if to_file else None
        self.homes = {p: self._home(p, build) for p in everything}
        inside = {parameter for block in module.blocks for parameter in block.parameters()}
        self.root = Unit([p for p in everything if p not in inside], self.homes, self)
        self.units = [self.root]
        for chain in chains(build):
            units = [Unit(list(block.parameters()), self.homes, self) for block in chain]
            self.units += units
            for block, before, unit, after in zip(chain, [None, *units], units, [*units[1:], None], strict=False):
                self._hook_block(block, unit, before, after)
        self._hook_root(module)
        for unit in self.units:
            unit.release()
            for parameter in unit.parameters:
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(unit.came)

    def _home(self, parameter: nn.Parameter, build: Build) -> Tensor:
        if self.file is not None:
            return self.file.tensor(parameter.shape, parameter.dtype)
        return host.empty(parameter.shape, parameter.dtype, build.device)

    def _hook_block(self, block: nn.Module, unit: Unit, before: Unit | None, after: Unit | None) -> None:
        def forward(*_: Any) -> None:
            unit.fetch(after)

        def back(_: Tensor) -> None:
            if after is not None:  # its backward pass is over, even where gradients of its weights are still to come
                after.release()
            unit.expect()
            unit.fetch(before)

        def forwarded(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(back)
            unit.release()

        block.register_forward_pre_hook(forward)
        block.register_forward_hook(forwarded)

    def _hook_root(self, module: nn.Module) -> None:
        root = self.root

        def used(given: Any) -> bool:
            """Parts that this pass uses: a stage in the middle has none."""
            return not self.pipelined or given[1].embedding or given[1].head

        def forward(_: nn.Module, given: Any) -> None:
            if used(given):
                root.fetch()
            if not self.pipelined:
                self.units[1].read_ahead()

        def back(_: Tensor) -> None:
            root.expect()
            root.fetch()

        def forwarded(_: nn.Module, given: Any, output: Tensor) -> None:
            if output.requires_grad and used(given):
                output.register_hook(back)
            if self.pipelined or not output.requires_grad:
                root.release()

        module.register_forward_pre_hook(forward)
        module.register_forward_hook(forwarded)

    def settle(self) -> None:
        """Between two passes: nothing is at work. A unit of which a pass uses but a part does not see its end by itself."""
        for unit in self.units:
            if unit.here:
                unit.release()

    def tensors(self) -> dict[str, list[Tensor]]:
        return {"nvme" if self.file is not None else "host": list(self.homes.values())}

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def homes(to_file: bool) -> Callable[[Build], Streams]:
    """Return what ZeRO 0 and 1 ask where parameters live."""
    return lambda build: Streams(build, to_file=to_file)
