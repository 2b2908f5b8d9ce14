"""The world as one torch DeviceMesh: pipeline x replicate x tensor x shard, laid as the strategy's `mesh_order` says.

Data and context together are split in two: ranks of one `shard` group hold one sharded copy between them, those of one
`replicate` group hold the same shard. Axes of size 1 have no dimension and no group, except `shard` where FSDP2 wants one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from strategies.strategy import Strategy

NAMES = ("pipeline", "replicate", "tensor", "shard")
"""Fixed, whatever the ranks' order: tensor before shard, so that plain Shard placements say which rows a rank holds."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The mesh as one rank sees it: where it stands and whom it talks to, by axis."""

    sizes: Mapping[str, int]
    ranks: Any
    """[pipeline, replicate, tensor, shard] -> rank of the world; a numpy array, whose values a trace may read."""
    whole: Any = None
    """The DeviceMesh of the axes that have a dimension; None: a world of one."""
    states: Any = None
    """DeviceMesh of replicate, tensor and shard: over it a stage's states are DTensors. None where no state is split."""
    data: Any = None
    """DeviceMesh of replicate and shard, for FSDP2."""

    def has(self, axis: str) -> bool:
        return self.whole is not None and axis in self.whole.mesh_dim_names

    def rank(self, axis: str) -> int:
        return int(self.whole.get_local_rank(axis)) if self.has(axis) else 0

    def group(self, axis: str) -> Any:
        """None where the axis has one rank."""
        return self.whole.get_group(axis) if self.sizes[axis] > 1 else None

    def groups(self) -> list[Any]:
        return [] if self.whole is None else list(self.whole.get_all_groups())


def lay(strategy: Strategy, device_type: str) -> Mesh:
    """Makes the mesh and its groups; collective over the world."""
    num_shards = strategy.zero_group_size if strategy.zero_stage else 1
    sizes = {
        "pipeline": strategy.pipeline_parallel_degree,
        "replicate": strategy.num_replicas // num_shards,
        "tensor": strategy.tensor_parallel_degree,
        "shard": num_shards,
    }
    with unset_fake_temporarily():  # a mesh computes with tensors that a trace may not make fake
        ranks = _ranks(strategy, sizes)
        needed = {"shard"} if strategy.zero_stage >= 2 else set()
        kept = tuple(name for name in NAMES if sizes[name] > 1 or name in needed)
        if not kept:
            return Mesh(sizes=sizes, ranks=ranks.numpy())
        whole = DeviceMesh(device_type, ranks.reshape([sizes[name] for name in kept]), mesh_dim_names=kept)
        split = any(name in kept for name in ("tensor", "shard"))
        return Mesh(
            sizes=sizes,
            ranks=ranks.numpy(),
            whole=whole,
            states=_part(whole, ("replicate", "tensor", "shard")) if split else None,
            data=_part(whole, ("replicate", "shard")) if "shard" in kept else None,
        )


def _ranks(strategy: Strategy, sizes: Mapping[str, int]) -> torch.Tensor:
    degrees = strategy.degrees
    ranks = torch.arange(degrees.world_size).reshape([degrees.size(axis) for axis in degrees.order])
    replicas = sorted((degrees.order.index("data"), degrees.order.index("context")))
    ranks = ranks.permute(degrees.order.index("pipeline"), *replicas, degrees.order.index("tensor"))
    laid = ranks.reshape([sizes[name] for name in ("pipeline", "replicate", "shard", "tensor")])
    return laid.permute(0, 1, 3, 2)


def _part(whole: DeviceMesh, names: tuple[str, ...]) -> Any:
    kept = tuple(name for name in names if name in (whole.mesh_dim_names or ()))
    return whole if kept == whole.mesh_dim_names else whole[kept]
