"""What is priced as the project's own module, what as another stack; which splits the planner offers of a family."""

from __future__ import annotations

import pytest

from orchestrator.planner.plan import plan
from orchestrator.planner.problem import Problem
from orchestrator.planner.search.axes import Space
from orchestrator.planner.trace.child import why_not
from orchestrator.spec import parse_job

FAMILIES = ("opt", "gpt", "mpt", "llama", "bloom", "glm")
GROUPED = {
    "family": "llama",
    "num_layers": 16,
    "hidden_size": 2048,
    "num_heads": 32,
    "num_kv_heads": 4,
    "ffn_size": 8192,
}


def made(model, *, built_only=False, task="pretrain", length=2048, **strategy):
    job = {
        "version": 1,
        "name": "a",
        "task": task,
        "model": model,
        "batch": {"global_batch_size": 64, "sequence_length": length},
        "cluster": "a100-80gb-1x8",
        "strategy": strategy,
    }
    return plan(parse_job(job), built_only=built_only, top=0)


def problem_of(model, **strategy) -> Problem:
    return made(model, **strategy).solution.problem


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_priced_as_the_module_that_trains_here(family):
    found = made(GROUPED | {"family": family, "num_kv_heads": 32})
    assert found.solution.problem.work.native
    assert why_not(found) is None


def test_a_job_that_names_the_norms_kernels_describes_another_stack_and_says_so():
    """As the published rows do (benchmarks/published.py): no engine here lets a job choose them."""
    pinned = made("llama-13b", fused_norm=False)
    assert not pinned.solution.problem.work.native
    assert any("`fused_norm` describes another stack" in note for note in pinned.notes)
    assert "fused_norm describes another stack" in why_not(pinned)
    assert made("llama-13b", fused_norm=False, built_only=True).solution.problem.work.native, "what runs is our module"
    assert made("opt-13b", fused_norm=False).solution.problem.work.native, "no stack's measurements of opt are priced"


def test_no_tensor_degree_is_offered_that_splits_a_key_head():
    offered = Space(problem_of(GROUPED)).tensors
    assert offered == [1, 2, 4]
    assert Space(problem_of(GROUPED, fused_norm=True)).tensors == [1, 2, 4, 8], "other stacks copy key heads"


def test_sequence_parallel_is_offered_where_the_degree_divides_the_sequence():
    assert Space(problem_of("opt-1.3b", length=2048)).sequence_parallels(4) == [False, True]
    assert Space(problem_of("opt-1.3b", length=2046)).sequence_parallels(4) == [False]


def test_a_reward_model_has_one_output_and_no_tied_table():
    work = problem_of("opt-1.3b", task="reward").work
    assert (work.num_outputs, work.tied_embeddings) == (1, False)
    assert work.head_parameters == 2 * 2048 + 2048, "a norm and one row"
    pinned = {"data_parallel_degree": 8, "zero_stage": 1, "micro_batch_size": 4, "activation_checkpointing": "none"}
    reward, sft = (made("opt-1.3b", task=task, **pinned).price.memory.peak_bytes for task in ("reward", "sft"))
    assert reward < sft - 2 * 4 * 2048 * 50272, "no logits and no gradient of them"


def test_rows_that_hold_several_samples_cost_a_mask_a_layer():
    pinned = {"data_parallel_degree": 8, "zero_stage": 1, "micro_batch_size": 4, "activation_checkpointing": "none"}
    pretrain, sft = (made("opt-1.3b", task=task, **pinned).price for task in ("pretrain", "sft"))
    activations = (each.memory.stages[0].activations for each in (sft, pretrain))
    per_layer = 2 * 4 * 2048 * 2048
    assert 24 * per_layer <= next(activations) - next(activations) <= 25 * per_layer
    assert sft.time.compute_s > pretrain.time.compute_s, "no kernel skips what a mask hides"
