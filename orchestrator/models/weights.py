"""OPT weights to and from Hugging Face folders: config.json and safetensors, one tensor in memory at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.models.architecture import Architecture, make_architecture

MAX_SHARD_BYTES = 5 * 10**9

_DECODER = "model.decoder."
_PARTS = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
    "mlp_norm": "final_layer_norm",
}
_OUTSIDE = {
    "embed.tokens": _DECODER + "embed_tokens",
    "embed.positions": _DECODER + "embed_positions",
    "embed.project": _DECODER + "project_in",
    "head.norm": _DECODER + "final_layer_norm",
    "head.project": _DECODER + "project_out",
    "head.output": "lm_head",
}


def hugging_face_name(name: str) -> str:
    """Our parameter's name in Hugging Face's OPTForCausalLM. KeyError for a name that no OPT has."""
    stem, _, kind = name.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
    if block:
        return f"{_DECODER}layers.{block[1]}.{_PARTS[block[2]]}.{kind}"
    return f"{_OUTSIDE[stem]}.{kind}"


def architecture_of_config(config: Mapping[str, Any], name: str = "") -> Architecture:
    """The shape in a Hugging Face config.json. ValueError for another family."""
    if config.get("model_type") != "opt":
        raise ValueError(f"config.json is of model_type {config.get('model_type')!r}; only opt folders can be loaded")
    width = config.get("word_embed_proj_dim", config["hidden_size"])
    return make_architecture(
        family="opt",
        name=name,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        ffn_size=config["ffn_dim"],
        vocab_size=config["vocab_size"],
        max_position=config["max_position_embeddings"],
        tied_embeddings=config.get("tie_word_embeddings", True),
        word_embedding_size=None if width == config["hidden_size"] else width,
        post_norm=not config.get("do_layer_norm_before", True),
    )


def config_of_architecture(arch: Architecture) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "num_hidden_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_heads,
        "ffn_dim": arch.ffn_size,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position,
        "tie_word_embeddings": arch.tied_embeddings,
        "word_embed_proj_dim": arch.word_embedding_size or arch.hidden_size,
        "do_layer_norm_before": not arch.post_norm,
        "activation_function": "relu",
        "dropout": arch.dropout,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "torch_dtype": "float32",
    }


def read_folder(folder: Path) -> Callable[[str, torch.Size], Tensor]:
    """(name, shape) -> that parameter in fp64, read from a Hugging Face folder when asked.

    Raises ValueError that names the folder and the missing or misshapen tensor."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        where = {key: folder / file for key, file in json.loads(index.read_text())["weight_map"].items()}
    elif (folder / "model.safetensors").exists():
        with safe_open(folder / "model.safetensors", "pt") as file:
            where = dict.fromkeys(file.keys(), folder / "model.safetensors")
    else:
        raise ValueError(f"{folder} holds no model.safetensors; save the model with save_pretrained (safetensors)")

    def value(name: str, shape: torch.Size) -> Tensor:
        key = hugging_face_name(name)
        key = key if key in where else key.removeprefix("model.")  # OPTModel's folders lack the first word
        if key not in where:
            raise ValueError(f"{folder} lacks {hugging_face_name(name)} (our {name})")
        with safe_open(where[key], "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        if tensor.shape != shape:
            raise ValueError(f"{folder}: {key} has shape {list(tensor.shape)}, the job's model needs {list(shape)}")
        return tensor.double()

    return value


def write_folder(folder: Path, arch: Architecture, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Writes config.json and safetensors that transformers loads, in shards of at most MAX_SHARD_BYTES."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size, sizes, total = 0, {}, 0
    files: list[Path] = []

    def flush() -> None:
        file = folder / f"model-{len(files) + 1:05d}.safetensors"
        save_file(shards[-1], file, metadata={"format": "pt"})
        sizes.update(dict.fromkeys(shards[-1], file.name))
        files.append(file)
        shards[-1] = {}

    for name, tensor in weights:
        num_bytes = tensor.numel() * tensor.element_size()
        if size and size + num_bytes > MAX_SHARD_BYTES:
            flush()
            size = 0
        shards[-1][hugging_face_name(name)] = tensor.detach().contiguous().clone()
        size, total = size + num_bytes, total + num_bytes
    flush()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total}, "weight_map": sizes}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(config_of_architecture(arch), indent=1))
