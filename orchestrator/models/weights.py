"""OPT weights to and from Hugging Face folders: config.json and safetensors, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clusters.files import publish
from orchestrator.models.architecture import Architecture

MAX_SHARD_BYTES = 5 * 10**9
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

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
_OURS = {theirs: ours for ours, theirs in _PARTS.items()}
_OURS_OUTSIDE = {theirs: ours for ours, theirs in _OUTSIDE.items()}


def hugging_face_name(name: str) -> str:
    """Our parameter's name in Hugging Face's OPTForCausalLM. KeyError for a name that no OPT has."""
    stem, _, kind = name.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
    if block:
        return f"{_DECODER}layers.{block[1]}.{_PARTS[block[2]]}.{kind}"
    return f"{_OUTSIDE[stem]}.{kind}"


def our_name(name: str) -> str:
    """The inverse of hugging_face_name."""
    stem, _, kind = name.rpartition(".")
    layer = re.fullmatch(re.escape(_DECODER) + r"layers\.(\d+)\.(.+)", stem)
    if layer:
        return f"blocks.{layer[1]}.{_OURS[layer[2]]}.{kind}"
    return f"{_OURS_OUTSIDE[stem]}.{kind}"


def config_of_architecture(arch: Architecture) -> dict[str, Any]:
    """The config.json of an OPT."""
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
        "word_embed_proj_dim": arch.embedding_size,
        "do_layer_norm_before": not arch.post_norm,
        "activation_function": "relu",
        "dropout": arch.dropout,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "torch_dtype": "float32",
    }


# What shapes cannot tell: a folder that says otherwise would load, and compute something else.
_FIXED = {
    "model_type": "opt",
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
}
_OF_THE_JOB = ("num_attention_heads", "num_hidden_layers", "do_layer_norm_before", "tie_word_embeddings")


def check_config(folder: Path, arch: Architecture | None = None) -> None:
    """ValueError where a folder's config.json is not that of an OPT as we build it, or not of this architecture."""
    file = folder / CONFIG
    config = _json(file)
    wanted = dict(_FIXED)
    if arch is not None:
        ours = config_of_architecture(arch)
        wanted |= {key: ours[key] for key in _OF_THE_JOB if key in config}
    for key, want in wanted.items():
        got = config.get(key, want)
        if got != want:
            fix = (
                "only OPT can be loaded"
                if key == "model_type"
                else "the job's model must be that of the folder"
                if key in _OF_THE_JOB
                else "our OPT has no such variant"
            )
            raise ValueError(f"{file}: {key} is {got!r}, not {want!r}: {fix}")


def read_folder(folder: Path, arch: Architecture | None = None) -> Callable[[str, torch.Size], Tensor]:
    """(name, shape) -> that parameter in fp64, read from a Hugging Face folder when asked.

    Raises ValueError that names the folder and what is wrong with it: here, or when a tensor is missing or misshapen."""
    check_config(folder, arch)
    where = _where(folder)

    def value(name: str, shape: torch.Size) -> Tensor:
        key = hugging_face_name(name)
        key = key if key in where else key.removeprefix("model.")  # OPTModel's folders lack the first word
        if key not in where:
            raise ValueError(
                f"{folder} lacks {hugging_face_name(name)} (our {name}): its download is not complete, or its model is "
                "not the job's"
            )
        try:
            with safe_open(where[key], "pt") as file:
                tensor: Tensor = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{where[key]}: {key} cannot be read ({error}): download the file again") from None
        if tensor.shape != shape:
            raise ValueError(f"{folder}: {key} has shape {list(tensor.shape)}, the job's model needs {list(shape)}")
        return tensor.double()

    return value


def _where(folder: Path) -> dict[str, Path]:
    """Tensor -> the file that holds it."""
    if (folder / INDEX).exists():
        weight_map = _json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder / INDEX} has no weight_map: download the file again")
        for file in set(weight_map.values()):
            if file != os.path.basename(file):
                raise ValueError(f"{folder / INDEX} names a file outside the folder: {file}")
            if not (folder / file).is_file():
                raise ValueError(f"{folder} lacks {file}, which its index names: its download is not complete")
        return {key: folder / file for key, file in weight_map.items()}
    if not (folder / WEIGHTS).exists():
        raise ValueError(
            f"{folder} holds no {WEIGHTS}: save the model with transformers' save_pretrained, which writes safetensors "
            "(a pytorch_model.bin is a pickle and is not opened)"
        )
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return dict.fromkeys(file.keys(), folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read ({error}): download the file again") from None


def write_folder(folder: Path, arch: Architecture, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Writes config.json and safetensors that transformers loads, in shards of at most MAX_SHARD_BYTES.

    The folder appears when it is whole; ValueError where something else stands there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not empty: name another, or delete it")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dtype = _write_shards(partial, weights)
        config = config_of_architecture(arch) | {"torch_dtype": dtype}
        (partial / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> str:
    """The dtype of what was written."""
    held: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    size = total = num_files = 0
    dtype = "float32"

    def flush() -> None:
        nonlocal num_files, size
        num_files += 1
        name = f"model-{num_files:05d}.safetensors"
        save_file(held, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, name))
        held.clear()
        size = 0

    for name, tensor in weights:
        num_bytes = tensor.numel() * tensor.element_size()
        if held and size + num_bytes > MAX_SHARD_BYTES:
            flush()
        held[hugging_face_name(name)] = tensor.detach().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        size, total = size + num_bytes, total + num_bytes
    flush()
    if num_files == 1:
        publish(folder / "model-00001.safetensors", folder / WEIGHTS)
    else:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return dtype


def _json(file: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{file} is not JSON: download the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no keys: download the file again")
    return value
