"""The model against 2,854 published runs (published.md), as `python -m benchmarks.oracle` prints it."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.fitting import fills, predict
from benchmarks.oracle import scored
from benchmarks.published import Case, cases, headline
from orchestrator.planner import spread
from strategies.constants import MEMORY, TIME, MemoryConstants, TimeConstants, fitted_names, table
from strategies.price.roofline import roofline
from strategies.price.step_time import price_time


@pytest.fixture(scope="module")
def scores():
    return scored(cases())


@pytest.mark.parametrize(
    ("figure", "at_most"),
    [("mape", 0.09), ("regret", 0.04), ("false_fit_rate", 0.01), ("false_refusal_rate", 0.08)],
)
def test_the_headline_holds(scores, figure, at_most):
    assert headline(scores)[figure] <= at_most


def test_layouts_are_ranked_as_they_ran(scores):
    assert headline(scores)["spearman"] >= 0.7


@pytest.mark.parametrize(
    ("source", "mape"),
    [("aa", 0.09), ("mosaic", 0.06), ("mosaicold", 0.05), ("titan", 0.08), ("internevo", 0.09), ("tr3m", 0.09)],
)
def test_no_source_pays_for_another(scores, source, mape):
    assert scores[source].mape <= mape


def test_out_of_memory_is_told_before_it_happens(scores):
    """Aleph Alpha's grid holds every run of it, the 336 that ran out of memory included."""
    aa = scores["aa"]
    wrong = aa.false_fits + aa.false_refusals
    assert wrong / (aa.out_of_memory + aa.ran) <= 0.05
    assert aa.false_fits / aa.out_of_memory <= 0.01


def test_the_constants_are_few():
    assert len(fitted_names(TimeConstants)) + len(fitted_names(MemoryConstants)) <= 26


@pytest.mark.parametrize(("of", "values"), [(TimeConstants, TIME), (MemoryConstants, MEMORY)])
def test_each_constant_is_told_with_its_unit_meaning_source_and_range(of, values):
    for name, known in table(of).items():
        low, high = known.range
        assert low <= getattr(values, name) <= high, name
        assert known.meaning.endswith("."), name
        assert all((known.unit, known.source)), name
        if known.start is not None:
            assert known.within[0] <= known.start <= known.within[1], name


def test_a_price_takes_a_constant_at_the_end_of_its_range():
    """An unanchored choice is priced there: benchmarks and confidence ask for it."""
    case = next(case for case in cases() if case.strategy.num_virtual_stages > 1 and case.fits)
    low, high = table(TimeConstants)["transfer"].range
    job = {"global_batch_size": case.global_batch_size, "sequence_length": case.sequence_length}

    def step_s(transfer: float) -> float:
        constants = dataclasses.replace(TIME, transfer=transfer)
        asked = {**job, "precision": case.precision, "constants": constants}
        return price_time(case.work, case.strategy, case.cluster, **asked).step_s

    assert step_s(low) < step_s(high)


def _sample() -> list[Case]:
    first: dict[str, Case] = {}
    for case in cases():
        first.setdefault(case.source, case)
    return list(first.values())


@pytest.mark.parametrize("case", _sample(), ids=lambda case: case.id)
def test_a_row_is_priced_as_its_job_is_planned(case: Case):
    """The harness takes no other road than `plan`."""
    from orchestrator import parse_job, plan

    arch, strategy = case.work, case.strategy
    gated = sum(matmul.count for matmul in arch.matmuls if matmul.name == "up") == 2
    family = (
        "llama" if gated else "bloom" if arch.attention_bias else "gpt" if arch.block_replicated_parameters else "mpt"
    )
    if "mosaic" in case.id:
        family = "mpt"
    job = {
        "version": 1,
        "name": case.id.lower(),
        "model": {
            "family": family,
            "num_layers": arch.num_layers,
            "hidden_size": arch.hidden_size,
            "num_heads": arch.num_heads,
            "num_kv_heads": arch.kv_size // arch.head_dim,
            "ffn_size": arch.ffn_size,
            "vocab_size": arch.vocab_size,
            "max_position": case.sequence_length,
            "tied_embeddings": arch.tied_embeddings,
        },
        "batch": {"global_batch_size": case.global_batch_size, "sequence_length": case.sequence_length},
        "training": {"steps": 100, "precision": case.precision},
        "cluster": {
            "gpu": case.cluster.accelerator.name,
            "nodes": case.cluster.num_nodes,
            "gpus_per_node": case.cluster.gpus_per_node,
            "intra_node": "nvlink",
            "inter_node_gbps": case.cluster.inter_node.bytes_per_s * 8 / 1e9,
        },
        "strategy": {
            "engine": "native",
            "data_parallel_degree": strategy.data_parallel_degree,
            "tensor_parallel_degree": strategy.tensor_parallel_degree,
            "pipeline_parallel_degree": strategy.pipeline_parallel_degree,
            "num_virtual_stages": strategy.num_virtual_stages,
            "pipeline_schedule": strategy.pipeline_schedule,
            "zero_stage": strategy.zero_stage,
            **({"zero_group_size": strategy.zero_group_size} if strategy.zero_stage else {}),
            "activation_checkpointing": strategy.activation_checkpointing,
            "offload": {"activations": strategy.offload.activations},
            "states": strategy.states,
            "fused_norm": strategy.fused_norm,
            "compile": False,
            "micro_batch_size": strategy.micro_batch_size,
            "attention": strategy.attention,
            "sequence_parallel": strategy.sequence_parallel,
        },
    }
    planned = plan(parse_job(job))
    assert planned.tokens_per_second_per_gpu == pytest.approx(predict([case])[0], rel=1e-9)
    assert planned.fits == (fills([case])[0] <= 1)


def test_a_roofline_is_kept_for_the_same_model_and_cluster():
    case = cases()[0]
    assert roofline(case.work, case.cluster, case.precision) is roofline(case.work, case.cluster, case.precision)


def test_the_table_of_unanchored_constants_is_what_no_published_run_rests_on() -> None:
    from benchmarks.coverage import unanchored

    assert unanchored() == spread.UNANCHORED, "run python -m benchmarks.coverage --write"
