"""The Ray actor around one training worker. Two threads of Ray's enter it: one trains, the other answers and stops."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from orchestrator.training.pulse import Pulse

PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket Timeout",
    "Connection refused",
    "Timed out waiting",
    "gloo/transport",
)
PEER_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")
"""Errors of gloo and NCCL, and what torch raises for them, where another rank is gone: a consequence, not a cause."""


class TrainingWorker:
    def __init__(self, logs: str, rank: int) -> None:
        self._stop_cause: str | None = None
        self._pulse: Pulse | None = None
        self._log_refused: str | None = None
        self._rank = rank
        self._listener: socket.socket | None = None
        log = Path(logs) / f"rank-{rank:04d}.log"
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        except OSError as error:  # no reason not to train
            self._log_refused = f"{log.name} cannot be written: {error.strerror}; what rank {rank} prints is lost"
            file = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):  # of the process, so that what C++ prints is in the log too
            os.dup2(file, descriptor)
        os.close(file)

    def about(self, address: str) -> dict[str, Any]:
        """Tell the process, its node, the cores that it may use, and the port of the rendezvous if this rank opens it at that
        address: its socket is bound and stays so."""
        import ray

        if self._rank == 0 and self._listener is None:
            self._listener = socket.create_server((address, 0))
        return {
            "pid": os.getpid(),
            "node_id": ray.get_runtime_context().get_node_id(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            "port": 0 if self._listener is None else int(self._listener.getsockname()[1]),
        }

    def train(self, assignment: str) -> str:
        """JSON in, JSON out: {"outcome": {...}} or {"error", "peer", "out_of_memory"}."""
        try:
            return json.dumps({"outcome": self._train(json.loads(assignment))})
        except Exception as error:
            with contextlib.suppress(OSError):  # a full disk takes no log; the cause travels in the answer
                traceback.print_exc()
            told = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            return json.dumps(
                {
                    "error": told,
                    "peer": type(error).__name__ in PEER_ERRORS or any(words in str(error) for words in PEER_GONE),
                    "out_of_memory": type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError),
                }
            )
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()

    def _train(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        from orchestrator.telemetry.journal import Journal
        from orchestrator.telemetry.records import Event
        from orchestrator.training import rank_log
        from orchestrator.training.assignment import Assignment
        from orchestrator.training.worker import train

        rank_log.begin()
        assignment = Assignment.from_mapping(mapping)
        self._pulse = Pulse()
        # Straight to the disk: a step that is in a checkpoint is in the file, whoever dies next.
        journal = Journal(Path(assignment.run_directory))
        if self._log_refused is not None:
            journal.write(Event(time_unix_s=time.time(), kind="log_refused", cause=self._log_refused))
        outcome = train(
            assignment,
            report=journal.write,
            sync=journal.sync,
            should_stop=lambda: self._stop_cause,
            ends_with_process=True,
            listener=self._listener,
            pulse=self._pulse,
        )
        if assignment.rank == 0 and (missing := journal.sync()):
            outcome = replace(outcome, cause="; ".join(filter(None, [outcome.cause, missing])))
        return asdict(outcome)

    def sign(self) -> dict[str, Any] | None:
        """Return what the training thread is doing; None before it trains."""
        return None if self._pulse is None else self._pulse.sign().to_mapping()

    def stop(self, cause: str) -> None:
        from orchestrator.training.rank_log import LOG

        LOG.info("asked to stop: %s", cause)
        self._stop_cause = cause
