"""Records become rows of packed samples, and a worker learns from them: answers, rewards, preferences."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.spec import parse_job
from orchestrator.training.assignment import Assignment
from orchestrator.training.data import DataError
from orchestrator.training.examples import Message
from orchestrator.training.prepare import prepare_job
from orchestrator.training.rows import open_rows
from orchestrator.training.templates import PlainTemplate
from orchestrator.training.tokenizer import load_saved, train_bpe
from tests.unit.test_training import JOB, run, strategy

LENGTH = 600
QUESTIONS = [f"add {a} and {a + 1}" for a in range(30)]


def job_of(folder: Path, task: str, records: list[dict], **data) -> dict:
    (folder / "records.json").write_text(json.dumps(records, indent=0))
    return {
        **JOB,
        "task": task,
        "model": {**JOB["model"], "max_position": LENGTH},
        "data": {"train": ["records.json"], "validation": 0.2, **data},
        "batch": {"global_batch_size": 4, "sequence_length": LENGTH},
        "training": {**JOB["training"], "steps": 4},
        "checkpoint": {"every": 2, "keep": 5},
    }


def prepared(folder: Path, mapping: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return prepare_job(parse_job(mapping, directory=folder))


def answers() -> list[dict]:
    return [{"prompt": q, "chosen": str(2 * a + 1), "rejected": "?" * (1 + a % 3)} for a, q in enumerate(QUESTIONS)]


def assignment_of(folder: Path, mapping: dict, data_directory: Path) -> Assignment:
    return Assignment(
        job=mapping,
        job_directory=str(folder),
        strategy=replace(strategy(1), gradient_accumulation_steps=2),
        rank=0,
        world_size=1,
        run_directory=str(folder / "run"),
        data_directory=str(data_directory),
        peak_flops=1e12,
    )


def test_only_answers_are_learned_and_every_example_is_in_a_row(tmp_path, monkeypatch):
    records = [{"instruction": q, "input": "", "output": f"<{a}>"} for a, q in enumerate(QUESTIONS)]
    mapping = job_of(tmp_path, "sft", records)
    index = prepared(tmp_path, mapping, monkeypatch)
    train, validation = open_rows(index.directory, LENGTH)
    learned = set()
    for dataset in (train, validation):
        rows = np.arange(len(dataset))
        inputs, targets = dataset.sequences(rows)
        segments = dataset.inputs(rows)["segment_ids_BS"]
        assert dataset.num_targets(rows) == (targets != -100).sum()
        for row in rows:
            for segment in range(segments[row].max() + 1):
                mine = targets[row][(segments[row] == segment) & (targets[row] != -100)]
                if len(mine):
                    assert mine[-1] == 256, "the end of the text is learned"
                    learned.add(bytes(mine[:-1].tolist()).decode())
        assert bytes(inputs[0][:5].tolist()) == b"Below"
    assert learned == {record["output"] for record in records}
    assert (len(train) + len(validation)) * LENGTH < 1.5 * sum(
        source.num_tokens["train"] for source in index.sources
    ) + 2 * LENGTH
    assert prepared(tmp_path, mapping, monkeypatch) == index, "the same rows are used again"


def test_bad_records_stop_or_are_left_out_and_told(tmp_path, monkeypatch):
    records = [*answers(), {"prompt": "q", "chosen": "x" * 700, "rejected": "y"}, {"prompt": "q"}]
    mapping = job_of(tmp_path, "dpo", records)
    with pytest.raises(DataError, match=r"1 bad record \(1 wrong fields\)\n  .*records\.json:\d+: has keys prompt"):
        prepared(tmp_path, mapping, monkeypatch)
    mapping["data"]["on_bad"] = "skip"
    index = prepared(tmp_path, mapping, monkeypatch)
    assert "1 bad record (1 wrong fields)" in index.report
    assert "1 bad record (1 too long)" in index.report
    with pytest.raises(DataError, match=r"the rows in .* have 600 tokens, and batch\.sequence_length is 96"):
        open_rows(index.directory, 96)


def test_a_bpe_is_trained_on_the_texts_of_records(tmp_path, monkeypatch):
    mapping = job_of(
        tmp_path, "sft", [{"instruction": q, "output": "because it is so"} for q in QUESTIONS], tokenizer={"bpe": 263}
    )
    index = prepared(tmp_path, mapping, monkeypatch)
    assert index.tokenizer["vocab_size"] == 263
    ids = load_saved(index.directory, index.tokenizer).encode_batch(["because"])[0]
    assert len(ids) < len("because")
    assert prepared(tmp_path, mapping, monkeypatch) == index, "the same rows are used again"


def test_the_plain_template_writes_the_turns_alone():
    turns = (Message(role="user", content="add", context="1 2"), Message(role="assistant", content="3"))
    pieces = PlainTemplate().pieces((*turns, Message(role="user", content="and 4?")))
    assert [(piece.text, piece.learn) for piece in pieces] == [
        ("add\n1 2\n", False),
        ("3", True),
        ("\nand 4?\n", False),
    ]


def test_another_chat_template_makes_other_rows(tmp_path, monkeypatch):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    train_bpe(iter(QUESTIONS * 20), 260).save(folder)
    template = folder / "chat_template.jinja"
    written = "{% for message in messages %}SPACE{{ message.content }}{% endfor %}"
    mapping = job_of(tmp_path, "dpo", answers(), tokenizer="tokenizer")
    texts = []
    for space in (" ", "-"):
        template.write_text(written.replace("SPACE", space))
        index = prepared(tmp_path, mapping, monkeypatch)
        inputs, _ = open_rows(index.directory, LENGTH)[0].sequences(np.array([0]))
        texts.append(load_saved(index.directory, index.tokenizer).decode(inputs[0].tolist()))
    assert "-add" in texts[1]
    assert "-add" not in texts[0]


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_a_worker_learns_which_answer_is_preferred_and_goes_on_bit_for_bit(tmp_path, monkeypatch, task):
    mapping = job_of(tmp_path, task, answers())
    mapping["training"] = {**mapping["training"], "steps": 6, "schedule": {"name": "constant", "warmup_steps": 0}}
    index = prepared(tmp_path, mapping, monkeypatch)
    assignment = assignment_of(tmp_path, mapping, index.directory)
    outcome, reports, events = run(assignment)
    assert outcome.kind == "finished"
    assert reports[0].loss == pytest.approx(math.log(2), abs=1e-6 if task == "dpo" else 0.2)
    assert reports[-1].loss < reports[0].loss
    (evaluation,) = [event for event in events if event.kind == "evaluation"]
    assert 0 <= evaluation.details["metrics"]["accuracy"] <= 1
    assert "accuracy" in evaluation.cause
    if task == "dpo":
        references = sorted((tmp_path / "run").glob("reference-*.npy"))
        assert len(references) == 2, "of train and of validation"
        references[0].unlink()  # worked out again from the first weights, not from the checkpoint's
    step_2 = tmp_path / "run" / "checkpoints" / "step-00000002"
    _, again, _ = run(replace(assignment, resume_from=str(step_2)))
    assert [report.loss for report in again] == [report.loss for report in reports[2:]]


def test_a_reward_model_is_not_sampled_and_not_converted(tmp_path, monkeypatch, capsys):
    from orchestrator.cli import main

    mapping = job_of(tmp_path, "reward", answers())
    index = prepared(tmp_path, mapping, monkeypatch)
    run(assignment_of(tmp_path, mapping, index.directory))
    for command in (["generate", str(tmp_path / "run")], ["convert", str(tmp_path / "run"), str(tmp_path / "hf")]):
        assert main(command) == 2
        assert "is of a reward model, which gives a number and no text" in capsys.readouterr().err
