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
from orchestrator.planner.plan import PlanError, plan
from orchestrator.planner.problem import Choice, Problem
from orchestrator.planner.search.axes import Space
from orchestrator.planner.search.best_first import search
from orchestrator.planner.search.solve import solve
from orchestrator.planner.show.page import page
from orchestrator.planner.show.text import render
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


@st.composite
def pinned_jobs(draw: st.DrawFn) -> dict[str, Any]:
    """Jobs with most of their strategy pinned, many of which do not fit, and with targets that most miss."""
    degree, frequency = st.sampled_from([1, 2, 4]), st.sampled_from(["per_micro_batch", "per_step"])
    schedules = [("1f1b", 1), ("gpipe", 1), ("interleaved_1f1b", 2), ("interleaved_zero_bubble", 3), ("zbv", 2)]
    schedule, virtual = draw(st.sampled_from(schedules))
    pins: dict[str, Any] = {
        "data_parallel_degree": draw(st.sampled_from([1, 2])),
        "tensor_parallel_degree": draw(st.sampled_from([1, 2])),
        "pipeline_parallel_degree": draw(degree),
        "pipeline_schedule": schedule,
        "num_virtual_stages": virtual,
        "sequence_parallel": draw(st.booleans()),
        "zero_stage": draw(st.integers(0, 3)),
        "activation_checkpointing": draw(st.sampled_from(["none", "selective", "full"])),
        "micro_batch_size": draw(degree),
        "offload": draw(st.sampled_from(["none", "none", "optimizer", "activations"])),
    }
    more = {"gather": frequency, "reduce": frequency, "gradient_accumulation_steps": degree, "zero_group_size": degree}
    pins |= draw(st.sampled_from([{}, {}, {}, *({name: draw(values)} for name, values in more.items())]))
    open_fields = draw(
        st.sampled_from([(), (), ("offload",), ("num_virtual_stages",), ("data_parallel_degree", "zero_stage")])
    )
    targets = {"tokens_per_second_per_gpu": 10**6, "budget_usd": 1, "finish_within": "1m"}
    kept = draw(st.sets(st.sampled_from(sorted(targets))))
    return {
        "version": 1,
        "name": "drawn",
        "model": draw(st.sampled_from(["opt-1.3b", "opt-30b", "opt-66b"])),
        "cluster": draw(st.sampled_from(["a100-40gb-1x8", "a100-40gb-2x8", "t4-1x4"])),
        "batch": {"global_batch_size": draw(st.sampled_from([8, 16, 24])), "sequence_length": 2048},
        "strategy": {name: value for name, value in pins.items() if name not in open_fields},
        "targets": {name: targets[name] for name in kept},
        "training": {"steps": 10, "precision": "fp16"},
    }


@settings(quick, max_examples=60)
@given(pinned_jobs(), st.booleans())
def test_whatever_is_planned_is_also_told(job: dict[str, Any], built_only: bool) -> None:
    """A question that is asked on the side (what would fit, what would meet the targets) never ends the answer."""
    try:
        made = plan(parse_job(job), built_only=built_only, top=2)
    except (SpecError, PlanError):
        return
    assert json.loads(json.dumps(made.to_dict()))["fits"] is made.fits
    assert made.job.name in render(made, sensitivity=True)
    assert page(made).endswith("</html>\n")


@quick
@given(problems())
def test_the_same_question_has_the_same_answer(problem: Problem) -> None:
    first, second = search(problem), search(problem)
    assert (first.best, first.near, first.rejections) == (second.best, second.near, second.rejections)


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
    before = search(problem)
    after = search(problem.changed(cluster=_better(problem.cluster, what)))
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
