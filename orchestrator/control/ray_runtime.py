"""The process that holds Ray: an embedded cluster of this machine, a placement group, one actor a worker.

It is a child of `run`, apart from it, because a Ray driver dies or hangs with its raylet: `run` outlives both and starts
another. It decides nothing. Commands come as JSON lines on standard input, answers leave on standard output:

    {"do": "begin", "num_workers", "num_gpus", "limits"}  -> {"kind": "ready", "port", "pids", "phases"} or failed
    {"do": "train", "assignments": [...]}              -> {"kind": "outcome", ...} or {"kind": "failed", "failure", "cause"}
    {"do": "stop", "cause": "Ctrl-C"}                     an outcome follows
                                                       -> {"kind": "signs", "signs": {rank: what it is doing}}, now and then

The end of standard input ends everything: the parent has gone, or wants it so.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from clusters.calibration.measure import WORKER_ENVIRONMENT
from orchestrator.control import ray_private
from orchestrator.control.actor import TrainingWorker
from orchestrator.control.processes import MARK, end, end_marked, gone, is_stopped
from orchestrator.training.limits import Limits

LOOK_S = 1.0
"""Between two looks at what the workers are doing."""
LEAVE_S = 2.0
"""Seconds for a worker that Ray was told to end; a healthy one takes milliseconds. Then it is killed."""
OBJECT_STORE_BYTES = 80 * 2**20
"""Nothing travels through Ray's object store; this is about the least that Ray takes."""
QUIET = {
    # Only loopback, on every system: the switch that Ray throws on macOS and Windows.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    **WORKER_ENVIRONMENT,
}
"""Environment of this process, inherited by raylet and workers: a runtime_env would cost a process start each."""

OF_AN_OUTER_RAY = ("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_ADDRESS")
"""Variables that Ray gives to the command of a job, as KubeRay submits one, and that must not reach the Ray that is embedded
here: by the first every worker would see all GPUs, and take the same one."""


class Failed(Exception):
    def __init__(self, failure: str, cause: str) -> None:
        super().__init__(cause)
        self.failure, self.cause = failure, cause


class Runtime:
    """The worker group. All methods run on the main thread; the watch thread only ends the process."""

    def __init__(self, *, logs: Path, session: Path, tell: Any) -> None:
        self.logs, self.session, self.tell = logs, session, tell
        self.ray: Any = None
        self.group: Any = None
        self.limits = Limits()
        self.actors: list[Any] = []
        self.pids: list[int] = []
        self.running: dict[Any, int] = {}
        """Future of a worker's end -> its rank."""
        self.asked: dict[Any, int] = {}
        """Future of a worker's sign of life -> its rank; one at a time, since a process that is stopped answers none."""
        self.looked_at = 0.0

    # Start ------------------------------------------------------------------------------------------------------------

    def begin(self, *, num_workers: int, num_gpus: int, limits: Mapping[str, float]) -> None:
        self.limits = Limits(**limits)
        phases: dict[str, float] = {}
        started = time.perf_counter()
        if self.ray is None:
            self._start_ray(num_workers, num_gpus)
            phases["ray_s"] = time.perf_counter() - started
            mark = time.perf_counter()
            self._place(num_workers, num_gpus)
            phases["placement_s"] = time.perf_counter() - mark
        elif stopped := [kind for kind, process in ray_private.processes() if is_stopped(process.pid)]:
            # Training goes on without them; a new group would wait for them until its limit.
            raise Failed(
                "ray_lost", f"Ray's {' and '.join(stopped)} is stopped (SIGSTOP), so that no worker can be started"
            )
        mark = time.perf_counter()
        port = self._start_workers(num_workers, num_gpus)
        phases["workers_s"] = time.perf_counter() - mark
        self.tell(kind="ready", port=port, pids=self.pids, phases=phases)

    def _start_ray(self, num_workers: int, num_gpus: int) -> None:
        shutil.rmtree(self.session, ignore_errors=True)
        import ray

        if missing := ray_private.missing():
            raise Failed("user_error", missing)
        ray_private.leave_out_what_is_not_used()
        try:
            ray.init(
                address="local",
                num_cpus=num_workers,
                num_gpus=num_gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="ERROR",
                namespace="shardwise",
                _node_ip_address="127.0.0.1",
                _temp_dir=str(self.session),
                # Workers wait in stock with torch imported before an actor asks for one.
                _system_config={"preload_python_modules": ["orchestrator.training.worker"]},
            )
        except Exception as error:
            raise Failed("no_start", f"Ray did not start: {_first_line(error)}") from None
        self.ray = ray
        threading.Thread(target=self._watch, args=(ray_private.processes(),), daemon=True).start()

    def _watch(self, processes: list[tuple[str, Any]]) -> None:
        """A driver may hang where its raylet died: this thread does not depend on it."""
        while True:
            for kind, process in processes:
                if process.poll() is not None and kind in ("raylet", "gcs_server"):
                    self._keep_ray_logs()
                    self.tell(kind="failed", failure="ray_lost", cause=f"Ray's {kind} died (exit {process.returncode})")
                    end_marked(os.environ[MARK])
                    os._exit(1)
            time.sleep(0.1)

    def _keep_ray_logs(self) -> None:
        kept = self.logs / "ray"
        try:
            kept.mkdir(exist_ok=True)
            for name in ("raylet.out", "raylet.err", "gcs_server.out", "gcs_server.err"):
                if (file := self.session / "session_latest" / "logs" / name).exists():
                    shutil.copy(file, kept / name)
        except OSError as error:
            _log(f"Ray's logs could not be kept: {error}")

    def _place(self, num_workers: int, num_gpus: int) -> None:
        from ray.util.placement_group import placement_group

        bundle = {"CPU": 1.0, **({"GPU": 1.0} if num_gpus else {})}
        self.group = placement_group([bundle] * num_workers, strategy="STRICT_PACK")
        limit_s = self.limits.ray_s
        if not self.group.wait(limit_s):
            raise Failed("no_start", f"Ray found no place for {num_workers} workers in {limit_s:.0f} s")

    def _start_workers(self, num_workers: int, num_gpus: int) -> int:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        ray = self.ray
        actor = ray.remote(num_cpus=1, num_gpus=1 if num_gpus else 0, max_concurrency=2, max_restarts=0)(TrainingWorker)
        self.actors = [
            actor.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self.group, placement_group_bundle_index=rank
                )
            ).remote(str(self.logs), rank)
            for rank in range(num_workers)
        ]
        try:
            about = ray.get([worker.about.remote() for worker in self.actors], timeout=self.limits.ray_s)
        except Exception as error:
            raise Failed("no_start", f"the workers did not start: {_first_line(error)}") from None
        self.pids = [worker["pid"] for worker in about]
        return int(about[0]["port"])

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
        self.end_workers()
        self.tell(**message)

    def _answer(self, future: Any) -> dict[str, Any]:
        try:
            return dict(json.loads(self.ray.get(future)))
        except Exception as error:
            memory = type(error).__name__ == "OutOfMemoryError"
            return {"error": _first_line(error), "died": not memory, "out_of_memory": memory}

    def end_workers(self) -> None:
        for worker in self.actors:
            try:
                self.ray.kill(worker, no_restart=True)
            except Exception as error:
                _log(f"ray.kill: {error}")
        # Workers that Ray ends at its own word are no deaths that it reports, at length, into ray.log.
        gone(self.pids, within_s=LEAVE_S)
        end(self.pids)
        self.actors, self.pids, self.running, self.asked = [], [], {}, {}


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


def _log(text: str) -> None:
    """A line into ray.log; a disk that refuses it is no reason to end."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


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


def embedded_environment(outer: Mapping[str, str]) -> dict[str, str]:
    """The environment of the embedded Ray and its workers, from that of `run`."""
    kept = {name: value for name, value in outer.items() if name not in OF_AN_OUTER_RAY}
    # A token of this Ray alone. Without it, Ray would write one into the user's home folder.
    return {**kept, **QUIET, "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def serve(logs: Path, session: Path) -> None:
    tell = partial(_tell, os.fdopen(os.dup(1), "w"), threading.Lock())
    os.dup2(2, 1)  # Ray prints now and then; our answers have a descriptor of their own
    environment = embedded_environment(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    commands: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(commands,), daemon=True).start()
    import ray  # noqa: F401  while `run` still plans

    runtime = Runtime(logs=logs, session=session, tell=tell)
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
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
