"""AdamW whose moments take 8 bits: bitsandbytes' kernels (arXiv:2110.02861), one scale for 256 elements that follow one another.

A block belongs to the whole parameter and never straddles two shards, so that no split of the model changes what is rounded with
what, and a checkpoint of one split is another's. Which parameters qualify depends on their shape alone (eight_bit.py); a split
whose shards are no whole blocks is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from strategies.engines.engine import Build
from strategies.zero.eight_bit import BLOCK, is_aligned, qualifies, scale_shape
from strategies.zero.states import Adam, Shard, as_global

PIECE_ELEMENTS = 2**22
"""Elements that are stepped at once: on a CPU the kernel widens the moments of all it is given. Whole blocks."""


@dataclass(frozen=True, slots=True)
class BlockShard(Shard):
    """The rows of one parameter whose moments are 8-bit codes."""

    scale: Tensor
    """The largest first moment of each block, of which the codes are parts."""
    scale_sq: Tensor

    def whole(self, build: Build) -> dict[str, Any]:
        found = Shard.whole(self, build)
        layout = build.layout.get(self.name)
        shape = scale_shape(self.shape if layout is None else layout.shape)
        for kind, scale in (("exp_avg", self.scale), ("exp_avg_sq", self.scale_sq)):
            name = f"optimizer.{kind}_scale.{self.name}"
            found[name] = as_global(build, self.name, scale_shape(self.shape), scale, whole=torch.Size(shape))
        return found

    def moments(self) -> tuple[Tensor, ...]:
        return self.exp_avg, self.exp_avg_sq, self.scale, self.scale_sq


class BlockAdam(Adam):
    """AdamW with 8-bit moments of the parameters that qualify; the others' have 32, as in bitsandbytes."""

    def __init__(self, build: Build, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(build.optimizer, device, dtype)
        self.build = build
        if dtype != torch.float32:
            raise ValueError("optimizer.name adamw_8bit steps fp32 masters; set precision to bf16, fp16 or fp32")
        if find_spec("bitsandbytes") is None:
            raise ValueError(
                "optimizer.name adamw_8bit needs the package bitsandbytes: pip install 'shardwise[adam8bit]', or name: adamw"
            )
        with unset_fake_temporarily():  # what a library makes when it is imported is real
            from bitsandbytes.functional import create_dynamic_map

            self.signed, self.unsigned = (create_dynamic_map(signed=signed).to(device) for signed in (True, False))
        self.step_number = 0
        """num_steps again, which the kernel wants on the host."""

    def shard(self, name: str, shape: torch.Size, rows: Tensor, *, apart: bool) -> Shard:
        layout, shards = self.build.layout.get(name), self.build.requests.num_shards
        whole = tuple(shape if layout is None else layout.shape)
        if not qualifies(whole):
            return super().shard(name, shape, rows, apart=apart)
        dim, split = (None, 1) if layout is None else (layout.dim, layout.size)
        if not is_aligned(whole, dim=dim, split=split, shards=shards):
            raise ValueError(
                f"optimizer.name adamw_8bit: tensor_parallel_degree {split} and {shards} shards cut {name}, {list(whole)}, "
                f"within a block of {BLOCK} elements; set another degree or zero_group_size, or name: adamw"
            )
        master = rows.to(self.num_steps.device, self.dtype, copy=True) if apart else rows
        first, second = (torch.zeros(rows.shape, dtype=torch.uint8, device=master.device) for _ in range(2))
        own = scale_shape(tuple(rows.shape)) if rows.numel() else (0, scale_shape(tuple(shape))[1])
        scale, scale_sq = (torch.zeros(own, dtype=torch.float32, device=master.device) for _ in range(2))
        return BlockShard(name, shape, master, first, second, apart, scale, scale_sq)

    def advance(self) -> None:
        super().advance()
        self.step_number += 1

    def loaded(self, step: int, shards: Sequence[Shard], into: Sequence[Tensor]) -> None:
        super().loaded(step, shards, into)
        self.step_number = step

    def update(self, shards: Sequence[Shard], gradients: Sequence[Tensor], learning_rate: float) -> None:
        pairs = list(zip(shards, gradients, strict=True))
        plain = [(s, g) for s, g in pairs if not isinstance(s, BlockShard)]
        if plain:
            super().update([s for s, _ in plain], [g for _, g in plain], learning_rate)
        for shard, gradient in pairs:
            if isinstance(shard, BlockShard):
                self._update(shard, gradient.reshape(-1), learning_rate)

    def _update(self, shard: BlockShard, gradient: Tensor, learning_rate: float) -> None:
        settings = self.settings
        flat = [each.view(-1) for each in (shard.master, shard.exp_avg, shard.exp_avg_sq)]
        scales = [each.view(-1) for each in (shard.scale, shard.scale_sq)]
        for first in range(0, gradient.numel(), PIECE_ELEMENTS):
            piece = slice(first, first + PIECE_ELEMENTS)
            blocks = slice(first // BLOCK, (first + PIECE_ELEMENTS) // BLOCK)
            master, exp_avg, exp_avg_sq = (each[piece] for each in flat)
            torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
                "adam",
                gradient[piece],
                master,
                exp_avg,
                exp_avg_sq,
                settings.betas[0],
                settings.betas[1],
                0.0,
                0.0,
                settings.epsilon,
                self.step_number,
                learning_rate,
                self.signed,
                self.unsigned,
                scales[0][blocks],
                scales[1][blocks],
                settings.weight_decay,
                1.0,
                False,
            )
