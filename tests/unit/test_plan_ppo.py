"""The plan of task ppo: four models, who is where, and a step with all of them."""

from __future__ import annotations

import json

import pytest

from orchestrator.cli import main
from orchestrator.planner.plan import plan
from orchestrator.planner.show.text import render
from orchestrator.spec import SpecError, parse_job


def made(model="opt-1.3b", *, cluster="a100-80gb-1x8", **more):
    job = {
        "version": 1,
        "name": "chat",
        "task": "ppo",
        "model": model,
        "batch": {"global_batch_size": 256, "sequence_length": 512},
        "training": {"steps": 100},
        "ppo": {"reward": {"name": "opt-350m"}, "response_length": 256},
        "cluster": cluster,
    }
    return plan(parse_job(job | more), top=0)


def test_a_plan_of_ppo_names_four_models_and_counts_all_of_them():
    found = made()
    told = found.to_dict()
    assert [(role["role"], role["model"], role["trained"]) for role in told["roles"]] == [
        ("actor", "opt-1.3b", True),
        ("critic", "opt-350m", True),
        ("reference", "opt-1.3b", False),
        ("reward", "opt-350m", False),
    ]
    assert set(told["roles"][0]) == {"role", "model", "trained", "strategy", "residence", "bytes"}
    assert told["fits"]
    assert told["ppo"]["peak_bytes"] > told["memory"]["peak_bytes"], "beside the actor's training stand three models"
    assert told["ppo"]["step_s"] > told["time"]["step_s"]
    assert told["cost"]["wall_s"] == pytest.approx(100 * told["ppo"]["step_s"])
    text = render(found)
    assert "reference" in text
    assert "a step takes" in text


def test_other_tasks_have_no_roles():
    job = {"version": 1, "name": "a", "model": "opt-1.3b", "batch": {"global_batch_size": 8, "sequence_length": 512}}
    assert "roles" not in plan(parse_job(job | {"cluster": "a100-80gb-1x8"}), top=0).to_dict()


def test_a_model_whose_training_fits_and_whose_rlhf_does_not_is_laid_out_anew():
    """OPT-13B on eight A100-40GB: whole frozen models leave no room for training without offload."""
    found = made("opt-13b", cluster="a100-40gb-1x8")
    assert found.fits
    assert found.ppo.fits
    assert found.ppo.layout.choice.zero == found.strategy.zero_stage


def test_what_cannot_fit_does_not():
    assert not made("opt-66b", cluster="a100-40gb-1x1").fits


def test_pipelines_are_refused_with_the_reason():
    with pytest.raises(SpecError, match="token by token"):
        made(strategy={"pipeline_parallel_degree": 2})


def test_capacity_tells_which_actor_fits_ppo_on_how_many_gpus(capsys):
    asked = ["capacity", "--model", "opt-13b", "--gpu", "a100-40gb", "--gpus", "1,8", "--sequence-length", "512"]
    assert main([*asked, "--rlhf", "opt-350m", "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [(cell["num_gpus"], cell["fits"]) for cell in cells] == [(1, False), (8, True)]
