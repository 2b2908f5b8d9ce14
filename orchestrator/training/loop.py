"""The training loop: batch, step, report, now and then an evaluation and a checkpoint. No Ray, no job file.

Everything that decides the losses is in the arguments; clocks decide only when a checkpoint is written. What is not the
engine's step must stay below 1 % of the time: the next batch is made ahead, checkpoints are written behind, and the ranks
agree on what comes next by one small all-reduce.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from numpy import arange, int64
from numpy.typing import NDArray

from orchestrator.planner.trace.live_bytes import LiveBytes
from orchestrator.telemetry.records import Event, StepReport
from orchestrator.training.assignment import Outcome
from orchestrator.training.batches import Batch, Batches, Share, cut
from orchestrator.training.checkpoint import CheckpointFailed, CheckpointInfo, PendingSave, Saver
from orchestrator.training.data import Dataset
from orchestrator.training.pulse import Phase, Pulse
from orchestrator.training.schedule import CheckpointAuto, CheckpointEvery
from strategies.engines.engine import Evaluation, Session, StepResult

MAX_EVALUATION_BATCHES = 16
"""Global batches of held-out text at most: an evaluation costs as much as about five steps."""
MEASURED_STEP = 2
"""Step of this process that is measured: the first one has allocations that no later step has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The settings of a job that the loop needs."""

    num_steps: int
    learning_rate: Callable[[int], float]
    tokens_per_step: int
    evaluate_every: int | None
    checkpoint_every: CheckpointEvery | None
    """None: by what a save costs and how often GPUs fail."""
    keep: int
    checkpoint_directory: Path
    info: CheckpointInfo
    model_flops_per_token: float
    peak_flops: float | None
    """Peak of one accelerator."""
    measure_memory: bool
    vocab_size: int
    critic_learning_rate: Callable[[int], float]
    """That of task ppo's critic."""


class Loop:
    """One rank's loop; every method is called by all ranks at the same place."""

    def __init__(
        self,
        session: Session,
        settings: Settings,
        *,
        batches: Batches,
        validation: Dataset | None,
        share: Share,
        world: Groups,
        reporter: Reporter,
        should_stop: Callable[[], str | None],
        saver: Saver,
        done: int = 0,
        loaded_from: str | None = None,
    ) -> None:
        self.session, self.settings, self.batches, self.validation = session, settings, batches, validation
        self.share, self.world, self.should_stop = share, world, should_stop
        self.reporter, self.saver = reporter, saver
        self.done, self.first = done, done + 1
        self.last_checkpoint, self.saved_step = loaded_from, done if loaded_from else None
        self.pending: PendingSave | None = None
        self.stop_cause: str | None = None
        self.auto = (
            None if settings.checkpoint_every else CheckpointAuto(num_gpus=world.size, state_bytes=state_bytes(session))
        )
        self.checkpoint_every = self.auto or settings.checkpoint_every
        self.saved_at = time.monotonic()
        self.mark = time.perf_counter()

    def run(self) -> Outcome:
        """Trains to the last step, or to the step after which all ranks agreed to stop."""
        settings = self.settings
        self._tell_interval()
        while self.done < settings.num_steps:
            self._enter("data")
            batch = self.batches.next()
            waited_s = time.perf_counter() - self.mark
            engine_started = time.perf_counter()
            self._enter("step")
            try:
                result = self._step(batch)
            except FloatingPointError as error:
                return self._not_finite(batch, error)
            engine_s = time.perf_counter() - engine_started
            self._enter("agreement")
            self.done = batch.step
            stop, due = self._agree()
            self._enter("report")
            self._report_step(batch, result, waited_s=waited_s, engine_s=engine_s)
            self._tell_of_finished_save(wait=False)
            paused_at = time.perf_counter()
            if self.done == settings.num_steps:
                break
            if settings.evaluate_every and self.done % settings.evaluate_every == 0:
                self._evaluate()
            if stop:
                return self._stop()
            if due:
                self._save()
            self.mark += time.perf_counter() - paused_at
        return self._finish()

    # One step --------------------------------------------------------------------------------------------------------

    def _step(self, batch: Batch) -> StepResult:
        if not self.settings.measure_memory or batch.step != self.first + MEASURED_STEP - 1:
            return self._train(batch)
        with LiveBytes(self.session.tensors(), vocab_size=self.settings.vocab_size) as live:
            result = self._train(batch)
        mine = {"peak_bytes": live.peak_bytes, "phase": live.peak_phase, "components": dict(live.peak)}
        ranks = self.world.gather(mine)
        largest = max(ranks, key=lambda rank: int(rank["peak_bytes"]))
        self._event(
            "memory_measured",
            f"live tensors reach {largest['peak_bytes']} bytes on the fullest rank, in {largest['phase']}",
            step=batch.step,
            **largest,
            ranks=ranks,
            rss_bytes=psutil.Process().memory_info().rss,
        )
        return result

    def _train(self, batch: Batch) -> StepResult:
        """The step of a task; ppo has another one."""
        return self.session.step(
            batch.micro_batches,
            num_targets=batch.num_targets,
            learning_rate=self.settings.learning_rate(batch.step),
        )

    def _agree(self) -> tuple[bool, bool]:
        """(stop, checkpoint) on every rank alike: any rank may ask to stop, rank 0's clock asks for a checkpoint."""
        self.stop_cause = self.should_stop()
        assert self.checkpoint_every is not None
        due = self.checkpoint_every.is_due(step=self.done, seconds_since_last=time.monotonic() - self.saved_at)
        stop, save = self.world.any(self.stop_cause is not None, due and self.world.rank == 0)
        return stop, save

    def _report_step(self, batch: Batch, result: StepResult, *, waited_s: float, engine_s: float) -> None:
        now = time.perf_counter()
        step_s, self.mark = now - self.mark, now
        if self.auto is not None:
            self.auto.step_took(step_s, saving=self.pending is not None)
        settings = self.settings
        speed = settings.tokens_per_step / step_s
        speed_per_gpu = speed / self.world.size
        peak = settings.peak_flops
        self.reporter.report(
            StepReport(
                step=batch.step,
                time_unix_s=time.time(),
                loss=result.loss,
                learning_rate=settings.learning_rate(batch.step),
                gradient_norm=result.gradient_norm,
                step_s=step_s,
                tokens=batch.step * settings.tokens_per_step,
                tokens_per_second=speed,
                tokens_per_second_per_gpu=speed_per_gpu,
                mfu=None if peak is None else speed_per_gpu * settings.model_flops_per_token / peak,
                peak_bytes=peak_bytes(self.share.device),
                data_wait_s=waited_s,
                engine_s=engine_s,
                skipped=result.skipped,
                metrics=dict(result.metrics),
            )
        )
        if result.skipped:
            self._event("step_skipped", "the gradients overflowed in fp16: the loss scale was halved")

    def _evaluate(self) -> None:
        if self.validation is None:
            return
        self._enter("evaluation")
        started = time.perf_counter()
        limit = MAX_EVALUATION_BATCHES * max(1, self.settings.tokens_per_step // self.validation.sequence_length)
        indices = arange(min(len(self.validation), limit))
        found = self._evaluated(self.validation, indices)
        loss, num_tokens = found.loss / found.num_targets, found.num_targets
        metrics = {name: value / found.num_targets for name, value in found.metrics.items()}
        told = "".join(f", {name} {value:.4g}" for name, value in metrics.items())
        self._event(
            "evaluation",
            f"loss {loss:.4f}{told} on held-out {'samples' if found.metrics else 'text'}",
            loss=loss,
            tokens=num_tokens,
            metrics=metrics,
            seconds=time.perf_counter() - started,
        )

    def _evaluated(self, dataset: Dataset, indices: NDArray[int64]) -> Evaluation:
        """The evaluation of a task; ppo has another one."""
        return self.session.evaluate(cut(dataset, indices, self.share))

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self._enter("checkpoint")
        self._tell_of_finished_save(wait=True)
        if self.saved_step == self.done:
            return
        self.reporter.sync()  # the records of a checkpoint's steps lie on the disk before it
        self.pending = self.saver.save(self.session, step=self.done)
        self.saved_at = time.monotonic()

    def _tell_of_finished_save(self, *, wait: bool) -> str | None:
        """An event for the pending checkpoint if it has ended; the cause if it failed. Training goes on either way."""
        pending = self.pending
        # Rank 0 tells; the other ranks ask for the verdict when they need it.
        if pending is None or not (wait or (self.world.rank == 0 and pending.done())):
            return None
        try:
            path = pending.wait()
        except CheckpointFailed as error:
            self._event("checkpoint_failed", f"{error}; training goes on, older checkpoints are untouched")
            return str(error)
        finally:
            self.pending = None
        self.last_checkpoint, self.saved_step = str(path), pending.step
        self._event(
            "checkpoint",
            f"{path.name} is whole",
            step=pending.step,
            path=str(path),
            seconds=pending.seconds,
            blocked_s=pending.blocked_s,
        )
        if pending.prune_error is not None:
            cause = f"{path.name} is whole, but an older checkpoint could not be deleted: {pending.prune_error}"
            self._event("prune_failed", cause, step=pending.step)
        if self.auto is not None:
            self.auto.saved(blocked_s=pending.blocked_s, seconds=pending.seconds)
            self._tell_interval()
        return None

    def _tell_interval(self) -> None:
        if self.auto is not None and self.done < self.settings.num_steps and (told := self.auto.news()) is not None:
            self._event("checkpoint_interval", told, seconds=self.auto.seconds, cost_s=self.auto.cost_s)

    # Ends ------------------------------------------------------------------------------------------------------------

    def _finish(self) -> Outcome:
        self._save()
        self._evaluate()
        return self._end("finished", None)

    def _stop(self) -> Outcome:
        self._save()
        causes = [cause for cause in self.world.gather(self.stop_cause) if cause]
        return self._end("stopped", causes[0] if causes else "asked to stop")

    def _end(self, kind: Any, cause: str | None) -> Outcome:
        """The last checkpoint must be there: without it the work since the one before it would be lost in silence."""
        self._enter("end")
        failure = self._tell_of_last_save()
        if failure is not None:
            kind, cause = "failed", f"the last {failure}; free space or set checkpoint.directory, then run again"
        return Outcome(kind=kind, step=self.done, cause=cause, checkpoint=self.last_checkpoint)

    def _tell_of_last_save(self) -> str | None:
        """Rank 0 leaves, and the store with it, when all have read how the save ended."""
        failure = self._tell_of_finished_save(wait=True)
        self.world.any(failure is not None)
        return failure

    def _not_finite(self, batch: Batch, error: FloatingPointError) -> Outcome:
        self._tell_of_last_save()
        cause = f"step {batch.step}: {error}; the weights are those of step {self.done}"
        self._event("not_finite", cause, step=batch.step, samples=[int(index) for index in batch.indices])
        fix = "lower the learning rate, or look at the samples that events.jsonl names"
        return Outcome(kind="failed", step=self.done, cause=f"{cause}; {fix}", checkpoint=self.last_checkpoint)

    def _enter(self, phase: Phase) -> None:
        """A sign of life. A step's number is the one that is being worked on."""
        self.reporter.pulse.enter(phase, self.done + (phase in ("data", "step", "agreement")))

    def _event(self, kind: str, cause: str, *, step: int | None = None, **details: Any) -> None:
        self.reporter.event(kind, self.done if step is None else step, cause, **details)

    def close(self) -> None:
        self.batches.close()
        self.session.close()


@dataclass(frozen=True, slots=True)
class Reporter:
    """The receiver of step reports, events and signs of life go."""

    report: Callable[[StepReport | Event], None]
    sync: Callable[[], object] = lambda: None
    """Brings what was reported onto the disk."""
    pulse: Pulse = field(default_factory=Pulse)
    """Pulse in which this rank says what it is doing."""

    def event(self, kind: str, step: int, cause: str, **details: Any) -> None:
        self.report(Event(time_unix_s=time.time(), kind=kind, step=step, cause=cause, details=details))


class Groups:
    """The loop's own small process groups, on gloo, apart from the engine's: one for decisions, one for checkpoints."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.decisions = dist.new_group(backend="gloo")
        self.checkpoints = dist.new_group(backend="gloo")

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, true if it is true on any rank."""
        votes = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.decisions)
        return tuple(bool(vote) for vote in votes)

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.decisions)
        return values


def state_bytes(session: Session) -> int:
    """Bytes of what a checkpoint holds on this rank: weights and optimizer states, replicas counted whole."""
    held = session.tensors()
    weights = held.get("master_weights") or held.get("parameters", [])
    return sum(tensor.nbytes for tensor in (*weights, *held.get("optimizer_states", [])))


def peak_bytes(device: torch.device) -> int:
    """Most bytes at once so far: what torch allocated on a GPU, the resident set of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
