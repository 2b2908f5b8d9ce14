"""A seeded slice of `make engines`: each engine follows native, and something shows that it split or moved what it says."""

from __future__ import annotations

import random

import pytest

from benchmarks.engines import Judge, Row, rows
from benchmarks.pool import Pool
from strategies.engines.installed import is_installed

ALWAYS = {"colossalai": ("LowLevelZero 2",), "fairscale": ()}


def drawn(engine: str, count: int) -> list[Row]:
    mine = [row for row in rows() if row.engine == engine and row.case.world_size == 2]
    kept = [row for row in mine if row.plugin in ALWAYS[engine]]
    return kept + random.Random(0).sample([row for row in mine if row not in kept], count)


@pytest.mark.parametrize(("engine", "count"), [("colossalai", 4), ("fairscale", 2)])
def test_an_engine_follows_native_and_shows_what_it_split(engine: str, count: int) -> None:
    if not is_installed(engine, engine):
        pytest.skip(f"make engine-{engine}")
    with Pool(2) as native, Pool(2) as pool:
        judge = Judge(native, pool)
        verdicts = [judge(row) for row in drawn(engine, count)]
    for verdict in verdicts:
        assert verdict.passed, str(verdict)
