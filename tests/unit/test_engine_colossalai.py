"""What the ColossalAI engine refuses, by field, and how the planner sees it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from strategies.catalog import unbuilt
from strategies.strategy import Offload, Strategy


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("gather", {"zero_stage": 3, "gather": "per_step"}),
        ("states", {"zero_stage": 3, "states": "full"}),
        ("context_parallel_degree", {"context_parallel_degree": 2}),
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


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("sequence_parallel", {"sequence_parallel": True}),
        ("pipeline_schedule", {"pipeline_parallel_degree": 2, "pipeline_schedule": "gpipe"}),
        ("gradient_accumulation_steps", {"pipeline_parallel_degree": 4, "gradient_accumulation_steps": 3}),
        ("zero_stage", {"zero_stage": 2}),
        ("attention", {"attention": "flash"}),
        ("activation_checkpointing", {"activation_checkpointing": "full"}),
        ("mesh_order", {"mesh_order": ("tensor", "pipeline", "data", "context")}),
        ("offload", {"offload": Offload(optimizer="host"), "zero_stage": 1}),
    ],
)
def test_what_its_hybrid_cannot_do_is_refused_by_field(field: str, changes: dict[str, Any]) -> None:
    strategy = Strategy(engine="colossalai", tensor_parallel_degree=2, attention="math", reduce="per_step")
    assert unbuilt(strategy) is None
    limit = unbuilt(replace(strategy, **changes))
    assert limit is not None
    assert limit.field == field


@pytest.mark.parametrize(
    ("precision", "changes", "told"),
    [
        ("fp32", {"zero_stage": 3, "zero_group_size": 2, "data_parallel_degree": 2}, "computes in bf16, fp16; set"),
        ("fp64", {"zero_stage": 1, "zero_group_size": 2, "data_parallel_degree": 2}, "computes in bf16, fp16, fp32"),
        ("fp32", {"zero_stage": 1, "tensor_parallel_degree": 2, "attention": "math"}, "computes in bf16; set"),
        ("fp16", {"tensor_parallel_degree": 2, "attention": "math"}, "computes in bf16, fp32; set"),
        ("bf16", {"states": "full"}, "ColossalAI keeps mixed"),
        ("bf16", {"data_parallel_degree": 2}, "want a process group of 2"),
    ],
)
def test_a_session_that_cannot_be_is_refused_before_the_package_is_asked_for(
    precision: str, changes: dict[str, Any], told: str
) -> None:
    from strategies.engines.colossalai import build_session

    strategy = Strategy(engine="colossalai", reduce="per_step", **changes)
    with pytest.raises(ValueError, match=told):
        build_session(torch.nn.Linear(1, 1), strategy=strategy, precision=precision, weights=lambda *_: torch.zeros(1))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"ffn_dim": 45}, "does not divide the model's ffn_dim 45"),
        ({"tie_word_embeddings": False}, "ties OPT's output"),
    ],
)
def test_a_model_that_shardformer_would_cut_wrong_is_refused(changed: dict[str, Any], told: str) -> None:
    from strategies.engines.colossalai_hybrid import _refuse_model

    config = {"num_attention_heads": 4, "ffn_dim": 44, "hidden_size": 24, "tie_word_embeddings": True}
    strategy = Strategy(engine="colossalai", tensor_parallel_degree=2)
    _refuse_model(config, strategy)
    with pytest.raises(ValueError, match=told):
        _refuse_model(config | changed, strategy)
