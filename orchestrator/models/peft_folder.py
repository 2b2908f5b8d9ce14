"""Adapters as the folder that peft reads: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from clusters.files import publish
from orchestrator.models.architecture import Architecture
from orchestrator.models.formats import format_of
from orchestrator.models.lora import PLACES, A, Lora


def write_adapter_folder(
    folder: Path, arch: Architecture, lora: Lora, tensors: Mapping[str, Tensor], *, base: str
) -> None:
    """Writes adapters beside their names in transformers' class of the family.

    Args:
        tensors: our names -> values.
        base: the folder of the weights that they stand on.

    The folder appears when it is whole. ValueError where something stands there, or where transformers keeps a layer in one
    tensor with others, so that peft's adapters are of another shape."""
    form = format_of(arch)
    if folder.exists():
        raise ValueError(f"{folder} is there already: name another, or delete it")
    named: dict[str, str] = {}
    for target in lora.targets:
        weight = f"blocks.0.{PLACES[target]}.weight"
        if form.piece(weight) is not None or form.is_transposed(weight):
            raise ValueError(
                f"family {arch.family} keeps {target} in transformers as a part of another tensor, or transposed, for which "
                "peft has no such adapter: convert without --adapter, which merges it into the weights"
            )
        named[target] = form.key(weight).removesuffix(".weight").rpartition(".")[2]
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        theirs = {}
        for name, tensor in tensors.items():
            stem, _, leaf = name.rpartition(".")
            place = form.key(f"{stem}.weight").removesuffix(".weight")
            theirs[f"base_model.model.{place}.lora_{'A' if leaf == A else 'B'}.weight"] = tensor.contiguous()
        save_file(theirs, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted(set(named.values())),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
