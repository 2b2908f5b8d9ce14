"""The micro benchmarks themselves, on one device of any kind: torch lives here, so only child processes import it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from clusters.calibration.timing import quartile

Curve = list[list[float]]
Seconds = Callable[[Callable[[], object]], float]
"""Seconds of one call of an operation, by the clock that suits the device."""
LINEAR_SHAPES = ((128, 256, 256), (128, 768, 768), (512, 768, 768), (512, 768, 3072), (1024, 1024, 4096))
"""Rows, k, n of a linear layer: from a toy's projection to the MLP of a 350M model on 1,024 tokens."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64, "fp16": torch.float16}
SLOW_POINT_S = 1.5
"""A curve ends before a point that would take longer: bf16 without AVX-512 is some 8 times slower than fp32."""
SEQUENCE_LENGTHS = (128, 512, 1024)
ELEMENTWISE_BYTES = (2**16, 2**20, 2**23, 2**26)
COLLECTIVE_BYTES = (2**12, 2**18, 2**22, 2**25)


def linear_curve(
    seconds: Seconds, dtype: torch.dtype, shapes: tuple[tuple[int, int, int], ...], device: str = "cpu"
) -> Curve:
    """rows*k*n -> FLOP/s over y = x W', dx = dy W and dW = dy' x: the three layouts of training."""
    curve: Curve = []
    slowest_s, last_volume = 0.0, 1
    for rows, k, n in shapes:
        volume = rows * k * n
        if slowest_s * volume / last_volume > SLOW_POINT_S:
            break
        x, w, dy = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, k), (n, k), (rows, n)))

        def layer(x: torch.Tensor = x, w: torch.Tensor = w, dy: torch.Tensor = dy) -> None:
            torch.mm(x, w.T)
            torch.mm(dy, w)
            torch.mm(dy.T, x)

        slowest_s, last_volume = seconds(layer), volume
        curve.append([float(volume), 6 * volume / slowest_s])
    return curve


def attention_curve(
    seconds: Seconds,
    dtype: torch.dtype,
    lengths: tuple[int, ...] = SEQUENCE_LENGTHS,
    device: str = "cpu",
    num_heads: int = 12,
    head_size: int = 64,
) -> Curve:
    curve: Curve = []
    for length in lengths:
        q, k, v = (
            torch.randn(1, num_heads, length, head_size, device=device).to(dtype).requires_grad_() for _ in range(3)
        )
        gradient = torch.ones_like(q)

        def attend(q: Any = q, k: Any = k, v: Any = v, gradient: Any = gradient) -> None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(out, (q, k, v), gradient)

        flops = 12 * num_heads * head_size * length**2 / 2
        curve.append([float(length), flops / seconds(attend)])
    return curve


def elementwise_curve(seconds: Seconds, sizes: tuple[int, ...] = ELEMENTWISE_BYTES, device: str = "cpu") -> Curve:
    """Bytes of the result -> bytes per second of x + y: two read, one written into a new tensor."""
    curve: Curve = []
    for num_bytes in sizes:
        x, y = (torch.randn(num_bytes // 4, device=device) for _ in range(2))

        def add(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            return x + y

        curve.append([float(num_bytes), 3 * num_bytes / seconds(add)])
    return curve


def copy_bytes_per_s(seconds: Seconds, num_bytes: int = 2**26, device: str = "cpu") -> float:
    """Read and written, into memory in hand."""
    source, target = (torch.randn(num_bytes // 4, device=device) for _ in range(2))
    return 2 * num_bytes / seconds(lambda: target.copy_(source))


def op_overhead_s(seconds: Seconds, num_pairs: int = 50, device: str = "cpu") -> float:
    """Return the seconds of a kernel in a chain of tiny additions and ReLUs under autograd: three kernels a pair (an addition's
    backward has none)."""
    x, bias = torch.randn(8, requires_grad=True, device=device), torch.randn(8, device=device)

    def chain() -> None:
        y = x
        for _ in range(num_pairs):
            y = F.relu(y + bias)
        y.sum().backward()

    return seconds(chain) / (3 * num_pairs)


def optimizer_bytes_per_s(seconds: Seconds, num_tensors: int = 8, size: int = 2**19, device: str = "cpu") -> float:
    """Return the rate of a fused AdamW: 16 bytes a parameter."""
    parameters = [torch.randn(size, requires_grad=True, device=device) for _ in range(num_tensors)]
    for parameter in parameters:
        parameter.grad = torch.randn(size, device=device)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    return 16 * num_tensors * size / seconds(optimizer.step)


def collective_curves(
    rank: int, world: int, store: str, budget_s: float, sizes: tuple[int, ...] = COLLECTIVE_BYTES, device: str = "cpu"
) -> tuple[dict[str, Curve], dict[str, float]]:
    """Over gloo, or NCCL on a GPU: curves and latencies by name."""
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
    # torch 2.13 renamed them and warns of the old names; 2.11 knows only those.
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    curves: dict[str, Curve] = {}
    latency: dict[str, float] = {}
    try:
        for num_bytes in sizes:
            whole = torch.zeros(num_bytes // 4 // world * world, device=device)
            part = torch.zeros(whole.numel() // world, device=device)
            calls: dict[str, tuple[Callable[..., object], tuple[torch.Tensor, ...], float]] = {
                "all_reduce": (dist.all_reduce, (whole,), 2.0),
                "reduce_scatter": (scatter, (part, whole), 1.0),
                "all_gather": (gather, (whole, part), 1.0),
            }
            for name, (call, arguments, factor) in calls.items():
                seconds = _together(partial(call, *arguments), budget_s, device)
                points = curves.setdefault(f"{name}_{world}", [])
                points.append([float(num_bytes), num_bytes / seconds * factor * (world - 1) / world])
                latency.setdefault(f"{name}_{world}", seconds)
        return curves, latency
    finally:
        dist.destroy_process_group()


def _together(run: Callable[[], object], budget_s: float, device: str) -> float:
    """Wall seconds of a collective; the number of calls is agreed on, since all ranks must make the same."""

    def once() -> float:
        before = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - before

    once()
    agreed = torch.tensor([once()], device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    calls = max(3, min(50, int(budget_s / max(agreed.item(), 1e-6))))
    return quartile([once() for _ in range(calls)])
