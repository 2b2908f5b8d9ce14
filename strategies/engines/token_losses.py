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


def token_losses(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """(cross entropy, log-partition) of each token, in nats and in fp32 at least; both 0 where a token does not count."""
    apply: Any = _TokenLosses.apply
    result: tuple[Tensor, Tensor] = apply(logits_NV, targets_N)
    return result


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        counted_N = targets_N != IGNORED
        index_N1 = targets_N.clamp(min=0)[:, None]
        losses, partitions = [], []
        for rows in chunks(logits_NV):
            picked = torch.log_softmax(logits_NV[rows], -1, dtype=wide).gather(1, index_N1[rows])
            losses.append(-picked[:, 0])
            partitions.append((logits_NV[rows].gather(1, index_N1[rows]) - picked)[:, 0])
        zero = logits_NV.new_zeros((), dtype=wide)
        ctx.save_for_backward(logits_NV, index_N1, counted_N)
        return torch.where(counted_N, torch.cat(losses), zero), torch.where(counted_N, torch.cat(partitions), zero)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses_N: Tensor | None, of_partition_N: Tensor | None) -> tuple[Tensor, None]:
        logits_NV, index_N1, counted_N = ctx.saved_tensors
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        weight_N1, ratio_N1 = backward_weights(counted_N, of_losses_N, of_partition_N, wide)
        result_NV = torch.empty_like(logits_NV)
        for rows in chunks(logits_NV):
            into = result_NV[rows]
            if into.dtype == wide:
                probability = torch.softmax(logits_NV[rows], -1, out=into)
            else:
                probability = torch.softmax(logits_NV[rows], -1, dtype=wide)
            if ratio_N1 is not None:
                probability.mul_(ratio_N1[rows])
            index = index_N1[rows]
            probability.scatter_(1, index, probability.gather(1, index) - 1)
            probability.mul_(weight_N1[rows])
            if into.dtype != wide:
                into.copy_(probability)
        return result_NV, None


def backward_weights(
    counted_N: Tensor, of_losses_N: Tensor | None, of_partition_N: Tensor | None, wide: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(w, r), each [N, 1], so that the gradient of a token's logits is w x (r x softmax - one-hot of its target).

    r is None where it is 1: nothing depends on the partition. A loss without a gradient cannot come with a partition that
    has one."""
    assert of_losses_N is not None
    weight_N1 = torch.where(counted_N, of_losses_N.to(wide), 0.0)[:, None]
    if of_partition_N is None:
        return weight_N1, None
    share_N1 = torch.where(counted_N, of_partition_N.to(wide), 0.0)[:, None]
    return weight_N1, 1 + torch.where(weight_N1 == 0, 0.0, share_N1 / weight_N1)


def chunks(logits_NV: Tensor) -> list[slice]:
    """Rows to be widened at once."""
    rows, columns = logits_NV.shape
    size = max(1, CHUNK_ELEMENTS // columns)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
