"""ZeRO 0 and 1, our own: flat gradient buckets laid out once, reduced in a fixed order, and a sharded AdamW.

torch's DDP rebuilds its buckets by arrival order and its ZeroRedundancyOptimizer keeps no fp32 master; a resumed run
would not be the undisturbed one, bit for bit. Here a bucket is the same parameters at the same offsets, always.

A bucket lies rank-major, [rank 0's shards | rank 1's | ...], each padded to the same length. So it is the input of the
reduce-scatter as it stands, and, once the optimizer has used the gradients up, the output of the parameters' all-gather.
Its reduction starts when its last gradient has arrived in the backward pass of the last micro batch, bucket after bucket.
apply.py says what bytes that holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.engines.collectives import all_gather, reduce_scatter
from strategies.engines.engine import Build
from strategies.strategy import Stage
from strategies.zero.states import DTYPES, Adam, Shard, Weights, make_adam, rows

IN_FLIGHT = 2
"""Reductions or gathers at once, beside what computes; each holds a rank's share of its bucket."""


class Bucket:
    """Parameters whose gradients are reduced together."""

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        num_shards: int,
        rank: int,
        dtype: torch.dtype,
        homes: Sequence[Tensor] | None = None,
    ) -> None:
        self.parameters, self.num_shards, self.rank = parameters, num_shards, rank
        self.homes: Sequence[Tensor] = homes or [parameter for _, parameter in parameters]
        """The home of each parameter between its uses, whole: the parameter itself, unless it is offloaded."""
        self.chunks = [-(-p.shape[0] // num_shards) * (p.numel() // p.shape[0]) for _, p in parameters]
        """Elements of one rank's shard of each parameter, its padding included."""
        self.offsets = [sum(self.chunks[:i]) for i in range(len(self.chunks))]
        self.size = sum(self.chunks)
        """Elements of one rank's part."""
        self.gradients = torch.zeros(num_shards * self.size, dtype=dtype, device=parameters[0][1].device)
        self.filled = [False] * len(parameters)
        self.awaited: set[int] = set()
        """Parameters whose gradient the last micro batch has still to bring."""

    @property
    def part(self) -> Tensor:
        """Return this rank's part."""
        return self.gradients[self.rank * self.size : (self.rank + 1) * self.size]

    def store(self, index: int, gradient: Tensor, share: float = 1.0) -> None:
        """Takes share x one whole gradient: the step's first is copied, the others are added."""
        for region, piece in self._regions(self.gradients, index, gradient):
            if self.filled[index]:
                region.add_(piece, alpha=share)
            else:
                region.copy_(piece)
                if share != 1.0:
                    region.mul_(share)
        self.filled[index] = True

    def fill(self) -> None:
        """Gradients that never came are zero."""
        for index, filled in enumerate(self.filled):
            if not filled:
                for region, _ in self._regions(self.gradients, index, self.homes[index]):
                    region.zero_()

    def unpack(self, flat: Tensor) -> None:
        """A gathered buffer into the parameters."""
        for index, home in enumerate(self.homes):
            for region, piece in self._regions(flat, index, home):
                piece.copy_(region)

    def mine(self, part: Tensor) -> list[Tensor]:
        """Return this rank's shards in a buffer of one rank's part, without the padding."""
        shards = [rows(home, self.num_shards, self.rank) for home in self.homes]
        return [
            part[offset : offset + shard.numel()].view(shard.shape)
            for offset, shard in zip(self.offsets, shards, strict=True)
        ]

    def _regions(self, flat: Tensor, index: int, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(place in the rank-major buffer, piece of the whole tensor): all full shards at once, then the short one."""
        by_rank, linear = flat.view(self.num_shards, self.size), whole.detach().reshape(-1)
        offset, chunk = self.offsets[index], self.chunks[index]
        full, rest = divmod(linear.numel(), chunk)
        yield by_rank[:full, offset : offset + chunk], linear[: full * chunk].view(full, chunk)
        if rest:
            yield by_rank[full, offset : offset + rest], linear[full * chunk :]


class BucketStates:
    """States of ZeRO 0 and 1 on one rank: replicas of one shard each (stage 0: one shard, the whole)."""

    share = 1.0

    def __init__(self, build: Build, weights: Weights) -> None:
        self.build, self.device = build, build.device
        self.num_shards, self.num_replicas = build.requests.num_shards, build.requests.num_replicas
        self.shard_group, self.replica_group = build.requests.shard_group, build.requests.replica_group
        rank = build.requests.shard_rank
        dtype = DTYPES[build.precision]
        self.has_master = dtype.itemsize == 2
        gradient_dtype = torch.float32 if build.strategy.states == "mixed_fp32_gradients" else dtype
        _materialize(build.module, dtype, build.device, hollow=build.requests.homes is not None)
        # Offload may put parameters, and what Adam keeps, elsewhere.
        self.streams: Any = build.requests.homes(build) if build.requests.homes else None
        homes: dict[nn.Parameter, Tensor] = self.streams.homes if self.streams else {}
        self.buckets = [
            Bucket(
                parameters,
                num_shards=self.num_shards,
                rank=rank,
                dtype=gradient_dtype,
                homes=[homes.get(parameter, parameter) for _, parameter in parameters],
            )
            for parameters in _layout(build.module, build.bucket_bytes, gradient_dtype.itemsize)
        ]
        self.adam: Adam = make_adam(build, build.device, torch.promote_types(dtype, torch.float32))
        self.shards = [self._fill(bucket, weights) for bucket in self.buckets]
        self.frozen = [homes.get(p, p.detach()) for p in build.module.parameters() if not p.requires_grad]
        """Homes of what is not trained: no bucket, no gradient, no state."""
        self._fill_frozen(weights, homes)
        self.next, self.last = 0, False
        self.flying: deque[tuple[Bucket, Tensor | None, Any]] = deque()
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, bucket, index))
            for bucket in self.buckets
            for index, (_, parameter) in enumerate(bucket.parameters)
        ]

    @torch.no_grad()
    def _fill(self, bucket: Bucket, weights: Weights) -> list[Shard]:
        shards = []
        for (name, parameter), home in zip(bucket.parameters, bucket.homes, strict=True):
            whole = weights(name, parameter.shape)
            home.copy_(whole)
            source = whole if self.has_master else home.detach()
            local = rows(source, self.num_shards, bucket.rank)
            shards.append(self.adam.shard(name, parameter.shape, local, apart=self.has_master))
        return shards

    @torch.no_grad()
    def _fill_frozen(self, weights: Weights, homes: dict[nn.Parameter, Tensor]) -> None:
        for name, parameter in self.build.module.named_parameters():
            if not parameter.requires_grad:
                homes.get(parameter, parameter).copy_(weights(name, parameter.shape))

    def begin(self) -> None:
        self.next, self.last = 0, False
        for bucket in self.buckets:
            bucket.filled = [False] * len(bucket.parameters)
            bucket.awaited = set(range(len(bucket.parameters)))

    def micro_batch(self, *, last: bool) -> None:
        """Gradients add up locally; they are reduced once a step."""
        self.last = last

    def backward(self, stage: Stage, *, last: bool, done: bool) -> None:
        """The same; what an earlier pass left on the device goes."""
        self.last = last
        self.settle()

    def deferred(self, weight: nn.Parameter, following: nn.Parameter | None, *, done: bool) -> None:
        """Nothing waits for a block's."""

    @torch.no_grad()
    def _arrived(self, bucket: Bucket, index: int, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        bucket.store(index, gradient, self.share)
        if self.last:
            bucket.awaited.discard(index)
            while self.next < len(self.buckets) and not self.buckets[self.next].awaited:
                self._launch()

    def _launch(self) -> None:
        """Starts the reduction of the next bucket; the order is the layout's on every rank, whichever is full first."""
        bucket = self.buckets[self.next]
        self.next += 1
        if self.num_shards > 1:
            part = torch.empty_like(bucket.part)
            work = reduce_scatter(part, bucket.gradients, group=self.shard_group, async_op=True)
            self.flying.append((bucket, part, work))
            if len(self.flying) == IN_FLIGHT:
                self._land()
        elif self.num_replicas > 1:
            work = dist.all_reduce(bucket.gradients, group=self.replica_group, async_op=True)
            self.flying.append((bucket, None, work))

    def _land(self) -> None:
        bucket, part, work = self.flying.popleft()
        work.wait()
        if part is not None:
            if self.num_replicas > 1:
                dist.all_reduce(part, group=self.replica_group)
            bucket.part.copy_(part)

    @torch.no_grad()
    def reduce(self) -> None:
        self.settle()
        for bucket in self.buckets[self.next :]:
            bucket.fill()
        while self.next < len(self.buckets):
            self._launch()
        while self.flying:
            self._land()

    def gradients(self) -> dict[str, Tensor]:
        return {
            name: gradient
            for bucket in self.buckets
            for (name, _), gradient in zip(bucket.parameters, bucket.mine(bucket.part), strict=True)
        }

    @torch.no_grad()
    def update(self, *, scale: float, learning_rate: float) -> None:
        self.adam.advance()
        for bucket, shards in zip(self.buckets, self.shards, strict=True):
            part, into = self._targets(bucket, shards)
            self.adam.step(shards, bucket.mine(bucket.part), into, scale=scale, learning_rate=learning_rate)
            self._publish(bucket, part)
        self._published(0)

    def _targets(self, bucket: Bucket, shards: Sequence[Shard]) -> tuple[Tensor | None, list[Tensor]]:
        """(this rank's part to gather from, where each stepped shard goes); without other shards the parameters."""
        if self.num_shards == 1:
            return None, [h.detach() if s.apart else s.master for h, s in zip(bucket.homes, shards, strict=True)]
        part = torch.zeros(bucket.size, dtype=bucket.parameters[0][1].dtype, device=self.device)
        return part, bucket.mine(part)

    def _publish(self, bucket: Bucket, part: Tensor | None) -> None:
        """A part into the parameters of all replicas; the bucket's gradients are overwritten."""
        if part is None:
            return
        dtype = part.dtype
        whole = bucket.gradients.view(dtype)[: bucket.size * self.num_shards]
        work = all_gather(whole, part, group=self.shard_group, async_op=True)
        self.flying.append((bucket, part, work))
        self._published(IN_FLIGHT - 1)

    def _published(self, allowed: int) -> None:
        while len(self.flying) > allowed:
            bucket, part, work = self.flying.popleft()
            work.wait()
            assert part is not None
            bucket.unpack(bucket.gradients.view(part.dtype)[: bucket.size * self.num_shards])

    def settle(self) -> None:
        """Parameters are whole all the time, unless they live elsewhere."""
        if self.streams is not None:
            self.streams.settle()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for shards in self.shards:
            for shard in shards:
                state |= shard.whole(self.build)
        return state

    @torch.no_grad()
    def loaded(self, step: int) -> None:
        for bucket, shards in zip(self.buckets, self.shards, strict=True):
            part, into = self._targets(bucket, shards)
            self.adam.loaded(step, shards, into)
            self._publish(bucket, part)
        self._published(0)

    def tensors(self) -> dict[str, list[Tensor]]:
        shards = [shard for shards in self.shards for shard in shards]
        kept: dict[str, list[Tensor]] = {
            "parameters": [*(home.detach() for bucket in self.buckets for home in bucket.homes), *self.frozen],
            "gradients": [bucket.gradients for bucket in self.buckets],
            **self.adam.tensors(shards),
        }
        if self.streams is None:
            return kept
        # Parameters on the device come and go.
        kept["parameters"] = []
        return {k: kept.get(k, []) + self.streams.tensors().get(k, []) for k in {**kept, **self.streams.tensors()}}

    def close(self) -> None:
        """Hooks go too: a parameter holds its hook, the hook these states, and no collector sees through autograd."""
        for hook in self.hooks:
            hook.remove()
        self.adam.close()
        if self.streams is not None:
            self.streams.close()


def _materialize(module: nn.Module, dtype: torch.dtype, device: torch.device, *, hollow: bool) -> None:
    """New, unfilled parameters in place of those on the meta device; one that stands in two places stays one. (Module.to
    swaps a tensor's contents, which a trace's fake tensors do not allow.) hollow: without memory until they are needed."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter not in made:
                values = torch.empty(parameter.shape, dtype=dtype, device=device)
                made[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                if hollow:
                    made[parameter].untyped_storage().resize_(0)
            setattr(part, name, made[parameter])


def _layout(module: nn.Module, bucket_bytes: int, itemsize: int) -> list[list[tuple[str, nn.Parameter]]]:
    """Trained parameters from last to first, as backward finishes them, in buckets of at most so many bytes (or one
    parameter)."""
    buckets: list[list[tuple[str, nn.Parameter]]] = []
    room = 0
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    for name, parameter in reversed(trained):
        num_bytes = parameter.numel() * itemsize
        if num_bytes > room:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append((name, parameter))
        room -= num_bytes
    return buckets
