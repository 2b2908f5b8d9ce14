"""A Slurm batch script that trains a job on one node, and asks for another turn before its time is over. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.control.export.node import Node

LONGEST_SIGNAL_S = 65535
"""Most seconds that `--signal` takes (man sbatch)."""

BODY = """\
# `run` answers SIGTERM with a checkpoint and exit code 5. Slurm sends USR1 to this script alone before the time is over: the job
# then asks for another turn. TERM is a cancellation or a preemption (Slurm starts the latter again by itself). No srun: it makes
# a SIGTERM a SIGKILL, and this script runs on the node that was allocated.
{command} &
run=$!
at_limit=no
trap 'at_limit=yes; kill -TERM "$run" || true' USR1
trap 'kill -TERM "$run" || true' TERM
while kill -0 "$run" 2>/dev/null; do
    wait "$run" || true  # a signal ends the wait, not the run
done
code=0
wait "$run" || code=$?
if [ "$at_limit" = yes ] && [ "$code" -eq 5 ]; then
    echo "the time limit is near: scontrol requeue $SLURM_JOB_ID"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Settings that a plan cannot know of a Slurm cluster. None: Slurm's own default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpu_type: str | None = None
    time_limit_s: int | None = None
    """None: the plan's length at the slow end of its interval."""
    setup: Sequence[str] = ()
    """Lines of shell before `run`, such as `module load cuda`."""


def script(
    name: str, job_file: str, node: Node, options: Options, *, folder: str, directory: str | None, told: str
) -> str:
    """Return the text of the script.

    Args:
        name: of the job.
        job_file: its absolute path, on a file system that the node sees.
        folder: from which `run` starts: the job's checkpoint.directory is relative to it.
        directory: as of `run --directory`.
        told: the plan in one line."""
    kind = f"{options.gpu_type}:" if options.gpu_type else ""
    limit_s = options.time_limit_s or node.wall_s
    asked = {
        "job-name": name,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "nodes": 1,
        "ntasks": 1,
        "gpus-per-node": f"{kind}{node.num_gpus}" if node.num_gpus else None,
        "cpus-per-task": node.num_cores,
        "mem": f"{-(-node.memory_bytes // 2**20)}M",
        "tmp": f"{-(-node.scratch_bytes // 2**20)}M" if node.scratch_bytes else None,
        "time": slurm_time(limit_s),
        "signal": f"B:USR1@{min(node.grace_s, LONGEST_SIGNAL_S)}",
        "open-mode": "append",
        "output": f"{name}-%j.log",
    }
    command = ["shardwise", "run", job_file, *(["--directory", directory] if directory else [])]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# {told}",
            "# Start it with `sbatch FILE`; it goes on where it stopped, turn after turn, until the last step is done.",
            *(f"#SBATCH --{key}={value}" for key, value in asked.items() if value is not None),
            "#SBATCH --requeue",
            "set -eo pipefail",
            f"cd {shlex.quote(folder)}",
            *options.setup,
            "",
            BODY.format(command=shlex.join(command)),
        ]
    )


def slurm_time(seconds: float) -> str:
    """Return D-HH:MM:00, rounded up to a minute, which is what Slurm counts in."""
    minutes = int(-(-seconds // 60))
    days, minutes = divmod(minutes, 24 * 60)
    return f"{days}-{minutes // 60:02d}:{minutes % 60:02d}:00"
