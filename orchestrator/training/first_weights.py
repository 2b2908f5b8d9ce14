"""The first weights of a model: drawn by the job's seed, or read from a Hugging Face folder or another run's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.models.architecture import Architecture
from orchestrator.models.decoder import initial_weights
from orchestrator.models.lora import is_adapter
from orchestrator.models.weights import read_folder, spoken_of
from orchestrator.spec.job import Job
from orchestrator.spec.sections import ModelSpec
from orchestrator.training.checkpoint import Reader
from orchestrator.training.data import DataError, DataIndex
from orchestrator.training.manifest import (
    MANIFEST,
    CheckpointRef,
    CheckpointRefused,
    fingerprint,
    latest,
    read_manifest,
    verify_files,
)
from orchestrator.training.tokenizer import kept_of_weights
from strategies.zero.states import Weights

VALUE_HEAD = "head.value.weight"


def first_weights(model: ModelSpec, architecture: Architecture, directory: Path, seed: int) -> Weights:
    """(name, shape) -> that parameter's first value. Adapters are drawn, and a value head that the weights lack.

    Raises ValueError, here or when a parameter is asked for, where the weights are missing, damaged or of another model."""
    drawn = initial_weights(architecture, seed)
    if not model.has_weights:
        return drawn
    if model.path is not None:
        read: Weights = read_folder(directory / Path(model.path).expanduser(), architecture)
        return lambda name, shape: drawn(name, shape) if name == VALUE_HEAD or is_adapter(name) else read(name, shape)
    reader = Reader(verify_files(named_checkpoint(model, directory)))

    def value(name: str, shape: torch.Size) -> Tensor:
        if name == VALUE_HEAD and f"model.{name}" not in reader.entries:
            return drawn(name, shape)
        held = torch.empty(shape, dtype=torch.float64)
        reader.fill({f"model.{name}": held})
        return held

    return value


def named_checkpoint(model: ModelSpec, directory: Path) -> CheckpointRef:
    """The checkpoint that a model names, the newest whole one where it names a run. Raises CheckpointRefused."""
    folder = directory / Path(str(model.checkpoint)).expanduser()
    if (folder / MANIFEST).is_file():
        return read_manifest(folder)
    found = latest(folder / "checkpoints", report=lambda event: None, check=False)
    if found is None:
        raise CheckpointRefused(folder.name, f"{folder} holds no whole checkpoint: train it first, or correct the path")
    return found


def run_of(checkpoint: Path) -> Path:
    """The run folder that a model's checkpoint names, or that its checkpoint lies in."""
    return checkpoint.parent.parent if (checkpoint / MANIFEST).is_file() else checkpoint


def models_of(job: Job) -> dict[str, ModelSpec]:
    """Return every model that a job names and whose first weights it reads, by its role; the actor of ppo is the job's model."""
    models = {"model": job.model}
    if job.ppo is not None:
        models |= {"ppo.reward": job.ppo.reward, "ppo.critic": job.ppo.of_critic}
        models["ppo.reference"] = job.ppo.reference or job.model
    return models


def _named_checkpoints(job: Job) -> dict[str, CheckpointRef]:
    return {
        role: named_checkpoint(model, job.directory)
        for role, model in models_of(job).items()
        if model.checkpoint is not None and model.has_weights
    }


def marks(job: Job) -> dict[str, str]:
    """Return a fingerprint of the frozen models of ppo that are checkpoints: a run that goes on must find the same ones."""
    if job.ppo is None:
        return {}
    found = {role: fingerprint(dict(ref.manifest)) for role, ref in _named_checkpoints(job).items()}
    return {"frozen": fingerprint({role: found.get(role) for role in ("ppo.reward", "ppo.reference")})}


def check_tokenizers(job: Job, index: DataIndex) -> None:
    """CheckpointRefused where weights that the job names were trained with another tokenizer than its text is of."""
    for role, ref in _named_checkpoints(job).items():
        if ref.manifest["data"].get("tokenizer") != index.tokenizer["fingerprint"]:
            raise CheckpointRefused(
                ref.path.name,
                f"{role} was trained with another tokenizer than this job's text is of; leave data.tokenizer out, or train it "
                "with this one",
            )


def said_by_weights(model: ModelSpec, directory: Path) -> dict[str, Any] | None:
    """What the weights that training starts from say of special tokens; None where it starts from none."""
    if not model.has_weights:
        return None
    if model.path is not None:
        return dict(spoken_of(directory / Path(model.path).expanduser()))
    try:
        return kept_of_weights(run_of(directory / Path(str(model.checkpoint)).expanduser()))
    except DataError:  # the checkpoint was taken out of its run
        return None
