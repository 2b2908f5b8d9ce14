"""A job file becomes a frozen Job: what is read, what it stands for, what may differ between two."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from orchestrator.models.architecture import CATALOG, num_parameters
from orchestrator.spec import Job, load_job, parse_job
from orchestrator.spec.chain import load
from orchestrator.spec.source import parse_document
from orchestrator.spec.values import Duration

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))

SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b")


def job(**changes: object) -> Job:
    base = {"version": 1, "name": "a", "model": "opt-125m", "batch": {"global_batch_size": 8, "sequence_length": 128}}
    return parse_job({**base, **changes})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_a_valid_job_with_a_modeline_that_leads_to_the_schema(path):
    loaded = load(path)
    assert loaded.name == path.stem
    head, _, target = path.read_text().splitlines()[0].partition("$schema=")
    assert head == "# yaml-language-server: "
    assert (path.parent / target).is_file()


def test_the_nine_published_sizes_have_an_example_each():
    assert {f"opt-{size}" for size in SIZES} <= {p.stem for p in EXAMPLES}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("300e9", 300e9), ("2.0e-4", 2e-4), (".5", 0.5), ("-3", -3), ("+3", 3), ("0", 0), ("1.", 1.0),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("017", "017"), ("1:30", "1:30"), ("1_000", "1_000"), ("0x1F", "0x1F"),
        ("2001-12-14", "2001-12-14"), ("'5'", "5"), ('"true"', "true"), ("!!str 5", "5"), ("1e", "1e"), ("=", "="),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text, value):
    read = parse_document(f"key: {text}\n").value["key"]
    assert (read, type(read)) == (value, type(value))


def test_an_anchor_may_be_used_again():
    assert parse_document("a: &x {b: 1}\nc: *x\n").value == {"a": {"b": 1}, "c": {"b": 1}}


def test_defaults_are_those_of_what_is_built():
    plain = job()
    assert (plain.task, plain.objective, plain.cluster, plain.resolved_cluster) == ("pretrain", "fastest", "auto", None)
    assert plain.checkpoint.every == 600
    assert (plain.recovery.on_oom, plain.recovery.on_lost_gpus, plain.recovery.on_loss_spike) == ("stop", "stop", None)
    assert plain.training.compile is False
    assert plain.recovery.max_restarts == 10
    assert plain.strategy.model_fields_set == set()
    assert not plain.training.wrote("compile")


@pytest.mark.parametrize(
    ("training", "num_steps", "tokens_total"),
    [({}, None, None), ({"steps": 10}, 10, 10240), ({"tokens": 1e4}, 10, 10240), ({"tokens": 10241}, 11, 11264)],
)
def test_a_length_is_in_steps_or_tokens_rounded_up_to_whole_steps(training, num_steps, tokens_total):
    made = job(training=training)
    assert (made.num_steps, made.tokens_total) == (num_steps, tokens_total)


@pytest.mark.parametrize(
    ("text", "seconds", "shown"),
    [("90s", 90, "90s"), ("60m", 3600, "1h"), ("36h", 129600, "36h"), ("30d", 2592000, "30d")],
)
def test_durations_are_seconds(text, seconds, shown):
    every = job(checkpoint={"every": text}).checkpoint.every
    assert isinstance(every, Duration)
    assert (every, str(every)) == (seconds, shown)


@pytest.mark.parametrize(("every", "read"), [(500, 500), (1e3, 1000), ("auto", "auto")])
def test_checkpoints_come_every_so_many_steps_or_as_the_planner_sees_fit(every, read):
    assert job(checkpoint={"every": every}).checkpoint.every == read
    assert not isinstance(job(checkpoint={"every": every}).checkpoint.every, Duration)


@pytest.mark.parametrize(
    ("offload", "pins"),
    [
        ("optimizer", ("host", "none", "none")),
        ("activations", ("none", "none", "host")),
        ("none", ("none", "none", "none")),
        ({"parameters": "nvme"}, ("none", "nvme", "none")),
        ({}, ("none", "none", "none")),
    ],
)
def test_a_pinned_offload_is_none_where_it_says_nothing(offload, pins):
    pinned = job(strategy={"offload": offload}).strategy.offload
    assert (pinned.optimizer, pinned.parameters, pinned.activations) == pins


def test_auto_pins_nothing():
    assert job(strategy="auto") == job(strategy={"states": "auto", "offload": "auto", "zero_stage": "auto"}) == job()


@pytest.mark.parametrize(
    "strategy",
    [
        {"micro_batch_size": 3, "data_parallel_degree": 7},  # 8 sequences: the last micro batches are short
        {"micro_batch_size": 16},
        {"gradient_accumulation_steps": 3, "data_parallel_degree": 1, "micro_batch_size": 3},
        {"zero_stage": 0, "zero_group_size": 8},
        {"sequence_parallel": True},
        {"tensor_parallel_degree": 12, "mesh_order": ["tensor", "pipeline", "data", "context"]},
        {"pipeline_parallel_degree": 5},
        {"zero_stage": 3, "data_parallel_degree": 56},
    ],
)
def test_what_is_only_wasteful_is_left_to_the_price(strategy):
    job(strategy=strategy, cluster="a100-80gb-8x8")


def test_a_catalog_name_a_shape_and_a_folder_stand_for_the_same_model(tmp_path):
    shape = {
        "family": "opt",
        "num_layers": 12,
        "hidden_size": 768,
        "num_heads": 12,
        "ffn_size": 3072,
        "vocab_size": 50272,
    }
    config = {
        "model_type": "opt", "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "ffn_dim": 3072,
        "vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": 768, "do_layer_norm_before": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    counts = {
        num_parameters(job(model=model).architecture) for model in ("opt-125m", shape, {"path": str(tmp_path)})
    }  # fmt: skip
    assert counts == {num_parameters(CATALOG["opt-125m"])}


CONFIGS = {
    "gpt2": {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
    "opt-350m": {
        "model_type": "opt", "num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "ffn_dim": 4096,
        "vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": 512, "do_layer_norm_before": False,
    },
    "llama-7b": {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    },
    "bloom-560m": {"model_type": "bloom", "n_layer": 24, "hidden_size": 1024, "n_head": 16, "vocab_size": 250880},
    "mpt-7b": {
        "model_type": "mpt", "n_layers": 32, "d_model": 4096, "n_heads": 32, "expansion_ratio": 4, "max_seq_len": 2048,
        "vocab_size": 50432,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hugging_face_folder_is_read_from_its_config_alone(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    read = job(model={"path": str(tmp_path)})
    assert num_parameters(read.architecture) == num_parameters(CATALOG[name])
    assert read.initializes_from_weights


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no keys"),
        ('{"model_type": "bert"}', "model_type 'bert'; known are opt"),
        ('{"model_type": "opt", "hidden_size": 8, "num_attention_heads": 2}', "has no num_hidden_layers"),
        ('{"model_type": "gpt2", "n_layer": "x", "n_embd": 8, "n_head": 2}', "n_layer is 'x', not a whole number"),
        (" " * (2**20 + 1), "larger than 1048576 bytes"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        job(model={"path": str(tmp_path)})


@pytest.mark.parametrize(
    ("cluster", "num_gpus", "gpu"),
    [
        ("a100-80gb-8x8", 64, "a100-80gb"),
        ("a100-80gb", 1, "a100-80gb"),
        ({"gpu": "a100-80gb-pcie", "nodes": 2, "gpus_per_node": 4}, 8, "a100-80gb-pcie"),
    ],
)
def test_a_cluster_is_a_name_or_keys(cluster, num_gpus, gpu):
    made = job(cluster=cluster).resolved_cluster
    assert (made.num_gpus, made.accelerator.name) == (num_gpus, gpu)


def test_files_are_relative_to_the_job(tmp_path):
    (tmp_path / "mine.yaml").write_text("gpu: h100-80gb\nnodes: 2\ngpus_per_node: 8\n")
    (tmp_path / "job.yaml").write_text(
        "version: 1\nname: a\nmodel: opt-125m\nbatch: {global_batch_size: 8, sequence_length: 128}\ncluster: mine.yaml\n"
    )
    loaded = load_job(tmp_path / "job.yaml")
    assert loaded.directory == tmp_path
    assert loaded.resolved_cluster.num_gpus == 16
    assert loaded.place("cluster") == f"{tmp_path / 'job.yaml'}:5:10"
    assert loaded.place("strategy", "zero_stage") == str(tmp_path / "job.yaml")


def test_a_job_is_frozen_and_travels():
    made = job(cluster="a100-80gb-8x8", targets={"for": "10m"}, data={"train": "a.txt", "tokenizer": {"bpe": 512}})
    with pytest.raises(ValidationError):
        made.name = "b"
    copy = pickle.loads(pickle.dumps(made))
    assert copy == made
    assert hash(copy) == hash(made)
    assert copy.resolved_cluster == made.resolved_cluster


DATA = {"train": ["a.txt"]}


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"strategy": {"zero_stage": 1}, "cluster": "a100-80gb-8x8", "checkpoint": {"keep": 1}, "name": "b"}, []),
        ({"training": {"steps": 7, "seed": 1234}}, []),
        ({"model": {"name": "opt-125m", "initialize": "random"}}, []),
        ({"training": {"seed": 1}}, ["training.seed"]),
        ({"training": {"optimizer": {"learning_rate": 1e-3}}}, ["training.optimizer.learning_rate"]),
        ({"data": {"train": ["b.txt"]}}, ["data.train"]),
        ({"batch": {"global_batch_size": 9, "sequence_length": 128}}, ["batch.global_batch_size"]),
        ({"model": {"name": "opt-125m", "dropout": 0.1}}, ["model.dropout"]),
        ({"model": "gpt3-125m"}, ["model.family", "model.vocab_size"]),
        ({"task": "sft"}, ["task"]),
    ],
)
def test_a_run_goes_on_where_nothing_that_changes_its_losses_differs(changes, difference):
    assert job(data=DATA, training={"steps": 5}).trajectory_difference(job(**{"data": DATA, **changes})) == difference


def test_reading_a_job_loads_no_runtime():
    code = (
        "import sys, orchestrator.spec.chain as s; s.load(sys.argv[1]); "
        "print(sorted({'torch', 'ray', 'pandas', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(EXAMPLES[0])], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
