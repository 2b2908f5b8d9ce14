"""A GGUF file holds the model: an independent reader, llama.cpp, generates the same greedy tokens from it."""

from __future__ import annotations

import json

import pytest
import torch

from orchestrator.models.architecture import make_architecture
from orchestrator.models.decoder import Decoder
from orchestrator.models.gguf_file import byte_vocabulary, merged_vocabulary, write_file
from orchestrator.training.generate import generate
from orchestrator.training.tokenizer import train_bpe

PROMPT, NUM_TOKENS = "def shard(x", 20
SHAPE = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "max_position": 64}
MODELS = {
    "llama": {"family": "llama", "num_kv_heads": 2, "rope_theta": 5e4},
    "llama_tied": {"family": "llama", "tied_embeddings": True},
    "bloom": {"family": "bloom"},
    "mpt": {"family": "mpt"},
    "gpt": {"family": "gpt"},
}


def filled(arch) -> Decoder:
    module = Decoder(arch).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + name.endswith("norm.weight"))
    return module


def greedy_of_llama_cpp(file) -> list[int]:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(file), 64, 1, False
    settings.cpuparams.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # as exact as our own
    server = xllamacpp.Server(settings)
    asked = {"prompt": PROMPT, "n_predict": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    answer = server.handle_completions({**asked, "return_tokens": True, "verbose": True})
    return list(answer["__verbose"]["tokens"])


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_llama_cpp_generates_the_same_bytes(tmp_path, fields):
    arch = make_architecture(**SHAPE, vocab_size=257, **fields)
    module, file = filled(arch), tmp_path / "model.gguf"
    write_file(file, arch, module.named_parameters(), lambda writer: byte_vocabulary(writer, 257), name="tiny")
    ours = generate(module, list(PROMPT.encode()), max_tokens=NUM_TOKENS, vocab_size=257, temperature=0)
    assert greedy_of_llama_cpp(file) == list(ours)


def test_llama_cpp_cuts_text_as_a_trained_bpe_does(tmp_path):
    tokenizer = train_bpe(iter(["def shard(x): return x  # a shard of x\n" * 50]), 300)
    arch = make_architecture(**SHAPE, family="llama", vocab_size=tokenizer.vocab_size)
    module, file = filled(arch), tmp_path / "model.gguf"
    described = json.loads(tokenizer.inner.to_str())
    size, end = arch.vocab_size, tokenizer.end_of_text
    write_file(
        file,
        arch,
        module.named_parameters(),
        lambda writer: merged_vocabulary(writer, described, size, end),
        name="tiny",
    )
    prompt = tokenizer.encode(PROMPT)
    assert len(prompt) < len(PROMPT)
    ours = list(generate(module, prompt, max_tokens=NUM_TOKENS, vocab_size=size, temperature=0))
    assert greedy_of_llama_cpp(file) == ours


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"family": "opt"},
            "llama.cpp has no architecture for family opt, so there is no GGUF file of it; it has llama",
        ),
        ({"family": "gpt", "num_kv_heads": 2}, "llama.cpp's gpt2 has no grouped-query heads, and this model has"),
    ],
)
def test_what_llama_cpp_does_not_run_is_refused(tmp_path, fields, message):
    arch = make_architecture(**SHAPE, vocab_size=257, **fields)
    with pytest.raises(ValueError, match=message):
        write_file(tmp_path / "x.gguf", arch, [], lambda writer: None, name="x")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_is_no_byte_level_bpe_is_refused():
    with pytest.raises(ValueError, match="this tokenizer is WordPiece behind BertPreTokenizer"):
        merged_vocabulary(None, {"model": {"type": "WordPiece"}, "pre_tokenizer": {"type": "BertPreTokenizer"}}, 9, 1)
