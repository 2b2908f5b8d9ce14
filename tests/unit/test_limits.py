"""The time limits of a run, and that torch's process groups keep them."""

from __future__ import annotations

import socket
from dataclasses import fields, replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from orchestrator.training.assignment import Assignment
from orchestrator.training.limits import LEAST_S, LEAST_START_S, SCALE, Limits, from_environment
from orchestrator.training.loop import Groups
from orchestrator.training.worker import join
from strategies.engines.mesh import lay
from strategies.strategy import Strategy
from tests.ranks import spawn


def test_one_factor_scales_every_limit_in_seconds_and_nothing_else():
    limits, half = Limits(), Limits().scaled(0.5)
    for field in fields(Limits):
        before, after = getattr(limits, field.name), getattr(half, field.name)
        is_limit = field.name.endswith("_s") and field.name != "slowest_storage_bytes_per_s"
        assert after == (max(before / 2, min(before, LEAST_S)) if is_limit else before), field.name
    assert Limits().scaled(1e-9).progress_s == LEAST_S
    assert Limits().scaled(1e-9).begin_s == LEAST_START_S, "processes need their time to start, whatever is tested"


@pytest.mark.parametrize(("text", "factor"), [(None, 1.0), ("2", 2.0), ("0.05", 0.05)])
def test_the_factor_comes_from_the_environment(text, factor):
    assert from_environment({} if text is None else {SCALE: text}) == Limits().scaled(factor)


@pytest.mark.parametrize("text", ["", "fast", "0", "-1", "nan"])
def test_a_factor_that_is_no_number_above_0_is_refused_by_name(text):
    with pytest.raises(ValueError, match=rf"{SCALE} is .*; it must be a number above 0"):
        from_environment({SCALE: text})


@pytest.mark.parametrize(
    ("step_s", "first", "limit_s"),
    [
        (None, True, 1800.0),  # nothing is known yet
        (0.1, False, 300.0),  # quick steps: storage may stall for minutes
        (60.0, False, 600.0),  # a slow step may take ten times the slowest one of late
        (600.0, True, 6000.0),
    ],
)
def test_a_slow_step_is_given_more_time_than_a_quick_one(step_s, first, limit_s):
    limits = Limits()
    assert limits.step(step_s, first=first) == limit_s
    assert limits.for_steps_of(step_s).collective_s >= 2 * limits.step(step_s, first=True)


@pytest.mark.parametrize(
    ("num_bytes", "longest_s", "limit_s"),
    [
        (1e6, None, 900.0),
        (2.1e12, None, 21_000.0),  # 175 billion parameters, at the least speed that storage is trusted with
        (2.1e12, 1200.0, 6000.0),  # measured
        (1e6, 0.1, 900.0),
    ],
)
def test_a_large_checkpoint_is_given_the_time_that_its_bytes_take(num_bytes, longest_s, limit_s):
    assert Limits().save(num_bytes=num_bytes, longest_s=longest_s) == limit_s


def groups_keep_the_limit(rank: int, port: int, limit_s: float) -> None:
    strategy = Strategy(data_parallel_degree=4, zero_stage=2, zero_group_size=2, states="full")
    assignment = Assignment(
        job={},
        job_directory="",
        strategy=strategy,
        rank=rank,
        world_size=4,
        run_directory="",
        data_directory="",
        master_port=port,
        limits=replace(Limits(), collective_s=limit_s),
    )
    join(assignment, torch.device("cpu"))
    Groups()
    assert lay(strategy, "cpu").groups()
    found = {
        group.group_desc: group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for group in distributed_c10d._world.pg_map
    }
    assert {name for name in found if "mesh" in name}, found
    assert set(found.values()) == {limit_s}, found
    dist.destroy_process_group()


def test_every_process_group_waits_as_long_as_the_limit_says_the_ones_of_a_mesh_too():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(groups_keep_the_limit, port, 123.0, world_size=4)
