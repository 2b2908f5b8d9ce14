"""Reduces KubeRay's schema of a RayJob to the fields that `shardwise export kuberay` writes, every other key refused.

    python -m tests.golden.kuberay.reduce ray.io_rayjobs.yaml    # of ray-project/kuberay at COMMIT, PATH below

writes rayjob.schema.json beside this file. The schema of the v1 version is walked along the manifests of `MANIFESTS`; what
they do not use is left out, and so are descriptions. A property that the export begins to write fails the test until this is run
again."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

COMMIT = "59d663aeec13760646da3db9c1cf8cfe883e30b7"
PATH = "ray-operator/config/crd/bases/ray.io_rayjobs.yaml"
SCHEMA = Path(__file__).with_name("rayjob.schema.json")
KEPT = ("type", "format", "pattern", "enum", "required", "minimum", "maximum", "maxLength", "anyOf")


def reduced(schema: dict[str, Any], values: Sequence[Any]) -> dict[str, Any]:
    """Return the part of an OpenAPI v3 schema that `values` need, as JSON Schema with additionalProperties false."""
    kept: dict[str, Any] = {key: schema[key] for key in KEPT if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        kept["type"] = ["integer", "string"]
    if "properties" in schema:
        names = {name for value in values for name in value}
        unknown = names - set(schema["properties"])
        if unknown:
            raise ValueError(f"KubeRay knows no {sorted(unknown)}")
        kept["additionalProperties"] = False
        kept["properties"] = {
            name: reduced(schema["properties"][name], [value[name] for value in values if name in value])
            for name in sorted(names)
        }
    elif isinstance(schema.get("additionalProperties"), dict):
        inner = [item for value in values for item in value.values()]
        kept["additionalProperties"] = reduced(schema["additionalProperties"], inner)
    if "items" in schema:
        kept["items"] = reduced(schema["items"], [item for value in values for item in value])
    return kept


def main(crd: str) -> None:
    from tests.unit.test_export import MANIFESTS, rayjob

    document = yaml.safe_load(Path(crd).read_text(encoding="utf-8"))
    (schema,) = (
        version["schema"]["openAPIV3Schema"] for version in document["spec"]["versions"] if version["name"] == "v1"
    )
    schema["properties"]["metadata"] = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "namespace": {"type": "string"},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }
    comment = f"Reduced from github.com/ray-project/kuberay {PATH} at {COMMIT} (v1.7.0), Apache-2.0, by reduce.py"
    made = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$comment": comment,
        **reduced(schema, [rayjob(name) for name in MANIFESTS]),
    }
    SCHEMA.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
