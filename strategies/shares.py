"""Shares: what each pipeline rank holds, read off a strategy's stages. Pure."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

from strategies.rank import Share
from strategies.strategy import Stage, Strategy


class Shares(NamedTuple):
    """All pipeline ranks' shares."""

    by_rank: tuple[Share, ...]
    distinct: tuple[tuple[Share, int], ...]
    """Each share that differs, and how many ranks hold it."""
    fullest: tuple[int, ...]
    """The ranks that can hold the most: an earlier rank with no smaller share keeps no fewer micro batches in flight."""
    borders: tuple[int, ...]
    """Borders by rank: those of its stages that a micro batch crosses to or from another rank, forward and backward."""
    most_borders: int
    latest: tuple[int, ...]
    """The last rank of each share that differs: where backward passes are split, it waits longest for the weights'."""


_SHARES: dict[int, tuple[tuple[Stage, ...], Shares]] = {}
_MOST_SHARES = 65536


def shares(strategy: Strategy) -> Shares:
    """Cached by the identity of `stages`, which a search hands over again and again (stages.cut keeps them)."""
    stages = strategy.stages
    known = _SHARES.get(id(stages))
    if known is not None and known[0] is stages:
        return known[1]
    if len(_SHARES) >= _MOST_SHARES:
        _SHARES.clear()
    by_rank = _by_rank(stages)
    distinct = Counter(by_rank)
    fullest: list[int] = []
    for share in distinct:
        if not any(_covers(by_rank[earlier], share) for earlier in fullest):
            fullest.append(by_rank.index(share))
    borders = _borders(stages, len(by_rank))
    latest = {share: rank for rank, share in enumerate(by_rank)}
    found = Shares(by_rank, tuple(distinct.items()), tuple(fullest), borders, max(borders), tuple(latest.values()))
    _SHARES[id(stages)] = stages, found
    return found


def _covers(earlier: Share, later: Share) -> bool:
    """Everything in the later share is in the earlier one too."""
    return (
        earlier.layers - earlier.checkpointed >= later.layers - later.checkpointed
        and earlier.checkpointed >= later.checkpointed
        and earlier.embedding >= later.embedding
        and earlier.head >= later.head
    )


def _by_rank(stages: tuple[Stage, ...]) -> tuple[Share, ...]:
    degree = 1 + max((stage.pipeline_rank for stage in stages), default=0)
    layers, checkpointed, slices, embedding, head = [0] * degree, [0] * degree, [0] * degree, -1, -1
    for stage in stages:
        rank = stage.pipeline_rank
        layers[rank] += stage.num_layers
        slices[rank] += 1
        checkpointed[rank] += stage.num_checkpointed_layers
        embedding, head = rank if stage.embedding else embedding, rank if stage.head else head
    return tuple(
        Share(layers[rank], checkpointed[rank], rank == embedding, rank == head, slices[rank]) for rank in range(degree)
    )


def _borders(stages: tuple[Stage, ...], degree: int) -> tuple[int, ...]:
    """Return the borders by rank."""
    ranks = [stage.pipeline_rank for stage in stages]
    touched = Counter(rank for border in pairwise(ranks) if border[0] != border[1] for rank in border)
    return tuple(touched[rank] for rank in range(degree))
