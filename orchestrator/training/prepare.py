"""Text files -> a folder of tokens that every worker maps into memory.

    FOLDER.partial/     while it is made; an attempt that was cut short goes on in it, file by file
      HASH-train.bin    tokens of one input file
      whole/            what becomes FOLDER when its index is written
    FOLDER/
      index.json        tokenizer, splits, and every input file with its checksum
      train-00000.bin   tokens of many input files, one after the other
      tokenizer.json    unless the tokens are bytes

A folder is used again while its inputs, tokenizer and splits are what they were.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusters.files import publish
from orchestrator.training import corpus, shard
from orchestrator.training.data import INDEX, DataError, DataIndex, Source, Split, read_index, unigram_entropy
from orchestrator.training.tokenizer import Tokenizer, check_vocabulary, load_saved, load_tokenizer, train_bpe

if TYPE_CHECKING:
    from orchestrator.spec.job import Job

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

BPE_TRAINING_BYTES = 10**8
"""Text that a BPE is trained on at most: its merges settle long before, and memory grows with every distinct word."""
_PARALLEL_BYTES = 1 << 25
"""Below, processes cost more than they bring."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to prepare: the job's data section, with absolute paths resolved from `base`."""

    base: Path
    train: tuple[str, ...]
    validation: float | tuple[str, ...] = 0.005
    """Files, or the fraction of train that is held out."""
    tokenizer: str | int = "byte"
    """byte, a path, or the size of a BPE to train."""
    vocab_size: int | None = None
    """Of the model; None where it does not matter."""

    @property
    def directory(self) -> Path:
        """Where the tokens of this request are kept: in the user's cache, under a name that the request decides."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        validation = self.validation if isinstance(self.validation, float | int) else list(self.validation)
        key = json.dumps([str(self.base.resolve()), list(self.train), validation, self.tokenizer])
        return cache / "shardwise" / "data" / hashlib.sha256(key.encode()).hexdigest()[:16]


def request_of(job: Job) -> Request:
    """DataError where the job has no data."""
    if job.data is None:
        raise DataError(f"job {job.name} has no data: add `data: {{train: [corpus/*.txt]}}`")
    validation, tokenizer = job.data.validation, job.data.tokenizer
    return Request(
        base=Path(job.directory),
        train=tuple(job.data.train),
        validation=float(validation) if isinstance(validation, float | int) else tuple(validation),
        tokenizer=tokenizer if isinstance(tokenizer, str) else int(tokenizer.bpe),
        vocab_size=job.architecture.vocab_size,
    )


def prepare_job(job: Job, *, progress: Progress | None = None) -> DataIndex:
    """The job's tokens, made now unless they are there already."""
    return prepare(request_of(job), progress=progress)


def prepare(
    request: Request,
    *,
    directory: Path | None = None,
    progress: Progress | None = None,
    num_processes: int | None = None,
) -> DataIndex:
    """Tokenizes what is new; whole or not at all, and what was finished of an attempt cut short is used.

    Raises DataError: text or tokenizer that cannot be used, or a disk that is full."""
    target = request.directory if directory is None else directory
    tokenizer = _given_tokenizer(request)
    train = corpus.expand(request.train, request.base, field="data.train")
    held_out: tuple[Path, ...] = ()
    if not isinstance(request.validation, float | int):
        held_out = corpus.expand(request.validation, request.base, field="data.validation")
    if both := sorted(set(train) & set(held_out)):
        raise DataError(
            f"{both[0]} is in data.train and in data.validation: its loss would say nothing; leave it in one"
        )
    try:
        with _alone(target):
            index = _fresh(target, request, tokenizer, train, held_out)
            if index is None:
                index = _make(target, request, tokenizer, train, held_out, progress, num_processes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"the disk of {target} is full: free space, or set XDG_CACHE_HOME to a larger disk; "
                "finished files are kept, and prepare goes on from there"
            ) from None
        raise DataError(f"{error.filename or target} cannot be written: {error.strerror or error}") from None
    return index


def _given_tokenizer(request: Request) -> Tokenizer | None:
    """None where it is yet to be trained."""
    if isinstance(request.tokenizer, int):
        if request.vocab_size is not None:
            check_vocabulary(request.tokenizer, request.vocab_size)
        return None
    tokenizer = load_tokenizer(request.tokenizer, request.base)
    if request.vocab_size is not None:
        check_vocabulary(tokenizer.vocab_size, request.vocab_size)
    return tokenizer


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process makes a folder; others wait for it and then find it made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(target.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fresh(
    target: Path,
    request: Request,
    tokenizer: Tokenizer | None,
    train: Sequence[Path],
    held_out: Sequence[Path],
) -> DataIndex | None:
    """The folder's index, if it is what this request would make now."""
    try:
        index = read_index(target)
        load_saved(target, index.tokenizer)
    except DataError:
        return None
    asked = request.tokenizer if tokenizer is None else tokenizer.fingerprint
    had = index.tokenizer.get("bpe") if tokenizer is None else index.tokenizer["fingerprint"]
    wanted = [(str(path), "train") for path in train] + [(str(path), "validation") for path in held_out]
    if asked != had or wanted != [(source.path, source.split) for source in index.sources]:
        return None
    if index.tokenizer["validation"] != _fraction(request):
        return None
    return index if all(_unchanged(source) for source in index.sources) else None


def _unchanged(source: Source) -> bool:
    """By size and time; where only the time differs (a copy, a checkout), by content."""
    path = Path(source.path)
    stat = path.stat()
    if stat.st_size != source.bytes:
        return False
    if stat.st_mtime_ns == source.mtime_ns:
        return True
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == source.sha256


def _fraction(request: Request) -> float:
    return float(request.validation) if isinstance(request.validation, float | int) else 0.0


def _make(
    target: Path,
    request: Request,
    tokenizer: Tokenizer | None,
    train: Sequence[Path],
    held_out: Sequence[Path],
    progress: Progress | None,
    num_processes: int | None,
) -> DataIndex:
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(exist_ok=True)
    if tokenizer is None:
        tokenizer = _trained(int(request.tokenizer), train, partial)
    works = _works(train, held_out, tokenizer, _fraction(request))
    sources = _tokenize(works, tokenizer, partial, progress, num_processes)
    num_tokens = sum(source.num_tokens["train"] for source in sources)
    if not num_tokens:
        raise DataError(
            f"data.train holds no text to train on: {_few(train)} gave {sum(s.num_documents for s in sources)} documents"
            + ("; data.validation: 0 holds nothing out of so little" if any(s.num_documents for s in sources) else "")
        )
    whole = partial / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    tokenizer.save(whole)
    description = {**tokenizer.describe(), "validation": _fraction(request)}
    if not isinstance(request.tokenizer, str):
        description["bpe"] = request.tokenizer
    index = DataIndex(
        directory=whole,
        dtype="uint16" if works[0].dtype == "uint16" else "uint32",
        tokenizer=description,
        sources=sources,
        files=shard.merge(works, sources, partial, whole),
        fingerprint=_fingerprint(works, sources),
        unigram_entropy=0.0,
    )
    tokens = (index.tokens(name) for name, _ in index.files["train"])
    index = replace(index, unigram_entropy=unigram_entropy(tokens, num_tokens, tokenizer.vocab_size))
    _publish(partial, whole, target, index)
    return read_index(target)


def _trained(size: int, train: Sequence[Path], partial: Path) -> Tokenizer:
    """The BPE of these files; one that an earlier attempt trained on the same files serves."""
    key = {"bpe": size, "files": [[str(path), *_stat(path)] for path in train]}
    note = partial / "trained.json"
    try:
        left = json.loads(note.read_text(encoding="utf-8"))
        if left["key"] == key:
            return load_saved(partial, left["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    tokenizer = train_bpe(corpus.documents(train, max_bytes=BPE_TRAINING_BYTES), size)
    tokenizer.save(partial)
    shard.write_json(note, {"key": key, "tokenizer": tokenizer.describe()})
    return tokenizer


def _stat(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return stat.st_size, stat.st_mtime_ns


def _works(
    train: Sequence[Path], held_out: Sequence[Path], tokenizer: Tokenizer, fraction: float
) -> tuple[shard.Work, ...]:
    """What is to be done for each file. The split depends on names, sizes and order, never on where the files lie."""
    stats = {path: _stat(path) for path in (*train, *held_out)}
    # About eight pieces held out, of 512 to 16384 tokens; a power of two, so that a file more or less changes nothing.
    total = sum(stats[path][0] for path in train)
    piece = 1 << min(14, max(9, int(total * fraction / 8).bit_length() - 1))
    works = []
    for split, paths in (("train", train), ("validation", held_out)):
        for number, path in enumerate(paths):
            size, mtime_ns = stats[path]
            digest = hashlib.sha256(f"{path.name}/{size}/{number}".encode()).digest()
            works.append(
                shard.Work(
                    path=str(path),
                    split=_split(split),
                    bytes=size,
                    mtime_ns=mtime_ns,
                    fraction=fraction,
                    # The first file's first piece is held out: a small corpus has a validation split too.
                    phase=1 - fraction / 2 if number == 0 else int.from_bytes(digest[:6], "little") / 2**48,
                    piece_tokens=piece,
                    dtype="uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
                    tokenizer=tokenizer.fingerprint,
                )
            )
    return tuple(works)


def _split(name: str) -> Split:
    return "train" if name == "train" else "validation"


def _tokenize(
    works: Sequence[shard.Work],
    tokenizer: Tokenizer,
    partial: Path,
    progress: Progress | None,
    num_processes: int | None,
) -> tuple[Source, ...]:
    total = sum(work.bytes for work in works)
    if num_processes is None:
        num_processes = 1 if total < _PARALLEL_BYTES else min(len(works), len(os.sched_getaffinity(0)))
    done = 0

    def tell(of_file: int) -> None:
        if progress is not None:
            progress(min(done + of_file, total), total)

    if num_processes <= 1:
        sources = []
        for work in works:
            sources.append(shard.make(work, tokenizer, partial, tell))
            done += work.bytes
            tell(0)
        return tuple(sources)
    tokenizer.save(partial)
    results: dict[int, Source] = {}
    # spawn: a fork of a process with threads (torch, Ray, tokenizers) may hang.
    with ProcessPoolExecutor(
        num_processes, get_context("spawn"), _start_worker, (tokenizer.describe(), str(partial), num_processes)
    ) as pool:
        futures = {pool.submit(_make_shard, work): number for number, work in enumerate(works)}
        try:
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                done += works[futures[future]].bytes
                tell(0)
        except BrokenProcessPool:
            raise DataError(
                "a process that tokenizes was killed, for lack of memory perhaps: run prepare again; it goes on "
                "from the files that are finished"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return tuple(results[number] for number in range(len(works)))


_WORKER: dict[str, Any] = {}
"""Of a process in the pool: its tokenizer and its folder."""


def _start_worker(description: dict[str, Any], partial: str, num_processes: int) -> None:
    threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read by `tokenizers` when it first encodes
    _WORKER["directory"] = Path(partial)
    _WORKER["tokenizer"] = load_saved(Path(partial), description)


def _make_shard(work: shard.Work) -> Source:
    return shard.make(work, _WORKER["tokenizer"], _WORKER["directory"])


def _fingerprint(works: Sequence[shard.Work], sources: Sequence[Source]) -> str:
    """Of all that decides the token stream; not of paths and times."""
    parts = []
    for work, source in zip(works, sources, strict=True):
        parts.append([source.sha256, work.split, work.fraction, work.phase, work.piece_tokens, work.tokenizer])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _publish(partial: Path, whole: Path, target: Path, index: DataIndex) -> None:
    """Index last, then the rename, then nothing is left to go on with."""
    shard.write_json(whole / INDEX, index.to_mapping())
    aside = target.with_name(target.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        os.replace(target, aside)
    publish(whole, target)
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)


def _few(paths: Sequence[Path]) -> str:
    shown = ", ".join(str(path) for path in paths[:3])
    return shown + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
