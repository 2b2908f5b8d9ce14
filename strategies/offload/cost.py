"""Offload to the host, priced: what leaves the GPU, what the host holds, what crosses the link each step.

Source: ZeRO-Offload, arXiv:2101.06840; ZeRO-Infinity, arXiv:2104.07857. No published A100 run with its whole configuration
was found: these terms have no anchor yet, and the plan's stated error says so."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.strategy import Strategy
from strategies.zero.cost import StateBytes

READS = ("offload",)
PINNED_BYTES = 2 * 64 * 2**20
"""Two staging buffers a rank."""


@dataclass(frozen=True, slots=True)
class Offloaded:
    """Of one rank: bytes that leave the GPU, and where to; bytes a step over the host link, each way."""

    gpu: StateBytes
    host_bytes: float
    nvme_bytes: float
    link_bytes: float
    optimizer_bytes_on_host: float
    """States that the host's own AdamW steps."""


def offloaded(states: StateBytes, strategy: Strategy, *, num_owned_parameters: float, element: int) -> Offloaded:
    """Optimizer states and master weights, and parameters, by the strategy's offload."""
    choice = strategy.offload
    if not choice.any:
        return Offloaded(states, 0.0, 0.0, 0.0, 0.0)
    away = choice.optimizer_fraction if choice.optimizer != "none" else 0.0
    optimizer = away * (states.master_weights + states.optimizer_states)
    parameters = states.parameters if choice.parameters != "none" else 0.0
    host = (optimizer if choice.optimizer == "host" else 0.0) + (parameters if choice.parameters == "host" else 0.0)
    nvme = (optimizer if choice.optimizer == "nvme" else 0.0) + (parameters if choice.parameters == "nvme" else 0.0)
    link = away * num_owned_parameters * 2 * element
    if choice.parameters != "none":
        link += 2 * parameters * strategy.gradient_accumulation_steps
    gpu = StateBytes(
        states.parameters - parameters,
        states.gradients,
        states.master_weights * (1 - away),
        states.optimizer_states * (1 - away),
    )
    return Offloaded(gpu, host + PINNED_BYTES, nvme, link, optimizer)
