"""The schema and the reference page are made from the models and are what the repository holds."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from orchestrator.spec.messages import all_sections, known_keys
from orchestrator.spec.reference import field_texts, json_schema, reference
from orchestrator.spec.source import read_document

ROOT = Path(__file__).parents[2]
AGAIN = "run python -m orchestrator.spec.reference"
BASE = {"version": 1, "name": "a", "model": "opt-125m", "batch": {"global_batch_size": 8, "sequence_length": 128}}


def test_the_committed_schema_is_current():
    assert json.loads((ROOT / "docs/reference/job.schema.json").read_text()) == json_schema(), AGAIN


def test_the_committed_reference_is_current():
    assert (ROOT / "docs/reference/job.md").read_text() == reference(), AGAIN


def test_the_schema_is_valid_draft_2020_12():
    jsonschema.Draft202012Validator.check_schema(json_schema())


def test_every_field_has_a_text_and_an_example():
    for _, section in all_sections():
        for field in known_keys(section).values():
            assert field_texts()[section.__name__, field]
            assert section.model_fields[field].examples


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_valid_by_the_schema(path):
    jsonschema.Draft202012Validator(json_schema()).validate(read_document(path).value)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"path": "x"}},
        {"cluster": {"gpu": "t4"}},
        {"strategy": {"offload": "optimizer", "states": "auto"}},
        {"data": {"train": "a", "validation": ["b"], "tokenizer": {"bpe": 9}}},
        {"checkpoint": {"every": "10m"}},
        {"chain": [{"name": "a"}, {"name": "b", "from": "a", "task": "ppo", "ppo": {"reward": {"from": "a"}}}]},
    ],
)
def test_the_schema_takes_what_a_job_takes(changes):
    jsonschema.Draft202012Validator(json_schema()).validate(BASE | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"stratgy": "auto"},
        {"chain": [{"name": "a", "form": "b"}]},
        {"chain": []},
        {"model": "opt-125"},
        {"strategy": {"zero_stage": 4}},
        {"strategy": "zero3"},
        {"checkpoint": {"every": "10"}},
        {"name": "A"},
    ],
)
def test_the_schema_refuses_what_a_job_refuses(changes):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(json_schema()).validate(BASE | changes)
