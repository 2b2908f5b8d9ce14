"""`shardwise run --address` on a Ray cluster of several hosts, each in network, process and file namespaces of its own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from benchmarks import chaos
from benchmarks.hosts import Hosts, forbidden
from clusters.calibration.measure import cpu_calibration, machine_record
from clusters.inventory.local import available_cores
from orchestrator.telemetry.records import Event, read, steps

pytestmark = [pytest.mark.ray, pytest.mark.skipif(forbidden() is not None, reason=str(forbidden()))]

RAY = str(Path(sys.executable).with_name("ray"))
PORT = 6379
STEPS = 6
ASK = """
import sys
from clusters.inventory.ray import ask
try:
    print(len(ask(sys.argv[1])))
except ValueError as error:  # nobody listens yet; or it is there, and open to anyone
    print(1 if "from anyone" in str(error) else 0)
"""


@pytest.fixture
def shared(tmp_path):
    """A folder that all hosts see, with what was measured of this machine."""
    cpu_calibration(available_cores())
    cache = tmp_path / "cache" / "shardwise"
    cache.mkdir(parents=True)
    for file in machine_record(available_cores()).parent.glob("cpu-*.json"):
        shutil.copy(file, cache)
    return tmp_path


class Ray:
    """A Ray cluster of hosts, its head on host 0."""

    def __init__(self, hosts: Hosts, shared: Path, *, cores: int, auth: str = "token") -> None:
        self.hosts, self.address = hosts, f"{hosts.address(0)}:{PORT}"
        self.environment = {
            "RAY_AUTH_MODE": auth,
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
            "XDG_CACHE_HOME": str(shared / "cache"),
        }
        for index in range(hosts.count):
            where = (
                ["--head", f"--port={PORT}", "--include-dashboard=false"] if index == 0 else ["--address", self.address]
            )
            fixed = ["--num-gpus=0", "--object-store-memory=80000000", "--disable-usage-stats", "--block"]
            words = [*where, f"--num-cpus={cores}", f"--node-ip-address={hosts.address(index)}", *fixed]
            hosts.start(index, [RAY, "start", *words], environment=self.environment)
            self.wait(index + 1)

    def wait(self, count: int) -> None:
        """Until so many nodes are there; a cluster that is refused has only its head."""
        deadline, found = time.monotonic() + 120, 0
        while found < count:
            assert time.monotonic() < deadline, f"{found} of {count} nodes of the Ray cluster came up"
            asked = self.python(0, ["-c", ASK, self.address])
            found = int(asked.stdout or 0)

    def run(self, index: int, file: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.python(
            index, ["-m", "orchestrator.cli", "run", str(file), "--address", self.address, "--json"], **environment
        )

    def python(self, index: int, words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *words]
        started = self.hosts.start(
            index,
            command,
            environment={**self.environment, "PYTHONPATH": os.getcwd(), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = started.communicate(timeout=240)
        return subprocess.CompletedProcess(command, started.returncode, out, err)


def job(shared: Path, name: str, *, nodes: int, per_node: int, directory: str | None = None) -> Path:
    """Two halves of each product inside a host, two pipeline stages across."""
    file = chaos.job(shared, name=name, workers=4, steps=STEPS)
    mapping = yaml.safe_load(file.read_text())
    mapping["cluster"] = {"gpu": "cpu", "nodes": nodes, "gpus_per_node": per_node}
    mapping["strategy"] = {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2, "micro_batch_size": 1}
    if directory is not None:
        mapping["checkpoint"]["directory"] = directory
    file.write_text(yaml.safe_dump(mapping))
    return file


def losses(shared: Path, name: str) -> list[float]:
    return [report.loss for report in steps(shared / "runs" / name / "metrics.jsonl")]


def on_one_machine(shared: Path) -> list[float]:
    file = job(shared, "one", nodes=1, per_node=4)
    alone = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "run", str(file), "--json"],
        env={**os.environ, "XDG_CACHE_HOME": str(shared / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    return losses(shared, "one")


def placed(shared: Path, name: str) -> Event:
    return next(event for event in read(shared / "runs" / name / "events.jsonl", Event) if event.kind == "placed")


def test_four_workers_on_two_hosts_have_the_losses_of_one_machine_bit_for_bit(shared):
    with Hosts(2, shared=shared) as hosts:
        ray = Ray(hosts, shared, cores=2)
        done = ray.run(0, job(shared, "two", nodes=2, per_node=2))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["step"] == STEPS
    plan = json.loads((shared / "runs" / "two" / "plan.json").read_text())["placement"]
    assert placed(shared, "two").details["nodes"] == [row["node"] for row in plan] == [0, 0, 1, 1]
    assert [row["pipeline"] for row in plan] == [0, 0, 1, 1]  # tensor groups inside a host
    assert "ranks 0-1 on host-" in done.stderr
    log = (shared / "runs" / "two" / "logs" / "rank-0003.log").read_text()
    assert "ranks talk through interface eth0, rank 0 is at 10.77.0.1" in log
    assert losses(shared, "two") == on_one_machine(shared)


@pytest.mark.slow
def test_a_run_folder_that_only_one_host_sees_is_told_before_training_starts(shared):
    with Hosts(2, shared=shared) as hosts:
        ray = Ray(hosts, shared, cores=2)
        unseen = ray.run(0, job(shared, "unseen", nodes=2, per_node=2, directory="/tmp/home/runs"))
    assert unseen.returncode == 1, unseen.stderr
    told = json.loads(unseen.stdout)
    assert told["step"] == 0
    assert "does not see /tmp/home/runs/unseen: all nodes must see the run folder" in told["cause"]


@pytest.mark.slow
def test_four_workers_on_four_hosts_have_the_losses_of_one_machine_bit_for_bit(shared):
    with Hosts(4, shared=shared) as hosts:
        ray = Ray(hosts, shared, cores=1)
        done = ray.run(3, job(shared, "four", nodes=4, per_node=1))
        assert done.returncode == 0, done.stderr
    assert placed(shared, "four").details["nodes"] == [0, 1, 2, 3]
    assert losses(shared, "four") == on_one_machine(shared)


@pytest.mark.slow
def test_a_ray_without_tokens_is_refused(shared):
    with Hosts(1, shared=shared) as hosts:
        ray = Ray(hosts, shared, cores=2, auth="disabled")
        refused = ray.run(0, job(shared, "open", nodes=1, per_node=4))
    assert refused.returncode == 2, refused.stderr
    assert "takes commands from anyone who reaches it" in refused.stderr
    assert not (shared / "runs").exists()
