"""Plans that the planner itself draws: tiny models on imaginary clusters whose memory is too small for the fastest strategy.

The budget lies between what the leanest and what the fastest strategy needs, so every room has something to give. One draw
after the other wants a room, and jobs are made up until the planner chooses it; where it takes too many, the job pins what it
wants and the planner chooses the rest. Seeded; the planner is deterministic.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.cases import Run, Task
from clusters.cluster import Cluster
from clusters.hardware import Accelerator, Host, Link
from orchestrator.models.architecture import Architecture, make_architecture
from orchestrator.planner.problem import PlanError, Problem
from orchestrator.planner.search.solve import Solution, solve
from strategies.price.memory import MEMORY_ERROR
from strategies.strategy import Offload, Strategy


class Room(NamedTuple):
    """A choice that some draw must hold."""

    holds: Callable[[Strategy], bool]
    pins: dict[str, Any]
    """What asks for it."""


def _pipelined(schedule: str, virtual: int = 1) -> Room:
    return Room(
        lambda s: (
            s.pipeline_parallel_degree > 1 and s.pipeline_schedule == schedule and s.num_virtual_stages >= virtual
        ),
        {"pipeline_schedule": schedule, "num_virtual_stages": virtual},
    )


def _sharded(stage: int) -> Room:
    return Room(lambda s: s.data_parallel_degree > 1 and s.zero_stage == stage, {"zero_stage": stage})


def _recomputed(kind: str) -> Room:
    return Room(lambda s: s.activation_checkpointing == kind, {"activation_checkpointing": kind})


def _away(**places: str) -> Room:
    """The first one is wanted."""
    (kind, place), *_ = places.items()
    return Room(lambda s: getattr(s.offload, kind) == place, {"offload": Offload(**places)})  # type: ignore[arg-type]


ROOMS: dict[str, Room] = {
    "tensor": Room(lambda s: s.tensor_parallel_degree > 1, {"tensor_parallel_degree": 2}),
    "sequence parallel": Room(lambda s: s.sequence_parallel, {"tensor_parallel_degree": 2, "sequence_parallel": True}),
    "pipeline": Room(lambda s: s.pipeline_parallel_degree > 1, {"pipeline_parallel_degree": 2}),
    "gpipe": _pipelined("gpipe"),
    "1f1b": _pipelined("1f1b"),
    "interleaved 1f1b": _pipelined("interleaved_1f1b", 2),
    "interleaved zero bubble": _pipelined("interleaved_zero_bubble", 2),
    "zbv": _pipelined("zbv", 2),
    **{f"ZeRO {stage}": _sharded(stage) for stage in range(4)},
    "hybrid groups": Room(lambda s: 1 < s.zero_group_size < s.data_parallel_degree, {"zero_group_size": 2}),
    "selective recompute": _recomputed("selective"),
    "full recompute": _recomputed("full"),
    "recompute of some layers": Room(
        lambda s: any(0 < x.num_checkpointed_layers < x.num_layers for x in s.stages),
        {"activation_checkpointing": "full", "num_checkpointed_layers_per_stage": 1},
    ),
    "optimizer on the host": _away(optimizer="host"),
    "optimizer on nvme": _away(optimizer="nvme"),
    "parameters on the host": _away(parameters="host", optimizer="host"),
    "parameters on nvme": _away(parameters="nvme", optimizer="nvme"),
    "activations on the host": _away(activations="host"),
    "tensor x pipeline x data": Room(
        lambda s: min(s.tensor_parallel_degree, s.pipeline_parallel_degree, s.data_parallel_degree) > 1,
        {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2},
    ),
}
KIN: tuple[dict[str, Any], ...] = ({}, {"tied_embeddings": False}, {"word_embedding_size": 12, "post_norm": True})
"""OPT as published, with an output table of its own, and as its 350M has it."""
NODES = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (1, 8), (2, 4), (4, 2))
UNLIMITED = 2**40
FREE_TRIES, MOST_TRIES = 12, 400


def drawn(count: int, seed: int = 0, most_gpus: int = 8) -> list[Run]:
    """The same for the same arguments. RuntimeError where the planner never chooses a room."""
    rng = random.Random(seed)
    # Few draws begin where their seed says, so that others hold other rooms.
    names = list(ROOMS)
    first = rng.randrange(len(names))
    return [_draw(rng, names[(first + i) % len(names)], most_gpus) for i in range(count)]


def coverage(runs: Iterable[Run]) -> Counter[str]:
    """How many of the runs hold each room."""
    runs = list(runs)
    return Counter({name: sum(room.holds(run.strategy) for run in runs) for name, room in ROOMS.items()})


def _draw(rng: random.Random, room: str, most_gpus: int) -> Run:
    for attempt in range(MOST_TRIES):
        problem = _problem(rng, ROOMS[room].pins if attempt >= FREE_TRIES else {}, most_gpus)
        try:
            solution = _under_pressure(rng, problem)
        except PlanError:  # a pin that cannot be, or nothing built fits
            continue
        if solution.fits and ROOMS[room].holds(solution.strategy):
            task = Task(problem.arch, problem.global_batch_size, problem.sequence_length)
            return Run(solution.strategy, problem.precision, task)
    raise RuntimeError(f"no plan of {MOST_TRIES} holds {room}")


def _problem(rng: random.Random, pins: dict[str, Any], most_gpus: int) -> Problem:
    def rate(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    num_nodes, gpus_per_node = rng.choice([n for n in NODES if n[0] * n[1] <= most_gpus])
    kind = rng.choice(("cuda", "cpu"))
    accelerator = Accelerator(
        name="imaginary",
        kind=kind,  # type: ignore[arg-type]
        memory_bytes=UNLIMITED,
        memory_bytes_per_s=rate(1e9, 1e12),
        peak_flops={"fp64": rate(1e7, 1e12)},
        host_link_bytes_per_s=rate(1e5, 1e11),
    )
    host = Host(
        memory_bytes=UNLIMITED,
        memory_bytes_per_s=rate(1e6, 1e12),
        num_cores=8,
        nvme_bytes=rng.choice((0, UNLIMITED)),
        nvme_read_bytes_per_s=rate(1e6, 1e11),
        nvme_write_bytes_per_s=rate(1e6, 1e11),
    )
    cluster = Cluster(
        name="imaginary",
        accelerator=accelerator,
        num_nodes=num_nodes,
        gpus_per_node=gpus_per_node,
        intra_node=Link(name="nvlink", bytes_per_s=rate(1e6, 1e12), latency_s=rate(1e-7, 1e-5)),
        inter_node=Link(name="network", bytes_per_s=rate(1e6, 1e12), latency_s=rate(1e-7, 1e-5)),
        host=host,
    )
    return Problem(
        arch=_architecture(rng),
        cluster=cluster,
        global_batch_size=rng.randint(1, 16),
        sequence_length=rng.choice((8, 12, 16)),
        precision="fp64",
        pins=pins,
        built_only=True,
    )


def _architecture(rng: random.Random) -> Architecture:
    return make_architecture(
        family="opt",
        num_layers=rng.choice((2, 3, 4, 6)),
        hidden_size=rng.choice((16, 24, 32)),
        num_heads=rng.choice((2, 4)),
        ffn_size=rng.choice((44, 64)),
        vocab_size=rng.choice((61, 96)),
        max_position=16,
        **rng.choice(KIN),
    )


def _under_pressure(rng: random.Random, problem: Problem) -> Solution:
    """The planner's answer on GPUs that hold little more than they must, and hosts that hold less and less."""
    leanest, fastest = solve(_limited(problem, 0)).price.memory, solve(problem).price.memory
    squeeze = rng.random() ** 2
    usable = leanest.peak_bytes + squeeze * (fastest.peak_bytes - leanest.peak_bytes)
    problem = _limited(problem, int(usable / (1 - MEMORY_ERROR)) + 1)
    solution = solve(problem)
    for _ in range(rng.randrange(4)):
        if "host" not in (solution.strategy.offload.optimizer, solution.strategy.offload.parameters):
            break
        problem = _limited_host(problem, solution.price.memory.host_bytes_per_node - 1)
        solution = solve(problem)
    return solution


def _limited(problem: Problem, memory_bytes: int) -> Problem:
    cluster = problem.cluster
    return problem.changed(
        cluster=replace(cluster, accelerator=replace(cluster.accelerator, memory_bytes=memory_bytes))
    )


def _limited_host(problem: Problem, memory_bytes: int) -> Problem:
    cluster = problem.cluster
    return problem.changed(cluster=replace(cluster, host=replace(cluster.host, memory_bytes=memory_bytes)))
