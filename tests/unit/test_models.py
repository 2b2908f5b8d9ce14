"""The torch module of OPT is Hugging Face's, in our words."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from orchestrator.models.architecture import CATALOG, Architecture, make_architecture, num_parameters
from orchestrator.models.opt import OPT, SPLIT, initial_weights
from orchestrator.models.weights import config_of_architecture, read_folder, write_folder

PRE_NORM = make_architecture(
    family="opt", num_layers=2, hidden_size=32, num_heads=4, ffn_size=128, vocab_size=96, max_position=24
)
POST_NORM = make_architecture(
    family="opt",
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    ffn_size=128,
    vocab_size=96,
    max_position=24,
    word_embedding_size=16,
    post_norm=True,
)


def filled(arch: Architecture, attention: str = "flash") -> OPT:
    module = OPT(arch, attention=attention)
    value = initial_weights(arch, seed=3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(value(name, parameter.shape) * 5)  # 5: far from linear, so that a wrong wire shows
    return module


@pytest.mark.parametrize("arch", [PRE_NORM, POST_NORM], ids=["pre_norm", "post_norm_projected"])
@pytest.mark.parametrize("attention", ["flash", "math"])
def test_same_weights_give_hugging_faces_logits(arch, attention, tmp_path):
    module = filled(arch, attention)
    write_folder(tmp_path, arch, module.named_parameters())
    peer = OPTForCausalLM.from_pretrained(tmp_path).eval()
    input_ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(module(input_ids), peer(input_ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", [PRE_NORM, POST_NORM], ids=["pre_norm", "post_norm_projected"])
def test_a_folder_of_hugging_face_loads_and_gives_its_logits(arch, tmp_path):
    peer = OPTForCausalLM(
        OPTConfig(**{k: v for k, v in config_of_architecture(arch).items() if k != "torch_dtype"})
    ).eval()
    peer.save_pretrained(tmp_path)
    module, value = OPT(arch), read_folder(tmp_path)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(value(name, parameter.shape))
        input_ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(module(input_ids), peer(input_ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in CATALOG if name.startswith("opt-")])
def test_module_and_closed_form_have_hugging_faces_parameter_count(name):
    arch = CATALOG[name]
    config = {k: v for k, v in config_of_architecture(arch).items() if k != "torch_dtype"}
    with torch.device("meta"):
        module, peer = OPT(arch), OPTForCausalLM(OPTConfig(**config))
    peer.tie_weights()
    count = sum(parameter.numel() for parameter in set(peer.parameters()))
    assert sum(parameter.numel() for parameter in module.parameters()) == count == num_parameters(arch)


def test_a_first_weight_depends_on_seed_and_name_alone():
    value = initial_weights(PRE_NORM, seed=3)
    again = value("embed.tokens.weight", torch.Size((96, 32)))
    value("blocks.0.mlp.up.weight", torch.Size((128, 32)))
    assert torch.equal(value("embed.tokens.weight", torch.Size((96, 32))), again)
    assert not torch.equal(initial_weights(PRE_NORM, seed=4)("embed.tokens.weight", torch.Size((96, 32))), again)


def test_a_folder_that_lacks_a_weight_is_refused_by_name(tmp_path):
    write_folder(tmp_path, PRE_NORM, ((n, p) for n, p in filled(PRE_NORM).named_parameters() if "mlp.up" not in n))
    with pytest.raises(ValueError, match=r"lacks model\.decoder\.layers\.0\.fc1\.weight"):
        read_folder(tmp_path)("blocks.0.mlp.up.weight", torch.Size((128, 32)))
    with pytest.raises(ValueError, match=r"has shape \[96, 32\], the job's model needs \[97, 32\]"):
        read_folder(tmp_path)("embed.tokens.weight", torch.Size((97, 32)))


@pytest.mark.parametrize(
    ("fields", "attention", "message"),
    [
        ({"family": "llama"}, "flash", "the torch module of family 'llama' is not built; opt is"),
        ({"dropout": 0.1}, "flash", "dropout 0.1 is not built; set model.dropout to 0"),
        ({"num_kv_heads": 2}, "flash", "num_kv_heads 2 is not built for opt; set it to 4"),
        ({}, "flsh", "attention 'flsh' is not known: choose one of flash, fused_softmax, math"),
    ],
)
def test_what_the_module_cannot_do_is_refused(fields, attention, message):
    arch = make_architecture(**({"family": "opt", "num_layers": 1, "hidden_size": 32, "num_heads": 4} | fields))
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        OPT(arch, attention=attention)


def test_a_sequence_longer_than_the_position_table_is_refused():
    with pytest.raises(ValueError, match="a sequence of 25 tokens is longer than max_position 24"):
        OPT(PRE_NORM)(torch.zeros(1, 25, dtype=torch.int64))


@pytest.mark.parametrize("arch", [PRE_NORM, POST_NORM], ids=["pre_norm", "post_norm_projected"])
def test_every_parameter_has_one_place_in_the_split_table(arch):
    with torch.device("meta"):
        names = [name for name, _ in OPT(arch).named_parameters()]
    assert {name: sum(fnmatchcase(name, pattern) for pattern in SPLIT) for name in names} == dict.fromkeys(names, 1)
