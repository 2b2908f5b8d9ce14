"""Times of the service's store and queue with many jobs waiting: a page, a submission, a pass over the queue.

python -m benchmarks.service [--jobs 10000]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.control.queue import Node, Running, Waiting, decide
from orchestrator.control.store import Store

REPEATS = 21


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    number = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "service.sqlite")
        insert = (
            "INSERT INTO jobs (name, user, text, digest, folder, state, cause, priority, preemptible, submitted_s, since_s,"
            " queued_s, num_gpus, num_nodes, wall_s, wall_error)"
            " VALUES (?, ?, ?, ?, '', 'planned', '', ?, 1, 0, 0, ?, 4, 1, 9e3, 0.2)"
        )
        store._db.execute("BEGIN")
        text = "name: job\n" * 50
        store._db.executemany(insert, [(f"job-{n}", f"user-{n % 9}", text, "", n % 3, n) for n in range(number)])
        store._db.execute("COMMIT")
        last = store.jobs()[-101].id
        report(f"a page of 100 of {number:,} jobs", lambda n: store.jobs(after=last, limit=100))
        submit = lambda n: store.submit(  # noqa: E731
            name=f"new-{n}", user="ada", text=text, digest="", now=1.0, most_waiting=number
        )
        report("a submission", submit)
        nodes = [Node(f"n{n}", 8) for n in range(8)]
        busy = [Running(f"r{n}", "ada", tuple((f"n{n}", gpu) for gpu in range(6)), ends_s=1e4) for n in range(8)]
        waiting = read(store)
        report("  reading what waits", lambda n: read(store))
        report("  deciding", lambda n: decide(waiting, busy, nodes, now=1.0))
        report("a pass over the queue", lambda n: decide(read(store), busy, nodes, now=1.0))
        store.close()


def read(store: Store) -> list[Waiting]:
    return [
        Waiting(row.name, row.user, row.num_gpus, row.num_nodes, row.priority, row.queued_s, row.wall_s)
        for row in store.planned()
    ]


def report(what: str, act: Callable[[int], object]) -> None:
    times = []
    for number in range(REPEATS):
        began = time.perf_counter()
        act(number)
        times.append((time.perf_counter() - began) * 1e3)
    print(f"{what:<32} median {statistics.median(times):6.1f} ms  least {min(times):6.1f}  most {max(times):6.1f}")


if __name__ == "__main__":
    main()
