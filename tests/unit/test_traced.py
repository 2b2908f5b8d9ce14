"""--trace: the step played in a child process, beside the closed form; what cannot be played is said."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from orchestrator.cli import main
from orchestrator.planner.plan import plan
from orchestrator.planner.problem import PlanError
from orchestrator.planner.show.text import trace_told
from orchestrator.planner.trace import child as traced
from orchestrator.spec import parse_job
from strategies.rooms import without_effect
from strategies.strategy import Strategy

TINY = {
    "family": "opt",
    "num_layers": 3,
    "hidden_size": 64,
    "num_heads": 4,
    "ffn_size": 256,
    "vocab_size": 512,
    "max_position": 128,
}


def made(**strategy):
    return plan(
        parse_job(
            {
                "version": 1,
                "name": "traced",
                "model": TINY,
                "batch": {"global_batch_size": 8, "sequence_length": 64},
                "cluster": "a100-80gb-1x8",
                "strategy": {"micro_batch_size": 1, "data_parallel_degree": 8, **strategy},
            }
        ),
        top=0,
    )


def test_a_trace_runs_apart_and_stands_beside_the_closed_form():
    told = traced.with_trace(made(zero_stage=2, zero_group_size=8)).to_dict()["trace"]
    assert told["built"]
    assert told["tensor_peak_bytes"] == sum(told["components"].values())
    assert told["tensor_peak_bytes"] <= told["closed_form_bytes"]
    assert told["flops"] > 0
    assert told["collective_bytes"]["reduce_scatter"] > 0
    json.dumps(told)


@pytest.mark.parametrize("more", [-5, 0, 1 << 30])
def test_the_plan_takes_the_larger_of_trace_and_closed_form(monkeypatch, more):
    before = made(zero_stage=1, zero_group_size=8)
    closed = before.price.memory.stages[0].tensor_peak_bytes
    told = dict.fromkeys(traced.OF_STAGE) | {"pipeline_rank": 0, "tensor_peak_bytes": closed + more, "seconds": 1.0}
    monkeypatch.setattr(traced, "_child", lambda plan, ranks: [told])
    after = traced.with_trace(before).price.memory
    stage = after.stages[0]
    assert stage.tensor_peak_bytes == closed + max(0, more)
    assert after.peak_bytes == stage.peak_bytes
    assert after.peak_bytes - before.price.memory.peak_bytes >= max(0, more)
    parts = (name for name in stage.__dataclass_fields__ if name not in ("pipeline_rank", "peak_phase"))
    sizes = {name: getattr(stage, name) for name in parts}
    assert sum(sizes.values()) - sizes["tensor_peak_bytes"] == 2 * stage.peak_bytes, "the components sum to the peak"


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (
            {"zero_stage": 3, "offload": {"optimizer": "host", "parameters": "host"}},
            "both places are one memory",
        ),
        ({"states": "mixed_fp32_accumulators"}, "native engine keeps"),
    ],
)
def test_what_cannot_be_played_is_said_and_the_closed_form_stands(strategy, reason):
    before = made(**strategy)
    after = traced.with_trace(before)
    assert not after.trace["built"]
    assert reason in after.trace["reason"]
    assert after.price.memory == before.price.memory
    assert "not traced" in trace_told(after.trace)[0]


def test_a_trace_that_fails_is_a_clear_error(monkeypatch):
    def broken(*_, **__):
        return subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nImportError: no torch here")

    monkeypatch.setattr(subprocess, "run", broken)
    with pytest.raises(PlanError, match="the trace failed: ImportError: no torch here"):
        traced.with_trace(made())


def test_a_trace_that_hangs_is_a_clear_error(monkeypatch):
    def hangs(*_, **__):
        raise subprocess.TimeoutExpired("trace", 300)

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(PlanError, match="more than 300 s"):
        traced.with_trace(made())


def test_asking_for_a_trace_keeps_torch_out_of_this_process():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from orchestrator.cli import main\n"
        "main(['estimate', '--model', 'gpt3-125m', '--cluster', 'a100-80gb-1x8', '--tensor', '2', '--trace', '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert '"built": true' in done.stdout, done.stderr


def test_estimate_prints_the_trace(capsys):
    flags = ["--model", "opt-125m", "--cluster", "a100-80gb-1x8", "--zero", "3"]
    assert main(["estimate", *flags, "--trace"]) == 0
    assert "the plan holds the larger" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "states", "noted"),
    [
        (0, "mixed", True),
        (1, "mixed", True),
        (2, "mixed", True),
        (2, "sharded_fp32", False),
        (3, "sharded_fp32", False),
    ],
)
def test_gathering_once_a_step_matters_wherever_parameters_are_sharded(stage, states, noted):
    strategy = Strategy(
        data_parallel_degree=4,
        zero_stage=stage,
        zero_group_size=4 if stage else 1,
        states=states,
        gather="per_step",
        gradient_accumulation_steps=4,
    )
    assert any("gather" in rule.fields for rule in without_effect(strategy)) == noted
    assert without_effect(replace(strategy, gather="per_micro_batch")) == []
