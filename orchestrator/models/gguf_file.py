"""A model as one GGUF file, which llama.cpp runs. Source of names and keys: the GGUF specification and the `gguf` package.

Weights keep their order but for LLaMA's queries and keys: llama.cpp turns neighbouring dimensions together where our module,
like Hugging Face's, turns dimension d with d + D / 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.models.architecture import Architecture, Family

ARCHITECTURES: Mapping[Family, str] = {"llama": "llama", "bloom": "bloom", "mpt": "mpt", "gpt": "gpt2"}
"""Names in GGUF of the families that llama.cpp runs."""
_OUTSIDE = {
    "embed.tokens": "token_embd",
    "embed.positions": "position_embd",
    "embed.norm": "token_embd_norm",
    "head.norm": "output_norm",
    "head.output": "output",
}
_BLOCK = {
    "attention_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.out": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
_TOGETHER = ("attention.q", "attention.k", "attention.v")
"""One tensor, attn_qkv, in every architecture but llama."""
_BYTE_LEVEL = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}
"""How a tokenizer.json cuts text before its byte-level BPE -> llama.cpp's name of it."""


def refuse(arch: Architecture) -> None:
    """ValueError where llama.cpp does not run the architecture."""
    if arch.family not in ARCHITECTURES:
        raise ValueError(
            f"llama.cpp has no architecture for family {arch.family}, so there is no GGUF file of it; it has "
            f"{', '.join(ARCHITECTURES)}"
        )
    if arch.num_kv_heads != arch.num_heads and arch.family != "llama":
        raise ValueError(f"llama.cpp's {ARCHITECTURES[arch.family]} has no grouped-query heads, and this model has")


def write_file(
    file: Path,
    arch: Architecture,
    weights: Iterable[tuple[str, Tensor]],
    vocabulary: Callable[[Any], None],
    *,
    name: str,
) -> None:
    """Writes FILE. The weights come in the module's order, in the dtype to be stored; matrices alone are stored in 16 bit.

    Args:
        vocabulary: adds the tokenizer to a gguf.GGUFWriter.

    Raises ValueError where llama.cpp does not run the architecture."""
    refuse(arch)
    from gguf import GGUFWriter

    writer = GGUFWriter(file, ARCHITECTURES[arch.family])
    try:
        _describe(writer, arch, name)
        vocabulary(writer)
        for key, tensor in _stored(weights, arch):
            writer.add_tensor(key, tensor.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _describe(writer: Any, arch: Architecture, name: str) -> None:
    writer.add_name(name)
    writer.add_context_length(arch.max_position)
    writer.add_embedding_length(arch.hidden_size)
    writer.add_block_count(arch.num_layers)
    writer.add_feed_forward_length(arch.ffn_size)
    writer.add_head_count(arch.num_heads)
    writer.add_head_count_kv(arch.num_kv_heads)
    writer.add_vocab_size(arch.vocab_size)
    if arch.traits.norm == "rms":
        writer.add_layer_norm_rms_eps(arch.norm_epsilon)
    else:
        writer.add_layer_norm_eps(arch.norm_epsilon)
    if arch.traits.positions == "rotary":
        writer.add_rope_dimension_count(arch.head_dim)
        writer.add_rope_freq_base(arch.rope_theta)
    if arch.traits.positions == "alibi":
        writer.add_max_alibi_bias(8.0)


def _stored(weights: Iterable[tuple[str, Tensor]], arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """(name in the file, tensor); query, key and value in one where the architecture wants them so."""
    parts: dict[str, dict[str, Tensor]] = {}
    for ours, given in weights:
        stem, _, kind = ours.rpartition(".")
        tensor = given.float() if given.dim() == 1 else given
        if not stem.startswith("blocks."):
            yield f"{_OUTSIDE[stem]}.{kind}", tensor
            continue
        _, index, part = stem.split(".", 2)
        if part in _TOGETHER and arch.family != "llama":
            key = f"blk.{index}.attn_qkv.{kind}"
            held = parts.setdefault(key, {})
            held[part] = tensor
            if len(held) == len(_TOGETHER):
                yield key, torch.cat([held[name] for name in _TOGETHER])
                del parts[key]
            continue
        if part in ("attention.q", "attention.k") and arch.traits.positions == "rotary":
            tensor = tensor.unflatten(0, (-1, 2, arch.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        yield f"blk.{index}.{_BLOCK[part]}.{kind}", tensor


NORMAL, CONTROL, UNUSED = 1, 3, 5
"""llama.cpp's kinds of tokens."""


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level BPE (GPT-2's bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def byte_vocabulary(writer: Any, vocab_size: int) -> None:
    """The byte tokenizer: ids 0 to 255 are bytes, 256 ends a text, the rest of the model's table is unused. As a byte-level BPE
    that merges nothing: a file must name one merge, so it names one of two bytes that no UTF-8 text holds."""
    letters = byte_letters()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*letters, "<|endoftext|>", *(f"<unused{token}>" for token in range(257, vocab_size))])
    writer.add_token_types([NORMAL] * 256 + [CONTROL] + [UNUSED] * (vocab_size - 257))
    writer.add_token_merges([f"{letters[0xC0]} {letters[0xC1]}"])
    _ends(writer, 256)


def merged_vocabulary(writer: Any, tokenizer_json: Mapping[str, Any], vocab_size: int, end_of_text: int) -> None:
    """A byte-level BPE, from its tokenizer.json. ValueError for a tokenizer of another kind."""
    model, before = tokenizer_json["model"], tokenizer_json.get("pre_tokenizer") or {}
    kinds = tuple(step.get("type") for step in before.get("pretokenizers", [before]))
    if model.get("type") != "BPE" or kinds not in _BYTE_LEVEL:
        raise ValueError(
            f"a GGUF file is written with byte tokens or with a byte-level BPE as GPT-2's or SmolLM's; this tokenizer is "
            f"{model.get('type')} behind {', '.join(map(str, kinds))}"
        )
    added = {token["id"]: token for token in tokenizer_json.get("added_tokens", [])}
    texts = {token: text for text, token in model["vocab"].items()} | {t: added[t]["content"] for t in added}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_BYTE_LEVEL[kinds])
    writer.add_token_list([texts.get(token, f"<unused{token}>") for token in range(vocab_size)])
    writer.add_token_types(
        [CONTROL if token in added else NORMAL if token in texts else UNUSED for token in range(vocab_size)]
    )
    writer.add_token_merges(merges)
    _ends(writer, end_of_text)


def _ends(writer: Any, end_of_text: int) -> None:
    writer.add_bos_token_id(end_of_text)
    writer.add_eos_token_id(end_of_text)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
