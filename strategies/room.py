"""The protocol of a room: the doors through which one strategy is priced, shown and applied.

A room is a folder (zero/, tensor/, ...) whose cost.py has one instance of a subclass of `Room`. The list of rooms in rooms.py is
the only place that names them all: strategies/price folds over the cost doors of that list, the engine over its apply doors. A
door that a room does not need is inherited and leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from strategies.links import Message
from strategies.price.roofline import Roofline
from strategies.rank import (
    MicroBatchBytes,
    ModelStates,
    OnceSeconds,
    PassSeconds,
    PeakCandidate,
    Question,
    SavedActivations,
    Shape,
    Share,
    SlowestRank,
)
from strategies.rules import Rule
from strategies.sizes import FIRST, GroupRanks
from strategies.strategy import Strategy


class Room:
    """One strategy's doors. A subclass overrides those in which it changes something, and declares what they read."""

    name: str = ""
    reads: Mapping[str, tuple[str, ...]] = {}
    """Door -> the fields of the Strategy that it reads. What is kept for a door is kept under these fields."""
    impossible: tuple[Rule, ...] = ()
    without_effect: tuple[Rule, ...] = ()
    degrees: Mapping[str, Callable[[int, int], list[int]]] = {}
    """Field of the Strategy -> (tokens of a sequence, GPUs) -> the degrees that a search tries where the field is open."""
    apply: tuple[str, ...] = ()
    """`module:function` of what is done to a torch module; imported by workers alone."""

    def misfit(self, strategy: Strategy, sequence_length: int) -> str | None:
        """Return why a sequence of so many tokens cannot be split so, and how to fix it; None where it can."""
        return None

    # Bytes ----------------------------------------------------------------------------------------------------------

    def shape(self, strategy: Strategy, shape: Shape) -> Shape:
        """Return how the rooms so far, and this one, split a sequence's work."""
        return shape

    def model_states(
        self, question: Question, strategy: Strategy, shape: Shape, share: Share, states: ModelStates
    ) -> ModelStates:
        """Return what a rank holds of the model's states after this room."""
        return states

    def micro_batch(
        self, question: Question, strategy: Strategy, shape: Shape, micro: MicroBatchBytes
    ) -> MicroBatchBytes:
        """Return what one micro batch leaves on a rank after this room."""
        return micro

    def saved(
        self, strategy: Strategy, shape: Shape, share: Share, rank: int, micro: MicroBatchBytes, saved: SavedActivations
    ) -> SavedActivations:
        """Return the activations of all micro batches in flight on a pipeline rank after this room."""
        return saved

    def peak_candidates(
        self,
        question: Question,
        strategy: Strategy,
        share: Share,
        states: ModelStates,
        micro: MicroBatchBytes,
        saved: SavedActivations,
    ) -> tuple[PeakCandidate, ...]:
        """Return the moments of a step at which a rank may hold its most; one room of the list has them."""
        return ()

    def least_bytes(
        self, question: Question, strategy: Strategy, states: ModelStates, *, late: bool, piped: bool
    ) -> float:
        """Return what a rank holds at least in a block's backward pass, beside its states and its activations: for a search.

        Args:
            late: gradients are there while activations are at their most.
            piped: the rank is one of several pipeline ranks."""
        return 0.0

    # Messages -------------------------------------------------------------------------------------------------------

    def messages(
        self,
        question: Question,
        strategy: Strategy,
        shape: Shape,
        share: Share,
        *,
        borders: int,
        ranks: GroupRanks = FIRST,
        bucket_bytes: float,
    ) -> tuple[Message, ...]:
        """Return the messages of one step that a rank takes part in for this room's sake."""
        return ()

    # Seconds --------------------------------------------------------------------------------------------------------

    def pass_s(self, roof: Roofline, question: Question, strategy: Strategy, shape: Shape) -> tuple[PassSeconds, ...]:
        """Return the seconds that this room adds to the passes of one micro batch."""
        return ()

    def once_s(self, roof: Roofline, question: Question, strategy: Strategy, shape: Shape, share: Share) -> OnceSeconds:
        """Return the seconds of gradients' and sharded parameters' messages in a step."""
        return OnceSeconds()

    def update_s(self, roof: Roofline, strategy: Strategy, states: ModelStates) -> Mapping[str, float]:
        """Return the seconds of the optimizer's step, by component of the plan's JSON."""
        return {}

    def step_s(
        self, roof: Roofline, question: Question, strategy: Strategy, shape: Shape, rank: SlowestRank
    ) -> Mapping[str, float]:
        """Return what else a step takes, in seconds by component of the plan's JSON."""
        return {}

    # Words ----------------------------------------------------------------------------------------------------------

    def choice_words(self, strategy: Strategy) -> str:
        """Return the rest of the room's choice in a few words; empty where it chose nothing."""
        return ""
