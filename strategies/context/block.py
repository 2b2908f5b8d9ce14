"""Attention of some queries over some keys with its log-sum-exp, so that parts over other keys can be merged to the whole.

softmax over two sets of keys is the mean of the softmax over each, weighted by exp(log-sum-exp) (arXiv:2205.14135, section 3.1).
Backward needs no part's own softmax: with the log-sum-exp and the output of the whole, each part of the gradient is exact.

B micro batch, A heads, Q queries, T keys, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ATEN = torch.ops.aten


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which parts are merged and added up: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def forward(
    q_BAQD: Tensor, k_BATD: Tensor, v_BATD: Tensor, *, causal: bool, bias: Tensor | None, flash: bool
) -> tuple[Tensor, Tensor]:
    """Return (y_BAQD, lse_BAQ) over these keys alone; lse is at least fp32, -inf where a query sees none of them.

    Args:
        causal: query i sees the keys up to i; queries and keys are as many.
        bias: added to the scores, of a shape that broadcasts to [B, A, Q, T]; -inf hides a key.
        flash: without a [Q, T] table where a kernel of torch does that; otherwise scores are written out."""
    if flash and q_BAQD.device.type == "cpu":
        mask = _masked(bias, q_BAQD, k_BATD, causal) if bias is not None else None
        y, lse = ATEN._scaled_dot_product_flash_attention_for_cpu(
            q_BAQD, k_BATD, v_BATD, 0.0, causal and mask is None, attn_mask=mask
        )
        if mask is not None:  # this kernel says 0 of a query that sees nothing
            blind = (mask == float("-inf")).all(-1).expand(lse.shape)
            lse = lse.masked_fill(blind, float("-inf"))
        return y, lse.to(wide(q_BAQD.dtype))
    if flash and has_cuda_kernel(q_BAQD, bias):
        y, lse, *_ = ATEN._scaled_dot_product_flash_attention(q_BAQD, k_BATD, v_BATD, 0.0, causal)
        return y, lse
    scores = _scores(q_BAQD, k_BATD, causal, bias)
    lse = scores.logsumexp(-1)
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    return (scores - finite[..., None]).exp().to(v_BATD.dtype) @ v_BATD, lse


def backward(
    gradient: Tensor,
    q_BAQD: Tensor,
    k_BATD: Tensor,
    v_BATD: Tensor,
    y_BAQD: Tensor,
    lse_BAQ: Tensor,
    *,
    causal: bool,
    bias: Tensor | None,
    flash: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this part's gradients of queries, keys and values. Output and log-sum-exp are those over all keys."""
    if flash and q_BAQD.device.type == "cpu":
        mask = _masked(bias, q_BAQD, k_BATD, causal) if bias is not None else None
        return _three(
            ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient, q_BAQD, k_BATD, v_BATD, y_BAQD, lse_BAQ, 0.0, causal and mask is None, attn_mask=mask
            )
        )
    if flash and has_cuda_kernel(q_BAQD, bias):
        # The state of a dropout that is not there.
        state, unused = (torch.empty(n, dtype=torch.uint64, device=q_BAQD.device) for n in (2, 0))
        lengths = q_BAQD.shape[2], k_BATD.shape[2]
        return _three(
            ATEN._scaled_dot_product_flash_attention_backward(
                gradient, q_BAQD, k_BATD, v_BATD, y_BAQD, lse_BAQ, None, None, *lengths, 0.0, causal, state, unused
            )
        )
    scale = 1 / math.sqrt(q_BAQD.shape[-1])
    shares = (_scores(q_BAQD, k_BATD, causal, bias) - lse_BAQ[..., None]).exp()
    of_shares = (gradient @ v_BATD.transpose(-1, -2)).to(shares.dtype)
    delta = (gradient.to(shares.dtype) * y_BAQD.to(shares.dtype)).sum(-1, keepdim=True)
    of_scores = (shares * (of_shares - delta) * scale).to(q_BAQD.dtype)
    of_v = shares.to(gradient.dtype).transpose(-1, -2) @ gradient
    return of_scores @ k_BATD, of_scores.transpose(-1, -2) @ q_BAQD, of_v


def merge(y_BAQD: Tensor, lse_BAQ: Tensor, part_BAQD: Tensor, part_lse_BAQ: Tensor) -> None:
    """Take one more part into y and lse, in place. Each query must see a key in y's parts or in the new one."""
    total = torch.logaddexp(lse_BAQ, part_lse_BAQ)
    y_BAQD.mul_((lse_BAQ - total).exp()[..., None])
    y_BAQD.addcmul_(part_BAQD.to(y_BAQD.dtype), (part_lse_BAQ - total).exp()[..., None])
    lse_BAQ.copy_(total)


def _three(gradients: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = gradients
    return of_q, of_k, of_v


def has_cuda_kernel(q: Tensor, bias: Tensor | None) -> bool:
    """Whether torch's CUDA flash kernel takes a part: 16-bit heads of a multiple of 8 up to 256, and no bias."""
    narrow = q.dtype in (torch.float16, torch.bfloat16)
    return q.device.type == "cuda" and narrow and bias is None and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _scores(q: Tensor, k: Tensor, causal: bool, bias: Tensor | None) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).to(wide(q.dtype)) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    return scores.masked_fill(_future(q, k), float("-inf")) if causal else scores


def _masked(bias: Tensor, q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """The bias in the dtype and the four dimensions that the kernel takes, with the future hidden where it is to be."""
    hidden = bias.masked_fill(_future(q, k), float("-inf")) if causal else bias
    return hidden[(None,) * (4 - hidden.dim())].to(q.dtype)


def _future(q: Tensor, k: Tensor) -> Tensor:
    """[Q, T], true where the key comes after the query."""
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
