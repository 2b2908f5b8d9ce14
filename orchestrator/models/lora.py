"""LoRA (arXiv:2106.09685): low-rank adapters beside a block's linear layers, which are frozen with all the rest. Pure.

A linear of weight W [outputs, inputs] becomes x W^T + (alpha / rank) x A^T B^T, with A [rank, inputs] drawn and B
[outputs, rank] zero at first. Only A and B are trained, and of a reward model its value head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from orchestrator.models.architecture import Architecture

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = get_args(Target)
"""The linear layers of a block by the names that LLaMA's have in transformers and peft, whatever the family calls them."""
PLACES: dict[Target, str] = {
    "q_proj": "attention.q",
    "k_proj": "attention.k",
    "v_proj": "attention.v",
    "o_proj": "attention.out",
    "gate_proj": "mlp.gate",
    "up_proj": "mlp.up",
    "down_proj": "mlp.down",
}
"""The linear layer's place in a block of our module."""
ROW_PARALLEL: tuple[Target, ...] = ("o_proj", "down_proj")
"""Layers whose inputs tensor parallelism splits; of the others it splits the outputs."""
A, B = "lora_a", "lora_b"
"""Names of an adapter's parameters beside the weight of its linear layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """The adapters of a model."""

    rank: int
    alpha: float
    targets: tuple[Target, ...]
    """In the order of TARGETS, each once."""

    @property
    def scale(self) -> float:
        """Return what an adapter's product is multiplied by."""
        return self.alpha / self.rank


class Sizes(NamedTuple):
    """The size of one linear layer."""

    inputs: int
    outputs: int


def sizes(arch: Architecture) -> dict[Target, Sizes]:
    """Return the linear layers that a block of an architecture has, in the module's order."""
    hidden, ffn, kv = arch.hidden_size, arch.ffn_size, arch.kv_size
    every: dict[Target, Sizes] = {
        "q_proj": Sizes(hidden, hidden),
        "k_proj": Sizes(hidden, kv),
        "v_proj": Sizes(hidden, kv),
        "o_proj": Sizes(hidden, hidden),
        "gate_proj": Sizes(hidden, ffn),
        "up_proj": Sizes(hidden, ffn),
        "down_proj": Sizes(ffn, hidden),
    }
    if not arch.traits.gated:
        del every["gate_proj"]
    return every


def num_adapter_parameters(arch: Architecture, lora: Lora) -> int:
    """Return the parameters of all adapters together."""
    known = sizes(arch)
    return arch.num_layers * sum(lora.rank * sum(known[target]) for target in lora.targets)


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its name in the module, is an adapter's."""
    return name.endswith((f".{A}", f".{B}"))
