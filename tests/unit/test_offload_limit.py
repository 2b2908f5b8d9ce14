"""Offload where it counts: under a limit that the kernel keeps; and bytes as the plan says."""

from __future__ import annotations

import sys

import pytest

from benchmarks.offload import HOST, NVME, Run, limit_table, play, shape
from clusters.catalog import load_cluster
from strategies.strategy import Offload

CLUSTER = load_cluster("a100-80gb-8x8")  # any with a disk: only what a rank holds is asked
ARCH = shape(512, 6)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private mappings on Linux alone")
def test_states_beyond_a_memory_limit_train_from_files_and_no_bit_differs(capsys):
    assert limit_table(ARCH, CLUSTER)
    told = capsys.readouterr().out
    assert "can't allocate memory" in told
    assert "bit for bit: yes" in told


@pytest.mark.parametrize(
    ("offload", "zero_stage", "precision"),
    [
        pytest.param(HOST, 0, "fp32", marks=pytest.mark.slow),
        (NVME, 1, "bf16"),
        pytest.param(Offload(optimizer="host", parameters="host"), 0, "bf16", marks=pytest.mark.slow),
        (Offload(optimizer="nvme", parameters="nvme", activations="host"), 0, "fp32"),
    ],
    ids=str,
)
def test_the_plan_counts_what_lies_on_the_device_and_in_files_within_a_twentieth(offload, zero_stage, precision):
    run = Run(ARCH, offload, zero_stage=zero_stage, precision=precision)
    problem = run.problem(CLUSTER)
    strategy = problem.strategy(run.choice())
    memory = problem.memory(strategy)
    did = play(run, CLUSTER)
    assert did.error == ""
    assert memory.stages[0].tensor_peak_bytes == pytest.approx(did.device_bytes, rel=0.05)
    assert memory.nvme_bytes_per_node == pytest.approx(did.nvme_bytes, rel=0.05)
