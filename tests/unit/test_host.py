"""The pipes and signals between `run` and the process that holds Ray, with small programs in its place."""

from __future__ import annotations

import os
import signal
import time

import pytest

from orchestrator.control.host import ENDING_SIGNALS, RayHost
from orchestrator.control.processes import marked

SAYS = r"""
import sys
lines = [b'{"kind": "torn', b'Ray says', bytes([255, 254]), b'[1]', b'{"no": "kind"}', b'{"kind": "ready"}', b'{"kind": "ha']
sys.stdout.buffer.write(bytes([10]).join(lines))
"""
SIGNALS = """
import json, signal, subprocess, sys, time
ask = "import json, signal; print(json.dumps(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))))"
child = json.loads(subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE).stdout)
print(json.dumps({"kind": "blocked", "child": child}), flush=True)
time.sleep(60)
"""
DEAF = """
import time
print('{"kind": "ready"}', flush=True)
time.sleep(60)
"""


@pytest.fixture
def host(tmp_path):
    made = []

    def make(program):
        made.append(RayHost(tmp_path / "run", program=("-c", program)))
        return made[-1]

    yield make
    for each in made:
        assert each.end(10) == []
    assert marked(str((tmp_path / "run").resolve())) == []


def test_a_line_that_is_no_message_never_ends_the_hearing(host):
    says = host(SAYS)
    heard = [says.hear(10) for _ in range(8)]
    assert [message["kind"] for message in heard if message] == [*["garbled"] * 5, "ready", "garbled", "gone"]
    assert heard[0]["line"] == '{"kind": "torn'


def test_the_signals_that_end_a_job_are_kept_from_the_host_and_all_that_it_starts(host):
    message = host(SIGNALS).hear(20)
    assert message is not None
    assert {int(number) for number in ENDING_SIGNALS} <= set(message["child"])
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_host_that_is_stopped_and_reads_nothing_blocks_no_command_and_is_ended(host):
    deaf = host(DEAF)
    assert deaf.hear(20) == {"kind": "ready"}
    os.kill(deaf.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    for _ in range(20):
        deaf.tell(do="train", assignments=["x" * 100_000])
    assert time.monotonic() - started < 5
    assert deaf.hear(0.1) is None
