"""One fault at a time: does the run end as it should, with the losses of an undisturbed one and an event that names the cause?

    python -m benchmarks.faults [--only WORDS ...] [--workers 3] [--steps 60] [--directory FOLDER]

A row a fault: signals and dead terminals, processes that are stopped or get stuck in storage, a torn line between the
processes, a clock that jumps. The run's limits are scaled so that a hang is seen within seconds. All losses, those of steps
that were done again included, are compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks import chaos
from orchestrator.control.processes import end_marked, marked
from orchestrator.telemetry.records import Event, read
from orchestrator.training.limits import SCALE
from orchestrator.training.manifest import latest

STRIKE_AT = 12
"""Step at which a fault strikes; two checkpoints are there by then."""
HANG_SCALE = 0.06
"""Of the limits where a hang must be seen: 18 s without a sign of life, 108 s for the first step."""
SLOW_S, LONGER_S = 12.0, 30.0
"""A pause within the scaled limit, and one beyond it."""
LIMIT_S = 240.0
"""Longest run of the command."""
CLOCK = """
import os, runpy, sys, time
real, file = time.time, os.environ["CLOCK_FILE"]
def jumping():
    try:
        return real() + float(open(file).read())
    except (OSError, ValueError):
        return real()
time.time = jumping
sys.argv = ["shardwise", *sys.argv[1:]]
runpy.run_module("orchestrator.cli", run_name="__main__")
"""
"""The command with a wall clock of its own: only this process sees it jump."""


@dataclass(kw_only=True)
class Scene:
    """One run of the command with what was made for it."""

    directory: Path
    file: Path
    folder: Path
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    run: psutil.Popen | None = None
    terminal: int | None = None
    """The side of the pseudo terminal that a terminal program holds."""

    def start(self, how: str = "plain") -> None:
        command = [sys.executable, "-m", "orchestrator.cli", "run", str(self.file)]
        if how == "clock":
            command[1:3] = ["-c", CLOCK]
        if how == "nohup":
            # As nohup does, which leads the output to a file besides.
            command = ["bash", "-c", f"trap '' HUP; exec {' '.join(command)}"]
        if how == "head":
            command = ["bash", "-c", f"set -o pipefail; {' '.join(command)} | head -n 1"]
        environment = os.environ | {"PYTHONPATH": str(chaos.ROOT)} | self.environment
        if how in ("terminal", "nohup"):
            self.terminal, inside = pty.openpty()
            self.run = psutil.Popen(
                ["setsid", "--ctty", "--wait", *command], stdin=inside, stdout=inside, stderr=inside, env=environment
            )
            os.close(inside)
            return
        with self.log.open("a") as log:
            self.run = psutil.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def command(self) -> psutil.Process:
        """The process of `shardwise run` itself, under whatever started it."""
        assert self.run is not None
        family = [psutil.Process(self.run.pid), *self.run.children(recursive=True)]
        return next(each for each in family if str(self.file) in each.cmdline() and "python" in each.cmdline()[0])

    def one(self, word: str, number: int = 0) -> psutil.Process:
        """A process of the run by a word of its command line."""
        found = [each for each in marked(str(self.folder.resolve())) if word in " ".join(each.cmdline())]
        return sorted(found, key=lambda each: each.pid)[number]

    def hang_up(self) -> None:
        assert self.terminal is not None
        os.close(self.terminal)
        self.terminal = None

    def until_step(self, step: int) -> None:
        deadline = time.monotonic() + LIMIT_S
        assert self.run is not None
        while chaos.last_step(self.folder) < step and self.run.poll() is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"step {step} was not reached in {LIMIT_S:.0f} s; see {self.log}")
            time.sleep(0.02)

    def wait(self) -> int:
        """The exit code; what the terminal shows is read meanwhile and kept in the log."""
        assert self.run is not None
        deadline = time.monotonic() + LIMIT_S
        while self.run.poll() is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the run did not end in {LIMIT_S:.0f} s; see {self.log}")
            time.sleep(0.05)
        return int(self.run.returncode)

    def close(self) -> None:
        if self.terminal is not None:
            self.hang_up()
        if self.run is not None and self.run.poll() is None:
            for process in [*self.run.children(recursive=True), self.run]:
                process.kill()
        end_marked(str(self.folder.resolve()))


@dataclass(frozen=True, kw_only=True)
class Fault:
    name: str
    strike: Callable[[Scene], object] = lambda scene: None
    """Done after step STRIKE_AT."""
    start: str = "plain"
    stuck: dict[str, object] | None = None
    """What benchmarks/stuck is told, instead of a strike."""
    scaled: bool = False
    """Limits are scaled so that it is seen within seconds."""
    restarts: int = 0
    """As many are the answer. None where what is only slow is left alone."""
    stops: bool = False
    """The answer is a checkpoint and exit code 5; the same command then goes on to the end."""
    kind: str
    """Of the event that names the cause."""
    words: tuple[str, ...] = ()
    """In its cause."""


def to_all(scene: Scene, number: signal.Signals) -> None:
    """As a service manager does: a signal to every process of the job."""
    for process in [scene.command(), *marked(str(scene.folder.resolve()))]:
        process.send_signal(number)


def garble(scene: Scene) -> None:
    """Half a message on the pipe between the process that holds Ray and the command."""
    host = scene.one("orchestrator.control.ray_runtime")
    for descriptor in (1, *range(3, 40)):
        path = Path(f"/proc/{host.pid}/fd/{descriptor}")
        mine = Path(f"/proc/{scene.command().pid}/fd")
        if path.exists() and str(path.readlink()).startswith("pipe:"):
            readers = [each for each in mine.iterdir() if each.exists() and each.readlink() == path.readlink()]
            if readers and os.access(path, os.W_OK) and descriptor != 0:
                with path.open("wb") as pipe:
                    pipe.write(b'{"kind": "outc\nnot JSON at all\n\xff\xfe\n[1, 2]\n')
                return
    raise RuntimeError("the pipe was not found")


def jump(scene: Scene) -> None:
    """A day ahead, then two days back."""
    clock = Path(scene.environment["CLOCK_FILE"])
    for offset in ("86400", "-86400"):
        clock.write_text(offset)
        scene.until_step(chaos.last_step(scene.folder) + 5)


def blind(scene: Scene) -> None:
    """The command itself sees nothing for longer than a hang takes, while its workers go on, and then ends as ever."""
    command = scene.command()
    command.suspend()
    time.sleep(LONGER_S)
    command.resume()


def without_raylet(scene: Scene) -> None:
    """A new group cannot be started in a Ray whose raylet does nothing."""
    scene.one("/raylet/raylet").suspend()
    scene.one("ray::TrainingWorker").kill()


def stuck(at: str, rank: int | None = 1, how: str = "stop", seconds: float = 3600.0) -> dict[str, object]:
    return {"at": at, "rank": rank, "step": STRIKE_AT, "how": how, "seconds": seconds}


FAULTS = (
    Fault(
        name="the terminal is closed",
        start="terminal",
        strike=Scene.hang_up,
        stops=True,
        kind="stopped",
        words=("the terminal was closed",),
    ),
    Fault(
        name="the terminal is closed, SIGHUP ignored (nohup)",
        start="nohup",
        strike=Scene.hang_up,
        kind="watcher_dropped",
        words=("Screen", "Input/output error", "training goes on"),
    ),
    Fault(
        name="the reader of the output is gone (| head -n 1)",
        start="head",
        kind="watcher_dropped",
        words=("Screen", "Broken pipe", "training goes on"),
    ),
    Fault(
        name="SIGTERM to all processes",
        strike=lambda scene: to_all(scene, signal.SIGTERM),
        stops=True,
        kind="stopped",
        words=("SIGTERM",),
    ),
    Fault(
        name="SIGINT to all processes",
        strike=lambda scene: to_all(scene, signal.SIGINT),
        stops=True,
        kind="stopped",
        words=("Ctrl-C",),
    ),
    Fault(
        name="a torn line on the pipe",
        strike=garble,
        kind="line_skipped",
        words=("the process that holds Ray", "not JSON"),
    ),
    Fault(name="a wall clock that jumps both ways", start="clock", strike=jump, kind="finished"),
    *(
        Fault(
            name=f"SIGSTOP of rank 1, {where}",
            stuck=stuck(at),
            scaled=True,
            restarts=1,
            kind="restart",
            words=("no sign of life", "rank 1"),
        )
        for at, where in (
            ("forward", "in forward"),
            ("collective", "in a collective"),
            ("checkpoint", "in a checkpoint"),
            ("data", "in its data"),
        )
    ),
    Fault(
        name="rank 1 waits for its data for ever",
        stuck=stuck("data", how="stall"),
        scaled=True,
        restarts=1,
        kind="restart",
        words=("no sign of life", "rank 1", "data"),
    ),
    Fault(
        name="all ranks wait for the storage of their data",
        stuck=stuck("data", rank=None, how="stall"),
        scaled=True,
        restarts=1,
        kind="restart",
        words=("no sign of life", "rank 0, 1, 2 of 3 is in step", "phase data"),
    ),
    Fault(
        name="a step of rank 1 that is only slow",
        stuck=stuck("forward", how="stall", seconds=SLOW_S),
        scaled=True,
        kind="finished",
    ),
    Fault(name="SIGSTOP of the command, SIGCONT after 30 s", strike=blind, scaled=True, kind="finished"),
    Fault(
        name="SIGSTOP of the process that holds Ray",
        strike=lambda scene: scene.one("orchestrator.control.ray_runtime").suspend(),
        scaled=True,
        restarts=1,
        kind="restart",
        words=("no sign of life", "the process that holds Ray"),
    ),
    Fault(
        name="SIGSTOP of the raylet",
        strike=lambda scene: scene.one("/raylet/raylet").suspend(),
        kind="finished",
    ),
    Fault(
        name="SIGSTOP of the raylet, then a worker is killed",
        strike=without_raylet,
        scaled=True,
        restarts=2,
        kind="restart",
        words=("raylet is stopped",),
    ),
)


def played(fault: Fault, directory: Path, wanted: dict[int, float], *, workers: int, steps: int) -> list[str]:
    """What went wrong; nothing where the run ended as it should."""
    name = "".join(letter if letter.isalnum() else "-" for letter in fault.name.lower()).strip("-")[:50]
    scene = Scene(
        directory=directory,
        file=chaos.job(directory, name=name, workers=workers, steps=steps),
        folder=directory / "runs" / name,
        log=directory / f"{name}.log",
    )
    if fault.scaled:
        scene.environment[SCALE] = str(HANG_SCALE)
    if fault.stuck is not None:
        flag = str(directory / f"{name}.struck")
        scene.environment |= {
            "STUCK": json.dumps({**fault.stuck, "flag": flag}),
            "PYTHONPATH": f"{Path(__file__).parent / 'stuck'}:{chaos.ROOT}",
        }
    if fault.start == "clock":
        scene.environment["CLOCK_FILE"] = str(directory / f"{name}.clock")
    try:
        scene.start(fault.start)
        if fault.stuck is None:
            scene.until_step(STRIKE_AT)
            fault.strike(scene)
        code = scene.wait()
        wrong = [] if code == (5 if fault.stops else 0) else [f"exit code {code}"]
        if left := marked(str(scene.folder.resolve())):
            wrong.append(f"processes {[process.pid for process in left]} were left")
        if fault.stops:
            newest = latest(scene.folder / "checkpoints", report=lambda event: None)
            if newest is None or newest.step != chaos.last_step(scene.folder) or newest.step >= steps:
                wrong.append(f"the newest checkpoint is {newest} after step {chaos.last_step(scene.folder)}")
            scene.start()
            if (code := scene.wait()) != 0:
                wrong.append(f"exit code {code} when it was run again")
    except RuntimeError as error:
        return [str(error)]
    finally:
        scene.close()
    return wrong + unlike(fault, scene, wanted)


def unlike(fault: Fault, scene: Scene, wanted: dict[int, float]) -> list[str]:
    """What events and losses say that they should not."""
    events = list(read(scene.folder / "events.jsonl", Event))
    named = [event for event in events if event.kind == fault.kind and all(w in event.cause for w in fault.words)]
    wrong = [] if named else [f"no event {fault.kind} with {fault.words}: {[(e.kind, e.cause) for e in events[-4:]]}"]
    restarts = [event.cause for event in events if event.kind == "restart"]
    if len(restarts) != fault.restarts:
        wrong.append(f"{len(restarts)} restarts: {restarts}")
    return wrong + chaos.differences(scene.folder, wanted)[:3]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", default=[""], metavar="WORDS", help="faults with one of these in their name"
    )
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--directory", type=Path, help="of jobs, runs and logs; by default a new temporary one")
    given = parser.parse_args(arguments)
    directory = given.directory or Path(tempfile.mkdtemp(prefix="faults-"))
    directory.mkdir(parents=True, exist_ok=True)
    print(f"{given.workers} workers, {given.steps} steps, in {directory}", flush=True)
    calm = chaos.job(directory, name="calm", workers=given.workers, steps=given.steps)
    wanted = chaos.undisturbed(calm, directory / "runs" / "calm", directory / "calm.log")
    failed = 0
    print(f"{'fault':<50}  {'seconds':>7}  ends as it should", flush=True)
    for fault in FAULTS:
        if not any(words in fault.name for words in given.only):
            continue
        began = time.monotonic()
        wrong = played(fault, directory, wanted, workers=given.workers, steps=given.steps)
        failed += bool(wrong)
        print(f"{fault.name:<50}  {time.monotonic() - began:>7.1f}  {'; '.join(wrong) or 'yes'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
