"""Chains of blocks: which of a rank run one after the other."""

from __future__ import annotations

from typing import Any

from torch import nn

from strategies.engines.engine import Build


def chains(build: Build) -> list[list[nn.Module]]:
    """All blocks, or under a pipeline those of each stage of this rank, in the model's order."""
    blocks: Any = build.module.blocks
    held = build.requests.held
    if not held:
        return [list(blocks)]
    return [[blocks._modules[str(s.first_layer + i)] for i in range(s.num_layers)] for s in held]
