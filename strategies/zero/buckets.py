"""ZeRO 0 and 1, our own: flat gradient buckets laid out once, reduced in a fixed order, and a sharded AdamW.

torch's DDP rebuilds its buckets by arrival order and its ZeroRedundancyOptimizer keeps no fp32 master; a resumed run
would not be the undisturbed one, bit for bit. Here a bucket is a block (or what stands outside the blocks), always.

Bytes a rank holds (P parameters, n ranks in the ZeRO group, 16-bit / fp32):
  parameters     2P / 4P    gradients 2P / 4P (the bucket is the storage of every .grad)
  master         4P/n / 0   moments   8P/n / 8P/n     (n = 1 at stage 0)
  transient      stage 1: the largest bucket twice in its dtype while it is reduced or gathered (rank-major, shard);
                 16-bit: the fp32 copy of the local gradients while the optimizer steps, 4P/n
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from strategies.engines.engine import Build
from strategies.zero.states import DTYPES, Adam, Weights, squared_norm

# torch 2.13 renames the two and warns of the old names; 2.11 has the old ones alone.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Bucket:
    """Parameters that are reduced together. Shards are rows of dimension 0, as torch.chunk cuts them (FSDP2's rule)."""

    def __init__(self, parameters: list[tuple[str, nn.Parameter]], num_shards: int) -> None:
        self.parameters, self.num_shards = parameters, num_shards
        first = parameters[0][1]
        self.gradients = torch.zeros(sum(p.numel() for _, p in parameters), dtype=first.dtype, device=first.device)
        offset = 0
        for _, parameter in parameters:
            parameter.grad = self.gradients[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        self.padded = [self.rows(p) * (p.numel() // p.shape[0]) for _, p in parameters]
        """Elements of one rank's shard of each parameter, the padding of the last ones included."""

    def rows(self, parameter: Tensor) -> int:
        return -(-parameter.shape[0] // self.num_shards)

    def shard(self, whole: Tensor, rank: int) -> Tensor:
        """A rank's rows, as a view; empty where the rows run out."""
        rows = self.rows(whole)
        return whole[min(rank * rows, whole.shape[0]) : min((rank + 1) * rows, whole.shape[0])]

    def to_rank_major(self, wholes: list[Tensor]) -> Tensor:
        """[rank 0's shards | rank 1's | ...], each padded to the same length."""
        flat = self.gradients.new_zeros(self.num_shards, sum(self.padded))
        for rank in range(self.num_shards):
            for piece, whole in zip(flat[rank].split(self.padded), wholes, strict=True):
                rows = self.shard(whole, rank)
                piece[: rows.numel()].view_as(rows).copy_(rows)
        return flat.view(-1)

    def pieces(self, flat: Tensor, rank: int) -> list[Tensor]:
        """One rank's shards in a flat buffer that holds one rank's part, without the padding."""
        shards = []
        for piece, (_, parameter) in zip(flat.split(self.padded), self.parameters, strict=True):
            rows = self.shard(parameter, rank)
            shards.append(piece[: rows.numel()].view(rows.shape))
        return shards


class BucketStates:
    """States of ZeRO 0 and 1 on one rank."""

    def __init__(self, build: Build) -> None:
        strategy = build.strategy
        self.build = build
        alone = build.mesh is None
        replicated = not alone and "replicate" in build.mesh.mesh_dim_names
        sharded = strategy.zero_stage == 1 and not alone
        self.shard_mesh = build.mesh["shard"] if sharded else None
        self.shard_group = self.shard_mesh.get_group() if self.shard_mesh is not None else None
        self.replica_group = build.mesh["replicate"].get_group() if sharded and replicated else None
        self.data_group = None if alone else build.requests["data_group"]
        self.num_shards = strategy.zero_group_size if sharded else 1
        self.rank = self.shard_mesh.get_local_rank() if self.shard_mesh is not None else 0
        self.has_master = build.precision in ("bf16", "fp16") and strategy.states != "pure"
        build.module.to(DTYPES[build.precision])

    def fill(self, weights: Weights) -> None:
        build = self.build
        build.module.to_empty(device=build.device)
        self.buckets = [Bucket(parameters, self.num_shards) for parameters in _units(build.module)]
        self.masters: dict[str, nn.Parameter] = {}
        with torch.no_grad():
            for name, parameter, bucket in self._all():
                whole = weights(name, parameter.shape)
                rows = bucket.shard(parameter, self.rank)
                parameter.copy_(whole)
                local = bucket.shard(whole, self.rank).to(build.device, torch.float32) if self.has_master else rows
                self.masters[name] = nn.Parameter(local.detach(), requires_grad=False)
        steps = [
            (self.masters[name], parameter.dim()) for name, parameter, _ in self._all() if self.masters[name].numel()
        ]
        self.adam = Adam(steps, build.optimizer)
        self.local: dict[str, Tensor] = {}

    def _all(self) -> list[tuple[str, nn.Parameter, Bucket]]:
        return [(name, parameter, bucket) for bucket in self.buckets for name, parameter in bucket.parameters]

    def begin(self) -> None:
        for bucket in self.buckets:
            bucket.gradients.zero_()

    def micro_batch(self, *, first: bool, last: bool) -> None:
        """Gradients add up locally; they are reduced once, after the last micro batch."""

    def reduce(self) -> None:
        for bucket in reversed(self.buckets):
            grads = [p.grad for _, p in bucket.parameters if p.grad is not None]
            if self.num_shards == 1:
                if self.data_group is not None:
                    dist.all_reduce(bucket.gradients, group=self.data_group)
                mine = [bucket.shard(grad, 0) for grad in grads]
            else:
                rank_major = bucket.to_rank_major(grads)
                shard = rank_major.new_empty(rank_major.numel() // self.num_shards)
                _reduce_scatter(shard, rank_major, group=self.shard_group)
                if self.replica_group is not None:
                    dist.all_reduce(shard, group=self.replica_group)
                mine = [bucket.shard(grad, self.rank) for grad in grads]
                for into, piece in zip(mine, bucket.pieces(shard, self.rank), strict=True):
                    into.copy_(piece)
            self.local.update(zip((name for name, _ in bucket.parameters), mine, strict=True))

    def squared_norm(self) -> Tensor:
        total = squared_norm(self.local.values())
        if self.shard_group is not None:
            dist.all_reduce(total, group=self.shard_group)
        return total

    def update(self, *, scale: Tensor, learning_rate: float) -> None:
        for name, master in self.masters.items():
            master.grad = self.local[name].to(master.dtype).mul_(scale.to(master.dtype))
        self.adam.step(learning_rate)
        for master in self.masters.values():
            master.grad = None
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        """The stepped shards back into the parameters of all replicas."""
        for bucket in self.buckets:
            parameters = [parameter for _, parameter in bucket.parameters]
            if self.has_master:
                for name, parameter in bucket.parameters:
                    bucket.shard(parameter, self.rank).copy_(self.masters[name])
            if self.num_shards == 1:
                continue
            own = bucket.gradients.new_zeros(sum(bucket.padded))
            for piece, parameter in zip(bucket.pieces(own, self.rank), parameters, strict=True):
                piece.copy_(bucket.shard(parameter, self.rank))
            gathered = own.new_empty(own.numel() * self.num_shards)
            _all_gather(gathered, own, group=self.shard_group)
            for rank, flat in enumerate(gathered.chunk(self.num_shards)):
                for piece, parameter in zip(bucket.pieces(flat, rank), parameters, strict=True):
                    bucket.shard(parameter, rank).copy_(piece)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, parameter, _ in self._all():
            master = self.masters[name]
            empty = master.new_zeros(master.shape)
            moments = self.adam.moments(master) if master.numel() else (empty, empty)
            state[f"model.{name}"] = self._global(master.detach(), parameter)
            state[f"optimizer.exp_avg.{name}"] = self._global(moments[0], parameter)
            state[f"optimizer.exp_avg_sq.{name}"] = self._global(moments[1], parameter)
        return state

    def _global(self, local: Tensor, parameter: Tensor) -> Tensor:
        if self.num_shards == 1:
            return local
        stride = torch.empty(parameter.shape, device="meta").stride()
        return DTensor.from_local(
            local, self.shard_mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=stride
        )

    def loaded(self, step: int) -> None:
        self.adam.set_step(step)
        self._publish()

    def tensors(self) -> dict[str, list[Tensor]]:
        moments = [moment for master in self.masters.values() if master.numel() for moment in self.adam.moments(master)]
        return {
            "parameters": [parameter for _, parameter, _ in self._all()],
            "gradients": [bucket.gradients for bucket in self.buckets],
            "master_weights": list(self.masters.values()) if self.has_master else [],
            "optimizer_states": moments,
        }


def _units(module: Any) -> list[list[tuple[str, nn.Parameter]]]:
    """Parameters by block, what stands outside the blocks first; names as the whole module has them."""
    blocks = {id(parameter): i for i, block in enumerate(module.blocks) for parameter in block.parameters()}
    units: list[list[tuple[str, nn.Parameter]]] = [[] for _ in range(len(module.blocks) + 1)]
    for name, parameter in module.named_parameters():
        units[blocks.get(id(parameter), -1) + 1].append((name, parameter))
    return [unit for unit in units if unit]
