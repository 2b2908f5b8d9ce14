"""The learning rate and the moments of a checkpoint, by numbers one can check by eye."""

from __future__ import annotations

import pytest

from orchestrator.training.schedule import CheckpointEvery, learning_rate


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
