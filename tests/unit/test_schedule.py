"""The learning rate and the moments of a checkpoint, by numbers one can check by eye."""

from __future__ import annotations

import pytest

from orchestrator.training.schedule import (
    GPU_SECONDS_BETWEEN_FAILURES,
    CheckpointAuto,
    CheckpointEvery,
    checkpoint_interval_s,
    learning_rate,
)


@pytest.mark.parametrize(
    ("name", "step", "wanted"),
    [
        ("cosine", 1, 0.1),
        ("cosine", 5, 0.5),
        ("cosine", 10, 1.0),
        ("cosine", 60, 0.2 + 0.8 / 2),  # half of the decay, half of the way down
        ("cosine", 110, 0.2),
        ("cosine", 500, 0.2),
        ("linear", 10, 1.0),
        ("linear", 35, 0.2 + 0.8 * 0.75),
        ("linear", 110, 0.2),
        ("constant", 9, 0.9),
        ("constant", 110, 1.0),
    ],
)
def test_the_rate_climbs_to_the_peak_and_ends_at_the_final_fraction(name, step, wanted):
    got = learning_rate(step, peak=1.0, num_steps=110, warmup_steps=10, name=name, final_fraction=0.2)
    assert got == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_a_run_without_warm_up_and_one_that_is_all_warm_up_have_rates(name):
    assert learning_rate(1, peak=2.0, num_steps=1, warmup_steps=0, name=name, final_fraction=1.0) == 2.0
    assert learning_rate(3, peak=2.0, num_steps=3, warmup_steps=6, name=name) == 1.0


def test_steps_are_counted_from_one():
    with pytest.raises(ValueError, match="counted from 1"):
        learning_rate(0, peak=1.0, num_steps=10)


@pytest.mark.parametrize(
    ("every", "step", "seconds", "due"),
    [
        (CheckpointEvery(num_steps=50), 100, 0.0, True),
        (CheckpointEvery(num_steps=50), 99, 1e9, False),
        (CheckpointEvery(seconds=600.0), 99, 600.0, True),
        (CheckpointEvery(seconds=600.0), 100, 599.9, False),
    ],
)
def test_a_checkpoint_is_due_by_steps_or_by_the_clock(every, step, seconds, due):
    assert every.is_due(step=step, seconds_since_last=seconds) is due


@pytest.mark.parametrize("fields", [{}, {"num_steps": 5, "seconds": 5.0}])
def test_exactly_one_interval_is_set(fields):
    with pytest.raises(ValueError, match="one of the two"):
        CheckpointEvery(**fields)


@pytest.mark.parametrize(
    ("cost_s", "num_gpus", "save_s", "wanted"),
    [
        # The mean time between failures of 16,384 GPUs is 54 days / 419 = 11,135 s.
        (30.0, 16384, 0.0, (2 * 30.0 * 54 * 86400 / 419) ** 0.5),  # 817 s
        (30.0, 4 * 16384, 0.0, (2 * 30.0 * 54 * 86400 / 419) ** 0.5 / 2),  # four times the GPUs, half the interval
        (120.0, 16384, 0.0, 2 * (2 * 30.0 * 54 * 86400 / 419) ** 0.5),  # four times the cost, twice the interval
        (30.0, 8, 0.0, 3600.0),  # 8 GPUs fail once in 264 days: an hour is the most
        (0.0, 8, 0.0, 60.0),  # what costs nothing is still not done all the time
        (1e-3, 16384, 0.0, 60.0),
        (1e-3, 16384, 500.0, 500.0),  # the save before must have ended
        (30.0, 8, 7200.0, 7200.0),
    ],
)
def test_the_interval_balances_saving_and_failures(cost_s, num_gpus, save_s, wanted):
    got = checkpoint_interval_s(cost_s=cost_s, num_gpus=num_gpus, save_s=save_s)
    assert got == pytest.approx(wanted, rel=1e-9)


def test_a_failure_is_expected_as_often_as_in_the_llama_3_report():
    hours = GPU_SECONDS_BETWEEN_FAILURES / 16384 / 3600
    assert hours == pytest.approx(3.09, abs=0.01)


def test_the_cost_of_a_save_is_predicted_then_measured_by_what_it_blocks_and_slows():
    auto = CheckpointAuto(num_gpus=16384, state_bytes=int(10e9))
    assert auto.cost_s == pytest.approx(10.0)
    first = auto.seconds
    assert first == pytest.approx(checkpoint_interval_s(cost_s=10.0, num_gpus=16384))
    assert not auto.is_due(step=5, seconds_since_last=first - 1)
    assert auto.is_due(step=5, seconds_since_last=first)
    for _ in range(9):
        auto.step_took(2.0, saving=False)
    for seconds in (3.0, 2.5, 2.0):
        auto.step_took(seconds, saving=True)
    auto.saved(blocked_s=0.5, seconds=7.0)
    assert auto.cost_s == pytest.approx(0.5 + 1.0 + 0.5)
    auto.step_took(2.0, saving=True)
    auto.saved(blocked_s=0.5, seconds=7.0)
    assert auto.cost_s == pytest.approx(0.5), "the steps of the save before are not counted again"


def test_an_interval_is_told_once_and_again_when_it_has_changed():
    auto = CheckpointAuto(num_gpus=16384, state_bytes=int(10e9))
    told = auto.news()
    assert told is not None
    assert told.startswith(
        "a checkpoint is due every 472 s: one costs training 10 s (predicted), and 16384 accelerators fail once"
    )
    assert auto.news() is None
    auto.saved(blocked_s=9.0, seconds=9.0)
    assert auto.news() is None, "near enough"
    auto.saved(blocked_s=1.0, seconds=9.0)
    assert "149 s: one costs training 1 s (measured)" in (auto.news() or "")
