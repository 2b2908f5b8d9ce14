"""RLHF plans against DeepSpeed-Chat's published rows (rlhf.csv), and what a step of PPO holds and takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.rlhf import ADAPTERS, PROMPTS, alpaca, largest, llama_65b, opt_175b, rows, spearman
from clusters.catalog import load_cluster
from orchestrator.models.architecture import CATALOG
from orchestrator.planner.problem import Choice, PlanError
from orchestrator.planner.rlhf import Layout, Pricer, Rlhf, best
from strategies.strategy import Offload

SMALL = Rlhf(
    actor=CATALOG["opt-1.3b"],
    critic=CATALOG["opt-350m"],
    reference=CATALOG["opt-1.3b"],
    reward=CATALOG["opt-350m"],
    prompt_tokens=256,
    response_tokens=256,
    rollouts=512,
)
NODE = load_cluster("a100-80gb-1x8")
PLAIN = Layout(Choice(data=8, micro=4), "whole", 1, 16)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.id)
def test_what_fits_is_what_ran(row):
    """Of one shape on one A100-40GB, a stack without LoRA ran out of memory and one with it ran."""
    assert row.planned().fits == row.fits


def test_gpu_hours_are_in_the_published_order():
    pairs = [(row.gpu_hours_of(row.planned()), row.gpu_hours) for row in rows() if row.gpu_hours]
    assert len(pairs) == 20
    assert spearman(pairs) >= 0.9
    assert PROMPTS == 131_900


@pytest.mark.parametrize(
    ("gpu", "num_gpus", "name"),
    [
        ("v100-32gb", 1, "opt-2.7b"),
        ("rtx-a6000", 1, "opt-6.7b"),
        ("a100-40gb", 1, "opt-6.7b"),
        ("a100-80gb", 1, "opt-13b"),
        ("a100-40gb", 8, "opt-30b"),
        ("a100-80gb", 8, "opt-66b"),
    ],
)
def test_the_largest_actor_of_a_gpu_is_the_published_one(gpu, num_gpus, name):
    assert largest("deepspeed-he", gpu, num_gpus, lora=True) == name


def test_opt_175b_takes_64_gpus_in_less_than_half_the_time_of_32():
    on_32, on_64 = opt_175b(32), opt_175b(64)
    assert on_32.fits
    assert on_64.fits
    assert on_32.step_s > 2 * on_64.step_s, "twice the GPUs leave memory to write more responses at once"


def test_llama_65b_on_2048_gpus_is_within_a_tenth_of_what_its_paper_tells():
    made = llama_65b()
    assert made.fits
    assert made.tokens_per_second_per_gpu == pytest.approx(380, rel=0.1)


def test_alpaca_padded_to_512_tokens_would_take_a_third_of_the_three_hours_that_were_told():
    made = alpaca()
    assert made.fits
    assert 0.7 <= made.cost["wall_s"] / 3600 <= 1.0
    told_mfu = made.throughput["mfu"] * made.cost["wall_s"] / (3 * 3600)
    assert told_mfu == pytest.approx(0.12, abs=0.01), "what three hours mean, of the GPUs' peak"


def test_roles_say_what_each_model_is_and_where():
    price = Pricer(SMALL, NODE).price(PLAIN)
    told = {role["role"]: (role["model"], role["trained"], role["residence"]) for role in price.roles}
    assert told == {
        "actor": ("opt-1.3b", True, "device"),
        "critic": ("opt-350m", True, "device"),
        "reference": ("opt-1.3b", False, "whole"),
        "reward": ("opt-350m", False, "whole"),
    }
    resting = sum(role["bytes"] for role in price.roles)
    assert all(size >= resting for size in price.phases.values()), "what rests is there in every phase"


def test_frozen_weights_cost_least_where_the_actor_without_adapters_is_the_reference():
    lora = replace(SMALL, lora=ADAPTERS)
    sizes = {}
    for name, rlhf, residence in (
        ("whole", lora, "whole"),
        ("sharded", lora, "sharded"),
        ("host", lora, "host"),
        ("shared", replace(lora, shares_reference=True), "whole"),
    ):
        roles = Pricer(rlhf, NODE).price(PLAIN._replace(frozen=residence)).roles
        sizes[name] = next(role["bytes"] for role in roles if role["role"] == "reference")
    assert sizes["whole"] > sizes["sharded"] > sizes["host"] > sizes["shared"] == 0


def test_weights_that_training_keeps_otherwise_are_copied_to_write_with():
    pricer = Pricer(SMALL, NODE)
    whole, dealt = (pricer.price(PLAIN._replace(choice=Choice(data=8, micro=4, zero=zero, group=8))) for zero in (1, 3))
    assert whole.seconds["switch"] == 0
    assert dealt.seconds["switch"] > 0
    together = pricer.price(PLAIN._replace(choice=Choice(data=8, micro=4, zero=3, group=8), generation=8))
    assert together.phases["generate"] < dealt.phases["generate"]


def test_decoding_reads_the_weights_for_every_token_whatever_the_rows():
    pricer = Pricer(SMALL, NODE)
    few, many = (pricer.price(PLAIN._replace(rows=rows)).seconds["decode"] for rows in (1, 64))
    assert few > 20 * many


def test_pipelines_are_refused_with_the_reason():
    with pytest.raises(PlanError, match="token by token through all layers"):
        best(SMALL, NODE, pins={"pipeline_parallel_degree": 2})


def test_an_offloaded_optimizer_is_an_answer_where_nothing_else_fits():
    big = replace(SMALL, actor=CATALOG["opt-13b"], reference=CATALOG["opt-13b"])
    tight = load_cluster("a100-40gb-1x8")
    assert best(big, tight).fits
    assert not best(big, tight, pins={"offload": Offload(), "frozen": ("whole",)}).fits
