"""ZeRO, done to a module: who holds which states. Stages 0 and 1 are our own buckets, 2 and 3 torch's FSDP2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from strategies.engines.engine import Build
from strategies.zero.buckets import BucketStates
from strategies.zero.fsdp import FsdpStates


def apply(build: Build) -> Build:
    """Lays the data mesh: one axis `shard`, or `replicate` x `shard` where a ZeRO group is smaller than the replicas."""
    strategy = build.strategy
    if not dist.is_initialized():
        if strategy.data_parallel_degree > 1:
            raise ValueError(f"data_parallel_degree {strategy.data_parallel_degree} needs a process group")
        return replace(build, requests={**build.requests, "states": BucketStates})
    degree = strategy.data_parallel_degree
    group = strategy.zero_group_size if strategy.zero_stage else degree
    if group < 1 or degree % group:
        raise ValueError(f"zero_group_size {group} does not divide data_parallel_degree {degree}")
    shape: tuple[int, ...] = (degree,) if group == degree else (degree // group, group)
    names = ("shard",) if group == degree else ("replicate", "shard")
    mesh: Any = init_device_mesh(build.device.type, shape, mesh_dim_names=names)
    states = FsdpStates if strategy.zero_stage >= 2 else BucketStates
    return replace(build, mesh=mesh, requests={**build.requests, "states": states, "data_group": dist.group.WORLD})
