"""The way from the job's data paths to text: which files there are, and the documents in each."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from orchestrator.training.data import DataError

SUFFIXES = (".txt", ".jsonl", ".parquet")
TEXT_FIELD = "text"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of a document, cut only between lines."""

    text: str
    ends_document: bool
    bytes_done: int
    """Bytes of the file that are read, for a progress bar."""


def expand(
    patterns: Iterable[str], base: Path, *, field: str, suffixes: tuple[str, ...] = SUFFIXES
) -> tuple[Path, ...]:
    """The files behind paths, folders (their .txt, .jsonl and .parquet, at any depth) and globs; each once, in order.

    Args:
        base: folder that relative paths start from.
        field: where the patterns stand in the job, for messages.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = base / Path(pattern).expanduser()
        for file in _matching(pattern, path, field, suffixes):
            found[file.resolve()] = None
    return tuple(found)


def _matching(pattern: str, path: Path, field: str, suffixes: tuple[str, ...]) -> list[Path]:
    known = ", ".join(suffixes)
    try:
        if path.is_dir():
            files = _in_folder(path, suffixes)
            if not files:
                raise DataError(f"{field}: the folder {path} holds no file that ends in {known}")
            return files
        if path.exists():
            if path.suffix.lower() not in suffixes:
                raise DataError(f"{field}: {path} ends in {path.suffix or 'nothing'}; known are {known}")
            return [path]
    except OSError as error:
        raise _unreadable(path, error) from None
    if not glob.has_magic(pattern):
        raise DataError(f"{field}: {path} does not exist (paths are relative to the job file)")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    files = [file for match in matches for file in (_in_folder(match, suffixes) if match.is_dir() else [match])]
    files = [file for file in files if file.suffix.lower() in suffixes]
    if not files:
        raise DataError(f"{field}: {path} matches no file that ends in {known} (paths are relative to the job file)")
    return files


def _in_folder(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename or folder), error)

    names = [Path(root) / name for root, _, names in os.walk(folder, onerror=refuse) for name in names]
    return sorted(name for name in names if name.suffix.lower() in suffixes)


def read(path: Path) -> Iterator[Text]:
    """A file's documents: a .txt is one, a .jsonl one a line, a .parquet one a row. DataError says where it breaks."""
    try:
        match path.suffix.lower():
            case ".txt":
                yield from _txt(path)
            case ".jsonl":
                yield from _jsonl(path)
            case _:
                yield from _parquet(path)
    except OSError as error:
        raise _unreadable(path, error) from None


def documents(paths: Sequence[Path], *, max_bytes: int) -> Iterator[str]:
    """Text of all files for a tokenizer to learn from: the same share of each, max_bytes in all at most."""
    total = sum(path.stat().st_size for path in paths)
    share = min(1.0, max_bytes / max(1, total))
    for path in paths:
        limit = share * path.stat().st_size
        for piece in read(path):
            yield piece.text
            if piece.bytes_done >= limit:
                break


def _txt(path: Path) -> Iterator[Text]:
    with open(path, "rb") as file:
        first = _lines(file).removeprefix(b"\xef\xbb\xbf")
        start = file.tell() - len(first)
        while first:
            following = _lines(file)
            end = start + len(first)
            yield Text(_decoded(first, path, start), not following, end)
            first, start = following, end


def _lines(file: IO[bytes]) -> bytes:
    """The next bytes, up to the end of a line."""
    chunk = file.read(_CHUNK_BYTES)
    return chunk if chunk.endswith(b"\n") else chunk + file.readline()


def _jsonl(path: Path) -> Iterator[Text]:
    done = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            start, done = done, done + len(line)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(_decoded(line, path, start))
            except (json.JSONDecodeError, RecursionError) as error:
                why = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
                raise DataError(f"{where} is not JSON: {why}. A .jsonl file holds one JSON object a line") from None
            if not isinstance(record, dict) or TEXT_FIELD not in record:
                has = f"keys {', '.join(map(str, record)) or '(none)'}" if isinstance(record, dict) else "no object"
                raise DataError(f"{where} has {has}; each line needs a key {TEXT_FIELD!r} with the document's text")
            text = record[TEXT_FIELD]
            if not isinstance(text, str):
                raise DataError(f"{where}: {TEXT_FIELD!r} is {type(text).__name__}, not a string")
            if text:
                yield Text(_encodable(text, where), True, done)


def _parquet(path: Path) -> Iterator[Text]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    total = path.stat().st_size
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if TEXT_FIELD not in columns:
                raise DataError(f"{path} has columns {', '.join(columns)}; it needs one named {TEXT_FIELD!r}")
            kind = file.schema_arrow.field(TEXT_FIELD).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f"{path}: column {TEXT_FIELD!r} holds {kind}, not strings")
            row, num_rows = 0, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(columns=[TEXT_FIELD], batch_size=1024):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text:
                        yield Text(text, True, total * row // num_rows)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None


def _decoded(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {offset + error.start} is 0x{raw[error.start]:02x}. "
            f"Convert it: iconv -f ENCODING -t UTF-8"
        ) from None


def _encodable(text: str, where: str) -> str:
    r"""JSON may spell half a character ("\ud800"), which no tokenizer can take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {TEXT_FIELD!r} holds half a surrogate pair at character {error.start}") from None
    return text


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}")
