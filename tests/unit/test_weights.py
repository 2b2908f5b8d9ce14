"""Hugging Face folders and checkpoints: what is written loads, what does not mean the same is refused."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoTokenizer, OPTForCausalLM

from orchestrator.cli import main
from orchestrator.models import weights
from orchestrator.models.architecture import make_architecture
from orchestrator.models.decoder import Decoder, initialize
from orchestrator.models.formats import FORMATS, config_of_architecture
from orchestrator.models.weights import check_config, config_of_tokens, read_folder, spoken_of, write_folder
from orchestrator.spec import parse_job
from orchestrator.spec.hugging_face import read_architecture
from orchestrator.training import checkpoint
from orchestrator.training.checkpoint import CheckpointInfo
from orchestrator.training.prepare import prepare_job
from orchestrator.training.tokenizer import ByteTokenizer, keep_tokenizer, kept_tokenizer, load_tokenizer, train_bpe
from tests.mutations import mutated, mutated_bytes

SHAPE = {"family": "opt", "num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 300, "max_position": 16}
ARCH = make_architecture(**SHAPE)


@pytest.fixture
def module():
    module = Decoder(ARCH)
    initialize(module, ARCH, seed=3)
    return module


def test_a_folder_of_several_shards_loads_here_and_in_transformers(module, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 20_000)
    write_folder(tmp_path / "opt", ARCH, module.named_parameters())
    files = {file.name for file in (tmp_path / "opt").glob("*.safetensors")}
    assert len(files) > 3
    assert not (tmp_path / "opt.partial").exists()
    value, peer = read_folder(tmp_path / "opt", ARCH), OPTForCausalLM.from_pretrained(tmp_path / "opt")
    theirs = dict(peer.named_parameters())
    for name, parameter in module.named_parameters():
        assert torch.equal(value(name, parameter.shape).float(), parameter)
        assert torch.equal(theirs[FORMATS["opt"].key(name)], parameter)
    (tmp_path / "opt" / min(files)).unlink()
    with pytest.raises(ValueError, match="which its index names: its download is not complete"):
        read_folder(tmp_path / "opt", ARCH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', not 'opt', as the job's model is"),
        (
            {"activation_function": "gelu"},
            "activation_function is 'gelu', not 'relu': our module of this family has no such variant",
        ),
        ({"enable_bias": False}, "enable_bias is False, not True"),
        ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm is True, not False"),
        ({"num_attention_heads": 8}, "num_attention_heads is 8, not 4: the job's model must be that of the folder"),
        ({"do_layer_norm_before": False}, "do_layer_norm_before is False, not True"),
        ({"model_type": "t5"}, "model_type is 't5': only these can be loaded: bloom, gpt2, llama, mpt, opt"),
    ],
)
def test_a_folder_whose_shapes_fit_and_whose_meaning_does_not_is_refused(module, tmp_path, change, message):
    write_folder(tmp_path / "opt", ARCH, module.named_parameters())
    check_config(tmp_path / "opt", ARCH)
    config = json.loads((tmp_path / "opt" / "config.json").read_text())
    (tmp_path / "opt" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path / "opt", ARCH)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gpt", {"activation_function": "gelu"}, "activation_function is 'gelu', not 'gelu_new'"),
        ("gpt", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, not False"),
        ("mpt", {"attn_config": {"alibi": False}}, r"attn_config\.alibi is False, not True"),
        ("mpt", {"no_bias": False}, "no_bias is False, not True"),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling is .*, not None"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3"}},
            r"rope_parameters\.rope_type is 'llama3', not 'default'",
        ),
        ("llama", {"model_type": "mistral", "sliding_window": 8}, "sliding_window is 8, not None"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True, not False"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm is True, not False"),
        ("bloom", {"n_head": 8}, "n_head is 8, not 4: the job's model must be that of the folder"),
    ],
)
def test_a_folder_of_another_family_that_computes_something_else_is_refused(tmp_path, family, change, message):
    arch = make_architecture(**{**SHAPE, "family": family})
    module = Decoder(arch)
    initialize(module, arch, seed=3)
    write_folder(tmp_path / "hf", arch, module.named_parameters())
    check_config(tmp_path / "hf", arch)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        check_config(tmp_path / "hf", arch)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"family": "bloom", "ffn_size": 100}, "BloomForCausalLM has a feed-forward layer of 4 x 32, not of 100"),
        ({"family": "mpt", "ffn_size": 100}, "MptForCausalLM has a feed-forward layer of 4 x 32, not of 100"),
        ({"family": "gpt", "num_kv_heads": 2}, "GPT2LMHeadModel has as many key/value heads as heads, 4, not 2"),
    ],
)
def test_a_shape_that_transformers_has_no_class_for_is_not_written(tmp_path, shape, message):
    with pytest.raises(ValueError, match=message):
        write_folder(tmp_path / "hf", make_architecture(**{**SHAPE, **shape}), [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, r"config\.json cannot be read: No such file"),
        ("config.json", b"{", r"config\.json is not JSON: download the file again"),
        ("model.safetensors", None, r"holds no model\.safetensors: save the model with transformers' save_pretrained"),
        ("model.safetensors", b"torn", r"model\.safetensors cannot be read"),
        ("model.safetensors.index.json", b"{}", "has no weight_map"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "../../a.safetensors"}}',
            "names a file outside the folder",
        ),
    ],
)
def test_a_damaged_folder_is_refused_by_file(module, tmp_path, file, content, message):
    folder = tmp_path / "opt"
    write_folder(folder, ARCH, module.named_parameters())
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_folder(folder)


def test_nothing_is_written_over(module, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="is there already and not empty: name another, or delete it"):
        write_folder(tmp_path, ARCH, module.named_parameters())


def test_a_folder_cut_short_does_not_appear(module, tmp_path):
    def torn():
        yield "embed.tokens.weight", module.embed.tokens.weight
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_folder(tmp_path / "opt", ARCH, torn())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_an_altered_configuration_is_used_or_refused_in_a_sentence(tmp_path, count):
    rng, file, refused = random.Random(count), tmp_path / "config.json", 0
    configs = [
        config_of_architecture(make_architecture(**{**SHAPE, "family": family}))
        | {"bos_token_id": 1, "eos_token_id": 2}
        for family in FORMATS
    ]
    for _ in range(count):
        config = deepcopy(rng.choice(configs))
        if rng.random() < 0.7:
            file.write_text(json.dumps(mutated(config, rng)))
        else:
            file.write_bytes(mutated_bytes(json.dumps(config).encode(), rng))
        try:
            check_config(tmp_path, read_architecture(tmp_path))
            config_of_tokens(ByteTokenizer.special_ids, spoken_of(tmp_path))
        except ValueError:
            refused += 1
    assert count // 3 < refused < count


# The verbs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(module, tmp_path, monkeypatch):
    return trained(tmp_path, monkeypatch, module)


def trained(tmp_path, monkeypatch, module, *, tokenizer=None, start_from=None):
    """A run's folder with a checkpoint and a tokenizer, as training leaves it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "corpus.txt").write_text("a text to train on. " * 500)
    mapping = {
        "version": 1,
        "name": "tiny",
        "model": SHAPE,
        "data": {"train": ["corpus.txt"], "tokenizer": tokenizer or {"bpe": 280}},
        "batch": {"global_batch_size": 2, "sequence_length": 16},
        "training": {"steps": 3},
        "cluster": "a100-80gb",
    }
    (tmp_path / "job.yaml").write_text(json.dumps(mapping))
    index = prepare_job(parse_job(mapping, directory=tmp_path))
    keep_tokenizer(index, tmp_path / "runs" / "tiny", start_from and spoken_of(start_from))
    state = {f"model.{name}": parameter.detach() for name, parameter in module.named_parameters()}
    info = CheckpointInfo(
        job=mapping,
        architecture=asdict(ARCH),
        num_steps=3,
        strategy={},
        data={"tokenizer": index.tokenizer["fingerprint"], "tokens": ""},
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        session = SimpleNamespace(state_dict=lambda: state)
        checkpoint.save(session, tmp_path / "runs/tiny/checkpoints", step=3, info=info, background=False).wait()
    finally:
        dist.destroy_process_group()
    return tmp_path / "runs" / "tiny"


def test_convert_writes_the_newest_checkpoint_as_a_folder_that_transformers_reads(run, module, tmp_path, capsys):
    assert main(["convert", str(run), str(tmp_path / "opt"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["tokenizer"]) == (3, "tokenizer.json")
    peer, tokenizer = (kind.from_pretrained(tmp_path / "opt") for kind in (OPTForCausalLM, AutoTokenizer))
    input_ids = torch.tensor([tokenizer("a text to train on")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(module(input_ids), peer(input_ids).logits, atol=1e-5, rtol=0)
    assert tokenizer.eos_token == "<|endoftext|>"


def test_convert_takes_the_name_that_status_takes(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run.parent == tmp_path / "runs"
    for number, source in enumerate(([run.name], [run.name, "--directory", str(run.parent)], [f"runs/{run.name}"])):
        assert main(["convert", source[0], f"opt-{number}", *source[1:], "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["step"] == 3


def always(module, token: int):
    """The module, its likeliest token always the same one."""
    with torch.no_grad():
        rows = module.embed.tokens.weight
        rows.div_(rows.norm(dim=1, keepdim=True))
        module.head.norm.weight.zero_()
        module.head.norm.bias.copy_(rows[token])
    return module


@pytest.mark.parametrize(("token", "num_new"), [(2, 12), (1, 12), (0, 12), (256, 1)])
def test_transformers_ends_a_model_of_bytes_at_the_end_of_a_text_and_at_no_byte(
    module, tmp_path, monkeypatch, token, num_new
):
    run = trained(tmp_path, monkeypatch, always(module, token), tokenizer="byte")
    assert main(["convert", str(run), str(tmp_path / "opt")]) == 0
    peer, tokenizer = (kind.from_pretrained(tmp_path / "opt") for kind in (OPTForCausalLM, AutoTokenizer))
    prompt = tokenizer("żó", return_tensors="pt")
    new = peer.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert new.tolist() == [token] * num_new
    ids = [peer.config.bos_token_id, peer.config.eos_token_id, peer.config.pad_token_id]
    assert ids == [256, 256, None]
    assert peer.generation_config.eos_token_id == tokenizer.eos_token_id == 256


def test_the_tokenizer_of_a_model_of_bytes_is_written_as_one_that_gives_the_same_ids(module, tmp_path, monkeypatch):
    run = trained(tmp_path, monkeypatch, module, tokenizer="byte")
    main(["convert", str(run), str(tmp_path / "opt")])
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "opt"), kept_tokenizer(run)
    again = load_tokenizer(str(tmp_path / "opt"), tmp_path)
    for text in ("", " ", "it's  12 o'clock\n\tnow ", "żółć 漢字 🙂\r\n\0", "".join(map(chr, range(1, 700)))):
        assert theirs(text)["input_ids"] == again.encode(text) == ours.encode(text)
        assert theirs.decode(theirs(text)["input_ids"], clean_up_tokenization_spaces=False) == text
        assert again.decode([*again.encode(text), 256]) == text
    assert (again.end_of_text, again.vocab_size) == (256, 257)


def test_convert_keeps_the_special_tokens_and_the_generation_config_of_the_weights(module, tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    write_folder(hub, ARCH, module.named_parameters(), config={"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 3})
    text = ["<|endoftext|><s><unk><pad>", "the words of a text " * 50]
    train_bpe(iter(text), 290).save(hub)
    config = {
        "eos_token": "<|endoftext|>",
        "pad_token": {"content": "a"},
        "chat_template": "{{ messages }}",
        "auto_map": "x",
    }
    (hub / "tokenizer_config.json").write_text(json.dumps(config))
    (hub / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5], "repetition_penalty": 1.5}))
    run = trained(tmp_path, monkeypatch, module, tokenizer=str(hub), start_from=hub)
    assert main(["convert", str(run), str(tmp_path / "opt")]) == 0
    peer, tokenizer = (kind.from_pretrained(tmp_path / "opt") for kind in (OPTForCausalLM, AutoTokenizer))
    assert [peer.config.bos_token_id, peer.config.eos_token_id, peer.config.pad_token_id] == [1, 0, 3]
    assert (peer.generation_config.eos_token_id, peer.generation_config.repetition_penalty) == ([0, 5], 1.5)
    assert (tokenizer.chat_template, tokenizer.pad_token) == ("{{ messages }}", "a")
    assert "auto_map" not in json.loads((tmp_path / "opt" / "tokenizer_config.json").read_text())


@pytest.mark.parametrize(
    ("of_weights", "config", "generation"),
    [
        ({}, (7, 9, None), {"bos_token_id": 7, "eos_token_id": 9}),
        ({"eos_token_id": 9, "pad_token_id": 1}, (7, 9, 1), {"bos_token_id": 7, "eos_token_id": 9, "pad_token_id": 1}),
        ({"eos_token_id": [8, 9], "generation_config": {"top_k": 5}}, (7, [8, 9], None), {"top_k": 5}),
        # Another tokenizer than that of the weights: what they say of ids is not true of it.
        (
            {"eos_token_id": 2, "pad_token_id": 1, "generation_config": {"top_k": 5}},
            (7, 9, None),
            {"bos_token_id": 7, "eos_token_id": 9},
        ),
    ],
)
def test_what_the_weights_say_of_tokens_holds_where_they_end_a_text_as_the_tokenizer_does(
    of_weights, config, generation
):
    ids, told = config_of_tokens({"bos_token_id": 7, "eos_token_id": 9, "pad_token_id": None}, of_weights)
    assert (tuple(ids.values()), told) == (config, generation)


def test_convert_says_what_it_cannot_take(run, tmp_path, capsys):
    main(["convert", str(run / "checkpoints" / "step-00000003"), str(tmp_path / "opt"), "--dtype", "bfloat16"])
    cases = [
        (tmp_path / "nowhere", tmp_path / "new", 6, "there is no run"),
        (tmp_path / "cache", tmp_path / "new", 6, "there is no run"),
        (tmp_path / "opt", tmp_path / "new", 2, "is a Hugging Face folder already"),
        (run, tmp_path / "opt", 2, "is there already and not empty"),
    ]
    for source, target, exit_code, message in cases:
        capsys.readouterr()
        assert main(["convert", str(source), str(target)]) == exit_code
        assert message in capsys.readouterr().err


def test_prepare_tells_what_it_made_and_where(run, tmp_path, capsys):
    assert main(["prepare", str(tmp_path / "job.yaml"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["directory"].startswith(str(tmp_path / "cache"))
    assert told["num_documents"] == 1
    assert main(["prepare", str(tmp_path / "job.yaml")]) == 0
    assert f"kept in    {told['directory']}" in capsys.readouterr().out
    (tmp_path / "corpus.txt").write_bytes(b"\xff")
    assert main(["prepare", str(tmp_path / "job.yaml")]) == 2
    assert "is not UTF-8: byte 0 is 0xff" in capsys.readouterr().err


def test_convert_writes_a_gguf_file_where_llama_cpp_has_the_family(run, tmp_path, capsys):
    assert main(["convert", str(run), str(tmp_path / "tiny.gguf")]) == 2
    assert "llama.cpp has no architecture for family opt" in capsys.readouterr().err
    assert not list(tmp_path.glob("tiny.gguf*"))
