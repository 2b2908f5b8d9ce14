"""The norms of the families' blocks: LayerNorm, and an RMSNorm that keeps no more on a CPU than on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from orchestrator.models.architecture import Architecture


class _RMSNormOnCpu(torch.autograd.Function):
    """RMSNorm that keeps its input and one number a row for backward, as CUDA's kernel does. torch's on a CPU keeps two copies in
    fp32 in their place: 6 of the 17 numbers a token and hidden element of a LLaMA layer. A few rows at a time, so that what is
    widened stays small."""

    CHUNK_ELEMENTS: ClassVar[int] = 2**18

    @staticmethod
    def _chunks(x: Tensor) -> Iterator[slice]:
        rows = max(1, _RMSNormOnCpu.CHUNK_ELEMENTS // x.shape[-1])
        for start in range(0, len(x), rows):
            yield slice(start, start + rows)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        rows_NH, y_NH = x.flatten(0, -2), torch.empty_like(x, memory_format=torch.contiguous_format).flatten(0, -2)
        scale_N1 = x.new_empty((len(rows_NH), 1), dtype=torch.promote_types(x.dtype, torch.float32))
        for chunk in _RMSNormOnCpu._chunks(rows_NH):
            wide_NH = rows_NH[chunk].to(scale_N1.dtype)
            scale_N1[chunk] = torch.rsqrt(wide_NH.pow(2).mean(-1, keepdim=True) + epsilon)
            y_NH[chunk] = wide_NH * scale_N1[chunk] * weight
        ctx.save_for_backward(x, weight, scale_N1)
        return y_NH.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale_N1 = ctx.saved_tensors
        rows_NH, gradient_NH = x.flatten(0, -2), gradient.flatten(0, -2)
        of_x_NH = torch.empty_like(rows_NH, memory_format=torch.contiguous_format)
        of_weight_H = scale_N1.new_zeros(x.shape[-1])
        for chunk in _RMSNormOnCpu._chunks(rows_NH):
            normed_NH = rows_NH[chunk].to(scale_N1.dtype) * scale_N1[chunk]
            wide_NH = gradient_NH[chunk].to(scale_N1.dtype)
            of_weight_H += (wide_NH * normed_NH).sum(0)
            wide_NH = wide_NH * weight
            of_x_NH[chunk] = scale_N1[chunk] * (wide_NH - normed_NH * (wide_NH * normed_NH).mean(-1, keepdim=True))
        return of_x_NH.view(x.shape), of_weight_H.to(weight.dtype), None


class RMSNorm(nn.RMSNorm):
    """x [..., H] divided by the root of its mean square, times a weight; computed in fp32 at least."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled():
            y: Tensor = _RMSNormOnCpu.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return y
        return super().forward(x)


def make_norm(arch: Architecture) -> nn.Module:
    """The family's norm over the hidden size: LayerNorm with or without a bias, or RMSNorm (arXiv:1910.07467)."""
    if arch.traits.norm == "rms":
        return RMSNorm(arch.hidden_size, eps=arch.norm_epsilon)
    return nn.LayerNorm(arch.hidden_size, eps=arch.norm_epsilon, bias=arch.traits.norm_bias)
