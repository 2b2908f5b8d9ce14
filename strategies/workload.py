"""A workload: what a strategy needs to know of a model. Pure numbers: no family, no framework.

Elements and FLOPs are per token and per layer unless a name says otherwise; bytes appear when the precision is known.
h hidden size, f feed-forward size, k key/value width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Split = Literal["column", "row", "vocabulary", "sequence", "replicated", "replicated_partial"]


class Tensor(NamedTuple):
    """One parameter."""

    rows: int
    """Size of the first dimension."""
    width: int
    """Elements of one row."""
    split: Split
    """How tensor parallelism cuts it (strategies/tensor/apply.py says what each means)."""

    @property
    def num_elements(self) -> int:
        return self.rows * self.width


@dataclass(frozen=True, kw_only=True, slots=True)
class Matmul:
    """Linear layers of one shape in a block: [tokens, inputs] x [inputs, outputs]."""

    name: str
    inputs: int
    outputs: int
    split: str
    """column: outputs are split over the tensor group; row: inputs are; whole: neither."""
    count: int = 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Workload:
    """A stack of equal blocks between an embedding and a head. Made once for an architecture and known by its identity, so
    that what is worked out for it can be kept."""

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
    """Parameters of one block."""
    block_replicated_parameters: int
    """Parameters of one block that tensor parallelism does not split: norms and the biases of row-parallel layers."""
    embedding_parameters: int
    """Tokens, positions, projection, norm."""
    position_rows: int
    """Rows of the table of learned positions."""
    head_parameters: int
    """Final norm and projections, and the output table unless it is the embedding's."""
    embedding_tensors: tuple[Tensor, ...]
    """The parameters themselves, in the module's order; the first is the table of tokens, the head's too where it is tied."""
    block_tensors: tuple[Tensor, ...]
    """Parameters of one block, themselves."""
    head_tensors: tuple[Tensor, ...]
    post_norm: bool
    """A block's last act is a norm, whose input is a sum over the tensor group."""
    matmuls: tuple[Matmul, ...]
    """Linear layers of one block."""
    saved_whole_elements: int
    """Elements a token leaves for backward in one block that tensor parallelism alone does not split: inputs and outputs of
    the norms, 4 h."""
    saved_split_elements: int
    """The split ones, without attention's scores and dropout: q, k, v, attention's output and what the feed-forward keeps.
    OPT: 4 h + f, 24 sbh bytes a layer with the whole ones in 16 bit: ReLU's output is also the next product's input, so
    34 sbh of arXiv:2205.05198 (GeLU, with dropout's two masks) is not its number."""
    selective_whole_elements: int
    """Elements that selective checkpointing keeps in their place: the block's input and the outputs of its row-parallel
    products."""
    selective_split_elements: int
    """The split ones: outputs of the products and of attention; the element-wise rest is computed again."""
    traffic_whole_elements: int
    """Elements read and written outside the products by one forward pass, not split: two fused norms, two residual sums."""
    unfused_norm_elements: int
    """The same that norms made of separate kernels add (RMS in torch: fp32 copy, square, mean, scale, cast); 0 where the
    family's norm is one kernel anyway."""
    traffic_split_elements: int
    """The split ones: activation, gate, rotary embedding, transposes."""
    num_kernels: int
    """Kernels of one block's forward pass."""
    recomputed_split_elements: int
    """Elements a token that selective checkpointing holds more of the split ones when it has made a layer again."""
    attention_bias: bool
    """Scores carry a bias (ALiBi as BLOOM's stack adds it) that flash kernels do not take: unfused attention runs."""
    trained: Workload | None = None
    """What is trained where the rest is frozen, adapters (LoRA): their parameters and products alone. None: everything is."""
    trained_columns: int = 2
    """Inputs of column-parallel products in a block, of the two, that a gradient of weights needs."""
    adapter_elements: int = 0
    """Elements a token leaves for backward between the two products of all adapters of a block, whole on each rank."""
    adapter_rows: int = 0
    """Row-parallel products of a block that have an adapter."""
    eight_bit: bool = False
    """The optimizer's moments take 8 bits where they can (strategies/zero/eight_bit.py)."""
    native: bool
    """The bytes are those of the project's own module and loss; otherwise those of the stacks that published the family."""
    num_outputs: int
    """Columns of the head's output: the vocabulary, or 1 of a value head."""
    bias_heads: int = 0
    """Heads whose bias (ALiBi) the project's module writes out for each layer, as one number for each query and key."""
    own_masks: bool = False
    """Each row says itself which tokens are seen (packed samples, blank filling): a mask of queries and keys a row and layer."""
    rotation_elements: int = 0
    """Elements that a layer keeps of each position for rotary queries and keys, sines and cosines."""
    embedding_saved_elements: int = 0
    """Elements a token that the embedding leaves for backward beside ids and positions: the input of its norm."""

    @property
    def takes_masks(self) -> bool:
        """Attention of the project's module is given a mask, so that no kernel skips what causal attention does not see."""
        return self.bias_heads > 0 or self.own_masks

    @property
    def trains(self) -> Workload:
        """Return the part of the model that has gradients and optimizer states: all of it, or the adapters."""
        return self.trained or self

    @property
    def num_parameters(self) -> int:
        return self.embedding_parameters + self.num_layers * self.block_parameters + self.head_parameters

    @property
    def num_up(self) -> int:
        """Return the matrices at the feed-forward's entrance: 2 with a gate."""
        return next((matmul.count for matmul in self.matmuls if matmul.name == "up"), 1)

    @property
    def block_matmul_elements(self) -> int:
        """Multiply-adds of one token in one block's linear layers."""
        return sum(matmul.count * matmul.inputs * matmul.outputs for matmul in self.matmuls)

    def model_flops_per_token(self, sequence_length: int) -> float:
        """Forward and backward, attention over the whole square: 6 N + 12 L h s (PaLM, arXiv:2204.02311, app. B), with N
        the weights that multiply, the head's table among them. Of frozen weights 4 N: they have no gradient."""
        weights = self.num_layers * self.block_matmul_elements + self.num_outputs * self.embedding_size
        of_weights = 6.0 * weights
        if self.trained is not None:
            of_weights = 4.0 * weights + 6.0 * self.num_layers * self.trained.block_matmul_elements
        return of_weights + 12.0 * self.num_layers * self.num_heads * self.head_dim * sequence_length

    def recomputed_flops_per_token(self, num_layers: int, sequence_length: int) -> float:
        """One more forward pass of so many layers: what hfu counts and mfu does not."""
        attention = 4.0 * self.num_heads * self.head_dim * sequence_length
        return num_layers * (2.0 * self.block_matmul_elements + attention)
