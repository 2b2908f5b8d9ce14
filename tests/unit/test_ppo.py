"""Task ppo: responses are written as without a cache, a run raises its reward, and neither a stop nor a split changes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.models.architecture import make_architecture
from orchestrator.models.decoder import Decoder, initialize
from orchestrator.spec import SpecError, parse_job
from orchestrator.training.assignment import Assignment
from orchestrator.training.inputs import request_of
from orchestrator.training.manifest import fingerprint, latest
from orchestrator.training.ppo.rollouts import Rows, drawn, log_probs, respond, scores, uniforms
from orchestrator.training.prepare import prepare
from orchestrator.training.reader import Reader
from strategies.strategy import Strategy
from tests.ranks import spawn
from tests.unit.test_training import free_ports, run

SHAPE = {"num_layers": 2, "hidden_size": 24, "num_heads": 4, "ffn_size": 48, "vocab_size": 264, "max_position": 32}
LENGTH, RESPONSE = 24, 10
JOB = {
    "version": 1,
    "name": "tiny",
    "task": "ppo",
    "model": {"family": "opt", **SHAPE},
    "data": {"train": ["prompts.jsonl"], "validation": 0.3, "template": "plain"},
    "batch": {"global_batch_size": 20, "sequence_length": LENGTH},
    "training": {
        "steps": 4,
        "precision": "fp64",
        "seed": 5,
        "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.0},
        "schedule": {"name": "constant", "warmup_steps": 0},
    },
    "ppo": {
        "reward": {"family": "opt", **SHAPE, "num_layers": 1},
        "critic": {"family": "llama", **SHAPE, "num_layers": 3, "num_kv_heads": 2},
        "response_length": RESPONSE,
        "epochs": 2,
        "minibatches": 2,
        "kl": {"coefficient": 0.02, "target": 0.5, "horizon": 200},
    },
    "checkpoint": {"every": 2, "keep": 5},
}


def prepared(folder: Path, mapping=JOB) -> str:
    lines = [json.dumps({"prompt": f"{word} {number}"}) for number in range(9) for word in ("say", "tell me", "and")]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return str(prepare(request_of(parse_job(mapping, directory=folder)), directory=folder / "data").directory)


def strategy(data=1, tensor=1, zero=0, micro=3, **fields) -> Strategy:
    return Strategy(
        data_parallel_degree=data,
        tensor_parallel_degree=tensor,
        zero_stage=zero,
        zero_group_size=data if zero else 1,
        states="full",
        micro_batch_size=micro,
        gradient_accumulation_steps=-(-10 // (data * micro)),
        **fields,
    )


def assignment_of(folder: Path, mapping=JOB, *, into: str = "run", split: Strategy | None = None) -> Assignment:
    split = split or strategy()
    return Assignment(
        job=mapping,
        job_directory=str(folder),
        strategy=split,
        rank=0,
        world_size=split.num_gpus,
        run_directory=str(folder / into),
        data_directory=prepared(folder, mapping),
    )


# Writing -------------------------------------------------------------------------------------------------------------


def model_of(family: str, **changes) -> Decoder:
    arch = make_architecture(family=family, **{**SHAPE, **changes})
    model = Decoder(arch).double()
    initialize(model, arch, 3)
    with torch.no_grad():  # first weights are near zero: every token would be as likely
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model.requires_grad_(False)


@pytest.mark.parametrize("family", ["opt", "llama", "bloom", "gpt", "mpt"])
def test_a_batch_of_responses_is_what_each_prompt_gets_alone_without_a_cache(family):
    """Rows of different lengths, cached keys and an early end change no token."""
    model, end, count = model_of(family), 9, 5
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([3, 7, 1, 12, 7])
    prompts = torch.randint(0, 256, (count, 12), generator=generator)
    noise = uniforms(7, 3, np.arange(count), RESPONSE)
    noise[1, 4:] = 0.0
    rows = respond(
        model, prompts, lengths, response_length=RESPONSE, sequence_length=LENGTH, vocab_size=257, end_of_text=end,
        noise_BR=noise,
    )  # fmt: skip
    for row in range(count):
        ids = prompts[row, : lengths[row]].tolist()
        expected = list(ids)
        for number in range(RESPONSE):
            logits = model(torch.tensor([expected]))[0, -1:, :257]
            expected.append(int(drawn(logits, torch.tensor([noise[row, number]]))))
            if expected[-1] == end:
                break
        assert rows.lengths_B[row] == len(expected)
        assert rows.input_ids_BS[row].tolist() == expected + [end] * (LENGTH - len(expected))
        written = expected[len(ids) :]
        assert rows.target_ids_BS[row][rows.written_BS[row]].tolist() == written
        log_p = model(torch.tensor([expected]))[0].log_softmax(-1)
        wanted = [float(log_p[len(ids) - 1 + place, token]) for place, token in enumerate(written)]
        found = log_probs(model, rows)[row][rows.written_BS[row]]
        np.testing.assert_allclose(found, wanted, atol=1e-10)


def test_a_response_ends_with_the_end_of_the_text_and_counts_it():
    model, lengths = model_of("opt"), torch.tensor([2, 2])
    prompts = torch.tensor([[5, 6], [7, 8]])
    first = int(drawn(model(prompts[:1])[0, -1:, :257], torch.tensor([0.5])))
    rows = respond(
        model, prompts, lengths, response_length=4, sequence_length=8, vocab_size=257, end_of_text=first,
        noise_BR=np.full((2, 4), 0.5),
    )  # fmt: skip
    assert rows.lengths_B[0] == 3
    assert rows.target_ids_BS[0].tolist() == [-100, first, *[-100] * 6]


def test_a_response_is_scored_at_its_last_token():
    arch = make_architecture(family="opt", **SHAPE)
    model = Decoder(arch, values=True)
    initialize(model, arch, 1)
    model.requires_grad_(False)
    ids = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(0))
    rows = Rows(input_ids_BS=ids, prompt_lengths_B=torch.tensor([2, 3]), lengths_B=torch.tensor([5, 8]))
    expected = [float(model(ids[:1, :5])[0, -1]), float(model(ids[1:])[0, -1])]
    np.testing.assert_allclose(scores(model, rows), expected, atol=1e-6)


def test_noise_is_a_function_of_seed_step_row_and_position():
    whole = uniforms(3, 7, np.arange(40), 50)
    assert ((whole >= 0) & (whole < 1)).all()
    assert len(np.unique(whole)) == whole.size
    assert abs(whole.mean() - 0.5) < 0.03
    assert (uniforms(3, 7, np.array([11, 4]), 9) == whole[[11, 4], :9]).all(), "whatever else is written beside it"
    for other in (uniforms(4, 7, np.arange(40), 50), uniforms(3, 8, np.arange(40), 50)):
        assert not np.isin(whole, other).any()


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([[0.0, 2.0, -1.0, 1.0]])
    noise = torch.from_numpy(uniforms(0, 1, np.arange(4000), 1)[:, 0])
    found = drawn(logits.expand(len(noise), -1), noise).bincount(minlength=4) / len(noise)
    np.testing.assert_allclose(found, logits.softmax(-1)[0], atol=0.02)
    assert int(drawn(torch.tensor([[1.0, float("-inf")]]), torch.tensor([1 - 2.0**-53], dtype=torch.float64))) == 0


# A run ---------------------------------------------------------------------------------------------------------------


def numbers(reports):
    return [(report.loss, report.gradient_norm, dict(report.metrics)) for report in reports]


def test_a_run_goes_on_bit_for_bit_where_it_stopped(tmp_path):
    """In the middle of an adapted KL coefficient and of the statistics of rewards."""
    assignment = assignment_of(tmp_path)
    outcome, reports, events = run(assignment)
    assert (outcome.kind, outcome.step) == ("finished", 4)
    coefficients = [report.metrics["kl_coefficient"] for report in reports]
    assert len(set(coefficients)) == 4, "it is adapted"
    assert all(report.metrics["kl"] != 0 for report in reports[1:])
    assert reports[0].metrics["kl"] == pytest.approx(0, abs=1e-9), "the reference is the actor's first weights"
    (evaluation,) = [event for event in events if event.kind == "evaluation"]
    assert evaluation.details["metrics"].keys() == {"reward", "reference_reward", "win_rate", "kl"}
    step_2 = tmp_path / "run" / "checkpoints" / "step-00000002"
    _, again, told = run(replace(assignment, resume_from=str(step_2)))
    assert numbers(again) == numbers(reports[2:])
    assert [event.details["metrics"] for event in told if event.kind == "evaluation"] == [evaluation.details["metrics"]]


def test_a_run_raises_its_reward(tmp_path):
    optimizer = {"learning_rate": 1e-2, "weight_decay": 0.0}
    training = {**JOB["training"], "steps": 15, "precision": "fp32", "optimizer": optimizer}
    mapping = {**JOB, "training": training, "batch": {"global_batch_size": 64, "sequence_length": LENGTH}}
    mapping["ppo"] = {**JOB["ppo"], "response_length": 2, "epochs": 3, "minibatches": 1, "kl": {"coefficient": 0.001}}
    _, reports, events = run(assignment_of(tmp_path, mapping, split=strategy(micro=64)))
    rewards = [report.metrics["reward"] for report in reports]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 4 * np.std(rewards[:3])
    (evaluation,) = [event for event in events if event.kind == "evaluation"]
    found = evaluation.details["metrics"]
    assert found["reward"] > found["reference_reward"]
    assert found["win_rate"] > 0.6
    assert found["kl"] > 0


def _rank(rank: int, assignments: list[Assignment], ports: list[int]) -> None:
    for assignment, port in zip(assignments, ports, strict=True):
        outcome, reports, _ = run(replace(assignment, rank=rank, master_port=port))
        assert outcome.kind == "finished", outcome.cause
        if rank == 0:
            told = [[report.loss, report.gradient_norm, report.metrics] for report in reports]
            Path(f"{assignment.run_directory}.json").write_text(json.dumps(told))


SPLITS = {
    "data": strategy(2),
    "ZeRO 1": strategy(2, zero=1, micro=1),
    "ZeRO 2": strategy(2, zero=2, micro=2),
    "ZeRO 3": strategy(2, zero=3, activation_checkpointing="full"),
    "tensor": strategy(1, tensor=2),
    "sequence": strategy(1, tensor=2, sequence_parallel=True),
}


def test_every_split_of_the_models_learns_the_same(tmp_path):
    """The same responses and the same losses, in fp64, whoever holds which part of actor and critic."""
    mapping = {**JOB, "training": {**JOB["training"], "steps": 2}, "checkpoint": {"every": 1000}}
    _, alone, _ = run(assignment_of(tmp_path, mapping))
    split = [assignment_of(tmp_path, mapping, into=name, split=each) for name, each in SPLITS.items()]
    spawn(_rank, split, free_ports(len(split)), world_size=2)
    for assignment in split:
        told = json.loads(Path(f"{assignment.run_directory}.json").read_text())
        for (loss, norm, metrics), report in zip(told, alone, strict=True):
            found, wanted = {"loss": loss, "norm": norm, **metrics}, {"loss": report.loss, "norm": report.gradient_norm}
            assert found == pytest.approx(wanted | dict(report.metrics), rel=1e-9, abs=1e-9), assignment.run_directory


def test_a_checkpoint_of_another_run_is_where_a_model_starts_from(tmp_path):
    """The actor of one run becomes the actor of the next: its tokenizer comes along, and another one is refused."""
    first = assignment_of(tmp_path)
    run(first)
    mapping = {**JOB, "name": "next", "model": {"checkpoint": "run"}, "training": {**JOB["training"], "steps": 1}}
    assert parse_job(mapping, directory=tmp_path).architecture == parse_job(JOB, directory=tmp_path).architecture
    second = assignment_of(tmp_path, mapping, into="next")
    _, reports, _ = run(second)
    trained = Reader(latest(tmp_path / "run" / "checkpoints", report=lambda event: None)).entries
    assert "critic.model.head.value.weight" in trained
    assert reports[0].metrics["kl"] == pytest.approx(0, abs=1e-9), "the reference is what the actor starts from"
    rewards = [
        steps_of[0].metrics["reward"]
        for steps_of in (reports, run(replace(first, run_directory=str(tmp_path / "r")))[1])
    ]
    assert rewards[0] != rewards[1], "the actor is another one"
    manifest = next((tmp_path / "run" / "checkpoints").glob("step-*4/manifest.json"))
    told = json.loads(manifest.read_text())
    del told["checksum"]
    told["data"]["tokenizer"] = "another"
    manifest.write_text(json.dumps(told | {"checksum": fingerprint(told)}))
    outcome, _, _ = run(second)
    assert outcome.kind == "failed"
    assert "model was trained with another tokenizer than this job's text is of" in outcome.cause


# The job -------------------------------------------------------------------------------------------------------------

REFUSED = {
    "no reward model": ({"ppo": None}, "`task` is ppo, and no `ppo` names the reward model"),
    "another task": ({"task": "sft"}, "`task` is sft, and only task ppo reads `ppo`"),
    "no room for a prompt": (
        {"ppo": {**JOB["ppo"], "response_length": LENGTH}},
        "`ppo.response_length` is 24, which leaves a prompt nothing",
    ),
    "pipeline": (
        {"strategy": {"pipeline_parallel_degree": 2}},
        "task ppo refuses pipelines: a response is written token by token through all layers",
    ),
    "minibatches": ({"ppo": {**JOB["ppo"], "minibatches": 21}}, "more than the 20 responses of a step"),
    "unknown reward model": (
        {"ppo": {"reward": {"name": "opt-1.4b"}}}, "model 'opt-1.4b' is not in the catalog",
    ),
    "a reward model that is not there": ({"ppo": {"reward": {"checkpoint": "runs/reward"}}}, "runs/reward holds no checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_job_that_cannot_be_is_refused_with_the_reason(tmp_path, changes, message):
    mapping = {key: value for key, value in {**JOB, **changes}.items() if value is not None}
    with pytest.raises(SpecError) as refused:
        parse_job(mapping, directory=tmp_path)
    assert message in str(refused.value)


def test_the_planner_chooses_no_pipeline_for_ppo():
    assert parse_job(JOB).pins["pipeline_parallel_degree"] == 1
