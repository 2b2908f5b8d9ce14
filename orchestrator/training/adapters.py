"""Checkpoints that hold adapters (LoRA) alone: on which weights they stand, and the whole model again with them merged in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.models.architecture import Architecture, num_parameters
from orchestrator.models.decoder import Decoder
from orchestrator.models.lora import PLACES, TARGETS, A, B, Lora, is_adapter, sizes
from orchestrator.models.weights import read_folder
from orchestrator.spec.job import Job
from orchestrator.training.manifest import CheckpointRef, CheckpointRefused
from orchestrator.training.reader import Reader

MAX_GROUP_BYTES = 4 * 2**30
"""Bytes of a checkpoint's tensors in memory at once."""
SAMPLE_BYTES = 2**20
"""Bytes at each end of a file of weights that its fingerprint reads."""


def fingerprint_of(folder: Path) -> str:
    """Return a digest of a folder's weights: its configuration, and of each file of tensors the size and both ends."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as opened:
            digest.update(opened.read(SAMPLE_BYTES))
            opened.seek(max(0, size - SAMPLE_BYTES))
            digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def told_of(job: Job) -> dict[str, Any] | None:
    """Return what a checkpoint tells of the adapters that a job trains, and of the weights they stand on; None where it trains
    the model itself."""
    if job.lora is None:
        return None
    if not job.initializes_from_weights or job.model.path is None:
        raise ValueError(
            "training.lora: adapters stand beside trained weights: name their folder, model: {path: FOLDER}"
        )
    folder = (job.directory / str(job.model.path)).absolute()
    return {**asdict(job.lora), "base": str(folder), "fingerprint": fingerprint_of(folder)}


def lora_of(ref: CheckpointRef, arch: Architecture) -> Lora | None:
    """Return the adapters that a checkpoint holds; None where it holds the model. CheckpointRefused where its manifest does not
    say it rightly."""
    told = ref.manifest.get("lora")
    if told is None:
        return None
    try:
        rank, alpha, targets = told["rank"], told["alpha"], tuple(told["targets"])
        known = [target for target in TARGETS if target in targets]
        sound = type(rank) is int and 0 < rank < 2**20 and type(alpha) in (int, float) and alpha > 0
        sound = sound and list(targets) == known and bool(known) and set(known) <= sizes(arch).keys()
        sound = sound and type(told["base"]) is str and type(told["fingerprint"]) is str
    except (TypeError, KeyError):
        sound = False
    if not sound:
        raise CheckpointRefused(ref.path.name, "its manifest tells no adapters of this model")
    return Lora(rank=rank, alpha=float(alpha), targets=targets)


def base_of(ref: CheckpointRef, arch: Architecture) -> Callable[[str, torch.Size], Tensor]:
    """(name, shape) -> a parameter of the weights that a checkpoint's adapters stand on. CheckpointRefused where they are not
    what they were."""
    told: Mapping[str, Any] = ref.manifest["lora"]
    folder = Path(told["base"])
    if not (folder / "config.json").is_file():
        raise CheckpointRefused(
            ref.path.name, f"it holds adapters of the weights in {folder}, which are not there: put the folder back"
        )
    if fingerprint_of(folder) != told["fingerprint"]:
        raise CheckpointRefused(
            ref.path.name, f"it holds adapters of other weights than {folder} has now: put the folder back as it was"
        )
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if num_parameters(arch) > there:
        raise CheckpointRefused(
            ref.path.name, f"it tells of {num_parameters(arch)} parameters, for which {folder} has no room"
        )
    return read_folder(folder, arch)


def whole_weights(ref: CheckpointRef, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters in the module's order and in fp32, some of them in memory at a time; adapters are merged into the
    weights they stand beside. The checkpoint was verified: its files are not hashed again."""
    lora, reader = lora_of(ref, arch), Reader(ref)
    with torch.device("meta"):
        module = Decoder(arch, lora=lora)
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    held = {name: shape for name, shape in shapes.items() if lora is None or is_adapter(name)}
    reader.refuse_unfit({f"model.{name}": torch.empty(shape, device="meta") for name, shape in held.items()})
    if lora is not None:
        yield from _merged(reader, shapes, lora, base_of(ref, arch))
        return
    names = list(held)
    while names:
        group: dict[str, Any] = {}
        size = 0
        while names and (not group or size < MAX_GROUP_BYTES):
            name = names.pop(0)
            group[f"model.{name}"] = torch.empty(shapes[name], dtype=torch.float32)
            size += group[f"model.{name}"].nbytes
        reader.fill(group)
        for name, tensor in group.items():
            yield name.removeprefix("model."), tensor


def _merged(
    reader: Reader, shapes: Mapping[str, torch.Size], lora: Lora, base: Callable[[str, torch.Size], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        if is_adapter(name):
            continue
        value = base(name, shape)
        stem = name.removesuffix(".weight")
        if f"{stem}.{A}" in shapes:
            pair = {
                f"model.{stem}.{leaf}": torch.empty(shapes[f"{stem}.{leaf}"], dtype=torch.float32) for leaf in (A, B)
            }
            reader.fill(pair)
            first, second = pair.values()
            value = value + lora.scale * (second.double() @ first.double())
        yield name, value.float()


def adapters(ref: CheckpointRef, arch: Architecture) -> tuple[Lora, dict[str, Tensor]]:
    """Return (the adapters, their parameters in fp32 by name) of a checkpoint. CheckpointRefused where it holds a whole model."""
    lora = lora_of(ref, arch)
    if lora is None:
        raise CheckpointRefused(ref.path.name, "it holds a whole model, and no adapters")
    known = sizes(arch)
    targets: dict[str, Tensor] = {}
    for layer in range(arch.num_layers):
        for target in lora.targets:
            stem = f"model.blocks.{layer}.{PLACES[target]}"
            targets[f"{stem}.{A}"] = torch.empty((lora.rank, known[target].inputs))
            targets[f"{stem}.{B}"] = torch.empty((known[target].outputs, lora.rank))
    Reader(ref).fill(targets)
    return lora, {name.removeprefix("model."): tensor for name, tensor in targets.items()}
