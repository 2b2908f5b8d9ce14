"""What is done after a failure: pure tables."""

from __future__ import annotations

import pytest

from orchestrator.control.ray_runtime import judged
from orchestrator.control.recovery import Failure, FailureKind, GiveUp, Policy, Restart, on_failure

LOST, ERROR, RAY = FailureKind.WORKER_LOST, FailureKind.WORKER_ERROR, FailureKind.RAY_LOST
USER, MEMORY, NO_START = FailureKind.USER_ERROR, FailureKind.OUT_OF_MEMORY, FailureKind.NO_START
HANG = FailureKind.HANG


def failures(*steps: tuple[FailureKind, int]) -> list[Failure]:
    """Each at a step, with a checkpoint every ten steps."""
    return [
        Failure(
            kind=kind, cause=f"{kind} happened", step=step, checkpoint=f"step-{step // 10 * 10} x" if step > 9 else None
        )
        for kind, step in steps
    ]


@pytest.mark.parametrize(
    ("history", "answer"),
    [
        # A first failure, and every one after new steps, is answered at once.
        ([(LOST, 0)], Restart(after_s=0)),
        ([(LOST, 10), (LOST, 20), (RAY, 30)], Restart(after_s=0)),
        # Without new steps the wait doubles, up to 30 s.
        ([(LOST, 10), (LOST, 10)], Restart(after_s=1)),
        ([(LOST, 10), (LOST, 10), (RAY, 10)], Restart(after_s=2)),
        ([(LOST, 10)] * 4, Restart(after_s=4)),
        ([(LOST, 10)] * 9, Restart(after_s=30)),
        # New steps begin the count anew.
        ([(LOST, 10), (LOST, 10), (LOST, 11)], Restart(after_s=0)),
        # An error that may be a passing one is tried again; the same one three times at one step is not.
        ([(ERROR, 5), (ERROR, 5)], Restart(after_s=1)),
        ([(ERROR, 5), (ERROR, 6), (ERROR, 7)], Restart(after_s=0)),
        ([(ERROR, 5), (LOST, 5), (ERROR, 5)], Restart(after_s=2)),
        # A month at one failure a day: each is followed by new checkpoints.
        ([(LOST, 1000 * day) for day in range(31)], Restart(after_s=0)),
        ([(HANG, 10), (HANG, 10), (HANG, 10)], Restart(after_s=2)),
    ],
)
def test_a_failure_that_may_pass_is_answered_by_a_restart(history, answer):
    assert on_failure(failures(*history), Policy()) == answer


@pytest.mark.parametrize(
    ("history", "policy", "told", "lost"),
    [
        ([(USER, 5)], Policy(), "user_error happened", False),
        ([(LOST, 1), (USER, 5)], Policy(), "user_error happened", False),
        ([(MEMORY, 5)], Policy(), "the run stops (recovery.on_oom: stop), since choosing a smaller strategy", False),
        ([(ERROR, 5)] * 3, Policy(), "it came back 3 times at step 5", False),
        ([(NO_START, 0)] * 3, Policy(), "it came back 3 times at step 0", True),
        ([(LOST, 1), (LOST, 2)], Policy(max_restarts=1), "2 failures are more than recovery.max_restarts: 1", False),
        # Steps alone are no progress: a crash a step after each resume would go on for ever.
        (
            [(LOST, 20 + n % 10) for n in range(4)],
            Policy(max_restarts=3),
            "4 failures since checkpoint step-20 are",
            False,
        ),
        ([(LOST, 9), (LOST, 30), (LOST, 31)], Policy(max_restarts=1), "2 failures since checkpoint step-30 are", False),
        ([(RAY, 1)], Policy(max_restarts=0), "1 failures are more than recovery.max_restarts: 0", True),
    ],
)
def test_a_failure_that_will_not_pass_ends_the_run_and_says_why(history, policy, told, lost):
    answer = on_failure(failures(*history), policy)
    assert isinstance(answer, GiveUp)
    assert told in answer.reason
    assert answer.lost_cluster is lost


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("rank 1 of 3: RuntimeError: at 0x7f90595c6150", "rank 1 of 3: RuntimeError: at 0x7fa8423f37a0", True),
        ("connect to [127.0.0.1]:41237 failed", "connect to [127.0.0.1]:55012 failed", True),
        ("rank 0 of 3: ValueError: no file", "rank 2 of 3: ValueError: no file", True),
        ("object deadbeef01 is lost", "object 01f3ac9e77 is lost", True),
        ("KeyError: 'loss'", "KeyError: 'tokens'", False),
        ("a decade added", "a facade added", False),
    ],
)
def test_an_error_is_the_same_error_whatever_addresses_ports_and_ranks_it_names(first, second, same):
    history = [Failure(kind=ERROR, cause=cause, step=5) for cause in (first, second, first, second)]
    assert isinstance(on_failure(history, Policy()), GiveUp) is same


OUTCOME = {"outcome": {"kind": "finished", "step": 9, "cause": None, "checkpoint": None}}
DIED, PEER = {"error": "ActorDiedError: x", "died": True}, {"error": "RuntimeError: Broken pipe", "peer": True}
RAISED, FULL = {"error": "KeyError: 'x'"}, {"error": "OutOfMemoryError: 3 GiB", "out_of_memory": True}


@pytest.mark.parametrize(
    ("answers", "failure", "cause"),
    [
        ({0: PEER, 2: DIED}, "worker_lost", "the process of rank 2 of 3 died"),
        # What a worker told of itself is the cause of the abort of another at its exit.
        ({0: DIED, 1: RAISED}, "worker_error", "rank 1 of 3: KeyError: 'x'"),
        ({0: PEER, 1: DIED, 2: FULL}, "out_of_memory", "rank 2 of 3: OutOfMemoryError: 3 GiB"),
        ({0: PEER, 1: RAISED, 2: PEER}, "worker_error", "rank 1 of 3: KeyError: 'x'"),
        ({0: PEER, 1: PEER}, "worker_error", "rank 0 of 3: RuntimeError: Broken pipe"),
        ({0: PEER, 1: FULL}, "out_of_memory", "rank 1 of 3: OutOfMemoryError: 3 GiB"),
    ],
)
def test_the_cause_of_a_failed_group_is_told_not_its_consequences(answers, failure, cause):
    message = judged(answers, num_workers=3)
    assert (message["kind"], message["failure"], message["cause"]) == ("failed", failure, cause)


def test_a_worker_that_reported_its_end_is_finished_whatever_became_of_the_others():
    assert judged({0: OUTCOME, 1: DIED}, num_workers=2) == {"kind": "outcome", **OUTCOME}
