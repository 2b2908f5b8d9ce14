"""Which nodes of a Ray cluster a plan's workers get, and which rank is where."""

from __future__ import annotations

import psutil
import pytest

from clusters.inventory.ray import Node
from orchestrator.control import node_tasks
from orchestrator.control.placement import choose, shortage, told, workers_of
from orchestrator.planner.show.json import placement
from orchestrator.training.network import interface_towards
from strategies.strategy import Strategy


def node(name: str, free: int, *, gpus: int = 0) -> Node:
    return Node(
        node_id=name,
        address=f"10.0.0.{name}",
        hostname=f"host-{name}",
        num_gpus=gpus,
        num_cores=8,
        free_gpus=gpus,
        free_cores=free,
        accelerator_type="",
        memory_bytes=0,
    )


@pytest.mark.parametrize(
    ("free", "num_nodes", "per_node", "wanted"),
    [
        ({"1": 4, "2": 4, "3": 4}, 2, 4, ["1", "2"]),
        ({"1": 8, "2": 4, "3": 5}, 2, 4, ["2", "3"]),  # those that the workers fill up best
        ({"9": 2, "10": 2}, 2, 2, ["9", "10"]),
        ({"1": 4, "2": 3}, 2, 4, None),  # all of them or none
    ],
)
def test_nodes_with_room_for_all_workers_are_chosen(free, num_nodes, per_node, wanted):
    nodes = [node(name, room) for name, room in free.items()]
    found = choose(nodes, num_nodes=num_nodes, per_node=per_node, unit="CPU")
    assert (None if found is None else [each.node_id for each in found]) == wanted


def test_a_worker_on_a_gpu_takes_a_cpu_beside_it():
    assert choose([node("1", 2, gpus=8)], num_nodes=1, per_node=4, unit="GPU") is None
    short = shortage([node("1", 2, gpus=8)], num_nodes=1, per_node=4, unit="GPU")
    assert short == "1 node with 4 free GPUs is wanted, and of GPUs that are free host-1 (10.0.0.1) has 2"


@pytest.mark.parametrize(
    ("num_workers", "per_node", "counts", "words"),
    [
        (4, 2, [2, 2], "ranks 0-1 on a, ranks 2-3 on b"),
        (3, 2, [2, 1], "ranks 0-1 on a, rank 2 on b"),
        (2, 4, [2], "ranks 0-1 on a"),
    ],
)
def test_ranks_fill_node_after_node_as_the_plan_places_them(num_workers, per_node, counts, words):
    assert workers_of(num_workers, per_node) == counts
    assert told(["a", "b"][: len(counts)], num_workers, per_node) == words
    planned = [row["node"] for row in placement(Strategy(data_parallel_degree=num_workers), per_node)]
    assert planned == [number for number, count in enumerate(counts) for _ in range(count)]


def test_a_node_with_another_shardwise_is_named_with_both_versions():
    mine = node_tasks.make_version()()
    assert set(mine) == {"version", "code"}
    said = node_tasks.versions_told("host-1", {**mine, "code": "0" * 12}, mine)
    assert f"host-1 has Shardwise {mine['version']} with code 000000000000, and `run` is" in said
    assert f"with code {mine['code']}" in said
    assert "host-1 has no Shardwise" in node_tasks.versions_told("host-1", {}, mine)


def test_the_interface_towards_an_address_holds_the_address_that_others_answer_to():
    (loopback,) = (
        name for name, entries in psutil.net_if_addrs().items() if "127.0.0.1" in [e.address for e in entries]
    )
    assert interface_towards("127.0.0.1", 1234) == loopback
