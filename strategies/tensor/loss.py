"""Cross entropy over logits of which each rank of the tensor group holds its part of the vocabulary.

Two messages a micro batch: the largest logit of each token (MAX), then the sum of exponentials and the target's logit
(SUM, [2, N]), both in fp32 (fp64). Source: arXiv:1909.08053, section 3. The full logits are on no rank.

N tokens, V vocabulary; V / t of it on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from strategies.engines.token_losses import IGNORED, backward_weights, chunks


def vocabulary_parallel_losses(
    logits_NV: Tensor, targets_N: Tensor, *, start: int, group: Any
) -> tuple[Tensor, Tensor]:
    """See token_losses; the same on every rank of the group.

    Args:
        start: first token of this rank's part."""
    apply: Any = _SplitLosses.apply
    result: tuple[Tensor, Tensor] = apply(logits_NV, targets_N, start, group)
    return result


class _SplitLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, start: int, group: Any) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        counted_N = targets_N != IGNORED
        index_N = targets_N.clamp(min=0) - start
        mine_N = (index_N >= 0) & (index_N < logits_NV.shape[1])
        index_N1 = index_N.masked_fill(~mine_N, 0)[:, None]
        largest_N = logits_NV.amax(-1).to(wide)
        dist.all_reduce(largest_N, op=dist.ReduceOp.MAX, group=group)
        sums = []
        for rows in chunks(logits_NV):
            sums.append((logits_NV[rows].to(wide) - largest_N[rows, None]).exp_().sum(-1))
        picked_N = logits_NV.gather(1, index_N1)[:, 0].to(wide).masked_fill(~mine_N, 0.0)
        both_2N = torch.stack([torch.cat(sums), picked_N])
        dist.all_reduce(both_2N, group=group)
        partition_N = both_2N[0].log() + largest_N
        zero = logits_NV.new_zeros((), dtype=wide)
        ctx.save_for_backward(logits_NV, index_N1, mine_N, counted_N, partition_N)
        return torch.where(counted_N, partition_N - both_2N[1], zero), torch.where(counted_N, partition_N, zero)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_losses_N: Tensor | None, of_partition_N: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        logits_NV, index_N1, mine_N, counted_N, partition_N = ctx.saved_tensors
        wide = partition_N.dtype
        weight_N1, ratio_N1 = backward_weights(counted_N, of_losses_N, of_partition_N, wide)
        result_NV = torch.empty_like(logits_NV)
        hit_N1 = mine_N.to(wide)[:, None]
        for rows in chunks(logits_NV):
            probability = (logits_NV[rows].to(wide) - partition_N[rows, None]).exp_()
            if ratio_N1 is not None:
                probability.mul_(ratio_N1[rows])
            probability.scatter_add_(1, index_N1[rows], -hit_N1[rows])
            result_NV[rows] = probability.mul_(weight_N1[rows])
        return result_NV, None, None, None
