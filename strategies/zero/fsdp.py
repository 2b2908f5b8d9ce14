"""ZeRO 2 and 3 on torch's FSDP2: fp32 shards of parameters, gradients and moments; 16-bit copies where they are used.

A unit is a block; what stands outside the blocks is one more. apply.py says what bytes that holds.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from strategies.engines.engine import Build
from strategies.offload.host import placed
from strategies.pipeline.in_flight import splits
from strategies.strategy import Stage
from strategies.zero.states import DTYPES, Adam, Weights, make_adam, rows


class FsdpStates:
    """States of ZeRO 2 and 3 on one rank."""

    share = 1.0

    def __init__(self, build: Build, weights: Weights) -> None:
        strategy = build.strategy
        self.build, self.device = build, build.device
        self.pipelined = strategy.degrees.pipeline > 1
        self.splits = splits(strategy)
        self.num_held = len(build.requests.held)
        self.by_weight: dict[nn.Parameter, Any] = {}
        self.num_replicas = build.requests.num_replicas
        num_shards, rank = build.requests.num_shards, build.requests.shard_rank
        self.gather_per_step, self.reduce_per_step = strategy.gather == "per_step", strategy.reduce == "per_step"
        with unset_fake_temporarily():  # on the meta device, whether or not a trace plays what follows
            _shard(build, keeps=strategy.zero_stage == 2 or self.gather_per_step)
        if self.pipelined:
            _fetch_by_stage(build)
        self.on_host = build.requests.fsdp_offload is not None
        self.root = cast("Any", build.module)
        self.units = [unit for unit in build.module.modules() if isinstance(unit, FSDPModule)]
        policy = build.requests.fsdp_offload
        home = build.device if policy is None else torch.device("cpu")
        with self._at_home():
            build.module.to_empty(device=home)
        every: dict[str, Any] = dict(build.module.named_parameters())
        with torch.no_grad():
            for name, parameter in every.items():
                first = weights(name, parameter.shape)
                sharded = isinstance(parameter, DTensor)
                _local(parameter).copy_(rows(first, num_shards, rank) if sharded else first)
        self.parameters: dict[str, Any] = {name: p for name, p in every.items() if p.requires_grad}
        # Uneven shards move into padded storage at the first use; the optimizer must hold what is there afterwards.
        with self._at_home():
            self.root._get_fsdp_state()._lazy_init()
        self.locals: list[Tensor] = [parameter.to_local().detach() for parameter in self.parameters.values()]
        self.frozen = [_local(p).detach() for p in build.module.parameters() if not p.requires_grad]
        """This rank's part of what is not trained: whole at stage 2, rows at stage 3."""
        self.adam: Adam = make_adam(build, home, self.locals[0].dtype)
        with self._at_home():
            self.shards = [
                self.adam.shard(name, parameter.shape, local, apart=False)
                for (name, parameter), local in zip(self.parameters.items(), self.locals, strict=True)
            ]

    def _at_home(self) -> AbstractContextManager[None]:
        """Shards are made where they live."""
        return placed("host") if self.on_host else nullcontext()

    def begin(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def micro_batch(self, *, last: bool) -> None:
        """Each micro batch scatters into the group's shards; replicas of a shard add theirs once a step."""
        self.root.set_requires_gradient_sync(last or not self.reduce_per_step)
        self.root.set_requires_all_reduce(last)
        self.root.set_reshard_after_backward(last or not self.gather_per_step)
        self.root.set_is_last_backward(last)

    def backward(self, stage: Stage, *, last: bool, done: bool) -> None:
        """The stage's units scatter as they go. Of a split backward the blocks' weights come later, see `deferred`."""
        self.root.set_requires_gradient_sync(False)
        self.root.set_is_last_backward(False)
        self._let_go_after(stage)
        if self.reduce_per_step:
            return
        blocks = self.root.blocks._modules
        units = [blocks[str(stage.first_layer + i)] for i in range(stage.num_layers)] if not self.splits else []
        # What replicas add up at the end must be the same parameters each time: not the embedding here, the head there.
        if (stage.embedding or stage.head) and (self.num_replicas == 1 or self.num_held == 1):
            units.append(self.root)
        for unit in units:
            unit.set_requires_gradient_sync(True, recurse=False)
            unit.set_requires_all_reduce(done, recurse=False)

    def _let_go_after(self, stage: Stage) -> None:
        """FSDP2 lets go all it has gathered when any backward pass ends; another stage of this rank would gather its own
        again. Kept blocks (stage 2) go with their stage, embedding and head with the rank's first, the last to need them."""
        self.root.set_reshard_after_backward(not self.gather_per_step)
        if self.gather_per_step:
            return
        first = min(held.stage for held in self.build.requests.held)
        self.root.set_reshard_after_backward(stage.stage == first, recurse=False)
        if self.build.strategy.zero_stage == 2:
            mine = range(stage.first_layer, stage.first_layer + stage.num_layers)
            for name, block in self.root.blocks.named_children():
                block.set_reshard_after_backward(int(name) in mine)

    def deferred(self, weight: nn.Parameter, following: nn.Parameter | None, *, done: bool) -> None:
        """A block's weights are through when the next one's come."""
        unit = self._unit_of(weight)
        if following is not None and self._unit_of(following) is unit:
            return
        if self.reduce_per_step:
            _widen(unit)
        else:
            unit.set_requires_gradient_sync(True, recurse=False)
            unit.set_requires_all_reduce(done, recurse=False)
            unit.set_reshard_after_backward(False, recurse=False)  # the next micro batch may be between its two passes
            _scatter(unit, whole=True)

    def _unit_of(self, weight: nn.Parameter) -> Any:
        """Return the unit of a gathered parameter, which FSDP2 keeps as an object from its first gather on."""
        if not self.by_weight:
            for unit in self.units:
                self.by_weight |= {each.unsharded_param: unit for group in _groups(unit) for each in group.fsdp_params}
        return self.by_weight[weight]

    def reduce(self) -> None:
        """FSDP2 reduced while backward ran, but under a pipeline it is told here what is left, as torch's own pipeline stages
        tell it."""
        if self.pipelined:
            self.root.set_requires_gradient_sync(True)
            self.root.set_requires_all_reduce(True)
            self.root.set_reshard_after_backward(True)
            self.root.set_is_last_backward(True)
            for unit in self.units:
                _scatter(unit)
            self.root._get_fsdp_state()._root_post_backward_final_callback()
        if self.share != 1.0:  # sums in fp32, which have room
            with torch.no_grad():
                torch._foreach_mul_(
                    [p.grad.to_local() for p in self.parameters.values() if p.grad is not None], self.share
                )

    def gradients(self) -> dict[str, Tensor]:
        result = {}
        for (name, parameter), local in zip(self.parameters.items(), self.locals, strict=True):
            gradient = parameter.grad
            result[name] = torch.zeros_like(local) if gradient is None else gradient.to_local()
        return result

    @torch.no_grad()
    def update(self, *, scale: float, learning_rate: float) -> None:
        gradients = list(self.gradients().values())
        self.adam.advance()
        self.adam.step(self.shards, gradients, self._targets(), scale=scale, learning_rate=learning_rate)
        self.begin()

    def _targets(self) -> list[Tensor]:
        return [local if s.apart else s.master for local, s in zip(self.locals, self.shards, strict=True)]

    def settle(self) -> None:
        """Lets go what a forward pass gathered for a backward pass that does not come."""
        for unit in self.units:
            unit.reshard()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for shard in self.shards:
            state |= shard.whole(self.build)
        return state

    def loaded(self, step: int) -> None:
        self.adam.loaded(step, self.shards, self._targets())
        self.settle()

    def tensors(self) -> dict[str, list[Tensor]]:
        kept = {
            "parameters": [*self.locals, *self.frozen],
            "gradients": [p.grad.to_local() for p in self.parameters.values() if p.grad is not None],
            **self.adam.tensors(self.shards),
        }
        if not self.on_host:
            return kept
        # The shards and what steps them are on the host.
        moved = [*kept["parameters"], *kept["master_weights"], *kept["optimizer_states"]]
        return {"gradients": kept["gradients"], "host": moved + kept.get("host", []), "nvme": kept.get("nvme", [])}

    def close(self) -> None:
        self.adam.close()


def _groups(unit: Any) -> list[Any]:
    return list(unit._get_fsdp_state()._fsdp_param_groups)


def _widen(unit: Any) -> None:
    """A unit's unsharded gradients to the reduction's dtype, added to what has been."""
    for group in _groups(unit):
        for each in group.fsdp_params:
            if hasattr(each, "_unsharded_param"):
                each.accumulate_unsharded_grad_if_needed()
                each.to_accumulated_grad_if_needed()


def _scatter(unit: Any, *, whole: bool = False) -> None:
    """A unit's unsharded gradients into its shards. Of a split backward some have been widened to the reduction's dtype and
    others just come: FSDP2 wants them alike. whole: zeros where none came, so that it is the same message each time."""
    _widen(unit)
    for group in _groups(unit):
        for each in group.fsdp_params:
            if not hasattr(each, "_unsharded_param"):
                continue
            parameter = each.unsharded_param
            if not parameter.requires_grad:
                continue
            if whole and each.unsharded_accumulated_grad is None and parameter.grad is None:
                each.unsharded_accumulated_grad = torch.zeros_like(parameter, dtype=each.reduce_dtype)
        group.post_backward()


def _shard(build: Build, *, keeps: bool) -> None:
    """fully_shard on each block, then on the rest. keeps: from forward to backward nothing is let go."""
    low = DTYPES[build.precision] if build.precision in ("bf16", "fp16") else None
    build.module.to(torch.float64 if build.precision == "fp64" else torch.float32)
    if low is not None:
        _narrow_frozen(build.module, low)
    # Stage 2 shards no parameters, and those that are not trained have nothing else.
    ignored = {p for p in build.module.parameters() if not p.requires_grad} if build.strategy.zero_stage == 2 else None
    options: dict[str, Any] = {
        "mesh": build.mesh.data,
        **({"offload_policy": build.requests.fsdp_offload} if build.requests.fsdp_offload else {}),
        **({"ignored_params": ignored} if ignored else {}),
        "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None),
    }
    blocks: Any = build.module.blocks
    for block in blocks:
        fully_shard(block, reshard_after_forward=not keeps, **options)
    # The root holds embedding and head, which backward needs first: gathered again at once, so never let go.
    fully_shard(build.module, reshard_after_forward=False, **options)
    for unit in build.module.modules():
        if isinstance(unit, FSDPModule):
            # Gradients are sums: the loss is already divided by the tokens of the whole global batch.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)


def _narrow_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters, on the meta device, in the precision in which they are used: no step needs more digits."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                known = made.setdefault(parameter, nn.Parameter(parameter.to(dtype), requires_grad=False))
                setattr(part, name, known)


def _local(parameter: Any) -> Tensor:
    """What this rank holds of a parameter."""
    local: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local


def _fetch_by_stage(build: Build) -> None:
    """Fetch units stage by stage: in backward FSDP2 fetches the unit that ran before this one in forward, which under a
    pipeline may be one of another stage that nobody needs next. Told: a block fetches the block before it in its stage; naming
    itself, nothing."""
    root: Any = build.module
    root.set_modules_to_backward_prefetch([root])
    for stage in build.requests.held:
        before = None
        for index in range(stage.first_layer, stage.first_layer + stage.num_layers):
            block = root.blocks._modules[str(index)]
            block.set_modules_to_backward_prefetch([before or block])
            before = block
