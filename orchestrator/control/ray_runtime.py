"""The process that holds Ray: a placement group, one actor a worker, in a Ray of this run alone or in a cluster at an address.

It is a child of `run`, apart from it, because a Ray driver dies or hangs with its raylet: `run` outlives both and starts
another. It decides nothing. Commands come as JSON lines on standard input, answers leave on standard output:

    {"do": "begin", "num_workers", "num_gpus", "per_node", "seen", "limits"}
                                                       -> {"kind": "ready", "address", "port", "workers", "phases"} or failed
    {"do": "train", "assignments": [...]}              -> {"kind": "outcome", ...} or {"kind": "failed", "failure", "cause"}
    {"do": "stop", "cause": "Ctrl-C"}                     an outcome follows
                                                       -> {"kind": "signs", "signs": {rank: what it is doing}}, now and then

The end of standard input ends everything: the parent has gone, or wants it so.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from clusters.inventory.ray import Node, Unit
from orchestrator.control.actor import TrainingWorker
from orchestrator.control.placement import node_of, workers_of
from orchestrator.control.processes import MARK, end_marked
from orchestrator.control.ray_home import LOOPBACK, Embedded, Failed, Home, Joined, first_line, log
from orchestrator.training.limits import Limits

LOOK_S = 1.0
"""Between two looks at what the workers are doing."""


class Runtime:
    """The worker group. All methods run on the main thread; the watch thread only ends the process."""

    def __init__(self, *, home: Home, logs: Path, tell: Any) -> None:
        self.home, self.logs, self.tell = home, logs, tell
        self.ray: Any = None
        self.group: Any = None
        self.nodes: list[Node] = []
        """Nodes of the group, as the plan's placement counts them."""
        self.per_node = 1
        self.limits = Limits()
        self.actors: list[Any] = []
        self.pids: list[int] = []
        self.running: dict[Any, int] = {}
        """Future of a worker's end -> its rank."""
        self.asked: dict[Any, int] = {}
        """Future of a worker's sign of life -> its rank; one at a time, since a process that is stopped answers none."""
        self.looked_at = 0.0

    # Start ------------------------------------------------------------------------------------------------------------

    def begin(
        self, *, num_workers: int, num_gpus: int, per_node: int, seen: Sequence[str], limits: Mapping[str, float]
    ) -> None:
        """Starts a group. `seen`: paths that every node must see."""
        self.limits, self.per_node = Limits(**limits), per_node
        phases: dict[str, float] = {}
        mark = time.perf_counter()
        if self.ray is None:
            self.ray = self.home.start(num_workers, num_gpus)
            phases["ray_s"] = time.perf_counter() - mark
        elif trouble := self.home.trouble():
            raise Failed("ray_lost", trouble)
        mark = time.perf_counter()
        if self.group is None or self.home.lost(self.nodes):
            self._place(num_workers, num_gpus)
            self.home.examine(self.nodes, seen)
            phases["placement_s"] = time.perf_counter() - mark
        mark = time.perf_counter()
        address = LOOPBACK if len(self.nodes) == 1 else self.nodes[0].address
        about = self._start_workers(num_workers, num_gpus, address)
        phases["workers_s"] = time.perf_counter() - mark
        workers = [
            {"node": node_of(rank, per_node), "name": self._node_of(rank).name, "cores": worker["cores"]}
            for rank, worker in enumerate(about)
        ]
        self.tell(kind="ready", address=address, port=about[0]["port"], workers=workers, phases=phases)

    def _node_of(self, rank: int) -> Node:
        return self.nodes[node_of(rank, self.per_node)]

    def _place(self, num_workers: int, num_gpus: int) -> None:
        """One placement group, all or nothing: a bundle a node, each held to its node."""
        from ray.util.placement_group import placement_group, remove_placement_group

        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None
        counts, unit, limit_s = workers_of(num_workers, self.per_node), _unit(num_gpus), self.limits.ray_s
        self.nodes = self.home.nodes(num_nodes=len(counts), per_node=max(counts), unit=unit, within_s=limit_s)
        self.group = placement_group(
            [{"CPU": float(count), **({"GPU": float(count)} if num_gpus else {})} for count in counts],
            strategy="PACK",
            bundle_label_selector=[{"ray.io/node-id": node.node_id} for node in self.nodes],
        )
        if not self.group.wait(limit_s):
            raise Failed("no_start", f"Ray found no place for {num_workers} workers in {limit_s:.0f} s")

    def _start_workers(self, num_workers: int, num_gpus: int, address: str) -> list[dict[str, Any]]:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        ray = self.ray
        settings: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1 if num_gpus else 0}
        if self.home.worker_environment:
            settings["runtime_env"] = {"env_vars": dict(self.home.worker_environment)}
        actor = ray.remote(max_concurrency=2, max_restarts=0, **settings)(TrainingWorker)
        self.actors = [
            actor.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self.group, placement_group_bundle_index=node_of(rank, self.per_node)
                )
            ).remote(str(self.logs), rank)
            for rank in range(num_workers)
        ]
        try:
            about = ray.get([worker.about.remote(address) for worker in self.actors], timeout=self.limits.ray_s)
        except Exception as error:
            raise Failed("no_start", f"the workers did not start: {first_line(error)}") from None
        self.pids = [worker["pid"] for worker in about]
        for rank, worker in enumerate(about):
            if worker["node_id"] != self._node_of(rank).node_id:
                raise Failed("no_start", f"rank {rank} is not on {self._node_of(rank).name}, where the plan places it")
        return list(about)

    # Training ---------------------------------------------------------------------------------------------------------

    def train(self, assignments: list[Mapping[str, Any]]) -> None:
        self.running = {
            worker.train.remote(json.dumps(assignment)): rank
            for rank, (worker, assignment) in enumerate(zip(self.actors, assignments, strict=True))
        }

    def look(self) -> None:
        """Tells what the workers are doing, now and then; a message without one says that this process lives."""
        if time.monotonic() - self.looked_at < LOOK_S:
            return
        self.looked_at = time.monotonic()
        signs: dict[int, Any] = {}
        if self.asked:
            for future in self.ray.wait(list(self.asked), num_returns=len(self.asked), timeout=0)[0]:
                rank = self.asked.pop(future)
                try:
                    signs[rank] = self.ray.get(future)
                except Exception:  # it died, which its other future tells
                    continue
        waiting = set(self.asked.values())
        for rank in set(self.running.values()) - waiting:
            self.asked[self.actors[rank].sign.remote()] = rank
        self.tell(kind="signs", signs={rank: sign for rank, sign in signs.items() if sign is not None})

    def stop(self, cause: str) -> None:
        for worker in self.actors:
            worker.stop.remote(cause)

    def tick(self) -> None:
        """Tells how the group ended, when it did."""
        if not self.running or not self.ray.wait(list(self.running), timeout=0)[0]:
            return
        answers: dict[int, dict[str, Any]] = {}
        deadline: float | None = None
        while self.running and (deadline is None or time.monotonic() < deadline):
            ended, _ = self.ray.wait(list(self.running), timeout=0.05)
            for future in ended:
                rank = self.running.pop(future)
                answers[rank] = self._answer(future)
            if deadline is None and answers:
                failed = any("error" in answer for answer in answers.values())
                wait_s = self.limits.grace_s if failed else self.limits.finish_s
                deadline = time.monotonic() + wait_s
            elif deadline is not None and any("error" in answer for answer in answers.values()):
                deadline = min(deadline, time.monotonic() + self.limits.grace_s)
            if any(answer.get("died") for answer in answers.values()):
                break
        self.running = {}
        message = judged(answers, num_workers=len(self.actors))
        if any(answer.get("died") for answer in answers.values()) and (lost := self.home.lost(self.nodes)):
            names = ", ".join(node.name for node in lost)
            ranks = [rank for rank in range(len(self.actors)) if self._node_of(rank) in lost]
            told = f"node {names} is gone, with rank {', '.join(map(str, ranks))} of {len(self.actors)}"
            message = {"kind": "failed", "failure": "node_lost", "cause": told}
        self.end_workers()
        self.tell(**message)

    def _answer(self, future: Any) -> dict[str, Any]:
        try:
            return dict(json.loads(self.ray.get(future)))
        except Exception as error:
            memory = type(error).__name__ == "OutOfMemoryError"
            return {"error": first_line(error), "died": not memory, "out_of_memory": memory}

    def end_workers(self) -> None:
        for worker in self.actors:
            try:
                self.ray.kill(worker, no_restart=True)
            except Exception as error:
                log(f"ray.kill: {error}")
        if self.actors:
            self.home.end_workers(self.nodes, self.pids)
        self.actors, self.pids, self.running, self.asked = [], [], {}, {}


def _unit(num_gpus: int) -> Unit:
    return "GPU" if num_gpus else "CPU"


def judged(answers: Mapping[int, Mapping[str, Any]], *, num_workers: int) -> dict[str, Any]:
    """How a group ended, from what its workers answered. Pure.

    Whoever has an outcome has it for all: the ranks agree on it before they return. An error that a worker told of itself is
    the cause of the deaths beside it: a group whose peer is gone aborts now and then. A death, in turn, is the cause of broken
    connections."""
    for _, answer in sorted(answers.items()):
        if "outcome" in answer:
            return {"kind": "outcome", "outcome": answer["outcome"]}
    order = sorted(answers, key=lambda rank: (bool(answers[rank].get("peer")), bool(answers[rank].get("died")), rank))
    rank = order[0]
    answer = answers[rank]
    failure = "worker_lost" if answer.get("died") else "worker_error"
    if answer.get("out_of_memory"):
        failure = "out_of_memory"
    cause = f"rank {rank} of {num_workers}: {answer['error']}"
    if answer.get("died"):
        cause = f"the process of rank {rank} of {num_workers} died"
    return {"kind": "failed", "failure": failure, "cause": cause, "rank": rank}


def _tell(file: Any, lock: threading.Lock, **message: Any) -> None:
    with lock:
        file.write(json.dumps(message) + "\n")
        file.flush()


def _listen(commands: queue.Queue[dict[str, Any]]) -> None:
    """Ends everything where the parent is gone, whatever the main thread hangs in."""
    for line in sys.stdin.buffer:
        try:
            command = json.loads(line)
            commands.put({**command, "do": command["do"]})
        except (ValueError, TypeError, KeyError) as error:
            print(f"a command that is not JSON was skipped: {line[:200]!r} ({error})", file=sys.stderr, flush=True)
    end_marked(os.environ[MARK])
    os._exit(1)


def serve(logs: Path, session: Path, address: str | None = None) -> None:
    tell = partial(_tell, os.fdopen(os.dup(1), "w"), threading.Lock())
    os.dup2(2, 1)  # Ray prints now and then; our answers have a descriptor of their own
    environment = Embedded.environment(os.environ) if address is None else Joined.environment(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    commands: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(commands,), daemon=True).start()
    import ray  # noqa: F401  while `run` still plans

    home: Home = Embedded(logs=logs, session=session, tell=tell)
    if address is not None:
        home = Joined(address, folder=logs.parent)
    runtime = Runtime(home=home, logs=logs, tell=tell)
    while True:
        try:
            command = commands.get(timeout=0.05)
        except queue.Empty:
            runtime.tick()
            runtime.look()
            continue
        try:
            match command.pop("do"):
                case "begin":
                    runtime.begin(**command)
                case "train":
                    runtime.train(**command)
                case "stop":
                    runtime.stop(**command)
        except Failed as failed:
            runtime.end_workers()
            tell(kind="failed", failure=failed.failure, cause=failed.cause)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
