"""The numbers of the cost doors that no datasheet gives, each with its unit and meaning. Pure.

GPU: fitted once, all together, to the published runs in tests/golden/published.csv by `python -m benchmarks.oracle`, which
prints the residuals and how they grow for rows and whole sources that were left out. None belongs to a row, a source or a
model. A calibrated cluster replaces what was measured on it.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeConstants:
    """Constants of the time model on GPUs."""

    matmul: float = 0.876
    """Reached by a training step's large products over what a benchmark of single products sustains (SUSTAINED)."""
    matmul_half_size: float = 504
    """Cube root of rows * inputs * outputs at which a product has half of that, on a GPU of 312 TFLOP/s; grows with the
    square root of the peak."""
    flash: float = 0.443
    """Reached by a training step's flash attention over the kernel paper's best (SUSTAINED)."""
    score_products: float = 0.34
    """Reached by the batched products of unfused attention over what large products sustain."""
    score_bytes: float = 6.39
    """Bytes read and written of each score by a fused masked softmax, forward; plain torch operations: MATH_PASSES times."""
    memory: float = 0.844
    """Part of the datasheet's memory bandwidth that element-wise kernels reach."""
    logit_bytes: float = 51.4
    """Bytes read and written of each logit, forward and backward: casts to fp32, log-softmax, its gradient."""
    layer_launch_s: float = 0.000639
    """Seconds in which the host issues one layer's forward pass, and half a backward pass: a floor under small layers."""
    nvlink: float = 0.6
    """Bus bandwidth of collectives over the link's rate, inside a node."""
    collective_s: float = 0.0001
    """Seconds that a blocking collective inside a node takes beyond its bytes: launch, synchronisation, skew."""
    network: float = 0.95
    """Bus bandwidth over line rate, between nodes."""
    bucket_bytes: float = 8.47e07
    """Bytes of one data-parallel message at ZeRO 0 and 1: each walks the whole ring, so large groups pay latency."""
    hidden: float = 0.454
    """Part of the gradient and parameter traffic of ZeRO 0 and 1 that backward hides."""
    hidden_sharded: float = 0.587
    """The same of FSDP's gathers and scatters, as long as compute is longer."""
    transfer: float = 0.143
    """Part of the stage-to-stage traffic that no compute hides."""
    step_s: float = 0.00169
    """Seconds of every step outside the model: data, loss read-out, optimizer launch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConstants:
    """Constants of the memory model: what tensors the stacks that published hold beyond theory, and what is no tensor at all."""

    score_copies: float = 2.73
    """Copies of the [heads, s, s] scores kept for backward by unfused attention: scores, probabilities, dropout's output."""
    kept_logit_bytes: float = 13.8
    """Bytes a logit at the loss: 16-bit logits, fp32 copy, log-softmax, gradient in part."""
    gathered_logit_bytes: float = 22.5
    """The same of logits gathered from the tensor group, where the loss is not vocabulary-parallel."""
    sharded_logit_bytes: float = 2
    """The same in FSDP stacks, whose fused loss writes its gradient in place."""
    unfused_norm_elements: float = 7.11
    """Hidden-size elements that two unfused RMS norms keep beyond a fused norm's: fp32 copies and products."""
    recompute_layers: float = 2.87
    """One layer's activations and their gradients while it is computed again, in layers, scores apart."""
    recompute_scores: float = 9.45
    """Copies of the scores of unfused attention while its layer is computed again and goes backward."""
    working_elements: float = 9.61
    """Hidden-size elements a token at work in backward outside the saved ones."""
    context_bytes: float = 3.35 * GIB
    """CUDA context, libraries' workspaces, NCCL buffers."""
    fragmentation: float = 0.0421
    """Reserved over allocated, less one."""


TIME = TimeConstants()
MEMORY = MemoryConstants()

MATH_PASSES = 3.0
"""Traffic of a softmax written in torch (scale, mask, softmax, dropout apart) over a fused one's."""
BACKWARD_FLASH = 2.5
"""Backward over forward of flash attention: it computes the scores again (arXiv:2307.08691, section 3)."""
HOP_S = {"nvlink": 2e-6, "pcie": 4e-6, "network": 8e-6, "shared_memory": 0.0}
"""One step of a ring: NCCL's own latencies of its simple protocol (nccl-tests, A100)."""
TRANSFER_S = 30e-6
"""One message between pipeline stages."""

# (large bf16 products, flash attention), sustained over dense peak by benchmarks of the single kernel.
# Products: stas00/ml-engineering, MAMF finder: A100 SXM 271.2 of 312, PCIe 252.9 of 312, H100 SXM 794.5 of 989.
# Flash attention 2: arXiv:2307.08691, section 4.1: A100 230 of 312; H100 335 to 390 of 989 (no Hopper instructions).
# V100 and the others: assumed from A100.
SUSTAINED: dict[str, tuple[float, float]] = {
    "a100": (0.869, 0.73),
    "a100-pcie": (0.81, 0.68),
    "h100": (0.803, 0.39),
    "h200": (0.803, 0.39),
    "other": (0.869, 0.73),
}
