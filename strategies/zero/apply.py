"""ZeRO, done to a module: who holds which states. Stages 0 and 1 are our own buckets, 2 and 3 torch's FSDP2.

Bytes a rank holds. P parameters of the model, U of the largest unit (a block, or all that stands outside the blocks),
n = zero_group_size (1 at stage 0), B = a bucket (BUCKET_BYTES of gradients, or one parameter that is larger), m micro
batches. The second of two numbers is fp32 (fp64: twice that).

ZeRO 0 and 1 (mixed / full)                                                            alive
  parameters            2P / 4P                                                        always
  master weights        4P/n / 0                                                       always
  moments               8P/n                                                           always
  gradients             2P / 4P, rows padded to a multiple of n                        always
                        (mixed_fp32_gradients: 4P)
  gradient on its way   2 / 4 an element of one parameter                              backward
  reduction's output    n > 1: two of B/n; n = 1: none                                 backward
  widened gradients     4 an element of B/n / 0                                        optimizer
  parameters to gather  n > 1: two of B/n in their dtype; the output is the bucket     optimizer

ZeRO 2 and 3 (sharded_fp32 / full)
  parameters            4P/n                                                           always
  moments               8P/n                                                           always
  gradients             4P/n                                                           first backward to end of step
  gathered parameters   2P / 4P at stage 2 or gather: per_step (then over all m);      forward, backward
                        at stage 3 those outside the blocks, and two blocks
  unsharded gradients   2U + 4U / 4U + 4U while a unit is scattered                    backward
                        reduce: per_step and m > 1: 4P from the first micro batch on
  reduction's output    4U/n, which becomes the gradient                               backward
  all-gather            2U/n + 2U / 4U/n + 4U until it is copied out                   forward, backward

The fused AdamW itself holds nothing. Messages a step: stage 0 all-reduces P gradients (once a step, whatever `reduce` says,
since gradients are whole anyway); stage 1 reduce-scatters P gradients inside the group, all-reduces P/n across groups and
gathers P parameters; FSDP2 as `gather` and `reduce` say, in fp32 (fp64) for gradients, and across groups always once a step.
Beside them one all-reduce of two fp64 numbers, loss and squared norm.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh

from strategies.engines.engine import Build
from strategies.strategy import impossible
from strategies.zero.buckets import BucketStates
from strategies.zero.fsdp import FsdpStates

BUILT_STATES = {
    (True, False): ("mixed", "mixed_fp32_gradients"),
    (True, True): ("sharded_fp32",),
    (False, False): ("full",),
    (False, True): ("full",),
}
"""(16-bit precision, ZeRO 2 or 3) -> what the states may be."""


def apply(build: Build) -> Build:
    """Lays the data mesh, one axis `shard`, or `replicate` x `shard` where a ZeRO group is smaller than the replicas,
    and chooses who shards. Raises ValueError for what no state of ours can be."""
    strategy = build.strategy
    if rule := impossible(strategy):
        raise ValueError(f"{rule.told(strategy)}; to fix: {rule.fix}")
    known = BUILT_STATES[build.precision in ("bf16", "fp16"), strategy.zero_stage >= 2]
    if strategy.states not in known:
        raise ValueError(
            f"states {strategy.states!r} in {build.precision} at zero_stage {strategy.zero_stage} is not built on the "
            f"native engine; set states to {' or '.join(known)}"
        )
    degree = strategy.data_parallel_degree
    num_shards = strategy.zero_group_size if strategy.zero_stage else 1
    num_replicas = degree // num_shards
    requests: dict[str, Any] = {
        "states": FsdpStates if strategy.zero_stage >= 2 else BucketStates,
        "num_shards": num_shards,
        "num_replicas": num_replicas,
        "shard_rank": 0,
        "shard_group": None,
        # Those that hold the same shard: all ranks where nothing is sharded.
        "replica_group": dist.group.WORLD if num_replicas > 1 else None,
    }
    mesh: Any = None
    if num_shards > 1 or strategy.zero_stage >= 2:
        one_group = num_replicas == 1
        with unset_fake_temporarily():  # a mesh computes with tensors that a trace may not make fake
            mesh = init_device_mesh(
                build.device.type,
                (num_shards,) if one_group else (num_replicas, num_shards),
                mesh_dim_names=("shard",) if one_group else ("replicate", "shard"),
            )
        requests |= {"shard_rank": mesh.get_local_rank("shard"), "shard_group": mesh.get_group("shard")}
        if not one_group:
            requests["replica_group"] = mesh.get_group("replicate")
    return replace(build, mesh=mesh, requests={**build.requests, **requests})
