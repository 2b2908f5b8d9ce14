"""A chain is read as its links' jobs, each from what an earlier one leaves; every verb says what it does of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.cli.chain import run_chain
from orchestrator.spec import Job, SpecError, parse_job
from orchestrator.spec.chain import Chain, load

TEXT = """version: 1
name: small-chat
cluster: a100-80gb-1x1
batch: {global_batch_size: 8, sequence_length: 128}
chain:
  - name: sft
    task: sft
    model: opt-125m
    training: {steps: 10}
    data: {train: [a.jsonl], tokenizer: {bpe: 3000}}
  - name: reward
    task: reward
    from: sft
    training: {steps: 20}
    data: {train: [pairs.jsonl]}
  - name: ppo
    task: ppo
    from: sft
    ppo:
      reward: {from: reward}
      critic: {from: reward}
    batch: {global_batch_size: 4, sequence_length: 64}
    training: {steps: 30}
    data: {train: [prompts.jsonl]}
"""


def written(folder: Path, text: str = TEXT) -> str:
    for name in ("a.jsonl", "pairs.jsonl", "prompts.jsonl"):
        (folder / name).touch()
    (folder / "chain.yaml").write_text(text)
    return str(folder / "chain.yaml")


def test_the_links_are_jobs_that_start_from_earlier_ones(tmp_path):
    chain = load(written(tmp_path), directory=tmp_path / "runs")
    assert isinstance(chain, Chain)
    sft, reward, ppo = chain.links
    runs = tmp_path / "runs" / "small-chat"
    assert chain.runs == runs
    assert (sft.name, reward.name, ppo.name) == ("sft", "reward", "ppo")
    assert reward.model.name == ppo.model.name == "opt-125m"
    assert reward.model.checkpoint == ppo.model.checkpoint == str(runs / "sft")
    assert ppo.ppo.reward.checkpoint == ppo.ppo.critic.checkpoint == str(runs / "reward")
    assert (sft.batch.global_batch_size, ppo.batch.global_batch_size) == (8, 4)
    assert [job.cluster for job in chain.links] == ["a100-80gb-1x1"] * 3
    assert chain.sources == ((), ("sft",), ("reward", "sft"))
    assert all(parse_job(job.to_mapping(), directory=tmp_path) == job for job in chain.links)


def test_a_job_without_links_is_a_job(tmp_path):
    text = "version: 1\nname: a\nmodel: opt-125m\nbatch: {global_batch_size: 8, sequence_length: 128}\n"
    assert isinstance(load(written(tmp_path, text)), Job)


REFUSED = {
    "no earlier link": (("from: sft\n    training: {steps: 20}", "from: sfd\n    training: {steps: 20}"), "13:11",
        "`from` is 'sfd', which is no earlier link of the chain", "did you mean sft?"),
    "a later link": (("model: opt-125m", "from: ppo"), "8:11", "`from` is 'ppo', which is no earlier link", "earlier"),
    "a role from nowhere": (("critic: {from: reward}", "critic: {from: rewards}"), "21:22", "'rewards'", "mean reward?"),
    "twice a model": (("from: sft\n    ppo", "from: sft\n    model: opt-125m\n    ppo"), "18:11",
        "a link has `model` and `from`", "keep one"),
    "twice a name": (("name: reward", "name: sft"), "11:11", "two links are called sft", "of its own"),
    "an unknown key of a link": (("{steps: 20}", "{step: 20}"), "14:16", "unknown key `step`", "did you mean `steps`?"),
    "an unknown key of all": (("cluster:", "clutser:"), "3:1", "unknown key `clutser`", "did you mean `cluster`?"),
    "no list": (("chain:", "chain: 3\nrest:"), "5:8", "`chain` is no list of links", "chain: [{name: sft"),
    "a folder of its own": (("steps: 10}", "steps: 10}\n    checkpoint: {directory: elsewhere}"), "10:29",
        "`checkpoint.directory` of a link", "at the top"),
    "a pipeline for ppo": (("cluster: a100-80gb-1x1", "cluster: a100-80gb-1x8\nstrategy: {pipeline_parallel_degree: 2}"),
        "4:38", "task ppo refuses pipelines", "leave it out"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "place", "message", "fix"), REFUSED.values(), ids=REFUSED)
def test_a_fault_of_a_link_is_told_with_its_place_and_fix(tmp_path, change, place, message, fix):
    assert change[0] in TEXT
    file = written(tmp_path, TEXT.replace(*change))
    with pytest.raises(SpecError) as refused:
        load(file)
    found = [error for error in refused.value.errors if message in error["message"]]
    assert len(found) == 1, refused.value.errors
    assert f"{found[0]['line']}:{found[0]['column']}" == place
    assert fix in found[0]["fix"]


def test_validate_says_the_order_and_what_is_not_here(tmp_path, capsys):
    file = written(tmp_path)
    (tmp_path / "prompts.jsonl").unlink()
    assert main(["validate", file]) == 0
    told = capsys.readouterr().out
    assert "small-chat: sft (sft), then reward (reward from sft), then ppo (ppo from reward and sft)" in told
    assert told.count("note:") == 1, "what a link makes is not missed"
    assert f"{tmp_path}/prompts.jsonl does not exist" in told
    assert main(["validate", file, "--json"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert TEXT.splitlines()[note["line"] - 1].strip() == "data: {train: [prompts.jsonl]}"


def test_plan_prices_each_link_and_all_together(tmp_path, capsys):
    file = written(tmp_path)
    assert main(["plan", file]) == 0
    told = capsys.readouterr().out
    assert "2 of 3: reward, from what sft left" in told
    assert "3 of 3: ppo, from what reward and sft left" in told
    assert main(["plan", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [link["job"]["name"] for link in found["links"]] == ["sft", "reward", "ppo"]
    assert found["cost"]["wall_s"] == pytest.approx(sum(link["cost"]["wall_s"] for link in found["links"]))


def test_a_verb_that_takes_one_job_says_so(tmp_path, capsys):
    assert main(["prepare", written(tmp_path)]) == 2
    assert "`chain` makes this file a chain of jobs, and one job is wanted here" in capsys.readouterr().err


def test_run_refuses_a_later_link_before_the_first_begins(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("orchestrator.control.run.Early", None)  # whatever starts a process would raise
    file = written(tmp_path, TEXT.replace("training: {steps: 30}", "training: {precision: fp32}"))
    assert main(["run", file, "--directory", str(tmp_path / "runs")]) == 2
    assert "link ppo: the job says no length" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_status_shows_links_that_have_not_begun(tmp_path, capsys, monkeypatch):
    chain = load(written(tmp_path), directory=tmp_path / "runs")
    monkeypatch.setattr("orchestrator.cli.foreground.run_one", lambda job, **_: {"exit_code": 1, "ending": "failed"})
    assert run_chain(chain, fresh=False, metrics_port=None, as_json=True) == 1
    capsys.readouterr()
    for arguments in (["status", "small-chat"], ["status"]):
        assert main([*arguments, "--directory", str(tmp_path / "runs"), "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [(row["name"], row["state"], row["steps"]) for row in rows] == [
            ("small-chat/sft", "not begun", 10),
            ("small-chat/reward", "not begun", 20),
            ("small-chat/ppo", "not begun", 30),
        ]
    assert main(["status", "small-chat", "--directory", str(tmp_path / "runs")]) == 0
    assert "small-chat/reward" in capsys.readouterr().out


def test_an_example_reads_as_a_chain():
    chain = load(Path(__file__).parents[2] / "examples" / "chatgpt-mini.yaml")
    assert [job.task for job in chain.links] == ["sft", "reward", "ppo"]
    assert chain.links[2].ppo.response_tokens(chain.links[2].batch.sequence_length) == 32
