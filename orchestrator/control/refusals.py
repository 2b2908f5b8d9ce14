"""Refusals of a job that cannot run here, told before anything is made or started: unfinished jobs, plans of what is not built,
GPUs that are not here, memory that does not suffice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.control.folder import RunRefused
from strategies.catalog import ENGINES
from strategies.engines.installed import is_installed
from strategies.zero.eight_bit import BLOCK, misaligned

if TYPE_CHECKING:
    from clusters.cluster import Cluster
    from clusters.inventory.ray import Node
    from orchestrator.planner.plan import Plan
    from orchestrator.spec import Job

ELSEWHERE = (
    "cluster: auto trains on what this machine has; --address HOST:PORT on the nodes of a Ray cluster; `shardwise plan` prices "
    "any other"
)


class DoesNotFit(Exception):
    """The plan does not fit the machine; `.plan` says by how much and what would."""

    def __init__(self, plan: Plan) -> None:
        super().__init__("the plan does not fit")
        self.plan = plan


def refuse_incomplete(job: Job) -> None:
    """RunRefused where a job can be planned and says too little to be run."""
    if job.num_steps is None:
        raise RunRefused(
            "the job says no length", where=job.file, fix="set training.steps: 1000, or training.tokens: 300e9"
        )
    if job.data is None:
        raise RunRefused("the job has no data", where=job.file, fix="add data: {train: [corpus/*.txt]}")


def nodes_at(address: str) -> list[Node]:
    """Return the live nodes of the Ray cluster at an address, of which this machine is one. Raises RunRefused."""
    from clusters.inventory.ray import ask, is_of_this_machine

    try:
        nodes = ask(address)
    except ValueError as error:
        raise refused_cluster(error, address) from None
    if nodes and not any(is_of_this_machine(node) for node in nodes):
        raise RunRefused(
            f"this machine is no node of the Ray cluster at {address}",
            where=f"--address {address}",
            fix="type the command on one of its nodes, its head say",
        )
    return nodes


def refused_cluster(error: ValueError, address: str) -> RunRefused:
    """Return what the inventory says of a Ray cluster that cannot serve, as a refusal."""
    told, _, fix = str(error).partition("\n  to fix: ")
    return RunRefused(told, where=f"--address {address}", fix=fix or f"ray status --address {address}")


def cluster_at(nodes: Sequence[Node], address: str) -> Cluster:
    """Return the largest equal block of what the nodes have free. RunRefused where they have none."""
    from clusters.inventory.ray import cluster_of_nodes

    try:
        return cluster_of_nodes(nodes, address=address)
    except ValueError as error:
        raise refused_cluster(error, address) from None


def planned_for(job: Job, cluster: Cluster, nodes: Sequence[Node] | None = None) -> Plan:
    """The plan that runs: of what is built, on GPUs of this machine or of a Ray cluster's nodes, and it fits."""
    from orchestrator.planner.plan import plan

    planned = plan(job, cluster=cluster, built_only=True)
    refuse_uninstalled(planned.strategy.engine, job)
    if nodes is None:
        refuse_elsewhere(cluster, planned.strategy.num_gpus, job)
    else:
        refuse_no_room(planned, nodes)
    refuse_priced(planned)
    if not planned.fits:
        raise DoesNotFit(planned)
    return planned


def refuse_priced(planned: Plan) -> None:
    """RunRefused where what the planner chose is priced and not built: a reduction for every micro batch of gradients that stand
    whole, 8-bit moments whose blocks would straddle shards. What the job pins itself is refused earlier."""
    strategy, job = planned.strategy, planned.job
    once = strategy.engine == "native" and strategy.zero_stage < 2 and strategy.gradient_accumulation_steps > 1
    if once and job.strategy.reduce == "per_micro_batch":
        said = (
            f"strategy.reduce is per_micro_batch, and the plan's zero_stage {strategy.zero_stage} reduces once a step"
        )
        raise RunRefused(said, where=job.place("strategy", "reduce"), fix="leave reduce out, or pin zero_stage: 2 or 3")
    cut = misaligned(planned.solution.problem.work, strategy) if planned.solution.problem.eight_bit else None
    if cut is not None:
        raise RunRefused(
            f"training.optimizer.name is adamw_8bit, and the plan's tensor_parallel_degree {strategy.tensor_parallel_degree} and "
            f"{strategy.num_shards} shards cut a parameter of {cut.rows} x {cut.width} within a block of {BLOCK} elements",
            where=job.place("training", "optimizer", "name"),
            fix="pin another zero_stage, zero_group_size or tensor_parallel_degree, or name: adamw",
        )


def refuse_uninstalled(engine: str, job: Job) -> None:
    """RunRefused before any process starts, where the engine's package is missing."""
    package = ENGINES[engine].package
    if package and not is_installed(engine, package):
        raise RunRefused(
            f"engine {engine} is not installed",
            where=f"{job.file}: strategy.engine",
            fix=f"run `make engine-{engine}`, or set engine: native",
        )


def discovered() -> Cluster:
    from clusters.inventory.local import discover

    return discover()


def refuse_nodes(cluster: Cluster, job: Job, *, fix: str = ELSEWHERE) -> None:
    """RunRefused where a cluster has several nodes: `run` trains on one machine."""
    if cluster.num_nodes > 1:
        told = f"{cluster.name} is {cluster.num_nodes} nodes and `run` without --address trains on one"
        raise RunRefused(told, where=_where(job), fix=fix)


def refuse_elsewhere(cluster: Cluster, num_gpus: int, job: Job) -> None:
    """RunRefused where a plan is not for this machine; `plan` may be for any."""
    refuse_nodes(cluster, job)
    if cluster.accelerator.kind == "cpu":
        return
    from clusters.inventory.local import nvml_devices

    here = len(nvml_devices())
    if here < num_gpus:
        found = f"{here} GPUs" if here else "no GPU"
        told = f"the plan is for {num_gpus} GPUs ({cluster.name}) and this machine has {found}"
        raise RunRefused(told, where=_where(job), fix=ELSEWHERE)


def refuse_no_room(planned: Plan, nodes: Sequence[Node]) -> None:
    """RunRefused where a Ray cluster has no room for a plan's workers now."""
    from clusters.inventory.ray import Unit
    from orchestrator.control.placement import choose, shortage, workers_of

    unit: Unit = "CPU" if planned.cluster.accelerator.kind == "cpu" else "GPU"
    counts = workers_of(planned.strategy.num_gpus, planned.cluster.gpus_per_node)
    if choose(nodes, num_nodes=len(counts), per_node=max(counts), unit=unit) is None:
        short = shortage(nodes, num_nodes=len(counts), per_node=max(counts), unit=unit)
        raise RunRefused(
            f"the Ray cluster has no room for the plan: {short}",
            where=_where(planned.job),
            fix="cluster: auto takes the largest equal block that is free",
        )


def _where(job: Job) -> str:
    return f"cluster: {job.cluster if isinstance(job.cluster, str) else job.cluster.gpu}, in {job.file}"
