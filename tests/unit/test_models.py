"""The torch module of each family computes what Hugging Face's class computes on the same weights."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from orchestrator.models.architecture import CATALOG, Architecture, make_architecture, num_parameters
from orchestrator.models.decoder import SPLIT, Decoder, initial_weights
from orchestrator.models.formats import config_of_architecture
from orchestrator.models.weights import read_folder, write_folder
from orchestrator.models.workloads import workload
from orchestrator.spec.hugging_face import read_architecture

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


SHAPE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 96, "max_position": 24}
MODELS = {
    "opt": PRE_NORM,
    "opt_post_norm_projected": POST_NORM,
    "gpt": make_architecture(family="gpt", ffn_size=112, **SHAPE),
    "mpt": make_architecture(family="mpt", **SHAPE),
    "mpt_six_heads": make_architecture(family="mpt", **SHAPE | {"num_heads": 6, "hidden_size": 48}),
    "llama": make_architecture(family="llama", norm_epsilon=1e-5, rope_theta=5e5, **SHAPE),
    "llama_grouped_tied": make_architecture(family="llama", num_kv_heads=2, tied_embeddings=True, **SHAPE),
    "bloom": make_architecture(family="bloom", **SHAPE),
    "bloom_six_heads": make_architecture(family="bloom", **SHAPE | {"num_heads": 6, "hidden_size": 48}),
}
every_model = pytest.mark.parametrize("arch", MODELS.values(), ids=MODELS)


def filled(arch: Architecture, attention: str = "flash") -> Decoder:
    """Random weights, far from linear and with no bias at 0 and no norm at 1, so that a wrong wire shows."""
    module = Decoder(arch, attention=attention)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.dim() > 1 else 0.5))
            if name.endswith("norm.weight"):
                parameter += 1
    return module


def loss_of(logits_BSV, input_ids):
    return torch.nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())


@every_model
@pytest.mark.parametrize("attention", ["flash", "math"])
def test_same_weights_give_hugging_faces_logits_and_gradients(arch, attention, tmp_path):
    module = filled(arch, attention)
    write_folder(tmp_path, arch, module.named_parameters())
    peer = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    input_ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    ours, theirs = module(input_ids), peer(input_ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.detach().abs().max()), rtol=0)
    for logits in (ours, theirs):
        loss_of(logits, input_ids).backward()
    mine, other = module.embed.tokens.weight.grad, peer.get_input_embeddings().weight.grad
    torch.testing.assert_close(mine, other, atol=1e-5 * float(other.abs().max()), rtol=0)


@every_model
def test_a_folder_of_hugging_face_loads_and_is_the_same_model(arch, tmp_path):
    write_folder(tmp_path / "ours", arch, filled(arch).named_parameters())
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    peer.save_pretrained(tmp_path / "theirs")
    shape = read_architecture(tmp_path / "theirs")
    assert replace(shape, name="") == arch
    module, value = Decoder(shape), read_folder(tmp_path / "theirs", shape)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(value(name, parameter.shape))
        input_ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
        theirs = peer(input_ids).logits
        torch.testing.assert_close(module(input_ids), theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


@every_model
@pytest.mark.parametrize("attention", ["flash", "math"])
def test_samples_that_share_a_row_do_not_see_each_other(arch, attention):
    module = filled(arch, attention)
    input_ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    lengths = [(9, 15), (1, 23)]
    segment_ids = torch.tensor([[0] * first + [1] * second for first, second in lengths])
    with torch.no_grad():
        together = module(input_ids, module.context(segment_ids_BS=segment_ids))
        for row, (first, _) in enumerate(lengths):
            apart = [module(input_ids[row : row + 1, part]) for part in (slice(0, first), slice(first, 24))]
            torch.testing.assert_close(together[row : row + 1], torch.cat(apart, 1), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "mpt-7b", "llama-7b", "llama-65b", "bloom-560m", "bloom-176b"])
def test_the_module_has_as_many_parameters_as_the_closed_form_and_the_price(name):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Decoder(CATALOG[name]).parameters())
    assert count == num_parameters(CATALOG[name]) == workload(CATALOG[name]).num_parameters


@pytest.mark.parametrize("name", [name for name in CATALOG if name.startswith("opt-")])
def test_module_and_closed_form_have_hugging_faces_parameter_count(name):
    arch = CATALOG[name]
    config = {k: v for k, v in config_of_architecture(arch).items() if k != "torch_dtype"}
    with torch.device("meta"):
        module, peer = Decoder(arch), OPTForCausalLM(OPTConfig(**config))
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
        ({"dropout": 0.1}, "flash", "dropout 0.1 is not built; set model.dropout to 0"),
        ({}, "flsh", "attention 'flsh' is not known: choose one of flash, fused_softmax, math"),
    ],
)
def test_what_the_module_cannot_do_is_refused(fields, attention, message):
    arch = make_architecture(**({"family": "opt", "num_layers": 1, "hidden_size": 32, "num_heads": 4} | fields))
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        Decoder(arch, attention=attention)


def test_a_sequence_longer_than_the_position_table_is_refused():
    with pytest.raises(ValueError, match="a sequence of 25 tokens is longer than max_position 24"):
        Decoder(PRE_NORM)(torch.zeros(1, 25, dtype=torch.int64))


@every_model
def test_every_parameter_has_one_place_in_the_split_table(arch):
    with torch.device("meta"):
        names = [name for name, _ in Decoder(arch).named_parameters()]
    assert {name: sum(fnmatchcase(name, pattern) for pattern in SPLIT) for name in names} == dict.fromkeys(names, 1)


def test_values_are_a_tensor_of_their_own():
    """FSDP2 warns of an output that is a view, since its hook for the backward pass is lost when one is written to."""
    values_BS = Decoder(PRE_NORM, values=True)(torch.zeros(2, 5, dtype=torch.long))
    assert values_BS.shape == (2, 5)
    assert values_BS._base is None
