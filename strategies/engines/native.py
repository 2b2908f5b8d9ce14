"""The native engine: torch alone. A session is a fold of the rooms' apply doors over a module, then one step at a time.

B micro batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch._subclasses.fake_tensor import FakeTensor

from strategies.catalog import ENGINES
from strategies.engines import mesh
from strategies.engines.engine import (
    BUCKET_BYTES,
    Build,
    Evaluation,
    Loss,
    MicroBatch,
    OptimizerSettings,
    StepResult,
)
from strategies.engines.loss import TOKEN_LOSS
from strategies.pipeline.runner import Runner
from strategies.rooms import APPLY
from strategies.strategy import Strategy
from strategies.tensor.region import WHOLE
from strategies.zero.states import DTYPES, States, Weights, squared_norm

FIRST_SCALE = 2.0**16
GROWTH_INTERVAL = 2000
"""torch.amp.GradScaler's numbers."""


def share_of(num_tokens: int, num_targets: int) -> float:
    """Return what part of the loss's divisor, the targets of the global batch, waits until gradients are added up, in fp16.

    Divided by all of them at once, the gradient of a token is as small as the batch is large: at 4 M tokens and a scale of
    2**16 that of a logit among 50,272 is five quanta of fp16. So the loss of a micro batch is divided by about its own
    `num_tokens`, and its gradients of weights, which are sums, by the rest: a power of two, so that nothing is rounded."""
    return 2.0 ** -max(0, math.floor(math.log2(num_targets / num_tokens)))


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
    bucket_bytes: int = BUCKET_BYTES,
) -> NativeSession:
    """Splits a module that stands on the meta device and fills it, a parameter at a time.

    Collective over the process group, which has one rank for each GPU of the strategy; a world of one needs none.

    Args:
        module: has .embed, .blocks and .head; module(input_ids_BS) -> logits_BSV. Has no buffers. To be split over ranks
            it also says how: see strategies/tensor/apply.py and strategies/pipeline/apply.py. Where a batch has `inputs`,
            module.context(**inputs) makes what embed and blocks take as a second argument.
        precision: bf16, fp16, fp32 or fp64.
        weights: (name, shape) -> that parameter's first value; every rank is given the same.
        deterministic: no kernel whose sum depends on the order of arrival, in this whole process until close().
        bucket_bytes: see BUCKET_BYTES.

    Raises ValueError, with the field's name, for a strategy that this engine has not built."""
    _refuse_unbuilt(module, strategy, precision)
    # FSDP2 knows no world without a process group.
    owns_group = strategy.zero_stage >= 2 and not dist.is_initialized()
    if owns_group:
        backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        build = Build(
            module=module,
            strategy=strategy,
            precision=precision,
            device=torch.device(device),
            mesh=mesh.lay(strategy, torch.device(device).type),
            region=WHOLE,
            optimizer=optimizer or OptimizerSettings(),
            deterministic=deterministic,
            bucket_bytes=bucket_bytes,
        )
        for door in APPLY:
            build = _door(door)(build)
        for part in module.modules():
            if hasattr(part, "region"):
                cast("Any", part).region = build.region
            if build.sequence is not None and hasattr(part, "sequence"):
                cast("Any", part).sequence = build.sequence
        assert build.requests.make_states is not None, "the ZeRO room chooses who holds the states"
        states: States = build.requests.make_states(build, _parts(build, weights))
    except BaseException:
        if owns_group:
            dist.destroy_process_group()
        raise
    return NativeSession(build, states, loss=loss, owns_group=owns_group)


def _door(name: str) -> Callable[[Build], Build]:
    """Return a room's apply door by its `module:function`."""
    module, function = name.split(":")
    door: Callable[[Build], Build] = getattr(import_module(module), function)
    return door


def _parts(build: Build, weights: Weights) -> Weights:
    """The same first values, cut to what this rank holds."""

    def part(name: str, shape: torch.Size) -> Tensor:
        layout = build.layout.get(name)
        return weights(name, shape) if layout is None else layout.part(weights(name, layout.shape))

    return part


def _refuse_unbuilt(module: nn.Module, strategy: Strategy, precision: str) -> None:
    if precision not in DTYPES:
        raise ValueError(f"precision {precision!r} is unknown; set it to one of {', '.join(DTYPES)}")
    for limit in ENGINES["native"].limits:
        # The ZeRO room says what the states may be, by precision, and the offload room what may leave.
        if limit.field not in ("states", "offload") and limit.applies(strategy):
            raise ValueError(
                f"{limit.field} {getattr(strategy, limit.field)!r} is not built on the native engine: {limit.reason}"
            )
    if buffers := [name for name, _ in module.named_buffers()]:
        raise ValueError(f"the module has buffers ({', '.join(buffers)}); the native engine fills parameters alone")
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size != strategy.num_gpus:
        raise ValueError(
            f"{_degrees(strategy)} wants a process group of {strategy.num_gpus}, "
            f"this one has {world_size}; start as many workers as the strategy has GPUs"
        )


def _degrees(strategy: Strategy) -> str:
    names = tuple(f"{axis}_parallel_degree" for axis in ("data", "tensor", "pipeline", "context"))
    told = [f"{name} {degree}" for name in names if (degree := getattr(strategy, name)) > 1]
    return " x ".join(told) or "data_parallel_degree 1"


class NativeSession:
    """One rank's share of the training, see engine.Session."""

    def __init__(self, build: Build, states: States, *, loss: Loss, owns_group: bool) -> None:
        self.module, self.build, self.states, self.loss = build.module, build, states, loss
        assert build.requests.runner is not None, "a room or an engine chooses who runs the micro batches"
        self.runner: Runner = build.requests.runner(build, states, loss)
        self.distributed, self.owns_group = dist.is_initialized(), owns_group
        self.scale = FIRST_SCALE if build.precision == "fp16" else None
        self.good_steps = 0
        self.num_steps = 0
        self._was_deterministic = torch.are_deterministic_algorithms_enabled()
        if build.deterministic:
            _be_deterministic()

    def step(self, micro_batches: Sequence[MicroBatch], *, num_targets: int, learning_rate: float) -> StepResult:
        """See engine.Session. The device is waited for once, between backward and the optimizer."""
        self.states.begin()
        mine = list(self._mine(micro_batches))
        self.states.share = self._share(mine, num_targets)
        total = self.runner.train(mine, (self.scale or 1.0) / num_targets / self.states.share)
        del mine  # a part of each sequence is a copy of it
        self.states.reduce()
        self._add_parts()
        told, norm = self._totals(total / num_targets)
        loss_value, metrics = told[0], dict(zip(self.loss.names[1:], told[1:], strict=True))
        if not math.isfinite(loss_value):
            raise FloatingPointError(f"the loss is {loss_value}; the weights are those of the step before")
        if not math.isfinite(norm):
            self._overflow(norm)
            return StepResult(loss=loss_value, gradient_norm=norm, skipped=True, metrics=metrics)
        clip = self.build.optimizer.gradient_clip
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        self.states.update(scale=factor / (self.scale or 1.0), learning_rate=learning_rate)
        self.num_steps += 1
        self._grow()
        return StepResult(loss=loss_value, gradient_norm=norm, metrics=metrics)

    def _share(self, micro_batches: Sequence[MicroBatch], num_targets: int) -> float:
        """The same on every rank: the shape of a micro batch is."""
        return 1.0 if self.scale is None else share_of(micro_batches[0].input_ids_BS.numel(), num_targets)

    def _mine(self, micro_batches: Iterable[MicroBatch]) -> Iterable[MicroBatch]:
        """Return what this rank computes of its replica's micro batches."""
        part = self.build.requests.part
        return micro_batches if part is None else map(part, micro_batches)

    @torch.no_grad()
    def _add_parts(self) -> None:
        """Adds up, once a step, the gradients of which another rank holds a part: of replicated parameters over the tensor
        group, of a parameter that two stages share over these two."""
        gradients = self.states.gradients()
        partial = [
            gradients[name] for name, layout in self.build.layout.items() if layout.partial and name in gradients
        ]
        _all_reduce_together(partial, self.build.mesh.group("tensor"), self.build.device)
        shared = [gradients[name] for name in self.build.shared]
        _all_reduce_together(shared, self.build.requests.shared_group, self.build.device)

    @torch.no_grad()
    def _totals(self, told_K: Tensor) -> tuple[list[float], float]:
        """(what the loss tells, gradient norm) over all ranks, in one message: whoever holds a copy tells its part of it."""
        tensor = self.build.mesh.sizes["tensor"]
        by_copies: dict[int, list[Tensor]] = {}
        for name, gradient in self.states.gradients().items():
            layout = self.build.layout.get(name)
            copies = self.states.num_replicas * (2 if name in self.build.shared else 1)
            if layout is not None and layout.dim is None:
                copies *= tensor
            by_copies.setdefault(copies, []).append(gradient)
        square = torch.zeros((), dtype=torch.float64, device=self.build.device)
        for copies, gradients in sorted(by_copies.items()):
            square += squared_norm(gradients, self.build.device) / copies
        sums = torch.cat([told_K / tensor, square[None]])
        if self.distributed:
            dist.all_reduce(sums)
        if isinstance(sums, FakeTensor):  # a trace plays the step on tensors that have no values
            return [1.0] * len(told_K), 1.0
        *told, total = sums.tolist()
        return told, math.sqrt(total) / (self.scale or 1.0) if total >= 0 else math.nan

    def _overflow(self, norm: float) -> None:
        """Half the scale, the same on every rank: the norm is. Without a scaler, or at its end, nothing helps."""
        if self.scale is None or self.scale <= 1.0:
            raise FloatingPointError(f"the gradient norm is {norm}; the weights are those of the step before")
        self.scale, self.good_steps = self.scale / 2, 0

    def _grow(self) -> None:
        if self.scale is not None:
            self.good_steps += 1
            if self.good_steps == GROWTH_INTERVAL:
                self.scale, self.good_steps = self.scale * 2, 0

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> Evaluation:
        """See engine.Session."""
        names = self.loss.names
        total = torch.zeros(len(names) + 1, dtype=torch.float64, device=self.build.device)
        for batch in self._mine(micro_batches):
            told_K = self.runner.evaluate(batch)
            if told_K is not None:
                total[:-1] += told_K
                total[-1] += self.loss.num_targets(batch).to(self.build.device)
        self.runner.settle()
        self.states.settle()
        if self.distributed:
            dist.all_reduce(total)
            total /= self.build.mesh.sizes["tensor"]
        *told, count = total.tolist()
        return Evaluation(loss=told[0], num_targets=int(count), metrics=dict(zip(names[1:], told[1:], strict=True)))

    @torch.no_grad()
    def scores(self, micro_batches: Iterable[MicroBatch], loss: Loss) -> list[Tensor | None]:
        """See engine.Session."""
        self.runner.loss, own = loss, self.runner.loss
        try:
            told = [self.runner.evaluate(batch) for batch in self._mine(micro_batches)]
        finally:
            self.runner.loss = own
        self.runner.settle()
        self.states.settle()
        return told

    def state_dict(self) -> dict[str, Any]:
        """See engine.Session."""
        return {
            **self.states.state_dict(),
            "optimizer.step": self.num_steps,
            "scaler.scale": self.scale or 1.0,
            "scaler.good_steps": self.good_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See engine.Session."""
        self.num_steps = int(state["optimizer.step"])
        if self.scale is not None:
            self.scale, self.good_steps = float(state["scaler.scale"]), int(state["scaler.good_steps"])
        self.states.loaded(self.num_steps)

    def tensors(self) -> dict[str, list[Tensor]]:
        """See engine.Session. Gradients of ZeRO 2 and 3 are there from the first backward pass to the step's end."""
        return self.states.tensors()

    def close(self) -> None:
        """Frees the groups made for this session. The process group itself is the caller's."""
        self.states.close()
        if self.build.deterministic:
            torch.use_deterministic_algorithms(self._was_deterministic)
        if self.owns_group:
            dist.destroy_process_group()
            return
        for group in (*self.build.mesh.groups(), *self.build.requests.groups):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def _all_reduce_together(tensors: Sequence[Tensor], group: Any, device: torch.device) -> None:
    """One message, in place; over the device, where offloaded gradients wait on the host."""
    if group is None or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors]).to(device)
    dist.all_reduce(flat, group=group)
    for whole, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        whole.copy_(part.view_as(whole))


def _be_deterministic() -> None:
    # cuBLAS reads it when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Otherwise every torch.empty is filled, which costs time and finds only mistakes.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
