"""The text of a job -> plain values that remember where they stood.

YAML events of PyYAML's safe loader are put together here, not by its constructor: scalars follow YAML 1.2 (1e-5 is a number;
yes, 017 and 1:30 are text), every node keeps its mark, no tag makes an object, and what aliases expand to is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orchestrator.spec.errors import Fault, Keys, SpecError, Spot, nearest

MAX_BYTES = 256 * 1024
MAX_NODES = 10_000
"""After aliases are expanded."""
MAX_DEPTH = 32

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(["", "~", "null", "Null", "NULL"], None),
    **dict.fromkeys(["true", "True", "TRUE"], True),
    **dict.fromkeys(["false", "False", "FALSE"], False),
    **dict.fromkeys([".inf", ".Inf", ".INF", "+.inf"], float("inf")),
    "-.inf": float("-inf"),
    **dict.fromkeys([".nan", ".NaN", ".NAN"], float("nan")),
}


@dataclass(kw_only=True, slots=True)
class Document:
    """A mapping, where its keys and values stand, and the faults that did not stop the reading."""

    value: dict[str, Any]
    key_spots: dict[Keys, Spot] = field(default_factory=dict)
    value_spots: dict[Keys, Spot] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def spot(self, fault: Fault) -> Spot:
        """Where a fault stands: its own mark, or that of its key or value, or that of the nearest thing around it."""
        if fault.line is not None and fault.column is not None:
            return fault.line, fault.column
        spots, path = self.key_spots if fault.of_key else self.value_spots, fault.path
        while path and path not in spots:
            path = path[:-1]
        return spots.get(path, (1, 1))


class _Stop(Exception):
    """A fault after which nothing can be read."""

    def __init__(self, message: str, fix: str, spot: Spot = (1, 1)) -> None:
        self.fault = Fault(message=message, fix=fix, line=spot[0], column=spot[1])


def read_document(path: Path) -> Document:
    """The YAML mapping in a file; SpecError says what is wrong with the file as such."""
    try:
        return parse_document(_text_of(path))
    except _Stop as stop:
        raise _refused(stop.fault, str(path), whole_file=not path.is_file()) from None


def document_of(data: bytes, name: str) -> Document:
    """The YAML mapping in bytes that came under a name; SpecError says what is wrong with them as such."""
    try:
        return parse_document(_decoded(data))
    except _Stop as stop:
        raise _refused(stop.fault, name) from None


def _refused(fault: Fault, name: str, *, whole_file: bool = False) -> SpecError:
    line, column = (None, None) if whole_file else (fault.line, fault.column)
    return SpecError([{"file": name, "line": line, "column": column, "message": fault.message, "fix": fault.fix}])


def _text_of(path: Path) -> str:
    try:
        if path.is_dir():
            names = sorted(p.name for p in path.iterdir() if p.suffix in (".yaml", ".yml"))[:3]
            example = f", as in {path / names[0]}" if names else ""
            raise _Stop("this is a folder, not a job", f"name a YAML file in it{example}")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _Stop("there is no such job", _known_files(path)) from None
    except OSError as error:
        raise _Stop(f"it cannot be read: {error.strerror}", "check the path and its permissions") from None
    return _decoded(data)


def _decoded(data: bytes) -> str:
    if len(data) > MAX_BYTES:
        raise _Stop(
            f"the file is larger than {MAX_BYTES // 1024} KiB, so it is not a job",
            "name the job's YAML file, not the data that it points to",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        spot = (before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1)
        raise _Stop(
            f"byte 0x{data[error.start]:02x} is not UTF-8 text", "save the file as UTF-8 (iconv -t utf-8)", spot
        ) from None
    return text


def _known_files(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        return f"there is no folder {path.parent} either; check the path"
    guess = nearest(path.name, names)
    return f"did you mean {path.parent / guess}?" if guess else "check the path"


def parse_document(text: str) -> Document:
    """Text -> Document. Raises _Stop where it is not YAML, is empty, or is no mapping."""
    odd = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if odd:
        before = text[: odd.start()]
        spot = (before.count("\n") + 1, odd.start() - (before.rfind("\n") + 1) + 1)
        raise _Stop(f"character {odd.group()!r} is not text", "delete it, or save the file as plain UTF-8 text", spot)
    reader = _Reader()
    try:
        return reader.document(iter(yaml.parse(text, Loader=_LOADER)))
    except yaml.MarkedYAMLError as error:
        raise _syntax(error, text) from None


def _syntax(error: yaml.MarkedYAMLError, text: str) -> _Stop:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line, mark.column) if mark else (0, 0)
    lines = text.split("\n")
    for number in (line, line - 1):
        content = lines[number] if 0 <= number < len(lines) else ""
        indent = content[: len(content) - len(content.lstrip())]
        if "\t" in indent:
            return _Stop(
                "a tab indents this line; YAML takes only spaces", "replace each tab by two spaces",
                (number + 1, indent.index("\t") + 1),
            )  # fmt: skip
    problem = " ".join(part for part in (error.context, error.problem) if part)
    fix = "check the indentation and the brackets of this line and the one above"
    if "undefined alias" in problem:
        fix = "define it before with &, or put the value in quotes if the * belongs to it"
    elif "mapping values are not allowed" in problem:
        fix = "put a value that holds ': ' in quotes, or give the key its own line"
    elif "found character" in problem:
        fix = "put the value in quotes"
    return _Stop(f"this is not YAML: {problem}", fix, (line + 1, column + 1))


class _Reader:
    """Puts events together; counts what the aliases expand to."""

    def __init__(self) -> None:
        self.anchors: dict[str, tuple[Any, int] | None] = {}
        self.size = 0
        self.read = Document(value={})

    def document(self, events: Iterator[Any]) -> Document:
        self.events = events
        for event in events:
            if isinstance(event, (yaml.StreamStartEvent, yaml.DocumentStartEvent, yaml.DocumentEndEvent)):
                continue
            if isinstance(event, yaml.StreamEndEvent):
                break
            if self.size:
                raise _Stop(
                    "a second document starts here; a file holds one job",
                    "split the file at `---`",
                    _spot(event),
                )
            value, _ = self.node(event, ())
            if value is None:
                break
            if not isinstance(value, dict):
                raise _Stop(
                    f"a job is a mapping of keys to values, not {_kind(value)}",
                    "write `key: value` lines; see examples/opt-125m.yaml", _spot(event),
                )  # fmt: skip
            self.read.value = value
        if not self.read.value:
            raise _Stop("the file is empty", "write a job into it; see examples/opt-125m.yaml")
        return self.read

    def node(self, event: Any, path: Keys) -> tuple[Any, int]:
        """The value that starts with this event, and how many nodes it is, aliases expanded."""
        if isinstance(event, yaml.AliasEvent):
            value, size = self.alias(event)
            self.grow(size, event)
            return value, size
        if event.anchor:
            self.anchors[event.anchor] = None
        if event.tag not in (None, "!", "tag:yaml.org,2002:str"):
            raise _Stop(
                f"the tag {event.tag.replace('tag:yaml.org,2002:', '!!')} makes an object; a job holds plain values",
                "delete the tag",
                _spot(event),
            )
        if len(path) >= MAX_DEPTH:
            raise _Stop(f"this is nested deeper than {MAX_DEPTH} levels", "a job needs 4: flatten it", _spot(event))
        self.grow(1, event)
        before = self.size - 1
        if isinstance(event, yaml.ScalarEvent):
            value = self.scalar(event)
        else:
            value = self.sequence(path) if isinstance(event, yaml.SequenceStartEvent) else self.mapping(path)
        size = self.size - before
        if event.anchor:
            self.anchors[event.anchor] = (value, size)
        return value, size

    def grow(self, size: int, event: Any) -> None:
        self.size += size
        if self.size > MAX_NODES:
            raise _Stop(
                f"anchors and aliases expand to more than {MAX_NODES} values", "write the values out", _spot(event)
            )

    def alias(self, event: Any) -> tuple[Any, int]:
        if event.anchor not in self.anchors:
            raise _Stop(
                f"the alias *{event.anchor} has no anchor before it",
                f"define &{event.anchor} first, or put the value in quotes if the * belongs to it", _spot(event),
            )  # fmt: skip
        known = self.anchors[event.anchor]
        if known is None:
            raise _Stop(f"the anchor &{event.anchor} holds itself", "write the values out", _spot(event))
        return known

    def scalar(self, event: Any) -> Any:
        text = event.value
        if not event.implicit[0]:  # quoted, or tagged as text
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text):
            return int(text) if len(text) <= 400 else float(text)
        return float(text) if _FLOAT.fullmatch(text) else text

    def sequence(self, path: Keys) -> list[Any]:
        values: list[Any] = []
        for event in self.events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            here = (*path, len(values))
            self.read.value_spots[here] = _spot(event)
            values.append(self.node(event, here)[0])
        return values

    def mapping(self, path: Keys) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for event in self.events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            if not isinstance(event, yaml.ScalarEvent):
                raise _Stop("a key is a plain word", "write `key: value`", _spot(event))
            key: str = event.value
            here = (*path, key)
            twice = key in values
            if twice:
                line, column = _spot(event)
                first = self.read.key_spots[here][0]
                self.read.faults.append(
                    Fault(
                        path=here, line=line, column=column,
                        message=f"`{key}` was already given in line {first}; one of the two would be lost",
                        fix=f"delete line {first} or line {line}",
                    )
                )  # fmt: skip
                here = (*path, f"{key} again")
            else:
                self.read.key_spots[here] = _spot(event)
            self.grow(1, event)
            start = next(self.events)
            # keys and values stand where their name stands
            where = event if isinstance(start, yaml.MappingStartEvent) else start
            self.read.value_spots.setdefault(here, _spot(where))
            value, _ = self.node(start, here)
            if not twice:
                values[key] = value
        return values


def _spot(event: Any) -> Spot:
    return event.start_mark.line + 1, event.start_mark.column + 1


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the single value {value!r:.60}"


class _Dumper(yaml.SafeDumper):
    """Writes for readers of YAML 1.1 and 1.2 alike: text that either takes for a number is quoted."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"(?:{_FLOAT.pattern})$"), None)


def write_yaml(mapping: dict[str, Any]) -> str:
    """Text that parse_document reads back as the same values."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
