"""Tasks: an instruction and its instances; the seed tasks that a person wrote, read from a file.

Pure but for `read_seeds`. Two forms of seeds: Alpaca's {instruction, input, output}, and that of the Self-Instruct paper
(arXiv:2212.10560): {instruction, instances: [{input, output}, ...], is_classification}.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.training.collect import Fault, records, told
from orchestrator.training.data import DataError
from orchestrator.training.examples import BadRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """One input to a task, empty where it needs none, and the answer."""

    input: str
    output: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A task: what a model is asked, and at least one way to answer it."""

    instruction: str
    instances: tuple[Instance, ...]


def parse_seed(record: Any) -> Task:
    """The task of a record of either form. BadRecord with the reason where it is none."""
    if not isinstance(record, dict):
        raise BadRecord("wrong fields", "is no object with keys")
    instruction = _text(record, "instruction", "instruction")
    if "instances" not in record:
        return Task(instruction=instruction, instances=(_instance(record, ""),))
    instances = record["instances"]
    if not isinstance(instances, list) or not instances:
        raise BadRecord("wrong fields", "instances is no list of at least one {input, output}")
    return Task(
        instruction=instruction,
        instances=tuple(_instance(one, f"instances[{number}].") for number, one in enumerate(instances)),
    )


def _instance(record: Any, where: str) -> Instance:
    if not isinstance(record, dict):
        raise BadRecord("wrong fields", f"{where[:-1]} is no object with input and output")
    given = record.get("input") or ""
    if not isinstance(given, str):
        raise BadRecord("wrong fields", f"{where}input is no text")
    return Instance(input=given, output=_text(record, "output", f"{where}output"))


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BadRecord("wrong fields", f"{where} is missing, empty or no text")
    return value.strip()


def read_seeds(path: Path) -> list[Task]:
    """The seed tasks of a file, each instruction once. DataError where it cannot be read, or a record of it is no task: with file
    and line."""
    tasks: dict[str, Task] = {}
    faults: list[Fault] = []
    for where, record in records(path):
        try:
            if isinstance(record, BadRecord):
                raise record
            task = parse_seed(record)
            task.instruction.encode("utf-8")
        except BadRecord as bad:
            faults.append(Fault(where=where, kind=bad.kind, reason=str(bad)))
            continue
        except UnicodeEncodeError:
            faults.append(Fault(where=where, kind="not UTF-8", reason="holds half a character"))
            continue
        tasks.setdefault(task.instruction, task)
    if faults:
        raise DataError(told(faults))
    if not tasks:
        raise DataError(f"{path} holds no seed task")
    return list(tasks.values())
