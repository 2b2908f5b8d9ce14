"""Who can reach a run from outside the machine: nobody. Every socket of every process of a run with two workers is looked at."""

from __future__ import annotations

import ipaddress
import socket
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks import chaos
from orchestrator.control.processes import end_marked, marked

pytestmark = pytest.mark.ray


def sockets(folder, run) -> dict[str, set[str]]:
    """address -> the processes that listen there: TCP sockets that listen, and UDP sockets, which always hear."""
    found: dict[str, set[str]] = {}
    for process in [psutil.Process(run.pid), *marked(str(folder))]:
        try:
            name = " ".join(process.cmdline())[:200]
            for each in process.net_connections(kind="inet"):
                if each.status == psutil.CONN_LISTEN or (each.type == socket.SOCK_DGRAM and not each.raddr):
                    found.setdefault(each.laddr.ip, set()).add(f"{name} port {each.laddr.port}")
        except psutil.NoSuchProcess:
            continue
    return found


def is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback  # ::ffff:127.0.0.1 is 127.0.0.1


def test_all_processes_of_a_run_listen_on_loopback_alone(tmp_path):
    file = chaos.job(tmp_path, name="small", workers=2, steps=100_000)
    folder = tmp_path / "runs" / "small"
    run = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "run", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    seen: dict[str, set[str]] = {}
    try:
        deadline = time.monotonic() + 120
        while chaos.last_step(folder) < 20:  # from the first process on: rendezvous and collectives included
            assert run.poll() is None, run.stdout.read().decode()
            assert time.monotonic() < deadline
            for address, who in sockets(folder, run).items():
                seen.setdefault(address, set()).update(who)
            time.sleep(0.05)
    finally:
        run.kill()
        run.communicate(timeout=30)
        end_marked(str(folder))
    print(*sorted(f"{address} {who}" for address, each in seen.items() for who in each), sep="\n")
    everybody = " ".join(who for each in seen.values() for who in each)
    for who in ("raylet", "gcs_server", "ray::TrainingWorker", "orchestrator.cli run"):
        assert who in everybody
    open_to_others = {address: who for address, who in seen.items() if not is_loopback(address)}
    assert open_to_others == {}
