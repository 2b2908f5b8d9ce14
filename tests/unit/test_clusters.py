"""Clusters by name, mapping and file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clusters import describe
from clusters.catalog import accelerator, accelerator_names, load_cluster
from clusters.catalog.rows import by_device_name, row
from clusters.hardware import Calibration
from clusters.inventory.file import write_cluster
from clusters.yaml_text import read_yaml

GPUS = [name for name in accelerator_names() if name != "cpu"]
CPU_RATES = Calibration(
    matmul_flops={"fp32": 80e9, "bf16": 10e9},
    memory_bytes_per_s=10e9,
    op_overhead_s=4e-6,
    curves={"matmul_fp32": ((1e6, 40e9), (1e8, 80e9)), "all_reduce_2": ((4096.0, 1e7), (1e7, 1e9))},
    collective_latency_s={"all_reduce_2": 3e-4},
    source="a test",
)


def test_the_catalog_is_the_stated_set():
    assert accelerator_names() == (
        *("a100-40gb", "a100-40gb-pcie", "a100-80gb", "a100-80gb-pcie", "a10g", "a800-80gb", "cpu", "h100-80gb"),
        *("h100-80gb-pcie", "h200", "l40s", "rtx-3090", "rtx-4090", "rtx-a6000", "t4", "v100-16gb", "v100-32gb"),
    )


@pytest.mark.parametrize("name", GPUS)
def test_every_row_is_whole_and_says_where_it_comes_from(name):
    gpu, raw = accelerator(name), row(name)
    assert raw["name"] == name
    assert len(gpu.source) > 10
    assert raw["node"]["source"]
    assert {"fp64", "fp32", "fp16"} <= set(gpu.peak_flops)
    assert gpu.peak_flops["fp64"] <= gpu.peak_flops["fp32"] <= gpu.peak_flops["fp16"]
    assert gpu.usd_per_hour > 0
    assert gpu.num_multiprocessors > 0
    assert [by_device_name(device) for device in raw["device_names"]] == [name] * len(raw["device_names"])


# Dense peaks in TFLOP/s (half of what the datasheets print for sparse), memory as CUDA's total in GiB.
@pytest.mark.parametrize(
    ("name", "fp16", "bf16", "memory_gib", "memory_gb_per_s", "nvlink_gb_per_s"),
    [
        ("a100-40gb", 312, 312, 39.39, 1555, 300),
        ("a100-80gb", 312, 312, 79.15, 2039, 300),
        ("a100-80gb-pcie", 312, 312, 79.15, 1935, None),
        ("a800-80gb", 312, 312, 79.15, 2039, 200),
        ("h100-80gb", 989.4, 989.4, 79.18, 3350, 450),
        ("h100-80gb-pcie", 756, 756, 79.11, 2039, None),
        ("h200", 989.4, 989.4, 139.80, 4800, 450),
        ("v100-16gb", 125, None, 15.77, 900, 150),
        ("v100-32gb", 125, None, 31.74, 900, 150),
        ("t4", 65, None, 14.58, 320, None),
        ("l40s", 362, 362, 44.52, 864, None),
        ("rtx-a6000", 154.8, 154.8, 47.54, 768, None),
        ("a10g", 70, 70, 22.06, 600, None),
    ],
)
def test_datasheet_numbers(name, fp16, bf16, memory_gib, memory_gb_per_s, nvlink_gb_per_s):
    gpu, link = accelerator(name), load_cluster(name).intra_node
    assert gpu.peak_flops["fp16"] == fp16 * 1e12
    assert gpu.peak_flops.get("bf16") == (bf16 and bf16 * 1e12)
    assert gpu.memory_bytes / 2**30 == pytest.approx(memory_gib, abs=0.01)
    assert gpu.memory_bytes_per_s == memory_gb_per_s * 1e9
    assert (link.name, link.bytes_per_s) == (
        ("nvlink", nvlink_gb_per_s * 1e9) if nvlink_gb_per_s else ("pcie", gpu.host_link_bytes_per_s)
    )


@pytest.mark.parametrize(
    ("value", "name", "num_nodes", "gpus_per_node", "inter_node_gbps", "host_memory_gib"),
    [
        ("a100-80gb-8x8", "a100-80gb-8x8", 8, 8, 1600, 2048),
        ("a100-80gb", "a100-80gb-1x1", 1, 1, 200, 256),  # a part of a node has its part of the host
        ("a100-80gb-pcie-2x4", "a100-80gb-pcie-2x4", 2, 4, 100, 512),
        ("h100-80gb-2x16", "h100-80gb-2x16", 2, 16, 3200, 2048),  # a larger node keeps the usual host
        ({"gpu": "v100-32gb", "nodes": 3, "gpus_per_node": 8, "inter_node_gbps": 54}, "v100-32gb-3x8", 3, 8, 54, 512),
        ({"gpu": "t4", "host_memory_gib": 7, "nodes": None}, "t4-1x1", 1, 1, 12.5, 7),
    ],
)
def test_a_name_or_a_mapping_is_a_cluster(value, name, num_nodes, gpus_per_node, inter_node_gbps, host_memory_gib):
    cluster = load_cluster(value)
    assert (cluster.name, cluster.num_nodes, cluster.gpus_per_node) == (name, num_nodes, gpus_per_node)
    assert cluster.inter_node.bytes_per_s * 8 / 1e9 == pytest.approx(inter_node_gbps)
    assert cluster.host.memory_bytes == host_memory_gib * 2**30
    assert not cluster.inter_node.measured


def test_what_the_mapping_says_wins_over_the_catalog():
    cluster = load_cluster(
        {
            "gpu": "a100-80gb",
            "gpus_per_node": 8,
            "intra_node": "pcie",
            "inter_node_measured_gbps": 800,
            "nvme_gib": 0,
            "usd_per_gpu_hour": 0,
        }
    )
    assert (cluster.intra_node.name, cluster.intra_node.bytes_per_s) == ("pcie", 31.5e9)
    assert (cluster.inter_node.bytes_per_s, cluster.inter_node.measured) == (100e9, True)
    assert (cluster.host.nvme_bytes, cluster.usd_per_gpu_hour) == (0, 0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a100-80", "unknown GPU 'a100-80'; did you mean a100-80gb?"),
        ("b300-8x8", "known: a100-40gb, "),
        ("../secrets-1x1", "cannot read the cluster file"),
        ("a100-80gb-0x8", "cluster a100-80gb-0x8: nodes must be a whole number of at least 1, got 0"),
        ("auto", "ask clusters.inventory.local.discover"),
        ({}, "gpu is missing"),
        ({"gpu": "t4", "intra_node": "nvlink"}, "t4 has no NVLink\n  to fix: intra_node: pcie"),
        ({"gpu": "t4", "intra_node": "token ring"}, "intra_node is nvlink or pcie, not 'token ring'"),
        ({"gpu": "t4", "gpus_per_node": 0}, "gpus_per_node must be a whole number of at least 1, got 0"),
        ({"gpu": "t4", "nodes": 1.5}, "nodes must be a whole number of at least 1, got 1.5"),
        ({"gpu": "t4", "inter_node_gbps": 0}, "inter_node_gbps must be a number above 0, got 0"),
        ({"gpu": "t4", "inter_node_gbps": -1}, "inter_node_gbps must be a number above 0, got -1"),
        ({"gpu": "t4", "inter_node_gbps": float("nan")}, "inter_node_gbps must be a number above 0, got nan"),
        ({"gpu": "t4", "inter_node_measured_gbps": True}, "must be a number above 0, got True"),
        ({"gpu": "t4", "inter_node_gbps": 1, "inter_node_measured_gbps": 1}, "exclude each other"),
        ({"gpu": "t4", "host_memory_gib": 0}, "host_memory_gib must be a number above 0, got 0"),
        ({"gpu": "t4", "usd_per_gpu_hour": -1}, "usd_per_gpu_hour must be a number of at least 0, got -1"),
        ({"gpu": "t4", "gpu_per_node": 8}, "unknown key 'gpu_per_node'; did you mean gpus_per_node?"),
        ({"gpu": "t4", "version": 9}, "version 9 of a cluster file is unknown"),
        ({"gpu": "t4", "calibration": [1]}, "calibration must be a section"),
        ({"gpu": "t4", "calibration": {"curves": {"matmul_fp32": [1, 2]}}}, "curves must be name: [[size, rate], ...]"),
        ({"gpu": "t4", "calibration": {"matmul_flops": {"fp32": "fast"}}}, "fp32 must be a number above 0"),
        ({"gpu": "t4", "calibration": {"num_runs": 1.5}}, "num_runs must be a whole number, got 1.5"),
        ({"gpu": "x", "accelerator": {"name": "x"}}, "intra_node must be a section where accelerator is one"),
    ],
)
def test_a_wrong_cluster_says_what_where_and_how_to_fix(value, message):
    with pytest.raises(ValueError) as caught:
        load_cluster(value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("accelerator", "kind", "tpu", "accelerator: kind must be one of 'cuda', 'cpu', got 'tpu'"),
        ("accelerator", "memory_bytes", 0, "accelerator: memory_bytes must be above 0"),
        ("accelerator", "memory_bytes", None, "accelerator: memory_bytes must be a number of at least 0, got None"),
        ("intra_node", "bytes_per_s", 0, "intra_node: bytes_per_s must be above 0"),
        ("intra_node", "measured", "yes", "intra_node: measured must be true or false"),
        ("host", "num_core", 3, "host: unknown key 'num_core'; did you mean num_cores?"),
    ],
)
def test_a_wrong_section_of_a_measured_file_names_its_place(section, key, value, message):
    mapping = describe.to_mapping(load_cluster("t4-1x2"))
    mapping[section][key] = value
    with pytest.raises(ValueError) as caught:
        load_cluster(mapping)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", [*GPUS, "a100-80gb-8x8"])
def test_a_cluster_file_reads_back_as_the_same_cluster(name, tmp_path):
    cluster = load_cluster(name)
    write_cluster(tmp_path / "cluster.yaml", cluster)
    assert load_cluster("cluster.yaml", directory=tmp_path) == cluster
    assert load_cluster(tmp_path / "cluster.yaml") == cluster
    assert load_cluster(json.loads(json.dumps(describe.to_mapping(cluster)))) == cluster


def test_a_hand_written_file_has_the_keys_of_an_inline_cluster(tmp_path):
    (tmp_path / "mine.yaml").write_text("gpu: h100-80gb\nnodes: 4\ngpus_per_node: 8\ninter_node_gbps: 1.6e3\n")
    cluster = load_cluster("mine.yaml", directory=tmp_path)
    assert (cluster.num_gpus, cluster.inter_node.bytes_per_s) == (32, 200e9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the cluster file: No such file"),
        (b"gpu: [t4\n", "c.yaml:2:1: not read as YAML"),
        (b"- t4\n", "a cluster file holds keys and values"),
        (b"gpu: \xff\n", "not UTF-8"),
        (b"gpu: t5\n", "c.yaml: unknown GPU 't5'; did you mean t4?"),
        (b"#" * (5 * 2**20), "larger than 4 MiB"),
        (b"[" * 900, "c.yaml:1:33: not read as YAML: nested too deep"),
        (b"a: &a [x]\nb: *a\n", "c.yaml:2:4: not read as YAML: aliases"),
    ],
)
def test_an_unreadable_file_is_named(content, message, tmp_path):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.yaml") as caught:
        load_cluster(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("312e12", 312e12), ("1e-5", 1e-5), ("1.5", 1.5), (".5e3", 500.0), ("-3", -3), ("017", "017"), ("1:30", "1:30")],
)
def test_numbers_are_those_of_yaml_1_2(text, value):
    assert read_yaml(text) == value
    assert type(read_yaml(text)) is type(value)


def test_a_curve_is_read_linearly_in_log_size_and_flat_outside():
    sizes = [1e5, 1e6, 1e7, 1e8, 1e9]
    assert [CPU_RATES.rate("matmul_fp32", size) for size in sizes] == pytest.approx([40e9, 40e9, 60e9, 80e9, 80e9])
    assert CPU_RATES.rate("matmul_fp64", 1e6) is None


def test_the_catalog_is_light():
    loaded = "import sys, clusters.catalog as c; c.load_cluster('h200-4x8'); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "numpy", "pydantic", "click", "rich", "subprocess", "clusters.inventory.local"} & set(
        modules
    )


def test_every_example_of_a_cluster_in_the_reference_loads():
    reference = (Path(__file__).parents[2] / "docs" / "reference" / "clusters.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in reference.split("```yaml\n")[1:]]
    assert blocks
    for block in blocks:
        value = read_yaml(block)["cluster"]
        assert value == "auto" or load_cluster(value).num_gpus
