"""Spec -> mapping -> spec and spec -> YAML -> spec are identity; no text at all shows a traceback."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.spec import Job, SpecError, load_job, parse_job

SHORT = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

counts = st.integers(1, 10**6)
durations = st.builds(lambda number, unit: f"{number}{unit}", st.integers(1, 999), st.sampled_from("smhd"))
fractions = st.floats(0, 0.99)
paths = st.text(min_size=1, max_size=12).filter(lambda text: text.isprintable())


def keys(**fields: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries({}, optional=fields)


jobs = st.fixed_dictionaries(
    {
        "version": st.just(1),
        "name": st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True),
        "model": st.sampled_from(["opt-125m", "llama-7b", {"name": "opt-1.3b", "dropout": 0.1}]),
        "batch": st.fixed_dictionaries({"global_batch_size": counts, "sequence_length": st.integers(1, 2048)}),
    },
    optional={
        "task": st.sampled_from(["pretrain", "sft", "reward", "dpo"]),
        "data": st.fixed_dictionaries(
            {"train": st.lists(paths, min_size=1, max_size=3)},
            optional={
                "validation": fractions,
                "tokenizer": paths | st.fixed_dictionaries({"bpe": st.integers(257, 32000)}),
                "template": st.sampled_from(["auto", "alpaca", "chat", "plain"]),
                "on_bad": st.sampled_from(["stop", "skip"]),
            },
        ),
        "training": keys(
            steps=counts,
            precision=st.sampled_from(["bf16", "fp32"]),
            optimizer=keys(
                learning_rate=st.floats(1e-300, 1), betas=st.lists(fractions, min_size=2, max_size=2),
                gradient_clip=st.none() | st.floats(0.1, 9),
            ),
            seed=st.integers(0, 2**63 - 1),
            compile=st.sampled_from([True, False, "auto"]),
        ),
        "cluster": st.sampled_from(["auto", "a100-80gb-8x8", {"gpu": "h100-80gb", "nodes": 2, "gpus_per_node": 8}]),
        "strategy": st.just("auto")
        | keys(
            data_parallel_degree=st.integers(1, 16), zero_stage=st.integers(0, 3),
            offload=st.sampled_from(["optimizer", "none", {}, {"parameters": "nvme"}]),
            mesh_order=st.permutations(["pipeline", "data", "context", "tensor"]), sequence_parallel=st.booleans(),
        ),
        "targets": keys(**{"for": durations, "finish_within": durations, "budget_usd": st.floats(1, 1e9)}),
        "checkpoint": keys(every=counts | durations | st.just("auto"), keep=counts),
    },
)  # fmt: skip


@SHORT
@given(mapping=jobs)
@example(
    mapping={"version": 1, "name": "1e5", "model": "opt-125m", "batch": {"global_batch_size": 1, "sequence_length": 1}}
)
def test_a_job_survives_mapping_json_and_yaml(tmp_path, mapping):
    job = parse_job(mapping)
    assert parse_job(job.to_mapping()) == job
    assert parse_job(job.to_mapping()).to_mapping() == job.to_mapping()
    for text in (job.to_yaml(), json.dumps(job.to_mapping(), ensure_ascii=False)):
        (tmp_path / "job.yaml").write_text(text, encoding="utf-8")
        assert load_job(tmp_path / "job.yaml") == job


@SHORT
@given(data=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
@example(data=b"\xff\xfev\x00")
@example(data=b"a: *a")
@example(data=b"? ?")
@example(data=b"%YAML 9.9\n---\nversion: 1")
@example(data=b"&a a: 1\n*a : 2")
def test_no_text_is_more_than_a_spec_error(tmp_path, data):
    (tmp_path / "job.yaml").write_bytes(data)
    with pytest.raises(SpecError) as caught:
        load_job(tmp_path / "job.yaml")
    assert all(error["message"] and error["fix"] and error["line"] and error["column"] for error in caught.value.errors)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@SHORT
@given(key=st.sampled_from(sorted(Job.model_fields)), value=anything)
def test_no_value_is_more_than_a_spec_error(key, value):
    base = {"version": 1, "name": "a", "model": "opt-125m", "batch": {"global_batch_size": 8, "sequence_length": 128}}
    try:
        faults = [] if isinstance(parse_job({**base, key: value}), Job) else ["no job"]
    except SpecError as error:
        faults = [entry for entry in error.errors if not (entry["message"] and entry["fix"])]
    assert faults == []
