"""The memory of one pipeline rank: the model's states, what a micro batch leaves, all activations in flight. Bytes.

The fold of the rooms' doors; it names no room."""

from __future__ import annotations

from typing import Any

from strategies.constants import MemoryConstants
from strategies.price.roofline import ELEMENT
from strategies.rank import (
    MicroBatchBytes,
    ModelStates,
    Question,
    SavedActivations,
    Shape,
    Share,
)
from strategies.rooms import having, read_by
from strategies.strategy import Strategy
from strategies.workload import Workload

NO_LAYERS = Share(0, 0, False, False)
PIECE = 2.0**62
"""Elements of a shard that is larger than any piece of it that is stepped at once."""

_SHAPE, _STATES, _MICRO, _SAVED = (having(door) for door in ("shape", "model_states", "micro_batch", "saved"))
_shape_key, _states_key, _micro_key = (
    read_by("shape"),
    read_by("shape", "model_states"),
    read_by("shape", "micro_batch"),
)


class RankMemory:
    """One model's bytes in one precision and sequence length. Keeps what it has worked out, under the fields of the strategy
    that the doors declare: a search asks again and again."""

    __slots__ = ("_micros", "_shapes", "_states", "question")

    def __init__(self, work: Workload, precision: str, sequence_length: int, constants: MemoryConstants) -> None:
        self.question = Question(work, sequence_length, precision, ELEMENT[precision], constants)
        self._shapes: dict[Any, Shape] = {}
        self._micros: dict[Any, MicroBatchBytes] = {}
        self._states: dict[Any, ModelStates] = {}

    def shape(self, strategy: Strategy) -> Shape:
        """Return how a sequence's work is split."""
        key = _shape_key(strategy)
        known = self._shapes.get(key)
        if known is None:
            known = Shape()
            for room in _SHAPE:
                known = room.shape(strategy, known)
            self._shapes[key] = known
        return known

    def micro(self, strategy: Strategy) -> MicroBatchBytes:
        """Return what one micro batch leaves on any rank."""
        key = _micro_key(strategy)
        known = self._micros.get(key)
        if known is None:
            known, shape = MicroBatchBytes(), self.shape(strategy)
            for room in _MICRO:
                known = room.micro_batch(self.question, strategy, shape, known)
            self._micros[key] = known
        return known

    def states(self, strategy: Strategy, share: Share) -> ModelStates:
        """Return what a rank holds of the model's states."""
        key = share.layers, share.embedding, share.head, _states_key(strategy)
        known = self._states.get(key)
        if known is None:
            known, shape = ModelStates(), self.shape(strategy)
            for room in _STATES:
                known = room.model_states(self.question, strategy, shape, share, known)
            self._states[key] = known
        return known

    def evenly(self, strategy: Strategy, shape: Shape, parameters: float) -> ModelStates:
        """Return the states of so many parameters, whatever blocks they are in, dealt out without a rest."""
        states = ModelStates(parameters=parameters, trained=parameters, owned=parameters, largest=PIECE)
        for room in _STATES[1:]:  # the model itself is first
            states = room.model_states(self.question, strategy, shape, NO_LAYERS, states)
        return states

    def saved(self, strategy: Strategy, share: Share, rank: int, micro: MicroBatchBytes) -> SavedActivations:
        """Return the activations of all micro batches in flight on a pipeline rank."""
        found, shape = SavedActivations(one=micro.of(share)), self.shape(strategy)
        for room in _SAVED:
            found = room.saved(strategy, shape, share, rank, micro, found)
        return found


_KNOWN: dict[tuple[int, int, int, str], RankMemory] = {}
_MOST_KNOWN = 512


def rank_memory(work: Workload, precision: str, sequence_length: int, constants: MemoryConstants) -> RankMemory:
    """Return the bytes of a model, kept by its identity: a search prices one model a hundred thousand times."""
    key = id(work), id(constants), sequence_length, precision
    known = _KNOWN.get(key)
    if known is None or known.question.work is not work or known.question.constants is not constants:
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        known = _KNOWN[key] = RankMemory(work, precision, sequence_length, constants)
    return known
