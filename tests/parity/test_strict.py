"""Under the rules of NCCL a slice of the parity matrix ends as it does on gloo, and what NCCL would hang in is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from benchmarks.cases import Case
from benchmarks.parity import BOUNDS, session_of, steps
from benchmarks.pool import Pool
from benchmarks.strict import SCHEDULES, TIMEOUT_S, few, judge, rows
from strategies.pipeline import apply as pipeline

IMPATIENT_S = 4.0
"""Long enough for a rank that comes at all."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(4, backend="strict", timeout_s=TIMEOUT_S) as pool:
        yield pool


@pytest.mark.parametrize("case", few(), ids=str)
def test_a_strategy_keeps_the_rules_of_nccl(pool: Pool, case: Case) -> None:
    assert judge(pool, case) <= BOUNDS["fp64"][1]


def swapped(rank: int) -> None:
    tensors = [torch.zeros(3), torch.zeros(5)]
    for tensor in tensors if rank == 0 else tensors[::-1]:
        dist.all_reduce(tensor)


def absent(rank: int) -> None:
    group = dist.new_group([0, 1])
    if rank == 0:
        dist.all_reduce(torch.zeros(1), group=group)


def crossed(rank: int) -> None:
    """Both send before they receive, each direction with a communicator of its own, opened."""
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    for group, source in zip(groups, (0, 1), strict=True):
        (dist.send if rank == source else dist.recv)(torch.zeros(1), 1 - rank, group=group)
    dist.send(torch.zeros(1), 1 - rank, group=groups[rank])
    dist.recv(torch.zeros(1), 1 - rank, group=groups[1 - rank])


def both_first(rank: int) -> None:
    """Both send first on the one communicator of their pair."""
    work = dist.isend(torch.zeros(1), 1 - rank)
    dist.recv(torch.zeros(1), 1 - rank)
    work.wait()


def smaller(rank: int) -> None:
    (dist.send if rank == 0 else dist.recv)(torch.zeros(2 + rank), 1 - rank)


def unopened(rank: int) -> None:
    """A pipeline that leaves its communicators to the first step."""
    pipeline._open = lambda build, channels: None  # type: ignore[assignment]
    case = Case(world_size=2, zero_stage=0, pipeline=2, schedule="gpipe", micro_batch_size=1)
    steps(session_of(case), case, rank, 1)


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (swapped, ["operation 0 of the communicator all", "all_reduce SUM of 3", "all_reduce SUM of 5", "in swapped"]),
        (absent, ["nobody came in 0:00:04", "all/here/1", "Rank 0 opens the communicator all", "in absent"]),
        (crossed, ["Rank 0 waits for the receive of", "Rank 1 waits for the receive of", "in crossed"]),
        (both_first, ["communicator 0-1", "from 0 to 1", "from 1 to 0", "in both_first"]),
        (smaller, ["2 float32 from 0 to 1", "3 float32 from 0 to 1", "in smaller"]),
        (unopened, ["Rank 0 opens the communicator 0-1", "Rank 1 waits for the send of", "runner.py"]),
    ],
)
def test_what_nccl_would_hang_in_is_told_with_both_stacks(mistake: Callable[[int], None], told: list[str]) -> None:
    with pytest.raises(RuntimeError) as raised, Pool(2, backend="strict", timeout_s=IMPATIENT_S) as pool:
        pool.run(mistake, world_size=2)
    assert all(words in str(raised.value) for words in told), str(raised.value)
    assert "RuleBroken" in str(raised.value)


def test_gloo_forgives_a_pipeline_that_leaves_its_communicators_to_the_first_step() -> None:
    with Pool(2) as pool:
        pool.run(unopened, world_size=2)


def test_the_slice_holds_every_kind_of_row() -> None:
    """Of the whole: every schedule, 2 to 4 ranks, ZeRO 0 to 3, tensor 2."""
    cases = rows()
    assert {(c.schedule, c.virtual, c.pipeline) for c in cases if c.pipeline > 1} == {
        (schedule, virtual, ranks) for schedule, virtual in SCHEDULES for ranks in (2, 3, 4)
    }
    assert {(c.zero_stage, c.tensor) for c in cases} == {(stage, tensor) for stage in range(4) for tensor in (1, 2)}
    assert len({str(case) for case in cases}) == len(cases)
