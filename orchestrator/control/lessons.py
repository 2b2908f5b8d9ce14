"""The lessons of a finished run: predicted and measured, appended to the calibration of the cluster that it ran on."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.telemetry.records import Event, read, steps

if TYPE_CHECKING:
    from orchestrator.control.folder import RunFolder
    from orchestrator.planner.plan import Plan
    from orchestrator.spec import Job

UNSETTLED = 2
"""Steps that count for no speed: the first allocates, the second is played under the counting of bytes."""
FEWEST = 5
"""Settled steps from which a speed is told: the median of fewer is the machine's mood."""


def record(plan: Plan, folder: RunFolder, done: int) -> str | None:
    """Appends the run to its cluster's record. What a person should know where that failed: no reason to fail the run.

    `done` steps were there when it began; they ran under another plan, it may be."""
    file = record_of(plan.job, plan)
    found = measured(folder, done)
    if file is None or not found:
        return None
    from clusters.calibration.runs import append_run

    try:
        append_run(file, predicted(plan), found, begin=is_machine(plan.job))
    except (OSError, ValueError) as error:
        return f"what this run measured could not be added to {file}: {str(error).splitlines()[0]}"
    return None


def predicted(plan: Plan) -> dict[str, float]:
    """Tokens a second of one accelerator, and the live tensors' peak of the fullest one, bytes."""
    peak = max(stage.tensor_peak_bytes for stage in plan.price.memory.stages)
    return {"tokens_per_second": plan.tokens_per_second_per_gpu, "peak_bytes": float(peak)}


def measured(folder: RunFolder, done: int) -> dict[str, float]:
    """The same two of the steps after `done`; bytes are absent where they were not counted. A short run tells nothing."""
    settled = [report.tokens_per_second_per_gpu for report in steps(folder.metrics) if report.step > done][UNSETTLED:]
    if len(settled) < FEWEST:
        return {}
    found = {"tokens_per_second": statistics.median(settled)}
    for event in read(folder.events, Event):
        if event.kind == "memory_measured" and (event.step or 0) > done:
            found["peak_bytes"] = float(event.details["peak_bytes"])
    return found


def record_of(job: Job, plan: Plan) -> Path | None:
    """The cluster file that a job names, where `calibrate` wrote it; this machine's own record for any other CPU. None: a
    cluster that nothing was measured of has no calibration to correct."""
    if plan.cluster.calibration is None:
        return None
    if not is_machine(job):
        return job.directory / Path(str(job.cluster)).expanduser()
    if plan.cluster.accelerator.kind != "cpu" or plan.cluster.num_nodes > 1:
        return None
    from clusters.calibration.measure import machine_record
    from clusters.inventory.local import available_cores

    return machine_record(available_cores())


def is_machine(job: Job) -> bool:
    """The job names no cluster file: as clusters.catalog.load_cluster tells them apart."""
    return not (
        isinstance(job.cluster, str) and (job.cluster.endswith((".yaml", ".yml", ".json")) or "/" in job.cluster)
    )
