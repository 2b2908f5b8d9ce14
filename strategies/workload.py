"""What a strategy needs to know of a model. Pure numbers: no family, no framework.

Elements and FLOPs are per token and per layer unless a name says otherwise; bytes appear when the precision is known.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Matmul:
    """One linear layer of a block: [tokens, inputs] x [inputs, outputs]."""

    name: str
    inputs: int
    outputs: int
    split: str
    """column: outputs are split over the tensor group; row: inputs are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A stack of equal blocks between an embedding and a head."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    head_dim: int
    kv_size: int
    """Width of all keys of a token."""
    vocab_size: int
    embedding_size: int
    tied_embeddings: bool
    block_parameters: int
    """Of one block."""
    block_replicated_parameters: int
    """Those of them that tensor parallelism does not split: norms and the biases of row-parallel layers."""
    embedding_parameters: int
    head_parameters: int
    """Final norm and projections, and the output table unless it is the embedding's."""
    matmuls: tuple[Matmul, ...]
    """Of one block."""
    saved_elements: int
    """Elements a token leaves for backward in one block, flash attention, no dropout; those of attention's own scores
    apart. OPT: 12 h (24 sbh bytes in 16 bit): ReLU's output is also the next product's input, so 34 sbh of
    arXiv:2205.05198 (GeLU, with dropout) is not its number."""
    saved_elements_selective: int
    """The same where matrix products and attention are kept and the element-wise rest is computed again."""
    elementwise_elements: int
    """Elements a token's forward pass reads and writes in one block outside the products (norms, activation, residuals)."""
    num_kernels: int
    """Kernels of one block's forward pass."""

    @property
    def num_parameters(self) -> int:
        return self.embedding_parameters + self.num_layers * self.block_parameters + self.head_parameters

    @property
    def block_matmul_elements(self) -> int:
        """Multiply-adds of one token in one block's linear layers."""
        return sum(matmul.inputs * matmul.outputs for matmul in self.matmuls)

    def model_flops_per_token(self, sequence_length: int) -> float:
        """Forward and backward, attention over the whole square: 6 N + 12 L h s (PaLM, arXiv:2204.02311, app. B), with N
        the weights that multiply, the head's table among them."""
        weights = self.num_layers * self.block_matmul_elements + self.vocab_size * self.embedding_size
        return 6.0 * weights + 12.0 * self.num_layers * self.num_heads * self.head_dim * sequence_length
