"""The engine's own step on tensors that hold nothing: what it says is what the closed form and a count by hand say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.models.architecture import block_parameters, make_architecture, num_parameters
from orchestrator.planner.trace.play import _batches, trace
from strategies.pipeline.schedules import Action, orders
from strategies.strategy import Stage, Strategy

ARCH = make_architecture(
    family="opt", num_layers=3, hidden_size=64, num_heads=4, ffn_size=256, vocab_size=512, max_position=128
)


def strategy(zero_stage: int, ranks: int, layers: int = 3) -> Strategy:
    stage = Stage(
        stage=0, pipeline_rank=0, first_layer=0, num_layers=layers, num_checkpointed_layers=0, embedding=True, head=True
    )
    return Strategy(
        data_parallel_degree=ranks,
        zero_stage=zero_stage,
        zero_group_size=ranks if zero_stage else 1,
        states="mixed" if zero_stage < 2 else "sharded_fp32",
        micro_batch_size=2,
        stages=(stage,),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("zero_stage", "ranks"), [(0, 2), (1, 4), (2, 4), (3, 4)])
def test_states_are_sharded_as_the_zero_paper_says(zero_stage, ranks):
    played = trace(ARCH, strategy(zero_stage, ranks), sequence_length=64, precision="bf16")
    count = num_parameters(ARCH)
    moments = 8 * count / (ranks if zero_stage else 1)
    assert played.components["optimizer_states"] == pytest.approx(moments, rel=0.02)
    if zero_stage < 2:
        assert played.components["parameters"] == 2 * count
        assert played.components["master_weights"] == pytest.approx(moments / 2, rel=0.02)
    else:
        assert played.components["parameters"] == pytest.approx(4 * count / ranks, rel=0.02)
        assert played.collective_bytes["reduce_scatter"] > 0


@pytest.mark.filterwarnings("ignore")
def test_two_short_depths_give_the_deep_models_peak():
    deep = replace(ARCH, num_layers=9)
    lined = trace(deep, strategy(3, 2, layers=9), sequence_length=64, precision="bf16")
    assert lined.num_layers_traced == (3, 5)
    shallow = trace(ARCH, strategy(3, 2), sequence_length=64, precision="bf16")
    per_layer = (lined.tensor_peak_bytes - shallow.tensor_peak_bytes) / 6
    assert per_layer > 6 * block_parameters(ARCH), "each layer adds at least its states: 12/2 bytes a parameter"


@pytest.mark.parametrize("degree", [2, 4, 6, 8])
@pytest.mark.parametrize(
    ("schedule", "virtual"),
    [
        ("1f1b", 1),
        ("interleaved_1f1b", 2),
        ("interleaved_zero_bubble", 1),
        ("interleaved_zero_bubble", 2),
        ("zbv", 2),
    ],
)
def test_the_micro_batches_played_hold_as_much_as_those_of_a_long_step(schedule, virtual, degree):
    piped = replace(
        strategy(0, 1),
        pipeline_parallel_degree=degree,
        pipeline_schedule=schedule,
        num_virtual_stages=virtual,
        gradient_accumulation_steps=6 * degree,
    )
    whole = orders(schedule, degree, virtual, 6 * degree)
    for rank in range(degree):
        played = orders(schedule, degree, virtual, len(_batches(ARCH, piped, 64, "pretrain", rank)))
        assert _most(whole[rank]) <= _held(played[rank])


def _most(actions: tuple[Action, ...]) -> set[tuple[int, int]]:
    """States that no other state covers."""
    held = _held(actions)
    return {one for one in held if not any(a >= one[0] and b >= one[1] and (a, b) != one for a, b in held)}


def _held(actions: tuple[Action, ...]) -> set[tuple[int, int]]:
    """Passes (between forward and backward, between the halves of backward) that wait after each action."""
    states, forward, inputs = set(), 0, 0
    for action in actions:
        forward += {"forward": 1, "inputs": -1, "backward": -1}.get(action.kind, 0)
        inputs += {"inputs": 1, "weights": -1}.get(action.kind, 0)
        states.add((forward, inputs))
    return states
