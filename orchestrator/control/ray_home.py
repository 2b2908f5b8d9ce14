"""The Ray that a worker group lives in: one of this run alone on loopback, or a cluster that is there already.

Both give the group its nodes, tell what is wrong with themselves, and end what is left of a group. A process id
belongs to its node, so on a cluster the process is ended by a task on that node.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from clusters.calibration.measure import WORKER_ENVIRONMENT
from clusters.inventory.ray import Node, Unit, node_of
from orchestrator.control import ray_private
from orchestrator.control.placement import choose, shortage
from orchestrator.control.processes import GROUP_MARK, MARK, end, end_marked, gone, is_stopped

LOOPBACK = "127.0.0.1"
LEAVE_S = 2.0
"""Seconds for a worker that Ray was told to end; a healthy one takes milliseconds. Then it is killed."""
TASK_S = 60.0
"""Longest wait for a task on a node that starts a process there for it."""
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
"""Environment of this process, inherited by an embedded raylet and its workers: a runtime_env would cost a process start each."""
OF_AN_OUTER_RAY = ("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_ADDRESS")
"""Variables that Ray gives to the command of a job, as KubeRay submits one, and that must not reach the Ray that is embedded
here: by the first every worker would see all GPUs, and take the same one."""


class Failed(Exception):
    def __init__(self, failure: str, cause: str) -> None:
        super().__init__(cause)
        self.failure, self.cause = failure, cause


class Home(Protocol):
    """A Ray, as the worker group needs it."""

    worker_environment: Mapping[str, str]
    """Variables of the workers beyond those that they inherit."""

    def start(self, num_workers: int, num_gpus: int) -> Any:
        """Return the module `ray`, connected. Raises Failed."""

    def trouble(self) -> str | None:
        """Return why no worker can be started in it; None where nothing is known."""

    def nodes(self, *, num_nodes: int, per_node: int, unit: Unit, within_s: float) -> list[Node]:
        """Return nodes with so much room each; waits for them. Raises Failed."""

    def lost(self, nodes: Sequence[Node]) -> list[Node]:
        """Return those of the nodes that are dead."""

    def examine(self, nodes: Sequence[Node], paths: Sequence[str]) -> None:
        """Raises Failed where a node cannot serve the group: other code, or a folder that it does not see."""

    def end_workers(self, nodes: Sequence[Node], pids: Sequence[int]) -> None:
        """Ends the processes of the group that Ray left; one that outlives it is in no condition to write."""


class Embedded:
    """A Ray of this machine and this run, on loopback, with a token of its own."""

    def __init__(self, *, logs: Path, session: Path, tell: Callable[..., None]) -> None:
        self.logs, self.session, self.tell = logs, session, tell
        self.worker_environment: Mapping[str, str] = {}

    @staticmethod
    def environment(outer: Mapping[str, str]) -> dict[str, str]:
        """The environment of the embedded Ray and its workers, from that of `run`."""
        kept = {name: value for name, value in outer.items() if name not in OF_AN_OUTER_RAY}
        # A token of this Ray alone. Without it, Ray would write one into the user's home folder.
        return {**kept, **QUIET, "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    def start(self, num_workers: int, num_gpus: int) -> Any:
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
                _node_ip_address=LOOPBACK,
                _temp_dir=str(self.session),
                # Workers wait in stock with torch imported before an actor asks for one.
                _system_config={"preload_python_modules": ["orchestrator.training.worker"]},
            )
        except Exception as error:
            raise Failed("no_start", f"Ray did not start: {first_line(error)}") from None
        threading.Thread(target=self._watch, args=(ray_private.processes(),), daemon=True).start()
        return ray

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
            log(f"Ray's logs could not be kept: {error}")

    def trouble(self) -> str | None:
        stopped = [kind for kind, process in ray_private.processes() if is_stopped(process.pid)]
        if not stopped:
            return None
        # Training goes on without them; a new group would wait for them until its limit.
        return f"Ray's {' and '.join(stopped)} is stopped (SIGSTOP), so that no worker can be started"

    def nodes(self, *, num_nodes: int, per_node: int, unit: Unit, within_s: float) -> list[Node]:
        import ray

        (node,) = (node_of(node) for node in ray.nodes())
        return [node]

    def lost(self, nodes: Sequence[Node]) -> list[Node]:
        return []  # `_watch` ends this process with its Ray

    def examine(self, nodes: Sequence[Node], paths: Sequence[str]) -> None:
        """This machine has this code, and sees its own folders."""

    def end_workers(self, nodes: Sequence[Node], pids: Sequence[int]) -> None:
        # Workers that Ray ends at its own word are no deaths that it reports, at length, into ray.log.
        gone(list(pids), within_s=LEAVE_S)
        end(list(pids))


class Joined:
    """A Ray cluster at an address, with token authentication; it goes on when this run has ended."""

    def __init__(self, address: str, *, folder: Path) -> None:
        self.address, self.folder = address, folder
        self.mark = os.environ[MARK]
        # SPT_NOENV: a process that retitles itself leaves its environment readable.
        self.worker_environment: Mapping[str, str] = {**WORKER_ENVIRONMENT, GROUP_MARK: self.mark, "SPT_NOENV": "1"}

    @staticmethod
    def environment(outer: Mapping[str, str]) -> dict[str, str]:
        """The environment of the driver, from that of `run`: the cluster's token is the user's to give."""
        kept = {name: value for name, value in outer.items() if name not in OF_AN_OUTER_RAY}
        return {**kept, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}

    def start(self, num_workers: int, num_gpus: int) -> Any:
        import ray

        try:
            ray.init(address=self.address, namespace="shardwise", log_to_driver=False, logging_level="ERROR")
        except Exception as error:
            raise Failed("no_start", f"the Ray cluster at {self.address} was not joined: {first_line(error)}") from None
        return ray

    def trouble(self) -> str | None:
        return None

    def _alive(self) -> list[Node]:
        import ray
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
        nodes = [node | {"Available": free.get(node["NodeID"], {})} for node in ray.nodes() if node["Alive"]]
        return [node_of(node) for node in nodes]

    def nodes(self, *, num_nodes: int, per_node: int, unit: Unit, within_s: float) -> list[Node]:
        deadline = time.monotonic() + within_s
        while True:
            alive = self._alive()
            found = choose(alive, num_nodes=num_nodes, per_node=per_node, unit=unit)
            if found is not None:
                return found
            if time.monotonic() > deadline:
                short = shortage(alive, num_nodes=num_nodes, per_node=per_node, unit=unit)
                raise Failed("no_start", f"the Ray cluster at {self.address} has no place: {short}")
            time.sleep(1.0)

    def lost(self, nodes: Sequence[Node]) -> list[Node]:
        alive = {node.node_id for node in self._alive()}
        return [node for node in nodes if node.node_id not in alive]

    def examine(self, nodes: Sequence[Node], paths: Sequence[str]) -> None:
        from orchestrator.control import node_tasks

        mine = node_tasks.make_version()()
        theirs = self._on_each(nodes, node_tasks.make_version())
        for node, version in zip(nodes, theirs, strict=True):
            if version != mine:
                raise Failed("user_error", node_tasks.versions_told(node.name, version, mine))
        for node, left in zip(nodes, self._on_each(nodes, node_tasks.end_group, self.mark, LEAVE_S), strict=True):
            if left:  # of a `run` that was killed: they may still write
                raise Failed("no_start", f"processes {left} of an earlier run on {node.name} outlive SIGKILL")
        with node_tasks.shared_word(self.folder) as (word, answers):
            told = self._on_each(nodes, node_tasks.look, str(word), list(paths))
            for node, missing in zip(nodes, told, strict=True):
                if missing or not answers(node.node_id):
                    raise Failed("user_error", node_tasks.not_shared_told(node.name, missing or [str(self.folder)]))

    def _on_each(self, nodes: Sequence[Node], act: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what a function answers on each node, in order. Raises Failed."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = ray.remote(num_cpus=0, max_retries=0)(act)
        asked = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote(
                *arguments
            )
            for node in nodes
        ]
        answers = []
        for node, future in zip(nodes, asked, strict=True):
            try:
                answers.append(ray.get(future, timeout=TASK_S))
            except Exception as error:
                raise Failed("no_start", f"{node.name} carries out no task: {first_line(error)}") from None
        return answers

    def end_workers(self, nodes: Sequence[Node], pids: Sequence[int]) -> None:
        from orchestrator.control import node_tasks

        for node in self._reachable(nodes):
            try:
                if left := self._on_each([node], node_tasks.end_group, self.mark, LEAVE_S)[0]:
                    log(f"processes {left} on {node.name} outlive SIGKILL")
            except Failed as failed:
                log(failed.cause)

    def _reachable(self, nodes: Sequence[Node]) -> list[Node]:
        lost = {node.node_id for node in self.lost(nodes)}
        return [node for node in nodes if node.node_id not in lost]


def log(text: str) -> None:
    """A line into ray.log; a disk that refuses it is no reason to end."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
