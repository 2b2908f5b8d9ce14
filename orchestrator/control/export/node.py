"""Needs of the one node of a job, by its plan: the numbers that a RayJob and a Slurm script ask for. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import PurePath

from orchestrator.control.folder import RunRefused
from orchestrator.control.refusals import DoesNotFit, refuse_incomplete, refuse_nodes, refuse_priced
from orchestrator.planner.plan import Plan, plan
from orchestrator.planner.show.words import length_told, strategy_told
from orchestrator.spec import Job, acting
from orchestrator.spec.sections import ModelSpec
from orchestrator.training.limits import Limits

RUN_CORES = 2
"""Memory for `run` itself, Ray and the writing of records."""
CORES_PER_GPU = 4
"""Assumed: the training thread, autograd's own, NCCL's and the writer of checkpoints. Where the optimizer is offloaded, the
plan's speed rests on the cores of the node, and all of the GPUs' share is asked for."""
RUN_BYTES = 3 * 2**30
"""Host memory of `run`, Ray and the page cache of the tokens; `run` and its Ray held 0.5 GiB on
a CPU machine, a Ray around them (KubeRay's) 0.9."""
CUDA_WORKER_BYTES = 6 * 2**30
"""Assumed for a worker on a GPU: CUDA's libraries and context, pinned buffers, torch. No run on a GPU has been measured."""
SHARED_BYTES_PER_RANK = 2**30
"""Size of /dev/shm, for NCCL and gloo; Ray's object store is 80 MiB."""
START_S = 15 * 60.0
"""Allowed for starts, tokenizing and the reading of a checkpoint, beside the plan's seconds."""
LEAST_GRACE_S = 300.0
CHECKPOINT_BYTES_PER_PARAMETER = 12.0
"""fp32 parameters and the two moments of Adam."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One node, as a scheduler is asked for it."""

    num_gpus: int
    """0: workers on cores."""
    num_cores: int
    memory_bytes: int
    """Memory of the host, /dev/shm included."""
    shared_bytes: int
    scratch_bytes: int
    """Space on a local disk, for what is offloaded to NVMe; 0: nothing is."""
    grace_s: int
    """Time from the signal to the end: the step in flight and two checkpoints, of which one is being written already."""
    wall_s: int
    """The plan's seconds at the slow end of its interval, a start and the grace."""


def planned(job: Job) -> Plan:
    """Return the plan that `run` would make on the node that the job names. RunRefused, PlanError, SpecError where `run` would
    refuse the job there; DoesNotFit where it does not fit."""
    acting.refuse_unbuilt(job)
    refuse_incomplete(job)
    cluster = job.resolved_cluster
    if cluster is None:
        raise RunRefused(
            "cluster: auto is the machine on which `run` starts, and a scheduler must be asked for a node before",
            where=job.place("cluster"),
            fix="name the node in the job: cluster: a100-80gb-1x8, or {gpu: cpu, gpus_per_node: 4} for four cores",
        )
    refuse_nodes(
        cluster, job, fix="name one node, such as cluster: a100-80gb-1x8; an export of several nodes is not built"
    )
    made = plan(job, cluster=cluster, built_only=True, top=0)
    refuse_priced(made)
    if not made.fits:
        raise DoesNotFit(made)
    return made


def node_of(
    made: Plan,
    *,
    num_cores: int | None = None,
    memory_bytes: int | None = None,
    grace_s: float | None = None,
) -> Node:
    """Return what a plan of one node needs; the arguments stand in place of what is derived."""
    ranks, memory, host = made.strategy.num_gpus, made.price.memory, made.cluster.host
    on_gpus = made.cluster.accelerator.kind == "cuda"
    cores = RUN_CORES + ranks * (CORES_PER_GPU if on_gpus else 1)
    if on_gpus and made.strategy.offload.optimizer != "none":
        cores = max(cores, host.num_cores * ranks // made.cluster.gpus_per_node)
    # Workers on cores hold the whole peak in host memory; where they offload, host_bytes_per_node has it already.
    held = memory.host_bytes_per_node + ranks * CUDA_WORKER_BYTES if on_gpus else 0
    if not on_gpus:
        held = memory.host_bytes_per_node or memory.peak_bytes * ranks
    shared = ranks * SHARED_BYTES_PER_RANK
    stop_s = 2 * made.price.time.step_s + 2 * Limits().for_bytes(
        CHECKPOINT_BYTES_PER_PARAMETER * made.solution.problem.work.trains.num_parameters
    )
    grace = math.ceil(max(LEAST_GRACE_S, stop_s) if grace_s is None else grace_s)
    wall_s = made.cost["wall_s"]
    assert wall_s is not None, "a job without a length is refused"
    slowest = made.tokens_per_second_per_gpu / float(made.confidence["tokens_per_second_per_gpu_low"])
    return Node(
        num_gpus=ranks if on_gpus else 0,
        num_cores=num_cores or cores,
        memory_bytes=memory_bytes or held + shared + RUN_BYTES,
        shared_bytes=shared,
        scratch_bytes=memory.nvme_bytes_per_node,
        grace_s=grace,
        wall_s=math.ceil(wall_s * slowest + START_S + grace),
    )


def told(made: Plan) -> str:
    """The plan in one line, for the head of what is exported."""
    wall_s, error = made.cost["wall_s"], float(made.confidence["throughput_error"])
    length = "" if wall_s is None else f"; {length_told(wall_s)} by the plan, {error:.0%} error"
    return f"{made.strategy.num_gpus} x {made.cluster.accelerator.name}: {strategy_told(made.strategy)}{length}"


def paths_of(job: Job) -> list[tuple[tuple[str | int, ...], str]]:
    """Return (keys, path) of every file and folder that a job names: text, tokenizer, weights, a cluster file."""
    found: list[tuple[tuple[str | int, ...], str]] = []
    if job.data is not None:
        found += [(("data", "train", at), path) for at, path in enumerate(job.data.train)]
        if isinstance(job.data.validation, tuple):
            found += [(("data", "validation", at), path) for at, path in enumerate(job.data.validation)]
        if isinstance(job.data.tokenizer, str) and job.data.tokenizer != "byte":
            found.append((("data", "tokenizer"), job.data.tokenizer))
    models: list[tuple[tuple[str, ...], ModelSpec | None]] = [(("model",), job.model)]
    if job.ppo is not None:
        models += [(("ppo", role), getattr(job.ppo, role)) for role in ("reward", "critic", "reference")]
    for keys, model in models:
        found += [
            ((*keys, word), path)
            for word in ("path", "checkpoint")
            if model is not None and (path := getattr(model, word)) is not None
        ]
    if isinstance(job.cluster, str) and PurePath(job.cluster).suffix in (".yaml", ".yml"):
        found.append((("cluster",), job.cluster))
    return found
