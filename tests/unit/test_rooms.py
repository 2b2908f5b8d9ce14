"""Every room keeps the protocol: it declares what it reads, and what is kept for it is kept under that."""

from __future__ import annotations

from dataclasses import fields, replace
from importlib import import_module
from itertools import product
from typing import Any

import pytest

from clusters.catalog import load_cluster
from orchestrator.models.architecture import CATALOG
from orchestrator.models.workloads import workload
from strategies.constants import MEMORY
from strategies.pipeline.stages import cut
from strategies.price.rank_memory import RankMemory
from strategies.price.roofline import Roofline
from strategies.price.step_time import step_time
from strategies.rank import ModelStates, SlowestRank
from strategies.room import Room
from strategies.rooms import APPLY, ROOMS, having, impossible, read_by, without_effect
from strategies.shares import shares
from strategies.strategy import Offload, Strategy

CLUSTER = load_cluster("a100-80gb-8x8")
LENGTH = 1024
DOORS = (
    *("shape", "model_states", "micro_batch", "saved", "peak_candidates", "least_bytes"),
    *("messages", "pass_s", "once_s", "update_s", "step_s"),
)


class Recording:
    """A strategy that keeps the names of the fields and properties that were read of it."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy, self._read = strategy, set[str]()

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        return getattr(self._strategy, name)


def strategies() -> list[Strategy]:
    """Return strategies in which every room has something to do, in many combinations."""
    found = []
    offloads = Offload(), Offload(optimizer="host", parameters="host"), Offload(optimizer="nvme", activations="host")
    pipes = (
        (1, "1f1b", 1),
        (4, "gpipe", 1),
        (4, "interleaved_1f1b", 2),
        (4, "interleaved_zero_bubble", 1),
        (4, "zbv", 2),
    )
    for (pipeline, schedule, virtual), tensor, zero in product(pipes, (1, 4), range(4)):
        for index, (kind, offload) in enumerate(product(("none", "selective", "full"), offloads)):
            often = ("per_micro_batch", "per_step")[index % 2]
            stages = cut(
                40,
                pipeline=pipeline,
                virtual=virtual,
                v_shaped=schedule == "zbv",
                head_layers=1.0,
                checkpointed=None if kind != "none" else 0,
            )
            found.append(
                Strategy(
                    data_parallel_degree=4,
                    context_parallel_degree=1 + index % 2,
                    tensor_parallel_degree=tensor,
                    pipeline_parallel_degree=pipeline,
                    pipeline_schedule=schedule,
                    num_virtual_stages=virtual,
                    sequence_parallel=tensor > 1 and index % 3 == 0,
                    zero_stage=zero,
                    zero_group_size=(4, 2)[index % 2] if zero else 1,
                    states="mixed" if zero < 2 else "sharded_fp32",
                    gather=often if zero == 3 else "per_micro_batch",
                    reduce=often if zero >= 2 else "per_step",
                    activation_checkpointing=kind,
                    offload=offload,
                    gradient_accumulation_steps=8,
                    micro_batch_size=1 + index % 2,
                    stages=stages,
                )
            )
    return found


STRATEGIES = strategies()[::2]


def asked(room: Room, door: str, strategy: Any, name: str) -> Any:
    """Call one door of a room about the second pipeline rank of a model."""
    memory, real = RankMemory(workload(CATALOG[name]), "bf16", LENGTH, MEMORY), strategy._strategy
    question, shape, held = memory.question, memory.shape(real), shares(real)
    rank = min(1, len(held.by_rank) - 1)
    share, micro = held.by_rank[rank], memory.micro(real)
    states, saved = memory.states(real, share), memory.saved(real, share, rank, micro)
    roof = Roofline(question.work, CLUSTER, "bf16")
    slowest = SlowestRank(share, 1.0, 4.0, held.most_borders, held.by_rank[0], micro.of(share))
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "shape": ((strategy, shape), {}),
        "model_states": ((question, strategy, shape, share, states), {}),
        "micro_batch": ((question, strategy, shape, micro), {}),
        "saved": ((strategy, shape, share, rank, micro, saved), {}),
        "peak_candidates": ((question, strategy, share, states, micro, saved), {}),
        "least_bytes": ((question, strategy, states), {"late": True, "piped": True}),
        "messages": ((question, strategy, shape, share), {"borders": 2, "bucket_bytes": 2**26}),
        "pass_s": ((roof, question, strategy, shape), {}),
        "once_s": ((roof, question, strategy, shape, share), {}),
        "update_s": ((roof, strategy, ModelStates(owned=1e9)), {}),
        "step_s": ((roof, question, strategy, shape, slowest), {}),
    }
    positional, named = arguments[door]
    return getattr(room, door)(*positional, **named)


@pytest.mark.parametrize("name", ["opt-13b", "llama-13b"])
@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_door_reads_no_field_that_its_room_did_not_declare(room: Room, name: str) -> None:
    for door in DOORS:
        if room not in having(door):
            assert door not in room.reads, f"{room.name} declares what {door} reads, and has no such door"
            continue
        read: set[str] = set()
        for strategy in STRATEGIES:
            recording = Recording(strategy)
            asked(room, door, recording, name)
            read |= recording._read
        assert read <= set(room.reads.get(door, ())), (room.name, door)


def test_a_room_declares_fields_and_properties_of_a_strategy_alone() -> None:
    known = {field.name for field in fields(Strategy)} | {
        "num_gpus",
        "num_shards",
        "num_replicas",
        "shards_gradients",
        "degrees",
    }
    for room in ROOMS:
        assert set(room.reads) <= set(DOORS)
        assert {name for names in room.reads.values() for name in names} <= known


def test_what_is_kept_is_kept_under_everything_that_was_read() -> None:
    """Prices of many strategies asked in a row, which share what is kept, are those of each asked alone."""
    work = workload(CATALOG["opt-13b"])
    shared = Roofline(work, CLUSTER, "bf16")
    together = [step_time(shared, strategy, LENGTH) for strategy in STRATEGIES]
    for strategy, took in list(zip(STRATEGIES, together, strict=True))[::17]:
        assert step_time(Roofline(work, CLUSTER, "bf16"), strategy, LENGTH) == took
    assert read_by("micro_batch")(STRATEGIES[0]) != read_by("micro_batch")(replace(STRATEGIES[0], micro_batch_size=64))


def test_every_apply_door_is_a_function_of_its_module() -> None:
    assert [
        name for name in APPLY if not callable(getattr(import_module(name.split(":")[0]), name.split(":")[1]))
    ] == []
    assert [room.name for room in ROOMS] == [
        *("model", "cut", "tensor", "recompute", "context", "zero", "offload", "schedule")
    ]


def test_rules_name_fields_of_a_strategy_and_say_how_to_fix_it() -> None:
    rules = [rule for room in ROOMS for rule in (*room.impossible, *room.without_effect)]
    known = {field.name for field in fields(Strategy)}
    assert len(rules) > 7
    for rule in rules:
        assert set(rule.fields) <= known
        assert rule.fix
        assert "{" not in rule.formatted(Strategy())


def test_a_strategy_that_breaks_a_rule_is_told_which() -> None:
    broken = Strategy(data_parallel_degree=3, zero_group_size=2, zero_stage=1)
    rule = impossible(broken)
    assert rule is not None
    assert rule.formatted(broken) == "zero_group_size 2 does not divide data_parallel_degree 3"
    assert [r.formatted(s) for s in (Strategy(sequence_parallel=True),) for r in without_effect(s)] == [
        "sequence_parallel has no effect at tensor_parallel_degree 1"
    ]
