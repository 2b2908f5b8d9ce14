"""The service's store: what each transition does, who may make it, and that a kill at any moment leaves a right state."""

from __future__ import annotations

import os
import signal
import sqlite3
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator.control.lifecycle import DRIVEN, ENDED, MOVES, Ask, State
from orchestrator.control.store import HALF_LIFE_S, Conflict, Fenced, NotFound, Refused, Store

GPUS = [("n0", 0), ("n0", 1)]


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "service.sqlite")
    yield made
    made.close()


def submit(store: Store, name: str = "a", *, user: str = "ada", digest: str = "1", now: float = 1.0, **more):
    return store.submit(name=name, user=user, text=f"name: {name}", digest=digest, now=now, **more)


def started(store: Store, name: str = "a", *, gpus=GPUS, now: float = 2.0) -> int:
    submit(store, name)
    store.move(name, State.PLANNED, "planned", now, num_gpus=len(gpus))
    return store.start(name, gpus, "its GPUs are free", now, lease_s=10.0)


def test_a_name_with_the_same_content_is_the_same_job_and_with_another_a_conflict(store):
    first, new = submit(store)
    assert new
    assert submit(store, now=5.0) == (first, False)
    assert len(store.events("a")) == 1
    for other in ({"digest": "2"}, {"user": "bob"}):
        with pytest.raises(Conflict, match="stands for another job"):
            submit(store, **other)


def test_a_user_has_no_more_jobs_than_allowed(store):
    submit(store, "a", most_waiting=1)
    with pytest.raises(Refused, match="may have 1"):
        submit(store, "b", most_waiting=1)
    submit(store, "b", user="bob", most_waiting=1)
    store.ask("a", Ask.CANCEL, "cancelled", 2.0)
    submit(store, "c", most_waiting=1)


def test_jobs_are_given_in_pages_and_by_state(store):
    for number in range(5):
        submit(store, f"job-{number}")
    store.ask("job-1", Ask.CANCEL, "cancelled", 2.0)
    page = store.jobs(limit=2)
    assert [row.name for row in page] == ["job-0", "job-1"]
    assert [row.name for row in store.jobs({State.QUEUED}, after=page[-1].id, limit=9)] == ["job-2", "job-3", "job-4"]
    assert store.counts() == {"queued": 4, "cancelled": 1}
    with pytest.raises(NotFound, match="there is no job nobody"):
        store.job("nobody")


def test_every_transition_has_its_event_with_a_cause(store):
    token = started(store)
    store.advance("a", token, State.STARTING, "prepares", 3.0)
    store.advance("a", token, State.RUNNING, "step 1", 4.0)
    store.advance("a", token, State.SUCCEEDED, "all steps are done", 5.0)
    told = [(event["kind"], event["cause"]) for event in store.events("a")]
    assert told[2:] == [
        ("placing", "its GPUs are free"),
        ("starting", "prepares"),
        ("running", "step 1"),
        ("succeeded", "all steps are done"),
    ]
    assert store.events("a")[2]["details"] == {"from": "planned", "gpus": [["n0", 0], ["n0", 1]], "token": 1}
    assert [event["kind"] for event in store.events("a", after=store.events("a")[3]["id"])] == ["running", "succeeded"]


def test_a_gpu_is_given_once(store):
    started(store)
    submit(store, "b")
    store.move("b", State.PLANNED, "planned", 2.0)
    with pytest.raises(Fenced, match="is in use"):
        store.start("b", [("n0", 1), ("n0", 2)], "free?", 3.0, lease_s=10.0)
    assert store.job("b").state == State.PLANNED
    assert set(store.gpus()) == set(GPUS), "all or nothing"
    store.start("b", [("n0", 2)], "free", 3.0, lease_s=10.0)


def test_two_never_drive_one_job(store, tmp_path):
    """The first supervisor is silent longer than its lease; once it is taken away, whatever it writes is refused."""
    old = started(store)
    store.advance("a", old, State.STARTING, "prepares", 3.0)
    with pytest.raises(Fenced, match="was renewed"):
        store.lost("a", old, State.QUEUED, "silent", 11.0)
    store.lost("a", old, State.QUEUED, "silent", 12.5)
    assert store.gpus() == {}
    assert store.job("a").queued_s == 1.0, "it keeps its place"
    store.move("a", State.PLANNED, "planned", 13.0)
    new = store.start("a", GPUS, "again", 13.0, lease_s=10.0)
    assert new > old
    other = Store(tmp_path / "service.sqlite")  # a process of its own
    for act in (
        lambda: other.renew("a", old, 99.0),
        lambda: other.advance("a", old, State.RUNNING, "step 1", 14.0),
        lambda: other.advance("a", old, State.SUCCEEDED, "done", 14.0),
        lambda: other.lost("a", old, State.FAILED, "silent", 99.0),
        lambda: other.start("a", [("n0", 3)], "again", 14.0, lease_s=10.0),
        lambda: other.move("a", State.CANCELLED, "by the controller", 14.0),
    ):
        with pytest.raises(Fenced):
            act()
    other.close()
    assert (store.job("a").state, store.job("a").token) == (State.PLACING, new)


def test_what_is_asked_of_a_driven_job_is_told_to_its_supervisor(store):
    token = started(store)
    assert store.renew("a", token, 20.0, step=3) is None
    for ask, holds in ((Ask.PREEMPT, "preempt"), (Ask.CANCEL, "cancel"), (Ask.PAUSE, "cancel"), (Ask.CANCEL, "cancel")):
        assert store.ask("a", ask, "told", 3.0).asked == holds
    assert store.renew("a", token, 21.0) is Ask.CANCEL
    assert [event["kind"] for event in store.events("a")][-2:] == ["asked_preempt", "asked_cancel"]
    with pytest.raises(Refused, match="is being stopped"):
        store.resume("a", "resumed", 4.0)
    store.lost("a", token, State.QUEUED, "its supervisor died", 50.0)
    assert store.job("a").state == State.CANCELLED, "what was asked of a dead supervisor still holds"


def test_what_is_asked_of_a_waiting_job_happens_at_once(store):
    submit(store)
    assert store.ask("a", Ask.PREEMPT, "no", 2.0).state == State.QUEUED
    assert store.ask("a", Ask.PAUSE, "paused by ada", 2.0).state == State.PAUSED
    assert store.resume("a", "resumed by ada", 3.0).state == State.QUEUED
    assert store.job("a").queued_s == 3.0
    store.move("a", State.FAILED, "its plan does not fit", 4.0)
    with pytest.raises(Refused, match="is failed, and cannot be paused"):
        store.ask("a", Ask.PAUSE, "paused", 5.0)
    assert store.resume("a", "resumed by ada", 6.0).state == State.QUEUED
    assert store.ask("a", Ask.CANCEL, "cancelled by ada", 7.0).state == State.CANCELLED
    with pytest.raises(Refused, match="does not go on"):
        store.resume("a", "resumed", 8.0)


def test_gpu_time_counts_for_its_user_and_fades(store):
    token = started(store, now=100.0)
    store.advance("a", token, State.FAILED, "failed", 150.0)
    assert store.usage(150.0) == {"ada": 2 * 50.0}
    assert store.usage(150.0 + HALF_LIFE_S) == {"ada": pytest.approx(50.0)}


def test_a_database_of_another_version_is_refused(tmp_path):
    path = tmp_path / "service.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(Refused, match="schema 99"):
        Store(path)


def test_ends_are_ends_and_only_supervisors_train():
    assert [state for state in State if not MOVES[state]] == [State.SUCCEEDED, State.CANCELLED]
    assert MOVES[State.FAILED] == {State.QUEUED}
    assert all(MOVES[state] & DRIVEN == frozenset() for state in ENDED | {State.QUEUED, State.PAUSED})
    for state in DRIVEN:
        assert {State.QUEUED, State.PAUSED, *ENDED} <= MOVES[state]


# Killed at every write ------------------------------------------------------------------------------------------------


def story(store: Store) -> None:
    """A controller and the supervisors of two jobs, from wherever they are, to the end. Each step looks at the store alone."""
    for name in ("a", "b"):
        submit(store, name)
    while any(State(row.state) not in ENDED for row in store.jobs()):
        for row in store.jobs():
            state, now = State(row.state), 10.0
            if state is State.QUEUED:
                store.move(row.name, State.PLANNED, "planned", now, num_gpus=2)
            elif state is State.PLANNED and not store.gpus():
                store.start(row.name, GPUS, "free", now, lease_s=-5.0)
            elif state in (State.PLACING, State.STARTING):
                to = State.STARTING if state is State.PLACING else State.RUNNING
                store.advance(row.name, row.token, to, "goes on", now)
            elif state is State.RUNNING and row.name == "a" and row.asked is None:
                store.renew(row.name, row.token, 5.0, step=7)
                store.ask("a", Ask.CANCEL, "cancelled", now)
            elif state is State.RUNNING and row.num_steps is None and row.name == "b":
                store.renew("b", row.token, 5.0, num_steps=1)
                store.lost("b", row.token, State.QUEUED, "its supervisor died", now)
            elif state is State.RUNNING:
                to = State.CANCELLED if row.asked else State.SUCCEEDED
                store.advance(row.name, row.token, to, "ended", now)


def right(store: Store) -> None:
    """A job's state is that of its last transition, and exactly the driven jobs have GPUs, all of them, each GPU once."""
    held = list(store.gpus().values())
    for row in store.jobs():
        kinds = [event["kind"] for event in store.events(row.name) if not event["kind"].startswith("asked_")]
        assert kinds[-1] == row.state
        assert all(State(to) in MOVES[State(before)] for before, to in pairwise(kinds))
        assert held.count(row.id) == (2 if State(row.state) in DRIVEN else 0)


@pytest.fixture
def memory():
    """A folder without a disk to wait for: a kill, unlike a power cut, takes nothing that was written."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


def killed_at(path: Path, statement: int) -> bool:
    """Tell the story in a process that is killed with SIGKILL before its n-th statement; False where it came to the end."""
    pid = os.fork()
    if pid == 0:
        try:
            store, count = Store(path), 0

            def traced(sql: str) -> None:
                nonlocal count
                if sql.startswith(("BEGIN", "COMMIT", "INSERT", "UPDATE", "DELETE")):
                    count += 1
                    if count == statement:
                        os.kill(os.getpid(), signal.SIGKILL)

            store._db.set_trace_callback(traced)
            story(store)
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_kill_at_every_write_leaves_a_right_state_from_which_all_jobs_end(memory):
    ends, statement = {"a": State.CANCELLED, "b": State.SUCCEEDED}, 1
    while killed_at(memory / f"{statement}.sqlite", statement):
        store = Store(memory / f"{statement}.sqlite")
        right(store)
        story(store)
        right(store)
        assert {row.name: row.state for row in store.jobs()} == ends
        assert store.gpus() == {}
        store.close()
        statement += 1
    assert statement > 50, "the story has that many writes"


# Ten thousand jobs ----------------------------------------------------------------------------------------------------


def test_a_page_and_a_submission_do_not_grow_with_the_number_of_jobs(store):
    """Counted in steps of SQLite's machine, which no other load changes."""

    def steps(act) -> int:
        count = 0

        def tick() -> int:
            nonlocal count
            count += 1
            return 0

        store._db.set_progress_handler(tick, 10)
        act()
        store._db.set_progress_handler(None, 0)
        return count

    def measure(number: int) -> tuple[int, int, int]:
        after = store.jobs()[-150].id
        page = steps(lambda: store.jobs(after=after, limit=100))
        by_state = steps(lambda: store.jobs({State.QUEUED}, after=after, limit=100))
        return page, by_state, steps(lambda: submit(store, f"new-{number}", most_waiting=None))

    insert = (
        "INSERT INTO jobs (name, user, text, digest, folder, state, cause, priority, preemptible, submitted_s, since_s, queued_s)"
        " VALUES (?, 'ada', '', '', '', 'queued', 'submitted', 0, 1, 0, 0, 0)"
    )
    store._db.executemany(insert, [(f"job-{number}",) for number in range(300)])
    few = measure(1)
    store._db.execute("BEGIN")
    store._db.executemany(insert, [(f"job-{number}",) for number in range(300, 10_000)])
    store._db.execute("COMMIT")
    began = time.perf_counter()
    many = measure(2)
    assert all(later <= 1.2 * before + 5 for before, later in zip(few, many, strict=True)), (few, many)
    assert time.perf_counter() - began < 10
