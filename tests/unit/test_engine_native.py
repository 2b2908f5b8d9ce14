"""One session in one process: what it holds, what it refuses, and what it does when numbers go wrong."""

from __future__ import annotations

import gc
import re
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from strategies.engines.engine import MicroBatch, OptimizerSettings
from strategies.engines.loss import TOKEN_LOSS, TokenLoss
from strategies.engines.native import NativeSession, build_session, share_of
from strategies.strategy import Offload, Stage, Strategy

# B micro batch, S sequence, H hidden, V vocabulary
HIDDEN, VOCABULARY = 6, 11


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 9), nn.Linear(9, HIDDEN)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return x_BSH + self.down(torch.relu(self.up(self.norm(x_BSH))))


class Tiny(nn.Module):
    """The smallest module that an engine takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids_BS: Tensor) -> Tensor:
        x_BSH = self.embed(input_ids_BS)
        for block in self.blocks:
            x_BSH = block(x_BSH)
        return self.head(x_BSH)


def weights(name: str, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3


STATES = {
    "bf16": ("mixed", "sharded_fp32"),
    "fp16": ("mixed", "sharded_fp32"),
    "fp32": ("full",) * 2,
    "fp64": ("full",) * 2,
}


def session(
    *,
    precision: str = "fp64",
    first: Any = weights,
    settings: OptimizerSettings | None = None,
    loss: TokenLoss = TOKEN_LOSS,
    **fields: Any,
) -> NativeSession:
    stage = fields.get("zero_stage", 0)
    strategy = Strategy(**{"states": STATES.get(precision, ("full",) * 2)[stage >= 2], **fields})
    with torch.device("meta"):
        module = Tiny()
    return build_session(module, strategy=strategy, precision=precision, weights=first, optimizer=settings, loss=loss)


def micro_batch(*, sequences: int = 2, weight: list[float] | None = None) -> MicroBatch:
    ids = torch.arange(sequences * 5).view(sequences, 5) * 7 % VOCABULARY
    return MicroBatch(
        input_ids_BS=ids[:, :-1], target_ids_BS=ids[:, 1:], weight_B=torch.tensor(weight or [1.0] * sequences)
    )


def step(one: NativeSession, *batches: MicroBatch, tokens: int = 8) -> Any:
    return one.step(batches or [micro_batch()], num_targets=tokens, learning_rate=1e-2)


def state(one: NativeSession) -> dict[str, Any]:
    """A copy, whole."""
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in one.state_dict().items()}
    return {n: t.clone() if torch.is_tensor(t) else t for n, t in whole.items()}


@pytest.fixture(autouse=True)
def _no_group_left():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        pytest.fail("a session left its process group behind")


@pytest.mark.parametrize(
    ("precision", "fields", "message"),
    [
        ("fp32", {"tensor_parallel_degree": 2}, "tensor_parallel_degree 2 wants a process group of 2, this one has 1"),
        ("fp32", {"pipeline_parallel_degree": 4}, "pipeline_parallel_degree 4 wants a process group of 4, this one has 1"),
        ("fp32", {"tensor_parallel_degree": 2, "compile": True}, "torch.compile of blocks that talk to a tensor group"),
        ("fp32", {"context_parallel_degree": 2, "compile": True}, "torch.compile of blocks that talk to a tensor group"),
        ("fp32", {"context_parallel_degree": 2}, "context_parallel_degree 2 wants a process group of 2, this one has 1"),
        ("fp32", {"offload": Offload(parameters="host")}, "offload.parameters host wants what steps them away too; set"),
        ("fp32", {"offload": Offload(optimizer="nvme", parameters="nvme"), "zero_stage": 3}, "set it to host, or zero_stage to"),
        ("fp32", {"offload": Offload(optimizer="host", optimizer_fraction=0.0)}, "optimizer_fraction 0.0 must be above 0"),
        ("fp32", {"data_parallel_degree": 2}, "data_parallel_degree 2 wants a process group of 2, this one has 1"),
        ("fp32", {"zero_group_size": 3}, "zero_group_size 3 does not divide data_parallel_degree 1; to fix: "),
        ("fp8", {}, "precision 'fp8' is unknown; set it to one of bf16, fp16, fp32, fp64"),
        ("fp32", {"states": "mixed"}, "states 'mixed' in fp32 at zero_stage 0 is not built on the native engine; set states to"),
        ("bf16", {"states": "pure"}, "set states to mixed or mixed_fp32_gradients"),
        ("bf16", {"zero_stage": 3, "states": "mixed"}, "set states to sharded_fp32"),
    ],
)  # fmt: skip
def test_what_is_not_built_is_refused_by_name_with_the_fix(precision, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        session(precision=precision, **fields)


def test_a_module_with_buffers_is_refused():
    module = Tiny()
    module.register_buffer("mask", torch.zeros(1))
    with pytest.raises(ValueError, match=r"the module has buffers \(mask\)"):
        build_session(module, strategy=Strategy(states="full"), precision="fp32", weights=weights)


@pytest.mark.parametrize(
    ("precision", "zero_stage", "states", "per_parameter"),
    [
        ("bf16", 0, "mixed", {"parameters": 2, "gradients": 2, "master_weights": 4, "optimizer_states": 8}),
        ("fp16", 1, "mixed", {"parameters": 2, "gradients": 2, "master_weights": 4, "optimizer_states": 8}),
        ("bf16", 0, "mixed_fp32_gradients", {"parameters": 2, "gradients": 4, "master_weights": 4, "optimizer_states": 8}),
        ("fp32", 0, "full", {"parameters": 4, "gradients": 4, "master_weights": 0, "optimizer_states": 8}),
        ("fp64", 1, "full", {"parameters": 8, "gradients": 8, "master_weights": 0, "optimizer_states": 16}),
        ("bf16", 3, "sharded_fp32", {"parameters": 4, "gradients": 0, "master_weights": 0, "optimizer_states": 8}),
    ],
)  # fmt: skip
def test_bytes_of_the_states(precision, zero_stage, states, per_parameter):
    num_parameters = sum(p.numel() for p in Tiny().parameters())
    one = session(precision=precision, zero_stage=zero_stage, states=states)
    step(one)
    held = {name: sum(t.nbytes for t in tensors) / num_parameters for name, tensors in one.tensors().items()}
    one.close()
    assert held == per_parameter


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "fp64"])
def test_names_shapes_and_dtypes_of_the_state_are_the_same_at_every_stage(precision):
    told = set()
    for zero_stage in range(4):
        one = session(precision=precision, zero_stage=zero_stage)
        state = one.state_dict()
        told.add(tuple(sorted((n, t.shape, t.dtype) if torch.is_tensor(t) else (n,) for n, t in state.items())))
        one.close()
    assert len(told) == 1
    names = {entry[0] for entry in told.pop()}
    parameters = {name for name, _ in Tiny().named_parameters()}
    prefixes = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    assert names == {f"{prefix}.{name}" for prefix in prefixes for name in parameters} | {
        "optimizer.step", "scaler.scale", "scaler.good_steps"}  # fmt: skip


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_16_bit_parameters_are_the_rounded_master_after_a_step_and_after_loading(zero_stage):
    trained, fresh = session(precision="bf16", zero_stage=0), session(precision="bf16", zero_stage=zero_stage)
    for _ in range(3):
        step(trained)
    saved = state(trained)
    for name, tensor in fresh.state_dict().items():
        if torch.is_tensor(tensor):
            getattr(tensor, "to_local", lambda t=tensor: t)().copy_(saved[name])
    fresh.load_state_dict(saved)
    for name, parameter in trained.module.named_parameters():
        assert torch.equal(parameter, saved[f"model.{name}"].bfloat16())
    assert step(fresh) == step(trained)
    fresh.close()


def test_sequences_of_weight_zero_change_nothing():
    plain, filled = session(), session()
    padding = micro_batch(sequences=3, weight=[1.0, 1.0, 0.0])
    empty = micro_batch(sequences=1, weight=[0.0])
    for _ in range(3):
        expected, result = step(plain), step(filled, padding, empty)
        assert result.loss == pytest.approx(expected.loss, abs=1e-14)
        assert result.gradient_norm == pytest.approx(expected.gradient_norm, abs=1e-14)
    found, expected = filled.evaluate([padding, empty]), plain.evaluate([micro_batch()])
    assert (found.loss, found.num_targets) == (pytest.approx(expected.loss), expected.num_targets)


def test_an_evaluation_is_the_sum_over_its_tokens_and_changes_nothing():
    for zero_stage in (0, 2, 3):
        one = session(zero_stage=zero_stage, loss=TokenLoss(z_loss=0.1))
        before = state(one)
        found = one.evaluate([micro_batch(), micro_batch()])
        result = step(one)
        assert (found.loss / found.num_targets, found.num_targets) == (pytest.approx(result.loss), 16)
        assert one.evaluate([micro_batch()]).loss < found.loss / 2
        assert not torch.equal(before["model.embed.weight"], state(one)["model.embed.weight"])
        one.close()


@pytest.mark.parametrize("clip", [None, 0.01, 1e6])
def test_the_norm_is_told_before_clipping_and_the_step_is_that_of_plain_torch(clip):
    settings = OptimizerSettings(gradient_clip=clip, weight_decay=0.0, epsilon=1e-6)
    one, plain = session(settings=settings), Tiny().double()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(weights(name, parameter.shape))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=settings.betas, eps=1e-6, weight_decay=0.0)
    batch = micro_batch()
    for _ in range(3):
        optimizer.zero_grad()
        logits = plain(batch.input_ids_BS).flatten(0, 1)
        nn.functional.cross_entropy(logits, batch.target_ids_BS.flatten()).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), clip or float("inf"))
        optimizer.step()
        assert step(one).gradient_norm == pytest.approx(float(norm), rel=1e-12)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(one.state_dict()[f"model.{name}"], parameter.detach(), atol=1e-12, rtol=0)


def broken(name: str, shape: torch.Size) -> Tensor:
    return weights(name, shape) * (float("inf") if name == "head.weight" else 1.0)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    for zero_stage in (0, 3):
        one = session(precision="fp32", first=broken, zero_stage=zero_stage)
        before = state(one)
        with pytest.raises(FloatingPointError, match="the loss is nan"):
            step(one)
        after = state(one)
        one.close()
        assert all(torch.equal(t, after[n]) for n, t in before.items() if torch.is_tensor(t) and "head" not in n)
        assert after["optimizer.step"] == 0


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_an_overflow_halves_the_scale_and_skips_the_step(zero_stage):
    one = session(precision="fp16", zero_stage=zero_stage)
    one.scale = 2.0**40
    before = state(one)
    result = step(one)
    after = state(one)
    assert result.skipped
    assert (one.scale, after["optimizer.step"]) == (2.0**39, 0)
    assert all(torch.equal(t, after[n]) for n, t in before.items() if torch.is_tensor(t))
    one.scale, one.good_steps = 1024.0, 1999
    assert not step(one).skipped
    assert (one.scale, one.state_dict()["optimizer.step"]) == (2048.0, 1), "2,000 good steps double it"
    one.close()


def test_the_scale_changes_neither_loss_nor_norm():
    results = []
    for scale in (1.0, 256.0):
        one = session(precision="fp16")
        one.scale = scale
        results.append(step(one))
    assert results[0].loss == results[1].loss
    assert results[0].gradient_norm == pytest.approx(results[1].gradient_norm, rel=1e-3)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_large_batch_leaves_the_gradients_of_logits_their_digits_in_fp16(zero_stage):
    """At 4 M tokens and a scale of 2**16 the loss of a token was multiplied by 1/64: an even gradient is five quanta there."""
    one, largest = session(precision="fp16", zero_stage=zero_stage), 0.0

    def watch(_module, _inputs, logits):
        def note(gradient):
            nonlocal largest
            largest = max(largest, float(gradient.abs().max()))

        logits.register_hook(note)

    one.module.head.register_forward_hook(watch)
    step(one, tokens=2**22)
    one.close()
    assert largest > 4.0


@pytest.mark.parametrize("zero_stage", [0, 2])
@pytest.mark.parametrize("times", [1, 64])
def test_what_waits_of_the_losss_divisor_changes_no_gradient(zero_stage, times):
    norms = []
    for precision in ("fp16", "fp32"):
        one = session(precision=precision, zero_stage=zero_stage)
        norms.append(step(one, micro_batch(), micro_batch(), tokens=16 * times).gradient_norm)
        one.close()
    assert norms[0] == pytest.approx(norms[1], rel=5e-3)


@pytest.mark.parametrize(
    ("num_tokens", "num_targets", "share"), [(2048, 2048, 1), (2048, 7, 1), (2048, 2**22, 2**-11), (24, 84, 0.5)]
)
def test_a_share_is_a_power_of_two(num_tokens, num_targets, share):
    assert share_of(num_tokens, num_targets) == share


def test_an_overflow_that_no_scale_cures_stops_the_run():
    one = session(precision="fp16")
    one.scale = 1.0
    with pytest.raises(FloatingPointError, match="the gradient norm is inf"):
        one._overflow(float("inf"))


@pytest.mark.parametrize(
    ("kind", "stages", "calls"),
    [("none", 3, [1, 1, 1]), ("full", 3, [2, 2, 2]), ("full", 2, [2, 2, 1]), ("selective", 1, [2, 1, 1])],
)
def test_the_first_layers_of_the_stage_are_computed_again(kind, stages, calls):
    place = {"stage": 0, "pipeline_rank": 0, "first_layer": 0, "num_layers": 3, "embedding": True, "head": True}
    stage = Stage(**place, num_checkpointed_layers=stages)
    one = session(activation_checkpointing=kind, stages=(stage,))
    counted = [0, 0, 0]
    for index, block in enumerate(one.module.blocks):
        block.norm.register_forward_hook(lambda *_, index=index: counted.__setitem__(index, counted[index] + 1))
    step(one)
    assert counted == calls
    one.evaluate([micro_batch()])
    assert counted == [n + 1 for n in calls]


def test_a_session_is_deterministic_until_it_is_closed():
    with torch.device("meta"):
        module = Tiny()
    one = build_session(module, strategy=Strategy(states="full"), precision="fp32", weights=weights, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    step(one)
    one.close()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_compute_the_same_and_share_one_graph(kind, zero_stage):
    torch._dynamo.reset()
    counters.clear()
    plain = session(activation_checkpointing=kind)
    compiled = session(activation_checkpointing=kind, zero_stage=zero_stage, compile=True)
    for _ in range(3):
        assert step(compiled).loss == pytest.approx(step(plain).loss, abs=1e-10)
    compiled.close()
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})


def test_a_closed_session_leaves_nothing_behind():
    """Hooks would keep its states, and a group's polling threads with them, as long as the process."""
    one = session()
    step(one)
    states = weakref.ref(one.states)
    one.close()
    del one
    gc.collect()
    assert states() is None
