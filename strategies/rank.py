"""The values that rooms hand on from one to the next: one rank's share of the work, its bytes, its seconds. Values only. Pure."""

from __future__ import annotations

from typing import NamedTuple

from strategies.constants import MemoryConstants
from strategies.strategy import Strategy
from strategies.workload import Workload


class Question(NamedTuple):
    """The question of a price beside the strategy: the model, the length of a sequence, the precision."""

    work: Workload
    sequence_length: int
    precision: str
    element: int
    """Bytes of an activation."""
    constants: MemoryConstants


class Shape(NamedTuple):
    """How rooms split one sequence's work between the ranks that hold the same layers; every room may divide it further."""

    split: int = 1
    """Ranks that share each product of a block."""
    whole_split: int = 1
    """Ranks that share what lies between the products: the residual stream and the norms."""
    sequence_split: int = 1
    """Ranks that each sequence is cut over before it reaches a block."""

    def tokens(self, question: Question, strategy: Strategy) -> int:
        """Return the tokens of one micro batch that reach a rank."""
        return strategy.micro_batch_size * question.sequence_length // self.sequence_split


class Share(NamedTuple):
    """The layers, and the ends of the model, that one pipeline rank holds."""

    layers: int
    checkpointed: int
    embedding: bool
    head: bool
    stages: int = 1
    """Slices of the model that these layers come from."""

    @property
    def all_checkpointed(self) -> bool:
        return self.checkpointed == self.layers


class StateBytes(NamedTuple):
    """Model state bytes of one rank, by component."""

    parameters: float = 0.0
    gradients: float = 0.0
    master_weights: float = 0.0
    optimizer_states: float = 0.0


class Padding(NamedTuple):
    """Elements that the fullest rank owns beyond its even part, because rows are dealt whole."""

    outside: float = 0.0
    """Elements outside the blocks."""
    block: float = 0.0
    """Elements in one block."""


class ModelStates(NamedTuple):
    """The model's states that one rank holds, in bytes unless a name says otherwise."""

    gpu: StateBytes = StateBytes()
    """States that stay on the accelerator."""
    parameters: float = 0.0
    """Parameters of the rank, a count; whole, before ZeRO deals them out."""
    block: float = 0.0
    """Parameters of one block, a count."""
    outside: float = 0.0
    """Parameters outside the blocks, a count."""
    trained: float = 0.0
    """Parameters of the rank that are trained, a count; whole. The rest is frozen: no gradient, no state of an optimizer."""
    trained_block: float = 0.0
    """Trained parameters of one block, a count."""
    trained_outside: float = 0.0
    """Trained parameters outside the blocks, a count."""
    owned: float = 0.0
    """Parameters that the rank itself steps, a count."""
    largest: float = 0.0
    """Elements of the largest shard that is stepped at once."""
    table: int = 0
    """Trained parameters of the table of tokens, a count, whether the rank holds one or not."""
    matrix: float = 0.0
    """Parameters of a block's largest trained matrix, a count."""
    padding: Padding = Padding()
    """Padding of what is trained."""
    frozen_padding: Padding = Padding()
    """Padding of what is frozen, where that is dealt out too."""
    host_bytes: float = 0.0
    nvme_bytes: float = 0.0
    link_bytes: float = 0.0
    """Bytes that cross the host link in a step, each way."""
    optimizer_bytes_on_host: float = 0.0
    """States that the host's own AdamW steps."""
    streamed: bool = False
    """Parameters live on the host, and come block by block."""


class MicroBatchBytes(NamedTuple):
    """Bytes that one micro batch leaves on a rank, by what leaves them."""

    hidden: float = 0.0
    """One activation of the residual stream, whole."""
    layer: float = 0.0
    """Bytes that a layer saves for its backward pass where nothing is recomputed."""
    checkpointed: float = 0.0
    """Bytes that a checkpointed layer saves."""
    logits_at_loss: float = 0.0
    """Logits and what the loss makes of them."""
    logits_copy: float = 0.0
    """One copy of the logits."""
    widened: float = 0.0
    """Logits that the loss widens at once."""
    working: float = 0.0
    """Bytes that a block's backward pass needs beyond what was saved."""
    gated_end: float = 0.0
    """Bytes that a gated feed-forward's backward pass needs at its end beyond what was saved and gradients of weights, of which
    all three are there; negative, since what it saved is gone by then."""
    recomputed: float = 0.0
    """Activations of a checkpointed layer that are computed again, alive while it goes backward."""
    pending: float = 0.0
    """Bytes that a layer keeps between the halves of a split backward pass."""
    final: float = 0.0
    """Activations that the head keeps: the last block's output and its norm's."""
    numbers: float = 0.0
    """Ids and positions of the tokens."""
    residual: float = 0.0
    """One activation of the residual stream as it is kept: split where sequence parallelism splits it."""
    head_gradients: float = 0.0
    """Gradients of the residual stream alive in the head's backward pass."""
    attention_end: float = 0.0
    """Gradients alive where a block's attention ends, beside what waits for its weights."""
    wide: float = 0.0
    """Activations that a block's forward pass is about to let go: the feed-forward's product, and what comes out."""
    wide_checkpointed: float = 0.0
    """Activations that a checkpointed block's forward pass lets go beside them: all that it does not keep."""
    context: float = 0.0
    """Positions and masks of rows that say themselves which tokens are seen, made once for all layers of a stage."""

    def of(self, share: Share) -> float:
        """Return the bytes that one micro batch leaves in the layers of a rank."""
        layers = share.checkpointed * self.checkpointed + (share.layers - share.checkpointed) * self.layer
        return layers + self.context * share.stages


class InFlight(NamedTuple):
    """Micro batches and gradients that a pipeline rank keeps at one moment, in whole shares of its layers."""

    forward: float
    """Micro batches between forward and backward."""
    inputs: float
    """Micro batches between the halves of a split backward pass."""
    gradients: float
    """Part of its stages that have had gradients of weights in this step."""


class InFlightMaxima(NamedTuple):
    """The fullest moments of a pipeline rank's step, whatever each part weighs."""

    begin: tuple[InFlight, ...]
    """Moments as a backward pass begins; of a split one, the half over the inputs."""
    end: tuple[InFlight, ...]
    """Moments as a backward pass ends; of a split one, the half over the weights."""
    head: tuple[InFlight, ...]
    """Moments as the head's backward pass begins."""
    forward: tuple[InFlight, ...]
    """Moments as a forward pass ends."""


class SavedActivations(NamedTuple):
    """Activations of all micro batches in flight on one pipeline rank, in bytes, and how the rank runs its passes."""

    before_backward: float = 0.0
    """The most bytes as a backward pass begins."""
    peak_in_backward: float = 0.0
    """The most bytes in a backward pass."""
    freed_by_backward: float = 0.0
    """Bytes that a backward pass adds when it ends; negative where it frees more than it keeps for the weights' pass."""
    at_head: float = 0.0
    """The most bytes while logits are there, with what the head keeps."""
    final: float = 0.0
    """Part of `at_head` that the head keeps of one micro batch."""
    numbers: float = 0.0
    """Ids and positions that the embedding keeps."""
    one: float = 0.0
    """Bytes of one micro batch between forward and backward."""
    waits: float = 0.0
    """Bytes of one micro batch between the halves of a split backward pass."""
    waiting_micro_batches: float = 0.0
    """Other bytes of micro batches that wait: kept by the head of gpipe; what came in, where all else is on the host."""
    moments: InFlightMaxima = InFlightMaxima((), (), (), ())
    unreceived_forward: float = 0.0
    """Bytes that other pipeline ranks may not have received yet as a forward pass ends."""
    unreceived_backward: float = 0.0
    """The same as a backward pass begins."""
    boundary: float = 0.0
    """One activation from another pipeline rank."""
    host_bytes: float = 0.0
    """Activations that wait in host memory."""
    piped: bool = False
    """The rank is one of several pipeline ranks."""
    splits: bool = False
    """Backward passes run in two halves."""
    heads: int = 1
    """Micro batches whose logits wait at once."""
    come_back: bool = False
    """Activations wait on the host and come back two layers at a time."""

    @property
    def after_first_block(self) -> float:
        """Return the bytes when a pass through the first block ends."""
        return self.before_backward + self.freed_by_backward


class PeakCandidate(NamedTuple):
    """A moment of a step at which a rank may hold its most: bytes beyond its parameters, master weights and optimizer states."""

    phase: str
    gathered_parameters: float
    gradients: float
    activations: float
    logits: float
    communication_buffers: float
    temporary: float


class PassSeconds(NamedTuple):
    """Seconds that one room adds to a micro batch's forward and backward pass, by part of the model."""

    term: str
    """The component of a step that they belong to, by its name in the plan's JSON."""
    layer: float = 0.0
    checkpointed: float = 0.0
    """More for a layer that is recomputed."""
    embedding: float = 0.0
    head: float = 0.0

    def of(self, share: Share) -> float:
        """Return the seconds of one micro batch through what a pipeline rank holds."""
        return (
            share.layers * self.layer
            + share.checkpointed * self.checkpointed
            + share.embedding * self.embedding
            + share.head * self.head
        )


class Hideable(NamedTuple):
    """Seconds of messages that compute hides as far as it lasts."""

    seconds: float
    passes: float
    """The compute in their window, in passes of one micro batch, forward and backward, of the slowest rank."""


class OnceSeconds(NamedTuple):
    """Seconds of messages that are sent once a step or for the sake of ZeRO."""

    seconds: float = 0.0
    exposed_s: float = 0.0
    """Part of `seconds` that no compute hides, however long it is."""
    hideable: tuple[Hideable, ...] = ()
    """The rest, one for each window."""

    def exposed_beside(self, pass_s: float) -> float:
        """Return the seconds that are exposed where a pass of one micro batch takes `pass_s`. What outlasts its window does so at
        the same time as what outlasts another. So recomputing, which lengthens a pass, never makes a step shorter."""
        return self.exposed_s + max([0.0, *(one.seconds - one.passes * pass_s for one in self.hideable)])


class SlowestRank(NamedTuple):
    """The pipeline rank that sets the pace, and its passes."""

    share: Share
    pass_s: float
    """Seconds of one micro batch, forward and backward."""
    all_ranks_s: float
    """The same over all pipeline ranks together."""
    most_borders: int
    """Borders to other pipeline ranks of the rank that has the most."""
    first_share: Share
    """Share of the first pipeline rank."""
    saved_bytes: float
    """Activations of one micro batch that the rank saves."""
    again_s: float = 0.0
    """Part of pass_s that is computed again."""
