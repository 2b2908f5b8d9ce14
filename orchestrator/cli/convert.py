"""`shardwise convert SOURCE TARGET`: a checkpoint as a Hugging Face folder, or as a GGUF file for llama.cpp.

The other way needs no verb: a job with `model: {path: FOLDER}` starts from a Hugging Face folder's weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clusters.files import publish
from orchestrator.cli.errors import CommandError, ExitCode
from orchestrator.cli.runs import directory_option, run_folder

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.models.architecture import Architecture
    from orchestrator.training.manifest import CheckpointRef
    from orchestrator.training.tokenizer import Tokenizer


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
@click.option("--adapter", is_flag=True, help="Of a LoRA run: write the adapters alone, as a folder that peft reads.")
@directory_option
@click.option("--json", "as_json", is_flag=True, help="Print {target, checkpoint, step, num_parameters, tokenizer}.")
def command(source: Path, target: Path, dtype: str, adapter: bool, directory: str, as_json: bool) -> int:
    """Writes the newest whole checkpoint of SOURCE, a run's name or folder, or the checkpoint SOURCE, as the Hugging Face folder
    TARGET, or as a GGUF file for llama.cpp where TARGET ends in .gguf. Adapters of a LoRA run are merged into the weights that
    they stand on."""
    from orchestrator.models.architecture import num_parameters
    from orchestrator.training.manifest import CheckpointRefused, architecture_of

    gguf = target.suffix == ".gguf"
    if gguf and adapter:
        raise CommandError("--adapter writes a folder for peft, and TARGET ends in .gguf", fix="leave one of them out")
    ref = find_checkpoint(source, directory)
    try:
        arch = architecture_of(ref)
        if adapter:
            return _write_adapter(ref, arch, target, as_json)
        tokenizer = _kept_tokenizer(ref)
        (_write_gguf if gguf else _write)(ref, arch, target, dtype, tokenizer)
    except (CheckpointRefused, ValueError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{error.filename or target} cannot be written: {error.strerror or error}") from None
    told = {
        "target": str(target),
        "checkpoint": str(ref.path),
        "step": ref.step,
        "num_parameters": num_parameters(arch),
        "tokenizer": None if tokenizer is None else target.name if gguf else "tokenizer.json",
    }
    if as_json:
        click.echo(json.dumps(told, indent=1))
        return ExitCode.DONE
    read = f"transformers.AutoModelForCausalLM.from_pretrained({str(target)!r})"
    click.echo(
        f"{target}: {told['num_parameters']:,} parameters of step {ref.step} in {dtype}\n"
        f"  read it with {f'llama-cli -m {target}' if gguf else read}\n"
        f"  tokenizer  {told['tokenizer'] or 'none: the run kept none'}"
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
    if ref.manifest["job"].get("task") == "reward":
        raise CommandError(
            f"{ref.path} is of a reward model, which gives a number and no text",
            fix="name the run of task sft, dpo or pretrain whose answers it judges",
        )
    return ref


def _write(ref: CheckpointRef, arch: Architecture, target: Path, dtype: str, tokenizer: Tokenizer | None) -> None:
    """Writes the folder; with a tokenizer its files, and what it and the weights that training started from say of special
    tokens: without them transformers takes a family's own, and ends a model of bytes at byte 2."""
    from orchestrator.models.weights import GENERATION, config_of_tokens, write_folder
    from orchestrator.training.tokenizer import kept_of_weights

    if tokenizer is None:
        write_folder(target, arch, _weights(ref, arch, dtype))
        return
    config, generation = config_of_tokens(tokenizer.special_ids, kept_of_weights(_run_of(ref)))

    def beside(folder: Path) -> None:
        tokenizer.export(folder, arch.max_position)
        (folder / GENERATION).write_text(json.dumps(generation, indent=1), encoding="utf-8")

    write_folder(target, arch, _weights(ref, arch, dtype), config=config, beside=beside)


def _weights(ref: CheckpointRef, arch: Architecture, dtype: str) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters in the module's order, some of them in memory at a time."""
    import torch

    from orchestrator.training.adapters import whole_weights

    for name, tensor in whole_weights(ref, arch):
        yield name, tensor.to(getattr(torch, dtype))


def _write_adapter(ref: CheckpointRef, arch: Architecture, target: Path, as_json: bool) -> int:
    """Writes a LoRA run's adapters for peft, and says so."""
    from orchestrator.models.lora import num_adapter_parameters
    from orchestrator.models.peft_folder import write_adapter_folder
    from orchestrator.training.adapters import adapters

    lora, tensors = adapters(ref, arch)
    base = str(ref.manifest["lora"]["base"])
    write_adapter_folder(target, arch, lora, tensors, base=base)
    told = {
        "target": str(target),
        "checkpoint": str(ref.path),
        "step": ref.step,
        "num_parameters": num_adapter_parameters(arch, lora),
        "tokenizer": None,
        "base": base,
    }
    if as_json:
        click.echo(json.dumps(told, indent=1))
    else:
        click.echo(
            f"{target}: adapters of {told['num_parameters']:,} parameters of step {ref.step} in float32\n"
            f"  read them with peft.PeftModel.from_pretrained(MODEL, {str(target)!r}), MODEL from {base}"
        )
    return ExitCode.DONE


def _write_gguf(ref: CheckpointRef, arch: Architecture, target: Path, dtype: str, tokenizer: Tokenizer | None) -> None:
    """Writes the file, its tokenizer in it. ValueError where llama.cpp does not run the model, or has no such tokenizer."""
    from importlib.util import find_spec

    from orchestrator.models import gguf_file
    from orchestrator.training.tokenizer import HuggingFaceTokenizer

    if find_spec("gguf") is None:
        raise CommandError("the package gguf is not installed", fix="pip install 'shardwise[gguf]'")
    if target.exists():
        raise ValueError(f"{target} is there already: name another, or delete it")
    if dtype == "bfloat16":
        raise ValueError("a GGUF file is written in float32 or float16: say --dtype float16")
    gguf_file.refuse(arch)
    if tokenizer is None:
        raise ValueError("a GGUF file holds the tokenizer, and the run kept none")

    def vocabulary(writer: Any) -> None:
        if isinstance(tokenizer, HuggingFaceTokenizer):
            described = json.loads(tokenizer.inner.to_str())
            gguf_file.merged_vocabulary(writer, described, arch.vocab_size, tokenizer.end_of_text)
        else:
            gguf_file.byte_vocabulary(writer, arch.vocab_size)

    partial = target.with_name(target.name + ".partial")
    try:
        gguf_file.write_file(partial, arch, _weights(ref, arch, dtype), vocabulary, name=_run_of(ref).name)
        publish(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _kept_tokenizer(ref: CheckpointRef) -> Tokenizer | None:
    """The tokenizer that the run keeps beside its checkpoints."""
    from orchestrator.training.data import DataError
    from orchestrator.training.tokenizer import kept_tokenizer

    try:
        return kept_tokenizer(_run_of(ref))
    except DataError as error:
        click.echo(f"without a tokenizer: {error}", err=True)
        return None


def _run_of(ref: CheckpointRef) -> Path:
    return ref.path.absolute().parent.parent
