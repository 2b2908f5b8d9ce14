"""The fairscale engine: its OSS under torch's DDP (ZeRO 1), OSS with ShardedDataParallel (ZeRO 2), its FSDP (ZeRO 3).

The step (loss, norm, clip, loss scale) is the native session's; here is who holds and reduces what. OSS gives each rank whole
parameters to step, FSDP a flat piece of each. Pipe is one process with threads, OffloadModel wants CUDA by design: left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Split

from strategies.catalog import unbuilt
from strategies.engines.engine import Build, OptimizerSettings
from strategies.engines.installed import engine_module
from strategies.engines.mesh import NAMES, Mesh
from strategies.engines.native import NativeSession
from strategies.pipeline.runner import PlainRunner
from strategies.strategy import Strategy
from strategies.tensor.region import WHOLE
from strategies.zero.states import DTYPES, Adam, Shard, Weights, rows

Entries = tuple[tuple[str, Tensor], ...]


def build_session(
    module: nn.Module,
    *,
    strategy: Strategy,
    precision: str,
    weights: Weights,
    optimizer: OptimizerSettings | None = None,
    device: torch.device | str = "cpu",
    deterministic: bool = False,
    z_loss: float = 0.0,
) -> FairscaleSession:
    """As native.build_session. Raises ValueError, with the field's name, for what fairscale cannot do."""
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
        requests={"runner": PlainRunner, "groups": [], "shared_group": None},
    )
    engine_module("fairscale", "fairscale")
    if build.device.type == "cpu":
        engine_module("strategies", "strategies.engines.fairscale_cpu").install()
    states = (Fsdp if strategy.zero_stage == 3 else Oss)(build, weights)
    return FairscaleSession(build, states, z_loss=z_loss, owns_group=False)


def _refuse(strategy: Strategy, precision: str, deterministic: bool) -> None:
    if limit := unbuilt(strategy):
        value = getattr(strategy, limit.field)
        raise ValueError(f"{limit.field} {value} cannot run: {limit.reason}; set it otherwise, or engine: native")
    if precision == "fp64" and strategy.zero_stage == 3:
        raise ValueError(
            "precision fp64 at zero_stage 3: fairscale's FSDP computes in 16 or 32 bits; set fp32, or zero_stage 1 or 2"
        )
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
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if not dist.is_initialized() or world_size != strategy.num_gpus:
        raise ValueError(
            f"data_parallel_degree {strategy.data_parallel_degree} wants a process group of {strategy.num_gpus}, this one has "
            f"{world_size}; start as many workers as the strategy has GPUs"
        )


class FairscaleSession(NativeSession):
    """See engine.Session. state_dict() copies: a rank's rows of each parameter, whoever steps them in fairscale."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See engine.Session."""
        cast("Held", self.states).take(state)
        super().load_state_dict(state)


class Held:
    """States under a wrapped module; `_view` says which part of the flat whole a rank's shard of a parameter is."""

    wrapped: Any
    adam: Adam
    shards: list[Shard]
    """This rank's, each counted on one rank only."""
    parameters: dict[str, nn.Parameter]
    shapes: dict[str, torch.Size]
    num_replicas = 1

    def __init__(self, build: Build) -> None:
        self.build, self.device = build, build.device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh(build.device.type, (self.world_size,))
        self.wide = torch.float64 if build.precision == "fp64" else torch.float32
        self.waiting: contextlib.ExitStack | None = None

    def _view(self, shard: Shard, whole: Tensor) -> Tensor:
        """The flat part of a whole parameter that the shard holds."""
        raise NotImplementedError

    def micro_batch(self, *, last: bool) -> None:
        if self.build.strategy.reduce == "per_micro_batch" and isinstance(self, Fsdp):
            return
        if not last and self.waiting is None:
            self.waiting = contextlib.ExitStack()
            self.waiting.enter_context(self.wrapped.no_sync())
        elif last and self.waiting is not None:
            self.waiting.close()
            self.waiting = None

    def settle(self) -> None:
        """fairscale lets go of what evaluation gathered by itself."""

    def close(self) -> None:
        """fairscale made no group."""

    def _entry(self, local: Tensor | None, shard: Shard | None, name: str) -> DTensor:
        """One parameter's tensor by rows; collective, one whole tensor at a time."""
        whole = torch.zeros(self.shapes[name], dtype=self.wide, device=self.device)
        if local is not None and shard is not None:
            part = self._view(shard, whole)
            part.copy_(local.reshape(-1)[: part.numel()])
        dist.all_reduce(whole)
        mine = rows(whole, self.world_size, self.rank).clone()
        return DTensor.from_local(
            mine, self.mesh, [Split(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Collective."""
        held = {shard.name: shard for shard in self.shards}
        state: dict[str, Any] = {}
        for name in self.shapes:
            shard = held.get(name)
            for index, kind in enumerate(("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")):
                local = shard.entries()[index][1] if shard else None
                state[f"{kind}.{name}"] = self._entry(local, shard, name)
        return state

    @torch.no_grad()
    def take(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict(); collective, one whole tensor at a time."""
        held = {shard.name: shard for shard in self.shards}
        for name in self.shapes:
            for index, kind in enumerate(("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")):
                whole = state[f"{kind}.{name}"].full_tensor()
                if shard := held.get(name):
                    part = self._view(shard, whole)
                    shard.entries()[index][1].view(-1)[: part.numel()].copy_(part)

    def tensors(self) -> dict[str, list[Tensor]]:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        parameters = [p.detach() for p in self.parameters.values()]
        return {"parameters": parameters, "gradients": gradients, **self.adam.tensors(self.shards)}


class _Owned(torch.optim.Optimizer):
    """What OSS steps on each rank: the project's AdamW over the parameters that OSS gave this rank."""

    def __init__(self, params: Any, *, make: Callable[[nn.Parameter], Shard], adam: Adam) -> None:
        super().__init__(params, {"lr": 0.0})
        self.adam = adam
        self.owned = [parameter for group in self.param_groups for parameter in group["params"]]
        self.shards = [make(parameter) for parameter in self.owned]

    @torch.no_grad()
    def step(self, closure: Any = None, *, scale: float = 1.0) -> None:  # type: ignore[override]
        if not self.owned:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.owned]
        self.adam.advance()
        self.adam.step(
            self.shards, gradients, self._into(), scale=scale, learning_rate=float(self.param_groups[0]["lr"])
        )

    def _into(self) -> list[Tensor]:
        return [p.detach() if shard.apart else shard.master for p, shard in zip(self.owned, self.shards, strict=True)]

    @torch.no_grad()
    def loaded(self, step: int) -> None:
        self.adam.loaded(step, self.shards, self._into())


class Oss(Held):
    """ZeRO 1 and 2: each rank steps whole parameters, dealt by size, and broadcasts them."""

    def __init__(self, build: Build, weights: Weights) -> None:
        super().__init__(build)
        build.module.to(DTYPES[build.precision]).to_empty(device=build.device)
        self.parameters = dict(build.module.named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights(name, parameter.shape))
        names = {parameter: name for name, parameter in self.parameters.items()}
        self.adam = Adam(build.optimizer, build.device, self.wide)
        apart = build.precision in ("bf16", "fp16")

        def make(parameter: nn.Parameter) -> Shard:
            name = names[parameter]
            first = weights(name, parameter.shape) if apart else parameter.detach()
            return self.adam.shard(name, parameter.shape, first, apart=apart)

        _checkpoint(build)
        oss = engine_module("fairscale", "fairscale.optim.oss").OSS
        self.oss: Any = oss(list(self.parameters.values()), optim=_Owned, make=make, adam=self.adam)
        if build.strategy.zero_stage == 2:
            sharded = engine_module("fairscale", "fairscale.nn").ShardedDataParallel
            self.wrapped = sharded(build.module, self.oss, broadcast_buffers=False, auto_refresh_trainable=False)
            self.wrapped.refresh_trainable()
        else:
            self.wrapped = nn.parallel.DistributedDataParallel(build.module)
        # OSS, and ShardedDataParallel again, move parameters into new buffers: the masters stand where they are now.
        for parameter, shard in zip(self.oss.optim.owned, self.oss.optim.shards, strict=True):
            if not shard.apart:
                object.__setattr__(shard, "master", parameter.detach())
        self.shards = self.oss.optim.shards
        object.__setattr__(build, "module", self.wrapped)

    def begin(self) -> None:
        """In place: gradients are views of the buckets, and set to None they would be reduced no more (fairscale 0.4.13)."""
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

    def _view(self, shard: Shard, whole: Tensor) -> Tensor:
        return whole.view(-1)

    def loaded(self, step: int) -> None:
        self.oss.optim.loaded(step)
        self.oss._broadcast_params()


class Fsdp(Held):
    """ZeRO 3: fp32 flat shards of each parameter, not of all together: norms and biases do not decay."""

    def __init__(self, build: Build, weights: Weights) -> None:
        super().__init__(build)
        module: Any = build.module
        module.to(self.wide).to_empty(device=build.device)
        self.parameters = dict(module.named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights(name, parameter.shape))
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

    def _view(self, shard: Shard, whole: Tensor) -> Tensor:
        size = -(-whole.numel() // self.world_size)
        return whole.view(-1)[self.rank * size : (self.rank + 1) * size]

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
