"""What the cost doors price is what the process groups are given: count by count, byte by byte, on every rank."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from benchmarks.cases import Run
from benchmarks.collectives import differences, judge, rows
from benchmarks.pool import Pool
from orchestrator.models.architecture import CATALOG
from orchestrator.models.workloads import workload
from strategies import sizes
from strategies.pipeline.stages import cut
from strategies.price.messages import Line, ledger
from strategies.strategy import Strategy


def kinds(run: Run) -> set[tuple[object, ...]]:
    """What a row tries."""
    s = run.strategy
    pipelined, split = s.pipeline_parallel_degree > 1, s.tensor_parallel_degree > 1
    hybrid = s.zero_stage > 0 and s.zero_group_size < s.data_parallel_degree
    return {
        ("zero", s.zero_stage, pipelined, split),
        ("group", s.zero_stage, hybrid),
        ("tensor", split, s.sequence_parallel, s.activation_checkpointing),
        ("schedule", pipelined and s.pipeline_schedule),
        ("frequency", max(1, s.zero_stage), s.gather, s.reduce),
        ("model", run.task.arch.tied_embeddings, run.task.arch.post_norm),
        ("precision", run.precision),
        ("odd", run.world_size == 3),
        ("lora", run.task.lora, split, s.sequence_parallel, s.zero_stage),
        ("away", s.offload.optimizer, s.offload.parameters, s.offload.activations),
    }


def few() -> list[Run]:
    """Rows that try everything; `python -m benchmarks.collectives` runs them all."""
    shuffled = random.Random(0).sample(rows(), len(rows()))
    left = [run for run in shuffled if run.world_size <= 4 and run.strategy.offload.optimizer != "nvme"]
    wanted, found = set.union(*map(kinds, left)), list[Run]()
    while wanted:
        found.append(max(left, key=lambda run: len(kinds(run) & wanted)))
        wanted -= kinds(found[-1])
    return found


FEW = few()


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(max(run.world_size for run in FEW)) as pool:
        yield pool


@pytest.mark.parametrize("run", FEW, ids=str)
def test_what_is_priced_is_what_is_sent(pool: Pool, run: Run) -> None:
    wrong, sent = judge(pool, run)
    assert not wrong
    assert sent, "several ranks have something to say"


def test_a_byte_too_few_is_told() -> None:
    sent = {("all_reduce", "world", "fp64"): Line(1, 16)}
    assert differences(sent, {}) == ["all_reduce world fp64: sent 1 of 16 bytes, priced 0 of 0"]
    assert differences(sent, {("all_reduce", "world", "fp64"): Line(1, 24)})
    assert not differences(sent, dict(sent))


@pytest.mark.parametrize("name", CATALOG)
def test_a_model_is_the_sum_of_its_tensors(name: str) -> None:
    work = workload(CATALOG[name])
    whole = sizes.padded(work, 1, 0, 1)
    assert whole.block == work.block_parameters
    assert (whole.embedding, whole.head) == (work.embedding_parameters, work.head_parameters)
    assert sizes.partial(work, 1, 1, 0, True).block == work.block_replicated_parameters


def test_the_ledger_of_a_large_plan() -> None:
    """OPT-13B, 16 GPUs: tensor 2, pipeline 2, two copies of each ZeRO 1 shard; rank 0."""
    stages = cut(40, pipeline=2, virtual=1, v_shaped=False, head_layers=1.0, checkpointed=0)
    strategy = Strategy(
        data_parallel_degree=4, tensor_parallel_degree=2, pipeline_parallel_degree=2, zero_stage=1, zero_group_size=2,
        gradient_accumulation_steps=8, stages=stages,
    )  # fmt: skip
    told = ledger(workload(CATALOG["opt-13b"]), strategy, sequence_length=2048, precision="bf16")
    activation = 2048 * 5120 * 2
    assert told["all_reduce", "tensor", "bf16"] == Line(8 * (4 * 20 + 1), 8 * (4 * 20 + 1) * activation)
    assert told["send", "pipeline", "bf16"] == told["receive", "pipeline", "bf16"] == Line(8, 8 * activation)
    gathered, reduced = told["all_gather", "shard", "bf16"], told["all_reduce", "replicate", "bf16"]
    assert gathered == told["reduce_scatter", "shard", "bf16"]
    assert reduced == Line(gathered.count, gathered.num_bytes // 2)
    assert told["all_reduce", "shared", "bf16"].num_bytes == 50272 * 5120 * 2 // 2 // 2
