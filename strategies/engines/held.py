"""States that another library holds, in the project's terms: which flat part of which whole parameter a rank steps, so that
checkpoints, norms and bytes are read the same way from every engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Split

from strategies.catalog import unbuilt, wrong_precision
from strategies.engines.engine import Build, Layout, MicroBatch
from strategies.engines.native import NativeSession
from strategies.strategy import Strategy
from strategies.zero.states import Adam, Shard, rows

KINDS = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
"""Names of a parameter's tensors in a checkpoint, in the order of Shard.entries()."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The place of a rank's tensor in a whole parameter: a flat range of what tensor parallelism left."""

    start: int = 0
    stop: int | None = None
    """None: to the end."""
    layout: Layout | None = None

    def read(self, whole: Tensor) -> Tensor:
        """The flat part, a view where it can be."""
        part = whole if self.layout is None else self.layout.part(whole)
        return part.reshape(-1)[self.start : self.stop]

    def write(self, local: Tensor, whole: Tensor) -> None:
        """The inverse; what `local` has beyond the part is padding."""
        part = whole if self.layout is None else self.layout.part(whole)
        flat = part.reshape(-1)
        into = flat[self.start : self.stop]
        into.copy_(local.reshape(-1)[: into.numel()])
        part.copy_(flat.view_as(part))


def refuse_unbuilt(strategy: Strategy, precision: str) -> None:
    """ValueError for what the table of engines rules out."""
    if limit := unbuilt(strategy):
        value = getattr(strategy, limit.field)
        raise ValueError(f"{limit.field} {value} cannot run: {limit.reason}; set it otherwise, or engine: native")
    if wrong := wrong_precision(strategy, precision):
        raise ValueError(wrong)


def refuse_world(strategy: Strategy, what: str) -> None:
    """ValueError where the process group is not as large as `what`, in the strategy's words, wants it."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if not dist.is_initialized() or world_size != strategy.num_gpus:
        raise ValueError(
            f"{what} a process group of {strategy.num_gpus}, this one has {world_size}; start as many workers as the "
            "strategy has GPUs"
        )


class HeldSession(NativeSession):
    """See engine.Session. state_dict() copies: a rank's rows of each parameter, whoever steps them in the library."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See engine.Session."""
        cast("Held", self.states).take(state)
        super().load_state_dict(state)

    def _share(self, micro_batches: Sequence[MicroBatch], num_targets: int) -> float:
        """The libraries add gradients up by themselves."""
        return 1.0


class Held(ABC):
    """The part of States that is the same for every library."""

    adam: Adam
    shards: list[Shard]
    """Shards that this rank steps."""
    parameters: dict[str, nn.Parameter]
    shapes: dict[str, torch.Size]
    """Shape of every whole parameter, on every rank the same."""
    num_replicas = 1
    share = 1.0

    def __init__(self, build: Build) -> None:
        self.build, self.device = build, build.device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh(build.device.type, (self.world_size,))
        self.wide = torch.float64 if build.precision == "fp64" else torch.float32

    @abstractmethod
    def place(self, shard: Shard) -> Place:
        """Return where the shard stands in its parameter."""

    def tells(self, shard: Shard) -> bool:
        """Return whether a shard goes into checkpoints from this rank; False where another rank tells the same."""
        return True

    def settle(self) -> None:  # noqa: B027
        """The libraries let go of what evaluation gathered by themselves."""

    def close(self) -> None:  # noqa: B027
        """Frees what was made beside the library's own."""

    def _entry(self, local: Tensor | None, shard: Shard | None, name: str) -> DTensor:
        """One parameter's tensor by rows; collective, one whole tensor at a time."""
        whole = torch.zeros(self.shapes[name], dtype=self.wide, device=self.device)
        if local is not None and shard is not None and self.tells(shard):
            self.place(shard).write(local, whole)
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
            for index, kind in enumerate(KINDS):
                local = shard.entries()[index][1] if shard else None
                state[f"{kind}.{name}"] = self._entry(local, shard, name)
        return state

    @torch.no_grad()
    def take(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict(); collective, one whole tensor at a time."""
        held = {shard.name: shard for shard in self.shards}
        for name in self.shapes:
            for index, kind in enumerate(KINDS):
                whole = state[f"{kind}.{name}"].full_tensor()
                if shard := held.get(name):
                    part = self.place(shard).read(whole)
                    shard.entries()[index][1].view(-1)[: part.numel()].copy_(part)

    def tensors(self) -> dict[str, list[Tensor]]:
        """See engine.Session."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        parameters = [p.detach() for p in self.parameters.values()]
        return {"parameters": parameters, "gradients": gradients, **self.adam.tensors(self.shards)}


class Owned(torch.optim.Optimizer):
    """The optimizer that a library is given on each rank: the project's AdamW over the tensors that the library gave it."""

    def __init__(self, params: Any, *, make: Callable[[Any], Shard], adam: Adam) -> None:
        super().__init__(params, {"lr": 0.0})
        self.make, self.adam = make, adam
        self.owned: list[Any] = []
        self.shards: list[Shard] = []

    def own(self) -> None:
        """Once the library has put into the groups what this rank is to step."""
        self.owned = [parameter for group in self.param_groups for parameter in group["params"]]
        self.shards = [self.make(parameter) for parameter in self.owned]

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


def fill(build: Build, weights: Callable[[str, torch.Size], Tensor], dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Gives a module that stands on the meta device its memory and first values, a parameter at a time."""
    if build.optimizer.name != "adamw":
        raise ValueError(f"optimizer.name {build.optimizer.name} is the native engine's alone; set engine: native")
    if not all(parameter.requires_grad for parameter in build.module.parameters()):
        raise ValueError("adapters beside frozen weights are the native engine's alone; set engine: native")
    build.module.to(dtype).to_empty(device=build.device)
    parameters = dict(build.module.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights(name, parameter.shape))
    return parameters
