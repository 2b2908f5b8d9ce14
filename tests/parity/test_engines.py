"""A seeded slice of `make engines`: each engine follows native, and something shows that it split or moved what it says. And of
`make switch`: a run goes through all engines."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import pytest

from benchmarks import parity
from benchmarks.cases import Case
from benchmarks.engines import Judge, Row, rows, session_of, steps
from benchmarks.pool import Pool
from benchmarks.switch import CHAINS, ENDS, pools_of, switch
from strategies.engines.installed import is_installed

ALWAYS = {
    "colossalai": ("Gemini, all on host", "Hybrid, tensor 2", "Hybrid, pipeline 2"),
    "fairscale": ("FSDP, parameters and states on host", "FSDP, its inputs on host"),
}
ON_HOST = ("colossalai Gemini, bf16", "colossalai Gemini, states on host, bf16")
NARROW = [chain for chain in CHAINS if all(ENDS[name].case.world_size == 2 for name in chain)]


@pytest.fixture(scope="module")
def pools() -> Iterator[Mapping[str, Pool]]:
    for engine in ("colossalai", "fairscale"):
        if not is_installed(engine, engine):
            pytest.skip(f"make engine-{engine}")
    with ExitStack() as stack:
        yield pools_of(NARROW, stack)


def drawn(engine: str, count: int) -> list[Row]:
    mine = [row for row in rows() if row.engine == engine and row.case.world_size == 2]
    kept = [row for row in mine if row.plugin in ALWAYS[engine]]
    return kept + random.Random(0).sample([row for row in mine if row not in kept], count)


@pytest.mark.parametrize(("engine", "count"), [("colossalai", 3), ("fairscale", 2)])
def test_an_engine_follows_native_and_shows_what_it_split(pools: Mapping[str, Pool], engine: str, count: int) -> None:
    judge = Judge(pools["native"], pools[engine])
    for row in drawn(engine, count):
        verdict = judge(row)
        assert verdict.passed, str(verdict)


@pytest.mark.parametrize("chain", [NARROW[0], ON_HOST, *random.Random(0).sample(NARROW[1:], 2)], ids=str)
def test_a_run_changes_engine_and_goes_on(pools: Mapping[str, Pool], chain: tuple[str, ...]) -> None:
    switched = switch(pools, chain)
    assert switched.passed, str(switched)


def skipped(rank: int, row: Row) -> tuple[list[float], dict[str, bool]]:
    """A step, one that overflows, another: losses, and which tensors of the state the overflow left as they were."""
    session = session_of(row)
    losses = steps(session, row.case, rank, 1)
    before = parity.whole(session.state_dict())
    session.scale = 2.0**40
    losses += steps(session, row.case, rank, 1)
    after = parity.whole(session.state_dict())
    assert session.scale == 2.0**39
    session.scale = 2.0**10
    losses += steps(session, row.case, rank, 1)
    same = {
        name: bool((after[name] == before[name]).all())
        for name in before
        if name.startswith(("model", "optimizer.exp"))
    }
    session.close()
    return losses, same


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_step_that_overflows_leaves_the_weights(pools: Mapping[str, Pool], zero_stage: int) -> None:
    row = Row("colossalai", "", Case(2, zero_stage, precision="fp16"), "")
    losses, same = pools["colossalai"].run(skipped, row, world_size=2)[0]
    assert all(same.values())
    assert losses[1] == pytest.approx(losses[2], abs=1e-6)  # the same weights see the same batch
    assert losses[2] < losses[0]
