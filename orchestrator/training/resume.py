"""Resuming: which checkpoint its job may go on from, the newest whole one of those, and what a person is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from orchestrator.spec import parse_job
from orchestrator.spec.job import Job
from orchestrator.training import checkpoint
from orchestrator.training.checkpoint import CheckpointInfo
from orchestrator.training.loop import Groups, Reporter, Settings
from orchestrator.training.manifest import CheckpointRef, CheckpointRefused, before, read_manifest, refusal
from orchestrator.training.schedule import learning_rate

MAY_DIFFER = ("cluster", "strategy", "objective", "targets", "checkpoint", "recovery")
"""Parts of the job that no loss depends on."""


OTHER = {
    "tokenizer": "it was trained with another tokenizer than the tokens here are of",
    "tokens": "it was trained with other text than the tokens here are of",
    "frozen": "its reward model or reference is another checkpoint now",
    "weights": "it holds adapters of other weights than model.path has now",
}
"""What differs -> why a run may not go on."""


def rate_of(job: Job, num_steps: int, *, peak: float | None = None) -> Callable[[int], float]:
    """The learning rate of each step; its peak is the optimizer's unless another is given."""
    schedule = job.training.schedule
    return partial(
        learning_rate,
        peak=peak or job.training.optimizer.learning_rate,
        num_steps=num_steps,
        warmup_steps=schedule.warmup_steps,
        name=schedule.name,
        final_fraction=schedule.final_fraction,
    )


def resumable(path: Path, job: Job, info: CheckpointInfo) -> CheckpointRef:
    """The checkpoint, if this job may go on from it. Raises CheckpointRefused that says what differs."""
    ref = read_manifest(path)
    told = {key: value for key, value in ref.manifest["job"].items() if key not in MAY_DIFFER}
    writer = parse_job(told, directory=job.directory)
    if differences := job.trajectory_difference(writer):
        raise CheckpointRefused(
            path.name,
            f"it is of a job that differs in {', '.join(differences)}; set these back, or start over with --fresh",
        )
    # Of the frozen weights: the same words in the job may name a folder that holds others now.
    for what, mine in info.data.items():
        if ref.manifest["data"].get(what) != mine:
            raise CheckpointRefused(
                path.name,
                f"{OTHER[what]}; put the data back as it was, or start over with --fresh",
            )
    if ref.step > info.num_steps:
        raise CheckpointRefused(
            path.name, f"it is of step {ref.step} and the job ends at {info.num_steps}; set training.steps higher"
        )
    return ref


def newest_whole(
    ref: CheckpointRef, job: Job, info: CheckpointInfo, world: Groups, reporter: Reporter
) -> CheckpointRef | None:
    """The checkpoint, verified by all ranks together; where it is refused, the one before it that is not. None: the run
    starts over. Each refusal is an event."""
    while True:
        try:
            return checkpoint.verify_together(ref, group=world.checkpoints)
        except CheckpointRefused as error:
            reporter.report(refusal(error, ref.step, ref.path))
        older = world.gather(str(before(ref) or "") if world.rank == 0 else "")[0]
        if not older:
            return None
        ref = resumable(Path(older), job, info)


def tell_of_resume(ref: CheckpointRef, settings: Settings, job: Job, reporter: Reporter) -> None:
    """Tell where a run goes on; and, where the length of the run changed, how far the learning rate jumps."""
    reporter.event("resumed", ref.step, f"training goes on after step {ref.step}", checkpoint=str(ref.path))
    before, now = int(ref.manifest["num_steps"]), settings.num_steps
    if before == now or ref.step == now:
        return
    step = ref.step + 1
    old, new = rate_of(job, before)(step), settings.learning_rate(step)
    reporter.event(
        "schedule_changed",
        ref.step,
        f"the run is now {now} steps long instead of {before}: the learning rate of step {step} is {new:.3g} "
        f"instead of {old:.3g}",
        learning_rate=new,
        learning_rate_before=old,
    )
