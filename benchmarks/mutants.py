"""The mutants of `benchmarks.mutations`: what someone may have done to a checkpoint or to a tokenizer's folder."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from orchestrator.training.manifest import MANIFEST, fingerprint, sha256

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**63, 10**400, 0.5, float("inf"), "", "x", "../../etc/passwd", "\x00", [], {}, [[]]),
    *({"bytes": -1}, "a" * 100_000, "/dev/zero", {"path": "/"}, [1] * 1000),
)


def vouched(path: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Makes the manifest fit the files as they are now; then a change to it, and the checksum over both."""
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["checksum"]
    for name, entry in manifest["files"].items():
        if (path / name).is_file() and not (path / name).is_symlink():
            entry |= {"bytes": (path / name).stat().st_size, "sha256": sha256(path / name)}
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest | {"checksum": fingerprint(manifest)}))


class Trap:
    """Makes a file where it is unpickled by a reader that trusts it."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.sprung),))


def altered_bytes(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data) or 1)
    length = rng.choice((1, 4, 64, len(data)))
    match rng.randrange(5):
        case 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        case 1:
            del data[at : at + length]
        case 2:
            data[at:at] = rng.randbytes(length % 4096)
        case 3:
            data[at : at + length] = bytes(min(length, len(data) - at))
        case 4:
            for _ in range(20):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(data))


def altered_value(value: Any, rng: random.Random) -> Any:
    """A plain value with one part of it replaced, left out or added."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        match rng.randrange(6):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return value | {rng.choice(["", "extra", "../x", "step"]): rng.choice(VALUES)}
            case _:
                return value | {key: altered_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return [*value[:at], altered_value(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


def altered_manifest(path: Path, rng: random.Random, sprung: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        new = altered_value(dict(manifest), rng)
        manifest.clear()
        manifest.update(new if isinstance(new, dict) else {})

    vouched(path, change)


def altered_index(path: Path, rng: random.Random, sprung: Path) -> None:
    """A sound pickle of torch's classes that says something else."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    name = rng.choice(list(metadata.state_dict_metadata))
    entry, index = metadata.state_dict_metadata[name], next(i for i in metadata.storage_data if i.fqn == name)
    place = metadata.storage_data[index]
    numbers = (-1, 0, 1, 7, 2**31, 2**62, 2**63, None, "1")
    match rng.randrange(9):
        case 0:
            place.offset = rng.choice(numbers)
        case 1:
            place.length = rng.choice(numbers)
        case 2:
            place.relative_path = rng.choice(("../x", "/etc/passwd", "", MANIFEST, None, ".metadata"))
        case 3:
            as_bytes = BytesStorageMetadata()
            as_bytes.size = entry.size  # type: ignore[attr-defined]
            metadata.state_dict_metadata[name] = as_bytes
            metadata.storage_data[MetadataIndex(name)] = place
        case 4:
            entry.chunks[0].sizes = torch.Size([2 ** rng.randrange(1, 62)] * rng.randrange(1, 4))
        case 5:
            entry.chunks.append(entry.chunks[0])
        case 6:
            entry.properties.dtype = rng.choice((torch.float64, torch.complex64, torch.int8, None))
        case 7:
            entry.size = torch.Size([2**40] * len(entry.size))
        case 8:
            place.transform_descriptors = ["zstd"]
    (path / ".metadata").write_bytes(pickle.dumps(metadata, protocol=rng.choice((2, 4, 5))))
    vouched(path)


def bombs(rng: random.Random) -> bytes:
    """Pickles that are short and cost much: a memo of 2**31 slots, a key whose hash never ends, nested lists, long claims."""
    doubled = b"".join(b"2\x86" for _ in range(60))  # DUP, TUPLE2
    return rng.choice(
        (
            b"\x80\x02Nr\xff\xff\xff\x7f.",
            b"\x80\x04}K\x01" + doubled + b"Ns.",
            b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",
            b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"x.",
            b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.",
            b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N.",
            b"I" + b"9" * 100_000 + b"\n.",
            b"\x80\x02\x82\x01.",
            b"\x80\x04\x8c\x05torch\x8c\x04load\x93.",
            b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
            b"\x80\x04\x8c\x05torch\x8c\x04Size\x93}\x8c\x01ax86b.",
            b"(S'/tmp/x'\nios\nsystem\n.",
        )
    )


def trapped_index(path: Path, rng: random.Random, sprung: Path) -> None:
    trap = pickle.dumps(Trap(sprung), protocol=rng.choice((0, 2, 4)))
    whole = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(rng.choice((trap, bombs(rng), trap[:-1] + b"0" + whole)))
    vouched(path)


def trapped_piece(path: Path, rng: random.Random, sprung: Path) -> None:
    """A piece whose archive holds another pickle, other bytes, or much that was packed small."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    place = rng.choice(list(metadata.storage_data.values()))
    data = (path / place.relative_path).read_bytes()
    inner = io.BytesIO(data[place.offset : place.offset + place.length])
    trap = pickle.dumps(Trap(sprung), protocol=2)
    made = io.BytesIO()
    kind = rng.randrange(5)
    with zipfile.ZipFile(inner) as archive, zipfile.ZipFile(made, "w") as new:
        for info in archive.infolist():
            content = archive.read(info)
            packed = zipfile.ZIP_STORED
            if info.filename.endswith("data.pkl") and kind in (0, 1):
                content = trap if kind == 0 else bombs(rng)
            if info.filename.endswith("/data/0") and kind == 2:
                content, packed = bytes(1 << 22), zipfile.ZIP_DEFLATED
            if info.filename.endswith("data.pkl") and kind == 3:
                content, packed = bytes(1 << 22), zipfile.ZIP_DEFLATED
            new.writestr(info.filename, content, packed)
    piece = trap if kind == 4 else made.getvalue()
    place.offset, place.length = len(data), len(piece)
    (path / place.relative_path).write_bytes(data + piece)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    vouched(path)


def altered_file(path: Path, rng: random.Random, sprung: Path) -> None:
    altered_bytes(path / rng.choice((".metadata", ".metadata", "__0_0.distcp", MANIFEST)), rng)
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        vouched(path)


def other_kind_of_file(path: Path, rng: random.Random, sprung: Path) -> None:
    file = path / rng.choice((".metadata", "__0_0.distcp", MANIFEST))
    file.unlink()
    match rng.randrange(4):
        case 0:
            file.mkdir()
        case 1:
            file.symlink_to("/dev/zero")
        case 2:
            os.mkfifo(file)


CHECKPOINT_MUTANTS = (
    altered_manifest,
    altered_manifest,
    altered_index,
    trapped_index,
    trapped_piece,
    altered_file,
    altered_file,
    other_kind_of_file,
)


def mutate_tokenizer(folder: Path, rng: random.Random) -> None:
    file = folder / rng.choice([path.name for path in sorted(folder.iterdir())])
    match rng.randrange(4):
        case 0:
            altered_bytes(file, rng)
        case 1:
            file.write_bytes(rng.choice((b"", b"[" * 100_000, b"{}", b"null", b"\xff\xfe", b"1e999999")))
        case _:
            try:
                value = altered_value(json.loads(file.read_text()), rng)
                file.write_text(json.dumps(value))
            except ValueError:
                altered_bytes(file, rng)
