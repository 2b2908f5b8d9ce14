"""Ring attention (arXiv:2310.01889): each rank keeps its queries, keys and values travel around the group.

At step i a rank has the keys and values of rank r - i, computes its queries' part over them and merges it, while the next ones
arrive. Backward travels once more; the gradients of keys and values go with them, each rank adds its part, and after c steps they
are home. Per layer and micro batch a rank sends

    forward     c - 1 times keys and values, [2, B, K, S, D]
    backward    c - 1 times the same, and c times their gradients in at least fp32

A rank's sends and receives of a step are one batch, so that on NCCL the first use of the communicator is one call of all ranks,
and ranks that all send first do not wait for each other.

B micro batch, A heads, K key/value heads, S this rank's tokens, D head dim, c context_parallel_degree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from strategies.context import block
from strategies.context.halves import Part, part, positions

Bias = Callable[[Tensor, Tensor], Tensor]
"""(places of queries, places of keys) in the whole sequence -> what is added to their scores, [..., Q, T]; -inf hides a key."""


class Ring:
    """The ranks of a context group in a circle, and the tokens that this one holds."""

    def __init__(self, group: Any, *, rank: int, size: int) -> None:
        """`rank`: of this process in the group. A ring of one has no group: None."""
        self.group, self.rank, self.size = group, rank, size
        if size > 1:
            self.next = dist.get_global_rank(group, (rank + 1) % size)
            self.before = dist.get_global_rank(group, (rank - 1) % size)

    def places(self, sequence: int, device: torch.device | str) -> Tensor:
        """Return the places in the whole sequence of this rank's tokens, [S]."""
        return self._places(self.rank, sequence, device)

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's part of what is whole along the sequence."""
        return x.index_select(dim, self.places(x.shape[dim], x.device))

    def _places(self, rank: int, sequence: int, device: torch.device | str) -> Tensor:
        first, second = positions(rank, self.size, sequence)
        return torch.cat([torch.arange(half.start, half.stop, device=device) for half in (first, second)])

    def pass_on(self, tensor: Tensor) -> Passing:
        """Send a tensor to the next rank and receive as large a one from the rank before; returns at once."""
        tensor = tensor.contiguous()
        arriving = torch.empty_like(tensor)
        work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, self.next, group=self.group),
                dist.P2POp(dist.irecv, arriving, self.before, group=self.group),
            ]
        )
        return Passing(work, tensor, arriving)

    def attention(
        self, q_BASD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, *, flash: bool = True, bias: Bias | None = None
    ) -> Tensor:
        """Causal attention of this rank's queries over the keys of all ranks, y_BASD. Collective over the ring, forward and
        backward. Heads may be grouped: A is a multiple of K, and K of them travel. ValueError where this rank's tokens are not
        two even chunks."""
        positions(self.rank, self.size, q_BASD.shape[2] * self.size)
        apply: Any = _RingAttention.apply
        result: Tensor = apply(q_BASD, k_BKSD, v_BKSD, self, flash, bias)
        return result

    def cut(self, at: Part, source: int, sequence: int, bias: Bias | None, device: torch.device) -> Tensor | None:
        """Return the bias of one part of queries x keys."""
        if bias is None:
            return None
        half = sequence // (2 * self.size)
        queries, keys = self._places(self.rank, sequence, device), self._places(source, sequence, device)
        return bias(queries[_span(at.queries, half)], keys[_span(at.keys, half)])


class Passing:
    """A tensor on its way to the next rank, and one from the rank before."""

    def __init__(self, work: list[Any], sent: Tensor, arriving: Tensor) -> None:
        self.work, self.sent, self.arriving = work, sent, arriving

    def wait(self) -> Tensor:
        """Return what has arrived. What was sent may be let go afterwards."""
        for work in self.work:
            work.wait()
        return self.arriving


class Saved(NamedTuple):
    """The tensors that a forward pass leaves for backward."""

    q_BASD: Tensor
    k_BKSD: Tensor
    v_BKSD: Tensor
    y_BASD: Tensor
    lse_BAS: Tensor


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BASD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, ring: Ring, flash: bool, bias: Bias | None
    ) -> Tensor:
        y_BASD, lse_BAS = _forward(q_BASD, k_BKSD, v_BKSD, ring, flash, bias)
        y_BASD = y_BASD.to(q_BASD.dtype)
        ctx.ring, ctx.flash, ctx.bias = ring, flash, bias
        ctx.save_for_backward(*Saved(q_BASD, k_BKSD, v_BKSD, y_BASD, lse_BAS))
        return y_BASD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _backward(gradient, Saved(*ctx.saved_tensors), ctx.ring, ctx.flash, ctx.bias)
        return *gradients, None, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, ring: Ring, flash: bool, bias: Bias | None) -> tuple[Tensor, Tensor]:
    """Return (y, log-sum-exp) over the keys of all ranks, in at least fp32."""
    half, sequence, group = q.shape[2] // 2, q.shape[2] * ring.size, q.shape[1] // k.shape[1]
    held = torch.stack([k, v])
    y = lse = q.new_empty(0)
    for step in range(ring.size):
        source = (ring.rank - step) % ring.size
        passing = ring.pass_on(held) if step < ring.size - 1 else None
        at = part(ring.rank, source)
        queries = _span(at.queries, half)
        keys, values = (_heads(x[:, :, _span(at.keys, half)], group) for x in held)
        added = ring.cut(at, source, sequence, bias, q.device)
        part_y, part_lse = block.forward(q[:, :, queries], keys, values, causal=at.causal, bias=added, flash=flash)
        if step == 0:  # each query sees itself, so no log-sum-exp is -inf from here on
            # Copies: they are merged into in place, and selective recompute keeps what a kernel returned.
            y, lse = part_y.to(block.wide(q.dtype), copy=True), part_lse.clone(memory_format=torch.contiguous_format)
        else:
            block.merge(y[:, :, queries], lse[:, :, queries], part_y, part_lse)
        held = passing.wait() if passing else held
    return y, lse


def _backward(
    gradient: Tensor, saved: Saved, ring: Ring, flash: bool, bias: Bias | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of this rank's queries, keys and values, in the dtype of each."""
    q, k, v, y, lse = saved
    half, sequence, group = q.shape[2] // 2, q.shape[2] * ring.size, q.shape[1] // k.shape[1]
    held = torch.stack([k, v])
    of_q = torch.zeros_like(q, dtype=block.wide(q.dtype))
    of_held = torch.zeros_like(held, dtype=of_q.dtype)
    homeward: Passing | None = None
    for step in range(ring.size):
        source = (ring.rank - step) % ring.size
        passing = ring.pass_on(held) if step < ring.size - 1 else None
        at = part(ring.rank, source)
        queries, taken = _span(at.queries, half), _span(at.keys, half)
        keys, values = (_heads(x[:, :, taken], group) for x in held)
        mine = gradient[:, :, queries], q[:, :, queries]
        whole = y[:, :, queries], lse[:, :, queries].contiguous()
        added = ring.cut(at, source, sequence, bias, q.device)
        parts = block.backward(*mine, keys, values, *whole, causal=at.causal, bias=added, flash=flash)
        of_q[:, :, queries] += parts[0]
        if homeward is not None:  # what the ranks before have added to the gradients of the keys that are here now
            of_held = homeward.wait()
            homeward = None  # and with it what this rank sent
        for of_one, of_part in zip(of_held, parts[1:], strict=True):
            of_one[:, :, taken] += _grouped(of_part.to(of_q.dtype), group)
        del parts  # before there is another tensor for what arrives
        homeward = ring.pass_on(of_held) if ring.size > 1 else None
        held = passing.wait() if passing else held
    of_held = homeward.wait() if homeward else of_held
    return of_q.to(q.dtype), of_held[0].to(k.dtype), of_held[1].to(v.dtype)


def _span(halves: tuple[int, int], half: int) -> slice:
    return slice(halves[0] * half, halves[1] * half)


def _heads(x_BKTD: Tensor, group: int) -> Tensor:
    """Each key/value head as often as query heads share it (arXiv:2305.13245)."""
    return x_BKTD.repeat_interleave(group, 1) if group > 1 else x_BKTD


def _grouped(x_BATD: Tensor, group: int) -> Tensor:
    """The sum over the query heads that share a key/value head."""
    return x_BATD.unflatten(1, (-1, group)).sum(2) if group > 1 else x_BATD
