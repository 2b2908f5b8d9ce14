"""The order of a pipeline rank's passes and messages: passes, receives and sends. Pure: the runner carries these lists out, and
a test plays them for every schedule under the rules of NCCL.

Rules that the order keeps. A communicator is made at its first message, and both its ranks wait for each other there: so all
are opened at set-up, in one order on every rank. The messages of a communicator run one after the other in the order in which
each rank asked for them: so each carries one kind of message from one rank to one other. A send is complete when its receive
runs: so no rank waits for a send before it has heard that the message was used.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

from strategies.pipeline.schedules import Action, orders, received, stage_rank
from strategies.strategy import Schedule, Strategy

Verb = Literal["receive", "take", "run", "send", "release", "settle"]
"""receive: make room for a message and ask for it; take: wait for it; run: a pass; send: what the pass made; release: wait for a
send that is known as received and let its tensor go; settle: the same for all sends that are left."""


class Event(NamedTuple):
    """One thing that a rank does."""

    verb: Verb
    action: Action | None = None
    """The pass that runs, or the pass that the message is for; None: settle."""


class Channel(NamedTuple):
    """Messages of one kind from one pipeline rank to one other; the real one is a communicator of these two."""

    kind: Literal["forward", "backward"]
    source: int
    target: int


class Pipeline(NamedTuple):
    """A schedule over ranks."""

    schedule: Schedule
    num_ranks: int
    num_virtual: int

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.num_virtual

    def rank(self, stage: int) -> int:
        """The pipeline rank that runs a stage."""
        return stage_rank(self.schedule, self.num_ranks, self.num_stages, stage)

    def held(self, rank: int) -> list[int]:
        """The stages of a rank, in model order."""
        return [stage for stage in range(self.num_stages) if self.rank(stage) == rank]

    def needs_input(self, action: Action) -> bool:
        """The pass begins with what another stage made, on this rank or another."""
        if action.kind == "forward":
            return action.stage > 0
        return action.kind != "weights" and action.stage < self.num_stages - 1

    def channel(self, action: Action) -> Channel | None:
        """Return what brings a pass its input; None where it has none or where it was made on the same rank."""
        if not self.needs_input(action):
            return None
        forward = action.kind == "forward"
        source, target = self.rank(action.stage + (-1 if forward else 1)), self.rank(action.stage)
        return None if source == target else Channel("forward" if forward else "backward", source, target)

    def following(self, action: Action) -> Action | None:
        """The pass that takes what this one makes."""
        after = Action(action.kind, action.stage + (1 if action.kind == "forward" else -1), action.micro_batch)
        return after if action.kind != "weights" and 0 <= after.stage < self.num_stages else None

    def channels(self) -> list[Channel]:
        """All channels in the order in which every rank opens its own: neighbours two by two, so that pairs open at once."""
        both = [Action(kind, stage, 0) for kind in ("forward", "backward") for stage in range(self.num_stages)]
        found = {channel for action in both if (channel := self.channel(action))}
        return sorted(
            found, key=lambda each: (each.kind, min(each.source, each.target) % 2, each.source < each.target, each)
        )

    def step(self, num_micro_batches: int, rank: int) -> tuple[Event, ...]:
        """The events of a rank's training step."""
        return _step(self, num_micro_batches, rank)

    def evaluation(self, rank: int) -> tuple[Event, ...]:
        """The events of a rank as one batch goes forward; the batch before it has been sent by everyone."""
        events = [Event("settle")]
        for stage in self.held(rank):
            events += self._around(Action("forward", stage, 0))
        return tuple(events)

    def _around(self, action: Action, known: tuple[Action, ...] = (), *, asked: bool = False) -> list[Event]:
        events = []
        if self.channel(action):
            events += [] if asked else [Event("receive", action)]
            events.append(Event("take", action))
        events += [Event("release", message) for message in known]
        events.append(Event("run", action))
        after = self.following(action)
        if after is not None and self.channel(after):
            events.append(Event("send", after))
        return events


def pipeline_of(strategy: Strategy) -> Pipeline:
    """The schedule that a strategy asks for."""
    return Pipeline(strategy.pipeline_schedule, strategy.pipeline_parallel_degree, strategy.num_virtual_stages)


@lru_cache(maxsize=64)
def _step(pipeline: Pipeline, num_micro_batches: int, rank: int) -> tuple[Event, ...]:
    actions = orders(*pipeline, num_micro_batches)[rank]
    known = received(*pipeline, num_micro_batches, rank)
    events: list[Event] = []
    for index, action in enumerate(actions):
        # The next pass's input travels while this one computes.
        ahead = actions[index : index + 2] if index == 0 else actions[index + 1 : index + 2]
        events += [Event("receive", each) for each in ahead if pipeline.channel(each)]
        events += pipeline._around(action, known.get(action, ()), asked=True)
    return (*events, Event("settle"))
