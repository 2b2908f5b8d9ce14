"""The loss: cross entropy summed over the target tokens, in fp32 at least, never all of it at once.

torch's cross_entropy on 16-bit logits keeps an fp32 copy, its log-softmax and an fp32 gradient: 12 bytes an element.
Here the logits stay in their own dtype and are widened a few rows at a time.

Bytes (V vocabulary, N tokens of a micro batch, e bytes of the parameters): logits e N V from the head's forward to its
backward, their gradient e N V from the loss's backward on, and a chunk of CHUNK_ELEMENTS in fp32 while it is at work
(backward in fp32 and fp64 needs none; on a CPU, which widens before it sums, 16-bit logits need two).

N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
CHUNK_ELEMENTS = 2**22
"""Logits that are widened at once: 16 MiB in fp32."""


def token_loss(logits_NV: Tensor, targets_N: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """(cross entropy, cross entropy + z_loss x log-partition squared), each summed over the tokens that count, in nats.

    The second is what is trained (PaLM, arXiv:2204.02311, section 5), the first what is told and has no gradient."""
    apply: Any = _TokenLoss.apply
    result: tuple[Tensor, Tensor] = apply(logits_NV, targets_N, z_loss)
    return result


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        counted_N = targets_N != IGNORED
        index_N1 = targets_N.clamp(min=0)[:, None]
        losses, partitions = [], []
        for rows in chunks(logits_NV):
            picked = torch.log_softmax(logits_NV[rows], -1, dtype=wide).gather(1, index_N1[rows])
            losses.append(-picked[:, 0])
            partitions.append((logits_NV[rows].gather(1, index_N1[rows]) - picked)[:, 0])
        zero = logits_NV.new_zeros((), dtype=wide)
        partition_N = torch.cat(partitions)
        loss = torch.where(counted_N, torch.cat(losses), zero).sum()
        total = loss + z_loss * torch.where(counted_N, partition_N.square(), zero).sum() if z_loss else loss.clone()
        ctx.z_loss = z_loss
        ctx.save_for_backward(logits_NV, index_N1, counted_N, partition_N)
        ctx.mark_non_differentiable(loss)
        return loss, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, index_N1, counted_N, partition_N = ctx.saved_tensors
        wide = partition_N.dtype
        result_NV = torch.empty_like(logits_NV)
        weight_N1 = torch.where(counted_N, gradient.to(wide), 0.0)[:, None]
        for rows in chunks(logits_NV):
            into = result_NV[rows]
            if into.dtype == wide:
                probability = torch.softmax(logits_NV[rows], -1, out=into)
            else:
                probability = torch.softmax(logits_NV[rows], -1, dtype=wide)
            if ctx.z_loss:
                probability.mul_(1 + 2 * ctx.z_loss * partition_N[rows, None])
            index = index_N1[rows]
            probability.scatter_(1, index, probability.gather(1, index) - 1)
            probability.mul_(weight_N1[rows])
            if into.dtype != wide:
                into.copy_(probability)
        return result_NV, None, None


def chunks(logits_NV: Tensor) -> list[slice]:
    """Rows to be widened at once."""
    rows, columns = logits_NV.shape
    size = max(1, CHUNK_ELEMENTS // columns)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
