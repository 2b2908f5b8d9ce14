"""Sampling obeys its knobs, and the verb reads the run folder that a worker left."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from orchestrator.cli import main
from orchestrator.training.generate import choose, generate, load_model
from orchestrator.training.manifest import latest
from tests.unit.test_models import every_model, filled
from tests.unit.test_training import assignment, run

__all__ = ["assignment"]

LOGITS = torch.tensor([0.1, 0.6, 0.3]).log()


@pytest.mark.parametrize(
    ("temperature", "top_p", "wanted"),
    [
        (0, 1.0, {1: 300}),
        (1.0, 0.0, {1: 300}),
        (1.0, 0.6, {1: 300}),
        (1.0, 0.89, {1: 200, 2: 100}),
        (1.0, 1.0, {0: 30, 1: 180, 2: 90}),
        (100.0, 1.0, {0: 100, 1: 100, 2: 100}),
    ],
)
def test_tokens_are_drawn_from_the_nucleus_at_the_temperature(temperature, top_p, wanted):
    generator = torch.Generator().manual_seed(3)
    drawn = Counter(choose(LOGITS, temperature=temperature, top_p=top_p, generator=generator) for _ in range(300))
    assert drawn.keys() == wanted.keys()
    for token, count in wanted.items():
        assert drawn[token] == pytest.approx(count, abs=35)


def test_the_verb_goes_on_from_a_prompt_and_repeats_itself_by_seed(assignment, capsys):
    outcome, *_ = run(assignment)
    arguments = ["generate", assignment.run_directory, "--prompt", "abc", "--max-tokens", "20", "--json", "--seed"]
    told = []
    for seed in ("1", "1", "2"):
        assert main([*arguments, seed]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1]
    assert told[0]["text"] != told[2]["text"]
    assert (told[0]["step"], told[0]["checkpoint"]) == (8, outcome.checkpoint)
    assert told[0]["num_tokens"] == 20 or told[0]["ended"] == "end_of_text"
    # 8 steps teach that what comes next is below 61; a window of 16 positions does not end the text.
    model = load_model(latest(Path(assignment.run_directory) / "checkpoints", report=print))
    tokens = list(generate(model, [0, 7, 14], max_tokens=40, vocab_size=257, temperature=0))
    assert len(tokens) == 40
    assert max(tokens) < 61
    assert main(["generate", outcome.checkpoint, "--max-tokens", "3"]) == 0, "without a prompt: the start of a text"


@every_model
def test_keys_and_values_that_are_kept_change_no_token(arch):
    model = filled(arch).requires_grad_(False)
    prompt = [5, 61, 17]
    tokens = list(prompt)
    for _ in range(30):  # beyond the 24 positions too
        tokens.append(int(model(torch.tensor([tokens[-24:]]))[0, -1].argmax()))
    assert list(generate(model, prompt, max_tokens=30, vocab_size=96, temperature=0)) == tokens[3:]


def test_the_verb_takes_the_name_that_status_takes(assignment, capsys):
    outcome, *_ = run(assignment)
    folder = Path(assignment.run_directory)
    arguments = [folder.name, "--directory", str(folder.parent), "--max-tokens", "3", "--json"]
    assert main(["generate", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == outcome.checkpoint


def test_a_mistake_of_the_users_says_what_to_do(assignment, tmp_path, capsys):
    assert main(["generate", str(tmp_path / "nowhere")]) == 6
    assert "there is no run" in capsys.readouterr().err
    run(assignment)
    shutil.rmtree(Path(assignment.run_directory) / "tokenizer")
    assert main(["generate", assignment.run_directory]) == 2
    assert "holds no tokenizer" in capsys.readouterr().err
