"""The service's jobs in SQLite: each transition is one transaction with its event, and nothing is only in memory.

The controller and one supervisor per driven job write here, each from a process of its own on one machine (WAL mode). `start`
gives a job its GPUs, a lease and a fencing token, one higher than the one before; whoever writes with an older token is `Fenced`.
A GPU is one row of a table whose key is the GPU, so the database itself refuses to give it twice. Times are Unix seconds and
passed in.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.control.lifecycle import DRIVEN, ENDED, MOVES, STOPPED_AS, WAITING, Ask, State, stronger

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  name TEXT NOT NULL UNIQUE, user TEXT NOT NULL, text TEXT NOT NULL, digest TEXT NOT NULL, folder TEXT NOT NULL,
  state TEXT NOT NULL, cause TEXT NOT NULL, asked TEXT,
  priority INTEGER NOT NULL, preemptible INTEGER NOT NULL, max_wait_s REAL,
  submitted_s REAL NOT NULL, since_s REAL NOT NULL, queued_s REAL NOT NULL,
  offer TEXT, num_gpus INTEGER, num_nodes INTEGER, wall_s REAL, wall_error REAL,
  token INTEGER NOT NULL DEFAULT 0, lease_s REAL, holder TEXT, started_s REAL, ends_s REAL, backfilled INTEGER NOT NULL DEFAULT 0,
  num_lost INTEGER NOT NULL DEFAULT 0,
  step INTEGER NOT NULL DEFAULT 0, num_steps INTEGER, loss REAL, tokens_per_second_per_gpu REAL, saved_s REAL
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, id);
CREATE TABLE IF NOT EXISTS gpus (
  node TEXT NOT NULL, gpu INTEGER NOT NULL, job INTEGER NOT NULL REFERENCES jobs (id), PRIMARY KEY (node, gpu)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  job INTEGER NOT NULL REFERENCES jobs (id),
  time_unix_s REAL NOT NULL, kind TEXT NOT NULL, cause TEXT NOT NULL, details TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS events_by_job ON events (job, id);
CREATE TABLE IF NOT EXISTS cordons (node TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS usage (user TEXT PRIMARY KEY, gpu_s REAL NOT NULL, at_s REAL NOT NULL);
"""
VERSION = 1
"""Version of the schema, in SQLite's user_version."""
HALF_LIFE_S = 86400.0
"""Seconds after which GPU time that a user has had counts half in the fair share."""
BUSY_S = 30.0
"""Longest wait for another process's transaction; each takes milliseconds."""


class Row(NamedTuple):
    """One job as the store has it. Times are Unix seconds."""

    id: int
    name: str
    user: str
    digest: str
    folder: str
    """The run's folder."""
    state: str
    cause: str
    """Cause of the last transition, one sentence."""
    asked: str | None
    priority: int
    preemptible: int
    max_wait_s: float | None
    submitted_s: float
    since_s: float
    """Time of the last transition."""
    queued_s: float
    """Time from which the job's place in the queue counts: submitted, or resumed."""
    offer: str | None
    """The GPUs that the plan was made for."""
    num_gpus: int | None
    num_nodes: int | None
    """Nodes that the plan spreads the GPUs over, equally."""
    wall_s: float | None
    """Seconds that the plan says the whole job takes."""
    wall_error: float | None
    """Stated relative error of it."""
    token: int
    lease_s: float | None
    """Time at which the lease runs out; None: nobody drives the job."""
    holder: str | None
    """The supervisor, as `process:start time`."""
    started_s: float | None
    ends_s: float | None
    """Latest end by the plan and its stated error, as of the start."""
    backfilled: int
    num_lost: int
    """Supervisors lost since the job last trained."""
    step: int
    num_steps: int | None
    loss: float | None
    tokens_per_second_per_gpu: float | None
    saved_s: float | None
    """Time of the newest checkpoint that this supervisor has seen."""


COLUMNS = ", ".join(Row._fields)


class Planned(NamedTuple):
    """What the queue needs of a job with a plan; the names are those of Row."""

    name: str
    user: str
    num_gpus: int
    num_nodes: int
    priority: int
    queued_s: float
    wall_s: float | None
    wall_error: float | None
    step: int
    num_steps: int | None
    max_wait_s: float | None
    token: int


class Refused(ValueError):
    """What is asked of a job that does not allow it: what, and how to fix it."""

    def __init__(self, message: str, *, fix: str) -> None:
        super().__init__(f"{message}\n  to fix: {fix}")
        self.message, self.fix = message, fix


class Conflict(Refused):
    """A name that stands for another job already."""


class NotFound(Refused):
    """No job of that name."""


class Fenced(Exception):
    """The writer's token is not the job's newest: another drives the job, or nobody any more."""


class Store:
    """One connection to the database; each process, and each thread, has its own."""

    def __init__(self, path: Path, *, check_same_thread: bool = True) -> None:
        self.path = path
        self._db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=check_same_thread)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # a transition that was answered survives a power cut
        self._db.execute("PRAGMA foreign_keys = ON")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, VERSION):
            self.close()
            told = f"{path} was written by another version of shardwise (schema {version}, this one knows {VERSION})"
            raise Refused(told, fix="run that version, or give --state another folder")
        if version == 0:
            self._db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # Reading ----------------------------------------------------------------------------------------------------------

    def job(self, name: str) -> Row:
        found = self._db.execute(f"SELECT {COLUMNS} FROM jobs WHERE name = ?", (name,)).fetchone()
        if found is None:
            raise NotFound(f"there is no job {name}", fix="`shardwise list` shows those that there are")
        return Row._make(found)

    def text(self, name: str) -> str:
        """Return the YAML of a job, as it was submitted."""
        found = self._db.execute("SELECT text FROM jobs WHERE name = ?", (name,)).fetchone()
        if found is None:
            raise NotFound(f"there is no job {name}", fix="`shardwise list` shows those that there are")
        return str(found[0])

    def jobs(self, states: Iterable[State] | None = None, *, after: int = 0, limit: int | None = None) -> list[Row]:
        """Return jobs in the order of their submission, from after an id on."""
        names = sorted(State if states is None else states)
        marks = ", ".join("?" * len(names))
        where = f"id > ? AND state IN ({marks})" if states is not None else "id > ?"
        values: list[Any] = [after, *(names if states is not None else ())]
        found = self._db.execute(
            f"SELECT {COLUMNS} FROM jobs WHERE {where} ORDER BY id LIMIT ?", [*values, -1 if limit is None else limit]
        )
        return [Row._make(row) for row in found]

    def planned(self) -> list[Planned]:
        """Return the jobs that wait for GPUs, oldest first; a few columns of them, since they may be thousands."""
        sql = f"SELECT {', '.join(Planned._fields)} FROM jobs WHERE state = ? ORDER BY id"
        return [Planned._make(row) for row in self._db.execute(sql, (State.PLANNED,))]

    def counts(self) -> dict[str, int]:
        """Return the number of jobs in each state that has any."""
        return dict(self._db.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())

    def events(self, name: str, *, after: int = 0, limit: int = 1000) -> list[dict[str, Any]]:
        """Return transitions and asks of a job, oldest first, from after an id on."""
        job = self.job(name)
        found = self._db.execute(
            "SELECT id, time_unix_s, kind, cause, details FROM events WHERE job = ? AND id > ? ORDER BY id LIMIT ?",
            (job.id, after, limit),
        )
        return [
            {"id": id_, "time_unix_s": at, "kind": kind, "cause": cause, "details": json.loads(details)}
            for id_, at, kind, cause, details in found
        ]

    def gpus(self) -> dict[tuple[str, int], int]:
        """Return (node, GPU) -> id of the job that has it."""
        return {(node, gpu): job for node, gpu, job in self._db.execute("SELECT node, gpu, job FROM gpus")}

    def cordons(self) -> frozenset[str]:
        return frozenset(node for (node,) in self._db.execute("SELECT node FROM cordons"))

    def usage(self, now: float) -> dict[str, float]:
        """Return user -> GPU-seconds that ended jobs had, halved with every HALF_LIFE_S since."""
        found = self._db.execute("SELECT user, gpu_s, at_s FROM usage")
        return {user: _decayed(gpu_s, now - at_s) for user, gpu_s, at_s in found}

    # What users do ----------------------------------------------------------------------------------------------------

    def submit(
        self,
        *,
        name: str,
        user: str,
        text: str,
        digest: str,
        now: float,
        folder: str = "",
        priority: int = 0,
        preemptible: bool = True,
        max_wait_s: float | None = None,
        num_steps: int | None = None,
        most_waiting: int | None = None,
    ) -> tuple[Row, bool]:
        """Return the job, and whether it is new: the same name and digest is the same job, another digest a Conflict.

        `most_waiting` bounds the user's jobs that have not ended."""
        with self._transaction() as db:
            before = db.execute("SELECT digest, user FROM jobs WHERE name = ?", (name,)).fetchone()
            if before is not None:
                if before != (digest, user):
                    whose = "" if before[1] == user else f", which {before[1]} submitted"
                    raise Conflict(f"the name {name} stands for another job{whose}", fix="give this job another name")
                return self.job(name), False
            if most_waiting is not None:
                marks = ", ".join("?" * len(ENDED))
                (count,) = db.execute(
                    f"SELECT count(*) FROM jobs WHERE user = ? AND state NOT IN ({marks})", (user, *sorted(ENDED))
                ).fetchone()
                if count >= most_waiting:
                    raise Refused(
                        f"{user} has {count} jobs that have not ended, and may have {most_waiting}",
                        fix="cancel some, or wait until they end",
                    )
            cursor = db.execute(
                "INSERT INTO jobs (name, user, text, digest, folder, state, cause, priority, preemptible, max_wait_s,"
                " submitted_s, since_s, queued_s, num_steps) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (name, user, text, digest, folder, State.QUEUED, "submitted", priority, preemptible, max_wait_s, now, now, now,
                 num_steps),
            )  # fmt: skip
            _event(db, int(cursor.lastrowid or 0), now, State.QUEUED, "submitted", {"user": user})
        return self.job(name), True

    def ask(self, name: str, ask: Ask, cause: str, now: float) -> Row:
        """Pause, cancel or preempt a job: at once where nobody drives it, else by its supervisor."""
        with self._transaction() as db:
            job = self.job(name)
            state = State(job.state)
            if state in DRIVEN:
                before = None if job.asked is None else Ask(job.asked)
                if (holds := stronger(before, ask)) is not before:
                    db.execute("UPDATE jobs SET asked = ? WHERE id = ?", (holds, job.id))
                    _event(db, job.id, now, f"asked_{ask}", cause, {})
            elif ask is not Ask.PREEMPT and state is not STOPPED_AS[ask]:
                if STOPPED_AS[ask] not in MOVES[state]:
                    raise Refused(
                        f"{name} is {state}, and cannot be {STOPPED_AS[ask]}", fix=f"`shardwise status {name}` shows it"
                    )
                _moved(db, job, STOPPED_AS[ask], cause, now)
        return self.job(name)

    def resume(self, name: str, cause: str, now: float) -> Row:
        """Put a paused or failed job back into the queue; one that waits or runs stays as it is."""
        with self._transaction() as db:
            job = self.job(name)
            state = State(job.state)
            if state in (State.PAUSED, State.FAILED):
                _moved(db, job, State.QUEUED, cause, now, num_lost=0)
            elif state in ENDED:
                raise Refused(f"{name} is {state}: it does not go on", fix="submit it under another name")
            elif job.asked is not None:
                raise Refused(
                    f"{name} is being stopped ({job.asked})",
                    fix=f"wait for it (`shardwise status {name}`), then resume",
                )
        return self.job(name)

    def cordon(self, node: str, *, cordoned: bool) -> None:
        """Give no new job GPUs of a node, or do so again."""
        with self._transaction() as db:
            sql = "INSERT OR IGNORE INTO cordons VALUES (?)" if cordoned else "DELETE FROM cordons WHERE node = ?"
            db.execute(sql, (node,))

    # What the controller does -----------------------------------------------------------------------------------------

    def move(self, name: str, to: State, cause: str, now: float, **changes: Any) -> None:
        """Move a job that nobody drives; Fenced where it was moved meanwhile."""
        with self._transaction() as db:
            job = self.job(name)
            if State(job.state) in DRIVEN or to in DRIVEN or to not in MOVES[State(job.state)]:
                raise Fenced(f"{name} is {job.state} and was to be {to}")
            _moved(db, job, to, cause, now, **changes)

    def start(
        self,
        name: str,
        gpus: Iterable[tuple[str, int]],
        cause: str,
        now: float,
        *,
        lease_s: float,
        ends_s: float | None = None,
        backfilled: bool = False,
    ) -> int:
        """Give a planned job its GPUs and return the token of its new supervisor. Fenced where job or GPUs are gone."""
        with self._transaction() as db:
            job = self.job(name)
            if State(job.state) is not State.PLANNED:
                raise Fenced(f"{name} is {job.state}, not planned")
            taken = sorted(gpus)
            try:
                db.executemany("INSERT INTO gpus VALUES (?, ?, ?)", [(node, gpu, job.id) for node, gpu in taken])
            except sqlite3.IntegrityError:
                raise Fenced(f"a GPU of {taken} is in use") from None
            token = job.token + 1
            _moved(
                db, job, State.PLACING, cause, now, details={"gpus": taken, "token": token},
                token=token, lease_s=now + lease_s, started_s=now, ends_s=ends_s, backfilled=backfilled,
            )  # fmt: skip
        return token

    def lost(self, name: str, token: int, to: State, cause: str, now: float, *, is_dead: bool = False) -> None:
        """Take a job away from a supervisor that is known to be dead or whose lease ran out, and which is fenced from then on.
        Fenced where the lease was renewed."""
        with self._transaction() as db:
            job = self._driven(name, token)
            if not is_dead and (job.lease_s is None or job.lease_s > now):
                raise Fenced(f"the lease of {name} was renewed")
            if job.asked is not None:
                to = STOPPED_AS[Ask(job.asked)]
            _moved(db, job, to, cause, now, token=token + 1, num_lost=job.num_lost + 1)

    # What the supervisor of a job does, with its token -------------------------------------------------------------------

    def advance(self, name: str, token: int, to: State, cause: str, now: float, **changes: Any) -> None:
        """Move a driven job on, or to where it stops; its GPUs are free then."""
        with self._transaction() as db:
            job = self._driven(name, token)
            if to not in MOVES[State(job.state)]:
                raise Fenced(f"{name} is {job.state} and was to be {to}")
            if to is State.RUNNING:
                changes = {"num_lost": 0} | changes
            _moved(db, job, to, cause, now, **changes)

    def renew(self, name: str, token: int, until_s: float, **changes: Any) -> Ask | None:
        """Renew the lease, note how far the job is, and return what is asked of it."""
        with self._transaction() as db:
            job = self._driven(name, token)
            _update(db, job.id, {"lease_s": until_s} | changes)
        return None if job.asked is None else Ask(job.asked)

    def _driven(self, name: str, token: int) -> Row:
        job = self.job(name)
        if State(job.state) not in DRIVEN or job.token != token:
            raise Fenced(f"token {token} of {name} is old: the job is {job.state} under token {job.token}")
        return job


def _moved(
    db: sqlite3.Connection,
    job: Row,
    to: State,
    cause: str,
    now: float,
    *,
    details: Mapping[str, Any] | None = None,
    **changes: Any,
) -> None:
    """The transition and its event, inside the caller's transaction."""
    changes = {"state": to, "cause": cause, "since_s": now} | changes
    if to in WAITING and State(job.state) not in WAITING | DRIVEN:  # what was preempted or lost keeps its place
        changes["queued_s"] = now
    if to is State.QUEUED:
        changes |= {"offer": None}
    if State(job.state) in DRIVEN and to not in DRIVEN:
        (held,) = db.execute("SELECT count(*) FROM gpus WHERE job = ?", (job.id,)).fetchone()
        _charge(db, job.user, held * max(0.0, now - (job.started_s or now)), now)
        db.execute("DELETE FROM gpus WHERE job = ?", (job.id,))
        changes |= {"asked": None, "lease_s": None, "holder": None, "started_s": None, "ends_s": None, "backfilled": 0}
    _update(db, job.id, changes)
    _event(db, job.id, now, to, cause, {"from": job.state, **(details or {})})


def _update(db: sqlite3.Connection, job: int, changes: Mapping[str, Any]) -> None:
    assignments = ", ".join(f"{column} = ?" for column in changes)
    db.execute(f"UPDATE jobs SET {assignments} WHERE id = ?", [*changes.values(), job])


def _event(db: sqlite3.Connection, job: int, now: float, kind: str, cause: str, details: Mapping[str, Any]) -> None:
    db.execute(
        "INSERT INTO events (job, time_unix_s, kind, cause, details) VALUES (?, ?, ?, ?, ?)",
        (job, now, str(kind), cause, json.dumps(details)),
    )


def _charge(db: sqlite3.Connection, user: str, gpu_s: float, now: float) -> None:
    before = db.execute("SELECT gpu_s, at_s FROM usage WHERE user = ?", (user,)).fetchone()
    total = gpu_s + (0.0 if before is None else _decayed(before[0], now - before[1]))
    db.execute("INSERT OR REPLACE INTO usage VALUES (?, ?, ?)", (user, total, now))


def _decayed(gpu_s: float, age_s: float) -> float:
    return float(gpu_s * 0.5 ** (max(0.0, age_s) / HALF_LIFE_S))
