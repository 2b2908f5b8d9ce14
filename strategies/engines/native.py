"""The native engine: torch alone. A session is a fold of the rooms' apply doors over a module, then one step at a time.

B micro batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch._subclasses.fake_tensor import FakeTensor

from strategies.engines.engine import BUCKET_BYTES, Build, MicroBatch, OptimizerSettings, StepResult
from strategies.engines.loss import IGNORED, token_loss
from strategies.offload import apply as offload
from strategies.recompute import apply as recompute
from strategies.strategy import Strategy
from strategies.zero import apply as zero
from strategies.zero.states import DTYPES, States, Weights

ROOMS: tuple[Callable[[Build], Build], ...] = (recompute.apply, zero.apply, offload.apply)
"""In the order of the cost fold: cut -> tensor -> recompute -> zero -> offload -> schedule, as far as they are built."""
FIRST_SCALE = 2.0**16
GROWTH_INTERVAL = 2000
"""torch.amp.GradScaler's numbers."""


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
    bucket_bytes: int = BUCKET_BYTES,
) -> NativeSession:
    """Splits a module that stands on the meta device and fills it, a parameter at a time.

    Collective over the process group, which has one rank for each GPU of the strategy; a world of one needs none.

    Args:
        module: has .embed, .blocks and .head; module(input_ids_BS) -> logits_BSV. Has no buffers.
        precision: bf16, fp16, fp32 or fp64.
        weights: (name, shape) -> that parameter's first value; every rank is given the same.
        deterministic: no kernel whose sum depends on the order of arrival, in this whole process until close().
        bucket_bytes: see BUCKET_BYTES.

    Raises ValueError, with the field's name, for a strategy that this engine has not built."""
    _refuse_unbuilt(module, strategy, precision)
    build = Build(
        module=module,
        strategy=strategy,
        precision=precision,
        device=torch.device(device),
        optimizer=optimizer or OptimizerSettings(),
        deterministic=deterministic,
        bucket_bytes=bucket_bytes,
    )
    # FSDP2 knows no world without a process group.
    owns_group = strategy.zero_stage >= 2 and not dist.is_initialized()
    if owns_group:
        backend = "nccl" if build.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        for room in ROOMS:
            build = room(build)
        states: States = build.requests["states"](build, weights)
    except BaseException:
        if owns_group:
            dist.destroy_process_group()
        raise
    return NativeSession(build, states, z_loss=z_loss, owns_group=owns_group)


def _refuse_unbuilt(module: nn.Module, strategy: Strategy, precision: str) -> None:
    if precision not in DTYPES:
        raise ValueError(f"precision {precision!r} is unknown; set it to one of {', '.join(DTYPES)}")
    for field in ("tensor_parallel_degree", "pipeline_parallel_degree", "context_parallel_degree"):
        if (degree := getattr(strategy, field)) != 1:
            raise ValueError(f"{field} {degree} is not built on the native engine; set it to 1")
    if buffers := [name for name, _ in module.named_buffers()]:
        raise ValueError(f"the module has buffers ({', '.join(buffers)}); the native engine fills parameters alone")
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size != strategy.num_gpus:
        raise ValueError(
            f"data_parallel_degree {strategy.data_parallel_degree} wants a process group of {strategy.num_gpus}, "
            f"this one has {world_size}; start as many workers as the strategy has GPUs"
        )


class NativeSession:
    """One rank's share of the training, see engine.Session."""

    def __init__(self, build: Build, states: States, *, z_loss: float, owns_group: bool) -> None:
        self.module, self.build, self.states, self.z_loss = build.module, build, states, z_loss
        self.distributed, self.owns_group = dist.is_initialized(), owns_group
        self.scale = FIRST_SCALE if build.precision == "fp16" else None
        self.good_steps = 0
        self.num_steps = 0
        self._was_deterministic = torch.are_deterministic_algorithms_enabled()
        if build.deterministic:
            _be_deterministic()

    def step(self, micro_batches: Sequence[MicroBatch], *, num_target_tokens: int, learning_rate: float) -> StepResult:
        """See engine.Session. The device is waited for once, between backward and the optimizer."""
        self.states.begin()
        total = torch.zeros((), dtype=torch.float64, device=self.build.device)
        for index, batch in enumerate(micro_batches):
            self.states.micro_batch(last=index == len(micro_batches) - 1)
            loss, trained = self._loss(batch)
            (trained * ((self.scale or 1.0) / num_target_tokens)).backward()
            total += loss
            del loss, trained
        self.states.reduce()
        loss_value, norm = self._totals(total / num_target_tokens)
        if not math.isfinite(loss_value):
            raise FloatingPointError(f"the loss is {loss_value}; the weights are those of the step before")
        if not math.isfinite(norm):
            self._overflow(norm)
            return StepResult(loss=loss_value, gradient_norm=norm, skipped=True)
        clip = self.build.optimizer.gradient_clip
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        self.states.update(scale=factor / (self.scale or 1.0), learning_rate=learning_rate)
        self.num_steps += 1
        self._grow()
        return StepResult(loss=loss_value, gradient_norm=norm)

    @torch.no_grad()
    def _totals(self, loss: Tensor) -> tuple[float, float]:
        """(loss, gradient norm) over all ranks, in one message; every replica of a shard tells its norm."""
        sums = torch.stack([loss, self.states.squared_norm() / self.states.num_replicas])
        if self.distributed:
            dist.all_reduce(sums)
        if isinstance(sums, FakeTensor):  # a trace plays the step on tensors that have no values
            return 1.0, 1.0
        loss_value, square = sums.tolist()
        return loss_value, math.sqrt(square) / (self.scale or 1.0) if square >= 0 else math.nan

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

    def _loss(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(told, trained), sums over the counted target tokens."""
        device = self.build.device
        logits_BSV = self.module(batch.input_ids_BS.to(device))
        targets_BS = batch.target_ids_BS.masked_fill(batch.weight_B[:, None] == 0, IGNORED)
        return token_loss(logits_BSV.flatten(0, 1), targets_BS.flatten().to(device), self.z_loss)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> tuple[float, int]:
        """See engine.Session."""
        total = torch.zeros(2, dtype=torch.float64, device=self.build.device)
        for batch in micro_batches:
            counted = (batch.target_ids_BS != IGNORED) & (batch.weight_B[:, None] != 0)
            total[0] += self._loss(batch)[0]
            total[1] += counted.sum().to(self.build.device)
        self.states.settle()
        if self.distributed:
            dist.all_reduce(total)
        loss, count = total.tolist()
        return loss, int(count)

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
        elif self.build.mesh is not None:
            for group in self.build.mesh.get_all_groups():
                if group is not dist.group.WORLD:
                    dist.destroy_process_group(group)


def _be_deterministic() -> None:
    # cuBLAS reads it when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Otherwise every torch.empty is filled, which costs time and finds only mistakes.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
