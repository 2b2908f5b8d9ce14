"""Context of a row: positions, who sees whom, and keys of tokens before, as embedding and attention of the decoder need them.

B micro batch, S sequence, Q queries, A heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Cache:
    """Keys and values of the tokens before, by layer, so that a new token costs one token's forward pass.

    Memory: 2 x layers x B x K x D x tokens elements."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k_BKSD: Tensor, v_BKSD: Tensor) -> tuple[Tensor, Tensor]:
        """Adds those of new tokens. Returns those of all tokens."""
        if layer in self._held:
            before_k, before_v = self._held[layer]
            k_BKSD, v_BKSD = torch.cat([before_k, k_BKSD], 2), torch.cat([before_v, v_BKSD], 2)
        self._held[layer] = k_BKSD, v_BKSD
        return k_BKSD, v_BKSD


class Context(NamedTuple):
    """The context of embedding and attention where a row is not simply one sample from its first token on."""

    positions_BS: Tensor
    """Place of each token within its sample."""
    seen_B1QS: Tensor
    """True where a query may see a key: not later, and of the same sample; of blank filling, anywhere in the masked text."""
    cache: Cache | None = None
    """Cache in which the keys begin with those of tokens computed before; the queries are the last of them."""
    block_positions_BS: Tensor | None = None
    """Place of each token within its masked span, from 1; 0 outside. None: 0 everywhere."""


def packed(segment_ids_BS: Tensor) -> Context:
    """Return positions and mask of packed rows. Samples of a row are runs of equal ids: attention never crosses from one to
    another."""
    sequence = segment_ids_BS.shape[1]
    places_S = torch.arange(sequence, device=segment_ids_BS.device)
    first_BS = torch.ones_like(segment_ids_BS, dtype=torch.bool)
    first_BS[:, 1:] = segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1]
    starts_BS = torch.where(first_BS, places_S, 0).cummax(1).values
    same_BSS = starts_BS[:, :, None] == starts_BS[:, None, :]
    seen_BSS = same_BSS & ~future(sequence, segment_ids_BS.device)
    return Context(places_S - starts_BS, seen_BSS[:, None])


def prefixed(prefix_lengths_B: Tensor, positions_B2S: Tensor) -> Context:
    """Return positions and mask of rows of blank filling (GLM, arXiv:2103.10360, section 2.1): every query sees the first tokens
    of its row, the masked text; of the spans behind it only what is not later.

    Args:
        positions_B2S: of each token, its place in the masked text (of a span's, that of the mask), and within the span.
    """
    sequence, device = positions_B2S.shape[2], positions_B2S.device
    places_S = torch.arange(sequence, device=device)
    in_text_BS = places_S < prefix_lengths_B[:, None]
    seen_BSS = in_text_BS[:, None] | ~future(sequence, device)
    return Context(positions_B2S[:, 0], seen_BSS[:, None], block_positions_BS=positions_B2S[:, 1])


def future(sequence: int, device: torch.device) -> Tensor:
    """Return [S, S], true where the key comes after the query."""
    return torch.ones(sequence, sequence, dtype=torch.bool, device=device).triu(1)
