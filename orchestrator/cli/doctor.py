"""`shardwise doctor`: is this machine fit to plan and to run? Each line ok, warn or fail, with the fix."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

from orchestrator.cli.errors import ExitCode

GIB = 2**30
OLDEST_TORCH, FIRST_UNTRIED_TORCH = (2, 11), (2, 14)
OLDEST_RAY, FIRST_UNTRIED_RAY = (2, 52), (2, 61)
PROBE = (
    "import json, torch, torch.distributed as d; print(json.dumps({'version': torch.__version__, "
    "'cuda': torch.cuda.is_available(), 'gloo': d.is_available() and d.is_gloo_available()}))"
)


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


@click.command(
    "doctor", help="Check this machine: Python, torch, Ray, GPUs, memory, disk, network. Exit code 1 where one fails."
)
@click.option(
    "--directory", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Of the runs."
)
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
def command(directory: Path, as_json: bool) -> int:
    checks = examine(directory)
    failed = any(check.status == "fail" for check in checks)
    if as_json:
        click.echo(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        colour = {"ok": "green", "warn": "yellow", "fail": "red"}
        for check in checks:
            click.echo(f"{click.style(f'{check.status:4}', fg=colour[check.status])}  {check.name:14} {check.detail}")
            if check.fix:
                click.echo(f"{'':21}to fix: {check.fix}")
    return ExitCode.FAILED if failed else ExitCode.DONE


def examine(directory: Path) -> list[Check]:
    """Every check of this machine, in the order of a run's needs."""
    from clusters.inventory import local

    devices = local.nvml_devices()
    probes: list[Callable[[], Check]] = [
        lambda: python(sys.version_info[:3]),
        lambda: torch(probe_torch(), num_gpus=len(devices)),
        lambda: ray(installed("ray")),
        lambda: ray_environment(os.environ, auth_token=Path.home() / ".ray" / "auth_token"),
        lambda: ray_folder(Path("/tmp/ray")),
        lambda: gpus([device.name for device in devices]),
        lambda: processors(local.available_cores(), os.cpu_count() or 1),
        lambda: memory(local.available_memory_bytes()),
        lambda: shared_memory(Path("/dev/shm")),
        lambda: disk(directory),
        lambda: loopback("127.0.0.1"),
        lambda: hostname(os.environ),
        open_files,
        lambda: calibration(bool(devices), local.available_cores()),
    ]
    return [probe() for probe in probes]


def python(version: tuple[int, ...]) -> Check:
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Check("python", "fail", f"{text} is too old", "Python 3.11 or later")
    return Check("python", "ok", text)


def installed(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def probe_torch() -> Mapping[str, object] | str:
    """Return what torch says of itself, or what went wrong; in a child process, which a broken build may take down."""
    if installed("torch") is None:
        return "not installed"
    try:
        child = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "import torch did not end within 120 seconds"
    if child.returncode:
        return (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
    answer: dict[str, object] = json.loads(child.stdout.splitlines()[-1])
    return answer


def torch(probe: Mapping[str, object] | str, *, num_gpus: int) -> Check:
    wanted = f"torch>={_dotted(OLDEST_TORCH)},<{_dotted(FIRST_UNTRIED_TORCH)}"
    if isinstance(probe, str):
        return Check("torch", "fail", probe, f"pip install '{wanted}'")
    version = str(probe["version"])
    if _release(version) < OLDEST_TORCH:
        return Check("torch", "fail", f"{version} is too old", f"pip install '{wanted}'")
    if not probe["gloo"]:
        return Check("torch", "fail", f"{version} without gloo", f"a build with distributed: pip install '{wanted}'")
    if num_gpus and not probe["cuda"]:
        fix = "a CUDA build of torch for this driver (pytorch.org), or CUDA_VISIBLE_DEVICES= to train on the CPU"
        return Check("torch", "fail", f"{version} cannot use the {num_gpus} GPUs of this machine", fix)
    if _release(version) >= FIRST_UNTRIED_TORCH:
        return Check("torch", "warn", f"{version} is newer than any tried", f"pip install '{wanted}'")
    return Check("torch", "ok", f"{version}, {'CUDA' if probe['cuda'] else 'CPU'}")


def ray(version: str | None) -> Check:
    wanted = f"ray>={_dotted(OLDEST_RAY)},<{_dotted(FIRST_UNTRIED_RAY)}"
    if version is None:
        return Check("ray", "fail", "not installed: plan works, run does not", f"pip install '{wanted}'")
    if _release(version) < OLDEST_RAY:
        return Check("ray", "fail", f"{version} is too old", f"pip install '{wanted}'")
    if _release(version) >= FIRST_UNTRIED_RAY:
        return Check("ray", "warn", f"{version} is newer than any tried", f"pip install '{wanted}'")
    return Check("ray", "ok", version)


def ray_environment(environment: Mapping[str, str], *, auth_token: Path) -> Check:
    """A local start of Ray 2.60 turns token authentication on and leaves a token; later starts that do not say which
    mode they want then refuse each other with InvalidAuthToken."""
    name = "ray settings"
    if address := environment.get("RAY_ADDRESS"):
        fix = "unset RAY_ADDRESS where that cluster is not meant"
        return Check(name, "warn", f"RAY_ADDRESS={address}: Ray commands go to that cluster", fix)
    mode = environment.get("RAY_AUTH_MODE")
    if mode not in (None, "disabled", "token"):
        return Check(
            name, "fail", f"RAY_AUTH_MODE={mode} is no mode of Ray's", "export RAY_AUTH_MODE=disabled (or token)"
        )
    if mode is None and auth_token.exists():
        fix = "export RAY_AUTH_MODE=disabled (or token) wherever you start or join a cluster by hand"
        return Check(
            name, "warn", f"{auth_token} exists and RAY_AUTH_MODE is not set: ray start may ask for a token", fix
        )
    return Check(name, "ok", f"authentication {mode or 'not set'}")


def ray_folder(folder: Path) -> Check:
    parent = folder if folder.exists() else folder.parent
    if not os.access(parent, os.W_OK):
        return Check(
            "ray folder", "fail", f"{parent} cannot be written", f"chown or clear {parent}; Ray keeps its sockets there"
        )
    if (folder / "ray_current_cluster").exists():
        fix = f"where no Ray runs any more: rm {folder}/ray_current_cluster"
        return Check("ray folder", "warn", "a Ray cluster runs here, or ended without clearing up", fix)
    free = shutil.disk_usage(parent).free
    if free < GIB:
        return Check(
            "ray folder", "warn", f"{free / GIB:.1f} GiB free under {parent}", "make room; Ray logs and spills there"
        )
    return Check("ray folder", "ok", str(folder))


def gpus(names: list[str]) -> Check:
    from clusters.catalog.rows import by_device_name

    if not names:
        return Check("gpu", "ok", "none seen: jobs run on the CPU (GPUs are found by NVML: pip install nvidia-ml-py)")
    kinds = sorted(set(names))
    if len(kinds) > 1:
        return Check("gpu", "fail", f"different kinds: {', '.join(kinds)}", "CUDA_VISIBLE_DEVICES with one kind")
    if by_device_name(kinds[0]) is None:
        fix = "shardwise calibrate --output FILE, and cluster: FILE in the job"
        return Check("gpu", "warn", f"{len(names)} x {kinds[0]}, not in the catalog: its peaks are a guess", fix)
    return Check("gpu", "ok", f"{len(names)} x {kinds[0]}")


def processors(available: int, total: int) -> Check:
    granted = "" if available == total else f" of {total}"
    return Check("cores", "ok", f"{available}{granted}: one worker each where there is no GPU")


def memory(num_bytes: int) -> Check:
    text = f"{num_bytes / GIB:.1f} GiB"
    if num_bytes < 2 * GIB:
        return Check("memory", "fail", text, "at least 2 GiB: torch and Ray alone take one")
    if num_bytes < 4 * GIB:
        return Check("memory", "warn", text, "4 GiB or more, for more than a toy")
    return Check("memory", "ok", text)


def shared_memory(folder: Path) -> Check:
    if not folder.is_dir():
        return Check("shared memory", "warn", f"no {folder}: Ray falls back on files", "a system with /dev/shm")
    free = shutil.disk_usage(folder).free
    if free < GIB // 4:
        fix = "docker run --shm-size=2g, or mount a larger tmpfs"
        return Check(
            "shared memory", "warn", f"{free / 2**20:.0f} MiB free in {folder}: Ray's object store is slow", fix
        )
    return Check("shared memory", "ok", f"{free / GIB:.1f} GiB free in {folder}")


def disk(directory: Path) -> Check:
    """Check the disk of the nearest folder that exists: the run makes the rest."""
    folder = directory.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Check("disk", "fail", f"{folder} cannot be written", "checkpoint.directory: a folder you may write")
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free for {directory}"
    if free < GIB:
        return Check("disk", "fail", text, "make room, or checkpoint.directory on another disk")
    if free < 10 * GIB:
        return Check("disk", "warn", text, "a checkpoint takes 12 to 16 bytes a parameter, times checkpoint.keep")
    return Check("disk", "ok", text)


def loopback(address: str) -> Check:
    """Workers meet on it: a listener and a connection, as a process group does."""
    try:
        with socket.create_server((address, 0)) as server:
            with socket.create_connection(server.getsockname(), timeout=5):
                pass
            return Check("loopback", "ok", address)
    except OSError as error:
        return Check(
            "loopback", "fail", f"{address}: {error.strerror or error}", "let processes listen on the loopback"
        )


def hostname(environment: Mapping[str, str]) -> Check:
    """gloo listens on the address of the host's name unless told an interface."""
    if interface := environment.get("GLOO_SOCKET_IFNAME"):
        known = [name for _, name in socket.if_nameindex()]
        if interface not in known:
            return Check(
                "host name", "fail", f"GLOO_SOCKET_IFNAME={interface} is no interface", f"one of {', '.join(known)}"
            )
        return Check("host name", "ok", f"gloo uses {interface}")
    name = socket.gethostname()
    try:
        return Check("host name", "ok", f"{name} is {socket.gethostbyname(name)}")
    except OSError:
        return Check("host name", "warn", f"{name} has no address", f"a line '127.0.0.1 {name}' in /etc/hosts")


def open_files() -> Check:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096 and soft != resource.RLIM_INFINITY:
        return Check("open files", "warn", f"limit {soft}", f"ulimit -n {hard if 4096 <= hard < 65536 else 65536}")
    return Check("open files", "ok", f"limit {soft}")


def calibration(has_gpu: bool, cores: int) -> Check:
    from clusters.calibration.measure import is_measured

    if has_gpu:
        return Check("calibration", "ok", "GPU rates come from the catalog, or from a file of shardwise calibrate")
    if is_measured(cores):
        return Check("calibration", "ok", "measured and cached")
    return Check("calibration", "ok", "not measured yet: the first plan with cluster: auto takes 20 seconds more")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
