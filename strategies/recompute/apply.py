"""Activation checkpointing, done to a module: a block's forward is wrapped in place, so that no parameter changes its name.

Recompute happens inside the block's own FSDP unit: a ZeRO-3 gather is not repeated for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from strategies.engines.engine import Build

SAVED_BY_SELECTIVE: list[Any] = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
]
"""Selective keeps what is dear to compute and computes the element-wise rest again."""


def apply(build: Build) -> Build:
    """Wraps the first `num_checkpointed_layers` blocks of each stage (all of them where the strategy names no stage).

    With `compile`, each block's forward is compiled with the wrapping inside, so that the compiler sees what to save; the
    hooks that ZeRO hangs on a block stay outside."""
    strategy = build.strategy
    kind = strategy.activation_checkpointing
    again = {i for s in strategy.stages for i in range(s.first_layer, s.first_layer + s.num_checkpointed_layers)}
    blocks: Any = build.module.blocks
    for name, block in blocks.named_children():
        if kind != "none" and (int(name) in again or not strategy.stages):
            block.forward = _again(block.forward, selective=kind == "selective")
        if strategy.compile:
            block.forward = torch.compile(block.forward)
    return build


def _again(forward: Callable[..., Any], *, selective: bool) -> Callable[..., Any]:
    contexts = partial(create_selective_checkpoint_contexts, SAVED_BY_SELECTIVE) if selective else None

    def wrapped(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        options: dict[str, Any] = {"context_fn": contexts} if contexts else {}
        # No dropout is built, so there is no random state to keep.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)

    return wrapped
