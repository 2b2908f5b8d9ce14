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

from strategies.engines.engine import Build
from strategies.rooms import impossible
from strategies.zero.adam8 import BlockAdam
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
    """Chooses who shards over the mesh's data axes. Raises ValueError for what no state of ours can be."""
    strategy = build.strategy
    if rule := impossible(strategy):
        raise ValueError(f"{rule.formatted(strategy)}; to fix: {rule.fix}")
    known = BUILT_STATES[build.precision in ("bf16", "fp16"), strategy.zero_stage >= 2]
    if strategy.states not in known:
        raise ValueError(
            f"states {strategy.states!r} in {build.precision} at zero_stage {strategy.zero_stage} is not built on the "
            f"native engine; set states to {' or '.join(known)}"
        )
    mesh = build.mesh
    requests = replace(
        build.requests,
        adam=BlockAdam if build.optimizer.name == "adamw_8bit" else None,
        make_states=FsdpStates if strategy.zero_stage >= 2 else BucketStates,
        num_shards=mesh.sizes["shard"],
        num_replicas=mesh.sizes["replicate"],
        shard_rank=mesh.rank("shard"),
        shard_group=mesh.group("shard"),
        replica_group=mesh.group("replicate"),
    )
    return replace(build, requests=requests)
