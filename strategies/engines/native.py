"""The native engine: torch alone. A session is a fold of the rooms' apply doors over a module, then one step at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from strategies.engines.engine import Build, MicroBatch, OptimizerSettings, StepResult
from strategies.recompute import apply as recompute
from strategies.strategy import Strategy
from strategies.zero import apply as zero
from strategies.zero.states import States, Weights

ROOMS = (recompute.apply, zero.apply)
"""In the order of the cost fold: cut -> tensor -> recompute -> zero -> offload -> schedule, as far as they are built."""
IGNORED = -100
GROWTH_INTERVAL = 2000


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
) -> NativeSession:
    """Splits a module that stands on the meta device and fills it, a parameter at a time: split_session, then fill.

    Args:
        module: has .embed, .blocks and .head; module(input_ids_BS) -> logits_BSV.
        weights: (name, shape) -> that parameter's first value; every rank is given the same.
        precision: bf16, fp16, fp32 or fp64.

    Raises ValueError, with the field's name, for a strategy that this engine has not built."""
    session = split_session(
        module,
        strategy=strategy,
        precision=precision,
        optimizer=optimizer,
        device=device,
        deterministic=deterministic,
        z_loss=z_loss,
    )
    session.states.fill(weights)
    return session


def split_session(
    module: nn.Module,
    *,
    strategy: Strategy,
    precision: str,
    optimizer: OptimizerSettings | None = None,
    device: torch.device | str = "cpu",
    deterministic: bool = False,
    z_loss: float = 0.0,
) -> NativeSession:
    """A session without storages: what a trace fills under fake tensors. See build_session."""
    for field, built in (
        ("tensor_parallel_degree", 1),
        ("pipeline_parallel_degree", 1),
        ("context_parallel_degree", 1),
    ):
        if getattr(strategy, field) != built:
            raise ValueError(f"{field} {getattr(strategy, field)} is not built on the native engine; set it to {built}")
    if strategy.offload.any:
        raise ValueError("offload is not built on the native engine; remove it")
    build = Build(
        module=module,
        strategy=strategy,
        precision=precision,
        device=torch.device(device),
        optimizer=optimizer or OptimizerSettings(),
        deterministic=deterministic,
    )
    if deterministic:
        torch.use_deterministic_algorithms(True)
    for room in ROOMS:
        build = room(build)
    states: States = build.requests["states"](build)
    if strategy.compile:
        blocks: Any = build.module.blocks
        for block in blocks:
            block.compile()
    return NativeSession(build, states, z_loss=z_loss)


class NativeSession:
    """One rank's share of the training, see engine.Session."""

    def __init__(self, build: Build, states: States, *, z_loss: float) -> None:
        self.module, self.build, self.states, self.z_loss = build.module, build, states, z_loss
        self.distributed = dist.is_initialized()
        self.scale = 2.0**16 if build.precision == "fp16" else None
        self.good_steps = 0
        self.num_steps = 0

    def step(self, micro_batches: Sequence[MicroBatch], *, num_target_tokens: int, learning_rate: float) -> StepResult:
        """Forward, loss, backward, clip, optimizer. num_target_tokens counts the whole global batch."""
        self.states.begin()
        total = torch.zeros((), dtype=torch.float64, device=self.build.device)
        for index, batch in enumerate(micro_batches):
            self.states.micro_batch(first=index == 0, last=index == len(micro_batches) - 1)
            loss = self._loss(batch) / num_target_tokens
            (loss if self.scale is None else loss * self.scale).backward()
            total += loss.detach()
            del loss
        if self.distributed:
            dist.all_reduce(total)
        loss_value = _number(total)
        if not math.isfinite(loss_value):
            raise FloatingPointError(f"the loss is {loss_value}")
        self.states.reduce()
        norm_scaled = _number(self.states.squared_norm().sqrt())
        norm = norm_scaled / (self.scale or 1.0)
        if self._overflowed(norm):
            return StepResult(loss=loss_value, gradient_norm=norm, skipped=True)
        clip = self.build.optimizer.gradient_clip
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        scale = torch.tensor(factor / (self.scale or 1.0), dtype=torch.float64, device=self.build.device)
        self.states.update(scale=scale, learning_rate=learning_rate)
        self.num_steps += 1
        self._grow()
        return StepResult(loss=loss_value, gradient_norm=norm)

    def _overflowed(self, norm: float) -> bool:
        if math.isfinite(norm):
            return False
        if self.scale is None:
            raise FloatingPointError(f"the gradient norm is {norm}")
        self.scale, self.good_steps = self.scale / 2, 0
        return True

    def _grow(self) -> None:
        """torch.amp.GradScaler's rule: twice the scale after 2,000 good steps."""
        if self.scale is not None:
            self.good_steps += 1
            if self.good_steps == GROWTH_INTERVAL:
                self.scale, self.good_steps = self.scale * 2, 0

    def _loss(self, batch: MicroBatch) -> Tensor:
        """Sum over the counted target tokens, in fp32 at least."""
        targets_BS = batch.target_ids_BS.masked_fill(batch.weight_B[:, None] == 0, IGNORED)
        logits_BSV = self.module(batch.input_ids_BS)
        logits_NV = logits_BSV.flatten(0, 1)
        if logits_NV.dtype in (torch.bfloat16, torch.float16):
            logits_NV = logits_NV.float()
        targets_N = targets_BS.flatten()
        loss = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="sum")
        if self.z_loss:
            counted_N = (targets_N != IGNORED).to(logits_NV.dtype)
            loss = loss + self.z_loss * (logits_NV.logsumexp(-1).square() * counted_N).sum()
        return loss

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> tuple[float, int]:
        """(sum of the loss in nats, number of target tokens) over all ranks; every rank gives as many micro batches."""
        total = torch.zeros(2, dtype=torch.float64, device=self.build.device)
        z_loss, self.z_loss = self.z_loss, 0.0
        for batch in micro_batches:
            counted = (batch.target_ids_BS != IGNORED) & (batch.weight_B[:, None] != 0)
            total += torch.stack([self._loss(batch).double(), counted.sum().double()])
        self.z_loss = z_loss
        if self.distributed:
            dist.all_reduce(total)
        return float(total[0]), int(total[1])

    def state_dict(self) -> dict[str, Any]:
        """Names and global shapes that no strategy changes, see engine.Session."""
        return {
            **self.states.state_dict(),
            "optimizer.step": self.num_steps,
            "scaler.scale": self.scale or 1.0,
            "scaler.good_steps": self.good_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """After the tensors of state_dict() were filled in place."""
        self.num_steps = int(state["optimizer.step"])
        if self.scale is not None:
            self.scale, self.good_steps = float(state["scaler.scale"]), int(state["scaler.good_steps"])
        self.states.loaded(self.num_steps)

    def tensors(self) -> dict[str, list[Tensor]]:
        return self.states.tensors()

    def close(self) -> None:
        """Nothing outlives the process group, which is the caller's."""


def _number(tensor: Tensor) -> float:
    """Its value; 1 where a trace plays the step on tensors that have none."""
    return 1.0 if isinstance(tensor, FakeTensor) else float(tensor)
