"""fairscale runs the native engine's job: same losses, same checkpoints, and each rank holds its share alone."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import cases, parity
from benchmarks.pool import Pool
from strategies.catalog import unbuilt
from strategies.engines.native import build_session as native
from strategies.strategy import Offload, Strategy

FOLDER = Path(os.environ.get("SHARDWISE_ENGINES") or Path(sys.prefix) / "engines") / "fairscale"
installed = pytest.mark.skipif(
    not FOLDER.is_dir() and importlib.util.find_spec("fairscale") is None,
    reason="fairscale is not installed: make engine-fairscale",
)
CASES = [
    ("fp64", 1, {}),
    ("fp32", 2, {}),
    ("fp32", 3, {}),
    ("bf16", 1, {}),
    ("bf16", 3, {}),
    ("fp32", 3, {"offload": Offload(optimizer="host", parameters="host")}),
    ("fp32", 2, {"activation_checkpointing": "full"}),
    ("fp32", 3, {"activation_checkpointing": "full", "offload": Offload(activations="host")}),
]
BOUNDS = {"fp64": 1e-6, "fp32": 2e-5, "bf16": 5e-3}


def session_of(engine: str, case: cases.Case, changes: dict[str, Any]) -> Any:
    import warnings

    from strategies.engines.fairscale import build_session

    warnings.simplefilter("ignore")
    with torch.device("meta"):
        module = parity.OPT(cases.ARCH)
    build: Any = build_session if engine == "fairscale" else native
    states = "mixed" if engine == "fairscale" and case.zero_stage == 2 and case.precision == "bf16" else None
    if engine == "fairscale" and case.zero_stage == 2:
        changes = changes | {"reduce": "per_step"}
    strategy = replace(case.strategy, **changes, **({"states": states} if states else {}), engine=engine)
    weights = parity.initial_weights(cases.ARCH, parity.SEED)
    return build(module, strategy=strategy, precision=case.precision, weights=weights, optimizer=parity.OPTIMIZER)


def losses(rank: int, precision: str, zero_stage: int, changes: dict[str, Any]) -> tuple[list[float], list[float], int]:
    case = cases.Case(2, zero_stage, precision=precision)
    plain = native_losses(case, rank)
    session = session_of("fairscale", case, changes)
    got = parity.steps(session, case, rank, 10)
    held = sum(t.numel() for t in session.tensors()["optimizer_states"])
    session.close()
    return plain, got, held


def native_losses(case: cases.Case, rank: int) -> list[float]:
    session = session_of("native", case, {})
    result = parity.steps(session, case, rank, 10)
    session.close()
    return result


def halfway(rank: int, folder: str) -> tuple[list[float], list[float]]:
    """native -> fairscale 3 -> fairscale 1 -> native, 5 steps each, beside one undisturbed run."""
    cases = [("native", 1), ("fairscale", 3), ("fairscale", 1), ("native", 3)]
    undisturbed = session_of("native", cases.Case(2, 1, precision="fp32"), {})
    whole = parity.steps(undisturbed, cases.Case(2, 1, precision="fp32"), rank, 20)
    undisturbed.close()
    changed: list[float] = []
    for index, (engine, zero_stage) in enumerate(cases):
        case = cases.Case(2, zero_stage, precision="fp32")
        session = session_of(engine, case, {})
        if index:
            parity.load(session, f"{folder}/{index}")
        changed += parity.steps(session, case, rank, 5)
        dist.barrier()
        parity.save(session, f"{folder}/{index + 1}")
        session.close()
    return whole, changed


@installed
def test_fairscale_follows_native_and_each_rank_holds_its_share() -> None:
    total = 2 * sum(p.numel() for p in parity.OPT(cases.ARCH).parameters())
    with Pool(2) as pool:
        for precision, zero_stage, changes in CASES:
            ranks = pool.run(losses, precision, zero_stage, changes, world_size=2)
            plain, got, _ = ranks[0]
            worst = max(abs(a - b) for a, b in zip(plain, got, strict=True))
            assert worst < BOUNDS[precision], (precision, zero_stage, changes, plain, got)
            assert max(held for *_, held in ranks) < 0.7 * total, (precision, zero_stage, changes)


@installed
def test_a_run_changes_engine_halfway_and_goes_on(tmp_path: Path) -> None:
    with Pool(2) as pool:
        whole, changed = pool.run(halfway, str(tmp_path), world_size=2)[0]
    assert changed == pytest.approx(whole, abs=2e-5)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("zero_stage", {"zero_stage": 0}),
        ("tensor_parallel_degree", {"tensor_parallel_degree": 2}),
        ("activation_checkpointing", {"activation_checkpointing": "selective"}),
        ("gather", {"gather": "per_step"}),
        ("offload", {"offload": Offload(optimizer="nvme")}),
        ("compile", {"compile": True}),
    ],
)
def test_what_fairscale_cannot_do_is_refused_by_field(field: str, changes: dict[str, Any]) -> None:
    sharded = {"zero_stage": 3, "zero_group_size": 2, "states": "sharded_fp32"}
    strategy = Strategy(engine="fairscale", data_parallel_degree=2, **sharded)
    assert unbuilt(strategy) is None
    limit = unbuilt(replace(strategy, **changes))
    assert limit is not None
    assert limit.field == field
