"""What pydantic found -> faults in words: the key, its value, the nearest known key, what would follow, and the fix."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic_core import ErrorDetails

from orchestrator.spec.errors import Fault, dotted, nearest
from orchestrator.spec.job import Job, Section

_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
Path = tuple[str | int, ...]


def fault_of(error: ErrorDetails) -> Fault:
    """One finding of pydantic as a fault."""
    path = tuple(part for part in error["loc"] if not str(part).startswith("<"))
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    owner = section_at(path[:-1])
    if kind == "extra_forbidden":
        return _unknown(path, owner)
    if kind == "missing":
        example = show_example(owner, path[-1])
        return Fault(
            path=path,
            message=f"`{dotted(path)}` is missing; without it there is no {'job' if len(path) == 1 else f'`{path[0]}`'}",
            fix=f"add `{path[-1]}: {example}`, with your value",
            of_key=True,
        )
    if value is None:
        example = show_example(owner, path[-1])
        return Fault(
            path=path,
            message=f"`{dotted(path)}` has no value",
            fix=f"write one, as in `{path[-1]}: {example}`"
            if _required(owner, path[-1])
            else f"write one, as in `{path[-1]}: {example}`, or delete the line",
        )
    said = f"`{dotted(path)}` is {show(value)}"
    if kind == "shardwise":
        return Fault(path=path, message=f"{said}: it {context['message']}", fix=context["fix"])
    if kind == "literal_error":
        return _choice(path, said, value, owner)
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return Fault(
            path=path,
            message=f"{said}; it must be {words} {context[key]:g}",
            fix=f"write a value {words} {context[key]:g}, as in `{path[-1]}: {show_example(owner, path[-1])}`",
        )
    if kind == "string_pattern_mismatch":
        return Fault(
            path=path,
            message=f"{said}; it names a folder: 1 to 63 of a-z, 0-9, dot, underscore and hyphen, a letter or digit first",
            fix=f"write `{path[-1]}: {_tame(value)}`",
        )
    if kind in ("too_short", "string_too_short"):
        return Fault(
            path=path,
            message=f"`{dotted(path)}` is empty",
            fix=f"write something, as in `{path[-1]}: {show_example(owner, path[-1])}`",
        )
    if kind == "too_long":
        return Fault(
            path=path, message=f"{said}; that is too long", fix=f"write `{path[-1]}: {show_example(owner, path[-1])}`"
        )
    return _wrong_type(path, said, value, _WANTED.get(kind, "a value of another kind"), owner)


def _wrong_type(path: Path, said: str, value: Any, wanted: str, owner: type[Section] | None) -> Fault:
    section = section_at(path)
    if wanted == "keys and values" and section is not None:
        words = section.bare_words
        wanted = f"{words}, or keys and values" if words else wanted
        some = ", ".join(list(known_keys(section))[:4])
        guess = nearest(value, words.replace(",", " ").split()) if isinstance(value, str) and words else None
        fix = f"did you mean {guess}?" if guess else f"write its keys below it, indented: {some}, ..."
        return Fault(path=path, message=f"{said}, not {wanted}", fix=fix)
    if isinstance(path[-1], int):
        fix = f"write {wanted} there"
    else:
        fix = f"write {wanted}, as in `{path[-1]}: {show_example(owner, path[-1])}`"
    if isinstance(value, str) and wanted in ("a whole number", "a number"):
        fix = _number_fix(value) or fix
    elif isinstance(value, str) and wanted == "true or false" and value.lower() in ("yes", "no", "on", "off"):
        fix = f"write {'true' if value.lower() in ('yes', 'on') else 'false'}"
    elif wanted == "text" and isinstance(value, (int, float)):
        fix = f"put it in quotes: '{value}'" if not isinstance(value, bool) else fix
    return Fault(path=path, message=f"{said}, not {wanted}", fix=fix)


def _number_fix(text: str) -> str | None:
    bare = text.strip().replace("_", "").replace(",", "").replace(" ", "")
    if re.fullmatch(r"[-+]?0\d+", bare):
        return f"a number does not start with 0: write {int(bare)}"
    if re.fullmatch(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?", bare):
        return f"write it without quotes and separators: {bare}"
    scaled = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMbBtT])", bare)
    if scaled:
        return f"write {scaled[1]}e{ {'k': 3, 'm': 6, 'b': 9, 't': 12}[scaled[2].lower()] }"
    return None


def _choice(path: Path, said: str, value: Any, owner: type[Section] | None) -> Fault:
    choices = choices_of(owner, path)
    if choices == [1]:
        what = "version of the format" if path[-1] == "version" else "value"
        return Fault(path=path, message=f"{said}; the only {what} today is 1", fix=f"write `{path[-1]}: 1`")
    words = [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in choices]
    guess = nearest(value, words)
    listed = ", ".join(words)
    fix = f"did you mean {guess}? known: {listed}" if guess else f"write one of {listed}"
    return Fault(path=path, message=f"{said}, which is none of the known words", fix=fix)


def _unknown(path: Path, owner: type[Section] | None) -> Fault:
    key, here = str(path[-1]), dotted(path[:-1])
    known = list(known_keys(owner)) if owner else []
    where = f"in `{here}`" if here else "in a job"
    message = f"unknown key `{key}` {where}; nothing would come of it"
    guess = nearest(key, known)
    homes = [f"`{home}`" if home else "the top level" for home in _homes(key)]
    if key == "<<":
        fix = "YAML 1.2 has no merge keys: write the keys out"
    elif homes and not guess:
        fix = f"`{key}` belongs in {' or '.join(homes)}: move it there"
    else:
        fix = (f"did you mean `{guess}`? " if guess else "delete it; ") + f"known here: {', '.join(known)}"
    return Fault(path=path, message=message, fix=fix, of_key=True)


def _homes(key: str) -> list[str]:
    return [dotted(path) for path, section in sections() if key in known_keys(section)]


def sections(section: type[Section] = Job, path: Path = ()) -> Iterator[tuple[Path, type[Section]]]:
    """Every section of a job and the keys that lead to it."""
    yield path, section
    for key, field in known_keys(section).items():
        inner = _section_of(section.model_fields[field].annotation)
        if inner:
            yield from sections(inner, (*path, key))


def known_keys(section: type[Section]) -> dict[str, str]:
    """Key of the YAML -> name of the field."""
    return {field.alias or name: name for name, field in section.model_fields.items()}


def section_at(path: Path) -> type[Section] | None:
    """The section that the keys lead to."""
    section: type[Section] | None = Job
    for part in path:
        field = known_keys(section).get(str(part)) if section else None
        section = _section_of(section.model_fields[field].annotation) if section and field else None
    return section


def _section_of(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_of(part))), None)


def choices_of(owner: type[Section] | None, path: Path) -> list[Any]:
    """The words of a Literal field, or of the items of one."""
    name = next((part for part in reversed(path) if isinstance(part, str)), "")
    if owner is None or name not in known_keys(owner):
        owner = section_at(path[: path.index(name)])
    if owner is None:
        return []
    return list(_literals(owner.model_fields[known_keys(owner)[name]].annotation))


def _literals(annotation: Any) -> Iterator[Any]:
    for part in get_args(annotation):
        if isinstance(part, (str, bool, int)):
            yield part
        elif part is not Ellipsis:
            yield from _literals(part)


def _required(owner: type[Section] | None, key: str | int) -> bool:
    field = known_keys(owner).get(str(key)) if owner else None
    return bool(owner and field and owner.model_fields[field].is_required())


def show_example(owner: type[Section] | None, key: str | int) -> str:
    """The example of a field, as YAML on one line."""
    field = known_keys(owner).get(str(key)) if owner else None
    if owner is None or field is None:
        return "..."
    return flow((owner.model_fields[field].examples or ["..."])[0])


def flow(value: Any) -> str:
    """A plain value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(flow(part) for part in value) + "]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def show(value: Any) -> str:
    """A value as the message shows it, short."""
    if isinstance(value, dict):
        return "a group of keys"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = flow(value) if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _tame(value: Any) -> str:
    """The nearest text that may name a run."""
    tame = re.sub(r"[^a-z0-9._-]+", "-", str(value).lower()).strip("-._")[:63]
    return tame or "my-run"
