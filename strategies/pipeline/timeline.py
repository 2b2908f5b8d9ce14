"""A pipeline's schedule played through: which rank does what, when. Pure; for the eye, the price is cost.py's.

The order of each rank's passes is that of schedules.py, which the runner runs and the price counts."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.pipeline.schedules import Action, orders
from strategies.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Bar:
    """One pass of one micro batch through one stage, in units of a forward pass through a rank's even share of layers."""

    rank: int
    start: float
    end: float
    kind: str
    """forward, backward or weights; the half of a backward pass over the inputs counts as backward."""
    micro: int
    stage: int


def timeline(strategy: Strategy, *, num_micro_batches: int, recompute: float = 0.0) -> list[Bar]:
    """Return the bars of so many micro batches, which fill whole rounds of an interleaved schedule. A forward pass of a rank's
    whole share takes 1, a backward pass 2, each half of a split one 1, and `recompute` more."""
    ranks, stages = strategy.pipeline_parallel_degree, len(strategy.stages)
    queues = orders(strategy.pipeline_schedule, ranks, strategy.num_virtual_stages, num_micro_batches)
    layers = sum(stage.num_layers for stage in strategy.stages)
    shares = [stage.num_layers * ranks / layers for stage in strategy.stages]
    costs = {"forward": 1.0, "backward": 2.0 + recompute, "inputs": 1.0 + recompute, "weights": 1.0}
    done: dict[Action, float] = {}
    free, places, bars = [0.0] * ranks, [0] * ranks, list[Bar]()
    while len(done) < sum(map(len, queues)):
        for rank, queue in enumerate(queues):
            while places[rank] < len(queue) and (ready := _ready(queue[places[rank]], done, stages)) is not None:
                action = queue[places[rank]]
                start = max(ready, free[rank])
                end = start + costs[action.kind] * shares[action.stage]
                done[action] = free[rank] = end
                kind = "backward" if action.kind == "inputs" else action.kind
                bars.append(Bar(rank, start, end, kind, action.micro_batch, action.stage))
                places[rank] += 1
    return bars


def _ready(action: Action, done: dict[Action, float], num_stages: int) -> float | None:
    """Return when an action's input is there; None where it is not played yet."""
    kind, stage, micro_batch = action
    if kind == "weights":
        return done.get(Action("inputs", stage, micro_batch))
    if kind == "forward":
        return 0.0 if stage == 0 else done.get(Action("forward", stage - 1, micro_batch))
    if stage == num_stages - 1:
        return done.get(Action("forward", stage, micro_batch))
    return done.get(Action(kind, stage + 1, micro_batch))
