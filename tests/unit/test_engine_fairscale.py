"""What the fairscale engine refuses, by field. That it follows native is tests/parity/test_engines.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from strategies.catalog import unbuilt
from strategies.strategy import Offload, Strategy


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
