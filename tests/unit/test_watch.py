"""When a worker group counts as hung, and who is named: pure tables. A healthy group, however slow, is left alone."""

from __future__ import annotations

import pytest

from orchestrator.control.watch import LONGEST_GAP_S, Pace, Rank, Watch, allowed_s, hang, stop_s
from orchestrator.training.limits import Limits
from orchestrator.training.pulse import Sign

LIMITS = Limits()
SETTLED = Pace(predicted_step_s=1.0, recent_steps_s=(1.0, 1.2, 1.1, 0.9))
NEW = Pace(predicted_step_s=1.0)


def rank(phase, *, step=12, silent_s=0.0, unanswered_s=1.0, waits=False):
    return Rank(sign=Sign(count=1, phase=phase, step=step, waits=waits), silent_s=silent_s, unanswered_s=unanswered_s)


@pytest.mark.parametrize(
    ("phase", "pace", "seconds"),
    [
        # The first steps allocate and compile; later ones may take ten times the slowest of late, minutes at least.
        ("step", NEW, 1800),
        ("step", Pace(predicted_step_s=600.0), 6000),
        ("step", SETTLED, 300),
        ("data", SETTLED, 300),
        ("step", Pace(recent_steps_s=(90.0, 60.0, 60.0)), 900),
        ("evaluation", Pace(recent_steps_s=(90.0, 60.0, 60.0)), 16 * 900),
        # What moves a checkpoint's bytes is given the time that they take.
        ("checkpoint", SETTLED, 2 * 900),
        ("checkpoint", Pace(checkpoint_bytes=2e12), 2 * 20_000),
        ("checkpoint", Pace(checkpoint_bytes=2e12, longest_save_s=1000.0), 2 * 5000),
        ("setup", Pace(checkpoint_bytes=2e12), 21_800),
        ("rendezvous", NEW, 900),
        (None, NEW, 900),
        # A rank that was last seen before the steps that it took part in.
        ("setup", SETTLED, 300),
        (None, SETTLED, 300),
    ],
)
def test_what_each_phase_is_allowed_follows_from_what_was_measured_or_predicted(phase, pace, seconds):
    assert allowed_s(phase, pace, LIMITS) == pytest.approx(seconds)


def test_a_stop_may_take_a_step_the_save_that_is_on_its_way_and_the_last_one():
    large = Pace(recent_steps_s=(60.0,) * 4, longest_save_s=1000.0)
    assert stop_s(large, LIMITS) == 600 + 2 * 5000
    assert stop_s(SETTLED, LIMITS) == 300 + 2 * 900


@pytest.mark.parametrize(
    ("phases", "quiet_s", "pace"),
    [
        (["step", "step", "step"], 299.0, SETTLED),
        (["step", "step", "step"], 1700.0, NEW),
        (["step", "step", "checkpoint"], 1799.0, SETTLED),  # two wait for one that writes
        (["step", "step", "step"], 890.0, Pace(recent_steps_s=(10.0, 90.0, 10.0))),
        (["setup", "rendezvous", "setup"], 1799.0, NEW),
        ([], 899.0, NEW),
    ],
)
def test_a_group_that_may_be_healthy_is_left_alone(phases, quiet_s, pace):
    ranks = {number: rank(phase, silent_s=quiet_s) for number, phase in enumerate(phases)}
    assert hang(ranks, host_silent_s=quiet_s, quiet_s=quiet_s, pace=pace, limits=LIMITS) is None


@pytest.mark.parametrize(
    ("ranks", "host_silent_s", "told"),
    [
        # A process that is stopped answers nothing, though another entered its phase later.
        (
            [rank("step", silent_s=301), rank("data", silent_s=300, unanswered_s=300), rank("step", silent_s=302)],
            1.0,
            "rank 1 of 3 does not answer, last seen in step 12, phase data",
        ),
        # One that answers and waits for nobody holds up those that wait inside a collective.
        (
            [
                rank("step", silent_s=301, waits=True),
                rank("step", silent_s=300),
                rank("step", silent_s=302, waits=True),
            ],
            1.0,
            "rank 1 of 3 is in step 12, phase step",
        ),
        # Otherwise the one whose last sign of life is oldest.
        (
            [rank("step", silent_s=301), rank("step", silent_s=301), rank("data", silent_s=400)],
            1.0,
            "rank 2 of 3 is in step 12, phase data",
        ),
        (
            [rank("step", silent_s=301), rank("step", silent_s=301.5)],
            1.0,
            "rank 0, 1 of 2 is in step 12, phase step",
        ),
        ([rank("step", silent_s=301, unanswered_s=301)], 301.0, "the process that holds Ray does not answer"),
        (
            [Rank(sign=None, silent_s=2000, unanswered_s=2000), rank("step", silent_s=2000)],
            1.0,
            "rank 0 of 2 does not answer, last seen before its first answer",
        ),
    ],
)
def test_a_hang_names_who_holds_up_the_others_and_where_it_is(ranks, host_silent_s, told):
    verdict = hang(dict(enumerate(ranks)), host_silent_s=host_silent_s, quiet_s=2001.0, pace=SETTLED, limits=LIMITS)
    assert verdict is not None
    assert verdict.startswith("no sign of life for 2001 s, ")
    assert told in verdict
    assert verdict.count("rank") == told.count("rank")


def signs(*counts, phase="step"):
    return [(number, Sign(count=count, phase=phase, step=1)) for number, count in enumerate(counts)]


def test_any_rank_that_goes_on_is_a_sign_of_life_and_an_old_sign_told_again_is_none():
    watch = Watch(num_workers=2)
    for second in range(10):
        watch.look(float(second))
        watch.heard(signs(5, 5 + (second < 4)))
    assert watch.quiet_s == 5.0
    assert watch.host_silent_s == 0.0
    assert watch.ranks()[0].silent_s == 9.0
    assert watch.ranks()[1].unanswered_s == 0.0


def test_a_supervisor_that_was_stopped_itself_has_seen_no_hang():
    """Ctrl-Z for a day, or a laptop that sleeps: what was not looked at does not count."""
    watch = Watch(num_workers=1)
    watch.look(0.0)
    watch.heard(signs(1))
    watch.look(86_400.0)
    watch.look(86_401.0)
    assert watch.quiet_s == 2 * LONGEST_GAP_S
    watch.look(100.0)  # a clock that went back is no time at all
    assert watch.quiet_s == 2 * LONGEST_GAP_S
