"""What one machine is made of: frozen values, no I/O. Units: bytes, seconds, FLOPs, bytes per second."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
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
    """What was measured on a cluster, per accelerator. Absent numbers fall back on the datasheet model."""

    matmul_flops: Mapping[str, float] = field(default_factory=dict)
    """Best sustained FLOP/s by dtype, every accelerator of the node at work."""
    memory_bytes_per_s: float | None = None
    """Bytes read and written per second by one accelerator while all of the node are at work."""
    elementwise_bytes_per_s: float | None = None
    """The same for torch's out-of-place element-wise operations on activations that leave the caches, allocation of
    the result included: what a ReLU, a residual addition or a norm pays."""
    optimizer_bytes_per_s: float | None = None
    """Bytes of parameter, gradient and two moments (16 a parameter in fp32) that a fused AdamW step passes per second."""
    op_overhead_s: float | None = None
    """Host time to launch one small operation: the floor of any kernel's time."""
    collective_latency_s: Mapping[str, float] = field(default_factory=dict)
    """Time of the smallest collective, by the name of its curve: all_reduce_2, ..."""
    curves: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    """Measured curves by name: points (size, rate), size ascending, read by log-linear interpolation. Names in use:
    matmul_fp32, matmul_bf16, matmul_fp64 (rows*k*n volume -> FLOP/s of one accelerator, all of the node at work);
    matmul_fp32_alone, ... (the same with one at work); attention_fp32, attention_bf16 (FLOPs of one call, causal
    counted as half -> FLOP/s, forward and backward together); all_reduce_N, reduce_scatter_N, all_gather_N (bytes of
    the whole buffer -> bus bytes/s over N ranks of one node, nccl-tests' convention)."""
    disk_write_bytes_per_s: float | None = None
    disk_read_bytes_per_s: float | None = None
    """Of the folder that runs are kept in; writes are synchronised to the disk."""
    throughput_error: float | None = None
    memory_error: float | None = None
    """Relative errors that finished runs showed."""
    num_runs: int = 0
    source: str = ""

    def rate(self, curve: str, size: float) -> float | None:
        """The curve at a size: linear in log(size) between two points, flat outside. None: not measured."""
        points = self.curves.get(curve)
        if not points:
            return None
        if size <= points[0][0]:
            return points[0][1]
        for (low, low_rate), (high, high_rate) in pairwise(points):
            if size <= high:
                return low_rate + (high_rate - low_rate) * math.log(size / low) / math.log(high / low)
        return points[-1][1]
