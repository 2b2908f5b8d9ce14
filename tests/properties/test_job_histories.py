"""Random histories of submit, plan, start, train, pause, resume, cancel, preempt, silence and crash: the store and a model of it,
a plain dictionary, never disagree, and what is refused by one is refused by the other."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from orchestrator.control.store import Ask, Fenced, Refused, State, Store

NAMES = st.sampled_from(["a", "b", "c"])
GPUS = st.sets(st.integers(0, 3), min_size=1, max_size=3)
LEASE_S = 10.0
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Folder without a disk behind it."""
DRIVEN = ("placing", "starting", "running", "recovering")
ENDED = ("succeeded", "failed", "cancelled")


@dataclass
class Known:
    """What the model knows of one job."""

    state: str = "queued"
    asked: str = ""
    token: int = 0
    lease_s: float = 0.0
    gpus: set[int] = field(default_factory=set)
    history: list[str] = field(default_factory=lambda: ["queued"])

    def go(self, state: str) -> None:
        self.state = state
        self.history.append(state)
        if state not in DRIVEN:
            self.asked, self.gpus = "", set()


class Histories(RuleBasedStateMachine):
    @initialize()
    def opens(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="shardwise-test-", dir=MEMORY))
        self.now = 1000.0
        self.known: dict[str, Known] = {}
        self.store = self._open()

    def _open(self) -> Store:
        store = Store(self.folder / "service.sqlite")
        store._db.execute("PRAGMA synchronous = OFF")
        return store

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def expect(self, allowed: bool, act) -> bool:
        try:
            act()
        except (Fenced, Refused):
            assert not allowed
            return False
        assert allowed
        return True

    @rule()
    def the_controller_crashes(self) -> None:
        self.store.close()
        self.store = self._open()

    @rule(seconds=st.floats(0.1, 2 * LEASE_S))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=NAMES, digest=st.sampled_from("12"))
    def submit(self, name: str, digest: str) -> None:
        def act() -> None:
            self.store.submit(name=name, user="ada", text="", digest=digest, now=self.now)

        if self.expect(name not in self.known or digest == "1", act) and name not in self.known:
            self.known[name] = Known()
            if digest != "1":  # the model knows one content a name: the first, called 1
                self.store._db.execute("UPDATE jobs SET digest = '1' WHERE name = ?", (name,))

    @rule(name=NAMES, fits=st.booleans())
    def plan(self, name: str, fits: bool) -> None:
        to = "planned" if fits else "failed"
        job = self.known.get(name, Known(state="none"))
        if self.expect(
            job.state == "queued" or (job.state == "planned" and not fits),
            lambda: self.store.move(name, State(to), "planned", self.now),
        ):
            job.go(to)

    @rule(name=NAMES, gpus=GPUS)
    def start(self, name: str, gpus: set[int]) -> None:
        job = self.known.get(name, Known(state="none"))
        taken = set().union(*(other.gpus for other in self.known.values()))
        if self.expect(
            job.state == "planned" and not taken & gpus,
            lambda: self.store.start(name, [("n", gpu) for gpu in gpus], "free", self.now, lease_s=LEASE_S),
        ):
            job.go("placing")
            job.token, job.lease_s, job.gpus = job.token + 1, self.now + LEASE_S, set(gpus)

    @rule(name=NAMES, to=st.sampled_from(State), old=st.booleans())
    def supervise(self, name: str, to: State, old: bool) -> None:
        """A supervisor moves its job on, or one that was fenced tries to."""
        job = self.known.get(name, Known(state="none"))
        follows = {
            "placing": ("starting",),
            "starting": ("running", "recovering"),
            "running": ("recovering",),
            "recovering": ("running",),
        }
        allowed = job.state in DRIVEN and not old
        allowed = allowed and to in (*follows[job.state], "queued", "paused", *ENDED)
        if self.expect(
            allowed, lambda: self.store.advance(name, job.token - (1 if old else 0), to, "goes on", self.now)
        ):
            job.go(str(to))

    @rule(name=NAMES, old=st.booleans())
    def renew(self, name: str, old: bool) -> None:
        job = self.known.get(name, Known(state="none"))
        asked: list[Ask | None] = []
        if self.expect(
            job.state in DRIVEN and not old,
            lambda: asked.append(self.store.renew(name, job.token - (1 if old else 0), self.now + LEASE_S, step=1)),
        ):
            job.lease_s = self.now + LEASE_S
            assert (asked[0] or "") == job.asked

    @rule(name=NAMES)
    def the_supervisor_is_lost(self, name: str) -> None:
        job = self.known.get(name, Known(state="none"))
        if self.expect(
            job.state in DRIVEN and job.lease_s <= self.now,
            lambda: self.store.lost(name, job.token, State.QUEUED, "silent", self.now),
        ):
            job.token += 1
            job.go({"": "queued", "preempt": "queued", "pause": "paused", "cancel": "cancelled"}[job.asked])

    @rule(name=NAMES, ask=st.sampled_from(Ask))
    def ask(self, name: str, ask: Ask) -> None:
        job = self.known.get(name)
        becomes = {"preempt": "", "pause": "paused", "cancel": "cancelled"}[ask]
        allowed = job is not None and not (job.state in ENDED and becomes and job.state != becomes)
        if not self.expect(allowed, lambda: self.store.ask(name, ask, "told", self.now)) or job is None:
            return
        if job.state in DRIVEN:
            rank = ["", "preempt", "pause", "cancel"]
            job.asked = max(job.asked, str(ask), key=rank.index)
        elif becomes and job.state != becomes:
            job.go(becomes)

    @rule(name=NAMES)
    def resume(self, name: str) -> None:
        job = self.known.get(name)
        allowed = job is not None and job.state not in ("succeeded", "cancelled") and not job.asked
        done = self.expect(allowed, lambda: self.store.resume(name, "told", self.now))
        if done and job is not None and job.state in ("paused", "failed"):
            job.go("queued")

    @invariant()
    def they_agree(self) -> None:
        rows = {row.name: row for row in self.store.jobs()}
        assert {name: (row.state, row.asked or "", row.token) for name, row in rows.items()} == {
            name: (job.state, job.asked, job.token) for name, job in self.known.items()
        }
        held = {gpu: job for (_, gpu), job in self.store.gpus().items()}
        assert held == {gpu: rows[name].id for name, job in self.known.items() for gpu in job.gpus}
        for name, job in self.known.items():
            kinds = [event["kind"] for event in self.store.events(name)]
            assert [kind for kind in kinds if not kind.startswith("asked")] == job.history
            assert (rows[name].lease_s is not None) == (job.state in DRIVEN)


Histories.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase
