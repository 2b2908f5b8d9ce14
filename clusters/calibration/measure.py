"""The calibration of this machine: measured once in a child process, kept in the user's cache.

The parent never imports torch, so that `plan` stays light on every later start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from clusters import describe
from clusters.calibration.runs import with_record
from clusters.cluster import Cluster
from clusters.files import locked, write_atomically
from clusters.hardware import Calibration

FORMAT = 1
"""Version of the cached file and of what is measured: raised when either changes."""
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
"""Environment that CPU workers run under, so measured under it: freed memory goes back to the system, new tensors fault again."""
QUICK_BUDGET_S, FULL_BUDGET_S = 0.1, 0.5
"""Seconds a point."""
TIMEOUT_S = 600
Say = Callable[[float, str], None]


def cpu_calibration(
    num_workers: int, *, quick: bool = True, fresh: bool = False, say: Say | None = None
) -> Calibration:
    """Return what one core does while `num_workers` of them work. Cached by processor, cores, torch and worker environment.

    With the errors that finished runs on this machine showed."""
    measured = _measured(num_workers, quick=quick, fresh=fresh, say=say)
    return with_record(measured, machine_record(num_workers))


def machine_record(num_workers: int) -> Path:
    """Return where finished runs on this CPU are kept, beside what was measured of it."""
    return _cache_file(num_workers).with_suffix(".runs.yaml")


def _measured(num_workers: int, *, quick: bool, fresh: bool, say: Say | None) -> Calibration:
    path = _cache_file(num_workers)
    if not fresh and (found := _cached(path, quick)):
        return found
    with _one_at_a_time(path):
        if not fresh and (found := _cached(path, quick)):  # another process measured while this one waited
            return found
        measured = rounded(run_child("clusters.calibration.cpu", num_workers, quick=quick, folder=path.parent, say=say))
        calibration = describe.section_of(
            Calibration, {"calibration": measured | {"source": _source(quick)}}, "calibration", "measuring this machine"
        )
        _store(path, {"key": machine_key(num_workers), "quick": quick, "calibration": describe.plain(calibration)})
        return calibration


def is_measured(num_workers: int) -> bool:
    """Whether `cpu_calibration` answers at once."""
    return _cached(_cache_file(num_workers), quick=True) is not None


def cuda_cluster(cluster: Cluster, *, quick: bool = True, say: Say | None = None) -> Cluster:
    """The node of GPUs, measured: not yet run on a GPU, since none was at hand where this was written."""
    found = run_child("clusters.calibration.cuda", cluster.gpus_per_node, quick=quick, folder=cache_folder(), say=say)
    found = rounded(found)
    source = f"measured: torch {torch_version()}, {'quick' if quick else 'full'}"
    host_link = found.pop("host_link_bytes_per_s")
    where = "measuring the GPUs"
    calibration = describe.section_of(Calibration, {"it": found | {"source": source}}, "it", where)
    rate, latency = collective(calibration, cluster.gpus_per_node)
    link = dataclasses.replace(
        cluster.intra_node, bytes_per_s=rate, latency_s=latency, measured=cluster.gpus_per_node > 1, source=source
    )
    return dataclasses.replace(
        cluster,
        accelerator=dataclasses.replace(cluster.accelerator, host_link_bytes_per_s=host_link),
        intra_node=link if cluster.gpus_per_node > 1 else cluster.intra_node,
        calibration=calibration,
    )


def collective(calibration: Calibration, num_ranks: int) -> tuple[float, float]:
    """Bus bytes per second and latency of an all-reduce over so many ranks, or the nearest number of them measured.

    A single rank has measured none and sends none: its memory's rate stands in.
    """
    measured = sorted(int(name.rsplit("_", 1)[1]) for name in calibration.curves if name.startswith("all_reduce_"))
    if not measured:
        return calibration.memory_bytes_per_s or 1e9, 0.0
    label = f"all_reduce_{min(measured, key=lambda n: (abs(n - num_ranks), n))}"
    return calibration.curves[label][-1][1], calibration.collective_latency_s.get(label, 0.0)


def run_child(module: str, num_workers: int, *, quick: bool, folder: Path, say: Say | None = None) -> dict[str, Any]:
    """Run a measuring module; its lines of JSON are progress and then the result. RuntimeError with what it printed."""
    if importlib.util.find_spec("torch") is None:
        raise ValueError(
            "this machine cannot be measured: torch is not installed\n  to fix: pip install torch, or name a GPU"
        )
    where = folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
    budget_s = QUICK_BUDGET_S if quick else FULL_BUDGET_S
    environment = os.environ | WORKER_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result: dict[str, Any] | None = None
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(num_workers), str(budget_s), str(where)],
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            text=True,
            env=environment,
            start_new_session=True,  # so that its workers end with it
        )
        assert child.stdout is not None
        too_long = threading.Timer(TIMEOUT_S, _end, [child])
        too_long.start()
        try:
            for line in child.stdout:
                message = json.loads(line)
                result = message.get("result", result)
                if say and "progress" in message:
                    say(message["progress"], message["what"])
            code = child.wait()
        finally:
            too_long.cancel()
            _end(child)
            child.stdout.close()
        errors.seek(0)
        tail = errors.read()[-2000:]
    if code or result is None:
        raise RuntimeError(f"measuring this machine failed (exit {code})\n{tail}")
    return result


def _end(child: subprocess.Popen[str]) -> None:
    """End a child with its whole group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def machine_key(num_workers: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "cpu": cpu_model(),
        "workers": num_workers,
        "torch": torch_version(),
        "environment": WORKER_ENVIRONMENT,
    }


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardwise"


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Model name, family and stepping: virtual machines call many processors by one name."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "cpu family", "model", "stepping", "cache size", "Hardware", "CPU implementer", "CPU part")
    facts: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in wanted:
            facts.setdefault(name.strip(), value.strip())
    return ", ".join(f"{name} {value}" for name, value in facts.items()) or platform.machine()


def torch_version() -> str:
    """Without importing it."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _cache_file(num_workers: int) -> Path:
    return cache_folder() / f"cpu-{_digest(machine_key(num_workers))}.json"


def _source(quick: bool) -> str:
    return f"measured here: torch {torch_version()}, {'quick' if quick else 'full'}, one thread a core, all cores busy"


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _cached(path: Path, quick: bool) -> Calibration | None:
    """A full measurement serves where a quick one is asked for. An unreadable file is measured again."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["quick"] and not quick:
            return None
        return describe.section_of(Calibration, stored, "calibration", str(path))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(path: Path, value: Mapping[str, Any]) -> None:
    """Store a value in the cache; where it cannot be written, the next start measures again."""
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps(value))


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Two measurements at once would each measure half a machine."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(locked(path))
        yield


def rounded(value: Any) -> Any:
    """Four significant digits: no measurement here has more."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value
