"""YAML as the project reads it: safe, by libyaml where there is one, numbers as YAML 1.2 has them."""

from __future__ import annotations

import re
from typing import Any

import yaml

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_MANTISSA, _EXPONENT = r"(\.[0-9]+|[0-9]+\.[0-9]*)", r"[eE][-+]?[0-9]+"


class Loader(_SafeLoader):  # type: ignore[misc]
    """PyYAML speaks YAML 1.1, where 312e12 is a string, 017 is 15 and 1:30 is 90."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own attribute)
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
        for first, resolvers in _SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(rf"([-+]?({_MANTISSA}({_EXPONENT})?|[0-9]+{_EXPONENT})|[-+]?\.inf|\.nan)$"),
    list("-+.0123456789"),
)


MAX_DEPTH = 32


def read_yaml(text: str) -> Any:
    """A text of ours. Raises yaml.YAMLError."""
    return yaml.load(text, Loader)


def read_foreign_yaml(text: str) -> Any:
    """A text of a user's: nesting past MAX_DEPTH (which takes libyaml's loader down) and aliases (which may unfold into
    gigabytes) are refused before anything is built. Raises yaml.YAMLError."""
    depth = 0
    for event in yaml.parse(text, Loader):
        mark: Any = event.start_mark
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deep", problem_mark=mark)
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not read here", problem_mark=mark)
    return read_yaml(text)
