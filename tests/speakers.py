"""Runs of models that were taught a few conversations by heart, for tests of what talks with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from clusters.files import write_atomically
from orchestrator.models.architecture import make_architecture
from orchestrator.models.decoder import Decoder, initialize
from orchestrator.training import checkpoint
from orchestrator.training.checkpoint import CheckpointInfo
from orchestrator.training.packing import Sample
from orchestrator.training.tokenizer import ByteTokenizer, Tokenizer


def learned(samples: Sequence[Sample], *, vocab_size: int, max_position: int, loss: float = 0.03) -> Decoder:
    """A small LLaMA that goes on with the samples as they stand, where they are learned."""
    arch = make_architecture(
        family="llama",
        num_layers=2,
        hidden_size=48,
        num_heads=4,
        ffn_size=96,
        vocab_size=vocab_size,
        max_position=max_position,
    )
    model = Decoder(arch)
    initialize(model, arch, 1)
    length = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(len(samples), length, dtype=torch.long)
    targets = torch.full((len(samples), length), -100)
    for row, sample in enumerate(samples):
        tokens, learn = torch.from_numpy(sample.ids), torch.from_numpy(sample.learn)
        ids[row, : len(tokens)] = tokens
        targets[row, : len(tokens) - 1] = torch.where(learn[1:], tokens[1:], -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(400):
        logits = model(ids)
        now = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if now < loss:
            return model
        optimizer.zero_grad()
        now.backward()
        optimizer.step()
    raise AssertionError(f"the loss is {now:.3f} after 400 steps")


def kept_run(folder: Path, model: Decoder, *, tokenizer: Tokenizer | None = None, job: dict[str, Any]) -> Path:
    """The run folder of a model, as a worker leaves it: one checkpoint, the tokenizer, the job."""

    class Held:
        def state_dict(self) -> dict[str, Any]:
            return {f"model.{name}": parameter for name, parameter in model.named_parameters()}

    speaks = tokenizer or ByteTokenizer()
    info = CheckpointInfo(
        job=job,
        architecture=asdict(model.arch),
        num_steps=1,
        strategy={},
        data={"tokenizer": speaks.fingerprint, "tokens": "none"},
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        checkpoint.save(Held(), folder / "checkpoints", step=1, info=info, background=False).wait()  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()
    (folder / "tokenizer").mkdir()
    speaks.save(folder / "tokenizer")
    write_atomically(folder / "tokenizer" / "description.json", json.dumps(speaks.describe()))
    write_atomically(folder / "job.yaml", json.dumps(job))
    return folder
