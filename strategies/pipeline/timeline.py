"""A pipeline's schedule played through: which rank does what, when. Pure; for the eye, the price is cost.py's.

GPipe, 1F1B and interleaved 1F1B run each rank's published order (arXiv:1811.06965; arXiv:2104.04473, section 2.2). The zero
bubble schedules take what can start first: a backward, else a forward while another micro batch may be held, else the gradients
of weights (arXiv:2401.10241)."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.strategy import SPLIT_BACKWARD, Strategy

Work = tuple[str, int, int]
"""kind, micro batch, stage."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One piece of work of one rank. kind: forward, backward, weights."""

    rank: int
    start: float
    end: float
    kind: str
    micro: int
    stage: int


def timeline(strategy: Strategy, *, num_micro_batches: int, recompute: float = 0.0) -> list[Bar]:
    """The bars of so many micro batches; a forward of a rank's whole share takes 1, a backward 2, and `recompute` more."""
    return _Play(strategy, num_micro_batches, recompute).run()


class _Play:
    def __init__(self, strategy: Strategy, num_micro_batches: int, recompute: float) -> None:
        self.ranks = strategy.pipeline_parallel_degree
        self.micros = num_micro_batches
        self.gpipe = strategy.pipeline_schedule == "gpipe"
        self.split = strategy.pipeline_schedule in SPLIT_BACKWARD
        self.rank_of = [stage.pipeline_rank for stage in strategy.stages]
        self.stages = len(self.rank_of)
        layers = sum(stage.num_layers for stage in strategy.stages)
        self.share = [stage.num_layers * self.ranks / layers for stage in strategy.stages]
        self.virtual = self.stages // self.ranks
        self.backward_cost = (1.0 if self.split else 2.0) + recompute
        self.done: dict[Work, float] = {}
        self.free = [0.0] * self.ranks
        self.held = [0] * self.ranks
        self.bars: list[Bar] = []

    def run(self) -> list[Bar]:
        queues = [self._queues(rank) for rank in range(self.ranks)]
        while any(queue for rank in queues for queue in rank):
            start, rank, place = min(found for rank in range(self.ranks) for found in self._next(rank, queues[rank]))
            work = queues[rank][place].pop(0)
            cost = {"forward": 1.0, "backward": self.backward_cost, "weights": 1.0}[work[0]] * self.share[work[2]]
            self.done[work] = self.free[rank] = start + cost
            self.held[rank] += {"forward": 1, "backward": -1, "weights": 0}[work[0]]
            self.bars.append(Bar(rank, start, start + cost, *work))
        return self.bars

    def _queues(self, rank: int) -> list[list[Work]]:
        """Forwards, backwards and weights of a rank in their order: rounds of as many micro batches as ranks, stage by stage."""
        held = [stage for stage, owner in enumerate(self.rank_of) if owner == rank]
        size = self.micros if self.gpipe or self.virtual == 1 else self.ranks
        rounds = [range(first, min(first + size, self.micros)) for first in range(0, self.micros, size)]
        orders = [("forward", held), ("backward", held[::-1])] + ([("weights", held[::-1])] if self.split else [])
        queues = [[(kind, m, s) for some in rounds for s in stages for m in some] for kind, stages in orders]
        return queues if self.split else [self._one_forward_one_backward(rank, *queues)]

    def _one_forward_one_backward(self, rank: int, forwards: list[Work], backwards: list[Work]) -> list[Work]:
        """Warm-up forwards, then one forward and one backward in turn, then the backwards that are left."""
        warm_up = self.ranks - rank - 1
        if self.virtual > 1:
            warm_up = 2 * warm_up + (self.virtual - 1) * self.ranks
        warm_up = len(forwards) if self.gpipe else min(warm_up, len(forwards))
        order = forwards[:warm_up]
        for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
            order += [forward, backward]
        return order + backwards[len(forwards) - warm_up :]

    def _ready(self, work: Work) -> float | None:
        """When its inputs are there; None: not decided yet."""
        kind, micro, stage = work
        if kind == "weights":
            return self.done.get(("backward", micro, stage))
        if kind == "forward":
            return 0.0 if stage == 0 else self.done.get(("forward", micro, stage - 1))
        own = self.done.get(("forward", micro, stage))
        if stage == self.stages - 1 or own is None:
            return own
        after = self.done.get(("backward", micro, stage + 1))
        return None if after is None else max(own, after)

    def _next(self, rank: int, queues: list[list[Work]]) -> list[tuple[float, int, int]]:
        """(when, rank, which queue) of what the rank can do first: of equals a backward, then a forward, then weights."""
        found = []
        for place, queue in enumerate(queues):
            if queue and (queue[0][0] != "forward" or not self.split or self._may_hold(rank)):
                ready = self._ready(queue[0])
                if ready is not None:
                    preference = ("backward", "forward", "weights").index(queue[0][0])
                    found.append((max(ready, self.free[rank]), preference, place))
        return [(min(found)[0], rank, min(found)[2])] if found else []

    def _may_hold(self, rank: int) -> bool:
        """No more micro batches in flight than it takes to fill the pipeline behind."""
        if self.virtual == 1:
            return self.held[rank] < self.ranks - rank
        if self.rank_of[-1] == 0:  # V shape
            return self.held[rank] < 2 * self.ranks
        return self.held[rank] < 2 * (self.ranks - rank - 1) + (self.virtual - 1) * self.ranks + 1
