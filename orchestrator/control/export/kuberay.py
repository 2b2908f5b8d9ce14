"""A RayJob of KubeRay that trains a job in the head pod of a Ray cluster of its own. Pure.

The fields are those of ray.io/v1 RayJob at KubeRay v1.7.0; tests/golden/kuberay holds their schema."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import yaml

from clusters.inventory.scratch import VARIABLE
from orchestrator.control.export.node import Node, paths_of
from orchestrator.control.folder import RunFolder, RunRefused, lock_of
from orchestrator.spec import Job

WORKSPACE = PurePosixPath("/workspace")
"""Folder where the volume is mounted: text, runs, and the job file over it."""
SCRATCH = "/scratch"
LONGEST_NAME = 47
"""Longest name of a RayJob (KubeRay's MaxRayJobNameLength)."""
OBJECT_STORE_BYTES = 100_000_000
"""Object store of the Ray that KubeRay starts: it only starts `run`, which embeds a Ray of its own."""
MONITOR = "RAY_memory_monitor_refresh_ms"
"""0: the Ray that KubeRay starts ends nobody where memory is short. It knows the run as one process and would end it (tried);
the Ray inside the run, which keeps its default, ends a worker."""
TTL_S = 600
"""The pod stays for so long after the end, for a look at it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Settings that a plan cannot know of a Kubernetes cluster."""

    image: str
    """Image with Shardwise, ray[default], a CUDA build of torch and nvidia-ml-py."""
    claim: str
    """PersistentVolumeClaim with the text; runs are written there."""
    namespace: str | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    retries: int = 3
    """New pods after a node was lost or the run failed."""
    time_limit_s: int | None = None


def manifests(job: Job, job_text: str, node: Node, options: Options, *, ray_version: str) -> list[dict[str, Any]]:
    """Return the ConfigMap that holds the job file, and the RayJob. RunRefused where the pod would not find a path of the job."""
    refuse_paths(job)
    name = object_name(job.name)
    about = {"name": name, "labels": {"app.kubernetes.io/name": "shardwise"}}
    if options.namespace:
        about["namespace"] = options.namespace
    runs = WORKSPACE / job.checkpoint.directory
    file = f"{job.name}.yaml"
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": {file: job_text}},
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": about,
            "spec": {
                "entrypoint": f"env -u {MONITOR} shardwise run {WORKSPACE / file} --directory {runs}",
                "backoffLimit": options.retries,
                **({} if options.time_limit_s is None else {"activeDeadlineSeconds": options.time_limit_s}),
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": TTL_S,
                "rayClusterSpec": {
                    "rayVersion": ray_version,
                    # KubeRay makes the token and keeps it in a Secret of its own.
                    "authOptions": {"mode": "token"},
                    "headGroupSpec": {
                        "rayStartParams": {
                            "num-cpus": "0",
                            "num-gpus": "0",
                            "object-store-memory": str(OBJECT_STORE_BYTES),
                            "dashboard-host": "0.0.0.0",
                        },
                        "template": {"spec": _pod(job, name, file, node, options, runs)},
                    },
                },
            },
        },
    ]


def _pod(job: Job, config: str, file: str, node: Node, options: Options, runs: PurePosixPath) -> dict[str, Any]:
    """Return the head pod: the only one, since an export is for one node."""
    volumes: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("workspace", {"persistentVolumeClaim": {"claimName": options.claim}}, {"mountPath": str(WORKSPACE)}),
        ("job", {"configMap": {"name": config}}, {"mountPath": str(WORKSPACE / file), "subPath": file}),
        ("shm", {"emptyDir": {"medium": "Memory", "sizeLimit": _mib(node.shared_bytes)}}, {"mountPath": "/dev/shm"}),
    ]
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(node.grace_s), MONITOR: "0"}
    resources = {"cpu": str(node.num_cores), "memory": _mib(node.memory_bytes)}
    if node.num_gpus:
        resources["nvidia.com/gpu"] = str(node.num_gpus)
    if node.scratch_bytes:
        size = _mib(node.scratch_bytes)
        volumes.append(("scratch", {"emptyDir": {"sizeLimit": size}}, {"mountPath": SCRATCH}))
        resources["ephemeral-storage"] = size
        environment[VARIABLE] = SCRATCH
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": node.grace_s,
        "containers": [
            {
                "name": "ray-head",
                "image": options.image,
                "workingDir": str(WORKSPACE),
                "env": [{"name": key, "value": value} for key, value in environment.items()],
                "ports": [
                    {"name": port, "containerPort": number}
                    for port, number in (("gcs-server", 6379), ("dashboard", 8265), ("client", 10001))
                ],
                "resources": {"requests": resources, "limits": resources},
                "lifecycle": {"preStop": {"exec": {"command": ["bash", "-c", stop_script(runs, job.name)]}}},
                "volumeMounts": [{"name": volume, **mount} for volume, _, mount in volumes],
            }
        ],
        "volumes": [{"name": volume, **source} for volume, source, _ in volumes],
    }
    if node.num_gpus:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if options.node_selector:
        pod["nodeSelector"] = dict(options.node_selector)
    return pod


def stop_script(runs: PurePosixPath, name: str) -> str:
    """Return what a pod that is told to go does first: SIGTERM to `run`, whose number is in its lock, and wait for its
    checkpoint."""
    lock = lock_of(RunFolder(runs / name))  # type: ignore[arg-type]
    return f'run=$(cat {lock}) && kill -TERM "$run" && while kill -0 "$run" 2>/dev/null; do sleep 1; done'


def refuse_paths(job: Job) -> None:
    """RunRefused where a path of the job leads out of its folder, which is all that the volume holds, or cannot be part of an
    entrypoint, which KubeRay's submitter, a shell and Ray each take apart."""
    for keys, path in paths_of(job):
        if ".." in PurePosixPath(path).parts or path.startswith("~"):
            raise RunRefused(
                f"{path} leads out of the folder of the job, and the volume of the pod holds that folder alone",
                where=job.place(*keys),
                fix="put it into the folder of the job, or name it by an absolute path that the image has",
            )
    directory = job.checkpoint.directory
    if shlex.quote(directory) != directory or ".." in PurePosixPath(directory).parts:
        raise RunRefused(
            f"checkpoint.directory is {directory!r}, and a RayJob's entrypoint takes plain paths inside {WORKSPACE} only",
            where=job.place("checkpoint", "directory"),
            fix="directory: runs",
        )


def object_name(name: str) -> str:
    """Return a job's name as Kubernetes takes it: letters, digits and hyphens, a letter first, 47 characters at most. A name that
    had to be cut ends in a sum of the whole, so that two jobs never share one."""
    plain = re.sub(r"[^a-z0-9-]", "-", name).strip("-")
    plain = plain if plain[:1].isalpha() else f"job-{plain}".strip("-")
    if len(plain) <= LONGEST_NAME:
        return plain
    return f"{plain[: LONGEST_NAME - 9].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def text_of(documents: Sequence[Mapping[str, Any]], comments: Iterable[str]) -> str:
    """Return the manifests as YAML, the job file in them as it was written."""
    head = "".join(f"# {line}\n" for line in comments)
    return head + yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120, explicit_start=True)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines in block style, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _mib(num_bytes: int) -> str:
    return f"{-(-num_bytes // 2**20)}Mi"
