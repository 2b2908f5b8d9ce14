"""Pipeline schedules: what a rank may know of the others from what it was sent."""

from __future__ import annotations

import pytest

from strategies.pipeline.schedules import Action, orders, received, stage_rank

SCHEDULES = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved_1f1b", 2),
    ("interleaved_1f1b", 3),
    ("interleaved_zero_bubble", 1),
    ("interleaved_zero_bubble", 2),
    ("zbv", 2),
]


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
@pytest.mark.parametrize(("ranks", "times"), [(2, 2), (2, 6), (3, 6), (4, 12)])
def test_a_message_counts_as_received_only_when_its_pass_must_have_had_it(schedule, virtual, ranks, times):
    everyone, stages = orders(schedule, ranks, virtual, times), ranks * virtual
    before = _before(everyone, stages)
    for rank, actions in enumerate(everyone):
        known = received(schedule, ranks, virtual, times, rank)
        told = [message for messages in known.values() for message in messages]
        assert told or rank, "the first rank hears of all that it sent"
        assert len(told) == len(set(told))
        for action, messages in known.items():
            for message in messages:
                assert stage_rank(schedule, ranks, stages, message.stage) != rank
                sender = message._replace(stage=message.stage + (-1 if message.kind == "forward" else 1))
                assert actions.index(sender) < actions.index(action)
                assert message in before[action]


@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_of_1f1b_by_eye(rank):
    # Rank 0 runs F0 F1 B0 F2 B1 B2, rank 1 F0 B0 F1 B1 F2 B2.
    forward = [Action("forward", rank, i) for i in range(3)]
    backward = [Action("backward", rank, i) for i in range(3)]
    wanted = {
        0: {backward[i]: (Action("forward", 1, i),) for i in range(3)},
        1: {forward[2]: (Action("backward", 0, 0),)},
    }
    assert received("1f1b", 2, 1, 3, rank) == wanted[rank]


def _before(everyone, stages):
    """Action -> all that has run when it begins, whatever the ranks' speeds."""
    place = {action: (rank, index) for rank, actions in enumerate(everyone) for index, action in enumerate(actions)}
    result = {}

    def visit(action):
        if action not in result:
            rank, index = place[action]
            kind, stage, i = action
            needed = set(everyone[rank][index - 1 : index]) if index else set()
            if kind == "forward" and stage:
                needed.add(Action("forward", stage - 1, i))
            elif kind in ("backward", "inputs") and stage + 1 < stages:
                needed.add(Action(kind, stage + 1, i))
            result[action] = needed.union(*map(visit, needed))
        return result[action]

    for actions in everyone:
        for action in actions:
            visit(action)
    return result
