"""Ring attention over two to four processes is the attention of one: outputs, gradients, positions, loss; and what it sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from benchmarks.pool import Pool
from orchestrator.models.decoder import alibi_slopes, rotated
from strategies.context import block
from strategies.context.halves import chunks, part, positions
from strategies.context.ring import Ring
from strategies.engines.token_losses import token_losses
from strategies.recompute.apply import SAVED_BY_SELECTIVE

BATCH, HEADS, SEQUENCE, HEAD_DIM = 2, 4, 48, 8
SEGMENTS_S = torch.arange(SEQUENCE) * 5 // SEQUENCE
"""Five packed samples, whose borders are none of the ring's."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(4) as processes:
        yield processes


# Who computes what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16])
def test_every_query_meets_every_earlier_key_once_and_all_ranks_work_alike(size: int) -> None:
    met: Counter[tuple[int, int]] = Counter()
    for rank in range(size):
        work = []
        for source in range(size):
            at = part(rank, source)
            queries, keys = chunks(rank, size)[slice(*at.queries)], chunks(source, size)[slice(*at.keys)]
            pairs = [(q, k) for q in queries for k in keys if k <= q or not at.causal]
            assert all(k < q or (at.causal and k == q) for q, k in pairs)
            met.update(pairs)
            work.append(len(queries) * len(keys))
        assert work == [4 if source == rank else 2 for source in range(size)]  # causal: half of four
    assert met == {(q, k): 1 for q in range(2 * size) for k in range(q + 1)}


def test_the_ranks_hold_the_whole_sequence_in_even_chunks() -> None:
    held = [place for rank in range(3) for half in positions(rank, 3, 24) for place in half]
    assert sorted(held) == list(range(24))
    with pytest.raises(ValueError, match=r"8 chunks, which 100 tokens do not fill evenly\n  to fix: .*such as 104"):
        positions(0, 4, 100)
    with pytest.raises(ValueError, match="do not fill evenly"):
        Ring(None, rank=0, size=1).attention(*(torch.zeros(1, 1, 7, 8) for _ in range(3)))


# The arithmetic of parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parts_over_some_keys_merge_to_the_whole(flash: bool, dtype: torch.dtype) -> None:
    made = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, 12, 8, generator=made, dtype=dtype) * 3 for _ in range(3))
    y, lse = block.forward(q, k, v, causal=False, bias=None, flash=flash)
    parts = [
        block.forward(q, k[:, :, keys], v[:, :, keys], causal=False, bias=None, flash=flash)
        for keys in (slice(0, 5), slice(5, 12))
    ]
    merged, merged_lse = parts[0][0].to(block.wide(dtype), copy=True), parts[0][1].clone()
    block.merge(merged, merged_lse, *parts[1])
    close = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(merged.to(dtype), y, atol=close, rtol=close)
    torch.testing.assert_close(merged_lse, lse, atol=close, rtol=1e-6)


@pytest.mark.parametrize("flash", [True, False])
def test_a_query_that_sees_no_key_adds_nothing(flash: bool) -> None:
    q, k, v = (torch.randn(1, 1, 2, 8, dtype=torch.float64) for _ in range(3))
    bias = torch.tensor([[0.0, 0.0], [float("-inf"), float("-inf")]], dtype=torch.float64)
    y, lse = block.forward(q, k, v, causal=False, bias=bias, flash=flash)
    assert lse[0, 0, 1] == float("-inf")
    other, other_lse = block.forward(q, k + 1, v + 1, causal=False, bias=None, flash=flash)
    kept = other.clone()
    block.merge(other, other_lse, y, lse)
    assert torch.equal(other[0, 0, 1], kept[0, 0, 1])
    assert not torch.equal(other[0, 0, 0], kept[0, 0, 0])


# The ring -------------------------------------------------------------------------------------------------------------


def alibi(queries: Tensor, keys: Tensor) -> Tensor:
    slopes = torch.tensor(alibi_slopes(HEADS), dtype=torch.float64)
    return slopes[:, None, None] * (keys[None, :] - queries[:, None])


def same_sample(queries: Tensor, keys: Tensor) -> Tensor:
    apart = SEGMENTS_S[queries][:, None] != SEGMENTS_S[keys][None, :]
    return torch.zeros(apart.shape, dtype=torch.float64).masked_fill(apart, float("-inf"))


BIASES = {"none": None, "alibi": alibi, "packed": same_sample}


def whole_attention(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
    """One process, written out."""
    group, places = q.shape[1] // k.shape[1], torch.arange(q.shape[2])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores if bias is None else scores + bias(places, places).to(scores.dtype)
    return scores.masked_fill(places[None, :] > places[:, None], float("-inf")).softmax(-1) @ v


def ring_of(rank: int) -> Ring:
    size = dist.get_world_size() if dist.is_initialized() else 1
    return Ring(dist.group.WORLD if size > 1 else None, rank=rank, size=size)


def errors(rank: int, kv_heads: int, flash: bool, bias: str, dtype: torch.dtype) -> list[float]:
    """Largest difference of output and of the three gradients on a rank, against fp64 of one process."""
    made = torch.Generator().manual_seed(3)
    heads = (HEADS, kv_heads, kv_heads)
    whole = [torch.randn(BATCH, n, SEQUENCE, HEAD_DIM, generator=made, dtype=torch.float64) for n in heads]
    upstream = torch.randn(whole[0].shape, generator=made, dtype=torch.float64)
    ours = [x.to(dtype).to(torch.float64, copy=True).requires_grad_() for x in whole]
    expected = whole_attention(*ours, BIASES[bias])
    expected.backward(upstream.to(dtype).double())

    ring = ring_of(rank)
    mine = [ring.split(x.to(dtype), dim=2).requires_grad_() for x in whole]
    y = ring.attention(*mine, flash=flash, bias=BIASES[bias])
    y.backward(ring.split(upstream.to(dtype), dim=2))
    assert y.dtype == dtype
    pairs = [(y, expected), *((x.grad, one.grad) for x, one in zip(mine, ours, strict=True))]
    return [float((got.detach().double() - ring.split(one.detach(), dim=2)).abs().max()) for got, one in pairs]  # type: ignore[union-attr]


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize(("world_size", "kv_heads"), [(1, 4), (2, 4), (3, 2), (4, 1)])
def test_the_ring_is_the_attention_of_one_process(
    pool: Pool, world_size: int, kv_heads: int, flash: bool, bias: str
) -> None:
    found = pool.run(errors, kv_heads, flash, bias, torch.float64, world_size=world_size)
    assert max(max(of_rank) for of_rank in found) < 1e-13


@pytest.mark.parametrize("flash", [True, False])
def test_in_16_bit_the_ring_is_as_exact_as_its_numbers(pool: Pool, flash: bool) -> None:
    found = pool.run(errors, 2, flash, "none", torch.bfloat16, world_size=4)
    alone = pool.run(errors, 2, flash, "none", torch.bfloat16, world_size=1)
    assert max(max(of_rank) for of_rank in found) <= 1.5 * max(alone[0])


class Small(nn.Module):
    """Learned and rotary positions, grouped heads, a residual, a loss: a language model of one layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.tokens, self.places = nn.Embedding(17, 32), nn.Embedding(SEQUENCE, 32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.double()

    def loss(self, ids_BS: Tensor, targets_BS: Tensor, places_S: Tensor, ring: Ring, recompute: str) -> Tensor:
        x = self.tokens(ids_BS) + self.places(places_S)
        if recompute == "none":
            x = self.block(x, places_S, ring)
        else:
            contexts = partial(create_selective_checkpoint_contexts, SAVED_BY_SELECTIVE)
            options: dict[str, Any] = {"context_fn": contexts} if recompute == "selective" else {}
            x = checkpoint(self.block, x, places_S, ring, use_reentrant=False, preserve_rng_state=False, **options)
        losses, _ = token_losses(F.linear(x, self.tokens.weight).flatten(0, 1), targets_BS.flatten())
        return losses.sum()

    def block(self, x: Tensor, places_S: Tensor, ring: Ring) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        q, k = (rotated(heads, 10_000.0, places_S[None]) for heads in (q, k))
        return x + ring.attention(q, k, v).transpose(1, 2).flatten(-2)


def trained(rank: int, recompute: str) -> tuple[float, list[Tensor]]:
    """Summed loss and gradients of all ranks; targets are the next token, also across the ring's borders."""
    made = torch.Generator().manual_seed(7)
    text_BS = torch.randint(17, (BATCH, SEQUENCE + 1), generator=made)
    ring, model = ring_of(rank), Small()
    ids, targets = ring.split(text_BS[:, :-1]), ring.split(text_BS[:, 1:])
    loss = model.loss(ids, targets, ring.places(SEQUENCE, "cpu"), ring, recompute)
    loss.backward()  # type: ignore[no-untyped-call]
    told = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    if ring.size > 1:
        for tensor in told:
            dist.all_reduce(tensor)
    return float(told[0]), told[1:]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_model_over_the_ring_has_the_loss_and_gradients_of_one_process(
    pool: Pool, world_size: int, recompute: str
) -> None:
    (alone,) = pool.run(trained, "none", world_size=1)
    for loss, gradients in pool.run(trained, recompute, world_size=world_size):
        assert loss == pytest.approx(alone[0], rel=1e-14)
        assert len(gradients) == len(alone[1]) == 8
        for got, expected in zip(gradients, alone[1], strict=True):
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def messages(rank: int, kv_heads: int, dtype: torch.dtype) -> list[list[tuple[str, int, int]]]:
    """The batches of (send or receive, peer, bytes) of a forward and a backward pass."""
    sent: list[list[tuple[str, int, int]]] = []
    real = dist.batch_isend_irecv

    def recorded(operations: list[Any]) -> Any:
        sent.append([(one.op.__name__, one.peer, one.tensor.nbytes) for one in operations])
        return real(operations)

    dist.batch_isend_irecv = recorded
    try:
        errors(rank, kv_heads, True, "none", dtype)
    finally:
        dist.batch_isend_irecv = real
    return sent


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_sends_keys_and_values_on_and_their_gradients_home(pool: Pool, dtype: torch.dtype) -> None:
    size, kv_heads = 4, 2
    found = pool.run(messages, kv_heads, dtype, world_size=size)
    both = 2 * BATCH * kv_heads * (SEQUENCE // size) * HEAD_DIM
    states, gradients = both * dtype.itemsize, both * max(4, dtype.itemsize)
    forward, backward = [states] * (size - 1), [states, gradients] * (size - 1) + [gradients]
    for rank, batches in enumerate(found):
        to, before = (rank + 1) % size, (rank - 1) % size
        # A send and its receive are one batch, in the same order on every rank: no rank waits for one that waits for it.
        assert batches == [[("isend", to, n), ("irecv", before, n)] for n in [*forward, *backward]]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 64), (torch.float16, 128)])
def test_on_a_gpu_torchs_flash_kernel_takes_a_part(dtype: torch.dtype, head_dim: int, causal: bool) -> None:
    """Against the shape and dtype rules that torch has for its CUDA kernels, on fake devices."""
    num_queries = 64 if causal else 32
    with FakeTensorMode(), Kernels() as kernels, torch.no_grad():
        q, k, v = (torch.empty(2, 8, n, head_dim, dtype=dtype, device="cuda") for n in (num_queries, 64, 64))
        y, lse = block.forward(q, k, v, causal=causal, bias=None, flash=True)
        gradients = block.backward(y, q, k, v, y, lse, causal=causal, bias=None, flash=True)
    assert kernels.seen["_scaled_dot_product_flash_attention.default"] == 1
    assert kernels.seen["_scaled_dot_product_flash_attention_backward.default"] == 1
    assert (lse.shape, lse.dtype) == ((2, 8, num_queries), torch.float32)
    told = [(x.shape, x.dtype, x.device.type) for x in (y, *gradients)]
    assert told == [(x.shape, dtype, "cuda") for x in (q, q, k, v)]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "biased", "fused"),
    [
        (torch.bfloat16, 64, False, True),
        (torch.float32, 64, False, False),
        (torch.bfloat16, 60, False, False),
        (torch.bfloat16, 320, False, False),
        (torch.bfloat16, 64, True, False),
    ],
)
def test_on_a_gpu_scores_are_written_out_where_that_kernel_does_not_exist(
    dtype: torch.dtype, head_dim: int, biased: bool, fused: bool
) -> None:
    with FakeTensorMode():
        q = torch.empty(1, 1, 8, head_dim, dtype=dtype, device="cuda")
        assert block.has_cuda_kernel(q, q if biased else None) == fused


class Kernels(TorchDispatchMode):
    """Counts the operations that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[function.__name__] += 1
        return function(*args, **(kwargs or {}))
