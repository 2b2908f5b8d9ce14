"""What the step needs of the model's states, whoever shards them; and the one AdamW that all paths share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from strategies.engines.engine import OptimizerSettings

Weights = Callable[[str, torch.Size], Tensor]
"""(parameter name, global shape) -> its first value, whole, in any precision."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


class States(Protocol):
    """Parameters, gradients and optimizer states of one rank. All calls but `tensors` are collective."""

    def fill(self, weights: Weights) -> None:
        """Makes the storages and fills in the first values; the constructor only splits what stands on the meta device."""

    def begin(self) -> None:
        """Before the first micro batch: no gradients."""

    def micro_batch(self, *, first: bool, last: bool) -> None:
        """Before each forward pass."""

    def reduce(self) -> None:
        """After the last backward pass: gradients become sums over the replicas."""

    def squared_norm(self) -> Tensor:
        """Of the reduced gradients, over all ranks, each parameter once. Scalar, fp64."""

    def update(self, *, scale: Tensor, learning_rate: float) -> None:
        """Gradients times scale, one AdamW step, parameters the same on all replicas again."""

    def state_dict(self) -> dict[str, Any]: ...

    def loaded(self, step: int) -> None:
        """After a checkpoint was read into state_dict()'s tensors."""

    def tensors(self) -> dict[str, list[Tensor]]: ...


class Adam:
    """torch's AdamW over local tensors, states made at once, so that a checkpoint can be read before the first step.

    Matrices decay, vectors (biases, norms) do not."""

    def __init__(self, masters: Sequence[tuple[nn.Parameter, int]], settings: OptimizerSettings) -> None:
        """Args: masters: (local tensor that is stepped, dimensions of the whole parameter)."""
        decayed = [tensor for tensor, dims in masters if dims >= 2]
        others = [tensor for tensor, dims in masters if dims < 2]
        groups = [
            {"params": tensors, "weight_decay": decay}
            for tensors, decay in ((decayed, settings.weight_decay), (others, 0.0))
            if tensors
        ]
        self.optimizer: torch.optim.Optimizer | None = None
        if groups:  # a rank whose shards are all empty steps nothing
            self.optimizer = torch.optim.AdamW(
                groups, lr=0.0, betas=settings.betas, eps=settings.epsilon, fused=True, foreach=False
            )
            for tensor, _ in masters:
                self.optimizer.state[tensor] = {
                    "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                    "exp_avg": torch.zeros_like(tensor, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(tensor, memory_format=torch.preserve_format),
                }
        self.num_steps = 0

    def step(self, learning_rate: float) -> None:
        self.num_steps += 1
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()

    def moments(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        state = self.optimizer.state[tensor] if self.optimizer else {}
        return state["exp_avg"], state["exp_avg_sq"]

    def set_step(self, step: int) -> None:
        self.num_steps = step
        for state in self.optimizer.state.values() if self.optimizer else ():
            state["step"].fill_(step)


def squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of squares in fp64, tensor by tensor in the order given."""
    norms = [
        torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors if t.numel()
    ]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([norm.double() for norm in norms]).square().sum()
