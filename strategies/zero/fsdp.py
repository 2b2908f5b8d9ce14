"""ZeRO 2 and 3 on torch's FSDP2: fp32 shards of parameters, gradients and moments; 16-bit copies where they are used.

Bytes a rank holds (P parameters, n ranks in the ZeRO group; 16-bit training, states sharded_fp32):
  parameters 4P/n, gradients 4P/n (from the end of backward to the next step), moments 8P/n
  gathered   2P from forward to backward at stage 2; at stage 3 two blocks, and what stands outside the blocks all along
  transient  the unsharded gradient of a unit in the reduction dtype while it is scattered; of all with reduce: per_step
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from strategies.engines.engine import Build
from strategies.zero.states import DTYPES, Adam, Weights, squared_norm


class FsdpStates:
    """States of ZeRO 2 and 3 on one rank."""

    def __init__(self, build: Build) -> None:
        strategy = build.strategy
        self.build = build
        if build.mesh is None:
            raise ValueError(f"zero_stage {strategy.zero_stage} needs an initialised process group, a world of one too")
        self.gather_per_step, self.reduce_per_step = strategy.gather == "per_step", strategy.reduce == "per_step"
        low = DTYPES[build.precision] if build.precision in ("bf16", "fp16") else None
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
        build.module.to(torch.float64 if build.precision == "fp64" else torch.float32)
        keeps = strategy.zero_stage == 2 or self.gather_per_step
        options: dict[str, Any] = {"mesh": build.mesh, "mp_policy": policy}
        blocks: Any = build.module.blocks
        for block in blocks:
            fully_shard(block, reshard_after_forward=not keeps, **options)
        # The root holds embedding and head, which backward needs first: gathered again at once, so never let go.
        fully_shard(build.module, reshard_after_forward=False, **options)
        self.root: Any = build.module
        self.units = [unit for unit in build.module.modules() if isinstance(unit, FSDPModule)]
        for unit in self.units:
            # Gradients are sums: the loss is already divided by the tokens of the whole global batch.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        shard = build.mesh["shard"] if "shard" in build.mesh.mesh_dim_names else build.mesh
        self.shard_group, self.num_shards, self.rank = shard.get_group(), shard.size(), shard.get_local_rank()

    def fill(self, weights: Weights) -> None:
        build = self.build
        build.module.to_empty(device=build.device)
        self.parameters: dict[str, Any] = dict(build.module.named_parameters())
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                local = parameter.to_local()
                rows = -(-parameter.shape[0] // self.num_shards)
                whole = weights(name, parameter.shape)
                local.copy_(whole[min(self.rank * rows, len(whole)) : min((self.rank + 1) * rows, len(whole))])
        # Uneven shards move into padded storage at the first use; the optimizer must hold what is there afterwards.
        root_state: Any = FSDPModule._get_fsdp_state(self.root)
        root_state._lazy_init()
        self.locals: dict[str, nn.Parameter] = {
            name: nn.Parameter(parameter.to_local().detach(), requires_grad=False)
            for name, parameter in self.parameters.items()
        }
        steps = [(local, self.parameters[name].dim()) for name, local in self.locals.items() if local.numel()]
        self.adam = Adam(steps, build.optimizer)

    def begin(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def micro_batch(self, *, first: bool, last: bool) -> None:
        self.root.set_requires_gradient_sync(last or not self.reduce_per_step)
        self.root.set_reshard_after_backward(last or not self.gather_per_step)
        self.root.set_is_last_backward(last)

    def reduce(self) -> None:
        """FSDP2 reduced while backward ran."""

    def _gradients(self) -> dict[str, Tensor]:
        grads = {}
        for name, parameter in self.parameters.items():
            if self.locals[name].numel() and parameter.grad is not None:
                grads[name] = parameter.grad.to_local()
        return grads

    def squared_norm(self) -> Tensor:
        total = squared_norm(self._gradients().values())
        dist.all_reduce(total, group=self.shard_group)
        return total

    def update(self, *, scale: Tensor, learning_rate: float) -> None:
        for name, gradient in self._gradients().items():
            self.locals[name].grad = gradient.mul_(scale.to(gradient.dtype))
        self.adam.step(learning_rate)
        for local in self.locals.values():
            local.grad = None

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            local = self.locals[name]
            empty = local.new_zeros(local.shape)
            moments = self.adam.moments(local) if local.numel() else (empty, empty)
            for prefix, tensor in zip(
                ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"), (local.detach(), *moments), strict=True
            ):
                state[f"{prefix}.{name}"] = DTensor.from_local(
                    tensor,
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
        return state

    def loaded(self, step: int) -> None:
        self.adam.set_step(step)

    def tensors(self) -> dict[str, list[Tensor]]:
        return {
            "parameters": list(self.locals.values()),
            "gradients": list(self._gradients().values()),
            "master_weights": [],
            "optimizer_states": [
                moment for local in self.locals.values() if local.numel() for moment in self.adam.moments(local)
            ],
        }
