"""What can still be read of a job that is not right, so that all of its faults are found at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from orchestrator.spec.errors import Keys
from orchestrator.spec.job import Job
from orchestrator.spec.messages import keys_of, section_at


def salvage(mapping: Mapping[str, Any], error: ValidationError) -> tuple[dict[str, Any], set[str]]:
    """The sections that can be read once the faulty keys are left out, and the names of those that lost something."""
    faulty = {keys_of(detail) for detail in error.errors(include_url=False)}
    shaky = {str(path[0]) for path in faulty if path}
    sections: dict[str, Any] = {}
    for name, field in Job.model_fields.items():
        if (name,) in faulty:
            continue
        if name not in mapping and field.is_required():
            continue
        value = mapping.get(name, field.get_default(call_default_factory=True))
        value = _without(value, (name,), faulty)
        section = section_at((name,))
        if (section is not None and not isinstance(value, str | None)) or name in ("model", "strategy"):
            assert section is not None
            try:
                value = section.model_validate(value)
            except ValidationError:
                continue
        sections[name] = value
    return sections, shaky


def _without(value: Any, path: Keys, faulty: set[Keys]) -> Any:
    """The value without the keys that lead to a fault; a list with a faulty item goes as a whole."""
    if not isinstance(value, Mapping):
        return value
    return {
        key: _without(part, (*path, key), faulty)
        for key, part in value.items()
        if (*path, key) not in faulty and not any(isinstance(part, list) and bad[:-1] == (*path, key) for bad in faulty)
    }
