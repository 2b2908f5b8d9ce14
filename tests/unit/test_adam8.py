"""8-bit Adam: bitsandbytes' own on one process, the same blocks under every split, priced, refused where it cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit

from benchmarks.cases import Case, Run, Task
from benchmarks.parity import SEED, all_of, batch, load, micro_batches, pieces, save
from benchmarks.pool import Pool
from clusters.catalog import load_cluster
from orchestrator.control.folder import RunRefused
from orchestrator.control.refusals import refuse_priced
from orchestrator.models.architecture import CATALOG, make_architecture
from orchestrator.models.decoder import Decoder, initial_weights, initialize
from orchestrator.models.lora import Lora
from orchestrator.models.workloads import workload
from orchestrator.planner.plan import plan
from orchestrator.planner.problem import Choice, Problem
from orchestrator.planner.trace.play import trace
from orchestrator.spec import parse_job
from orchestrator.spec.acting import unbuilt
from strategies.engines.engine import OptimizerSettings
from strategies.engines.native import build_session
from strategies.zero.adam8 import BlockShard
from strategies.zero.eight_bit import fraction, is_aligned, qualifies, scale_shape

ARCH = make_architecture(
    family="opt", num_layers=2, hidden_size=64, num_heads=4, ffn_size=256, vocab_size=96, max_position=64
)
TASK = Task(ARCH, global_batch_size=4, sequence_length=16)
SETTINGS = OptimizerSettings(name="adamw_8bit", betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, gradient_clip=None)
RATE = 1e-2


def session_of(run: Case | Run, lora: Lora | None = None) -> Any:
    with torch.device("meta"):
        module = Decoder(run.task.arch, lora=lora)
    return build_session(
        module,
        strategy=run.strategy,
        precision=run.precision,
        weights=initial_weights(run.task.arch, SEED),
        optimizer=SETTINGS,
        bucket_bytes=2**15,
    )


def stepped(session: Any, run: Case | Run, rank: int, count: int) -> list[float]:
    mine = micro_batches(run, rank)
    tokens = TASK.global_batch_size * TASK.sequence_length
    return [session.step(mine, num_targets=tokens, learning_rate=RATE).loss for _ in range(count)]


def play(rank: int, run: Case | Run, count: int, load_from: str | None, save_to: str | None) -> Any:
    session = session_of(run)
    if load_from:
        load(session, load_from)
    losses = stepped(session, run, rank, count)
    if save_to:
        save(session, save_to)
    state = pieces(session.state_dict())
    session.close()
    return losses, state


ALONE = Case(world_size=1, zero_stage=0, precision="fp32", micro_batch_size=4, task=TASK)


def bitsandbytes_own(count: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    module = Decoder(ARCH)
    initialize(module, ARCH, SEED)
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    vectors = [p for p in module.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = AdamW8bit(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    ids, targets = batch(TASK)
    losses = []
    for _ in range(count):
        loss = torch.nn.functional.cross_entropy(module(ids).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in module.named_parameters()}


def test_one_process_follows_bitsandbytes_own_loop() -> None:
    losses, _ = bitsandbytes_own(5)
    session = session_of(ALONE)
    got = stepped(session, ALONE, 0, 5)
    # A code falls to either side where the sums of gradients differ in their last bit.
    assert got[:2] == pytest.approx(losses[:2], abs=1e-6)
    assert got == pytest.approx(losses, abs=1e-3)
    session.close()


def test_of_the_same_gradients_weights_and_codes_are_bitsandbytes_own_bit_for_bit() -> None:
    session = session_of(ALONE)
    adam = session.states.adam
    shards = [shard for bucket in session.states.shards for shard in bucket]
    theirs = [torch.nn.Parameter(shard.master.detach().clone()) for shard in shards]
    groups = [{"params": [p for p in theirs if (p.dim() >= 2) == m], "weight_decay": 0.1 * m} for m in (True, False)]
    optimizer = AdamW8bit(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        gradients = [torch.randn(shard.master.shape, generator=generator) for shard in shards]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        adam.advance()
        with torch.no_grad():
            adam.step(shards, gradients, [shard.master for shard in shards], scale=1.0, learning_rate=RATE)
    compared = 0
    for shard, parameter in zip(shards, theirs, strict=True):
        state = optimizer.state[parameter]
        if isinstance(shard, BlockShard):
            compared += 1
            assert torch.equal(shard.master, parameter), shard.name
            assert torch.equal(shard.exp_avg, state["state1"]), shard.name
            assert torch.equal(shard.exp_avg_sq, state["state2"]), shard.name
            assert torch.equal(shard.scale.flatten(), state["absmax1"]), shard.name
        elif state["state1"].dtype == torch.float32:  # theirs rounds a table of 66 rows, which is no whole blocks, too
            torch.testing.assert_close(shard.master, parameter.detach(), atol=1e-6, rtol=1e-5)
    assert compared == 13, "the table of tokens and six matrices of each block"
    session.close()


def test_states_are_two_bytes_a_parameter_and_the_scales() -> None:
    session = session_of(ALONE)
    held = sum(t.numel() * t.itemsize for t in session.tensors()["optimizer_states"])
    state = session.state_dict()
    tokens, scale = state["optimizer.exp_avg.embed.tokens.weight"], state["optimizer.exp_avg_scale.embed.tokens.weight"]
    assert (tokens.dtype, tuple(scale.shape)) == (torch.uint8, (24, 1)), "4 rows of 64 are a block of 256"
    assert state["optimizer.exp_avg.blocks.0.mlp.up.bias"].dtype == torch.float32
    narrow = sum(p.numel() for p in Decoder(ARCH).parameters() if qualifies(tuple(p.shape)))
    total = sum(p.numel() for p in Decoder(ARCH).parameters())
    assert held == narrow * 2 + narrow // 256 * 8 + (total - narrow) * 8
    assert fraction(workload(ARCH), 0, False, False) == pytest.approx(narrow / total)
    session.close()


SPLITS = [
    Case(world_size=2, zero_stage=1, precision="fp32", micro_batch_size=2, task=TASK),
    Case(world_size=2, zero_stage=2, precision="fp32", micro_batch_size=1, task=TASK),
    Case(world_size=2, zero_stage=3, precision="fp32", micro_batch_size=2, task=TASK),
    Case(world_size=2, zero_stage=0, precision="fp32", micro_batch_size=2, pipeline=2, task=TASK),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2) as pool:
        yield pool


@pytest.mark.parametrize("case", SPLITS, ids=str)
def test_a_split_rounds_the_same_blocks(pool: Pool, case: Case) -> None:
    session = session_of(ALONE)
    wanted = stepped(session, ALONE, 0, 4)
    expected = {name: t.numpy() for name, t in session.state_dict().items() if torch.is_tensor(t)}
    session.close()
    losses, state = all_of(pool.run(play, case, 4, None, None, world_size=2))
    assert losses == pytest.approx(wanted, abs=1e-4)
    for name, values in expected.items():
        assert state[name].shape == values.shape
        if "_scale" in name:
            assert abs(state[name] - values).max() <= 1e-3 * abs(values).max() + 1e-9, name


def test_a_run_goes_on_bit_for_bit_and_under_another_split(pool: Pool, tmp_path) -> None:
    first, second = SPLITS[0], SPLITS[2]
    whole, wanted = all_of(pool.run(play, first, 4, None, None, world_size=2))
    begun, _ = all_of(pool.run(play, first, 2, None, str(tmp_path), world_size=2))
    rest, state = all_of(pool.run(play, first, 2, str(tmp_path), None, world_size=2))
    assert begun + rest == whole
    assert all((state[name] == value).all() for name, value in wanted.items() if name.startswith("optimizer.e"))
    other, _ = all_of(pool.run(play, second, 2, str(tmp_path), None, world_size=2))
    assert other == pytest.approx(rest, abs=1e-4)


def test_adapters_take_eight_bits_too() -> None:
    lora = Lora(rank=64, alpha=64.0, targets=("q_proj", "up_proj"))
    session = session_of(ALONE, lora)
    losses = stepped(session, ALONE, 0, 4)
    assert losses[-1] < losses[0]
    assert session.state_dict()["optimizer.exp_avg.blocks.0.attention.q.lora_a"].dtype == torch.uint8
    session.close()


# The blocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((49152, 576), (12288, 9)),
        ((4096, 4096), (4096, 16)),
        ((2048, 8), (64, 1)),
        ((16, 100), None),
        ((8192,), None),
        ((7, 6000), None),
    ],
)
def test_a_matrix_qualifies_where_its_rows_make_whole_blocks(shape, scales) -> None:
    assert qualifies(shape) == (scales is not None)
    if scales:
        assert scale_shape(shape) == scales


@pytest.mark.parametrize(
    ("dim", "split", "shards", "aligned"),
    [(None, 1, 8, True), (0, 2, 4, True), (1, 9, 1, False), (None, 1, 10, False), (0, 3, 1, True), (0, 10, 1, False)],
)
def test_a_shard_is_whole_blocks_or_the_split_is_refused(dim, split, shards, aligned) -> None:
    assert is_aligned((1536, 576), dim=dim, split=split, shards=shards) == aligned


def test_a_split_within_a_block_is_refused_on_every_rank_before_training() -> None:
    odd = replace(TASK, arch=replace(ARCH, vocab_size=100))
    case = Case(world_size=1, zero_stage=0, precision="fp32", task=odd)
    session_of(case).close()
    assert not is_aligned((100, 64), dim=None, split=1, shards=2)
    made = plan(job(model={**SHAPE, "vocab_size": 300}, strategy={"data_parallel_degree": 2, "zero_stage": 1}), top=0)
    with pytest.raises(RunRefused, match=r"2 shards cut a parameter of 300 x 64 within a block of 256"):
        refuse_priced(made)


SHAPE = {"family": "opt", "num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 288, "max_position": 64}


def job(**changes):
    mapping: dict[str, Any] = {
        "version": 1,
        "name": "narrow",
        "model": SHAPE,
        "batch": {"global_batch_size": 8, "sequence_length": 64},
        "training": {"steps": 2, "precision": "bf16", "optimizer": {"name": "adamw_8bit"}},
        "cluster": "a100-80gb-1x8",
    }
    return parse_job(mapping | changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"strategy": {"offload": "optimizer"}}, "the optimizer that runs on the host has 32-bit moments"),
        ({"strategy": {"engine": "fairscale", "zero_stage": 1}}, "8-bit moments are the native engine's alone"),
        ({"training": {"precision": "fp64", "optimizer": {"name": "adamw_8bit"}}}, "its kernels step fp32 masters"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(changes, told) -> None:
    assert any(told in entry["message"] for entry in unbuilt(job(**changes)))


def test_a_missing_package_is_told(monkeypatch) -> None:
    monkeypatch.setattr("strategies.zero.adam8.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package bitsandbytes: pip install 'shardwise\[adam8bit\]'"):
        session_of(ALONE)


# The price ----------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_the_priced_states_are_those_of_the_traced_step(zero: int) -> None:
    asked = Problem(
        arch=CATALOG["opt-125m"],
        cluster=load_cluster("a100-80gb-1x8"),
        global_batch_size=16,
        sequence_length=512,
        precision="bf16",
        eight_bit=True,
    )
    strategy = asked.strategy(Choice(data=8, zero=zero, group=8 if zero else 1))
    stage = asked.memory(strategy).stages.fullest()
    played = trace(
        asked.arch, strategy, sequence_length=512, precision="bf16", eight_bit=True, bytes_only=True, whole=True
    )
    assert stage.optimizer_states == pytest.approx(played.peaks["optimizer"]["optimizer_states"], rel=5e-3)
    assert (
        stage.optimizer_states
        < 0.27 * asked.changed(eight_bit=False).memory(strategy).stages.fullest().optimizer_states
    )
    assert played.tensor_peak_bytes <= stage.tensor_peak_bytes <= 1.05 * played.tensor_peak_bytes


def test_a_plan_says_it_and_offloads_no_states() -> None:
    made = plan(job(model="opt-13b", cluster="a100-40gb-1x8"), top=0)
    assert made.strategy.offload.optimizer == "none"
    assert any(note.startswith("8-bit moments of ") for note in made.notes)
