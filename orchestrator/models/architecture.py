"""Model families and published sizes: shapes, exact parameter counts and the Workload of each. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["opt", "gpt", "mpt", "llama", "bloom", "glm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The shape of a decoder. Fields up to tied_embeddings are the job file's; the rest follow from family and name."""

    family: Family
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    vocab_size: int
    max_position: int
    tied_embeddings: bool
    name: str = ""
    word_embedding_size: int | None = None
    """Width of the embedding where projections lead to hidden_size and back (OPT-350M: 512). None: hidden_size."""
    post_norm: bool = False
    """OPT-350M: LayerNorm after the residual, no final norm."""
    dropout: float = 0.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads
