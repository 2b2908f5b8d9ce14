"""The numbers of the cost doors that no datasheet gives, in one table: value, range, unit, meaning, source. Pure.

A `fitted` constant was fitted to the published runs in tests/golden/published.csv, all together, from a neutral start, by
`python -m benchmarks.oracle --fit`; its range is what the fits with one stack left out span. An `assumed` one is not in those
runs: its range is that of its source. No constant belongs to a row, a source or a model. A calibrated cluster replaces what was
measured on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

GIB = 2**30
MIB = 2**20
Range = tuple[float, float]


class Constant(NamedTuple):
    """One number of the model and what is known of it."""

    range: Range
    """The least and the largest value that the data, or the source, allow."""
    unit: str
    meaning: str
    source: str
    start: float | None = None
    """Where a fit starts, and what holds it loosely; None: it is not fitted."""
    within: Range = (0.0, float("inf"))
    """Values that are physical: nobody reaches more than a benchmark of the part alone."""


def fitted(value: float, range: Range, *, start: float, within: Range, unit: str, meaning: str) -> Any:
    """Return the field of a constant that published runs decide."""
    told = Constant(range, unit, meaning, "fit: python -m benchmarks.oracle --fit", start, within)
    return field(default=value, metadata={"constant": told})


def assumed(value: float, range: Range, *, unit: str, meaning: str, source: str) -> Any:
    """Return the field of a constant that no published run decides."""
    return field(default=value, metadata={"constant": Constant(range, unit, meaning, source)})


def table(of: type) -> dict[str, Constant]:
    """Return what is known of each constant of a class, by name."""
    return {each.name: each.metadata["constant"] for each in fields(of)}


def fitted_names(of: type) -> tuple[str, ...]:
    """Return the names of the constants of a class that published runs decide."""
    return tuple(name for name, known in table(of).items() if known.start is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeConstants:
    """Constants of the time model."""

    matmul: float = fitted(
        0.858,
        (0.845, 0.878),
        start=0.85,
        within=(0.5, 1.0),
        unit="1",
        meaning="A training step's large products over what a benchmark of single products sustains (SUSTAINED).",
    )
    matmul_half_size: float = fitted(
        407,
        (403, 412),
        start=400,
        within=(50, 2000),
        unit="elements",
        meaning="Cube root of rows x inputs x outputs at which a product has half of that, on a GPU of 312 TFLOP/s; grows with "
        "the square root of the peak.",
    )
    flash: float = fitted(
        0.488,
        (0.483, 0.589),
        start=0.6,
        within=(0.3, 1.0),
        unit="1",
        meaning="A training step's flash attention over the kernel paper's best (SUSTAINED).",
    )
    score_products: float = fitted(
        0.479,
        (0.469, 0.488),
        start=0.5,
        within=(0.2, 1.0),
        unit="1",
        meaning="The batched products of unfused attention over what large products sustain.",
    )
    score_bytes: float = fitted(
        7.87,
        (7.72, 8.21),
        start=8.0,
        within=(2.0, 20.0),
        unit="bytes",
        meaning="Read and written of each 16-bit score by a fused masked softmax, forward.",
    )
    memory: float = fitted(
        0.769,
        (0.742, 0.811),
        start=0.8,
        within=(0.6, 0.92),
        unit="1",
        meaning="Part of the datasheet's memory bandwidth that element-wise kernels reach.",
    )
    logit_bytes: float = fitted(
        31.8,
        (31.2, 32.6),
        start=32.0,
        within=(8.0, 120.0),
        unit="bytes",
        meaning="Read and written of each logit, forward and backward: casts to fp32, log-softmax, its gradient.",
    )
    layer_launch_s: float = fitted(
        0.000636,
        (0.000502, 0.000639),
        start=0.0005,
        within=(0.0001, 0.003),
        unit="s",
        meaning="In which the host issues one layer's forward pass, and half a backward pass: a floor under small layers.",
    )
    nvlink: float = fitted(
        0.721,
        (0.695, 0.756),
        start=0.75,
        within=(0.6, 0.85),
        unit="1",
        meaning="Bus bandwidth of collectives over the link's rate, inside a node.",
    )
    collective_s: float = fitted(
        5.2e-05,
        (5.09e-05, 5.2e-05),
        start=0.00005,
        within=(0.00003, 0.0001),
        unit="s",
        meaning="That a blocking collective inside a node takes beyond its bytes: launch, synchronisation, skew.",
    )
    network: float = fitted(
        0.819,
        (0.802, 0.844),
        start=0.85,
        within=(0.5, 0.95),
        unit="1",
        meaning="Bus bandwidth over line rate, between nodes.",
    )
    bucket_bytes: float = fitted(
        6.32e07,
        (6.29e07, 6.66e07),
        start=6.7e07,
        within=(1e07, 1e09),
        unit="bytes",
        meaning="One data-parallel message of the stacks that published, at ZeRO 0 and 1: each walks the whole ring, so large "
        "groups pay latency.",
    )
    hidden: float = fitted(
        0.488,
        (0.484, 0.493),
        start=0.5,
        within=(0.02, 0.95),
        unit="1",
        meaning="Part of the gradient and parameter traffic of ZeRO 0 and 1 that backward hides.",
    )
    hidden_sharded: float = fitted(
        0.649,
        (0.638, 0.691),
        start=0.7,
        within=(0.3, 0.98),
        unit="1",
        meaning="The same of FSDP's gathers and scatters, as long as compute is longer.",
    )
    transfer: float = fitted(
        0.474,
        (0.468, 0.493),
        start=0.5,
        within=(0.1, 1.0),
        unit="1",
        meaning="Part of the stage-to-stage traffic that no compute hides.",
    )
    step_s: float = fitted(
        0.00998,
        (0.00996, 0.01),
        start=0.01,
        within=(0.001, 0.05),
        unit="s",
        meaning="Of every step outside the model: data, loss read-out, optimizer launch.",
    )

    # Kernels
    math_passes: float = assumed(
        3.0,
        (2.0, 4.0),
        unit="1",
        meaning="Traffic of a softmax written in torch (scale, mask, softmax, dropout apart) over a fused one's.",
        source="four kernels that each read and write the scores, two of them in place",
    )
    flash_backward: float = assumed(
        2.5,
        (2.0, 3.0),
        unit="1",
        meaning="Backward over forward of flash attention: it computes the scores again.",
        source="arXiv:2307.08691, section 3: five products against two; less what its backward kernel is slower",
    )
    flash_half_length: float = assumed(
        200,
        (100, 500),
        unit="tokens",
        meaning="Sequence length at which flash attention has half of its rate at long ones.",
        source="arXiv:2407.08608, figure 5: FlashAttention-2 at head size 128 reaches 309, 350, 362, 368, 370 TFLOP/s on H100 at "
        "512 to 8k tokens; about twice that under a causal mask, whose diagonal blocks are half empty",
    )
    flash_half_head: float = assumed(
        16,
        (8, 40),
        unit="elements",
        meaning="Size of a head at which flash attention has half of its rate at wide ones.",
        source="arXiv:2307.08691, figure 4: heads of 64 reach nine tenths of heads of 128 on A100",
    )
    flash_own: float = assumed(
        0.8,
        (0.6, 0.95),
        unit="1",
        meaning="The project's own attention (torch's flash kernel, version 2) over the kernel paper's best (SUSTAINED).",
        source="a kernel alone on hot caches against one in a step; stacks that published run versions 1 and 2, see flash",
    )
    misaligned_head: float = assumed(
        0.35,
        (0.25, 0.8),
        unit="1",
        meaning="Rate of attention's products where a head's size is no multiple of 8, over one where it is.",
        source="BLOOM's trials: heads of 108 ran a third slower than with 96 or 144 (tr11-176B-ml, chronicles-prequel.md)",
    )
    unfused_launches: float = assumed(
        1.5,
        (1.2, 2.0),
        unit="1",
        meaning="Launch floor of a layer whose norms are separate kernels over one with fused norms.",
        source="14 kernels more beside 28 (counted in LLaMA's RMS norm)",
    )

    compiled_traffic: float = assumed(
        0.6,
        (0.4, 0.9),
        unit="1",
        meaning="Element-wise traffic of a compiled block over one of separate kernels with fused norms; norms are fused anyway.",
        source="torchtitan, docs/performance.md, table 1: Llama 3.1 8B on 8 x H100, 5,762 to 6,667 tokens/s",
    )
    compiled_launches: float = assumed(
        0.5,
        (0.3, 1.0),
        unit="1",
        meaning="Launch floor of a compiled block over one of separate kernels.",
        source="nanoGPT, README.md: GPT-2 124M on 8 x A100, 250 to 135 ms a step",
    )

    # Links
    nvlink_hop_s: float = assumed(
        2e-6,
        (1e-6, 4e-6),
        unit="s",
        meaning="One step of a ring over NVLink.",
        source="nccl-tests on A100, simple protocol",
    )
    pcie: float = assumed(
        0.5,
        (0.3, 0.8),
        unit="1",
        meaning="Bus bandwidth of collectives over the link's rate, inside a node without NVLink.",
        source="12 to 20 of 31.5 GB/s by nccl-tests where rings cross PCIe switches and sockets; NVLink's part is no guide",
    )
    pcie_hop_s: float = assumed(
        4e-6, (2e-6, 8e-6), unit="s", meaning="One step of a ring over PCIe.", source="nccl-tests on A100 PCIe"
    )
    network_hop_s: float = assumed(
        8e-6,
        (5e-6, 20e-6),
        unit="s",
        meaning="One step of a ring between nodes.",
        source="nccl-tests on A100, HDR InfiniBand",
    )
    transfer_s: float = assumed(
        30e-6,
        (10e-6, 100e-6),
        unit="s",
        meaning="One message between pipeline stages, beside its bytes.",
        source="two kernel launches and a synchronisation of NCCL's send and receive",
    )

    # Schedules
    split_s: float = assumed(
        0.01,
        (0.0, 0.04),
        unit="1",
        meaning="Part of a rank's busy time that it takes longer where backward is split in two passes over the graph.",
        source="zbv at 8 stages on 8 x H800: 16 % over 1F1B was measured, a third of the bubble alone gives 17 % "
        "(sail-sg/zero-bubble-pipeline-parallelism, issue 21)",
    )

    # Offload
    host_link: float = assumed(
        0.75,
        (0.6, 0.85),
        unit="1",
        meaning="Reached of the host link's rate with pinned memory.",
        source="24 of 31.5 GB/s on PCIe 4.0 x16 (nvbandwidth)",
    )
    gpus_per_uplink: float = assumed(
        2,
        (1, 2),
        unit="GPUs",
        meaning="Behind one PCIe switch of an eight-GPU NVLink board, which share its x16 uplink at the same time.",
        source="DGX A100 and DGX H100 system architecture: four switches for eight GPUs",
    )
    offload_hidden: float = assumed(
        0.9,
        (0.5, 1.0),
        unit="1",
        meaning="Part of a phase's compute that copies to and from the host can hide behind.",
        source="no published run; copies have their own engines, and share memory bandwidth with kernels",
    )

    # One CPU core as an accelerator
    cpu_logit_bytes: float = assumed(
        32.0,
        (24.0, 48.0),
        unit="bytes",
        meaning="Read and written of each fp32 logit by the project's own loss, forward and backward, on a CPU.",
        source="counted in strategies/engines/token_losses.py",
    )
    cpu_gradient_passes: float = assumed(
        3.0,
        (2.0, 4.0),
        unit="1",
        meaning="Passes over each micro batch's gradients on top of the products' own output: written once more and added up.",
        source="torch's AccumulateGrad on a CPU",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConstants:
    """Constants of the memory model: what tensors the stacks that published hold beyond theory, and what is no tensor at all."""

    score_copies: float = fitted(
        2.73,
        (2.0, 3.5),
        start=2.5,
        within=(2.0, 4.0),
        unit="1",
        meaning="Copies of the [heads, s, s] scores kept for backward by unfused attention: scores, probabilities, dropout's "
        "output.",
    )
    kept_logit_bytes: float = fitted(
        13.8,
        (10, 18),
        start=12.0,
        within=(4.0, 24.0),
        unit="bytes",
        meaning="A logit at the loss: 16-bit logits, fp32 copy, log-softmax, gradient in part.",
    )
    gathered_logit_bytes: float = fitted(
        22.5,
        (12, 26),
        start=12.0,
        within=(4.0, 30.0),
        unit="bytes",
        meaning="The same of logits gathered from the tensor group, where the loss is not vocabulary-parallel.",
    )
    sharded_logit_bytes: float = fitted(
        2,
        (2, 10),
        start=6.0,
        within=(2.0, 12.0),
        unit="bytes",
        meaning="The same in FSDP stacks, whose fused loss writes its gradient in place.",
    )
    unfused_norm_elements: float = fitted(
        7.11,
        (4, 9),
        start=6.0,
        within=(4.0, 9.0),
        unit="elements",
        meaning="Of hidden size, that two unfused RMS norms keep beyond a fused norm's: fp32 copies and products.",
    )
    recompute_layers: float = fitted(
        2.87,
        (1.0, 3.5),
        start=2.0,
        within=(1.0, 4.0),
        unit="layers",
        meaning="Activations and their gradients of one layer while it is computed again, scores apart.",
    )
    recompute_scores: float = fitted(
        9.45,
        (2, 12),
        start=4.0,
        within=(2.0, 12.0),
        unit="1",
        meaning="Copies of the scores of unfused attention while its layer is computed again and goes backward.",
    )
    working_elements: float = fitted(
        9.61,
        (4, 12),
        start=6.0,
        within=(2.0, 12.0),
        unit="elements",
        meaning="Of hidden size, a token, at work in backward outside the saved ones.",
    )
    context_bytes: float = fitted(
        3.35 * GIB,
        (1.5 * GIB, 4 * GIB),
        start=2 * GIB,
        within=(0.5 * GIB, 5 * GIB),
        unit="bytes",
        meaning="CUDA context, libraries' workspaces, NCCL buffers.",
    )
    fragmentation: float = fitted(
        0.0421,
        (0.01, 0.08),
        start=0.04,
        within=(0.01, 0.12),
        unit="1",
        meaning="Reserved over allocated, less one.",
    )
    cpu_fragmentation: float = assumed(
        0.15,
        (0.03, 0.2),
        unit="1",
        meaning="Resident set over live tensors, less one, where malloc is left to its defaults.",
        source="measured on this project's CPU runs; 3 to 5 % with the arenas that workers are started with",
    )
    cpu_process_bytes: float = assumed(
        218 * MIB,
        (200 * MIB, 260 * MIB),
        unit="bytes",
        meaning="Resident after the imports of a CPU worker.",
        source="measured, torch 2.13",
    )


TIME = TimeConstants()
MEMORY = MemoryConstants()

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
