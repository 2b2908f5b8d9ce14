"""A Hugging Face config.json -> Architecture, for the model types whose blocks are one of our families exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.models.architecture import Architecture, make_architecture

MAX_CONFIG_BYTES = 2**20
MAX_SIZE = 2**31
"""Of any number in a shape: beyond, nothing could be counted."""

_LLAMA = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position": "max_position_embeddings",
}
# model_type -> (family, our word -> theirs); the words are those of transformers' configuration_*.py
_TYPES: dict[str, tuple[str, dict[str, str]]] = {
    "opt": (
        "opt",
        {
            "num_layers": "num_hidden_layers",
            "hidden_size": "hidden_size",
            "num_heads": "num_attention_heads",
            "ffn_size": "ffn_dim",
            "vocab_size": "vocab_size",
            "max_position": "max_position_embeddings",
        },
    ),
    "gpt2": (
        "gpt",
        {
            "num_layers": "n_layer",
            "hidden_size": "n_embd",
            "num_heads": "n_head",
            "ffn_size": "n_inner",
            "vocab_size": "vocab_size",
            "max_position": "n_positions",
        },
    ),
    "llama": ("llama", _LLAMA),
    "mistral": ("llama", _LLAMA),
    "bloom": (
        "bloom",
        {
            "num_layers": "n_layer",
            "hidden_size": "hidden_size",
            "num_heads": "n_head",
            "vocab_size": "vocab_size",
            "max_position": "seq_length",
        },
    ),
    "mpt": (
        "mpt",
        {
            "num_layers": "n_layers",
            "hidden_size": "d_model",
            "num_heads": "n_heads",
            "vocab_size": "vocab_size",
            "max_position": "max_seq_len",
        },
    ),
}


def read_architecture(folder: Path) -> Architecture:
    """The shape in FOLDER/config.json. ValueError says what keeps it from being read; no weight is touched."""
    file = folder / "config.json"
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"{file} is larger than {MAX_CONFIG_BYTES} bytes: this is no model's configuration")
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{file} is not JSON") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no keys")
    return architecture_of(config, where=str(file), name=folder.resolve().name)


def architecture_of(config: Mapping[str, Any], *, where: str, name: str = "") -> Architecture:
    """The shape of a parsed config.json."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ValueError(f"{where} is of model_type {kind!r}; known are {', '.join(_TYPES)}")
    family, words = _TYPES[kind]
    shape: dict[str, Any] = {word: config[theirs] for word, theirs in words.items() if config.get(theirs) is not None}
    for word in ("num_layers", "hidden_size", "num_heads"):
        if word not in shape:
            raise ValueError(f"{where} has no {words[word]}")
    for word, value in shape.items():
        _whole(value, words[word], where)
    if isinstance(config.get("tie_word_embeddings"), bool):
        shape["tied_embeddings"] = config["tie_word_embeddings"]
    if kind == "opt":
        width = _whole(config.get("word_embed_proj_dim", shape["hidden_size"]), "word_embed_proj_dim", where)
        shape["word_embedding_size"] = None if width == shape["hidden_size"] else width
        shape["post_norm"] = not config.get("do_layer_norm_before", True)
    if kind == "mpt":
        ratio = config.get("expansion_ratio", 4)
        if not isinstance(ratio, (int, float)) or not 0 < ratio < MAX_SIZE:
            raise ValueError(f"{where}: expansion_ratio is {ratio!r:.60}, not a number above 0")
        shape["ffn_size"] = int(ratio * shape["hidden_size"])
    head_dim = config.get("head_dim")
    if (
        family == "llama"
        and head_dim is not None
        and _whole(head_dim, "head_dim", where) * shape["num_heads"] != shape["hidden_size"]
    ):
        raise ValueError(
            f"{where}: {shape['num_heads']} heads of head_dim {head_dim} are not hidden_size {shape['hidden_size']} wide; "
            "our llama has no such variant"
        )
    rotary = config.get("rope_parameters") if isinstance(config.get("rope_parameters"), Mapping) else {}
    for word, value in (
        ("norm_epsilon", config.get("rms_norm_eps" if family == "llama" else "layer_norm_epsilon")),
        ("rope_theta", (rotary or {}).get("rope_theta", config.get("rope_theta"))),
    ):
        if value is None:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{where}: {word} is {value!r}, not a number")
        shape[word] = float(value)
    return make_architecture(family=family, name=name, **shape)


def _whole(value: Any, word: str, where: str) -> int:
    """The value, if it is a whole number that a shape may have."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{where}: {word} is {value!r:.60}, not a whole number")
    if not 0 < value < MAX_SIZE:
        raise ValueError(f"{where}: {word} is {value:.3g}, not from 1 to {MAX_SIZE - 1}")
    return value
