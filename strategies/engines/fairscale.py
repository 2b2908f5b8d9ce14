"""The fairscale engine: its OSS under torch's DDP (ZeRO 1), OSS with ShardedDataParallel (ZeRO 2), its FSDP (ZeRO 3).

The step (loss, norm, clip, loss scale) is the native session's; here is who holds and reduces what. OSS gives each rank whole
parameters to step, FSDP a flat piece of each. Pipe is one process with threads, OffloadModel wants CUDA by design: left out.
"""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
from torch import Tensor, nn

from strategies.engines.engine import Build, Loss, OptimizerSettings, Requests
from strategies.engines.held import Held, HeldSession, Owned, Place, fill, refuse_unbuilt, refuse_world
from strategies.engines.installed import engine_module
from strategies.engines.loss import TOKEN_LOSS
from strategies.engines.mesh import NAMES, Mesh
from strategies.pipeline.runner import PlainRunner
from strategies.strategy import Strategy
from strategies.tensor.region import WHOLE
from strategies.zero.states import DTYPES, Adam, Shard, Weights


def build_session(
    module: nn.Module,
    *,
    strategy: Strategy,
    precision: str,
    weights: Weights,
    optimizer: OptimizerSettings | None = None,
    device: torch.device | str = "cpu",
    deterministic: bool = False,
    loss: Loss = TOKEN_LOSS,
) -> HeldSession:
    """Build a session as native.build_session does. Raises ValueError, with the field's name, for what fairscale cannot do."""
    _refuse(strategy, precision, deterministic)
    build = Build(
        module=module,
        strategy=strategy,
        precision=precision,
        device=torch.device(device),
        mesh=Mesh(
            sizes=dict.fromkeys(NAMES, 1), ranks=torch.arange(strategy.num_gpus)
        ),  # fairscale keeps its own groups
        region=WHOLE,
        optimizer=optimizer or OptimizerSettings(),
        requests=Requests(runner=PlainRunner),
    )
    engine_module("fairscale", "fairscale")
    if build.device.type == "cpu":
        engine_module("strategies", "strategies.engines.fairscale_cpu").install()
    states = (Fsdp if strategy.zero_stage == 3 else Oss)(build, weights)
    return HeldSession(build, states, loss=loss, owns_group=False)


def _refuse(strategy: Strategy, precision: str, deterministic: bool) -> None:
    refuse_unbuilt(strategy, precision)
    low = precision in ("bf16", "fp16")
    states = ("sharded_fp32" if strategy.zero_stage == 3 else "mixed") if low else "full"
    if strategy.states != states:
        raise ValueError(
            f"states {strategy.states!r} in {precision} at zero_stage {strategy.zero_stage}: fairscale keeps {states}; set that"
        )
    if deterministic:
        raise ValueError(
            "deterministic: fairscale and DDP reduce in the order of arrival; set it to false, or engine: native"
        )
    refuse_world(strategy, f"data_parallel_degree {strategy.data_parallel_degree} wants")


class FairscaleStates(Held):
    """Under a module that fairscale or DDP wrapped."""

    wrapped: Any

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        self.waiting: contextlib.ExitStack | None = None

    def micro_batch(self, *, last: bool) -> None:
        if self.build.strategy.reduce == "per_micro_batch" and isinstance(self, Fsdp):
            return
        if not last and self.waiting is None:
            self.waiting = contextlib.ExitStack()
            self.waiting.enter_context(self.wrapped.no_sync())
        elif last and self.waiting is not None:
            self.waiting.close()
            self.waiting = None


class Oss(FairscaleStates):
    """ZeRO 1 and 2: each rank steps whole parameters, dealt by size, and broadcasts them."""

    def __init__(self, build: Build, weights: Weights) -> None:
        super().__init__(build)
        self.parameters = fill(build, weights, DTYPES[build.precision])
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        names = {parameter: name for name, parameter in self.parameters.items()}
        self.adam = Adam(build.optimizer, build.device, self.wide)
        apart = build.precision in ("bf16", "fp16")

        def make(parameter: nn.Parameter) -> Shard:
            name = names[parameter]
            first = weights(name, parameter.shape) if apart else parameter.detach()
            return self.adam.shard(name, parameter.shape, first, apart=apart)

        _checkpoint(build)
        oss = engine_module("fairscale", "fairscale.optim.oss").OSS
        self.oss: Any = oss(list(self.parameters.values()), optim=Owned, make=make, adam=self.adam)
        self.oss.optim.own()
        if build.strategy.zero_stage == 2:
            sharded = engine_module("fairscale", "fairscale.nn").ShardedDataParallel
            self.wrapped = sharded(build.module, self.oss, broadcast_buffers=False, auto_refresh_trainable=False)
            self.wrapped.refresh_trainable()
        else:
            self.wrapped = nn.parallel.DistributedDataParallel(build.module, gradient_as_bucket_view=True)
        # OSS, and ShardedDataParallel again, move parameters into new buffers: the masters stand where they are now.
        for parameter, shard in zip(self.oss.optim.owned, self.oss.optim.shards, strict=True):
            if not shard.apart:
                object.__setattr__(shard, "master", parameter.detach())
        self.shards = self.oss.optim.shards
        object.__setattr__(build, "module", self.wrapped)

    def begin(self) -> None:
        """Clear the gradients in place: they are views of the buckets, and set to None they would be reduced no more (fairscale
        0.4.13)."""
        self.oss.zero_grad(set_to_none=False)

    def reduce(self) -> None:
        """DDP divided the sum by the ranks."""
        for gradient in self._gradients():
            gradient.mul_(self.world_size)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.oss.optim.owned if parameter.grad is not None]

    def gradients(self) -> dict[str, Tensor]:
        pairs = zip(self.shards, self.oss.optim.owned, strict=True)
        return {shard.name: parameter.grad for shard, parameter in pairs if parameter.grad is not None}

    def update(self, *, scale: float, learning_rate: float) -> None:
        for group in self.oss.param_groups:
            group["lr"] = learning_rate
        self.oss.step(scale=scale)

    def place(self, shard: Shard) -> Place:
        return Place()

    def loaded(self, step: int) -> None:
        self.oss.optim.loaded(step)
        self.oss._broadcast_params()


class Fsdp(FairscaleStates):
    """ZeRO 3: fp32 flat shards of each parameter, not of all together: norms and biases do not decay."""

    def __init__(self, build: Build, weights: Weights) -> None:
        super().__init__(build)
        module: Any = build.module
        self.parameters = fill(build, weights, self.wide)
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        _checkpoint(build)
        fsdp = engine_module("fairscale", "fairscale.nn").FullyShardedDataParallel
        low = build.precision in ("bf16", "fp16")
        options: dict[str, Any] = {
            "flatten_parameters": False,
            "mixed_precision": low,
            "fp32_reduce_scatter": low,
            "compute_dtype": DTYPES[build.precision],
            "compute_device": build.device,
            "bucket_cap_mb": 0,  # its buckets are made whole: 25 MiB and more, whatever the model's size
            "move_params_to_cpu": build.strategy.offload.parameters == "host",
        }
        for index, block in enumerate(module.blocks):
            module.blocks[index] = fsdp(block, **options)
        self.wrapped = fsdp(module, **options)
        self.wrapped._lazy_init()
        # Gradients are sums: the loss is divided by the tokens of the global batch.
        self.wrapped.set_gradient_divide_factors(1.0, 1.0, True)
        self.adam = Adam(build.optimizer, build.device, self.wide)
        self.shards = [
            self.adam.shard(name, self.shapes[name], parameter.detach(), apart=False)
            for name, parameter in self.parameters.items()
        ]
        object.__setattr__(build, "module", self.wrapped)

    def begin(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def reduce(self) -> None:
        """FSDP reduced while backward ran."""

    def _gradients(self) -> list[Tensor]:
        pairs = zip(self.shards, self.parameters.values(), strict=True)
        return [torch.zeros_like(shard.master) if p.grad is None else p.grad for shard, p in pairs]

    def gradients(self) -> dict[str, Tensor]:
        return dict(zip((shard.name for shard in self.shards), self._gradients(), strict=True))

    @torch.no_grad()
    def update(self, *, scale: float, learning_rate: float) -> None:
        self.adam.advance()
        masters = [shard.master for shard in self.shards]
        self.adam.step(self.shards, self._gradients(), masters, scale=scale, learning_rate=learning_rate)
        self.begin()

    def place(self, shard: Shard) -> Place:
        size = -(-shard.shape.numel() // self.world_size)
        return Place(start=self.rank * size, stop=(self.rank + 1) * size)

    def loaded(self, step: int) -> None:
        self.adam.num_steps.fill_(step)


def _checkpoint(build: Build) -> None:
    """fairscale's checkpoint_wrapper around the first blocks, as many as the strategy says."""
    strategy, module = build.strategy, cast("Any", build.module)
    if strategy.activation_checkpointing == "none":
        return
    wrapper = engine_module("fairscale", "fairscale.nn").checkpoint_wrapper
    count = strategy.stages[0].num_checkpointed_layers if strategy.stages else len(module.blocks)
    for index in range(count):
        module.blocks[index] = wrapper(module.blocks[index], offload_to_cpu=strategy.offload.activations == "host")
