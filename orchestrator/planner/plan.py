"""The plan: what a job will use, hold, take and cost, and why. Its JSON: docs/reference/plan.md."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from clusters.cluster import Cluster
from orchestrator.planner.problem import PlanError, Problem
from orchestrator.planner.reasons.alternatives import Alternative, alternatives
from orchestrator.planner.reasons.choice import choose
from orchestrator.planner.reasons.confidence import confidence
from orchestrator.planner.reasons.nearest import NOTHING_NEAR, Nearest, nearest
from orchestrator.planner.reasons.notes import notes, tight_notes
from orchestrator.planner.reasons.sensitivity import sensitivity
from orchestrator.planner.reasons.targets import judged_with_hints, wanted_of
from orchestrator.planner.rlhf import BUILT, Rlhf, RlhfPrice, best, under
from orchestrator.planner.search.result import SearchResult
from orchestrator.planner.search.solve import Refused, Solution, ask
from orchestrator.planner.show import json
from orchestrator.spec import Job, acting
from strategies.catalog import ENGINES
from strategies.price.step_time import Price
from strategies.recompute.cost import recomputed_flops_per_token
from strategies.strategy import Strategy

__all__ = ["Plan", "PlanError", "plan"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One job's plan, a value: all that was searched was searched when it was made."""

    job: Job
    solution: Solution
    alternatives: list[Alternative]
    """The chosen strategy with each single choice changed, fastest first, each with one reason."""
    sensitivity: list[dict[str, Any]]
    """One row a link says what would be picked if it were 10 % slower: [{link, where, same_choice, strategy, step_s, ...}].
    Empty where nothing was searched or nothing fits."""
    near: Nearest
    """Changes that would make it fit; empty where it does."""
    targets: list[dict[str, Any]]
    """[{name, wanted, got, met, would_meet, would_meet_alone}]."""
    notes: list[str]
    """Sentences that a reader should know: idle GPUs, padding, settings without effect, what another choice of offload would
    change."""
    left_out: Plan | None = None
    """A faster plan that the engine is not built to run yet."""
    ppo: RlhfPrice | None = None
    """Of task ppo, a step with all four models; the rest of the plan is the training of the actor."""
    trace: dict[str, Any] | None = None
    """The answer of a step played on fake devices (trace/child.py), where it was asked for."""

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
        return self.solution.fits and (self.ppo is None or self.ppo.fits)

    @property
    def exit_code(self) -> int:
        """Return 0, or 3 where it does not fit or misses a target."""
        return 0 if self.fits and self.targets_met else 3

    @property
    def tokens_per_second(self) -> float:
        return self.solution.tokens_per_second

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.solution.tokens_per_second_per_gpu

    @property
    def throughput(self) -> dict[str, float]:
        """Return speed and utilisation; fractions of the datasheet's dense peak in the job's precision."""
        problem, speed = self.solution.problem, self.tokens_per_second_per_gpu
        model = problem.work.model_flops_per_token(problem.sequence_length)
        again = recomputed_flops_per_token(problem.work, self.strategy, problem.sequence_length)
        peak = problem.cluster.accelerator.peak_flops[problem.precision]
        return {
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_gpu": speed,
            "model_tflops_per_gpu": speed * model / 1e12,
            "mfu": speed * model / peak,
            "hfu": speed * (model + again) / peak,
        }

    @property
    def cost(self) -> dict[str, float | None]:
        """Return GPU-hours, dollars and wall seconds of the whole job, of the GPUs that the plan uses."""
        return cost_of(self.job, self.solution, None if self.ppo is None else self.ppo.step_s)

    @property
    def targets_met(self) -> bool:
        return all(row["met"] for row in self.targets)

    @property
    def confidence(self) -> dict[str, Any]:
        """Return the interval of the speed, the probability to fit, and what both rest on (reasons/confidence.py)."""
        return asdict(confidence(self.solution))

    @property
    def nearest(self) -> list[dict[str, Any]]:
        """Return the changes that would make it fit, each planned; empty where it fits."""
        return self.near.rows

    @property
    def nearest_refused(self) -> list[str]:
        """Return the changes that break a rule of what is pinned, each with the rule; empty where it fits."""
        return self.near.refused

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON, in the order of docs/reference/plan.md. Placement is made here."""
        return {
            "version": json.VERSION,
            "fits": self.fits,
            "job": json.job_dict(self.job),
            "model": json.model_dict(self.solution.problem.arch),
            "cluster": json.cluster_dict(self.cluster),
            "strategy": json.strategy_dict(self.strategy),
            "memory": json.memory_dict(self.price.memory),
            "time": json.fields_dict(self.price.time),
            "throughput": self.throughput,
            "cost": self.cost,
            "placement": json.placement(self.strategy, self.cluster.gpus_per_node),
            "confidence": self.confidence,
            "alternatives": [json.alternative_dict(one) for one in self.alternatives],
            "sensitivity": json.with_strategies(self.sensitivity),
            "targets_met": self.targets_met,
            "targets": self.targets,
            "search": json.search_dict(self.search, fits=self.fits),
            "notes": self.notes,
            **(
                {}
                if self.ppo is None
                else {"roles": [dict(role) for role in self.ppo.roles], "ppo": self.ppo.to_dict()}
            ),
            "nearest": json.with_strategies(self.nearest),
            "nearest_refused": self.nearest_refused,
            **({} if self.trace is None else {"trace": self.trace}),
        }


def cost_of(job: Job, solution: Solution, step_s: float | None = None) -> dict[str, float | None]:
    """Return GPU-hours, dollars and wall seconds of a whole job; None where its length or the price is unknown.

    Args:
        step_s: of a step that is more than the training of one model."""
    steps, price = job.num_steps, solution.problem.cluster.usd_per_gpu_hour
    if not steps:
        return {"gpu_hours": None, "usd": None, "wall_s": None}
    wall_s = steps * (step_s or solution.price.time.step_s)
    gpu_hours = wall_s * solution.strategy.num_gpus / 3600
    return {"gpu_hours": gpu_hours, "usd": None if price is None else gpu_hours * price, "wall_s": wall_s}


def plan(job: Job, *, cluster: Cluster | None = None, built_only: bool = False, top: int = 20) -> Plan:
    """Return the plan of a job.

    Args:
        cluster: in place of the job's own, after GPUs were lost, say.
        built_only: choose only what the engine carries out today, as `run` must.
        top: how many alternatives the plan holds.

    Raises PlanError where no strategy can be what is pinned. One that does not fit is a plan with `fits` false."""
    problem = problem_of(job, cluster=cluster, built_only=built_only)
    wanted = wanted_of(job, problem.cluster.usd_per_gpu_hour)
    solution = choose(problem, wanted=wanted, near=True)
    if job.ppo is not None:
        return _of_ppo(job, solution, top)
    made = _explained(job, solution, top)
    if not built_only or solution.search is None or not problem.engine.plans_ahead:
        return made
    everything = ask(choose, problem.changed(built_only=False), wanted=wanted, after=solution.search, near=True)
    if isinstance(everything, Refused) or not everything.fits:
        return made
    faster = everything.price.time.step_s < solution.price.time.step_s
    return replace(made, left_out=_explained(job, everything, 0)) if faster or not made.fits else made


def rlhf_of(job: Job, *, eight_bit: bool = False) -> Rlhf:
    """Return a job's step of PPO."""
    spec, length = job.ppo, job.batch.sequence_length
    assert spec is not None, "a job of task ppo has its section"
    response = spec.response_tokens(length)
    return Rlhf(
        actor=job.architecture,
        critic=job.architecture_of(spec.of_critic),
        reference=job.architecture if spec.reference is None else job.architecture_of(spec.reference),
        reward=job.architecture_of(spec.reward),
        prompt_tokens=length - response,
        response_tokens=response,
        rollouts=job.batch.global_batch_size,
        epochs=spec.epochs,
        minibatches=spec.minibatches,
        lora=job.lora,
        eight_bit=eight_bit,
        shares_reference=job.lora is not None and spec.reference is None,
    )


PINNED_OF_PPO = ("tensor_parallel_degree", "zero_stage", "activation_checkpointing", "micro_batch_size", "offload")


def _of_ppo(job: Job, solution: Solution, top: int) -> Plan:
    """Return the plan of a step with four models: as `run` holds them under the actor's best strategy, or where that does not
    fit, under the fastest layout that does."""
    problem = solution.problem
    rlhf = rlhf_of(job, eight_bit=problem.eight_bit)
    price = under(rlhf, problem, solution.strategy)
    told = []
    if not price.fits:
        pins = {key: problem.pins[key] for key in PINNED_OF_PPO if key in problem.pins}
        other = best(
            rlhf, problem.cluster, precision=problem.precision, pins={**pins, **(BUILT if problem.built_only else {})}
        )
        if other.fits:
            strategy = problem.strategy(other.layout.choice)
            solution = Solution(problem=problem, strategy=strategy, price=problem.price(strategy))
            price = other
            built = other.layout.frozen == "whole" and other.layout.generation == 1
            told = (
                []
                if built
                else [f"{other.told()}: priced; `run` keeps frozen models whole and writes on each GPU alone"]
            )
    made = _explained(job, solution, top if solution.search is not None else 0)
    return replace(made, ppo=price, notes=[*made.notes, *told])


def _explained(job: Job, solution: Solution, top: int) -> Plan:
    """Return a solution with its reasons."""
    searched = solution.search is not None and solution.search.best is not None
    wanted = wanted_of(job, solution.problem.cluster.usd_per_gpu_hour)
    others = alternatives(solution, limit=top)
    return Plan(
        job=job,
        solution=solution,
        alternatives=others,
        sensitivity=sensitivity(solution, wanted=wanted) if searched else [],
        near=NOTHING_NEAR if solution.fits else nearest(solution),
        targets=judged_with_hints(job, solution, cost_of(job, solution)),
        notes=[*acting.notes(job), *notes(solution), *tight_notes(solution, others)],
    )


def problem_of(job: Job, *, cluster: Cluster | None = None, built_only: bool = False) -> Problem:
    """Return what the job asks of the planner."""
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
        lora=job.lora,
        eight_bit=job.training.optimizer.name == "adamw_8bit",
        pins=pins,
        task=job.task,
        objective=job.objective,
        built_only=built_only or not engine.plans_ahead,
    )
