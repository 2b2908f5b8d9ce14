"""Offload over several ranks, in fp64, against one process; and from one placement to another through a checkpoint. Under
tensor and pipeline parallelism the same, and each rank holds less."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.cases import Case, Trial
from benchmarks.parity import judge, session_of, steps
from benchmarks.pool import Pool
from orchestrator.planner.trace.live_bytes import LiveBytes
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
EVERYWHERE = Offload(optimizer="host", parameters="host", activations="host")
TENSOR = Case(world_size=2, zero_stage=0, tensor=2, sequence_parallel=True)
STAGES = Case(world_size=2, zero_stage=0, pipeline=2, micro_batch_size=1)
ROUNDS = Case(world_size=4, zero_stage=1, pipeline=2, virtual=2, schedule="interleaved_1f1b", micro_batch_size=1)


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
        Trial(replace(TENSOR, offload=IN_FILES)),
        Trial(replace(ROUNDS, recompute="full", checkpointed=1, offload=IN_FILES)),
        Trial(replace(STAGES, virtual=2, schedule="zbv", offload=EVERYWHERE)),
        Trial(replace(STAGES, world_size=4, zero_stage=3, reduce="per_step", offload=EVERYWHERE)),
        Trial(replace(STAGES, offload=ALL), replace(TENSOR, offload=PART)),
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


def held(rank: int, case: Case) -> tuple[list[float], int, dict[str, int], int]:
    """(losses, bytes on the device at most, bytes elsewhere at most, units of parameters on the device at most)."""
    session = session_of(case)
    losses = steps(session, case, rank, 2)
    streams = getattr(session.states, "streams", None)
    most = 0
    if streams is not None:
        for unit in streams.units:
            ahead = unit.ahead

            def counted(ahead: Any = ahead) -> None:
                nonlocal most
                ahead()
                most = max(most, sum(each.here for each in streams.units))

            unit.ahead = counted
    with LiveBytes(session.tensors()) as live:
        losses += steps(session, case, rank, 1)
    assert streams is None or not any(unit.here for unit in streams.units)
    session.close()
    return losses, live.peak_bytes, live.away_peak, most


@pytest.mark.parametrize(
    "case", [TENSOR, replace(STAGES, virtual=2, schedule="zbv"), replace(STAGES, schedule="gpipe")], ids=str
)
def test_each_rank_holds_less_and_computes_the_same_bits(pool: Pool, case: Case):
    before = pool.run(held, case, world_size=case.world_size)
    after = pool.run(held, replace(case, offload=ALL), world_size=case.world_size)
    for (losses, most, _, _), (same, less, away, units) in zip(before, after, strict=True):
        assert same == losses
        assert less < 0.75 * most
        assert away["host"] > 0
        assert away["nvme"] > 0
        assert 1 <= units <= 3, "at most two blocks, and what stands outside them"
