"""The kinds of values that a job is made of. Kept strict: a number in quotes is text, a list is no number."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

_DURATION = re.compile(r"([1-9][0-9]*)([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION_PATTERN = "^[1-9][0-9]*[smhd]$"
MOST = 10**15
"""Counts above it are typing errors, and would leave what a float can hold exactly."""


# Names of the branches where a value may be of two kinds. pydantic puts them into an error's location; the NUL keeps
# them apart from every key that a person writes.
KEYS, TEXT, NUMBER, FILES = "\0keys", "\0text", "\0number", "\0files"


class Duration(int):
    """Seconds, written as an integer and s, m, h or d."""

    def __str__(self) -> str:
        unit = next(unit for unit in "dhms" if self % _UNITS[unit] == 0)
        return f"{int(self) // _UNITS[unit]}{unit}"


def fault(message: str, fix: str) -> PydanticCustomError:
    """A fault that a validator of ours finds. `message` goes on after the key and its value."""
    return PydanticCustomError("shardwise", "{message}", {"message": message, "fix": fix})


def _whole(value: Any) -> Any:
    """300e9 is a whole number to YAML's readers, a float to Python."""
    return int(value) if type(value) is float and value.is_integer() else value


def _duration(value: Any) -> Duration:
    if isinstance(value, Duration):
        return value
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if not match or len(match[1]) > 9:
        raise fault("is not a duration", "write a whole number and s, m, h or d, as in 10m")
    return Duration(int(match[1]) * _UNITS[match[2]])


def _every(value: Any) -> Any:
    value = _whole(value)
    if value == "auto" or (type(value) is int and 1 <= value <= MOST):
        return value
    if isinstance(value, (str, Duration)) and (isinstance(value, Duration) or _DURATION.fullmatch(value)):
        return _duration(value)
    raise fault("is no interval", "write a number of steps (500), a duration (10m), or auto")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _texts(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _tuple(value)


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MOST)]
"""1, 2, 3, ..."""
CountOrZero = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MOST)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Texts = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(_texts),
    Field(min_length=1),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
            ]
        }
    ),
]
"""A list of paths; one path alone is a list of one."""
Pair = Annotated[tuple[BelowOne, BelowOne], BeforeValidator(_tuple)]
Seconds = Annotated[
    Duration,
    PlainValidator(_duration),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "pattern": _DURATION_PATTERN}),
]
Every = Annotated[
    int | Duration | Literal["auto"],
    PlainValidator(_every),
    PlainSerializer(lambda value: str(value) if isinstance(value, (Duration, str)) else value),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": _DURATION_PATTERN},
                {"const": "auto"},
            ]
        }
    ),
]
