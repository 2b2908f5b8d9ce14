"""The plan: what a job will use, hold, take and cost, and why. Its JSON: docs/reference/plan.md."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from orchestrator.planner import explain
from orchestrator.planner.confidence import choose, confidence
from orchestrator.planner.problem import PlanError, Problem
from orchestrator.planner.search.solve import Refused, Solution, ask
from orchestrator.planner.targets import judged, wanted_of, would_meet
from orchestrator.spec import acting
from strategies.catalog import ENGINES
from strategies.strategy import Strategy

if TYPE_CHECKING:
    from clusters.cluster import Cluster
    from orchestrator.planner.result import SearchResult
    from orchestrator.spec import Job
    from strategies.price.step_time import Price

__all__ = ["Plan", "PlanError", "plan"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One job's plan. Everything beyond the strategy and its price is worked out when it is asked for."""

    job: Job
    solution: Solution
    top: int = 20
    """How many alternatives are shown."""
    left_out: Plan | None = None
    """A faster plan that the engine is not built to run yet."""
    trace: dict[str, Any] | None = None
    """What playing the step on fake devices said (traced.py), where it was asked for."""

    @property
    def strategy(self) -> Strategy:
        return self.solution.strategy

    @property
    def price(self) -> Price:
        return self.solution.price

    @property
    def cluster(self) -> Cluster:
        return self.solution.problem.cluster

    @property
    def search(self) -> SearchResult | None:
        return self.solution.search

    @property
    def fits(self) -> bool:
        return self.solution.fits

    @property
    def exit_code(self) -> int:
        """0, or 3 where it does not fit or misses a target."""
        return 0 if self.fits and self.targets_met else 3

    @property
    def tokens_per_second(self) -> float:
        return self.solution.tokens_per_second

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.solution.tokens_per_second_per_gpu

    @cached_property
    def throughput(self) -> dict[str, float]:
        """Speed and utilisation; fractions of the datasheet's dense peak in the job's precision."""
        problem, speed = self.solution.problem, self.tokens_per_second_per_gpu
        model = problem.work.model_flops_per_token(problem.sequence_length)
        peak = problem.cluster.accelerator.peak_flops[problem.precision]
        return {
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_gpu": speed,
            "model_tflops_per_gpu": speed * model / 1e12,
            "mfu": speed * model / peak,
            "hfu": speed * (model + self._recomputed_flops_per_token()) / peak,
        }

    def _recomputed_flops_per_token(self) -> float:
        """A third of a fully checkpointed block's FLOPs; what `selective` makes again are no products."""
        if self.strategy.activation_checkpointing != "full":
            return 0.0
        work, length = self.solution.problem.work, self.solution.problem.sequence_length
        layers = sum(stage.num_checkpointed_layers for stage in self.strategy.stages)
        return layers * (2.0 * work.block_matmul_elements + 4.0 * work.num_heads * work.head_dim * length)

    @cached_property
    def cost(self) -> dict[str, float | None]:
        """Of the whole job: GPU-hours and dollars of the GPUs that the plan uses."""
        steps, price = self.job.num_steps, self.cluster.usd_per_gpu_hour
        if not steps:
            return {"gpu_hours": None, "usd": None, "wall_s": None}
        wall_s = steps * self.price.time.step_s
        gpu_hours = wall_s * self.strategy.num_gpus / 3600
        return {"gpu_hours": gpu_hours, "usd": None if price is None else gpu_hours * price, "wall_s": wall_s}

    @cached_property
    def targets(self) -> list[dict[str, Any]]:
        """[{name, wanted, got, met, would_meet, would_meet_alone}]: the nearest cluster size that meets all targets; where none
        does, of each that is missed the nearest that meets it."""
        rows, price = judged(self.job, self.solution, self.cost), self.cluster.usd_per_gpu_hour
        missed = [row for row in rows if not row["met"]]
        known = all(row["got"] is not None for row in missed)
        every = would_meet(self.solution, wanted_of(self.job, price)) if missed and known else None
        told = {row["name"]: {"would_meet": every, "would_meet_alone": every} for row in missed}
        if known and every is None and len(rows) > 1:
            for name, hints in told.items():
                hints["would_meet_alone"] = would_meet(self.solution, wanted_of(self.job, price, only=name))
        return [row | told.get(row["name"], {"would_meet": None, "would_meet_alone": None}) for row in rows]

    @cached_property
    def targets_met(self) -> bool:
        return all(row["met"] for row in judged(self.job, self.solution, self.cost))

    @cached_property
    def confidence(self) -> dict[str, Any]:
        """{source, throughput_error, memory_error}: where the constants come from, and how wrong they have been."""
        return asdict(confidence(self.solution.problem, self.strategy))

    @cached_property
    def notes(self) -> list[str]:
        """What a reader should know: idle GPUs, padding, settings without effect, what another choice of offload would change."""
        return [*acting.notes(self.job), *explain.notes(self.solution)]

    @cached_property
    def alternatives(self) -> list[explain.Loser]:
        """The best of each other (tensor, pipeline, ZeRO stage, offload) family, fastest first, each with one reason."""
        return explain.losers(self.solution, limit=self.top)

    @cached_property
    def sensitivity(self) -> list[dict[str, Any]]:
        """Of each link, what would be picked if it were 10 % slower: [{link, where, same_choice, strategy, step_s, ...}]. Where
        nothing was searched or nothing fits there is no choice to ask about."""
        if self.search is None or self.search.best is None:
            return []
        return explain.sensitivity(self.solution, wanted=wanted_of(self.job, self.cluster.usd_per_gpu_hour))

    @cached_property
    def nearest(self) -> list[dict[str, Any]]:
        """Where it does not fit: the changes that would make it fit, each planned."""
        return self._nearest.rows

    @property
    def nearest_refused(self) -> list[str]:
        """Where it does not fit: changes that break a rule of what is pinned, each with the rule."""
        return self._nearest.refused

    @cached_property
    def _nearest(self) -> explain.Nearest:
        return explain.Nearest([], []) if self.fits else explain.nearest(self.solution)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON (docs/reference/plan.md). Placement is made here."""
        from orchestrator.planner.document import document

        return document(self)


def plan(job: Job, *, cluster: Cluster | None = None, built_only: bool = False, top: int = 20) -> Plan:
    """The plan of a job.

    Args:
        cluster: in place of the job's own, after GPUs were lost, say.
        built_only: choose only what the engine carries out today, as `run` must.
        top: how many alternatives the plan shows.

    Raises PlanError where no strategy can be what is pinned. One that does not fit is a plan with `fits` false."""
    problem = problem_of(job, cluster=cluster, built_only=built_only)
    wanted = wanted_of(job, problem.cluster.usd_per_gpu_hour)
    solution = choose(problem, wanted=wanted, num_families=top + 1, near=True)
    made = Plan(job=job, solution=solution, top=top)
    if not built_only or solution.search is None or not problem.engine.plans_ahead:
        return made
    everything = ask(choose, problem.changed(built_only=False), wanted=wanted, after=solution.search, near=True)
    if isinstance(everything, Refused) or not everything.fits:
        return made
    faster = everything.price.time.step_s < solution.price.time.step_s
    return replace(made, left_out=Plan(job=job, solution=everything, top=top)) if faster or not made.fits else made


def problem_of(job: Job, *, cluster: Cluster | None = None, built_only: bool = False) -> Problem:
    """What the job asks of the planner."""
    if cluster is None:
        cluster = job.resolved_cluster
    if cluster is None:
        from clusters.inventory.local import discover

        try:
            cluster = discover()
        except (ValueError, OSError, RuntimeError) as error:
            raise PlanError(f"cluster: auto cannot be answered here: {error}") from error
    engine = ENGINES[job.strategy.engine or "native"]
    pins = dict(engine.fixed) | job.pins
    return Problem(
        arch=job.architecture,
        cluster=cluster,
        global_batch_size=job.batch.global_batch_size,
        sequence_length=job.batch.sequence_length,
        precision=job.training.precision,
        pins=pins,
        objective=job.objective,
        built_only=built_only or not engine.plans_ahead,
    )
