"""What `run` shows may be lost, and which signals it heeds: neither a dead terminal nor a closed pipe stops training."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time

import pytest

from orchestrator.cli import main
from orchestrator.cli.foreground import interrupts
from orchestrator.cli.outlet import Outlet, silence
from orchestrator.cli.screen import Screen
from orchestrator.control.supervisor import Stop
from orchestrator.spec import parse_job
from orchestrator.telemetry.records import Event

BATCH = {"global_batch_size": 8, "sequence_length": 64}
EVENT = Event(time_unix_s=1.0, kind="restart", step=3, cause="rank 1 died")


def until(condition) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


@pytest.fixture
def pipe():
    """(descriptor to read from, text stream to write to)"""
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w", encoding="utf-8", closefd=False)
    yield reading, stream
    for descriptor in (reading, writing):
        try:
            os.close(descriptor)
        except OSError:
            continue


def test_what_is_written_arrives_in_order():
    stream = io.StringIO()
    outlet = Outlet(stream)
    for number in range(100):
        outlet.write(f"{number} ")
    outlet.close()
    assert stream.getvalue() == " ".join(str(number) for number in range(100)) + " "


def test_a_closed_pipe_neither_raises_nor_is_silent_about_it(pipe):
    reading, stream = pipe
    outlet = Outlet(stream)
    os.close(reading)
    outlet.write("nobody reads this")
    assert until(lambda: outlet.lost)
    assert outlet.lost == "Broken pipe"
    outlet.write("nor this")
    stream.write("nor this, past the outlet")
    stream.flush()


def test_a_reader_that_stops_reading_blocks_nobody(pipe):
    reading, stream = pipe
    outlet = Outlet(stream)
    started = time.monotonic()
    for _ in range(3000):
        outlet.write("x" * 1000)
    outlet.close()
    assert time.monotonic() - started < 8
    assert outlet.lost is None
    os.close(reading)
    assert until(lambda: outlet.lost)


def test_the_screen_tells_the_supervisor_that_it_is_lost_and_shows_nothing_more(pipe, monkeypatch):
    reading, stream = pipe
    monkeypatch.setattr(sys, "stdout", stream)
    job = {"version": 1, "name": "x", "model": "opt-125m", "batch": BATCH, "training": {"steps": 9}}
    with Screen(parse_job(job)) as screen:
        screen.on_event(EVENT)
        assert b"rank 1 died" in os.read(reading, 1000)
        os.close(reading)
        screen.note("a line that finds nobody")
        assert until(lambda: screen.outlet.lost)
        with pytest.raises(OSError, match="the output is lost: Broken pipe"):
            screen.on_event(EVENT)
        screen.note("another")


def test_a_process_whose_output_is_closed_exits_as_it_would_have():
    code = "import sys, time; from orchestrator.cli.outlet import Outlet; o = Outlet(sys.stdout); o.write('a'); time.sleep(.5)"
    code += "; o.write('b'); o.close(); print('at the end'); sys.exit(5)"
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stdout.read(1) == b"a"
    run.stdout.close()
    assert run.wait(timeout=20) == 5
    assert run.stderr is not None
    assert run.stderr.read() == b""
    run.stderr.close()


def test_an_error_that_nobody_can_read_keeps_its_exit_code(pipe, monkeypatch):
    reading, stream = pipe
    os.close(reading)
    stream.reconfigure(line_buffering=True)
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["no-such-verb"]) == 2
    silence(stream)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_that_is_ignored_already_stays_ignored_as_under_nohup(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        stop = Stop(heard=True)
        with interrupts(stop):
            os.kill(os.getpid(), number)
        assert stop.cause is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("signals", "cause", "now"),
    [
        ([signal.SIGINT], "Ctrl-C", False),
        ([signal.SIGINT, signal.SIGINT], "Ctrl-C", True),
        # A closing terminal and a service manager signal more than once: the checkpoint is still written.
        ([signal.SIGHUP, signal.SIGHUP], "the terminal was closed", False),
        ([signal.SIGTERM, signal.SIGHUP, signal.SIGTERM], "SIGTERM", False),
        ([signal.SIGTERM, signal.SIGINT], "SIGTERM", True),
    ],
)
def test_only_ctrl_c_after_a_stop_means_now(signals, cause, now):
    stop, before = Stop(heard=True), {number: signal.getsignal(number) for number in set(signals)}
    with interrupts(stop):
        for number in signals:
            os.kill(os.getpid(), number)
    assert (stop.cause, stop.now) == (cause, now)
    assert {number: signal.getsignal(number) for number in set(signals)} == before
