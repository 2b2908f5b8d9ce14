"""What a pipeline's ranks say to each other ends under the rules of NCCL, whatever the schedule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest

from strategies.pipeline.messages import Channel, Event, Pipeline
from strategies.pipeline.schedules import Action
from strategies.strategy import Schedule

MOST_RANKS, MOST_VIRTUAL = 16, 4


class Played:
    """Ranks that carry out their events under the rules of NCCL, as far as they get.

    1. The first message of a channel that is not open waits on both sides for the other.
    2. The messages of a channel run one at a time in the order in which each side asks for them, and a rank asks for nothing
       more on any channel while one is to run after another of its own (all of its kernels in one hardware queue).
    3. A send is complete when its receive has been asked for, and the other way round.
    4. A wait holds up the rank; NCCL's holds up its stream, which asks for less.
    """

    def __init__(self, pipeline: Pipeline, events: Sequence[Sequence[Event]], *, opened: bool) -> None:
        self.pipeline, self.events = pipeline, events
        self.at = [0] * len(events)
        self.here: dict[Channel, set[int]] = defaultdict(set)
        if opened:
            self.here.update((channel, {channel.source, channel.target}) for channel in pipeline.channels())
        self.asked: dict[tuple[Channel, int], list[Action]] = defaultdict(list)
        self.left: list[dict[Action, int]] = [{} for _ in events]
        """Of each rank: a send that is not let go -> its number on the channel."""
        self.due: list[dict[Action, int]] = [{} for _ in events]
        waiting = set(range(len(events)))
        while waiting:
            self._run(waiting.pop(), waiting)
        self.stuck = {
            rank: mine[at] for rank, (mine, at) in enumerate(zip(events, self.at, strict=True)) if at < len(mine)
        }

    def _run(self, rank: int, waiting: set[int]) -> None:
        mine = self.events[rank]
        while self.at[rank] < len(mine):
            event = mine[self.at[rank]]
            channel = self.pipeline.channel(event.action) if event.action else None
            known = channel is None or rank in self.here[channel]
            done = self._step(rank, event, channel)
            if channel is not None and (done or not known):  # something that the other end may wait for
                waiting.add(channel.source + channel.target - rank)
            if not done:
                return
            self.at[rank] += 1

    def _step(self, rank: int, event: Event, channel: Channel | None) -> bool:
        verb, action = event
        left = self.left[rank]
        if action is None:
            done = all(self._met(self.pipeline.channel(each), number) for each, number in left.items())
            if done:
                left.clear()
            return done
        if channel is None:
            assert verb == "run", event
            return True
        if verb == "run":
            return True
        if verb == "take":
            return self._met(channel, self.due[rank][action]) and self.due[rank].pop(action) >= 0
        if verb == "release":
            return self._met(channel, left[action]) and left.pop(action) >= 0
        self.here[channel].add(rank)
        asked, theirs = self.asked[channel, rank], self.asked[channel, channel.source + channel.target - rank]
        number = len(asked)
        if len(self.here[channel]) < 2 or (number and not self._met(channel, number - 1)):
            return False
        assert rank == (channel.source if verb == "send" else channel.target)
        assert number >= len(theirs) or theirs[number] == action, f"{channel}: {action} meets {theirs[number]}"
        asked.append(action)
        (left if verb == "send" else self.due[rank])[action] = number
        return True

    def _met(self, channel: Channel | None, number: int) -> bool:
        assert channel is not None
        return all(len(self.asked[channel, end]) > number for end in (channel.source, channel.target))


def pipelines(*ranks: int) -> list[Pipeline]:
    return [Pipeline(schedule, p, virtual) for p in ranks for schedule, virtual in SCHEDULES]


SCHEDULES: list[tuple[Schedule, int]] = [
    ("gpipe", 1),
    ("1f1b", 1),
    *(("interleaved_1f1b", virtual) for virtual in range(1, MOST_VIRTUAL + 1)),
    *(("interleaved_zero_bubble", virtual) for virtual in range(1, MOST_VIRTUAL + 1)),
    ("zbv", 2),
]


def counts(pipeline: Pipeline) -> range:
    """Micro batches that the schedule can run, up to four a rank."""
    whole_rounds = pipeline.num_virtual > 1 and pipeline.schedule != "zbv"
    each = pipeline.num_ranks if whole_rounds else 1
    return range(each, 4 * pipeline.num_ranks + 1, each)


def programs(pipeline: Pipeline, num_micro_batches: int) -> list[tuple[Event, ...]]:
    """A step, two batches of an evaluation, and what ends it."""
    return [
        pipeline.step(num_micro_batches, rank) + 2 * pipeline.evaluation(rank) + (Event("settle"),)
        for rank in range(pipeline.num_ranks)
    ]


def ends(pipeline: Pipeline, num_micro_batches: int) -> None:
    played = Played(pipeline, programs(pipeline, num_micro_batches), opened=True)
    assert not played.stuck, f"{pipeline} with {num_micro_batches}: {played.stuck}"
    for channel in pipeline.channels():
        sent, received = (played.asked[channel, end] for end in (channel.source, channel.target))
        assert sent == received
        assert sent, f"{channel} is opened and not used"


@pytest.mark.parametrize("pipeline", pipelines(2, 3, 4, 5, 6), ids=str)
def test_every_schedule_ends(pipeline: Pipeline) -> None:
    for num_micro_batches in counts(pipeline):
        ends(pipeline, num_micro_batches)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", range(7, MOST_RANKS + 1))
def test_every_schedule_ends_on_many_ranks(ranks: int) -> None:
    """`make strict` runs it: minutes, most of them for the schedules themselves."""
    for pipeline in pipelines(ranks):
        for num_micro_batches in counts(pipeline):
            ends(pipeline, num_micro_batches)


@pytest.mark.parametrize("pipeline", pipelines(8), ids=str)
def test_every_schedule_ends_on_many_ranks_with_few_and_with_many_micro_batches(pipeline: Pipeline) -> None:
    known = counts(pipeline)
    for num_micro_batches in {known[0], known[len(known) // 4], known[-1]}:
        ends(pipeline, num_micro_batches)


@pytest.mark.parametrize(
    ("schedule", "virtual", "locks"),
    [
        ("gpipe", 1, lambda p, m: True),
        ("1f1b", 1, lambda p, m: m < p),
        ("interleaved_1f1b", 1, lambda p, m: m < p),
        ("interleaved_1f1b", 2, lambda p, m: m == p >= 3),
        ("interleaved_zero_bubble", 3, lambda p, m: m == p >= 3),
        ("zbv", 2, lambda p, m: m < p or (False if m > 2 * p else None)),
    ],
)
def test_left_to_the_first_message_the_communicators_would_lock_the_ranks(schedule, virtual, locks) -> None:
    """Why they are opened at set-up: a receive is asked for before what was made is sent."""
    for ranks in range(2, 6):
        pipeline = Pipeline(schedule, ranks, virtual)
        for num_micro_batches in counts(pipeline):
            stuck = Played(pipeline, programs(pipeline, num_micro_batches), opened=False).stuck
            expected = locks(ranks, num_micro_batches)
            assert expected is None or bool(stuck) == expected, (ranks, num_micro_batches, stuck)


@pytest.mark.parametrize("pipeline", pipelines(2, 3, 4, 7, MOST_RANKS), ids=str)
def test_channels_are_opened_in_an_order_that_ends(pipeline: Pipeline) -> None:
    """Every rank opens its own one after the other, and waits at each for the other end."""
    left = {
        rank: [channel for channel in pipeline.channels() if rank in (channel.source, channel.target)]
        for rank in range(pipeline.num_ranks)
    }
    most = 8 if pipeline.schedule == "zbv" else 4  # zbv sends either way between neighbours
    assert all(len(mine) <= most for mine in left.values()), "however many stages a rank has"
    rounds = 0
    while any(left.values()):
        opened = {mine[0] for mine in left.values() if mine and left[mine[0].source][0] == left[mine[0].target][0]}
        assert opened
        left = {rank: [channel for channel in mine if channel not in opened] for rank, mine in left.items()}
        rounds += 1
    assert rounds <= most + 2, "neighbours open at once, whatever the number of ranks"


def test_two_sends_that_wait_for_each_other_are_told() -> None:
    """The test's own rules: both ranks wait for their sends before they ask for what they are sent."""
    pipeline = Pipeline("1f1b", 2, 1)
    forward, backward = Action("forward", 1, 0), Action("backward", 0, 0)
    crossed = [
        [Event("send", forward), Event("release", forward), Event("receive", backward), Event("take", backward)],
        [Event("send", backward), Event("release", backward), Event("receive", forward), Event("take", forward)],
    ]
    assert Played(pipeline, crossed, opened=True).stuck == {0: crossed[0][1], 1: crossed[1][1]}


def test_messages_that_come_in_another_order_are_told() -> None:
    pipeline = Pipeline("1f1b", 2, 1)
    first, second = Action("forward", 1, 0), Action("forward", 1, 1)
    with pytest.raises(AssertionError, match="meets"):
        Played(pipeline, [[Event("send", first)], [Event("receive", second)]], opened=True)
