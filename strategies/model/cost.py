"""The model itself, priced: parameters of blocks, embedding and head, and what its loss and a block's backward pass hold.

This is no strategy, but the first entry of the list of rooms: the others change what stands here."""

from __future__ import annotations

from collections.abc import Mapping

from strategies.constants import MemoryConstants
from strategies.price.roofline import Roofline
from strategies.rank import MicroBatchBytes, ModelStates, PassSeconds, Question, Shape, Share, StateBytes
from strategies.room import Room
from strategies.sizes import part
from strategies.strategy import Strategy
from strategies.workload import Workload

LOSS_BYTES = 64
"""Bytes that both ends of the project's own model keep of a token beside activations: its id, position, target and where that
stands, that it counts and is here, its largest logit and partition function and what the loss's backward pass makes of them,
the mean and deviation of the last norm."""
CHUNK_ELEMENTS = 2**22
"""Logits that the project's own loss widens at once (strategies/engines/token_losses.py, which imports torch)."""
VOCABULARY_PARALLEL = ("mixed_fp32_accumulators", "mixed_fp32_gradients")
"""States of the stacks whose loss never gathers logits: Megatron and nanotron. A tied table is theirs too."""


def block_parameters(work: Workload, split: int) -> float:
    """Return the parameters of one block on one rank of a tensor group of `split`."""
    replicated = work.block_replicated_parameters
    return (work.block_parameters - replicated) / split + replicated


def num_tables(work: Workload, *, embedding: bool, head: bool) -> int:
    """Return how many tables of tokens a rank holds: a tied one serves both ends."""
    return max(embedding, head) if work.tied_embeddings else embedding + head


def table_parameters(work: Workload, split: int) -> int:
    """Return the parameters of the table of tokens on one rank: rows are dealt whole."""
    return -(-work.vocab_size // split) * work.embedding_size


def outside_parameters(work: Workload, split: int, *, embedding: bool, head: bool) -> float:
    """Return the parameters outside the blocks on one rank: tables are split by rows; in the project's own modules norms and
    projections are whole."""
    outside = 0.0
    if embedding:
        outside += work.embedding_parameters
    if head:
        outside += work.head_parameters
        if work.tied_embeddings and not embedding:
            outside += work.vocab_size * work.embedding_size
    if split == 1 or not work.native:
        return outside / split
    tables = num_tables(work, embedding=embedding, head=head)
    positions = work.position_rows * embedding
    outside -= tables * work.vocab_size * work.embedding_size + positions * work.hidden_size
    return outside + tables * table_parameters(work, split) + -(-positions // split) * work.hidden_size


def stepped_parameters(work: Workload, split: int, share: Share, *, is_pipelined: bool) -> float:
    """Return the parameters of the slowest pipeline rank, with the embedding or its tied copy, as the optimizer steps them."""
    outside, work = 0.0, work.trains
    if share.embedding:
        outside += work.embedding_parameters
    if share.head:
        outside += work.head_parameters
    elif is_pipelined and not share.embedding:
        outside += work.embedding_parameters  # the first stage's reduction is as late as anybody's
    return share.layers * block_parameters(work, split) + outside / split


def gathers_logits(work: Workload, strategy: Strategy, split: int) -> bool:
    """Whether an untied head beside tensor parallelism is a plain column-parallel linear whose outputs are gathered (LLaMA's
    own code), as everywhere except in the project's own stack and those of VOCABULARY_PARALLEL."""
    return split > 1 and not work.tied_embeddings and not work.native and strategy.states not in VOCABULARY_PARALLEL


def logit_bytes(
    work: Workload, strategy: Strategy, constants: MemoryConstants, *, split: int, tokens: int, element: int
) -> tuple[float, float]:
    """Return the bytes of one micro batch's logits and what the loss makes of them: (at the loss, one copy of the logits).

    The project's own loss keeps the logits and their gradient in the logits' dtype, and a few numbers a token. Published
    stacks hold fp32 copies, some of gathered logits."""
    local = tokens * work.num_outputs / split
    if work.native:
        local = float(tokens * -(-work.num_outputs // split))
        kept = element * local + LOSS_BYTES * tokens
        return element * local + kept, kept
    wide = element / 2
    total = constants.kept_logit_bytes * wide * local
    if gathers_logits(work, strategy, split):
        total += constants.gathered_logit_bytes * wide * local * split
    return total, element * local


def widened_bytes(work: Workload, split: int, *, tokens: int, element: int) -> float:
    """Return the bytes of one micro batch's logits that the project's own loss works on at once: 16 bit is widened first, a
    loss split over the vocabulary takes the largest off; and behind the first chunk, the one before is still there."""
    columns = -(-work.num_outputs // split)
    rows = min(tokens, max(1, CHUNK_ELEMENTS // columns))
    copies = 1 if rows == tokens else 2
    if element == 2:
        copies += 1
    elif split == 1:
        return 0.0
    return float(copies * max(4, element) * rows * columns)


def working_bytes(work: Workload, split: int, tokens: int, element: int) -> float:
    """Return the bytes of the feed-forward's backward pass in the project's own modules: gradients of ReLU's output and input,
    of the residual stream and of the norm's output; or, where weights are larger than activations, one of its weight gradients
    in place of the second. An adapter's gradients come beside those of its linear layer."""
    wide = tokens * work.ffn_size / split
    if work.trained is not None:
        narrow = 2 * tokens * work.adapter_elements + work.trained.block_parameters / split
        return element * (2 * wide + 3 * tokens * work.hidden_size + narrow)
    weight = work.ffn_size * work.hidden_size / split
    vectors = 4 * work.hidden_size  # gradients of norms and biases
    return element * (wide + max(wide, weight) + 2 * tokens * work.hidden_size + vectors)


def pending_elements(work: Workload, split: int) -> float:
    """Return the elements a token of one layer between the halves of a split backward pass: inputs of the products and gradients
    of their outputs, where weights are trained. Whole ones are whole beside sequence parallelism too, gathered for the pass over
    the inputs."""
    elements = 0.0
    for matmul in work.trains.matmuls:
        elements += matmul.inputs / (split if matmul.split == "row" else 1)
        elements += matmul.count * matmul.outputs / (split if matmul.split == "column" else 1)
    return elements


def _adapters_alone(trained: Workload, states: ModelStates, split: int, share: Share) -> ModelStates:
    """Return the states of a rank whose adapters alone are trained, and a value head where it holds one."""
    block = block_parameters(trained, split)
    largest = max(part(tensor, split, 0).num_elements for tensor in trained.block_tensors)
    outside = float(trained.head_parameters * share.head)
    return states._replace(
        trained=share.layers * block + outside,
        trained_block=block,
        trained_outside=outside,
        owned=share.layers * block + outside,
        largest=largest,
        table=0,
        matrix=largest,
    )


class Model(Room):
    """The blocks, the embedding, the head and the loss, split as the rooms say."""

    name = "model"
    reads: Mapping[str, tuple[str, ...]] = {
        "micro_batch": ("micro_batch_size", "states"),
        "pass_s": ("micro_batch_size", "attention", "fused_norm", "compile"),
    }

    def model_states(
        self, question: Question, strategy: Strategy, shape: Shape, share: Share, states: ModelStates
    ) -> ModelStates:
        work, split = question.work, shape.split
        block = block_parameters(work, split)
        outside = outside_parameters(work, split, embedding=share.embedding, head=share.head)
        matrix = work.ffn_size * work.hidden_size / split
        table = work.vocab_size * work.embedding_size if outside else 0
        parameters = share.layers * block + outside
        states = states._replace(
            gpu=StateBytes(0.0, 0.0, 0.0, 0.0),
            parameters=parameters,
            block=block,
            outside=outside,
            trained=parameters,
            trained_block=block,
            trained_outside=outside,
            owned=parameters,
            largest=max(table, work.ffn_size * work.hidden_size) / split,
            table=table_parameters(work, split),
            matrix=matrix,
        )
        return states if work.trained is None else _adapters_alone(work.trained, states, split, share)

    def micro_batch(
        self, question: Question, strategy: Strategy, shape: Shape, micro: MicroBatchBytes
    ) -> MicroBatchBytes:
        work, constants, element, split = question.work, question.constants, question.element, shape.split
        tokens = shape.tokens(question, strategy)
        hidden = float(tokens * work.hidden_size * element)
        scatters = shape.whole_split > 1
        at_loss, copy = logit_bytes(work, strategy, constants, split=split, tokens=tokens, element=element)
        final = hidden * 2 / shape.whole_split
        # Whole gradients, and the part that is scattered from them; of several samples they are put in the ranks' order in a
        # copy.
        gradients = (2 + (scatters and strategy.micro_batch_size > 1)) * hidden + final / 2 * scatters
        # An adapter's output and the sum with its linear layer's are made before either goes.
        wide = hidden * work.ffn_size / work.hidden_size / split * (1 if work.trained is None else 3)
        return micro._replace(
            hidden=hidden,
            logits_at_loss=at_loss,
            logits_copy=copy,
            widened=widened_bytes(work, split, tokens=tokens, element=element),
            working=working_bytes(work, split, tokens, element) if work.native else constants.working_elements * hidden,
            # Gradients of the gate's and the other product, and three of the residual stream's size, in place of four saved.
            gated_end=3 * hidden - 2 * wide,
            # With mean and deviation of two norms, in 32 bit.
            pending=tokens * (element * pending_elements(work, split) + 4 * 4),
            final=final,
            numbers=16.0 * tokens + element * work.embedding_saved_elements * tokens / shape.whole_split,
            residual=hidden / shape.whole_split,
            # Seen or not, one byte for each query and key; a position in 64 bits.
            context=float(tokens * (question.sequence_length + 8)) if work.own_masks else 0.0,
            head_gradients=gradients,
            attention_end=3 * hidden + 2 * final if scatters else 4 * hidden,
            wide=wide + (gradients - hidden if scatters else hidden * (1 + (split > 1))),
        )

    def pass_s(self, roof: Roofline, question: Question, strategy: Strategy, shape: Shape) -> tuple[PassSeconds, ...]:
        tokens = shape.tokens(question, strategy)
        layer = roof.layer(strategy, shape, tokens, question.sequence_length)
        return (
            PassSeconds("compute_s", layer=layer.forward_s + layer.backward_s, head=roof.head(tokens, shape.split)),
        )


ROOM = Model()
