"""Exact parameter counts of published models."""

from __future__ import annotations

import pytest

from orchestrator.models.architecture import CATALOG, find_architecture, make_architecture, num_parameters

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
        ({"word_embedding_size": 0}, "word_embedding_size is 0: it must be at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0: it must be at least 0 and below 1"),
        ({"family": "llama", "hidden_size": 60}, "is 15: llama rotates pairs of them, .*; hidden_size 64 would do"),
    ],
)
def test_an_impossible_shape_is_refused_with_its_number(wrong, message):
    with pytest.raises(ValueError, match=message):
        make_architecture(**({"family": "opt", "num_layers": 1, "hidden_size": 64, "num_heads": 4} | wrong))


def peer(name):
    """transformers' own module of a catalog shape, cut to two layers of width 64, on the meta device."""
    import torch
    import transformers as hf

    configs = {
        "gpt2": lambda: hf.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=96, n_positions=32),
        "mpt-7b": lambda: hf.MptConfig(n_layers=2, d_model=64, n_heads=4, vocab_size=96, max_seq_len=32),
        "llama-7b": lambda: hf.LlamaConfig(
            num_hidden_layers=2,
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=256,
            vocab_size=96,
        ),
        "bloom-560m": lambda: hf.BloomConfig(n_layer=2, hidden_size=64, n_head=4, vocab_size=96),
    }
    with torch.device("meta"):
        module = hf.AutoModelForCausalLM.from_config(configs[name]())
    module.tie_weights()
    return sum(parameter.numel() for parameter in set(module.parameters()))


@pytest.mark.parametrize("name", ["gpt2", "mpt-7b", "llama-7b", "bloom-560m"])
def test_the_closed_form_of_a_family_counts_what_transformers_builds(name):
    arch = make_architecture(
        family=CATALOG[name].family,
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2 if name == "llama-7b" else None,
        vocab_size=96,
        max_position=32,
    )
    assert num_parameters(arch) == peer(name)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("glm-130b", 130), ("gpt3-1.3b", 1.3), ("gpt3-13b", 13), ("llama-33b", 32.5), ("bloom-7b1", 7.1), ("mpt-30b", 30)],
)
def test_a_catalog_size_is_what_its_name_says(name, billions):
    assert num_parameters(CATALOG[name]) / 1e9 == pytest.approx(billions, rel=0.015)


def test_an_unknown_model_is_answered_with_the_nearest_names():
    with pytest.raises(ValueError, match=r"'opt-1\.2b' is not in the catalog: did you mean opt-1\.3b"):
        find_architecture("opt-1.2b")


@pytest.mark.parametrize(
    ("family", "hidden_size", "ffn_size"), [("opt", 768, 3072), ("llama", 4096, 11008), ("glm", 12288, 32768)]
)
def test_the_feed_forward_width_left_out_is_the_familys(family, hidden_size, ffn_size):
    arch = make_architecture(
        family=family, num_layers=1, hidden_size=hidden_size, num_heads=12 if family != "llama" else 32
    )
    assert arch.ffn_size == ffn_size
