"""What the ColossalAI engine refuses, by field, and how the planner sees it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from strategies.catalog import unbuilt
from strategies.strategy import Offload, Strategy


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("gather", {"zero_stage": 3, "gather": "per_step"}),
        ("states", {"zero_stage": 3, "states": "full"}),
        ("tensor_parallel_degree", {"tensor_parallel_degree": 2}),
        ("zero_group_size", {"data_parallel_degree": 4}),
        ("states", {"states": "sharded_fp32"}),
        ("reduce", {"gradient_accumulation_steps": 2, "zero_stage": 1, "reduce": "per_micro_batch"}),
        ("reduce", {"gradient_accumulation_steps": 2, "zero_stage": 2, "reduce": "per_step"}),
        ("offload", {"offload": Offload(optimizer="nvme")}),
        ("offload", {"offload": Offload(optimizer="host", parameters="host")}),
        ("offload", {"zero_stage": 3, "offload": Offload(parameters="host")}),
        ("offload", {"zero_stage": 3, "offload": Offload(optimizer="host", optimizer_fraction=0.5)}),
        ("compile", {"compile": True}),
    ],
)
def test_what_colossalai_cannot_do_is_refused_by_field(field: str, changes: dict[str, Any]) -> None:
    strategy = Strategy(engine="colossalai", data_parallel_degree=2, zero_stage=1, zero_group_size=2, states="mixed")
    assert unbuilt(strategy) is None
    limit = unbuilt(replace(strategy, **changes))
    assert limit is not None
    assert limit.field == field
