"""Files of records -> examples: every record that is none is told by file and line and counted, none is dropped silently.

A .jsonl holds a record a line, a .json a list of records (or a record a line, as BELLE's), a .parquet a record a row.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.training.data import DataError
from orchestrator.training.examples import PARSERS, BadRecord, Conversation, Example, Messages, Preference

SUFFIXES = (".json", ".jsonl", ".parquet")
Policy = Literal["stop", "skip"]
SHOWN = 5
"""Faults that a message names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A record that gives no example."""

    where: str
    """FILE:LINE, of a .parquet FILE:ROW, counted from 1."""
    kind: str
    """Kind under which it is counted: `not JSON`, `not UTF-8`, `wrong fields`, `empty answer`, `empty prompt`, `turns`, `too
    long`, ..."""
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """An example, and where its record stands."""

    example: Example
    where: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """The examples of some files, each once, and what was left out."""

    places: tuple[Place, ...]
    num_records: int
    faults: tuple[Fault, ...]
    duplicates: tuple[tuple[str, str], ...]
    """(where, where the same example stood before)."""

    def report(self) -> str:
        """Return what was read and what was left out, in a few lines."""
        lines = [f"{len(self.places):,} examples of {self.num_records:,} records"]
        if self.duplicates:
            where, before = self.duplicates[0]
            lines.append(f"{len(self.duplicates):,} left out as duplicates: {where} is {before} again, ...")
        if self.faults:
            lines.append(told(self.faults))
        return "\n".join(lines)


def collect(paths: Sequence[Path], task: str, *, on_bad: Policy = "stop") -> Collected:
    """Reads the examples that a task learns from, in the order of the files and of their records.

    Raises DataError where a file cannot be read, where none of its records is an example, and, under `stop`, where one is not:
    with the number of bad records by kind, and the first of them by file and line."""
    places: list[Place] = []
    faults: list[Fault] = []
    duplicates: list[tuple[str, str]] = []
    first: dict[bytes, str] = {}
    num_records = 0
    for path in paths:
        for where, record in records(path):
            num_records += 1
            try:
                if isinstance(record, BadRecord):
                    raise record
                examples = PARSERS[task](record)
                _encodable(record)
            except BadRecord as bad:
                faults.append(Fault(where=where, kind=bad.kind, reason=str(bad)))
                continue
            except RecursionError:
                faults.append(Fault(where=where, kind="wrong fields", reason="is nested too deeply"))
                continue
            for example in examples:
                digest = _digest(example)
                if digest in first:
                    duplicates.append((where, first[digest]))
                else:
                    first[digest] = where
                    places.append(Place(example=example, where=where))
    collected = Collected(
        places=tuple(places), num_records=num_records, faults=tuple(faults), duplicates=tuple(duplicates)
    )
    judge(faults, on_bad, num_left=len(places), num_records=num_records)
    return collected


def judge(faults: Sequence[Fault], on_bad: Policy, *, num_left: int, num_records: int) -> None:
    """Raises DataError where the policy says so, or nothing is left. Under `skip` the caller tells what was left out."""
    if faults and on_bad == "stop":
        raise DataError(f"{told(faults)}\nmend them, or leave them out by the policy skip")
    if not num_left:
        raise DataError(f"no example in {num_records:,} records" + (f": {told(faults)}" if faults else ""))


def told(faults: Sequence[Fault]) -> str:
    """How many records are bad, by kind, and the first of them."""
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in Counter(fault.kind for fault in faults).most_common())
    lines = [f"{len(faults):,} bad record{'s' if len(faults) > 1 else ''} ({kinds})"]
    lines += [f"  {fault.where}: {fault.reason}" for fault in faults[:SHOWN]]
    lines += [f"  and {len(faults) - SHOWN:,} more"] if len(faults) > SHOWN else []
    return "\n".join(lines)


def split(places: Sequence[Place], fraction: float, *, seed: int = 0) -> tuple[list[Place], list[Place]]:
    """(train, held out): a prompt's side is a function of the prompt and the seed alone, so that an example more or less moves no
    other, and no prompt is on both sides."""
    sides: tuple[list[Place], list[Place]] = ([], [])
    for place in places:
        text = json.dumps([seed, *_plain(place.example.prompt)])
        draw = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little") / 2**64
        sides[draw < fraction].append(place)
    return sides


def _plain(messages: Messages) -> list[tuple[str, str, str]]:
    return [(message.role, message.content, message.context) for message in messages]


def _digest(example: Example) -> bytes:
    """Return a digest of what the example says; two with the same one are the same, whatever form they came in."""
    match example:
        case Conversation(messages=messages):
            value: Any = _plain(messages)
        case Preference(prompt=prompt, chosen=chosen, rejected=rejected):
            value = [_plain(prompt), chosen, rejected]
        case _:
            value = _plain(example.prompt)
    return hashlib.sha256(json.dumps(value).encode("utf-8")).digest()


# Records -------------------------------------------------------------------------------------------------------------


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of a file; a record that cannot be parsed is a BadRecord in its place. DataError where what follows a
    fault cannot be told from it."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} ends in {path.suffix or 'nothing'}; known are {', '.join(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            yield from _rows(path)
        elif suffix == ".json" and _is_list(path):
            yield from _items(path)
        else:
            yield from _lines(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _is_list(path: Path) -> bool:
    with open(path, "rb") as file:
        while chunk := file.read(4096).removeprefix(b"\xef\xbb\xbf"):
            if chunk := chunk.lstrip():
                return chunk.startswith(b"[")
    return False


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            yield f"{path}:{number}", _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.rstrip().decode("utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(line[error.start])
    except json.JSONDecodeError as error:
        return BadRecord("not JSON", f"is not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return BadRecord("not JSON", "is nested too deeply")


def _not_utf8(byte: int) -> BadRecord:
    return BadRecord(
        "not UTF-8", f"is not UTF-8, by its byte 0x{byte:02x}: convert the file, iconv -f ENCODING -t UTF-8"
    )


def _items(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of one list. Bytes that are not UTF-8 are carried as lone surrogates to the record that holds them."""
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")
    decoder = json.JSONDecoder()
    at, line, counted = _after_space(text, 0) + 1, 1, 0
    while text[(at := _after_space(text, at)) : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            record, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            place = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise DataError(
                f"{path}:{place} is not JSON: {why}. In a list nothing after that can be read: mend it, or write one record a "
                "line into a .jsonl, where a bad one ends with its line"
            ) from None
        yield f"{path}:{line}", record
        at = _after_space(text, at)
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            raise DataError(
                f"{path}:{1 + text.count(chr(10), 0, at)} is not JSON: , or ] is expected after a record of the list"
            )
    if text[at + 1 :].strip():
        raise DataError(f"{path}:{1 + text.count(chr(10), 0, at)} is not JSON: something follows the end of the list")


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path}:{row}", record
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as parquet after row {row}: {str(error).splitlines()[0]}") from None


def _encodable(value: Any) -> None:
    r"""BadRecord where a text holds half a character: bytes that were not UTF-8, or JSON's "\ud800"."""
    match value:
        case str():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                code = ord(value[error.start])
                if 0xDC80 <= code <= 0xDCFF:
                    raise _not_utf8(code - 0xDC00) from None
                raise BadRecord("not UTF-8", "holds half a surrogate pair, which is no character") from None
        case dict():
            for key, inner in value.items():
                _encodable(key)
                _encodable(inner)
        case list():
            for inner in value:
                _encodable(inner)
