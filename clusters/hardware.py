"""What one machine is made of: frozen values, no I/O. Units: bytes, seconds, FLOPs, bytes per second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A path between accelerators."""

    name: str
    """nvlink, pcie, network, shared_memory."""
    bytes_per_s: float
    """One direction. Inside a node: of one accelerator. Between nodes: of one node, all its network cards together."""
    latency_s: float
    """Time of the smallest collective over two neighbours."""
    measured: bool = False
    """True: a measured bus bandwidth, used as it is. False: line rate, derated once by the time model."""
    source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """One node without its accelerators."""

    memory_bytes: int
    memory_bytes_per_s: float
    num_cores: int
    nvme_bytes: int = 0
    nvme_read_bytes_per_s: float = 0.0
    nvme_write_bytes_per_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """One GPU, or one CPU core that plays its part."""

    name: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: int
    """What the driver reports as total."""
    memory_bytes_per_s: float
    peak_flops: Mapping[str, float]
    """Dense peak FLOP/s by dtype: fp64, fp32, fp16, bf16. A missing dtype cannot be trained on this accelerator."""
    host_link_bytes_per_s: float
    """To host memory, one direction."""
    usd_per_hour: float | None = None
    num_multiprocessors: int = 0
    """Streaming multiprocessors, for wave quantization. 0: unknown or not a GPU."""
    source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What was measured on a cluster. Absent numbers fall back on the datasheet model."""

    matmul_flops: Mapping[str, float] = field(default_factory=dict)
    """Best sustained FLOP/s by dtype."""
    memory_bytes_per_s: float | None = None
    curves: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    """Measured curves by name: points (size, rate), size ascending, read by log-linear interpolation. Names in use:
    matmul_fp32 / matmul_bf16 (rows*k*n volume -> FLOP/s), all_reduce_N (bytes -> bus bytes/s over N ranks)."""
    throughput_error: float | None = None
    memory_error: float | None = None
    """Relative errors that finished runs showed."""
    num_runs: int = 0
    source: str = ""
