"""The inputs of a job: the request for tokens, the files behind it, and what is different from when they were tokenized."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.training import blanks, collect, corpus
from orchestrator.training.collect import Policy
from orchestrator.training.data import INDEX, DataError, DataIndex, Source
from orchestrator.training.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, tokenizer_of_run, unfilled

if TYPE_CHECKING:
    from orchestrator.spec.job import Job


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """The request to prepare text: the job's data section, with absolute paths resolved from `base`."""

    base: Path
    train: tuple[str, ...]
    validation: float | tuple[str, ...] = 0.005
    """Files, or the fraction of train that is held out."""
    tokenizer: str | int = "byte"
    """byte, a path, or the size of a BPE to train."""
    tokenizer_of_weights: bool = False
    """The path is that of the weights, and the job does not name it as a tokenizer."""
    vocab_size: int | None = None
    """Vocabulary of the model; None where it does not matter."""
    task: str = "pretrain"
    """Task that is learned: from text, or (sft, reward, dpo) from records, which become rows of packed samples."""
    sequence_length: int = 0
    """Tokens of a row; without effect on text."""
    response_length: int = 0
    """Tokens of a row that a prompt leaves to its response; only ppo has them."""
    template: Literal["auto", "alpaca", "chat", "plain"] = "auto"
    on_bad: Policy = "stop"
    blank_filling: bool = False
    """The model's family needs the special tokens of blanks (blanks.py)."""
    cache: Path | None = None
    """Folder of all prepared tokens; None: in the user's cache, which other machines do not see."""

    @property
    def directory(self) -> Path:
        """Return where the tokens of this request are kept: in the cache, under a name that the request decides. Each
        state of its files has a folder of its own, whose name goes on with a hyphen and the fingerprint of the tokens."""
        users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardwise" / "data"
        validation = self.validation if isinstance(self.validation, float | int) else list(self.validation)
        decides: list[object] = [str(self.base.resolve()), list(self.train), validation, self.tokenizer]
        if self.task != "pretrain":
            decides += [self.task, self.sequence_length, self.template, self.on_bad]
        if self.task == "ppo":
            decides.append(self.response_length)
        key = json.dumps(decides)
        return (self.cache or users) / hashlib.sha256(key.encode()).hexdigest()[:16]

    @property
    def fraction(self) -> float:
        """Return the part of the train files that is held out."""
        return float(self.validation) if isinstance(self.validation, float | int) else 0.0


def request_of(job: Job, cache: Path | None = None) -> Request:
    """Return what a job asks to be prepared, into a cache, by default the user's. DataError where the job has no data."""
    if job.data is None:
        raise DataError(f"job {job.name} has no data: add `data: {{train: [corpus/*.txt]}}`")
    validation = job.data.validation
    tokenizer = job.data.tokenizer
    if job.uses_tokenizer_of_weights:
        of_checkpoint = job.model.checkpoint and job.directory / Path(job.model.checkpoint).expanduser()
        tokenizer = tokenizer_of_run(of_checkpoint) if of_checkpoint else str(job.model.path)
    return Request(
        base=Path(job.directory),
        train=tuple(job.data.train),
        validation=float(validation) if isinstance(validation, float | int) else tuple(validation),
        tokenizer=tokenizer if isinstance(tokenizer, str) else int(tokenizer.bpe),
        tokenizer_of_weights=job.uses_tokenizer_of_weights,
        vocab_size=job.architecture.vocab_size,
        task=job.task,
        sequence_length=job.batch.sequence_length,
        response_length=0 if job.ppo is None else job.ppo.response_tokens(job.batch.sequence_length),
        template=job.data.template,
        on_bad=job.data.on_bad,
        blank_filling=job.architecture.traits.blank_filling,
        cache=cache,
    )


def given_tokenizer(request: Request) -> Tokenizer | None:
    """The tokenizer that the request names; None where it is to be trained. DataError where it cannot be used."""
    if isinstance(request.tokenizer, int):
        if request.vocab_size is not None:
            check_vocabulary(request.tokenizer, request.vocab_size)
            if request.blank_filling:
                blanks.check_room(request.tokenizer, request.vocab_size)
        return None
    try:
        tokenizer = load_tokenizer(request.tokenizer, request.base)
    except DataError as error:
        if not request.tokenizer_of_weights:
            raise
        raise DataError(
            f"data.tokenizer is absent, so the tokenizer of the weights in model.path is wanted, and "
            f"{str(error).removeprefix('data.tokenizer: ')}. Or name it: data.tokenizer: FOLDER"
        ) from None
    if request.vocab_size is not None:
        check_vocabulary(tokenizer.vocab_size, request.vocab_size)
        if request.blank_filling:
            blanks.specials_of(tokenizer, request.vocab_size)
    return tokenizer


def notes(request: Request, index: DataIndex) -> list[str]:
    """Return what a person should know of the tokenizer before training."""
    told = []
    if request.tokenizer_of_weights:
        told.append(f"data.tokenizer is absent: the text is tokenized with that of the weights, in {request.tokenizer}")
    if request.vocab_size is not None and (warning := unfilled(index.vocab_size, request.vocab_size)):
        told.append(f"warning: {warning}")
    told += index.report.splitlines()
    return told


def files_of(request: Request) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """(files to train on, files that are held out). DataError where one is missing or in both."""
    suffixes = corpus.SUFFIXES if request.task == "pretrain" else collect.SUFFIXES
    train = corpus.expand(request.train, request.base, field="data.train", suffixes=suffixes)
    held_out: tuple[Path, ...] = ()
    if not isinstance(request.validation, float | int):
        held_out = corpus.expand(request.validation, request.base, field="data.validation", suffixes=suffixes)
    if both := sorted(set(train) & set(held_out)):
        raise DataError(
            f"{both[0]} is in data.train and in data.validation: its loss would say nothing; leave it in one"
        )
    return train, held_out


def versions(stem: Path) -> list[Path]:
    """The folders of a request's tokens, each of another state of its files. The first format had one, without a fingerprint."""
    named = [
        path
        for path in stem.parent.glob(f"{stem.name}-*")
        if re.fullmatch(r"-[0-9a-f]{16}", path.name[len(stem.name) :])
    ]
    return [path for path in (stem, *sorted(named)) if (path / INDEX).is_file()]


def is_unchanged(source: Source) -> bool:
    """Compares a file with what it was by size and time; where only the time differs (a copy, a checkout), by content."""
    path = Path(source.path)
    stat = path.stat()
    if stat.st_size != source.bytes:
        return False
    if stat.st_mtime_ns == source.mtime_ns:
        return True
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == source.sha256


def changes(request: Request, index: DataIndex) -> list[str]:
    """Return what is different now from when the tokens were made, file by file, as a person would say it."""
    try:
        train, held_out = files_of(request)
    except DataError as error:
        missing = [_name(source, request) + " is gone" for source in index.sources if not Path(source.path).exists()]
        return missing or [str(error)]
    now = {(str(path), "train") for path in train} | {(str(path), "validation") for path in held_out}
    before = {(source.path, source.split) for source in index.sources}
    told = [f"{_relative(path, request)} was added" for path, _ in sorted(now - before)]
    for source in index.sources:
        if (source.path, source.split) not in now:
            told.append(_name(source, request) + " is gone")
        elif change := _changed(source):
            told.append(f"{_name(source, request)} {change}")
    if isinstance(request.tokenizer, str):
        try:
            tokenizer = given_tokenizer(request)
        except DataError as error:
            told.append(str(error))
        else:
            if tokenizer is not None and tokenizer.fingerprint != index.tokenizer["fingerprint"]:
                told.append(f"data.tokenizer: {request.tokenizer} is another tokenizer than it was")
    return told


def _changed(source: Source) -> str:
    try:
        if is_unchanged(source):
            return ""
        size = Path(source.path).stat().st_size
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if size == source.bytes:
        return f"has another content of the same {size:,} bytes"
    return f"has {size:,} bytes instead of {source.bytes:,}"


def _name(source: Source, request: Request) -> str:
    return _relative(source.path, request)


def _relative(path: str, request: Request) -> str:
    base = request.base.resolve()
    return str(Path(path).relative_to(base)) if Path(path).is_relative_to(base) else path


def few(told: Sequence[object], most: int = 3) -> str:
    """The first of many, and how many more there are."""
    shown = ", ".join(str(one) for one in told[:most])
    return shown + (f" and {len(told) - most} more" if len(told) > most else "")
