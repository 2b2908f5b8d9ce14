"""What `run` tells a person before it trains and after it ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.cli.foreground import say, summary
from orchestrator.cli.screen import Screen
from orchestrator.control.folder import RunFolder
from orchestrator.control.run import RunResult
from orchestrator.control.supervisor import Ending
from orchestrator.planner.plan import plan
from orchestrator.spec import parse_job
from orchestrator.training.manifest import MANIFEST

JOB = {
    "version": 1,
    "name": "told",
    "model": "opt-125m",
    "batch": {"global_batch_size": 64, "sequence_length": 1024},
    "training": {"steps": 1000},
    "cluster": "a100-80gb-1x1",
}


@pytest.mark.parametrize("ending", ["failed", "lost"])
def test_a_run_without_a_whole_checkpoint_is_not_told_to_go_on_from_one(tmp_path: Path, capsys, ending):
    folder = RunFolder(tmp_path / "told")
    torn = folder.checkpoints / "step-00000010"
    torn.mkdir(parents=True)
    (torn / MANIFEST).write_text("{")
    result = RunResult(
        folder=folder, ending=Ending(kind=ending, step=0, cause="it broke"), num_steps=1000, metrics_url=None
    )
    told = summary(result, parse_job(JOB))
    assert told["checkpoint_step"] is None
    say(told, "job.yaml")
    err = capsys.readouterr().err
    assert "it broke" in err
    assert "`shardwise run job.yaml` starts over: no checkpoint is whole" in err


def test_a_run_with_a_whole_checkpoint_goes_on_after_its_step(capsys):
    told = {
        "ending": "failed",
        "cause": "it broke",
        "step": 12,
        "steps": 1000,
        "checkpoint_step": 10,
        "directory": "runs/told",
        "loss": None,
    }
    say(told, "job.yaml")
    assert "`shardwise run job.yaml` goes on after step 10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (
            {"tokens_per_second_per_gpu": 1e9},
            "missed    tokens_per_second_per_gpu: wanted 1,000,000,000, the plan gets",
        ),
        ({"finish_within": "1m"}, "missed    finish_within: wanted 60 s, the plan gets"),
        ({"budget_usd": 0.01}, "missed    budget_usd: wanted $0, the plan gets $"),
        ({"finish_within": "900d"}, None),
    ],
)
def test_a_target_that_the_plan_misses_is_told_before_the_run(tmp_path: Path, capfd, targets, told):
    job = parse_job(JOB | {"targets": targets})
    with Screen(job, to_stderr=True) as screen:
        screen.planned(plan(job, top=0), RunFolder(tmp_path / "told"), 0)
    err = capfd.readouterr().err
    assert ("missed" in err) is (told is not None)
    assert told is None or told in err
