"""A seeded slice of `make parity`: each strategy follows the plain run, goes on elsewhere, and resumes bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from torch import Tensor

from benchmarks.cases import ADAPTED, Case, Run, Trial
from benchmarks.drawn import ROOMS, coverage, drawn
from benchmarks.matrix import matrix
from benchmarks.parity import judge, micro_batches, session_of
from benchmarks.pool import Pool
from strategies.engines.engine import MicroBatch


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(4) as pool:
        yield pool


def sample(kind: str, count: int) -> list[Trial]:
    return random.Random(0).sample([trial for trial in matrix() if trial.kind == kind and _small(trial)], count)


def _small(trial: Trial) -> bool:
    return all(case.world_size <= 4 for case in (trial.case, trial.then) if case)


HYBRID = Case(world_size=4, zero_stage=3, group=2, micro_batch_size=1)
SHARDED = Case(world_size=3, zero_stage=1, recompute="full")
ONCE_A_STEP = Case(world_size=2, zero_stage=2, micro_batch_size=1, gather="per_step", reduce="per_step")
MIXED = Case(world_size=3, zero_stage=1, precision="bf16", micro_batch_size=1)
SCALED = Case(world_size=4, zero_stage=1, group=2, precision="fp16", micro_batch_size=1)


SPLIT = Case(world_size=4, zero_stage=3, tensor=2, sequence_parallel=True)
STAGES = Case(world_size=4, zero_stage=1, pipeline=2, micro_batch_size=1)
ROUND = Case(world_size=2, zero_stage=0, pipeline=2, virtual=2, schedule="interleaved_1f1b", micro_batch_size=1)
BOTH = Case(world_size=4, zero_stage=0, tensor=2, pipeline=2, sequence_parallel=True, micro_batch_size=2)
FOLDED = Case(world_size=4, zero_stage=2, pipeline=2, virtual=2, schedule="zbv", micro_batch_size=1, reduce="per_step")
ONE = Case(
    world_size=4, zero_stage=2, pipeline=2, schedule="interleaved_zero_bubble", precision="bf16", micro_batch_size=4
)


@pytest.mark.parametrize(
    "trial",
    [
        *(Trial(case) for case in (SPLIT, STAGES, FOLDED, replace(ROUND, schedule="interleaved_zero_bubble"))),
        Trial(replace(ROUND, recompute="full", checkpointed=1)),
        Trial(replace(FOLDED, zero_stage=3, reduce="per_micro_batch")),
        Trial(replace(STAGES, zero_stage=3)),
        Trial(replace(ONE, reduce="per_step")),
        *map(Trial, drawn(3, seed=0, most_gpus=4)),
        Trial(BOTH, SPLIT),
        Trial(SPLIT, STAGES),
        *(
            Trial(case)
            for case in (HYBRID, SHARDED, ONCE_A_STEP, Case(world_size=1, zero_stage=3, recompute="selective"))
        ),
        *sample("parity", 6),
        *sample("family", 4),
        *(
            Trial(Run(case.strategy, case.precision, task))
            for case, task in zip((SPLIT, FOLDED, BOTH), ADAPTED, strict=True)
        ),
        Trial(Run(SPLIT.strategy, "fp64", ADAPTED[0]), Run(FOLDED.strategy, "fp64", ADAPTED[0])),
        *sample("context", 4),
        Trial(SHARDED, HYBRID),
        Trial(HYBRID, Case(world_size=1, zero_stage=0)),
        *sample("resume", 2),
        Trial(MIXED, MIXED),
        Trial(SCALED, SCALED),
        *sample("bitwise", 2),
    ],
    ids=str,
)
def test_a_strategy_follows_the_plain_run(pool: Pool, trial: Trial):
    verdict = judge(pool, trial)
    assert verdict.passed, f"loss off by {verdict.loss}, weights by {verdict.weights}"


@pytest.mark.parametrize("case", [STAGES, ROUND, FOLDED], ids=str)
def test_a_pipeline_evaluates_batch_after_batch_and_keeps_one_batchs_messages(pool: Pool, case: Case) -> None:
    plain, _ = evaluated(0, Case(world_size=1, zero_stage=0))
    for loss, kept in pool.run(evaluated, case, world_size=case.world_size):
        assert loss == pytest.approx(plain, rel=1e-12)
        assert kept <= case.virtual


def evaluated(rank: int, case: Case) -> tuple[float, int]:
    """(the loss of all batches, messages not yet waited for as each batch has been through this rank, at their most)."""
    session, kept = session_of(case), 0
    runner, once = session.runner, session.runner.evaluate

    def counted(batch: MicroBatch) -> Tensor | None:
        nonlocal kept
        loss = once(batch)
        kept = max(kept, len(getattr(runner, "sends", ())))
        return loss

    runner.evaluate = counted
    batches = micro_batches(case, rank)
    found = session.evaluate(batches * (1 if len(batches) > 1 else 2))
    session.close()
    return found.loss / found.num_targets, kept


def test_the_planner_draws_every_room():
    """One draw each: what `make parity` plays forty of."""
    assert min(coverage(drawn(len(ROOMS))).values()) > 0
