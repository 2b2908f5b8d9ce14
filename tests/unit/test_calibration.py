"""Measuring this machine: the arithmetic of the benches, the child's protocol, the cache, what runs teach."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from clusters import describe
from clusters.calibration import benches, measure
from clusters.calibration.cpu import merged, worlds
from clusters.calibration.disk import disk_rates
from clusters.calibration.runs import PRIOR_ERROR, append_run, stated_error, with_record, with_run
from clusters.calibration.timing import cpu_seconds, mean_curves, quartile
from clusters.catalog import load_cluster
from clusters.hardware import Calibration
from clusters.inventory.file import read_mapping, write_cluster
from clusters.inventory.local import describe_cpu
from tests.unit.test_clusters import CPU_RATES


def two_seconds(operation):
    """A clock that runs the operation and says it took two seconds."""
    operation()
    return 2.0


def test_a_linear_layer_counts_its_three_products():
    curve = benches.linear_curve(two_seconds, torch.float64, ((2, 3, 5),))
    assert curve == [[30.0, 3 * 2 * 30 / 2.0]]


def test_a_curve_ends_before_a_point_that_would_take_too_long():
    curve = benches.linear_curve(two_seconds, torch.float32, ((4, 4, 4), (8, 8, 8)))
    assert [size for size, _ in curve] == [64.0]


def test_attention_counts_the_causal_half_forward_and_backward():
    curve = benches.attention_curve(two_seconds, torch.float32, lengths=(16,), num_heads=2, head_size=8)
    scores = 2 * 16 * 16 / 2  # heads, and half of s x s
    assert curve == [[16.0, 3 * 2 * 2 * scores * 8 / 2.0]]  # passes, products, FLOPs a multiply-add


def test_bytes_are_those_read_and_written():
    assert benches.elementwise_curve(two_seconds, (4096,)) == [[4096.0, 3 * 4096 / 2]]
    assert benches.copy_bytes_per_s(two_seconds, 4096) == 2 * 4096 / 2
    assert benches.optimizer_bytes_per_s(two_seconds, num_tensors=2, size=8) == 16 * 2 * 8 / 2
    assert benches.op_overhead_s(two_seconds, num_pairs=5) == pytest.approx(2.0 / 15)


def test_the_clock_takes_the_median_and_the_quartile_the_lower_one():
    assert cpu_seconds(lambda: sum(range(1000)), budget_s=0.005) < 0.005
    assert quartile([4.0, 1.0, 3.0, 2.0]) == 2.0


@pytest.mark.parametrize(
    ("num_workers", "sizes"), [(1, []), (2, [2]), (3, [2, 3]), (8, [2, 4, 8]), (12, [2, 4, 8, 12])]
)
def test_collectives_are_measured_over_powers_of_two_and_over_all(num_workers, sizes):
    assert worlds(num_workers) == sizes


def test_workers_are_averaged_point_by_point():
    curves = [{"m": [[1.0, 10.0], [2.0, 20.0], [4.0, 8.0]]}, {"m": [[1.0, 30.0], [2.0, 40.0]]}]
    assert mean_curves(curves) == {"m": [[1.0, 20.0], [2.0, 30.0]]}


def test_what_only_some_workers_measured_is_averaged_over_those():
    def worker(rate, **extra):
        curves = {"matmul_fp32": [[1.0, rate]], "elementwise": [[2.0**23, 5.0]]} | extra
        return {"curves": curves, "numbers": {"op_overhead_s": rate}, "latency": {"all_reduce_2": rate}}

    found = merged([worker(1.0, matmul_fp32_alone=[[1.0, 7.0]]), worker(3.0)])
    assert found["curves"] == {
        "matmul_fp32": [[1.0, 2.0]],
        "elementwise": [[2.0**23, 5.0]],
        "matmul_fp32_alone": [[1.0, 7.0]],
    }
    assert found["matmul_flops"] == {"fp32": 7.0}
    assert (found["op_overhead_s"], found["elementwise_bytes_per_s"]) == (2.0, 5.0)
    assert found["collective_latency_s"] == {"all_reduce_2": 3.0}


def test_a_disk_takes_and_gives(tmp_path):
    assert set(disk_rates(str(tmp_path), 2**21)) == {"disk_write_bytes_per_s", "disk_read_bytes_per_s"}
    assert list(tmp_path.iterdir()) == []


def test_two_real_workers_measure_all_that_a_calibration_holds(tmp_path):
    """The child itself, at toy sizes."""
    script = """
        import sys
        from clusters.calibration import benches, cpu
        cpu.LINEAR_SHAPES = ((8, 8, 8), (8, 16, 8))
        benches.SLOW_POINT_S = 60.0
        for curve in (benches.attention_curve, benches.elementwise_curve, benches.collective_curves):
            curve.__defaults__ = tuple((2**12, 2**23) if isinstance(d, tuple) else d for d in curve.__defaults__)
        benches.attention_curve.__defaults__ = ((8,), "cpu", 2, 8)
        cpu.serve(cpu.measure, sys.argv)
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", textwrap.dedent(script), "2", "0.002", str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert child.returncode == 0, child.stderr
    *progress, last = map(json.loads, child.stdout.splitlines())
    assert [line["what"] for line in progress][-1] == "disk"
    calibration = describe.section_of(Calibration, {"c": last["result"]}, "c", "here")
    assert set(calibration.curves) == {
        *(f"matmul_{dtype}" for dtype in ("fp32", "bf16", "fp64", "fp16", "fp32_alone", "bf16_alone")),
        *("attention_fp32", "attention_bf16", "elementwise", "all_reduce_2", "reduce_scatter_2", "all_gather_2"),
    }
    assert all(rate > 0 for points in calibration.curves.values() for _, rate in points)
    assert set(calibration.matmul_flops) == {"fp32", "bf16", "fp64", "fp16"}
    assert "FutureWarning" not in child.stderr


def fake_child(tmp_path, monkeypatch, body):
    """A measuring module of the test's own."""
    (tmp_path / "fake_bench.py").write_text(textwrap.dedent(body))
    monkeypatch.syspath_prepend(tmp_path)


def test_the_child_reports_progress_and_then_its_result(tmp_path, monkeypatch):
    fake_child(
        tmp_path,
        monkeypatch,
        """
        import json, os, sys
        print(json.dumps({"progress": 0.5, "what": "half"}))
        print(json.dumps({"result": {"threads": os.environ["OMP_NUM_THREADS"], "workers": sys.argv[1]}}))
        """,
    )
    said = []
    found = measure.run_child("fake_bench", 3, quick=True, folder=tmp_path, say=lambda *line: said.append(line))
    assert found == {"threads": "1", "workers": "3"}
    assert said == [(0.5, "half")]


def test_a_child_that_dies_is_an_error_with_its_last_words(tmp_path, monkeypatch):
    fake_child(tmp_path, monkeypatch, "raise SystemExit('no such device')")
    with pytest.raises(RuntimeError, match=r"exit 1(.|\n)*no such device"):
        measure.run_child("fake_bench", 1, quick=True, folder=tmp_path)


def test_a_machine_is_measured_once(tmp_path, monkeypatch):
    calls = []

    def child(_module, num_workers, *, quick, **_):
        calls.append((num_workers, quick))
        return describe.plain(CPU_RATES) | {"memory_bytes_per_s": 1.23456789e10}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "run_child", child)
    first = measure.cpu_calibration(2)
    assert measure.is_measured(2)
    assert not measure.is_measured(4)
    assert measure.cpu_calibration(2) == first
    assert first.memory_bytes_per_s == 1.235e10
    assert calls == [(2, True)]
    measure.cpu_calibration(2, quick=False)  # a quick one does not serve
    measure.cpu_calibration(2)  # a full one does
    measure.cpu_calibration(2, fresh=True)
    assert calls == [(2, True), (2, False), (2, True)]
    next(tmp_path.glob("shardwise/cpu-*.json")).write_text("{")  # a torn file is measured again
    assert measure.cpu_calibration(2) == first


def test_another_torch_or_processor_is_measured_anew(monkeypatch):
    before = measure.machine_key(2)
    monkeypatch.setattr(measure, "torch_version", lambda: "9.9")
    assert measure.machine_key(2) != before
    assert measure.machine_key(2) != measure.machine_key(3)


def test_a_measured_cluster_survives_its_file(tmp_path):
    cluster = describe_cpu(CPU_RATES, cores=2, memory_bytes=2**34)
    write_cluster(tmp_path / "here.yaml", cluster)
    assert load_cluster(tmp_path / "here.yaml") == cluster


@pytest.mark.parametrize(
    ("errors", "stated"),
    [
        ([], 0.15),
        ([0.0] * 9, 0.15 * math.sqrt(3 / 12)),  # right runs narrow it
        ([0.5, -0.5, 0.5], math.sqrt((0.15**2 + 0.5**2) / 2)),  # wrong ones widen it, whatever their sign
        ([0.05] * 997, pytest.approx(0.0505, abs=1e-4)),  # in the end they are all that counts
    ],
)
def test_the_stated_error_is_a_shrunken_root_mean_square(errors, stated):
    assert stated_error(errors, prior=0.15) == pytest.approx(stated)


def test_finished_runs_are_appended_and_narrow_the_error(tmp_path):
    path = tmp_path / "here.yaml"
    cluster = describe_cpu(CPU_RATES, cores=2, memory_bytes=2**34)
    write_cluster(path, cluster)
    for speed in (1000.0, 1100.0):
        append_run(path, {"tokens_per_second": 1000.0, "peak_bytes": 2e9}, {"tokens_per_second": speed})
    mapping, read = read_mapping(path), load_cluster(path)
    assert [run["measured"]["tokens_per_second"] for run in mapping["runs"]] == [1000.0, 1100.0]
    assert read.calibration.num_runs == 2
    expected = stated_error([0.0, 0.1], prior=PRIOR_ERROR["tokens_per_second"])
    assert read.calibration.throughput_error == pytest.approx(expected, abs=1e-4)
    assert read.calibration.memory_error is None  # never measured
    assert read.calibration.curves == cluster.calibration.curves


def test_a_run_without_a_measurement_teaches_nothing():
    with pytest.raises(ValueError, match="predicted and measured of tokens_per_second or peak_bytes"):
        with_run({"gpu": "t4"}, {"tokens_per_second": 10.0}, {"tokens_per_second": 0.0}, time_unix_s=0)


def test_a_machine_keeps_the_errors_of_its_runs_when_it_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "run_child", lambda *_, **__: describe.plain(CPU_RATES))
    assert measure.cpu_calibration(2).throughput_error is None
    record = measure.machine_record(2)
    append_run(record, {"tokens_per_second": 5423.0}, {"tokens_per_second": 3950.0}, begin=True)
    expected = stated_error([3950 / 5423 - 1], prior=PRIOR_ERROR["tokens_per_second"])
    for fresh in (False, True):
        again = measure.cpu_calibration(2, fresh=fresh)
        assert again.throughput_error == pytest.approx(expected, abs=1e-4)
        assert (again.num_runs, again.matmul_flops) == (1, CPU_RATES.matmul_flops)
    assert measure.cpu_calibration(4).num_runs == 0  # another number of cores is another machine


def test_a_record_that_cannot_be_read_tells_nothing(tmp_path):
    record = tmp_path / "runs.yaml"
    for text in ("{", "calibration: 3", "calibration: {throughput_error: much}"):
        record.write_text(text)
        assert with_record(CPU_RATES, record) == CPU_RATES


def test_a_cluster_file_that_is_gone_is_not_begun_anew(tmp_path):
    with pytest.raises(ValueError, match="cannot read the cluster file"):
        append_run(tmp_path / "gone.yaml", {"peak_bytes": 1.0}, {"peak_bytes": 2.0})
