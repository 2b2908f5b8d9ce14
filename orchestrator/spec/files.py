"""Whether what a job names is on this machine: its text, its tokenizer and its weights. A job is valid without them: it may be
written on one machine and run on another."""

from __future__ import annotations

from collections.abc import Container, Iterator
from glob import has_magic, iglob
from pathlib import Path

from orchestrator.spec.errors import ErrorEntry, Fault, Keys, dotted
from orchestrator.spec.job import Job
from orchestrator.spec.resolve import MANIFEST
from orchestrator.spec.sections import ModelSpec

FIX = "put it there, or correct the path: it is relative to the job file"


def missing(job: Job, *, made: Container[str] = ()) -> list[ErrorEntry]:
    """Return the text, the tokenizer and the weights that the job names and that are not here, each with its place.

    Args:
        made: run folders that are there before the job begins: those of a chain's earlier links.
    """
    return [job.entry(fault) for fault in (*_text(job), *_tokenizer(job), *_weights(job, made))]


def _text(job: Job) -> Iterator[Fault]:
    for word in ("train", "validation") if job.data is not None else ():
        patterns = getattr(job.data, word)
        for number, pattern in enumerate(patterns if isinstance(patterns, tuple) else ()):
            path = job.directory / Path(pattern).expanduser()
            if path.exists() or (has_magic(pattern) and next(iglob(str(path), recursive=True), None) is not None):
                continue
            told = "matches no file" if has_magic(pattern) else "does not exist"
            yield Fault(path=("data", word, number), message=f"`data.{word}`: {path.resolve()} {told}", fix=FIX)


def _tokenizer(job: Job) -> Iterator[Fault]:
    tokenizer = "byte" if job.data is None else job.data.tokenizer
    if isinstance(tokenizer, str) and tokenizer != "byte":
        path = job.directory / Path(tokenizer).expanduser()
        if not path.exists():
            told = f"`data.tokenizer`: {path.resolve()} does not exist"
            yield Fault(path=("data", "tokenizer"), message=told, fix=f"{FIX}, or write byte or {{bpe: 8192}}")


def _roles(job: Job) -> Iterator[tuple[Keys, ModelSpec]]:
    for role in ("reward", "critic", "reference") if job.ppo is not None else ():
        model = getattr(job.ppo, role)
        if model is not None:
            yield ("ppo", role), model


def _weights(job: Job, made: Container[str]) -> Iterator[Fault]:
    for path, model in (("model",), job.model), *_roles(job):
        if model.checkpoint is None or not model.has_weights or model.checkpoint in made:
            continue
        folder = job.directory / Path(model.checkpoint).expanduser()
        if not (folder / MANIFEST).is_file() and not any(folder.glob(f"checkpoints/step-*/{MANIFEST}")):
            told = f"`{dotted((*path, 'checkpoint'))}`: {folder.resolve()} holds no checkpoint"
            yield Fault(path=(*path, "checkpoint"), message=told, fix="train it first, or correct the path")
    if job.model.path is None or not job.initializes_from_weights:
        return
    folder = job.directory / Path(str(job.model.path)).expanduser()
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        yield Fault(
            path=("model", "path"),
            message=f"`model.path`: {folder.resolve()} holds no model.safetensors",
            fix="save the model with transformers' save_pretrained, or write `initialize: random`",
        )
    if job.uses_tokenizer_of_weights and not any(
        (folder / name).is_file() for name in ("tokenizer.json", "vocab.json")
    ):
        yield Fault(
            path=("model", "path"),
            message=f"`model.path`: {folder.resolve()} holds no tokenizer, and `data.tokenizer` is absent",
            fix="name the tokenizer that the weights were trained with: `data: {tokenizer: FOLDER}`",
        )
