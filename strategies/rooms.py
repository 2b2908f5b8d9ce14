"""The list of rooms, in their order, and what folds over it beside the prices. Core: apply doors are names that workers resolve.

Each room works on what the one before it left. A new strategy is a new folder and a place in this list."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from operator import attrgetter
from typing import Any

from strategies.context import cost as context
from strategies.model import cost as model
from strategies.offload import cost as offload
from strategies.pipeline import cost as pipeline
from strategies.recompute import cost as recompute
from strategies.room import Room
from strategies.rules import Rule
from strategies.strategy import Strategy
from strategies.tensor import cost as tensor
from strategies.zero import cost as zero

ROOMS: tuple[Room, ...] = (
    model.ROOM,
    pipeline.CUT,
    tensor.ROOM,
    recompute.ROOM,
    context.ROOM,
    zero.ROOM,
    offload.ROOM,
    pipeline.SCHEDULED,
)
"""`cut` and `schedule` are the two acts of a pipeline."""

APPLY: tuple[str, ...] = tuple(door for room in ROOMS for door in room.apply)
"""`module:function` of the apply doors, in the order of the rooms."""


def impossible(strategy: Strategy) -> Rule | None:
    """Return the first rule that the choices break among themselves; None where they can be together."""
    return next((rule for room in ROOMS for rule in room.impossible if rule.applies(strategy)), None)


def without_effect(strategy: Strategy) -> list[Rule]:
    """Return the rules of settings that change nothing. They are priced, and noted."""
    return [rule for room in ROOMS for rule in room.without_effect if rule.applies(strategy)]


def misfit(strategy: Strategy, sequence_length: int) -> str | None:
    """Return why a sequence of so many tokens cannot be split as the choices say, and how to fix it; None where it can."""
    told = (room.misfit(strategy, sequence_length) for room in ROOMS)
    return next((each for each in told if each is not None), None)


def degrees(field: str, sequence_length: int, num_gpus: int) -> list[int]:
    """Return the degrees of a field that a search tries: those that its room offers, or 1 alone."""
    offers = [room.degrees[field] for room in ROOMS if field in room.degrees]
    return offers[0](sequence_length, num_gpus) if offers else [1]


@lru_cache(maxsize=64)
def read_by(*doors: str) -> Callable[[Strategy], Any]:
    """Return a function from a strategy to the values of all fields that the rooms read in these doors: the key under which
    what the doors answer may be kept."""
    fields = sorted({field for room in ROOMS for door in doors for field in room.reads.get(door, ())})
    return attrgetter(*fields)


def having(door: str) -> tuple[Room, ...]:
    """Return the rooms that change something in a door, in their order."""
    return tuple(room for room in ROOMS if getattr(type(room), door) is not getattr(Room, door))
