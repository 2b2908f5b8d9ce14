"""`calibrate` and `doctor`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clusters.calibration import measure
from clusters.calibration.runs import append_run
from clusters.catalog import load_cluster
from clusters.inventory import local
from clusters.inventory.file import read_mapping
from orchestrator.cli import doctor, main
from tests.unit.test_clusters import CPU_RATES

GIB = 2**30


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(local, "nvml_devices", list)
    monkeypatch.setattr(measure, "cpu_calibration", lambda *_, **__: CPU_RATES)


@pytest.mark.usefixtures("measured")
def test_calibrate_writes_a_cluster_that_a_job_can_name(tmp_path, capsys):
    path = tmp_path / "here.yaml"
    assert main(["calibrate", "--quick", "--output", str(path)]) == 0
    told = capsys.readouterr().out
    assert "80.0 GFLOP/s" in told
    assert f"wrote {path}; in a job: cluster: {path}" in told
    assert load_cluster(path).calibration == CPU_RATES


@pytest.mark.usefixtures("measured")
def test_calibrate_again_keeps_the_runs_of_the_file(tmp_path):
    path = tmp_path / "here.yaml"
    main(["calibrate", "--output", str(path)])
    append_run(path, {"tokens_per_second": 1.0}, {"tokens_per_second": 2.0})
    main(["calibrate", "--output", str(path)])
    assert len(read_mapping(path)["runs"]) == 1
    assert load_cluster(path).calibration.throughput_error > 0.15


@pytest.mark.usefixtures("measured")
def test_calibrate_prints_json_for_programs(capsys):
    assert main(["calibrate", "--json"]) == 0
    assert load_cluster(json.loads(capsys.readouterr().out)).calibration == CPU_RATES


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("error", "exit_code", "told"),
    [
        (
            RuntimeError("a process died\nits last words"),
            1,
            ["a process died", "its last words", "to fix: shardwise doctor"],
        ),
        (ValueError("no torch\n  to fix: pip install torch"), 2, ["no torch", "to fix: pip install torch"]),
    ],
)
def test_a_machine_that_cannot_be_measured_is_an_error_with_a_fix(error, exit_code, told, monkeypatch, capsys):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(measure, "cpu_calibration", broken)
    assert main(["calibrate"]) == exit_code
    shown = capsys.readouterr().err
    assert [words for words in told if words not in shown] == []


@pytest.mark.usefixtures("measured")
def test_calibrate_never_writes_over_what_is_no_cluster_file(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("dear diary")
    assert main(["calibrate", "--output", str(tmp_path / "notes.txt")]) == 2
    assert "a cluster file holds keys and values" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "dear diary"


@pytest.mark.usefixtures("measured")
def test_calibrate_says_where_it_could_not_write(capsys):
    assert main(["calibrate", "--output", "/proc/here.yaml"]) == 1
    assert "/proc/here.yaml cannot be written" in capsys.readouterr().err


GOOD_TORCH = {"version": "2.13.0+cpu", "cuda": False, "gloo": True}


@pytest.mark.parametrize(
    ("check", "status", "words"),
    [
        (doctor.python((3, 11, 7)), "ok", "3.11.7"),
        (doctor.python((3, 10, 1)), "fail", "Python 3.11 or later"),
        (doctor.torch(GOOD_TORCH, num_gpus=0), "ok", "2.13.0+cpu, CPU"),
        (doctor.torch(GOOD_TORCH, num_gpus=8), "fail", "cannot use the 8 GPUs of this machine"),
        (doctor.torch(GOOD_TORCH | {"cuda": True}, num_gpus=8), "ok", "CUDA"),
        (doctor.torch(GOOD_TORCH | {"version": "2.10.0"}, num_gpus=0), "fail", "pip install 'torch>=2.11,<2.14'"),
        (doctor.torch(GOOD_TORCH | {"version": "2.14.1"}, num_gpus=0), "warn", "newer than any tried"),
        (doctor.torch(GOOD_TORCH | {"gloo": False}, num_gpus=0), "fail", "without gloo"),
        (doctor.torch("not installed", num_gpus=0), "fail", "pip install"),
        (doctor.ray("2.60.0"), "ok", "2.60.0"),
        (doctor.ray("2.51.0"), "fail", "too old"),
        (doctor.ray("2.61.0"), "warn", "newer than any tried"),
        (doctor.ray(None), "fail", "plan works, run does not"),
        (doctor.ray_environment({}, auth_token=Path("/no/token")), "ok", "not set"),
        (doctor.ray_environment({"RAY_AUTH_MODE": "disabled"}, auth_token=Path("/")), "ok", "disabled"),
        (doctor.ray_environment({}, auth_token=Path("/")), "warn", "export RAY_AUTH_MODE=disabled"),
        (doctor.ray_environment({"RAY_AUTH_MODE": "off"}, auth_token=Path("/")), "fail", "is no mode of Ray's"),
        (doctor.ray_environment({"RAY_ADDRESS": "h:1"}, auth_token=Path("/no")), "warn", "unset RAY_ADDRESS"),
        (doctor.gpus([]), "ok", "none seen"),
        (doctor.gpus(["NVIDIA H200"] * 8), "ok", "8 x NVIDIA H200"),
        (doctor.gpus(["NVIDIA H200", "Tesla T4"]), "fail", "CUDA_VISIBLE_DEVICES"),
        (doctor.gpus(["Z9"]), "warn", "shardwise calibrate --output FILE"),
        (doctor.processors(2, 64), "ok", "2 of 64"),
        (doctor.memory(GIB), "fail", "at least 2 GiB"),
        (doctor.memory(3 * GIB), "warn", "4 GiB or more"),
        (doctor.memory(24 * GIB), "ok", "24.0 GiB"),
        (doctor.shared_memory(Path("/no/such")), "warn", "no /no/such"),
        (doctor.disk(Path("/proc/1/mem/runs")), "fail", "cannot be written"),
        (doctor.loopback("127.0.0.1"), "ok", "127.0.0.1"),
        (doctor.loopback("192.0.2.1"), "fail", "192.0.2.1"),
        (doctor.hostname({"GLOO_SOCKET_IFNAME": "zz9"}), "fail", "GLOO_SOCKET_IFNAME=zz9 is no interface"),
    ],
)
def test_a_check_says_what_is_wrong_and_how_to_fix_it(check, status, words):
    assert check.status == status
    assert words in f"{check.detail} {check.fix}"
    assert bool(check.fix) == (status != "ok")


def test_a_ray_that_left_its_mark_is_told(tmp_path):
    (tmp_path / "ray_current_cluster").touch()
    assert doctor.ray_folder(tmp_path).status == "warn"


@pytest.mark.parametrize(("status", "exit_code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_doctor_fails_where_a_check_fails(status, exit_code, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda _: [doctor.Check("disk", status, "so much", "make room")])
    assert main(["doctor"]) == exit_code
    text = capsys.readouterr().out
    assert status in text
    assert "to fix: make room" in text
    assert main(["doctor", "--json"]) == exit_code
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] == (exit_code == 0)
    assert answer["checks"][0]["fix"] == "make room"


def test_doctor_examines_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "probe_torch", lambda: GOOD_TORCH)
    monkeypatch.setattr(local, "nvml_devices", list)
    checks = doctor.examine(tmp_path / "runs")
    assert [check.name for check in checks][:3] == ["python", "torch", "ray"]
    assert next(check for check in checks if check.name == "loopback").status == "ok"
