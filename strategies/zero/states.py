"""What the step needs of the model's states, whoever shards them; and the one AdamW that all paths share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from strategies.engines.engine import OptimizerSettings

Weights = Callable[[str, torch.Size], Tensor]
"""(parameter name, global shape) -> its first value, whole, in any precision."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


class States(Protocol):
    """Parameters, gradients and optimizer states of one rank. All calls but `tensors` and `squared_norm` are collective."""

    num_replicas: int
    """Ranks that hold the same shard."""

    def begin(self) -> None:
        """Before the first micro batch: no gradients."""

    def micro_batch(self, *, last: bool) -> None:
        """Before each forward pass."""

    def reduce(self) -> None:
        """After the last backward pass: gradients become sums over the replicas."""

    def squared_norm(self) -> Tensor:
        """Of this rank's shards of the reduced gradients. Scalar, fp64."""

    def update(self, *, scale: float, learning_rate: float) -> None:
        """Gradients times scale, one AdamW step, parameters the same on all replicas again. Uses the gradients up."""

    def settle(self) -> None:
        """After forward passes that no backward pass follows."""

    def state_dict(self) -> dict[str, Any]:
        """`model.NAME`, `optimizer.exp_avg.NAME`, `optimizer.exp_avg_sq.NAME`."""

    def loaded(self, step: int) -> None:
        """After a checkpoint was read into state_dict()'s tensors."""

    def tensors(self) -> dict[str, list[Tensor]]:
        """See engine.Session."""


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's rows of one parameter, in the precision in which they are stepped. May be empty."""

    name: str
    shape: torch.Size
    """Of the whole parameter."""
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def of(cls, name: str, shape: torch.Size, master: Tensor) -> Shard:
        return cls(name, shape, master, torch.zeros_like(master), torch.zeros_like(master))

    def entries(self) -> tuple[tuple[str, Tensor], ...]:
        """(name in a checkpoint, tensor)."""
        return (
            (f"model.{self.name}", self.master),
            (f"optimizer.exp_avg.{self.name}", self.exp_avg),
            (f"optimizer.exp_avg_sq.{self.name}", self.exp_avg_sq),
        )


class Adam:
    """AdamW by torch's fused kernel, the same for every path, on the device's own step counter: no temporary tensors.

    Matrices decay, vectors (biases, norms) do not."""

    def __init__(self, settings: OptimizerSettings, device: torch.device) -> None:
        self.settings = settings
        self.num_steps = torch.zeros((), dtype=torch.float32, device=device)

    def advance(self) -> None:
        """Once a step, before its first `update`."""
        self.num_steps += 1

    def update(self, shards: Sequence[Shard], gradients: Sequence[Tensor], learning_rate: float) -> None:
        """Gradients in the masters' dtype."""
        pairs = [(s, g) for s, g in zip(shards, gradients, strict=True) if s.master.numel()]
        for decays in (True, False):
            mine = [(s, g) for s, g in pairs if (len(s.shape) >= 2) == decays]
            if mine:
                torch._fused_adamw_(
                    [s.master for s, _ in mine],
                    [g for _, g in mine],
                    [s.exp_avg for s, _ in mine],
                    [s.exp_avg_sq for s, _ in mine],
                    [],
                    [self.num_steps] * len(mine),
                    lr=learning_rate,
                    beta1=self.settings.betas[0],
                    beta2=self.settings.betas[1],
                    weight_decay=self.settings.weight_decay if decays else 0.0,
                    eps=self.settings.epsilon,
                    amsgrad=False,
                    maximize=False,
                )


def squared_norm(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Sum of squares in fp64 over tensor norms in fp32 (fp64), in the order given."""
    full = [t for t in tensors if t.numel()]
    if not full:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(full, 2, dtype=torch.promote_types(full[0].dtype, torch.float32))
    return torch.stack(norms).double().square().sum()


def rows(whole: Tensor, num_shards: int, rank: int) -> Tensor:
    """A rank's rows of dimension 0 as torch.chunk cuts them (FSDP2's and DTensor's rule), a view; empty where they run out."""
    size = -(-whole.shape[0] // num_shards)
    return whole[min(rank * size, whole.shape[0]) : min((rank + 1) * size, whole.shape[0])]
