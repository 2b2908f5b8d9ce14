"""The parts of one machine: frozen values, no I/O. Units: bytes, seconds, FLOPs, bytes per second."""

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
    """Bytes that the driver reports as total."""
    memory_bytes_per_s: float
    peak_flops: Mapping[str, float]
    """Dense peak FLOP/s by dtype: fp64, fp32, fp16, bf16. A missing dtype cannot be trained on this accelerator."""
    host_link_bytes_per_s: float
    """Rate to host memory, one direction."""
    usd_per_hour: float | None = None
    num_multiprocessors: int = 0
    """Streaming multiprocessors, for wave quantization. 0: unknown or not a GPU."""
    source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The numbers that were measured on a cluster, per accelerator. Absent numbers fall back on the datasheet model."""

    matmul_flops: Mapping[str, float] = field(default_factory=dict)
    """Best sustained FLOP/s by dtype, every accelerator of the node at work."""
    memory_bytes_per_s: float | None = None
    """Bytes read and written per second by one accelerator while all of the node are at work, into memory in hand."""
    elementwise_bytes_per_s: float | None = None
    """The same for an out-of-place element-wise operation on 8 MiB, its new tensor's page faults included."""
    optimizer_bytes_per_s: float | None = None
    """Parameter, gradient and two moments (16 bytes a parameter in fp32) that a fused AdamW step passes per second."""
    op_overhead_s: float | None = None
    """Time of one tiny operation under autograd, forward or backward: what a kernel costs at least."""
    collective_latency_s: Mapping[str, float] = field(default_factory=dict)
    """Time of the smallest collective, by the name of its curve: all_reduce_2, ..."""
    curves: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    """Measured curves by name: points (size, rate), size ascending, read by log-linear interpolation. Names in use:

    - matmul_fp32, matmul_bf16, matmul_fp16, matmul_fp64: rows*k*n of a linear layer -> FLOP/s over its forward and both
      backward products, every accelerator of the node at work; with `_alone` appended, one at work;
    - attention_fp32, attention_bf16: sequence length s -> model FLOP/s of causal scaled_dot_product_attention, forward
      and backward together: 12 * heads * head size * s^2 / 2 a sequence (recompute inside the kernel not counted);
    - elementwise: bytes of the result -> bytes read and written per second, the result newly allocated;
    - all_reduce_N, reduce_scatter_N, all_gather_N: bytes of the whole buffer -> bus bytes/s over N ranks of one node
      (nccl-tests' convention: bytes / time * 2(N-1)/N for all_reduce, (N-1)/N for the others)."""
    disk_write_bytes_per_s: float | None = None
    disk_read_bytes_per_s: float | None = None
    """Rate of the folder that runs are kept in; writes are synchronised to the disk."""
    throughput_error: float | None = None
    memory_error: float | None = None
    """Relative errors that finished runs showed."""
    throughput_ratio: float | None = None
    """Measured over predicted tokens per second of finished runs, their geometric mean."""
    throughput_deviation: float | None = None
    """Standard deviation of the logarithm of that ratio between runs; absent with one run."""
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
