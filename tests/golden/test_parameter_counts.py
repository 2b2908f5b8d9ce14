"""Exact parameter counts of published models."""

from __future__ import annotations

import pytest

from orchestrator.models.architecture import CATALOG, make_architecture, num_parameters

COUNTS = {  # transformers' own modules at these shapes; GPT-3 by arXiv:2005.14165 table 2.1
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "opt-175b": 174_604_468_224,
    "gpt3-175b": 174_604_259_328,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-65b": 65_285_660_672,
    "bloom-560m": 559_214_592,
    "bloom-176b": 176_247_271_424,
}


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameters(name, count):
    assert num_parameters(CATALOG[name]) == count


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"family": "otp"}, "did you mean opt"),
        ({"num_heads": 7}, "hidden_size 64 does not divide by num_heads 7: 4 heads would|8 heads would"),
        ({"num_kv_heads": 3}, "num_heads 4 does not divide by num_kv_heads 3"),
        ({"num_layers": 0}, "num_layers is 0: it must be at least 1"),
    ],
)
def test_an_impossible_shape_is_refused_with_its_number(wrong, message):
    with pytest.raises(ValueError, match=message):
        make_architecture(**({"family": "opt", "num_layers": 1, "hidden_size": 64, "num_heads": 4} | wrong))
