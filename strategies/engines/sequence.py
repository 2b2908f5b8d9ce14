"""The sequences of a micro batch as one rank holds them: where its tokens stand, and how they attend to all others.

A module asks its `sequence`, so that one forward serves a rank that holds whole sequences and one that holds a part of each.

B micro batch, A heads, K key/value heads, S sequence, D head dim, Q queries, T keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Bias = Callable[[Tensor, Tensor], Tensor]
"""(places of queries, places of keys) in the whole sequence -> what is added to their scores, [..., Q, T]."""


class WholeSequence:
    """Every sequence is whole on this rank."""

    size = 1
    """Ranks that hold a part of each sequence."""

    def places(self, length: int, device: torch.device) -> Tensor:
        """Return the places in the whole sequence of the `length` tokens that this rank holds, [S]."""
        return torch.arange(length, device=device)

    def attention(self, q_BASD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, *, flash: bool, bias: Bias | None) -> Tensor:
        """Return causal attention of this rank's queries over all keys of their sequences, y_BASD.

        Args:
            flash: no table of scores is written where a kernel of torch does without."""
        if (group := q_BASD.shape[1] // k_BKSD.shape[1]) > 1:  # grouped-query heads (arXiv:2305.13245)
            k_BKSD, v_BKSD = k_BKSD.repeat_interleave(group, 1), v_BKSD.repeat_interleave(group, 1)
        mask = None
        if bias is not None:
            places_S = self.places(q_BASD.shape[2], q_BASD.device)
            # Of four dimensions, as flash attention on a CPU wants it: of three it writes the scores out.
            mask = bias(places_S, places_S)[None].masked_fill(future(q_BASD), float("-inf"))
        if flash:
            return F.scaled_dot_product_attention(q_BASD, k_BKSD, v_BKSD, attn_mask=mask, is_causal=mask is None)
        scores = q_BASD @ k_BKSD.transpose(-1, -2) / math.sqrt(q_BASD.shape[-1])
        scores = scores.masked_fill(future(q_BASD), float("-inf")) if mask is None else scores + mask
        return scores.softmax(-1) @ v_BKSD


def future(q_BASD: Tensor) -> Tensor:
    """Return [S, S], true where the key comes after the query."""
    sequence = q_BASD.shape[2]
    return torch.ones(sequence, sequence, dtype=torch.bool, device=q_BASD.device).triu(1)


WHOLE_SEQUENCE = WholeSequence()
"""The sequences of a module until a room splits them."""
