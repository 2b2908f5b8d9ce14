"""A seeded slice of `make parity`, and the runs that go on elsewhere."""

from __future__ import annotations

import multiprocessing
import random

import pytest

from benchmarks.parity import Case, matrix, passed, run

FIXED = [
    Case(world_size=3, zero_stage=1, recompute="full"),
    Case(world_size=2, zero_stage=3, recompute="selective"),
    Case(world_size=2, zero_stage=2, micro_batch_size=1, gather="per_step", reduce="per_step"),
    Case(world_size=2, zero_stage=0),
]


def test_strategies_follow_one_process_in_fp64_and_in_low_precision():
    drawn = [case for case in matrix() if case.world_size <= 2]
    cases = FIXED + random.Random(0).sample(drawn, 6)
    results = run(cases)
    assert len(results) == len(cases)
    for case, loss, weight, _ in results:
        assert passed(case, loss, weight), f"{case}: loss off by {loss}, weights by {weight}"


@pytest.fixture(autouse=True)
def _no_process_left():
    yield
    assert not multiprocessing.active_children()
