"""The screen of `run`: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from orchestrator.cli.outlet import Outlet
from orchestrator.control.run import View
from orchestrator.planner.reasons.targets import judged
from orchestrator.planner.show.words import bytes_told, seconds_told, strategy_told, target_told

if TYPE_CHECKING:
    from orchestrator.control.folder import RunFolder
    from orchestrator.planner.plan import Plan
    from orchestrator.spec import Job
    from orchestrator.telemetry.records import Event, StepReport

TOLD = {
    "placed": "",
    "restart": "yellow",
    "schedule_changed": "yellow",
    "checkpoint_failed": "red",
    "checkpoint_refused": "red",
    "step_skipped": "yellow",
    "not_finite": "red",
    "evaluation": "cyan",
    "stopping": "yellow",
    "lost": "red",
    "not_ended": "red",
    "disk": "red",
    "records_delayed": "yellow",
    "records_missing": "yellow",
    "report_failed": "yellow",
    "log_refused": "yellow",
}
"""Events that a person is shown as they happen, with their colours; the others are in events.jsonl."""
PLAIN_LINES = 20
"""Lines of steps of a whole run where there is no terminal."""
SPEED_WINDOW = 20
"""Steps over which the speed is averaged."""


class Screen(View):
    """View and watcher of one run."""

    def __init__(self, job: Job, *, to_stderr: bool = False) -> None:
        super().__init__()
        self.watchers.append(self)
        self.job, self.num_steps = job, job.num_steps or 0
        self.outlet = Outlet(sys.stderr if to_stderr else sys.stdout)
        self.console = Console(file=cast("TextIO", self.outlet), highlight=False)
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.predicted = 0.0
        self.num_gpus, self.unit = 1, "GPU"
        self.recent: deque[StepReport] = deque(maxlen=SPEED_WINDOW)
        self.said_at = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description:<9}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[what]}"),
                console=self.console,
                refresh_per_second=8,
            )
            self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.progress is not None:
            self.progress.stop()
        self.outlet.close()

    # View -------------------------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def planned(self, plan: Plan, folder: RunFolder, done: int) -> None:
        memory, speed = plan.price.memory, plan.tokens_per_second_per_gpu
        self.predicted, self.num_gpus = speed, plan.strategy.num_gpus
        self.unit = "worker" if plan.cluster.accelerator.kind == "cpu" else "GPU"
        self.note(f"plan      {strategy_told(plan.strategy)}")
        told = f"{bytes_told(memory.peak_bytes)} of {bytes_told(memory.usable_bytes)} on each of {self.num_gpus}"
        self.note(f"promise   {speed:,.0f} tokens/s/{self.unit}, {told}")
        for row in judged(plan.job, plan.solution, plan.cost):
            if not row["met"]:
                wanted, got = target_told(row["name"], row["wanted"]), target_told(row["name"], row["got"])
                self.note(f"missed    {row['name']}: wanted {wanted}, the plan gets {got}")
        if plan.left_out is not None:
            faster = plan.left_out
            ratio = faster.tokens_per_second / plan.tokens_per_second
            self.note(f"left out  {strategy_told(faster.strategy)}: {ratio:.2f} times as fast, not built yet")
        self.note(f"folder    {folder.path}")
        if done >= self.num_steps:
            self.note(f"all {self.num_steps:,} steps are done already; to train on, set training.steps higher")
        elif done:
            self.note(f"goes on   after step {done:,} of {self.num_steps:,}")
        if self.progress is not None:
            self.task = self.progress.add_task("starting", total=self.num_steps, completed=done, what="Ray and workers")

    def preparing(self, done_bytes: int, total_bytes: int) -> None:
        told = f"text to tokens: {bytes_told(done_bytes)} of {bytes_told(total_bytes)}"
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, description="preparing", what=told)
        elif time.monotonic() - self.said_at > 10 or done_bytes == total_bytes:
            self.note(f"prepare   {told}")
            self.said_at = time.monotonic()

    # Watcher ----------------------------------------------------------------------------------------------------------

    def on_step(self, report: StepReport) -> None:
        self._raise_if_lost()
        self.recent.append(report)
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, description="training", completed=report.step, what=self._told(report))
        elif report.step % max(1, self.num_steps // PLAIN_LINES) == 0 or len(self.recent) == 1:
            self.note(f"step      {report.step:,}/{self.num_steps:,}  {self._told(report)}")

    def on_event(self, event: Event) -> None:
        self._raise_if_lost()
        if event.kind in TOLD:
            style = TOLD[event.kind] if self.console.is_terminal else ""
            name = event.kind.replace("_", " ")
            self.console.print(f"{name:<9} step {event.step}: {event.cause}", style=style, markup=False, soft_wrap=True)
        if event.kind == "restart":
            self.recent.clear()
            if self.progress is not None and self.task is not None:
                self.progress.update(self.task, description="restart", what=event.cause)

    def _raise_if_lost(self) -> None:
        """OSError where nobody can see the screen any more, so that the supervisor stops telling it and writes that down."""
        if self.outlet.lost is not None:
            raise OSError(f"the output is lost: {self.outlet.lost}")

    def _told(self, report: StepReport) -> str:
        """loss, speed against what was promised and wanted, time left."""
        seconds = sum(each.step_s for each in self.recent)
        tokens = report.tokens / report.step * len(self.recent)
        speed = tokens / seconds
        per_gpu = speed / self.num_gpus
        against = [f"plan {per_gpu / self.predicted:.0%}"] if self.predicted else []
        wanted = self.job.targets.tokens_per_second_per_gpu
        against += [f"target {per_gpu / wanted:.0%}"] if wanted else []
        left = seconds_told((self.num_steps - report.step) * seconds / len(self.recent))
        per = f"{per_gpu:,.0f}/{self.unit}" + (f" ({', '.join(against)})" if against else "")
        at = f"{report.step:,}/{self.num_steps:,}  " if self.progress is not None else ""
        return f"{at}loss {report.loss:.4f}  {speed:,.0f} tokens/s  {per}  {left} left"
