"""Weights to and from Hugging Face folders: config.json and safetensors, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clusters.files import publish
from orchestrator.models.architecture import Architecture
from orchestrator.models.formats import FORMATS, Format, config_of_architecture, format_of

MAX_SHARD_BYTES = 5 * 10**9
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
GENERATION = "generation_config.json"

# Dropout is the job's own, whatever the folder was trained with.
_OF_TRAINING = (
    "dropout",
    "attention_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "emb_pdrop",
    "attn_pdrop",
)
_SAME_TYPE = {"mistral": "llama"}
"""A model_type whose blocks are those of another's, without what Format.fixed refuses."""


def check_config(folder: Path, arch: Architecture | None = None) -> Format:
    """The folder's format. ValueError where its config.json is of no family that is built, means something else than our
    module of that family computes, or is not of this architecture."""
    file = folder / CONFIG
    config = _json(file)
    kind = config.get("model_type")
    form = next((f for f in FORMATS.values() if f.model_type == _SAME_TYPE.get(str(kind), kind)), None)
    if form is None:
        known = ", ".join(sorted(f.model_type for f in FORMATS.values()))
        raise ValueError(f"{file}: model_type is {kind!r}: only these can be loaded: {known}")
    if arch is not None and (wanted := format_of(arch)) is not form:
        raise ValueError(f"{file}: model_type is {kind!r}, not {wanted.model_type!r}, as the job's model is")
    fixed = {**form.fixed, **({"sliding_window": None} if kind == "mistral" else {})}
    for key, want in fixed.items():
        got = _nested(config, key, want)
        if got != want:
            raise ValueError(f"{file}: {key} is {got!r}, not {want!r}: our module of this family has no such variant")
    for key, want in ({} if arch is None else form.config(arch)).items():
        got = config.get(key)
        if got is not None and got != want and key not in _OF_TRAINING:
            raise ValueError(f"{file}: {key} is {got!r}, not {want!r}: the job's model must be that of the folder")
    return form


def _nested(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value: Any = config
    for word in key.split("."):
        if not isinstance(value, Mapping) or word not in value:
            return default
        value = value[word]
    return value


def _ours(tensor: Tensor, form: Format, name: str, num_heads: int | None) -> Tensor:
    """Our parameter out of the tensor that holds it."""
    if form.is_transposed(name):
        tensor = tensor.t()
    piece = form.piece(name)
    if piece is None:
        return tensor
    if not form.by_head:
        return tensor.chunk(3)[piece]
    assert num_heads is not None
    heads: Tensor = tensor.unflatten(0, (num_heads, 3, -1))
    return heads[:, piece].flatten(0, 1)


def _theirs(parts: Sequence[Tensor], form: Format, name: str, num_heads: int) -> Tensor:
    """The inverse of `_ours`: one of our parameters, or the three that they store as one."""
    if len(parts) == 1:
        tensor = parts[0]
    elif form.by_head:
        tensor = torch.stack([part.unflatten(0, (num_heads, -1)) for part in parts], 1).flatten(0, 2)
    else:
        tensor = torch.cat(list(parts))
    return (tensor.t() if form.is_transposed(name) else tensor).detach().contiguous()


def read_folder(folder: Path, arch: Architecture | None = None) -> Callable[[str, torch.Size], Tensor]:
    """(name, shape) -> that parameter in fp64, read from a Hugging Face folder when asked.

    Raises ValueError that names the folder and what is wrong with it: here, or when a tensor is missing or misshapen."""
    form = check_config(folder, arch)
    where = _where(folder)
    num_heads = None if arch is None else arch.num_heads

    def value(name: str, shape: torch.Size) -> Tensor:
        whole = form.key(name)
        key = whole if whole in where else whole.removeprefix(form.base)  # folders without a head lack the first word
        if key not in where:
            raise ValueError(
                f"{folder} lacks {whole} (our {name}): its download is not complete, or its model is not the job's"
            )
        try:
            with safe_open(where[key], "pt") as file:
                tensor: Tensor = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{where[key]}: {key} cannot be read ({error}): download the file again") from None
        tensor = _ours(tensor, form, name, num_heads)
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


SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def spoken_of(folder: Path) -> dict[str, Any]:
    """Return what a folder says of its special tokens and of generating: the ids in config.json, and generation_config.json."""
    config = _json(folder / CONFIG)
    told: dict[str, Any] = {word: config[word] for word in SPECIAL_IDS if word in config}
    for word, value in told.items():
        ids = value if isinstance(value, list) else [value]
        if any(token is not None and (not isinstance(token, int) or isinstance(token, bool)) for token in ids):
            raise ValueError(f"{folder / CONFIG}: {word} is {value!r:.60}, not the id of a token")
    if (folder / GENERATION).is_file():
        told["generation_config"] = dict(_json(folder / GENERATION))
    return told


def config_of_tokens(
    special_ids: Mapping[str, int | None], of_weights: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what config.json says of special tokens, generation_config.json) for a model that was trained with a tokenizer.

    Args:
        special_ids: of the tokenizer.
        of_weights: spoken_of the folder that training started from. It holds where its end of a text is the tokenizer's.
    """
    ends = of_weights.get("eos_token_id")
    if special_ids["eos_token_id"] not in (ends if isinstance(ends, list) else [ends]):
        of_weights = {}
    ids = {**special_ids, **{word: of_weights[word] for word in SPECIAL_IDS if word in of_weights}}
    known = {word: value for word, value in ids.items() if value is not None}
    return ids, dict(of_weights.get("generation_config", known))


def write_folder(
    folder: Path,
    arch: Architecture,
    weights: Iterable[tuple[str, Tensor]],
    *,
    config: Mapping[str, Any] | None = None,
    beside: Callable[[Path], None] = lambda partial: None,
) -> None:
    """Writes config.json and safetensors that transformers loads, in shards of at most MAX_SHARD_BYTES.

    Args:
        config: more of config.json.
        beside: writes what else belongs into the folder, which has another name until it is whole.

    The folder appears when it is whole; ValueError where something else stands there."""
    format_of(arch)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not empty: name another, or delete it")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dtype = _write_shards(partial, arch, weights)
        whole = config_of_architecture(arch) | dict(config or {}) | {"torch_dtype": dtype}
        (partial / CONFIG).write_text(json.dumps(whole, indent=1), encoding="utf-8")
        beside(partial)
        if folder.exists():
            folder.rmdir()
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(folder: Path, arch: Architecture, weights: Iterable[tuple[str, Tensor]]) -> str:
    """The dtype of what was written."""
    form = format_of(arch)
    fused: dict[str, dict[int, Tensor]] = {}
    """Parts of tensors of which not all parts have come."""
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
        key, piece = form.key(name), form.piece(name)
        parts = {0: tensor} if piece is None else fused.setdefault(key, {}) | {piece: tensor}
        if piece is not None and len(parts) < 3:
            fused[key] = parts
            continue
        fused.pop(key, None)
        stored = _theirs([part for _, part in sorted(parts.items())], form, name, arch.num_heads)
        num_bytes = stored.numel() * stored.element_size()
        if held and size + num_bytes > MAX_SHARD_BYTES:
            flush()
        held[key] = stored
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
