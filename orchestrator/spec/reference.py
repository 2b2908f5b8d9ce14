"""The JSON Schema and the reference page of a job, from job.py and sections.py: the fields, and the text under each.

python -m orchestrator.spec.reference      writes docs/reference/job.schema.json and docs/reference/job.md
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.spec import job, ppo_section, sections
from orchestrator.spec.errors import dotted
from orchestrator.spec.job import Job
from orchestrator.spec.messages import all_sections, flow, known_keys, literals

ROLES = ("reward", "critic", "reference")
DIALECT = "https://json-schema.org/draft/2020-12/schema"
FOLDER = Path(__file__).parents[2] / "docs" / "reference"


@cache
def field_texts() -> dict[tuple[str, str], str]:
    """(class, field) -> the docstring under the field."""
    texts = {}
    for node in (node for module in (sections, ppo_section, job) for node in ast.parse(inspect.getsource(module)).body):
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                assert isinstance(text.value, ast.Constant)
                texts[node.name, field.target.id] = " ".join(str(text.value.value).split())
    return texts


def json_schema() -> dict[str, Any]:
    """Draft 2020-12. What only holds together (degrees and GPUs, say) is left to `shardwise validate`."""
    schema = Job.model_json_schema(by_alias=True)
    classes = {section.__name__: section for _, section in all_sections()}
    for name, part in {"Job": schema, **schema["$defs"]}.items():
        section = classes[name]
        part["description"] = " ".join((section.__doc__ or "").split())
        for key, field in known_keys(section).items():
            described = part["properties"][key]
            described["description"] = field_texts()[section.__name__, field]
            described.pop("title", None)
            if name == "StrategySpec":
                described["anyOf"] = [{"const": "auto"}, *described["anyOf"]]
        part.pop("title", None)
        if words := _bare_words(section):
            keys = {key: part.pop(key) for key in list(part) if key != "description"}
            part["anyOf"] = [words, keys]
    _add_chains(schema)
    return {"$schema": DIALECT, "title": "Shardwise job", **schema}


def _add_chains(schema: dict[str, Any]) -> None:
    """A file with `chain` lists links, each with keys of a job; `from` stands in the place of a model."""
    source = {"description": "Name of an earlier link, whose model and weights this one starts from.", "type": "string"}
    roles = schema["$defs"]["PpoSpec"]["properties"]
    only_source = {
        "type": "object",
        "properties": {"from": source},
        "required": ["from"],
        "additionalProperties": False,
    }
    for role in ROLES:
        described = roles[role].pop("description")
        roles[role] = {"anyOf": [only_source, roles[role]], "description": f"{described} In a chain: {{from: LINK}}."}
    keys = {key: {"$ref": f"#/properties/{key}"} for key in schema["properties"] if key != "version"}
    link = {
        "type": "object",
        "properties": {**keys, "from": source},
        "required": ["name"],
        "additionalProperties": False,
    }
    schema["properties"]["chain"] = {
        "description": "Links that run one after the other; what a link does not say it takes from the top of the file.",
        "type": "array",
        "minItems": 1,
        "items": link,
    }
    needed = schema.pop("required")
    schema["required"] = ["version", "name"]
    schema |= {"if": {"required": ["chain"]}, "else": {"required": needed}}


def _bare_words(section: type[sections.Section]) -> dict[str, Any]:
    if section is sections.ModelSpec:
        from orchestrator.models.architecture import CATALOG

        return {"type": "string", "enum": list(CATALOG)}
    if section is sections.StrategySpec:
        return {"const": "auto"}
    if section is sections.OffloadSpec:
        return {"enum": ["none", "optimizer", "parameters", "activations"]}
    return {}


def reference() -> str:
    """docs/reference/job.md"""
    lines = [
        "# The job file",
        "",
        "Made from `orchestrator/spec` by `python -m orchestrator.spec.reference`. Numbers follow YAML 1.2 (`1e-5` and",
        "`300e9` are numbers, `1:30` and `017` are text); a duration is a whole number and `s`, `m`, `h` or `d`. Unknown keys,",
        "wrong types and impossible combinations are errors with their line and column: `shardwise validate JOB`.",
        "",
    ]
    seen: dict[type[sections.Section], str] = {}
    for path, section in all_sections():
        if section in seen:
            lines += [f"## `{dotted(path)}`", "", f"Keys as in `{seen[section]}`.", ""]
            continue
        seen[section] = dotted(path)
        lines += _section(path, section)
    return "\n".join(lines)


def _section(path: tuple[str | int, ...], section: type[sections.Section]) -> Iterator[str]:
    yield f"## {f'`{dotted(path)}`' if path else 'Top level'}"
    yield ""
    yield " ".join((section.__doc__ or "").split())
    if section.bare_words:
        yield f"In place of the keys: {section.bare_words}."
    yield ""
    yield "| key | default | example | meaning |"
    yield "|---|---|---|---|"
    for key, name in known_keys(section).items():
        field = section.model_fields[name]
        default = "required" if field.is_required() else _default(section, name)
        example = flow((field.examples or [""])[0]).replace("|", "\\|")
        text = field_texts()[section.__name__, name] + _words(section, name)
        yield f"| `{key}` | {default} | `{example}` | {text} |"
    yield ""


def _default(section: type[sections.Section], name: str) -> str:
    default = section.model_fields[name].default
    if section.model_fields[name].default_factory is not None:
        return "its defaults"
    if default is None:
        return "auto" if section is sections.StrategySpec else "absent"
    return f"`{flow(list(default) if isinstance(default, tuple) else default)}`"


def _words(section: type[sections.Section], name: str) -> str:
    words = [word for word in literals(section.model_fields[name].annotation) if isinstance(word, str)]
    return f" One of {', '.join(f'`{word}`' for word in words)}." if len(words) > 1 else ""


def write(folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.schema.json").write_text(json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8")
    (folder / "job.md").write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    write()
