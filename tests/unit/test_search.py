"""The search is exact: it finds what brute force finds, and accounts for every candidate."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from random import Random
from typing import Any

import pytest

from clusters.catalog import load_cluster
from clusters.cluster import Cluster, weaker_links
from orchestrator.models.architecture import CATALOG, make_architecture
from orchestrator.planner.problem import Choice, Problem
from orchestrator.planner.reasons.sensitivity import sensitivity
from orchestrator.planner.search.anchors import MULTIPLE
from orchestrator.planner.search.axes import Space
from orchestrator.planner.search.best_first import search
from orchestrator.planner.search.bounds import Bounds
from orchestrator.planner.search.candidates import Shape, Sharding
from orchestrator.planner.search.likely import fits_probability
from orchestrator.planner.search.result import Wanted
from orchestrator.planner.search.solve import SLOWER, solve
from orchestrator.planner.spread import PAIR
from strategies.catalog import unbuilt
from strategies.pipeline.cost import bubble_fraction
from strategies.strategy import Offload

NO_OFFLOAD = Offload()
GIB = 2**30


def cluster(name: str = "a100-40gb-1x4", *, memory_gib: float | None = None, nvme: bool = False) -> Cluster:
    found = load_cluster(name)
    gpu = found.accelerator
    if memory_gib is not None:
        gpu = replace(gpu, memory_bytes=int(memory_gib * GIB))
    host = found.host if nvme else replace(found.host, nvme_bytes=0)
    return replace(found, accelerator=gpu, host=host)


def problem(where: Cluster, *, layers: int = 4, hidden: int = 1024, batch: int = 16, **changes: Any) -> Problem:
    arch = make_architecture(
        family="opt", num_layers=layers, hidden_size=hidden, num_heads=8, vocab_size=8192, max_position=1024
    )
    fields: dict[str, Any] = {"precision": "bf16", "pins": {}} | changes
    return Problem(arch=arch, cluster=where, global_batch_size=batch, sequence_length=1024, **fields)


def demanded(choice: Choice) -> float:
    """How many times faster a choice must be to be taken: independent errors of what no published run shows add in squares."""
    shown = {"1f1b": 1, "interleaved_1f1b": 6}
    lacks = (
        choice.pipeline > 1 and choice.virtual > shown.get(choice.schedule, 0),
        choice.zero >= 2 and choice.tensor * choice.pipeline > 1,
        choice.offload != NO_OFFLOAD,
        choice.context > 1,
    )
    return 1 + MULTIPLE * PAIR * sum(lacks) ** 0.5


def brute_force(asked: Problem, *, every_size: bool) -> tuple[float | None, int, int]:
    """(the best key, candidates, candidates that fit)."""
    best: dict[bool, float] = {}
    number = feasible = 0
    for choice in Space(asked, every_size=every_size):
        number += 1
        strategy = asked.strategy(choice)
        memory = asked.memory(strategy)
        if not memory.fits:
            continue
        feasible += 1
        likely = fits_probability(asked, memory)[0] >= 0.9
        step_s = asked.time(strategy).step_s * demanded(choice)
        key = {
            "fastest": step_s,
            "cheapest": step_s * choice.num_gpus,
            "fewest_gpus": choice.num_gpus * 1e9 + step_s,
        }[asked.objective]
        best[likely] = min(key, best.get(likely, key))
    return best.get(True, best.get(False)), number, feasible


def tight(asked: Problem, share: float, *, nvme: bool = False) -> Problem:
    """The problem on GPUs that hold about `share` of its candidates."""
    peaks = sorted(asked.memory(asked.strategy(choice)).peak_bytes for choice in list(Space(asked))[::5])
    memory_bytes = int(peaks[int(share * len(peaks))] * 1.03)
    host = asked.cluster.host if nvme else replace(asked.cluster.host, nvme_bytes=0)
    gpu = replace(asked.cluster.accelerator, memory_bytes=memory_bytes)
    return asked.changed(cluster=replace(asked.cluster, accelerator=gpu, host=host))


PURE = {"offload": NO_OFFLOAD}
CASES = {
    "everything fits": problem(cluster(), pins={"sequence_parallel": False}),
    "memory is tight": tight(problem(cluster(), pins=PURE), 0.2),
    "memory is very tight": tight(problem(cluster(), pins=PURE), 0.01),
    "nothing fits": problem(cluster(memory_gib=0.5), pins=PURE),
    "with offload": tight(problem(cluster(), pins={"pipeline_parallel_degree": 1}, hidden=2048), 0.05),
    "an odd batch": tight(problem(cluster(), batch=13, pins=PURE | {"tensor_parallel_degree": 1}), 0.2),
    "uneven stages": tight(problem(cluster(), layers=5, pins=PURE | {"tensor_parallel_degree": 2}), 0.2),
    "two nodes": tight(problem(cluster("a100-40gb-2x2"), hidden=2048, pins=PURE | {"sequence_parallel": True}), 0.1),
    "cheapest": tight(problem(cluster(), objective="cheapest", pins=PURE | {"zero_stage": 1}), 0.3),
    "fewest": tight(problem(cluster(), objective="fewest_gpus", pins=PURE, hidden=2048), 0.1),
    "few layers recomputed": tight(
        problem(cluster(), pins=PURE | {"num_checkpointed_layers_per_stage": 1, "zero_stage": 3}), 0.2
    ),
    "selective alone": tight(
        problem(cluster(), pins=PURE | {"activation_checkpointing": "selective", "data_parallel_degree": 2}), 0.3
    ),
    "full alone, fp32": tight(
        problem(cluster(), precision="fp32", pins=PURE | {"activation_checkpointing": "full"}), 0.1
    ),
    "gpipe": tight(problem(cluster(), pins=PURE | {"pipeline_schedule": "gpipe", "zero_stage": 1}), 0.3),
    "split sequences": tight(
        problem(cluster(), pins=PURE | {"context_parallel_degree": 2, "activation_checkpointing": "none"}), 0.2
    ),
    "long sequences": tight(
        problem(cluster(), batch=4, pins=PURE | {"pipeline_parallel_degree": 1}).changed(sequence_length=8192), 0.1
    ),
    "nvme": tight(
        problem(cluster(), pins={"tensor_parallel_degree": 1, "pipeline_parallel_degree": 1}, hidden=2048),
        0.1,
        nvme=True,
    ),
    # One recomputed layer fits, and all do; two to 47 do not: what is carried back and what is recomputed stand side by side.
    "recomputed and carried activations": Problem(
        arch=CATALOG["opt-30b"],
        cluster=load_cluster("a100-80gb-1x8"),
        global_batch_size=64,
        sequence_length=2048,
        precision="bf16",
        pins={
            "tensor_parallel_degree": 1,
            "pipeline_parallel_degree": 1,
            "data_parallel_degree": 8,
            "zero_stage": 3,
            "micro_batch_size": 8,
            "offload": Offload(activations="host"),
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_search_finds_what_brute_force_finds(name: str) -> None:
    asked = CASES[name]
    every_size = asked.objective != "fastest"
    best, number, feasible = brute_force(asked, every_size=every_size)
    found = search(asked)
    assert found.num_candidates == number
    assert all(asked.memory(asked.strategy(near.choice)).fits for near in found.near)
    if best is None:
        assert found.best is None
        assert found.closest is not None
        return
    assert found.best is not None, f"{feasible} fit"
    got = found.best.step_s * demanded(found.best.choice)
    key = {"fastest": got, "cheapest": got * found.best.choice.num_gpus}.get(
        asked.objective, found.best.choice.num_gpus * 1e9 + got
    )
    assert key == pytest.approx(best, rel=1e-12)


OPEN: dict[str, tuple[Any, ...]] = {
    "offload": (NO_OFFLOAD, Offload(activations="host"), Offload(optimizer="host"), None),
    "tensor_parallel_degree": (1, 2, None),
    "pipeline_parallel_degree": (1, 2, 4, None),
    "zero_stage": (1, 2, 3, None),
    "sequence_parallel": (False, True),
    "activation_checkpointing": ("none", "selective", "full", None, None, None),
    "num_checkpointed_layers_per_stage": (1, None, None, None, None),
}
"""What a drawn problem may pin; None leaves it open."""


def drawn(random: Random) -> Problem | None:
    """A small model on hardware that nobody sells: links and host up to 300 times slower, some pins, little memory."""
    where = cluster(random.choice(["a100-40gb-1x4", "a100-40gb-2x2", "a100-80gb"]), nvme=random.random() < 0.2)
    links = {
        name: replace(link, bytes_per_s=link.bytes_per_s * 10 ** random.uniform(-2.5, 0.5))
        for name, link in (("intra_node", where.intra_node), ("inter_node", where.inter_node))
    }
    host = where.accelerator.host_link_bytes_per_s * 10 ** random.uniform(-1, 1.5)
    where = replace(where, accelerator=replace(where.accelerator, host_link_bytes_per_s=host), **links)
    pins = {name: value for name, values in OPEN.items() if (value := random.choice(values)) is not None}
    if pins.get("activation_checkpointing") == "none":
        pins.pop("num_checkpointed_layers_per_stage", None)
    shape = {"layers": random.choice([2, 3, 4, 5, 8]), "hidden": random.choice([512, 1024, 2048])}
    if pins.get("pipeline_parallel_degree", 1) > shape["layers"]:
        return None
    objective = random.choice(["fastest", "fastest", "fastest", "cheapest"])
    asked = problem(where, batch=random.choice([4, 8, 12, 13]), pins=pins, objective=objective, **shape)
    number = len(list(islice(Space(asked, every_size=objective != "fastest"), 3001)))
    return tight(asked, random.choice([0.02, 0.1, 0.3, 0.6]), nvme=True) if 5 < number <= 3000 else None


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 60))])
def test_the_search_finds_what_brute_force_finds_on_drawn_problems(seed: int) -> None:
    random = Random(seed)
    for _ in range(100):
        asked = drawn(random)
        if asked is None:
            continue
        best, number, _ = brute_force(asked, every_size=asked.objective != "fastest")
        found = search(asked)
        assert found.num_candidates == number
        assert (found.best is None) == (best is None), asked.pins
        if found.best is not None:
            times = found.best.choice.num_gpus if asked.objective == "cheapest" else 1
            got = found.best.step_s * demanded(found.best.choice) * times
            assert got == pytest.approx(best, rel=1e-9), asked.pins


def test_what_a_slower_link_would_pick_is_what_planning_with_it_finds() -> None:
    random, changed = Random(201), 0
    for _ in range(240):
        asked = drawn(random)
        if asked is None:
            continue
        solution = solve(asked, near=True)
        if solution.search is None or solution.search.best is None:
            continue
        for row, (where, _, weaker) in zip(sensitivity(solution), weaker_links(asked.cluster, SLOWER), strict=True):
            on_it = solve(asked.changed(cluster=weaker))
            assert row["where"] == where
            assert row["best_step_s"] == pytest.approx(on_it.price.time.step_s, rel=1e-9)
            changed += not row["same_choice"]
    assert changed


@pytest.mark.parametrize("seed", range(100, 104))
def test_a_groups_bound_is_at_most_its_cheapest_member(seed: int) -> None:
    """And what it says must be recomputed at least is not more than a member that fits recomputes."""
    random, held = Random(seed), 0
    for _ in range(12):
        asked = drawn(random)
        if asked is None:
            continue
        bounds = Bounds(Space(asked, every_size=asked.objective != "fastest"))
        groups = {(g.shape, g.batch.micro, g.sequence_parallel): g for g in bounds.groups()}
        for choice in bounds.space:
            strategy = asked.strategy(choice)
            if not asked.memory(strategy).fits:
                continue
            held += 1
            step_s = asked.time(strategy).step_s * (1 + 1e-9)
            shape = Shape(choice.tensor, choice.pipeline, choice.data)
            group = groups[shape, choice.micro, choice.sequence_parallel]
            sharding = Sharding(choice.zero, choice.group, choice.gather, choice.reduce)
            idle = bubble_fraction(choice.schedule, choice.pipeline, choice.virtual, group.batch.accumulation)
            kept = bounds.in_flight(shape, choice.sequence_parallel, group.batch, choice.schedule, choice.virtual)
            floor_s = bounds.floor_s(shape, choice.sequence_parallel, group.batch, idle)
            assert group.floor_s <= step_s, choice
            for in_flight, at_least_s, bubble in ((group.in_flight, group.floor_s, group.idle), (kept, floor_s, idle)):
                least = bounds.least(group, sharding, choice.offload, in_flight)
                assert least is not None, choice
                bound_s = bounds.least_s(group, sharding, choice.offload, least, floor_s=at_least_s, idle=bubble)
                assert bound_s <= step_s, choice
                if choice.recompute == "full":
                    layers = choice.virtual * (choice.layers or asked.arch.num_layers)
                    assert least.layers is not None, choice
                    assert layers >= least.layers, choice
                else:
                    assert choice.recompute in least.kinds, choice
    assert held


@pytest.mark.parametrize("name", CASES)
def test_every_candidate_is_priced_or_rejected_once_with_a_reason(name: str) -> None:
    found = search(CASES[name])
    assert found.num_priced + sum(group.candidates for group in found.rejections) == found.num_candidates
    assert all(group.reason and group.candidates > 0 for group in found.rejections)


def test_a_pinned_offload_leaves_out_the_stages_at_which_it_is_not_built() -> None:
    files = Offload(optimizer="nvme", parameters="nvme")
    asked = problem(cluster(nvme=True), pins={"offload": files, "tensor_parallel_degree": 1}, built_only=True)
    found = search(asked)
    assert found.best is not None
    assert found.best.choice.zero < 2
    assert found.num_candidates == sum(1 for _ in Space(asked))


def test_the_search_is_deterministic() -> None:
    asked = CASES["memory is tight"]
    first, second = search(asked), search(asked)
    assert first.best == second.best
    assert first.rejections == second.rejections


def test_of_two_strategies_of_one_speed_the_simpler_is_taken() -> None:
    found = search(problem(cluster("a100-40gb"), pins={"micro_batch_size": 1}, batch=1))
    assert found.best is not None
    assert (found.best.choice.zero, found.best.choice.offload, found.best.choice.recompute) == (0, NO_OFFLOAD, "none")


def test_a_target_is_a_constraint_and_a_hopeless_one_is_passed_over() -> None:
    asked = CASES["memory is tight"]
    free = search(asked)
    assert free.best is not None
    gpu_s = free.best.step_s * free.best.choice.num_gpus
    met = search(asked, wanted=Wanted(gpu_s=gpu_s * 0.9))
    assert met.best is not None
    if met.best.step_s * met.best.choice.num_gpus <= gpu_s * 0.9:
        assert met.best.choice.num_gpus < free.best.choice.num_gpus
    hopeless = search(asked, wanted=Wanted(step_s=free.best.step_s * 0.5))
    assert hopeless.best is not None
    assert hopeless.best.step_s == pytest.approx(free.best.step_s)


@pytest.mark.parametrize(
    "pins",
    [
        {},
        {"compile": True},
        {"offload": Offload(optimizer="nvme", parameters="nvme")},
        {"zero_stage": 3, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_the_space_of_what_is_built_is_the_built_part_of_the_whole(pins):
    whole = problem(cluster(nvme=True), layers=2, batch=4, pins=pins)
    built = [choice for choice in Space(whole) if unbuilt(whole.strategy(choice)) is None]
    assert list(Space(whole.changed(built_only=True))) == built
    assert 0 < len(built) < sum(1 for _ in Space(whole))
