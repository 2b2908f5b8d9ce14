"""`shardwise convert SOURCE TARGET`: a checkpoint as a Hugging Face folder.

The other way needs no verb: a job with `model: {path: FOLDER}` starts from a Hugging Face folder's weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.errors import CommandError, ExitCode
from orchestrator.cli.runs import directory_option, run_folder

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.models.architecture import Architecture
    from orchestrator.spec import Job
    from orchestrator.training.manifest import CheckpointRef

MAX_GROUP_BYTES = 4 * 2**30
"""Of a checkpoint's tensors in memory at once."""


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the weights that are written.",
)
@directory_option
@click.option("--json", "as_json", is_flag=True, help="Print {target, checkpoint, step, num_parameters, tokenizer}.")
def command(source: Path, target: Path, dtype: str, directory: str, as_json: bool) -> int:
    """Writes the newest whole checkpoint of SOURCE, a run's name or folder, or the checkpoint SOURCE, as the Hugging Face folder
    TARGET."""
    from orchestrator.models.architecture import num_parameters
    from orchestrator.training.manifest import CheckpointRefused

    ref = find_checkpoint(source, directory)
    try:
        arch = _architecture(ref)
        _write(ref, arch, target, dtype)
    except (CheckpointRefused, ValueError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{error.filename or target} cannot be written: {error.strerror or error}") from None
    told = {
        "target": str(target),
        "checkpoint": str(ref.path),
        "step": ref.step,
        "num_parameters": num_parameters(arch),
        "tokenizer": _add_tokenizer(ref, target),
    }
    if as_json:
        click.echo(json.dumps(told, indent=1))
        return ExitCode.DONE
    click.echo(
        f"{target}: {told['num_parameters']:,} parameters of step {ref.step} in {dtype}\n"
        f"  read it with transformers.AutoModelForCausalLM.from_pretrained({str(target)!r})\n"
        f"  tokenizer  {told['tokenizer'] or 'none: the run kept none, or its tokens are bytes'}"
    )
    return ExitCode.DONE


def find_checkpoint(source: Path, directory: str) -> CheckpointRef:
    """Return the newest whole checkpoint of a run (its name in `directory`, as `status` takes it, or its folder), or the
    checkpoint at a path. CommandError where there is none."""
    from orchestrator.telemetry.records import Event
    from orchestrator.training.manifest import MANIFEST, CheckpointRefused, latest, verify

    run = next((path for path in (Path(directory) / source, source) if (path / "checkpoints").is_dir()), None)
    whole = run is None and source.is_dir() and ((source / MANIFEST).is_file() or source.name.startswith("step-"))
    if run is None and not whole:
        if (source / "config.json").is_file():
            raise CommandError(
                f"{source} is a Hugging Face folder already",
                fix=f"train from it: write `model: {{path: {source}}}` in the job",
            )
        run = run_folder(str(source), directory).path
    refused: list[Event] = []
    try:
        ref = verify(source) if run is None else latest(run / "checkpoints", report=refused.append)
    except CheckpointRefused as error:
        raise CommandError(str(error), fix="choose the one before it") from None
    for event in refused:
        click.echo(event.cause, err=True)
    if ref is None:
        fix = "give a run with a finished checkpoint (`shardwise status`), or the checkpoint's folder"
        raise CommandError(f"{source} holds no whole checkpoint", fix, ExitCode.NOT_FOUND)
    return ref


def _job(ref: CheckpointRef) -> Job:
    """The job that wrote it; a Hugging Face folder that it names is looked for from the current folder."""
    from orchestrator.spec import parse_job

    return parse_job(dict(ref.manifest["job"]), directory=Path.cwd())


def _architecture(ref: CheckpointRef) -> Architecture:
    return _job(ref).architecture


def _write(ref: CheckpointRef, arch: Architecture, target: Path, dtype: str) -> None:
    import torch

    from orchestrator.models.decoder import Decoder
    from orchestrator.models.weights import write_folder
    from orchestrator.training.checkpoint import Reader

    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Decoder(arch).named_parameters()}

    reader = Reader(ref)  # find_checkpoint verified it: its files are not hashed again for each group

    def weights() -> Iterator[tuple[str, Tensor]]:
        names = list(shapes)
        while names:
            group: dict[str, Any] = {}
            size = 0
            while names and (not group or size < MAX_GROUP_BYTES):
                name = names.pop(0)
                group[f"model.{name}"] = torch.empty(shapes[name], dtype=torch.float32)
                size += group[f"model.{name}"].nbytes
            reader.fill(group)
            for name, tensor in group.items():
                yield name.removeprefix("model."), tensor.to(getattr(torch, dtype))

    write_folder(target, arch, weights())


def _add_tokenizer(ref: CheckpointRef, target: Path) -> str | None:
    """The tokenizer that the run kept beside its checkpoints; bytes have no file."""
    from orchestrator.training.data import DataError
    from orchestrator.training.tokenizer import FILE, HuggingFaceTokenizer, kept_tokenizer

    try:
        tokenizer = kept_tokenizer(ref.path.parent.parent)
    except DataError:
        return None
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    tokenizer.save(target)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.inner.id_to_token(tokenizer.end_of_text),
        "model_max_length": _job(ref).architecture.max_position,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return FILE
