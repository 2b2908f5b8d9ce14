"""Every field of a job is acted on by something that can be named, or `run` refuses it and `validate` and `plan` say so."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.control.folder import RunRefused
from orchestrator.control.refusals import refuse_priced
from orchestrator.planner.plan import plan
from orchestrator.spec import SpecError, parse_job
from orchestrator.spec.acting import ACTS, UNBUILT, refuse_unbuilt
from orchestrator.spec.errors import dotted
from orchestrator.spec.messages import all_sections, known_keys, section_at
from strategies.catalog import ENGINES

BY_THE_ENGINES = {"strategy.fused_norm"}
"""Fields that nothing acts on and that each engine's limits refuse."""

JOB = """version: 1
name: asked
model: {family: opt, num_layers: 2, hidden_size: 64, num_heads: 4, vocab_size: 264, max_position: 64}
batch: {global_batch_size: 4, sequence_length: 64}
cluster: {gpu: cpu, nodes: 1, gpus_per_node: 2}
data: {train: [job.yaml]}
"""
LENGTH = "training: {steps: 3, precision: fp32}\n"


MISSING = [
    ("data: {train: [nowhere.txt]}", "`data.train`: {}/nowhere.txt does not exist", "correct the path"),
    ("data: {train: [job.yaml, 'texts/*.txt']}", "`data.train`: {}/texts/*.txt matches no file", "correct the path"),
    ("data: {train: [job.yaml], validation: [held]}", "`data.validation`: {}/held does not exist", "correct the path"),
    ("data: {train: [job.yaml], tokenizer: bite}", "`data.tokenizer`: {}/bite does not exist", "write byte or {bpe"),
    ("data: {train: [job.yaml], tokenizer: byte}\nmodel: {path: hub}", "{}/hub holds no model.safetensors", "random"),
    (
        "data: {train: [job.yaml]}\nmodel: {path: whole}",
        "{}/whole holds no tokenizer, and",
        "data: {tokenizer: FOLDER}",
    ),
]


@pytest.mark.parametrize(("text", "message", "fix"), MISSING)
def test_validate_notes_what_the_job_names_and_is_not_here(tmp_path, monkeypatch, capsys, text, message, fix):
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 264}
    for name in ("hub", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "opt", **shape}))
    (tmp_path / "whole" / "model.safetensors").write_bytes(b"")
    named = {line.partition(":")[0] for line in text.splitlines()}
    base = "".join(line + "\n" for line in JOB.splitlines() if line.partition(":")[0] not in named)
    (tmp_path / "job.yaml").write_text(base + text + "\n")
    monkeypatch.chdir(tmp_path)
    assert main(["validate", "job.yaml", "--json"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert message.format(tmp_path) in note["message"]
    assert fix in note["fix"]
    assert (base + text).splitlines()[note["line"] - 1] in text.splitlines()
    assert main(["validate", "job.yaml"]) == 0
    assert f"note: {note['message']}; `run` refuses it" in capsys.readouterr().out


def test_validate_notes_nothing_where_all_is_here(tmp_path, capsys):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.txt").write_text("a text")
    text = "data: {train: ['deep/**/*.txt', deep], validation: [job.yaml]}\n"
    (tmp_path / "job.yaml").write_text(JOB.replace("data: {train: [job.yaml]}\n", text))
    assert main(["validate", str(tmp_path / "job.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


def fields() -> Iterator[str]:
    """Every field that is not a section alone."""
    for path, section in all_sections():
        for key in known_keys(section):
            if section_at((*path, key)) is None or key == "tokenizer":
                yield dotted((*path, key))


def test_every_field_is_acted_on_or_refused():
    refused = {dotted(row.keys) for row in UNBUILT} | BY_THE_ENGINES
    assert sorted(set(fields()) - ACTS.keys() - refused) == []
    assert sorted((ACTS.keys() | refused) - set(fields())) == [], "a row for a field that a job does not have"


@pytest.mark.parametrize("field", ACTS)
def test_what_acts_on_a_field_is_there_and_speaks_of_it(field: str):
    module, _, name = ACTS[field].partition(":")
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    text = inspect.getsource(found) if callable(found) else repr(found)
    assert field.rsplit(".", 1)[-1].removesuffix("_per_stage") in text


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engines_limits_refuse_what_none_of_them_does(engine: str):
    assert {"attention", "fused_norm"} <= {limit.field for limit in ENGINES[engine].limits}


# id: (what replaces or joins the job, line and column, message, fix)
ASKED = {
    "adapters of ppo": (
        "task: ppo\nppo: {reward: opt-125m}\ntraining: {steps: 3, lora: {rank: 4}}\n", "9:35",
        "adapters are not built for ppo", "leave lora out",
    ),
    "beta of another task": (
        "training: {steps: 3, dpo_beta: 0.2}\n", "7:32", "only task dpo has it", "leave dpo_beta out",
    ),
    "z of pairs": ("task: dpo\ntraining: {steps: 3, z_loss: 0.1}\n", "8:30", "no cross entropy" , "leave z_loss out"),
    "packed rows elsewhere": (
        "task: sft\n" + LENGTH + "strategy: {engine: fairscale}\n", "9:20", "kept apart on the native engine", "engine: native",
    ),
    "adapters of random weights": (
        "training: {steps: 3, lora: {rank: 4}}\n", "7:35", "this job's are random", "model: {path: FOLDER}",
    ),
    "compile auto": (
        "training: {steps: 3, precision: fp32, compile: auto}\n", "7:48", "`training.compile` is auto: nothing", "true or false",
    ),
    "compile and a split": (
        "training: {steps: 3, precision: fp32, compile: true}\nstrategy: {tensor_parallel_degree: 2}\n",
        "7:48", "`training.compile` is true: torch.compile of blocks that talk", "leave compile out",
    ),
    "deterministic elsewhere": (
        "training: {steps: 3, precision: fp32, deterministic: true}\nstrategy: {engine: fairscale}\n",
        "7:54", "reduces gradients in the order of arrival", "engine: native",
    ),
    "heads that do not split": (
        LENGTH + "strategy: {tensor_parallel_degree: 2}\n", "8:36", "does not divide model.num_kv_heads", "divides the key",
    ),
    "a family that is not split there": (
        LENGTH + "strategy: {engine: colossalai, tensor_parallel_degree: 2, attention: math}\n",
        "8:20", "splits Hugging Face's modules, and only that of family opt", "engine: native",
    ),
    "layers of no recompute": (
        LENGTH + "strategy: {activation_checkpointing: none, num_checkpointed_layers_per_stage: 1}\n",
        "8:79", "no layer would be computed again", "activation_checkpointing: full",
    ),
    "a reduction that is not run": (
        LENGTH + "strategy: {zero_stage: 1, reduce: per_micro_batch}\n", "8:35", "gradients once a step", "reduce: per_step",
    ),
    "a sequence that does not split": (
        LENGTH + "strategy: {tensor_parallel_degree: 2, sequence_parallel: true}\n",
        "8:58", "does not divide batch.sequence_length", "sequence_parallel: false",
    ),
    "no part of the states": (
        LENGTH + "strategy: {offload: {optimizer: host, optimizer_fraction: 0.0}}\n",
        "8:59", "no part of the optimizer states leaves", "a fraction above 0",
    ),
    "fused softmax": (
        LENGTH + "strategy: {attention: fused_softmax}\n", "8:23", "no fused softmax is built", "leave attention",
    ),
    "fused norm": (LENGTH + "strategy: {fused_norm: true}\n", "8:24", "is true: no fused norm is built", "leave fused_norm"),
    "pure states": (LENGTH + "strategy: {states: pure}\n", "8:20", "the native engine keeps `mixed`", "leave states out"),
    "for": (LENGTH + "targets: {for: 10m}\n", "8:16", "`targets.for` is 10m: nothing waits", "leave `for` out"),
    "replan after oom": (LENGTH + "recovery: {on_oom: replan}\n", "8:20", "replanning is not built", "on_oom: stop"),
    "replan after a loss": (LENGTH + "recovery: {on_lost_gpus: replan}\n", "8:26", "not built", "on_lost_gpus: stop"),
    "wait after a loss": (LENGTH + "recovery: {on_lost_gpus: wait}\n", "8:26", "is wait: ", "on_lost_gpus: stop"),
    "stop at a spike": (LENGTH + "recovery: {on_loss_spike: stop}\n", "8:27", "nothing looks for a jump", "leave on_loss_spike"),
    "back from a spike": (LENGTH + "recovery: {on_loss_spike: rollback}\n", "8:27", "is rollback", "leave on_loss_spike"),
}  # fmt: skip
OF_THE_MODEL = {
    "dropout": ("max_position: 64, dropout: 0.1}", "3:112", "`model.dropout` is 0.1: dropout is not built", "dropout: 0"),
}  # fmt: skip


def texts() -> Iterator[Any]:
    for name, (more, *rest) in ASKED.items():
        text = JOB.replace("sequence_length: 64", "sequence_length: 63") if "sequence" in name else JOB
        text = text.replace("family: opt", "family: llama") if name.startswith("a family") else text
        text = text.replace("num_heads: 4", "num_heads: 4, num_kv_heads: 1") if name.startswith("heads") else text
        yield pytest.param(text + more, *rest, id=name)
    for name, (model, *rest) in OF_THE_MODEL.items():
        yield pytest.param(JOB.replace("max_position: 64}", model) + LENGTH, *rest, id=name)
    records = "task: sft\n" + JOB.replace("family: opt", "family: glm")
    yield pytest.param(
        records + LENGTH, "1:7", "family glm learns by filling blanks", "task: pretrain", id="glm answers"
    )
    template = JOB.replace("train: [job.yaml]", "train: [job.yaml], template: alpaca")
    yield pytest.param(template + LENGTH, "6:37", "no template is applied", "leave template out", id="template of text")
    bad = JOB.replace("train: [job.yaml]", "train: [job.yaml], on_bad: skip")
    yield pytest.param(bad + LENGTH, "6:35", "no record can be bad", "leave on_bad out", id="bad records of text")
    none = JOB.replace("train: [job.yaml]", "train: [job.yaml], validation: 0.0")
    every = "training: {steps: 3, precision: fp32, evaluate_every: 2}\n"
    yield pytest.param(none + every, "7:55", "data.validation is 0", "leave evaluate_every out", id="evaluate nothing")


@pytest.mark.parametrize(("text", "place", "message", "fix"), [*texts()])
def test_run_refuses_what_nothing_acts_on_before_anything_starts(
    tmp_path: Path, monkeypatch, capfd, text: str, place: str, message: str, fix: str
):
    (tmp_path / "job.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("orchestrator.control.run.Early", None)  # whatever starts a process would raise
    assert main(["run", "job.yaml"]) == 2
    told = capfd.readouterr().err
    assert f"job.yaml:{place}\n" in told
    assert message in told
    assert fix in told
    assert "newest checkpoint" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"], "nothing is left behind"


@pytest.mark.parametrize(("text", "place", "message", "fix"), [*texts()])
def test_validate_notes_it_and_the_job_stays_valid(tmp_path: Path, monkeypatch, capsys, text, place, message, fix):
    (tmp_path / "job.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert main(["validate", "job.yaml"]) == 0
    told = capsys.readouterr().out
    assert message in told
    assert f"job.yaml:{place}\n" in told
    assert main(["validate", "job.yaml", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert [f"{note['line']}:{note['column']}" for note in notes] == [place]
    assert fix in notes[0]["fix"]


def test_a_plan_notes_it_and_is_made():
    job = parse_job(
        {
            "version": 1,
            "name": "a",
            "task": "ppo",
            "ppo": {"reward": "glm-10b"},
            "model": "glm-10b",
            "batch": {"global_batch_size": 64, "sequence_length": 1024},
            "cluster": "a100-80gb-8x8",
            "recovery": {"on_oom": "replan"},
        }
    )
    made = plan(job, top=0)
    assert made.fits
    assert [note.split(":")[0] for note in made.notes[:2]] == ["`task` is ppo", "`recovery.on_oom` is replan"]
    assert all("`run` refuses it" in note for note in made.notes[:2])


@pytest.mark.parametrize(
    ("model", "length", "pins", "told"),
    [
        ({}, 64, {"reduce": "per_micro_batch", "micro_batch_size": 1, "zero_stage": 1}, "reduces once a step"),
        ({}, 64, {"reduce": "per_micro_batch", "micro_batch_size": 1, "zero_stage": 2}, ""),
        ({"family": "llama", "num_kv_heads": 2}, 64, {"tensor_parallel_degree": 2}, ""),
    ],
)
def test_a_split_that_the_planner_chose_and_nobody_builds_is_refused(model, length, pins, told):
    shape = {"family": "opt", "num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 264, "max_position": 64}
    job = parse_job(
        {
            "version": 1,
            "name": "a",
            "model": shape | model,
            "batch": {"global_batch_size": 4, "sequence_length": length},
            "cluster": "a100-80gb-1x2",
            "strategy": pins,
        }
    )
    if not told:
        refuse_priced(plan(job, top=0))
        return
    with pytest.raises(RunRefused, match=told):
        refuse_priced(plan(job, top=0))


def test_all_of_a_job_is_told_at_once():
    asked = {"recovery": {"on_oom": "replan", "on_loss_spike": "rollback"}, "targets": {"for": "5m"}}
    asked["data"] = {"train": ["a.jsonl"], "template": "alpaca"}
    base = {"version": 1, "name": "a", "model": "opt-125m", "batch": {"global_batch_size": 8, "sequence_length": 128}}
    with pytest.raises(SpecError) as refused:
        refuse_unbuilt(parse_job(base | asked))
    assert len(refused.value.errors) == 4
    refuse_unbuilt(parse_job(base))
    refuse_unbuilt(parse_job(base | {"recovery": {"on_oom": "stop", "on_lost_gpus": "stop"}, "task": "pretrain"}))


def test_compile_of_the_training_is_that_of_the_strategy():
    base = {"version": 1, "name": "a", "model": "opt-125m", "batch": {"global_batch_size": 8, "sequence_length": 128}}
    base["cluster"] = "a100-80gb-1x1"
    assert plan(parse_job(base | {"training": {"compile": True}}), top=0).strategy.compile
    assert not plan(parse_job(base | {"training": {"compile": False}}), top=0).strategy.compile
    with pytest.raises(SpecError, match="contradict each other"):
        parse_job(base | {"training": {"compile": True}, "strategy": {"compile": False}})
