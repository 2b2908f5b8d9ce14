"""What this machine and a Ray cluster have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from clusters.inventory import local
from clusters.inventory.local import Device, cluster_of_devices, describe_cpu, nvml_devices
from clusters.inventory.ray import blocks, cluster_of_nodes, node_of, reachable
from tests.unit.test_clusters import CPU_RATES

GIB = 2**30


def test_the_cores_of_a_cpu_share_its_memory_and_its_links_are_measured():
    cluster = describe_cpu(CPU_RATES, cores=2, memory_bytes=24 * GIB)
    assert (cluster.name, cluster.num_nodes, cluster.gpus_per_node) == ("cpu-1x2", 1, 2)
    assert cluster.accelerator.memory_bytes == 12 * GIB
    assert dict(cluster.accelerator.peak_flops) == {"fp32": 80e9, "bf16": 10e9}
    assert (cluster.intra_node.name, cluster.intra_node.measured) == ("shared_memory", True)
    assert (cluster.intra_node.bytes_per_s, cluster.intra_node.latency_s) == (1e9, 3e-4)
    assert cluster.host.num_cores == 2


def test_more_accelerators_than_cores_share_the_cores():
    cluster = describe_cpu(CPU_RATES, cores=2, memory_bytes=24 * GIB, per_node=4)
    assert cluster.accelerator.peak_flops["fp32"] == 40e9
    assert cluster.calibration.rate("matmul_fp32", 1e9) == 40e9
    assert cluster.calibration.op_overhead_s == 8e-6


@pytest.mark.parametrize(
    ("files", "cgroup", "cores", "memory_bytes"),
    [
        ({}, "0::/", 64, 100 * GIB),
        ({"cpu.max": "200000 100000", "memory.max": str(8 * GIB)}, "0::/", 2, 8 * GIB),
        ({"cpu.max": "max 100000", "memory.max": "max"}, "0::/", 64, 100 * GIB),
        ({"cpu.max": "50000 100000"}, "0::/", 1, 100 * GIB),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, "0::/a/b", 3, 100 * GIB),  # a parent grants less
        ({"memory/x/memory.limit_in_bytes": str(4 * GIB)}, "4:memory:/x\n0::/", 64, 4 * GIB),  # version 1
        ({"cpu/x/cpu.cfs_quota_us": "400000", "cpu/x/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/x", 4, 100 * GIB),
        ({"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/x", 64, 100 * GIB),
    ],
)
def test_control_groups_are_respected(files, cgroup, cores, memory_bytes, tmp_path, monkeypatch):
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(cgroup + "\n")
    root.mkdir()
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    folders = local.cgroup_folders(root, proc)
    monkeypatch.setattr(local, "cgroup_folders", lambda: folders)
    monkeypatch.setattr(local.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(local.os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 100 * GIB // 4096)
    assert local.available_cores() == cores
    assert local.available_memory_bytes() == memory_bytes


class FakeNvml:
    """A driver with some GPUs; what it does not answer it refuses, as old drivers do."""

    NVML_CLOCK_MEM = 2
    nvmlMemory_v2 = 2

    def __init__(self, names, **answers):
        self.names, self.answers = names, answers

    def nvmlInit(self):
        if not self.names:
            raise RuntimeError("driver not loaded")

    def __getattr__(self, question):
        if question not in ("nvmlShutdown",) and question not in self.answers:
            raise AttributeError(question)
        return lambda *_args, **_kwargs: self.answers.get(question)

    def nvmlDeviceGetCount(self):
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, handle):
        return self.names[handle].encode()

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{handle}{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):
        return SimpleNamespace(total=80 * GIB, reserved=GIB // 2)


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, "abc"), ("2,0", "ca"), ("GPU-11", "b"), ("", ""), ("0,7,1", "a"), ("-1", "")],
)
def test_nvml_shows_the_gpus_that_cuda_would(visible, names, monkeypatch):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices = nvml_devices(lambda _: FakeNvml(["a", "b", "c"]))
    assert [device.name for device in devices] == list(names)
    assert all(device.memory_bytes == 80 * GIB - GIB // 2 for device in devices)


def test_without_nvml_or_driver_there_is_no_gpu():
    def missing(name):
        raise ImportError(name)

    assert nvml_devices(missing) == []
    assert nvml_devices(lambda _: FakeNvml([])) == []


@pytest.mark.parametrize(("num_nvlinks", "link"), [(12, "nvlink"), (0, "pcie")])
def test_a_known_gpu_has_its_row_and_the_drivers_memory(num_nvlinks, link):
    device = Device(name="NVIDIA A100-SXM4-80GB", memory_bytes=79 * GIB, num_nvlinks=num_nvlinks)
    cluster = cluster_of_devices([device] * 4)
    assert (cluster.name, cluster.accelerator.memory_bytes, cluster.intra_node.name) == (
        "a100-80gb-1x4",
        79 * GIB,
        link,
    )
    assert cluster.notes == ()


def test_an_unknown_gpu_is_described_by_its_driver_and_says_so():
    device = Device(name="NVIDIA Z9", memory_bytes=12 * GIB, num_multiprocessors=54, capability=(7, 5))
    cluster = cluster_of_devices([device])
    assert (cluster.accelerator.name, cluster.accelerator.memory_bytes) == ("NVIDIA Z9", 12 * GIB)
    assert cluster.accelerator.peak_flops["fp16"] == 156e12
    assert "bf16" not in cluster.accelerator.peak_flops
    assert "NVIDIA Z9 is not in the catalog" in cluster.notes[0]


def test_gpus_of_different_kinds_are_refused():
    devices = [Device(name="Tesla T4", memory_bytes=GIB), Device(name="NVIDIA L40S", memory_bytes=GIB)]
    with pytest.raises(ValueError, match="1 x NVIDIA L40S, 1 x Tesla T4\n  to fix: CUDA_VISIBLE_DEVICES"):
        cluster_of_devices(devices)


def node(gpus=8, kind="A100-80G", cores=96, memory_gib=900, free=None):
    resources = {"CPU": cores, "memory": memory_gib * GIB, "object_store_memory": 100 * GIB}
    if gpus:
        resources |= {"GPU": gpus} | ({f"accelerator_type:{kind}": 1} if kind else {})
    available = {} if free is None else {"Available": resources | {"GPU" if gpus else "CPU": free}}
    return node_of({"Resources": resources, **available})


@pytest.mark.parametrize(
    ("nodes", "gpu", "name", "note"),
    [
        ([node()] * 8, None, "a100-80gb-8x8", ""),
        ([node(0), node(), node()], None, "a100-80gb-2x8", ""),  # a head node without GPUs does not count
        (
            [node(), node(gpus=4)],
            None,
            "a100-80gb-1x8",
            "4 free GPUs are left out: the plan takes equal blocks, 1 nodes of 8",
        ),
        ([node(), node(free=3), node(free=5)], None, "a100-80gb-2x5", "6 free GPUs are left out"),
        ([node(free=0), node(free=8)], None, "a100-80gb-1x8", ""),
        ([node(cores=6)], None, "a100-80gb-1x6", ""),  # each worker takes a CPU of Ray's beside its GPU
        ([node(kind="A100")] * 2, None, "a100-40gb-2x8", "planned as a100-40gb, the smallest of that name"),
        ([node(kind="A100")] * 2, "a100-80gb", "a100-80gb-2x8", ""),
        ([node(gpus=4, kind="T4")], None, "t4-1x4", ""),
        ([node(memory_gib=900), node(memory_gib=899)], None, "a100-80gb-2x8", ""),
    ],
)
def test_a_ray_cluster_is_a_cluster(nodes, gpu, name, note):
    cluster = cluster_of_nodes(nodes, gpu=gpu)
    assert cluster.name == name
    assert cluster.host.num_cores == min(node.num_cores for node in nodes)
    assert note in "".join(cluster.notes)
    assert bool(cluster.notes) == bool(note)


def test_the_smallest_node_bounds_the_host():
    assert cluster_of_nodes([node(memory_gib=900), node(memory_gib=500)]).host.memory_bytes == 600 * GIB


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([], "has no live node"),
        ([node(free=0), node(free=0)], "2 nodes with 16 x A100-80G, 0 of them free"),
        (
            [node(), node(), node(kind="H100")],
            "2 nodes with 16 x A100-80G, 16 of them free (each takes a CPU of Ray's too); 1 node with 8 x H100",
        ),
        ([node(kind="")], "Ray does not say which GPU its nodes have"),
        ([node(kind="TPU-V4")], "Ray calls its GPU 'TPU-V4', which is not in the catalog"),
        ([node(gpus=0, cores=2, free=0)], "1 nodes with 2 CPUs, no CPU of them free"),
    ],
)
def test_a_ray_cluster_that_is_no_cluster_names_the_difference(nodes, message):
    with pytest.raises(ValueError) as caught:
        cluster_of_nodes(nodes, address="127.0.0.1:6379")
    assert message in str(caught.value)
    assert "127.0.0.1:6379" in str(caught.value)


@pytest.mark.parametrize(
    ("free", "wanted"),
    [
        ([8, 8, 8, 8], [(4, 8)]),
        ([8, 7, 4], [(2, 7), (3, 4), (1, 8)]),
        ([4, 2], [(1, 4), (2, 2)]),  # as many on fewer nodes come first
        ([0, 1], [(1, 1)]),
        ([0, 0], []),
    ],
)
def test_what_is_free_is_offered_in_equal_blocks_the_largest_first(free, wanted):
    assert blocks(free) == wanted


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "127.0.0.1:99999999"])
def test_an_address_where_nobody_listens_is_told_at_once(address):
    with pytest.raises(ValueError, match=r"no Ray cluster answers at .*\n  to fix: ray start"):
        reachable(address)


@pytest.mark.parametrize("address", ["auto", "local"])
def test_what_only_ray_can_resolve_is_left_to_ray(address):
    reachable(address)
