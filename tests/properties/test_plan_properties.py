"""For any small job and cluster: what a plan promises about itself."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clusters.catalog import load_cluster
from clusters.cluster import Cluster
from orchestrator.models.architecture import make_architecture
from orchestrator.planner.html import page
from orchestrator.planner.plan import PlanError, plan
from orchestrator.planner.problem import Choice, Problem
from orchestrator.planner.render import render
from orchestrator.planner.search.axes import Space
from orchestrator.planner.search.best_first import search
from orchestrator.planner.search.solve import solve
from orchestrator.spec import SpecError, parse_job

GIB = 2**30
quick = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Two to eight layers on up to eight GPUs, with little memory."""
    heads = draw(st.sampled_from([2, 4, 6, 8]))
    arch = make_architecture(
        family=draw(st.sampled_from(["opt", "gpt", "llama", "bloom"])),
        num_layers=draw(st.integers(2, 8)),
        hidden_size=heads * 128,
        num_heads=heads,
        vocab_size=8192,
        max_position=1024,
    )
    cluster = load_cluster(f"a100-40gb-{draw(st.sampled_from(['1x1', '1x2', '1x4', '1x6', '2x2', '2x4']))}")
    memory_bytes = int(draw(st.floats(1.6, 8.0)) * GIB)
    cluster = replace(cluster, accelerator=replace(cluster.accelerator, memory_bytes=memory_bytes))
    pins: dict[str, Any] = {}
    if draw(st.booleans()):
        pins["zero_stage"] = draw(st.integers(0, 3))
    if draw(st.booleans()):
        pins["activation_checkpointing"] = draw(st.sampled_from(["none", "selective", "full"]))
    return Problem(
        arch=arch,
        cluster=cluster,
        global_batch_size=draw(st.integers(1, 24)),
        sequence_length=1024,
        precision=draw(st.sampled_from(["bf16", "fp32"])),
        pins=pins,
    )


@quick
@given(problems())
def test_a_plan_that_fits_is_under_the_budget_and_its_degrees_and_batch_multiply_up(problem: Problem) -> None:
    found = solve(problem)
    s, memory = found.strategy, found.price.memory
    if found.fits:
        assert memory.peak_bytes <= memory.usable_bytes
    assert (
        s.num_gpus == s.data_parallel_degree * s.tensor_parallel_degree * s.pipeline_parallel_degree <= problem.num_gpus
    )
    places = s.micro_batch_size * s.gradient_accumulation_steps * s.data_parallel_degree
    assert problem.global_batch_size <= places < problem.global_batch_size + s.micro_batch_size * s.data_parallel_degree
    assert sum(stage.num_layers for stage in s.stages) == problem.arch.num_layers


def _jobs() -> st.SearchStrategy[dict[str, Any]]:
    """Jobs with most of their strategy pinned, many of which fit nowhere near, and with targets that most miss."""
    degree = st.sampled_from([1, 2, 4])
    flag = st.booleans()
    pins: dict[str, st.SearchStrategy[Any]] = {
        "data_parallel_degree": degree,
        "tensor_parallel_degree": degree,
        "pipeline_parallel_degree": degree,
        "num_virtual_stages": st.integers(1, 3),
        "pipeline_schedule": st.sampled_from(["1f1b", "gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"]),
        "sequence_parallel": flag,
        "zero_stage": st.integers(0, 3),
        "zero_group_size": degree,
        "gather": st.sampled_from(["per_micro_batch", "per_step"]),
        "reduce": st.sampled_from(["per_micro_batch", "per_step"]),
        "activation_checkpointing": st.sampled_from(["none", "selective", "full"]),
        "num_checkpointed_layers_per_stage": st.integers(1, 4),
        "micro_batch_size": degree,
        "gradient_accumulation_steps": st.integers(1, 8),
        "offload": st.sampled_from(["none", "optimizer", "activations"]),
    }
    targets: dict[str, st.SearchStrategy[Any]] = {
        "tokens_per_second_per_gpu": st.sampled_from([10, 10**6]),
        "budget_usd": st.sampled_from([1, 10**9]),
        "finish_within": st.sampled_from(["1m", "300d"]),
    }
    return st.fixed_dictionaries(
        {
            "model": st.sampled_from(["opt-1.3b", "opt-30b"]),
            "cluster": st.sampled_from(["a100-40gb-1x4", "a100-40gb-2x8", "t4"]),
            "batch": st.sampled_from([{"global_batch_size": n, "sequence_length": 2048} for n in (4, 16, 24)]),
            "strategy": st.fixed_dictionaries({}, optional=pins),
            "targets": st.fixed_dictionaries({}, optional=targets),
            "training": st.just({"steps": 10, "precision": "fp16"}),
        }
    )


@settings(quick, max_examples=60)
@given(_jobs(), st.booleans())
def test_whatever_is_planned_is_also_told(job: dict[str, Any], built_only: bool) -> None:
    """A question that is asked on the side (what would fit, what would meet the targets) never ends the answer."""
    try:
        made = plan(parse_job({"version": 1, "name": "drawn", **job}), built_only=built_only, top=2)
    except (SpecError, PlanError):
        return
    assert json.loads(json.dumps(made.to_dict()))["fits"] is made.fits
    assert made.job.name in render(made, sensitivity=True)
    assert page(made).endswith("</html>\n")


@quick
@given(problems())
def test_the_same_question_has_the_same_answer(problem: Problem) -> None:
    first, second = search(problem), search(problem)
    assert (first.best, first.families, first.rejections) == (second.best, second.families, second.rejections)


@quick
@given(problems())
def test_every_point_of_the_space_is_priced_or_rejected_once(problem: Problem) -> None:
    found = search(problem)
    assert found.num_priced + sum(group.candidates for group in found.rejections) == found.num_candidates
    assert all(group.reason for group in found.rejections)


def _better(cluster: Cluster, what: str) -> Cluster:
    gpu = cluster.accelerator
    if what == "memory":
        return replace(cluster, accelerator=replace(gpu, memory_bytes=gpu.memory_bytes * 2))
    if what == "memory bandwidth":
        return replace(cluster, accelerator=replace(gpu, memory_bytes_per_s=gpu.memory_bytes_per_s * 2))
    if what == "host link":
        return replace(cluster, accelerator=replace(gpu, host_link_bytes_per_s=gpu.host_link_bytes_per_s * 2))
    link = getattr(cluster, what)
    return replace(cluster, **{what: replace(link, bytes_per_s=link.bytes_per_s * 2)})


@quick
@given(problems(), st.sampled_from(["memory", "memory bandwidth", "host link", "intra_node", "inter_node"]))
def test_a_better_cluster_never_makes_the_best_plan_slower(problem: Problem, what: str) -> None:
    before = search(problem, num_families=1)
    after = search(problem.changed(cluster=_better(problem.cluster, what)), num_families=1)
    if before.best is not None:
        assert after.best is not None
        assert after.best.step_s <= before.best.step_s * (1 + 1e-9)


@quick
@given(problems(), st.integers(0, 10**6), st.integers(1, 4))
def test_bytes_never_fall_as_the_micro_batch_grows_at_fixed_accumulation(
    problem: Problem, pick: int, factor: int
) -> None:
    choices = list(Space(problem.changed(pins={**problem.pins, "micro_batch_size": 1})))
    choice: Choice = choices[pick % len(choices)]
    grown = problem.changed(global_batch_size=problem.global_batch_size * factor)
    small = problem.memory(problem.strategy(choice))
    large = problem.memory(grown.strategy(choice._replace(micro=factor)))
    assert grown.accumulation(choice.data, factor) == problem.accumulation(choice.data, 1)
    assert large.peak_bytes >= small.peak_bytes
