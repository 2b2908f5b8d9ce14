"""The machine at hand as a cluster: its GPUs by NVML, or else one `cpu` accelerator a core."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clusters.catalog.rows as rows
from clusters.calibration.measure import Say, collective, cpu_calibration
from clusters.cluster import Cluster
from clusters.hardware import Accelerator, Calibration, Host, Link
from clusters.inventory import scratch

CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc")
_64_CORES = ((6, 0), (7, 0), (7, 2), (7, 5), (8, 0))
"""Compute capabilities with 64 fp32 cores a multiprocessor; the others have 128 (CUDA programming guide)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """The answers of NVML about one GPU."""

    name: str
    memory_bytes: int
    num_multiprocessors: int = 0
    memory_bytes_per_s: float = 0.0
    """Rate from the memory's clock and bus width; 0 where NVML does not say."""
    num_nvlinks: int = 0
    capability: tuple[int, int] = (8, 0)


def discover(*, say: Say | None = None) -> Cluster:
    """Return this machine as a cluster. The first time on a CPU it is measured, some 20 seconds, with a message."""
    devices = nvml_devices()
    return cluster_of_devices(devices) if devices else cpu_cluster(say=say)


def cpu_cluster(*, num_nodes: int = 1, per_node: int | None = None, say: Say | None = None) -> Cluster:
    """`per_node` accelerators (default: one a core) that share this machine's memory and cores equally."""
    cores = available_cores()
    calibration = cpu_calibration(cores, say=say or announce())
    return describe_cpu(
        calibration,
        cores=cores,
        memory_bytes=available_memory_bytes(),
        nvme_bytes=scratch.free_bytes(),
        num_nodes=num_nodes,
        per_node=per_node,
    )


def describe_cpu(
    calibration: Calibration,
    *,
    cores: int,
    memory_bytes: int,
    nvme_bytes: int = 0,
    num_nodes: int = 1,
    per_node: int | None = None,
) -> Cluster:
    """Pure: the cluster of a measured CPU. More accelerators than cores share them, each with its part of the rates."""
    per_node = per_node or cores
    calibration = _slowed(calibration, min(1.0, cores / per_node))
    memory_rate = calibration.memory_bytes_per_s or 1e9
    all_reduce, latency = collective(calibration, per_node)
    accelerator = Accelerator(
        name="cpu",
        kind="cpu",
        memory_bytes=memory_bytes // per_node,
        memory_bytes_per_s=memory_rate,
        peak_flops=calibration.matmul_flops,
        host_link_bytes_per_s=memory_rate,
        source=calibration.source,
    )
    link = Link(
        name="shared_memory", bytes_per_s=all_reduce, latency_s=latency, measured=True, source=calibration.source
    )
    return Cluster(
        name=f"cpu-{num_nodes}x{per_node}",
        accelerator=accelerator,
        num_nodes=num_nodes,
        gpus_per_node=per_node,
        intra_node=link,
        inter_node=dataclasses.replace(link, name="network"),
        host=Host(
            memory_bytes=memory_bytes,
            memory_bytes_per_s=memory_rate * min(cores, per_node),
            num_cores=cores,
            nvme_bytes=nvme_bytes,
            nvme_read_bytes_per_s=calibration.disk_read_bytes_per_s or 0.0,
            nvme_write_bytes_per_s=calibration.disk_write_bytes_per_s or 0.0,
        ),
        calibration=calibration,
    )


def _slowed(calibration: Calibration, share: float) -> Calibration:
    if share == 1.0:
        return calibration

    def slow(rate: float | None) -> float | None:
        return rate * share if rate else rate

    return dataclasses.replace(
        calibration,
        matmul_flops={dtype: rate * share for dtype, rate in calibration.matmul_flops.items()},
        memory_bytes_per_s=slow(calibration.memory_bytes_per_s),
        elementwise_bytes_per_s=slow(calibration.elementwise_bytes_per_s),
        optimizer_bytes_per_s=slow(calibration.optimizer_bytes_per_s),
        op_overhead_s=calibration.op_overhead_s / share if calibration.op_overhead_s else None,
        curves={
            name: tuple((size, rate * share) for size, rate in points) for name, points in calibration.curves.items()
        },
    )


def announce() -> Say:
    """Says on stderr, once, that a measurement has begun."""
    said = False

    def say(_fraction: float, _what: str) -> None:
        nonlocal said
        if not said:
            print("measuring this machine once, about 20 seconds ...", file=sys.stderr, flush=True)
            said = True

    return say


def available_cores() -> int:
    """Cores that this process may use: its affinity, less where a control group grants fewer."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in cgroup_folders() if (quota := _cpu_quota(folder))]
    return max(1, min([affinity, *(int(quota) for quota in quotas)]))


def available_memory_bytes() -> int:
    """Memory of the machine, or of the control group where it grants less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_number(folder / name) for folder in cgroup_folders() for name in ("memory.max", "memory.limit_in_bytes")]
    return min([total, *(int(limit) for limit in limits if limit)])


def cgroup_folders(root: Path = CGROUP, proc: Path = PROC) -> list[Path]:
    """Return the cgroups of this process, each with its parents: version 2, and the version 1 controllers of memory and CPU."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and not {"memory", "cpu"} & set(names):
            continue
        base = root if not controllers else root / ("memory" if "memory" in names else "cpu")
        parts = Path(path.lstrip("/")).parts
        folders += [base.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [folder for folder in folders if folder.is_dir()]


def _cpu_quota(folder: Path) -> float | None:
    """Cores, by cpu.max ("200000 100000") or by version 1's pair of files."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()[:2]
    except (OSError, ValueError):
        quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        return quota_us / period_us if quota_us and quota_us > 0 and period_us else None
    return float(quota) / float(period) if quota.isdigit() else None


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or the word max
        return None


def nvml_devices(load: Callable[[str], Any] = importlib.import_module) -> list[Device]:
    """The GPUs that this process may use. Empty where there is no NVML, no driver or no GPU."""
    try:
        nvml = load("pynvml")
        nvml.nvmlInit()
    except Exception:  # ImportError, or one of NVML's own errors: no library, no driver
        return []
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        return [_device(nvml, handle) for handle in _visible(nvml, handles)]
    finally:
        nvml.nvmlShutdown()


def _visible(nvml: Any, handles: Sequence[Any]) -> Iterator[Any]:
    """Yield the devices that CUDA_VISIBLE_DEVICES names: indices or UUIDs; CUDA stops at the first that it does not know."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        yield from handles
        return
    for name in filter(None, map(str.strip, wanted.split(","))):
        if name.isdigit() and int(name) < len(handles):
            yield handles[int(name)]
            continue
        found = [handle for handle in handles if _text(nvml.nvmlDeviceGetUUID(handle)).startswith(name)]
        if not found or name.isdigit():
            return
        yield found[0]


def _device(nvml: Any, handle: Any) -> Device:
    def ask(question: str, *arguments: Any, otherwise: Any, **options: Any) -> Any:
        try:
            return getattr(nvml, question)(handle, *arguments, **options)
        except Exception:  # NVML says NotSupported by device and by driver; an old pynvml lacks the function
            return otherwise

    # Version 2 tells what the driver keeps for itself, which CUDA does not count into its total.
    version_2 = getattr(nvml, "nvmlMemory_v2", None)
    memory = ask("nvmlDeviceGetMemoryInfo", version=version_2, otherwise=None)
    reserved = int(memory.reserved) if memory is not None and version_2 else 0
    memory = memory or nvml.nvmlDeviceGetMemoryInfo(handle)
    clock_mhz = ask("nvmlDeviceGetMaxClockInfo", getattr(nvml, "NVML_CLOCK_MEM", 2), otherwise=0)
    bus_bits = ask("nvmlDeviceGetMemoryBusWidth", otherwise=0)
    cores = ask("nvmlDeviceGetNumGpuCores", otherwise=0)
    capability = tuple(ask("nvmlDeviceGetCudaComputeCapability", otherwise=(8, 0)))
    links = (ask("nvmlDeviceGetNvLinkState", link, otherwise=0) for link in range(18))
    return Device(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(memory.total) - reserved,
        num_multiprocessors=cores // (64 if capability in _64_CORES else 128),
        memory_bytes_per_s=2 * clock_mhz * 1e6 * bus_bits / 8,
        num_nvlinks=sum(1 for state in links if state),
        capability=(int(capability[0]), int(capability[1])),
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def cluster_of_devices(devices: Sequence[Device], *, host: Host | None = None) -> Cluster:
    """Pure but for the host's own numbers: one node of these GPUs, which must be of one kind."""
    names = sorted({device.name for device in devices})
    if len(names) > 1:
        counts = ", ".join(f"{sum(d.name == name for d in devices)} x {name}" for name in names)
        raise ValueError(
            f"this machine has GPUs of different kinds: {counts}\n  to fix: CUDA_VISIBLE_DEVICES with one kind"
        )
    device, gpu = devices[0], rows.by_device_name(names[0])
    memory = available_memory_bytes() if host is None else host.memory_bytes
    if gpu is None:
        return _unknown_gpu(devices, host)
    usual = rows.host(gpu, len(devices))
    kind = "nvlink" if device.num_nvlinks and "nvlink_bytes_per_s" in rows.row(gpu) else "pcie"
    return Cluster(
        name=f"{gpu}-1x{len(devices)}",
        accelerator=dataclasses.replace(rows.accelerator(gpu), memory_bytes=device.memory_bytes),
        num_nodes=1,
        gpus_per_node=len(devices),
        intra_node=rows.intra_node(gpu, kind),
        inter_node=rows.inter_node(gpu, len(devices)),
        host=host or dataclasses.replace(usual, memory_bytes=memory, num_cores=available_cores()),
        usd_per_gpu_hour=rows.accelerator(gpu).usd_per_hour,
    )


def _unknown_gpu(devices: Sequence[Device], host: Host | None) -> Cluster:
    """A GPU without a row: what NVML says, and an A100's peaks by multiprocessors, which the note admits."""
    device, kin = devices[0], rows.accelerator("a100-80gb")
    share = (device.num_multiprocessors or kin.num_multiprocessors) / kin.num_multiprocessors
    trainable = [dtype for dtype in kin.peak_flops if device.capability >= (8, 0) or dtype not in ("bf16", "tf32")]
    link = rows.link("pcie", kin.host_link_bytes_per_s, source="assumed: PCIe 4.0 x16")
    note = (
        f"{device.name} is not in the catalog: its memory is what the driver says, its peaks are assumed to be "
        "an A100's by multiprocessors; `shardwise calibrate` measures them"
    )
    memory, cores = available_memory_bytes(), available_cores()
    return Cluster(
        name=f"unknown-1x{len(devices)}",
        accelerator=Accelerator(
            name=device.name,
            kind="cuda",
            memory_bytes=device.memory_bytes,
            memory_bytes_per_s=device.memory_bytes_per_s or kin.memory_bytes_per_s * share,
            peak_flops={dtype: kin.peak_flops[dtype] * share for dtype in trainable},
            host_link_bytes_per_s=kin.host_link_bytes_per_s,
            num_multiprocessors=device.num_multiprocessors,
            source="NVML, and an A100's rates by multiprocessors",
        ),
        num_nodes=1,
        gpus_per_node=len(devices),
        intra_node=link,
        inter_node=rows.link("network", 25 * rows.BYTES_PER_S_PER_GBPS, source="assumed: 25 Gb/s"),
        host=host or Host(memory_bytes=memory, memory_bytes_per_s=100e9, num_cores=cores),
        notes=(note,),
    )
