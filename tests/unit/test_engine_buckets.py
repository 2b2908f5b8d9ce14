"""Buckets: rank-major, rows as torch.chunk cuts them, nothing lost and nothing mixed up."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from strategies.zero.buckets import Bucket, _layout
from strategies.zero.states import rows

SHAPES = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3), min_size=1, max_size=4)


def bucket(shapes: list[list[int]], num_shards: int, rank: int) -> Bucket:
    parameters = [(str(i), nn.Parameter(torch.zeros(shape))) for i, shape in enumerate(shapes)]
    return Bucket(parameters, num_shards=num_shards, rank=rank, dtype=torch.float32)


@given(shapes=SHAPES, num_shards=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_each_rank_finds_its_rows_and_a_gathered_buffer_gives_the_whole_back(shapes, num_shards):
    wholes = [torch.randn(shape) for shape in shapes]
    for rank in range(num_shards):
        mine = bucket(shapes, num_shards, rank)
        for index, whole in enumerate(wholes):
            mine.store(index, whole)
        for whole, shard in zip(wholes, mine.mine(mine.part), strict=True):
            chunks = torch.chunk(whole, num_shards)
            assert torch.equal(shard, chunks[rank] if rank < len(chunks) else whole[:0])
            assert torch.equal(shard, rows(whole, num_shards, rank))
        mine.unpack(mine.gradients)
        for whole, (_, parameter) in zip(wholes, mine.parameters, strict=True):
            assert torch.equal(parameter, whole)


def test_gradients_add_up_over_micro_batches_and_start_anew_each_step():
    one = bucket([[3, 2], [2]], num_shards=2, rank=0)
    for _ in range(2):
        one.filled = [False, False]
        one.store(0, torch.ones(3, 2))
        one.store(0, torch.ones(3, 2))
        one.fill()
        assert one.mine(one.part)[0].eq(2).all()
        assert one.mine(one.part)[1].eq(0).all(), "a gradient that never came is zero"


def test_the_layout_runs_backwards_in_buckets_of_the_given_size_or_one_parameter():
    module = nn.ParameterDict({"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(10), "d": torch.zeros(1)})
    names = [[name for name, _ in part] for part in _layout(module, bucket_bytes=5 * 4, itemsize=4)]
    assert names == [["d"], ["c"], ["b", "a"]]
