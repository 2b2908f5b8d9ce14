"""Bytes of a step: what is planned, what is traced and what a run's allocator gives, rank by rank."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch.profiler import record_function

from benchmarks.memory import COUNTED, Line, judge, name_of, peaks, reported, rooms
from benchmarks.pool import Pool
from benchmarks.trace import Case
from strategies.offload import host

FEW = (
    "fp32 world 1 ZeRO 0 none 2x2 activations on host",
    "fp32 world 2 ZeRO 3 none 2x2",
    "bf16 world 2 tensor 2 sequence ZeRO 0 none 2x2",
    "fp32 world 2 context 2 ZeRO 0 none 2x2",
    "fp32 world 2 pipeline 2x2 interleaved_1f1b ZeRO 0 none 4x2",
    "fp32 world 1 ZeRO 0 none 2x2 optimizer on nvme parameters on nvme",
    "bf16 world 2 ZeRO 2 none 2x2 lora q_proj v_proj",
)
"""`python -m benchmarks.memory` plays all rooms."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2) as pool:
        yield pool


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case for case in rooms() if name_of(case) in FEW], ids=name_of)
def test_what_is_planned_is_what_is_allocated(pool: Pool, case: Case) -> None:
    lines = judge(pool, case)
    assert all(line.holds for line in lines), "\n".join(map(str, lines))
    # Two per mille: a single activation that a pipeline keeps after it was received is more.
    assert all(abs(line.live - line.trace) <= 0.002 * line.trace for line in lines), "\n".join(map(str, lines))


def test_the_few_are_among_the_rooms() -> None:
    assert set(FEW) <= {name_of(case) for case in rooms()}


@pytest.mark.filterwarnings("ignore")
def test_the_count_is_the_allocators_whoever_gives_back() -> None:
    before = [torch.empty(8000)]
    with reported() as events:
        kept = torch.empty(1000)
        with record_function(COUNTED):
            gone = [torch.empty(5000)]
            with host.placed("host"):
                away = torch.empty(3000)
            thread = threading.Thread(target=gone.clear)
            thread.start()
            thread.join()
            again = torch.empty(2500)
        after = torch.empty(100_000)
    assert peaks(events()) == (4 * (1000 + 5000), 4 * 3000)
    del before, kept, away, again, after


@pytest.mark.parametrize(
    ("planned", "traced", "allocated", "holds"),
    [
        (100, 100, 100, True),
        (105, 100, 95, True),
        (99, 100, 100, False),
        (106, 100, 100, False),
        (100, 100, 106, False),
    ],
)
def test_a_line_holds_within_its_bounds(planned: int, traced: int, allocated: int, holds: bool) -> None:
    assert Line("rank 0", planned, traced, allocated).holds is holds
