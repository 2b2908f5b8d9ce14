"""Offload over several ranks, in fp64, against one process; and from one placement to another through a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.cases import Case, Trial
from benchmarks.parity import judge
from benchmarks.pool import Pool
from strategies.strategy import Offload


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(4) as pool:
        yield pool


HOST, NVME, ALL = (
    Offload(optimizer="host"),
    Offload(optimizer="nvme"),
    Offload(optimizer="nvme", parameters="host", activations="host"),
)
ON_HOST = Offload(optimizer="host", parameters="host")
PART = Offload(optimizer="nvme", optimizer_fraction=0.6)
IN_FILES = Offload(optimizer="nvme", parameters="nvme", activations="host")


@pytest.mark.parametrize(
    "trial",
    [
        Trial(Case(world_size=2, zero_stage=0, offload=IN_FILES)),
        Trial(Case(world_size=4, zero_stage=1, group=2, micro_batch_size=1, offload=NVME)),
        Trial(Case(world_size=3, zero_stage=1, recompute="full", offload=ALL)),
        Trial(Case(world_size=2, zero_stage=2, offload=PART)),
        Trial(Case(world_size=3, zero_stage=3, recompute="selective", offload=ALL)),
        Trial(Case(world_size=4, zero_stage=3, group=2, micro_batch_size=1, offload=ON_HOST)),
        Trial(Case(world_size=2, zero_stage=1, precision="bf16", offload=NVME)),
        Trial(Case(world_size=2, zero_stage=1, offload=NVME), Case(world_size=3, zero_stage=3, offload=HOST)),
        Trial(Case(world_size=3, zero_stage=3), Case(world_size=2, zero_stage=0, offload=IN_FILES)),
        Trial(Case(world_size=3, zero_stage=1, precision="bf16", offload=NVME),
              Case(world_size=3, zero_stage=1, precision="bf16", offload=NVME)),
    ],
    ids=str,
)  # fmt: skip
def test_an_offloaded_strategy_follows_the_plain_run(pool: Pool, trial: Trial):
    verdict = judge(pool, trial)
    assert verdict.passed, f"loss off by {verdict.loss}, weights by {verdict.weights}"
