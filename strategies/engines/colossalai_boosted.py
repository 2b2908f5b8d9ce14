"""ColossalAI's boosters as sessions: plain replicas and LowLevelZero, and what Gemini and HybridParallel share with them."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.engines.collectives import all_gather
from strategies.engines.engine import Build, MicroBatch
from strategies.engines.held import Held, Owned, Place, fill
from strategies.engines.installed import engine_module
from strategies.pipeline.runner import PlainRunner, context_of
from strategies.recompute import apply as recompute
from strategies.zero.states import DTYPES, Adam, Shard, Weights

BUCKETS, LARGEST_BUCKET_M = 16, 12.0
"""A model's gradients are reduced in so many messages at least; LowLevelZeroPlugin's own bucket, 12 Mi elements, holds all of a
small model's, unsharded and copied."""


class BoosterRunner(PlainRunner):
    """One replica's micro batches, whose backward passes ColossalAI drives."""

    states: Boosted

    def _loss(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        logits_BSV = self._logits(batch)
        with torch._C.DisableTorchFunctionSubclass():
            # Gemini's tensors turn mul_ into mul, which the loss's backward would take for done.
            plain_BSV = logits_BSV.as_subclass(Tensor)
        return self.loss(self.build.region, plain_BSV, batch)

    def _logits(self, batch: MicroBatch) -> Tensor:
        ids_BS = batch.input_ids_BS.to(self.build.device)
        logits_BSV: Tensor = self.build.module(ids_BS, *context_of(self.build, batch))
        return logits_BSV

    def _backward(self, loss: Tensor) -> None:
        self.states.booster.backward(loss, self.states.optimizer)


class Stepped(Owned):
    """Takes the factor of its gradients (clipping, loss scale) from the session, whatever its wrapper hands on."""

    factor = 1.0

    def step(self, closure: Any = None, **_: Any) -> None:  # type: ignore[override]
        super().step(scale=self.factor)


class Boosted(Held):
    """Under what the Booster made of the project's module and optimizer."""

    booster: Any
    optimizer: Any
    """ColossalAI's wrapper."""
    owned: Stepped

    def __init__(self, build: Build, weights: Weights) -> None:
        super().__init__(build)
        module = self._module(weights)
        host = torch.device("cpu")
        self.adam = Adam(build.optimizer, host if build.strategy.offload.any else build.device, self.wide)
        self.low = build.precision in ("bf16", "fp16")
        self.waiting: contextlib.ExitStack | None = None
        self.owned = Stepped(list(module.parameters()), make=self._shard, adam=self.adam)
        self.booster = engine_module("colossalai", "colossalai.booster").Booster(plugin=self._plugin())
        self.module, self.optimizer, *_ = self.booster.boost(module, self.owned)
        self.parameters = self._named()
        self.names = {parameter: name for name, parameter in self.parameters.items()}
        self.owned.own()
        self.shards = self.owned.shards
        if self.low:
            self._widen(weights)
        object.__setattr__(build, "module", self.module)

    def _module(self, weights: Weights) -> nn.Module:
        """The filled module that is boosted; sets the shapes of all whole parameters."""
        self.filled = fill(self.build, weights, DTYPES[self.build.precision])
        self.shapes = {name: parameter.shape for name, parameter in self.filled.items()}
        recompute.apply(self.build)
        return self.build.module

    def _named(self) -> dict[str, nn.Parameter]:
        """Return this rank's parameters, boosted."""
        return self.filled

    @abstractmethod
    def _plugin(self) -> Any:
        """ColossalAI's own, for these states."""

    @abstractmethod
    def _shard(self, stepped: Tensor) -> Shard:
        """Return what this rank steps of a parameter that the library hands to the optimizer."""

    @torch.no_grad()
    def _widen(self, weights: Weights) -> None:
        """Master weights begin as the job's, not as those rounded to 16 bits."""
        for shard in self.shards:
            part = self.place(shard).read(weights(shard.name, self.shapes[shard.name]))
            shard.master.view(-1)[: part.numel()].copy_(part)

    def begin(self) -> None:
        self.optimizer.zero_grad()

    def micro_batch(self, *, last: bool) -> None:
        if not self._once_a_step():
            return
        if not last and self.waiting is None:
            self.waiting = contextlib.ExitStack()
            self.waiting.enter_context(self.booster.no_sync(self.module, self.optimizer))
        elif last and self.waiting is not None:
            self.waiting.close()
            self.waiting = None

    def _once_a_step(self) -> bool:
        return True

    def reduce(self) -> None:
        """ColossalAI divided the sum by the ranks."""
        for gradient in self.gradients().values():
            gradient.mul_(self.world_size)

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of this rank's shards, by name."""

    @abstractmethod
    def loaded(self, step: int) -> None:
        """A checkpoint of so many steps was taken in."""

    @torch.no_grad()
    def update(self, *, scale: float, learning_rate: float) -> None:
        """ColossalAI's own clipping is off: the session's norm is one over all parameters."""
        self.owned.factor = scale
        for group in self.owned.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()


class TorchDdp(Boosted):
    """ZeRO 0: torch's DDP, whole states on each rank."""

    def _plugin(self) -> Any:
        self.num_replicas = self.world_size
        plugins = engine_module("colossalai", "colossalai.booster.plugin")
        return plugins.TorchDDPPlugin(broadcast_buffers=False, gradient_as_bucket_view=True)

    def _shard(self, stepped: Tensor) -> Shard:
        return self.adam.shard(self.names[stepped], stepped.shape, stepped.detach(), apart=self.low)  # type: ignore[index]

    def place(self, shard: Shard) -> Place:
        return Place()

    def tells(self, shard: Shard) -> bool:
        return self.rank == 0

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def loaded(self, step: int) -> None:
        self.owned.loaded(step)


class LowLevelZero(Boosted):
    """ZeRO 1 and 2: each rank steps a flat piece of every parameter. In 32 bits the pieces are parts of the parameters, unless
    the optimizer is on the host; else they are a master copy."""

    def _plugin(self) -> Any:
        host = self.build.strategy.offload.optimizer == "host"
        return engine_module("colossalai", "colossalai.booster.plugin").LowLevelZeroPlugin(
            stage=self.build.strategy.zero_stage,
            precision=self.build.precision,
            # The session scales the loss: ColossalAI's scaler stands at 1.
            initial_scale=1.0,
            min_scale=1.0,
            max_scale=1.0,
            max_norm=0.0,
            reduce_bucket_size_in_m=self._bucket_m(),
            overlap_communication=False,  # it wants CUDA's streams, and has not been tried
            master_weights=self.low or host,
            cpu_offload=host,
        )

    def _shard(self, stepped: Tensor) -> Shard:
        working = self.optimizer.master_to_working_param[id(stepped)]
        return self.adam.shard(self.names[working], working.shape, stepped, apart=False)

    def place(self, shard: Shard) -> Place:
        size = -(-shard.shape.numel() // self.world_size)
        return Place(start=self.rank * size, stop=(self.rank + 1) * size)

    def _once_a_step(self) -> bool:
        return self.build.strategy.zero_stage == 1

    def gradients(self) -> dict[str, Tensor]:
        held = ((name, self.optimizer.get_working_grad_by_param_id(id(p))) for name, p in self.parameters.items())
        return {name: gradient for name, gradient in held if gradient is not None}

    @torch.no_grad()
    def loaded(self, step: int) -> None:
        self.adam.num_steps.fill_(step)
        self._publish()

    def _publish(self) -> None:
        """Working parameters from the pieces of all ranks, as LowLevelZeroOptimizer.step does at its end."""
        for shard, master in zip(self.shards, self.owned.owned, strict=True):
            whole = self.parameters[shard.name]
            group = self._publish_group()
            size = dist.get_world_size(group) * master.numel()
            pieces = torch.empty(size, dtype=whole.dtype, device=self.device)
            all_gather(pieces, master.to(self.device, whole.dtype), group=group)
            whole.copy_(pieces[: whole.numel()].view_as(whole))

    def _bucket_m(self) -> float:
        return min(LARGEST_BUCKET_M, sum(shape.numel() for shape in self.shapes.values()) / BUCKETS / 2**20)

    def _publish_group(self) -> Any:
        return None

    def tensors(self) -> dict[str, list[Tensor]]:
        """See engine.Session."""
        held = super().tensors()
        masters = [shard.master for shard in self.shards] if self.low or self.build.strategy.offload.any else []
        waiting = [] if self.build.strategy.zero_stage == 0 else list(self.gradients().values())
        return {**held, "gradients": held["gradients"] + waiting, "master_weights": masters}
