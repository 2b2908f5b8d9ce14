"""What several ranks agree on when one of them goes wrong, and a world that is only played."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.cases import ARCH, Case
from benchmarks.parity import micro_batches, session_of, steps, whole
from benchmarks.pool import Pool
from orchestrator.models.decoder import Decoder
from orchestrator.planner.trace.live_bytes import LiveBytes
from strategies.engines.native import build_session


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2) as pool:
        yield pool


def poisoned(rank: int, case: Case) -> tuple[str, bool, list[float]]:
    """Rank 1's copy of the weights is not finite for one step."""
    session = session_of(case)
    before = whole(session.state_dict())
    weight = session.module.head.norm.bias
    local = getattr(weight.data, "_local_tensor", weight.data)
    clean = local.clone()
    if rank == 1:
        local.fill_(float("nan"))
    message = ""
    try:
        steps(session, case, rank, 1)
    except FloatingPointError as error:
        message = str(error)
    local.copy_(clean)
    after = whole(session.state_dict())
    same = all((after[name] == value).all() for name, value in before.items() if name.startswith("model."))
    losses = steps(session, case, rank, 2)
    session.close()
    return message, bool(same), losses


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_leaves_no_trace(pool: Pool, zero_stage: int):
    case = Case(world_size=2, zero_stage=zero_stage)
    undisturbed = pool.run(plain, case, world_size=2)
    for (message, same, losses), expected in zip(pool.run(poisoned, case, world_size=2), undisturbed, strict=True):
        assert message == "the loss is nan; the weights are those of the step before"
        assert same
        assert losses == expected


def plain(rank: int, case: Case) -> list[float]:
    session = session_of(case)
    losses = steps(session, case, rank, 2)
    session.close()
    return losses


def overflowing(rank: int, case: Case) -> tuple[Any, float]:
    session = session_of(case)
    session.scale = 2.0**40 if rank == 1 else 2.0**10
    result = session.step(micro_batches(case, rank), num_targets=84, learning_rate=1e-2)
    scale = session.scale
    session.close()
    return result, scale


HALF = Case(world_size=2, zero_stage=0, precision="fp16", micro_batch_size=1)
SPLITS = [
    replace(HALF, tensor=2),
    replace(HALF, pipeline=2),
    replace(HALF, pipeline=2, virtual=2, schedule="interleaved_zero_bubble"),
]


@pytest.mark.parametrize("case", [HALF, replace(HALF, zero_stage=2), *SPLITS], ids=str)
def test_an_overflow_on_one_rank_skips_the_step_on_all(pool: Pool, case: Case):
    results = pool.run(overflowing, case, world_size=2)
    assert [result.skipped for result, _ in results] == [True, True]


def scaled_down(rank: int, case: Case) -> list[tuple[bool, float]]:
    """(skipped, scale) of each step from a scale that is far too large."""
    session = session_of(case)
    session.scale = 2.0**24
    told = []
    for _ in range(12):
        result = session.step(micro_batches(case, rank), num_targets=84, learning_rate=1e-2)
        told.append((result.skipped, session.scale))
    session.close()
    return told


@pytest.mark.parametrize("case", SPLITS[:2], ids=str)
def test_the_loss_scale_falls_alike_on_all_ranks_until_the_steps_count(pool: Pool, case: Case):
    first, second = pool.run(scaled_down, case, world_size=2)
    assert first == second
    num_skipped = sum(skipped for skipped, _ in first)
    assert 0 < num_skipped < len(first)
    assert first[0][0]
    assert not first[-1][0]
    assert first[-1][1] == 2.0 ** (24 - num_skipped)


def reductions(rank: int, case: Case) -> tuple[int, int]:
    """Reduce-scatters of gradients, and all-reduces, in one step."""
    session = session_of(case)
    steps(session, case, rank, 1)
    with (
        mock.patch.object(dist, "reduce_scatter_single", wraps=dist.reduce_scatter_single) as scatters,
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sums,
    ):
        steps(session, case, rank, 1)
    session.close()
    return scatters.call_count, sums.call_count


@pytest.mark.parametrize(("schedule", "virtual"), [("1f1b", 1), ("zbv", 2)])
def test_gradients_are_reduced_with_each_micro_batch_under_a_pipeline(schedule: str, virtual: int):
    case = Case(world_size=4, zero_stage=3, pipeline=2, schedule=schedule, virtual=virtual, micro_batch_size=1)
    with Pool(4) as pool:
        often = pool.run(reductions, case, world_size=4)
        once = pool.run(reductions, replace(case, reduce="per_step"), world_size=4)
    blocks, ends = 2, [2, 0] if schedule == "zbv" else [1, 1]
    for rank in range(4):
        outside = ends[rank // 2]
        assert often[rank][0] == 4 * (blocks + outside)
        assert once[rank][0] == blocks + min(outside, 1)
        assert often[rank][1] == once[rank][1], "what is beside them: the shared table, loss and norm"


def layouts(rank: int, cases: list[Case]) -> set[tuple[Any, ...]]:
    told = set()
    for case in cases:
        session = session_of(case)
        state = session.state_dict()
        told.add(tuple(sorted((n, t.shape, t.dtype) if torch.is_tensor(t) else (n,) for n, t in state.items())))
        session.close()
    return told


def test_a_checkpoint_has_the_same_names_shapes_and_dtypes_under_every_strategy(pool: Pool):
    cases = [Case(world_size=2, zero_stage=stage, precision="bf16") for stage in range(4)]
    alone = [replace(case, world_size=1) for case in cases]
    assert len(set.union(*pool.run(layouts, cases, world_size=2), *pool.run(layouts, alone, world_size=1))) == 1


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_step_can_be_played_on_fake_tensors_in_a_fake_world(zero_stage: int):
    """What the planner's trace does: the real step, no values, no memory."""
    case = Case(world_size=8, zero_stage=zero_stage, precision="bf16", recompute="selective")
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        with torch.device("meta"):
            module = Decoder(ARCH)
        with FakeTensorMode(allow_non_fake_inputs=True):
            session = build_session(
                module, strategy=case.strategy, precision="bf16", weights=lambda _, shape: torch.empty(shape)
            )
            session.step(micro_batches(case, 0), num_targets=84, learning_rate=1e-2)
            with LiveBytes(session.tensors()) as live:
                session.step(micro_batches(case, 0), num_targets=84, learning_rate=1e-2)
        num_parameters = sum(p.numel() for p in Decoder(ARCH).parameters())
        shards = 1 if zero_stage == 0 else 8
        moments = live.live["optimizer_states"] / (8 * num_parameters / shards)
        assert 1 <= moments < 1.1, "the first rank holds the padded share"
    finally:
        dist.destroy_process_group()
