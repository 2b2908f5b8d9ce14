"""Pickles read without the machine in them, for the two kinds that a checkpoint holds: torch's index, and a tensor.

A pickle is a program: it calls what it names. The interpreter here knows the few instructions and names that such a file
needs, and answers each name with a plain value of ours; every other pickle raises."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch


class Record:
    """Stands for an instance of one of torch's classes: a kind and fields, no behaviour. Equal to itself alone."""

    kind = ""

    def __init__(self, *_: Any) -> None:
        """Take and ignore what a class would be called with."""


class Properties(Record):
    state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state if type(state) is tuple else ()


@dataclass(frozen=True, slots=True)
class SavedTensor:
    storage: Any
    offset: Any
    size: Any
    stride: Any


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = None, *_: Any) -> SavedTensor:
    return SavedTensor(storage, offset, size, stride)


def _tuple(value: Any = ()) -> tuple[Any, ...]:
    """torch.Size."""
    if type(value) is not tuple and type(value) is not list:
        raise pickle.UnpicklingError("a size that is no tuple")
    return tuple(value)


def _nothing(*_: Any) -> None:
    """Stand in for what a checkpoint names and nobody needs: a path, a layout, a memory format."""


def _itself(value: torch.dtype) -> torch.dtype:
    return value


Names = Mapping[tuple[str, str], Callable[[], Any]]
"""(module, name) -> makes what stands for it in one reading: what a stranger's pickle does to it is gone with it."""


def _record(kind: str, base: type[Record] = Record) -> Callable[[], type[Record]]:
    return lambda: type(kind, (base,), {"kind": kind})


_DCP = "torch.distributed.checkpoint.metadata"
METADATA_NAMES: Names = {
    **{
        (_DCP, kind): _record(kind)
        for kind in (
            *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            "StorageMeta",
        )
    },
    (_DCP, "TensorProperties"): _record("TensorProperties", Properties),
    (_DCP, "_MEM_FORMAT_ENCODING"): lambda: _nothing,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _record("_StorageInfo"),
    ("torch", "Size"): lambda: _tuple,
    ("torch.serialization", "_get_layout"): lambda: _nothing,
    ("pathlib", "PosixPath"): lambda: _nothing,
    ("pathlib", "Path"): lambda: _nothing,
    ("pathlib._local", "PosixPath"): lambda: _nothing,
}
"""Names that FileSystemWriter.finish writes (torch 2.11 to 2.13)."""
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
PIECE_NAMES: Names = {
    ("torch._utils", "_rebuild_tensor_v2"): lambda: _tensor,
    ("collections", "OrderedDict"): lambda: _nothing,
    **{("torch", name): partial(_itself, dtype) for name, dtype in STORAGES.items()},
}
"""Names that torch.save writes of a tensor."""

_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT),
    *(pickle.BINGET, pickle.LONG_BINGET, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1),
    *(pickle.BININT2, pickle.LONG1, pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND),
    *(pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.GLOBAL, pickle.STACK_GLOBAL),
    *(pickle.NEWOBJ, pickle.REDUCE, pickle.BUILD, pickle.BINPERSID),
)


_Interpreter: Any = pickle._Unpickler


class _Unpickler(_Interpreter):  # type: ignore[misc]
    """The interpreter of pickles that is written in Python: its memo is a dict (in C it is an array whose length a file
    may choose), and its instructions are a table, here one of those alone that our files need."""

    dispatch: ClassVar[dict[int, Any]] = {code[0]: _Interpreter.dispatch[code[0]] for code in _OPCODES}

    def __init__(self, data: bytes, names: Names) -> None:
        super().__init__(io.BytesIO(data))
        self.names = names
        self.made: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if type(module) is str and type(name) is str:
            if (module, name) in self.names:
                return self.made.setdefault((module, name), self.names[module, name]())
            if module == "torch" and isinstance(dtype := torch.__dict__.get(name), torch.dtype):
                return dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint of ours contains")

    def persistent_load(self, pid: Any) -> Any:
        """The storage that a piece names: what it says of it."""
        if type(pid) is not tuple or len(pid) != 5:
            raise pickle.UnpicklingError("a storage that is not described")
        return pid

    def load_build(self) -> None:
        """Sets the fields of an instance of ours, and of nothing else."""
        state = self.stack.pop()
        instance = self.stack[-1]
        if isinstance(instance, Properties):
            instance.__setstate__(state)
        elif isinstance(instance, Record) and type(state) is dict and all(type(key) is str for key in state):
            instance.__dict__.update(state)
        else:
            raise pickle.UnpicklingError("fields for something that has none")

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set(self, items: list[Any]) -> None:
        """A key may be a text or a record: the hash of nested tuples may take for ever."""
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise pickle.UnpicklingError("keys for something that has none")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str and not isinstance(key, Record):
                raise pickle.UnpicklingError("a key that is no text")
            target[key] = value

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def unpickle(data: bytes, names: Names) -> Any:
    """Return what a pickle describes, made of plain values and of what `names` makes. Raises any exception on any other
    pickle."""
    return _Unpickler(data, names).load()
