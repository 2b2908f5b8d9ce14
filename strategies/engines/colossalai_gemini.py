"""ZeRO 3 on ColossalAI: Gemini with static placement. Parameters stand in chunks, each rank holds a piece of each chunk, in 16
bits and as fp32 masters; the gradients take the 16-bit chunks' place, or chunks of their own where micro batches add up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from strategies.engines.colossalai_boosted import Boosted, Stepped
from strategies.engines.engine import Build
from strategies.engines.held import Place
from strategies.engines.installed import engine_module
from strategies.zero.states import Shard, Weights

CHUNKS = 8
"""Into so many a small model is cut. Gemini's own least chunk, 32 Mi elements, keeps a model below it whole on every rank."""
LARGEST_M = 32.0
"""Gemini's own least chunk and search range, in 2**20 elements."""


class Gemini(Boosted):
    """See Boosted."""

    def __init__(self, build: Build, weights: Weights) -> None:
        self.several = build.strategy.gradient_accumulation_steps > 1
        self.spent = False
        """Gradients stand where the parameters stood."""
        self.places: dict[str, Place] = {}
        self.chunks: dict[str, tuple[Any, int, int]] = {}
        """Place of each parameter: the chunk, and the range of this rank's piece of it."""
        super().__init__(build, weights)

    def _plugin(self) -> Any:
        offload = self.build.strategy.offload
        size_m = sum(shape.numel() for shape in self.shapes.values()) / CHUNKS / 2**20
        # Gemini knows its own three Adams by name; the session's is told to it.
        engine_module("colossalai", "colossalai.zero.gemini.gemini_optimizer")._AVAIL_OPTIM_LIST.add(Stepped)
        return engine_module("colossalai", "colossalai.booster.plugin").GeminiPlugin(
            precision=self.build.precision,
            placement_policy="static",
            shard_param_frac=1.0,
            offload_optim_frac=1.0 if offload.optimizer == "host" else 0.0,
            offload_param_frac=1.0 if offload.parameters == "host" else 0.0,
            enable_gradient_accumulation=self.several,
            min_chunk_size_m=min(LARGEST_M, size_m),
            search_range_m=min(LARGEST_M, size_m),
            hidden_dim=self.build.module.hidden_size,
            # The session scales the loss: Gemini's scaler stands at 1.
            initial_scale=1.0,
            min_scale=1.0,
            max_scale=1.0,
            max_norm=0.0,
            # Both want a GPU, and have not been tried.
            pin_memory=False,
            enable_async_reduce=False,
        )

    def _shard(self, stepped: Tensor) -> Shard:
        optimizer = self.optimizer
        number = next(i for i, fake in optimizer.id_to_fake_params.items() if fake is stepped)
        parameter = optimizer.id_to_real_params[number]
        chunk = optimizer.param_to_chunk16[stepped]
        begin, end = optimizer.param_to_range[stepped]
        start = chunk.shard_begin + begin - chunk.tensors_info[parameter].offset
        name = self.names[parameter]
        self.places[name] = Place(start=start, stop=start + end - begin)
        self.chunks[name] = chunk, begin, end
        return self.adam.shard(name, self.shapes[name], chunk.paired_chunk.payload[begin:end], apart=False)

    def place(self, shard: Shard) -> Place:
        return self.places[shard.name]

    def begin(self) -> None:
        super().begin()
        if self.spent:  # the last step's gradients were not used: an overflow
            self._publish()
            self.optimizer.module.chunk_manager.accumulating_grads = False

    def _once_a_step(self) -> bool:
        return False

    def gradients(self) -> dict[str, Tensor]:
        self.spent = True
        return {
            name: (chunk.grad_chunk if self.several else chunk).payload[begin:end]
            for name, (chunk, begin, end) in self.chunks.items()
        }

    def update(self, *, scale: float, learning_rate: float) -> None:
        super().update(scale=scale, learning_rate=learning_rate)
        self.spent = False

    @torch.no_grad()
    def loaded(self, step: int) -> None:
        self.adam.num_steps.fill_(step)
        self._publish()

    def _publish(self) -> None:
        """16-bit chunks from their masters, as GeminiOptimizer.step does at its end."""
        manager = self.optimizer.module.chunk_manager
        for chunk in self.optimizer.chunk16_set:
            if chunk.paired_chunk.device_type == "cpu":  # it comes back from there at its next use
                manager.move_chunk(chunk, torch.device("cpu"))
            chunk.optim_update()
        self.spent = False

    def tensors(self) -> dict[str, list[Tensor]]:
        """See engine.Session."""
        chunks = list(self.optimizer.chunk16_set)
        gradients = [chunk.grad_chunk.payload for chunk in chunks if chunk.grad_chunk is not None]
        return {
            **super().tensors(),
            "parameters": [chunk.payload for chunk in chunks],
            "gradients": gradients,
            "master_weights": [chunk.paired_chunk.payload for chunk in chunks],
        }
