"""The region in which a module's tensors are split over the tensor group, and the collectives at the borders.

A module asks its `region` for the products at the borders, so that one forward serves any degree: Region leaves all whole,
SplitRegion is Megatron's (arXiv:1909.08053, section 3; with sequence parallel arXiv:2205.05198, section 4.2). Messages of
one micro batch, of [B, S, H] each, per border:

                          forward                            backward
  into columns            none / all-gather                  all-reduce / all-gather again, reduce-scatter
  out of a row, `leave`   all-reduce / reduce-scatter        none / all-gather

the second with sequence parallel, where a rank keeps S / t of every activation outside and gathers an input again for its
weights' gradient instead of keeping it whole.

B micro batch, S sequence, H hidden, V vocabulary, t tensor_parallel_degree.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from strategies.engines.collectives import all_gather, reduce_scatter
from strategies.engines.token_losses import token_losses

Pending = list[tuple[nn.Parameter, Tensor, Tensor]]
"""(weight, gradient of the output, input) of products whose weight gradient is still to be computed."""


class Region:
    """Nothing is split."""

    rank = 0
    """Rank of this process in the tensor group."""

    def __init__(self) -> None:
        self.pending: Pending | None = None
        """A schedule that runs the gradients of weights apart collects them here; None: autograd computes them at once."""

    def boundary_shape(self, batch: int, sequence: int, hidden: int) -> tuple[int, int, int]:
        """Return the shape of an activation between two blocks, on one rank."""
        return batch, sequence, hidden

    def columns(self, x_BSH: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
        """Each linear of the same input; the outputs are this rank's."""
        return tuple(self._product(x_BSH, linear, linear.bias) for linear in linears)

    def row(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """A linear whose inputs are this rank's; the output is whole."""
        return self._product(x, linear, linear.bias)

    def rows(self, table: nn.Embedding, ids: Tensor) -> Tensor:
        """Rows of a table. Split: those this rank holds, zero for the others, to be summed by `leave`."""
        return F.embedding(ids, table.weight)

    def leave(self, x_BSH: Tensor) -> Tensor:
        """Sums what each rank has computed in part."""
        return x_BSH

    def logits(self, x_BSH: Tensor, weight_VH: Tensor) -> Tensor:
        """The output table; [B, S, V / t]."""
        return F.linear(x_BSH, weight_VH)

    def whole(self, x_BS: Tensor) -> Tensor:
        """Return a number for each token: those of all tokens, on every rank, which go on from there alike."""
        return x_BS

    def token_losses(self, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """See engines/token_losses.py."""
        return token_losses(logits_NV, targets_N)

    def _product(self, x: Tensor, linear: nn.Linear, bias: Tensor | None) -> Tensor:
        """This rank's part of a linear, with what its adapter adds where it has one (orchestrator/models/lora.py)."""
        y = self._linear(x, linear.weight, bias)
        return self._adapted(y, self._linear(x, linear.lora_a, None), linear) if is_adapted(linear) else y

    def _adapted(self, y: Tensor, narrow: Tensor, linear: Any) -> Tensor:
        """A linear's output and its adapter's, of which the first product is done."""
        return y + self._linear(narrow * linear.lora_scale, linear.lora_b, None)

    def _linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        if self.pending is None or not torch.is_grad_enabled() or not weight.requires_grad:
            return F.linear(x, weight, bias)
        apply: Any = _Deferred.apply
        result: Tensor = apply(x, bias, weight, self.pending)
        return result


class SplitRegion(Region):
    """Columns, rows and vocabulary over a group."""

    def __init__(self, group: Any, *, rank: int, size: int, sequence_parallel: bool, num_rows: int) -> None:
        super().__init__()
        self.group, self.rank, self.size, self.sequence_parallel = group, rank, size, sequence_parallel
        self.vocabulary_start = rank * -(-num_rows // size)

    def boundary_shape(self, batch: int, sequence: int, hidden: int) -> tuple[int, int, int]:
        if not self.sequence_parallel:
            return batch, sequence, hidden
        if sequence % self.size:
            raise ValueError(
                f"sequence_parallel splits a sequence of {sequence} tokens over tensor_parallel_degree {self.size}, which "
                "does not divide it; set a sequence_length that it divides, or sequence_parallel: false"
            )
        return batch, sequence // self.size, hidden

    def columns(self, x_BSH: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
        if not self.sequence_parallel:
            copy: Any = _Copy.apply
            return super().columns(copy(x_BSH, self.group), *linears)
        adapted = [linear for linear in linears if is_adapted(linear)]
        own = [(linear.weight, linear.bias) for linear in linears]
        first: list[tuple[Any, None]] = [(linear.lora_a, None) for linear in adapted]
        outputs = self._gathered(x_BSH, *own, *first)
        narrow = dict(zip(adapted, outputs[len(linears) :], strict=True))
        return tuple(
            self._adapted(y, narrow[linear], linear) if linear in narrow else y
            for y, linear in zip(outputs, linears, strict=False)
        )

    def row(self, x: Tensor, linear: nn.Linear) -> Tensor:
        result = self.leave(self._product(x, linear, None))
        return result if linear.bias is None else result + linear.bias

    def rows(self, table: nn.Embedding, ids: Tensor) -> Tensor:
        start = self.rank * -(-table.num_embeddings // self.size)
        local = ids - start
        foreign = (local < 0) | (local >= table.weight.shape[0])
        return F.embedding(local.masked_fill(foreign, 0), table.weight).masked_fill(foreign[..., None], 0.0)

    def leave(self, x_BSH: Tensor) -> Tensor:
        self.boundary_shape(*x_BSH.shape)
        apply: Any = _ReduceScatter.apply if self.sequence_parallel else _Reduce.apply
        result: Tensor = apply(x_BSH, self.group)
        return result

    def logits(self, x_BSH: Tensor, weight_VH: Tensor) -> Tensor:
        if not self.sequence_parallel:
            copy: Any = _Copy.apply
            return F.linear(copy(x_BSH, self.group), weight_VH)
        pending, self.pending = self.pending, None
        (result,) = self._gathered(x_BSH, (weight_VH, None))
        self.pending = pending
        return result

    def whole(self, x_BS: Tensor) -> Tensor:
        if not self.sequence_parallel:
            return x_BS
        apply: Any = _Whole.apply
        result: Tensor = apply(x_BS, self.group, self.rank)
        return result

    def token_losses(self, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        from strategies.tensor.loss import vocabulary_parallel_losses

        return vocabulary_parallel_losses(logits_NV, targets_N, start=self.vocabulary_start, group=self.group)

    def _gathered(self, x_BSH: Tensor, *linears: tuple[Any, Tensor | None]) -> tuple[Tensor, ...]:
        weights, biases = [weight for weight, _ in linears], [bias for _, bias in linears]
        if not torch.is_grad_enabled():
            whole = gathered(x_BSH, self.group)
            return tuple(F.linear(whole, weight, bias) for weight, bias in linears)
        apply: Any = _GatheredColumns.apply
        result: tuple[Tensor, ...] = apply(x_BSH, self.group, self.pending, weights, *weights, *biases)
        return result


def is_adapted(linear: nn.Module) -> bool:
    """Whether a linear has an adapter."""
    return "lora_a" in linear._parameters


WHOLE = Region()
"""The region of a module until a room splits it."""


def gathered(x: Tensor, group: Any) -> Tensor:
    """[B, S / t, H] of each rank -> [B, S, H]."""
    size = dist.get_world_size(group)
    parts = x.new_empty((size, *x.shape))
    all_gather(parts.view(-1), x.contiguous().view(-1), group=group)  # flat: gloo reads no other shape
    return parts.transpose(0, 1).reshape(x.shape[0], size * x.shape[1], *x.shape[2:])


def scattered(x: Tensor, group: Any) -> Tensor:
    """[B, S, H], a part of a sum on each rank -> this rank's [B, S / t, H] of the sum."""
    size = dist.get_world_size(group)
    batch, sequence, hidden = x.shape
    parts = x.reshape(batch, size, sequence // size, hidden).transpose(0, 1).contiguous()
    result = x.new_empty((batch, sequence // size, hidden))
    reduce_scatter(result.view(-1), parts.view(-1), group=group)
    return result


def _summed(x: Tensor, group: Any) -> Tensor:
    # Not in place: autograd and selective checkpointing may hold the part.
    result = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _summed(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return scattered(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gathered(gradient, ctx.group), None


class _Whole(torch.autograd.Function):
    """[B, S / t] of each rank -> [B, S]. Every rank has the same gradient of the whole, and takes its part of it."""

    @staticmethod
    def forward(ctx: Any, x_BS: Tensor, group: Any, rank: int) -> Tensor:
        ctx.start, ctx.length = rank * x_BS.shape[1], x_BS.shape[1]
        return gathered(x_BS[..., None], group)[..., 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BS: Tensor) -> tuple[Tensor, None, None]:
        return gradient_BS.narrow(1, ctx.start, ctx.length).contiguous(), None, None


class _GatheredColumns(torch.autograd.Function):
    """Linears of a gathered input, of which only this rank's part is kept; nothing where no weight wants a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Any, pending: Pending | None, leaves: list[Any], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        count = len(leaves)
        weights, biases = tensors[:count], tensors[count:]
        ctx.group, ctx.pending, ctx.leaves, ctx.biased = group, pending, leaves, [b is not None for b in biases]
        ctx.trained = [weight.requires_grad for weight in leaves]
        ctx.save_for_backward(x if any(ctx.trained) else None, *weights)
        whole = gathered(x, group)
        return tuple(F.linear(whole, w, b) for w, b in zip(weights, biases, strict=True))  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        whole = gathered(x, ctx.group) if any(ctx.trained) else None
        result = None
        of_weights: list[Tensor | None] = []
        of_biases: list[Tensor | None] = []
        for index, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            part = gradient @ weight
            result = part if result is None else result.add_(part)
            of_biases.append(gradient.flatten(0, -2).sum(0) if ctx.biased[index] else None)
            of_weights.append(None)
            if whole is None or not ctx.trained[index]:
                continue
            if ctx.pending is None:
                of_weights[-1] = weight_gradient(gradient, whole)
            else:
                ctx.pending.append((ctx.leaves[index], gradient, whole))
        assert result is not None
        return scattered(result, ctx.group), None, None, None, *of_weights, *of_biases


class _Deferred(torch.autograd.Function):
    """A linear whose backward pass leaves the weight's gradient for later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Any, pending: Pending) -> Tensor:
        ctx.leaf, ctx.pending, ctx.biased = weight, pending, bias is not None
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        # Detached: its history would keep the stage's input until the weights' pass.
        ctx.pending.append((ctx.leaf, gradient, x.detach()))
        return gradient @ weight, gradient.flatten(0, -2).sum(0) if ctx.biased else None, None, None


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """[outputs, inputs] of a linear, from its output's gradient and its input."""
    return gradient.flatten(0, -2).t() @ x.flatten(0, -2)
