"""`shardwise estimate`: each option says one thing of the strategy, with a job and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.cli.estimate import command

JOB = """version: 1
name: small
model: opt-125m
batch: {global_batch_size: 64, sequence_length: 1024}
training: {precision: bf16}
cluster: a100-80gb-1x8
strategy: {data_parallel_degree: 4, tensor_parallel_degree: 2, pipeline_parallel_degree: 1, zero_stage: 1, micro_batch_size: 2}
"""
FREE = JOB.split("strategy:")[0]


def estimated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["estimate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def job(tmp_path: Path) -> str:
    (tmp_path / "job.yaml").write_text(JOB)
    return str(tmp_path / "job.yaml")


OF_A_JOB = {
    "cluster": (["--cluster", "h100-80gb-1x8"], lambda made: made["cluster"]["gpu"], "h100-80gb"),
    "data_parallel_degree": (["--data", "2"], lambda made: made["strategy"]["data_parallel_degree"], 2),
    "tensor_parallel_degree": (["--tensor", "1"], lambda made: made["strategy"]["tensor_parallel_degree"], 1),
    "pipeline_parallel_degree": (
        ["--pipeline", "2", "--data", "2"], lambda made: made["strategy"]["pipeline_parallel_degree"], 2,
    ),
    "zero_stage": (["--zero", "3"], lambda made: made["strategy"]["zero_stage"], 3),
    "sequence_parallel": (["--sequence-parallel"], lambda made: made["strategy"]["sequence_parallel"], True),
    "recompute": (["--recompute", "full"], lambda made: made["strategy"]["activation_checkpointing"], "full"),
    "offload": (["--offload", "optimizer"], lambda made: made["strategy"]["offload"]["optimizer"], "host"),
    "micro_batch_size": (["--micro-batch-size", "4"], lambda made: made["strategy"]["micro_batch_size"], 4),
    "accumulation": (
        ["--accumulation", "16", "--micro-batch-size", "1"],
        lambda made: made["strategy"]["gradient_accumulation_steps"], 16,
    ),
    "sequence_length": (["--sequence-length", "256"], lambda made: made["memory"]["stages"][0]["logits"], 2 * 256),
    "precision": (["--precision", "fp32"], lambda made: made["strategy"]["states"], "full"),
}  # fmt: skip


@pytest.mark.parametrize("option", OF_A_JOB)
def test_an_option_stands_in_place_of_what_the_job_says(capsys, job, option):
    arguments, read, wanted = OF_A_JOB[option]
    before, after = read(estimated(capsys, job)), read(estimated(capsys, job, *arguments))
    if option == "sequence_length":  # a quarter of the tokens, a quarter of the logits
        wanted = before // 4
    assert before != wanted
    assert after == wanted


def test_no_option_is_left_out_of_the_table():
    free = {"job", "model", "as_json", "trace"}
    assert {parameter.name for parameter in command.params} - free == OF_A_JOB.keys()


def test_an_option_of_a_job_without_a_strategy_leaves_the_rest_to_the_planner(capsys, tmp_path):
    (tmp_path / "job.yaml").write_text(FREE)
    made = estimated(capsys, str(tmp_path / "job.yaml"), "--zero", "2")
    assert (made["strategy"]["zero_stage"], made["strategy"]["num_gpus"]) == (2, 8)


def test_a_model_and_a_job_exclude_each_other(capsys, job):
    assert main(["estimate", job, "--model", "opt-13b"]) == 2
    assert "--model opt-13b stands in place of a job" in capsys.readouterr().err


def test_a_cluster_file_is_taken_from_the_current_folder(capsys, tmp_path, monkeypatch):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "job.yaml").write_text(JOB)
    (tmp_path / "mine.yaml").write_text("gpu: h100-80gb\nnodes: 1\ngpus_per_node: 8\n")
    monkeypatch.chdir(tmp_path)
    assert estimated(capsys, "jobs/job.yaml", "--cluster", "mine.yaml")["cluster"]["gpu"] == "h100-80gb"


def test_an_impossible_option_is_bad_input(capsys, job):
    assert main(["estimate", job, "--tensor", "5"]) == 2
    assert "does not divide the 12 heads" in capsys.readouterr().err
