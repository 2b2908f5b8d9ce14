"""`shardwise serve` with real jobs that share the machine, one after the other; controller and supervisor are killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from clusters.inventory.local import discover
from orchestrator.cli import main
from orchestrator.client import Client, ServiceError
from orchestrator.control.processes import end_marked
from orchestrator.control.store import Store
from orchestrator.telemetry.records import steps

pytestmark = pytest.mark.ray

JOB = """version: 1
name: {name}
model: {{family: opt, num_layers: 2, hidden_size: 32, num_heads: 2, vocab_size: 264, max_position: 64}}
data: {{train: [text.txt]}}
batch: {{global_batch_size: 4, sequence_length: 64}}
training: {{steps: {steps}, precision: fp32}}
strategy: {{data_parallel_degree: {workers}, zero_stage: 1}}
checkpoint: {{every: 25}}
{more}"""


class Service:
    """A `shardwise serve` of a folder, which may be killed and started again."""

    def __init__(self, folder) -> None:
        self.folder, self.root = folder, folder / "root"
        self.root.mkdir()
        text = "\n".join(f"{n} squared is {n * n} and cubed is {n**3}" for n in range(4000))
        (self.root / "text.txt").write_text(text)
        self.process: subprocess.Popen | None = None

    def start(self) -> Client:
        command = [sys.executable, "-m", "orchestrator.cli", "serve", "--root", str(self.root), "--port", "0"]
        with (self.folder / "serve.log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        line = self.process.stdout.readline()
        assert line.startswith("serves    http://127.0.0.1:"), (self.folder / "serve.log").read_text()
        return Client(line.split()[1].rstrip(","))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=10)
        self.process.stdout.close()

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        with contextlib.closing(Store(self.root / ".shardwise" / "service.sqlite")) as store:
            for row in store.jobs():
                if row.holder is not None:
                    with contextlib.suppress(psutil.Error):
                        psutil.Process(int(row.holder.partition(":")[0])).kill()
                end_marked(row.folder)


@pytest.fixture
def service(tmp_path):
    made = Service(tmp_path)
    yield made
    made.end()


def until(what: Callable[[], bool], within_s: float = 240.0) -> None:
    deadline = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.2)


def test_jobs_wait_for_each_other_and_outlive_their_controller(service, capsys, monkeypatch):
    workers = discover().gpus_per_node  # each job needs all that the machine has
    assert workers >= 1
    client = service.start()
    monkeypatch.setenv("SHARDWISE_SERVER", client.url)
    job = service.folder / "job.yaml"
    job.write_text(JOB.format(name="first", steps=100_000, workers=workers, more=""))
    assert main(["submit", str(job)]) == 0
    client.submit(JOB.format(name="second", steps=60, workers=workers, more=""))
    client.submit(JOB.format(name="never", steps=60, workers=workers, more="queue: {priority: -1}\n"))
    until(lambda: client.job("first")["state"] == "running" and client.job("first")["step"] >= 10)
    second = client.job("second")
    assert second["state"] == "planned"
    assert second["cause"].startswith("is next: needs ")
    assert "first ends" in second["cause"]
    assert client.cancel("never")["state"] == "cancelled"
    (node,) = client.nodes()
    assert (node["num_free"], node["jobs"]) == (0, ["first"])

    service.kill()  # the controller dies; the job does not notice
    seen = steps(service.root / "runs" / "first" / "metrics.jsonl")[-1].step
    until(lambda: steps(service.root / "runs" / "first" / "metrics.jsonl")[-1].step > seen + 20)
    with pytest.raises(ServiceError, match="cannot be reached"):
        client.job("first")
    client = service.start()
    monkeypatch.setenv("SHARDWISE_SERVER", client.url)
    until(lambda: client.job("first")["step"] > seen + 20)
    kinds = [event["kind"] for event in client.events("first")]
    assert kinds == ["queued", "planned", "placing", "starting", "running"], "adopted, not started again"

    with contextlib.closing(Store(service.root / ".shardwise" / "service.sqlite")) as store:
        holder = int(store.job("first").holder.partition(":")[0])
    os.kill(holder, signal.SIGKILL)  # its supervisor dies: it waits again, and goes on from its checkpoint
    until(lambda: "queued" in [event["kind"] for event in client.events("first")][1:])
    assert [event["cause"] for event in client.events("first")][5] == "its supervisor died"
    until(lambda: client.job("first")["state"] == "running")
    assert main(["cancel", "first", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["asked"] == "cancel"
    assert main(["watch", "first"]) == 5
    assert main(["watch", "second"]) == 0
    assert "second: succeeded  step 60 / 60" in capsys.readouterr().out
    assert main(["logs", "second", "--follow"]) == 0
    assert "finished at step 60" in capsys.readouterr().out
    for name in ("first", "second"):
        done = [report.step for report in steps(service.root / "runs" / name / "metrics.jsonl")]
        assert done == list(range(1, len(done) + 1)), "no step is missing"
    assert client.nodes()[0]["num_free"] == workers
    assert client.call("GET", "/v1/health")["status"] == "ok"
    assert (service.folder / "serve.log").read_text() == ""
