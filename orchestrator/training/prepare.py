"""Text files -> a folder of tokens that every worker maps into memory.

    REQUEST.partial/       while it is made; an attempt that was cut short goes on in it, file by file
      HASH-train.bin       tokens of one input file
      whole/               what becomes the folder when its index is written
    REQUEST-FINGERPRINT/   never changed: a run that began with it goes on with it, whatever becomes of the files
      index.json           tokenizer, splits, and every input file with its checksum
      train-00000.bin      tokens of many input files, one after the other
      tokenizer.json       unless the tokens are bytes

A folder is used again while its inputs, tokenizer and splits are what they were. Else another is made beside it.
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
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusters.files import publish
from orchestrator.training import corpus, shard
from orchestrator.training.data import INDEX, DataError, DataIndex, Source, Split, read_index, unigram_entropy
from orchestrator.training.inputs import Request, few, files_of, given_tokenizer, is_unchanged, request_of, versions
from orchestrator.training.tokenizer import Tokenizer, load_saved, train_bpe

if TYPE_CHECKING:
    from orchestrator.spec.job import Job

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

BPE_TRAINING_BYTES = 10**8
"""Text that a BPE is trained on at most: its merges settle long before, and memory grows with every distinct word."""
_PARALLEL_BYTES = 1 << 25
"""Below, processes cost more than they bring."""


def prepare_job(job: Job, *, progress: Progress | None = None, cache: Path | None = None) -> DataIndex:
    """The job's tokens, made now unless they are there already, in a cache, by default the user's."""
    return prepare(request_of(job, cache), progress=progress)


def prepare(
    request: Request,
    *,
    directory: Path | None = None,
    progress: Progress | None = None,
    num_processes: int | None = None,
) -> DataIndex:
    """Tokenizes what is new; whole or not at all, and what was finished of an attempt cut short is used.

    Args:
        directory: what the folder's name begins with; the fingerprint of its tokens follows.

    Raises DataError: text or tokenizer that cannot be used, or a disk that is full."""
    stem = request.directory if directory is None else directory
    tokenizer = given_tokenizer(request)
    train, held_out = files_of(request)
    try:
        with _alone(stem):
            index = _fresh(stem, request, tokenizer, train, held_out)
            if index is None:
                index = _make(stem, request, tokenizer, train, held_out, progress, num_processes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"the disk of {stem} is full: free space, or set XDG_CACHE_HOME to a larger disk; "
                "finished files are kept, and prepare goes on from there"
            ) from None
        raise DataError(f"{error.filename or stem} cannot be written: {error.strerror or error}") from None
    return index


@contextmanager
def _alone(stem: Path) -> Iterator[None]:
    """One process makes a folder; others wait for it and then find it made."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with open(stem.with_name(stem.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fresh(
    stem: Path,
    request: Request,
    tokenizer: Tokenizer | None,
    train: Sequence[Path],
    held_out: Sequence[Path],
) -> DataIndex | None:
    """The index of the folder that this request would make now, if it is there."""
    asked = request.tokenizer if tokenizer is None else tokenizer.fingerprint
    wanted = [(str(path), "train") for path in train] + [(str(path), "validation") for path in held_out]
    for folder in versions(stem):
        try:
            index = read_index(folder)
            load_saved(folder, index.tokenizer)
        except DataError:
            continue
        had = index.tokenizer.get("bpe") if tokenizer is None else index.tokenizer["fingerprint"]
        if asked != had or wanted != [(source.path, source.split) for source in index.sources]:
            continue
        if index.tokenizer["validation"] == request.fraction and all(map(is_unchanged, index.sources)):
            return index
    return None


def _make(
    stem: Path,
    request: Request,
    tokenizer: Tokenizer | None,
    train: Sequence[Path],
    held_out: Sequence[Path],
    progress: Progress | None,
    num_processes: int | None,
) -> DataIndex:
    partial = stem.with_name(stem.name + ".partial")
    partial.mkdir(exist_ok=True)
    if request.task != "pretrain":
        return _make_rows(stem, partial, request, tokenizer, train, held_out)
    if tokenizer is None:
        tokenizer = _trained(int(request.tokenizer), train, partial)
    works = _works(train, held_out, tokenizer, request.fraction)
    sources = _tokenize(works, tokenizer, partial, progress, num_processes)
    num_tokens = sum(source.num_tokens["train"] for source in sources)
    if not num_tokens:
        raise DataError(
            f"data.train holds no text to train on: {few(train)} gave {sum(s.num_documents for s in sources)} documents"
            + ("; data.validation: 0 holds nothing out of so little" if any(s.num_documents for s in sources) else "")
        )
    whole = partial / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    tokenizer.save(whole)
    description = {**tokenizer.describe(), "validation": request.fraction}
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
    target = stem.with_name(f"{stem.name}-{index.fingerprint[:16]}")
    _publish(partial, whole, target, index)
    return read_index(target)


def _make_rows(
    stem: Path,
    partial: Path,
    request: Request,
    tokenizer: Tokenizer | None,
    train: Sequence[Path],
    held_out: Sequence[Path],
) -> DataIndex:
    """The packed rows of a task that learns from records."""
    from orchestrator.training import rows

    bpe = None if tokenizer is not None else int(request.tokenizer)
    if tokenizer is None:
        tokenizer = train_bpe(rows.texts(request, train), int(request.tokenizer))
    whole = partial / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    tokenizer.save(whole)
    index = rows.make(request, tokenizer, train, held_out, whole)
    if bpe is not None:
        index = replace(index, tokenizer={**index.tokenizer, "bpe": bpe})
    target = stem.with_name(f"{stem.name}-{index.fingerprint[:16]}")
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
    """Return what is to be done for each file. The split depends on names, sizes and order, never on where the files lie."""
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
"""State of a process in the pool: its tokenizer and its folder."""


def _start_worker(description: dict[str, Any], partial: str, num_processes: int) -> None:
    threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read by `tokenizers` when it first encodes
    _WORKER["directory"] = Path(partial)
    _WORKER["tokenizer"] = load_saved(Path(partial), description)


def _make_shard(work: shard.Work) -> Source:
    return shard.make(work, _WORKER["tokenizer"], _WORKER["directory"])


def _fingerprint(works: Sequence[shard.Work], sources: Sequence[Source]) -> str:
    """Return a fingerprint of all that decides the token stream; not of paths and times."""
    parts = []
    for work, source in zip(works, sources, strict=True):
        parts.append([source.sha256, work.split, work.fraction, work.phase, work.piece_tokens, work.tokenizer])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _publish(partial: Path, whole: Path, target: Path, index: DataIndex) -> None:
    """Index last, then the rename, then nothing is left to go on with. What bears the name has the same tokens or is damaged."""
    shard.write_json(whole / INDEX, index.to_mapping())
    aside = target.with_name(target.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        os.replace(target, aside)
    publish(whole, target)
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)
