"""The model's states as the step needs them, whoever shards them; and the one AdamW that all paths share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Split

from strategies.engines.engine import Build, OptimizerSettings
from strategies.strategy import Stage

Weights = Callable[[str, torch.Size], Tensor]
"""(parameter name, global shape) -> its first value, whole, in any precision."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


class States(Protocol):
    """Parameters, gradients and optimizer states of one rank. All calls but `tensors` and `gradients` are collective."""

    num_replicas: int
    """Ranks that hold the same shard."""
    share: float
    """Factor that the gradients of a micro batch are multiplied by as they are added up; a power of two, see native.share_of."""

    def begin(self) -> None:
        """Before the first micro batch: no gradients."""

    def micro_batch(self, *, last: bool) -> None:
        """Before each micro batch, where there is no pipeline. last: the step's gradients are complete after it."""

    def reduce(self) -> None:
        """After the last backward pass: gradients become sums over the replicas."""

    def gradients(self) -> dict[str, Tensor]:
        """Return this rank's shards of the reduced gradients, by parameter; views, to be changed in place."""

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

    def close(self) -> None:
        """Files of what is offloaded."""


class PipelineStates(States, Protocol):
    """States of which a pipeline rank uses one stage at a time."""

    def backward(self, stage: Stage, *, last: bool, done: bool) -> None:
        """Before each backward pass. last: this rank's gradients of the step are complete after it; False throughout leaves
        all reductions to `reduce`. done: it is the stage's last."""

    def deferred(self, weight: nn.Parameter, following: nn.Parameter | None, *, done: bool) -> None:
        """Note, of a split backward pass, that the gradient of a weight was added, `following` is the one whose comes next in
        this pass over the weights. done: the pass is the stage's last."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows of one parameter that a rank steps, in the precision in which they are stepped. May be empty."""

    name: str
    shape: torch.Size
    """Shape of the whole parameter."""
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    apart: bool
    """The master is no view of the parameter: what was stepped is copied there."""

    def entries(self) -> tuple[tuple[str, Tensor], ...]:
        """(name in a checkpoint, tensor)."""
        return (
            (f"model.{self.name}", self.master),
            (f"optimizer.exp_avg.{self.name}", self.exp_avg),
            (f"optimizer.exp_avg_sq.{self.name}", self.exp_avg_sq),
        )

    def whole(self, build: Build) -> dict[str, Any]:
        """Name in a checkpoint -> this rank's piece of the whole tensor."""
        return {name: as_global(build, self.name, self.shape, local) for name, local in self.entries()}

    def moments(self) -> tuple[Tensor, ...]:
        """Return the optimizer's own tensors."""
        return self.exp_avg, self.exp_avg_sq


def as_global(
    build: Build, name: str, shape: Sequence[int], local: Tensor, *, whole: torch.Size | None = None
) -> Tensor:
    """Return this rank's rows of a parameter as a piece of the whole one, which no strategy changes: tensor parallelism cuts
    first, then ZeRO deals rows of the part.

    Args:
        shape: of the part.
        whole: of the whole, where it is not the parameter's own."""
    mesh, layout = build.mesh.states, build.layout.get(name)
    if mesh is None:
        return local
    placements = {
        "replicate": Replicate(),
        "tensor": Replicate() if layout is None or layout.dim is None else Split(layout.dim),
        "shard": Split(0),
    }
    if whole is None:
        whole = torch.Size(shape) if layout is None else layout.shape
    stride = torch.empty(whole, device="meta").stride()
    split = [placements[axis] for axis in mesh.mesh_dim_names]
    return DTensor.from_local(local, mesh, split, run_check=False, shape=whole, stride=stride)


class Adam:
    """AdamW by torch's fused kernel, the same for every path, on the device's own step counter: no temporary tensors.

    Matrices decay, vectors (biases, norms) do not."""

    def __init__(self, settings: OptimizerSettings, device: torch.device, dtype: torch.dtype) -> None:
        self.settings, self.dtype = settings, dtype
        self.num_steps = torch.zeros((), dtype=torch.float32, device=device)

    def shard(self, name: str, shape: torch.Size, rows: Tensor, *, apart: bool) -> Shard:
        """States of one parameter's rows; `apart` gives them a master copy. A policy of storage overrides it."""
        master = rows.to(self.num_steps.device, self.dtype, copy=True) if apart else rows
        return Shard(name, shape, master, torch.zeros_like(master), torch.zeros_like(master), apart)

    def advance(self) -> None:
        """Once a step, before its first `update`."""
        self.num_steps += 1

    def step(
        self,
        shards: Sequence[Shard],
        gradients: Sequence[Tensor],
        into: Sequence[Tensor],
        *,
        scale: float,
        learning_rate: float,
    ) -> None:
        """Steps the shards by gradients times scale, which are used up, and writes them `into` the parameters' rows, or
        what gathers them; a shard's own master stands there where nothing is to be written."""
        if gradients[0].dtype.itemsize == 2:
            gradients = [gradient.float() for gradient in gradients]
        if scale != 1.0:
            torch._foreach_mul_(list(gradients), scale)
        self.update(shards, gradients, learning_rate)
        del gradients
        publish(shards, into)

    def loaded(self, step: int, shards: Sequence[Shard], into: Sequence[Tensor]) -> None:
        """After a checkpoint was read into the shards."""
        self.num_steps.fill_(step)
        publish(shards, into)

    def tensors(self, shards: Sequence[Shard]) -> dict[str, list[Tensor]]:
        """Return what the shards hold beside the parameters, by component (see engine.Session)."""
        return {
            "master_weights": [shard.master for shard in shards if shard.apart],
            "optimizer_states": [moment for shard in shards for moment in shard.moments()],
        }

    def close(self) -> None:
        """Lets go what is no tensor."""

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


def make_adam(build: Build, device: torch.device, dtype: torch.dtype) -> Adam:
    """Return the optimizer of a build: what a room asked for, or AdamW with 32-bit moments on the device."""
    if build.requests.adam is not None:
        asked: Adam = build.requests.adam(build, device, dtype)
        return asked
    return Adam(build.optimizer, device, dtype)


def publish(shards: Sequence[Shard], into: Sequence[Tensor]) -> None:
    """Copies masters to where their parameters' rows are; a master that stands there itself is in its place."""
    for target, shard in zip(into, shards, strict=True):
        if target is not shard.master:
            target.copy_(shard.master)


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
