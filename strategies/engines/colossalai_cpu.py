"""The parts that ColossalAI 0.5.0 needs to run without a GPU: an accelerator that answers for CUDA's streams, and the gates
that ask for its name. Installed only in a worker that runs ColossalAI on a CPU; no file of the package is changed."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import torch

from strategies.engines.installed import engine_module


def install() -> None:
    """Once a process."""
    api = engine_module("colossalai", "colossalai.accelerator")
    if not getattr(api.get_accelerator(), "stands_in", False):
        api.set_accelerator(_accelerator(api.CpuAccelerator))
        _two_tiers(api.get_accelerator())
        _pipeline()


class _Stream(torch.cpu.Stream):
    def synchronize(self) -> None:
        """All work is done in order on a CPU."""


def _accelerator(base: Any) -> Any:
    class Accelerator(base):  # type: ignore[misc]
        """A CPU under the name that LowLevelZeroOptimizer and Gemini let pass."""

        stands_in = True

        def __init__(self) -> None:
            super().__init__()
            self._name = "cuda"

        def device_count(self) -> int:
            return 1

        def Stream(self, *_: Any, **__: Any) -> _Stream:
            return _Stream()

        def current_stream(self, device: Any = None) -> Any:
            return torch.cpu.current_stream()

        def stream(self, _: Any) -> Any:
            return contextlib.nullcontext()

        def synchronize(self, device: Any = None) -> None:
            """Wait for nothing, as a stream of a CPU does."""

        def current_device(self) -> torch.device:
            return torch.device("cpu")

        def get_rng_state(self, device: Any = None) -> torch.Tensor:
            return torch.get_rng_state()

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

    return Accelerator()


class _Device:
    """A device that Gemini takes for a GPU: it tells its two tiers of memory apart by the device's type."""

    type, index = "cuda", 0

    def __eq__(self, _: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


def _two_tiers(accelerator: Any) -> None:
    """cpu:0 is Gemini's device, cpu its host: chunks move between them as between a GPU and its host, and their bytes are
    counted apart. Tensors do not keep the index."""
    accelerator.get_current_device = lambda: torch.device("cpu", 0)
    chunk: Any = engine_module("colossalai", "colossalai.zero.gemini.chunk.chunk").Chunk
    manager: Any = engine_module("colossalai", "colossalai.zero.gemini.chunk.manager").ChunkManager
    made, shard_move, move_chunk = chunk.__init__, chunk.shard_move, manager.move_chunk

    def tier(device: Any) -> Any:
        return _Device() if device.index == 0 else device

    def make(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        self.shard_device = tier(self.shard_device)

    def move(self: Any, one: Any, device: Any, *args: Any, **options: Any) -> None:
        move_chunk(self, one, tier(device), *args, **options)

    chunk.__init__ = make
    chunk.shard_move = lambda self, device, *args, **options: shard_move(self, tier(device), *args, **options)
    manager.move_chunk = move


def _pipeline() -> None:
    """OPT's pipeline sets CUDA's device, and a torch without NCCL does not know the name that messages ask for."""
    modeling: Any = engine_module("colossalai", "colossalai.shardformer.modeling.opt")
    stand_in = types.ModuleType("torch")
    stand_in.__dict__.update(torch.__dict__)
    stand_in.cuda = types.SimpleNamespace(set_device=lambda _: None)  # type: ignore[attr-defined]
    modeling.torch = stand_in
    distributed: Any = torch.distributed
    if not hasattr(distributed, "is_hccl_available"):
        distributed.is_hccl_available = lambda: False
