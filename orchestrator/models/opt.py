"""OPT as one torch module. Equals Hugging Face's OPTForCausalLM on the same weights (arXiv:2205.01068).

B micro batch, S sequence, H hidden, A heads, D head dim, F ffn, V vocabulary. Local shares under tensor parallel keep
the letters: heads are counted from the tensor, never from the configuration.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.models.architecture import Architecture
from strategies.tensor.region import WHOLE

SPLIT: dict[str, str] = {
    "embed.tokens.weight": "vocabulary",
    "embed.positions.weight": "sequence",
    "embed.project.weight": "replicated_partial",  # it widens each rank's part of the looked-up rows
    "blocks.*.attention.q.*": "column",
    "blocks.*.attention.k.*": "column",
    "blocks.*.attention.v.*": "column",
    "blocks.*.attention.out.weight": "row",
    "blocks.*.attention.out.bias": "replicated",
    "blocks.*.mlp.up.*": "column",
    "blocks.*.mlp.down.weight": "row",
    "blocks.*.mlp.down.bias": "replicated",
    "blocks.*_norm.*": "replicated",
    "head.norm.*": "replicated",
    "head.project.weight": "replicated",
    "head.output.weight": "vocabulary",
}
"""How tensor parallelism splits each parameter: the model's own knowledge, so that no strategy names a family."""

ATTENTION = ("flash", "fused_softmax", "math")
"""flash: scaled_dot_product_attention, which keeps no [S, S] scores; the others write them out in torch."""


class Attention(nn.Module):
    """Causal self-attention, x_BSH -> x_BSH."""

    def __init__(self, arch: Architecture, kind: str) -> None:
        super().__init__()
        hidden = arch.hidden_size
        self.head_dim, self.kind = arch.head_dim, kind
        # Apart: on a CPU as fast as one [3H, H] (110 against 111 ms, 1 thread, B1 S512 H768, forward and backward), and a
        # column split keeps whole heads.
        self.q, self.k, self.v, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.region = WHOLE

    def forward(self, x_BSH: Tensor) -> Tensor:
        columns = self.region.columns(x_BSH, self.q, self.k, self.v)
        batch, sequence, _ = columns[0].shape  # whole, where x_BSH may be split by sequence
        q_BASD, k_BASD, v_BASD = (y.view(batch, sequence, -1, self.head_dim).transpose(1, 2) for y in columns)
        if self.kind == "flash":
            y_BASD = F.scaled_dot_product_attention(q_BASD, k_BASD, v_BASD, is_causal=True)
        else:
            scores = q_BASD @ k_BASD.transpose(-1, -2) / math.sqrt(self.head_dim)
            future = torch.ones(sequence, sequence, dtype=torch.bool, device=x_BSH.device).triu(1)
            y_BASD = scores.masked_fill(future, float("-inf")).softmax(-1) @ v_BASD
        return self.region.row(y_BASD.transpose(1, 2).reshape(batch, sequence, -1), self.out)


class MLP(nn.Module):
    """Two linears around a ReLU, x_BSH -> x_BSH."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(arch.hidden_size, arch.ffn_size), nn.Linear(arch.ffn_size, arch.hidden_size)
        self.region = WHOLE

    def forward(self, x_BSH: Tensor) -> Tensor:
        (y,) = self.region.columns(x_BSH, self.up)
        return self.region.row(F.relu(y), self.down)


class Block(nn.Module):
    """One layer; the norm stands before each half, or behind its residual (OPT-350M)."""

    def __init__(self, arch: Architecture, kind: str) -> None:
        super().__init__()
        self.post_norm = arch.post_norm
        self.attention_norm = nn.LayerNorm(arch.hidden_size)
        self.attention = Attention(arch, kind)
        self.mlp_norm = nn.LayerNorm(arch.hidden_size)
        self.mlp = MLP(arch)

    def forward(self, x_BSH: Tensor) -> Tensor:
        if self.post_norm:
            x_BSH = self.attention_norm(x_BSH + self.attention(x_BSH))
            y: Tensor = self.mlp_norm(x_BSH + self.mlp(x_BSH))
            return y
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH))
        z: Tensor = x_BSH + self.mlp(self.mlp_norm(x_BSH))
        return z


class Embed(nn.Module):
    """input_ids_BS -> x_BSH: tokens, widened where the table is narrower, plus learned positions."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        width = arch.embedding_size
        self.offset, self.max_position = arch.traits.position_offset, arch.max_position
        self.tokens = nn.Embedding(arch.vocab_size, width)
        self.positions = nn.Embedding(arch.max_position + arch.traits.position_offset, arch.hidden_size)
        self.project = nn.Linear(width, arch.hidden_size, bias=False) if width != arch.hidden_size else None
        self.region = WHOLE

    def forward(self, input_ids_BS: Tensor) -> Tensor:
        sequence = input_ids_BS.shape[1]
        if sequence > self.max_position:
            raise ValueError(f"a sequence of {sequence} tokens is longer than max_position {self.max_position}")
        x = self.region.rows(self.tokens, input_ids_BS)
        if self.project is not None:
            x = self.project(x)
        positions_S = torch.arange(sequence, device=input_ids_BS.device) + self.offset
        return self.region.leave(x + self.region.rows(self.positions, positions_S))


class Head(nn.Module):
    """x_BSH -> logits_BSV. A tied output reads the token table where it stands, so that it survives sharding."""

    def __init__(self, arch: Architecture, embed: Embed) -> None:
        super().__init__()
        width = arch.embedding_size
        self.norm = nn.LayerNorm(arch.hidden_size) if arch.final_norm else None
        self.project = nn.Linear(arch.hidden_size, width, bias=False) if width != arch.hidden_size else None
        self.output = None if arch.tied_embeddings else nn.Linear(width, arch.vocab_size, bias=False)
        self._embed = (embed,)  # in a tuple: a reference, not a submodule
        self.region = WHOLE

    def forward(self, x_BSH: Tensor) -> Tensor:
        if self.norm is not None:
            x_BSH = self.norm(x_BSH)
        if self.project is not None:
            x_BSH = self.project(x_BSH)
        weight = self._embed[0].tokens.weight if self.output is None else self.output.weight
        return self.region.logits(x_BSH, weight)


class OPT(nn.Module):
    """input_ids_BS -> logits_BSV."""

    split = SPLIT

    def __init__(self, arch: Architecture, *, attention: str = "flash") -> None:
        super().__init__()
        if arch.family != "opt":
            raise ValueError(f"the torch module of family {arch.family!r} is not built; opt is")
        if arch.dropout:
            raise ValueError(f"dropout {arch.dropout} is not built; set model.dropout to 0")
        if arch.num_kv_heads != arch.num_heads:
            raise ValueError(f"num_kv_heads {arch.num_kv_heads} is not built for opt; set it to {arch.num_heads}")
        if attention not in ATTENTION:
            raise ValueError(f"attention {attention!r} is not known: choose one of {', '.join(ATTENTION)}")
        self.embed = Embed(arch)
        self.blocks = nn.ModuleList(Block(arch, attention) for _ in range(arch.num_layers))
        self.head = Head(arch, self.embed)
        self.hidden_size, self.arch = arch.hidden_size, arch
        self.divides = {"num_heads": arch.num_heads}
        """What tensor_parallel_degree must divide: a head is never split."""
        self.shared = ("embed.tokens.weight",) if arch.tied_embeddings else ()
        """Parameters of the embedding that the head uses too."""

    def hugging_face(self) -> tuple[dict[str, Any], Callable[[str], str]]:
        """(configuration, name of a parameter) of the same model there, for engines that split Hugging Face's modules."""
        from orchestrator.models.weights import config_of_architecture, hugging_face_name

        return config_of_architecture(self.arch), hugging_face_name

    def forward(self, input_ids_BS: Tensor) -> Tensor:
        x_BSH = self.embed(input_ids_BS)
        for block in self.blocks:
            x_BSH = block(x_BSH)
        logits_BSV: Tensor = self.head(x_BSH)
        return logits_BSV


def initial_weights(arch: Architecture, seed: int) -> Callable[[str, torch.Size], Tensor]:
    """(name, shape) -> that parameter's first value in fp64, a function of seed and name alone.

    Normal of standard deviation 0.006, the projections back into the residual stream divided by sqrt(2 L), biases 0,
    norms 1: OPT, section 2.2. A parameter at a time, so that a sharded model never exists whole."""
    residual = 1 / math.sqrt(2 * arch.num_layers)

    def value(name: str, shape: torch.Size) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=torch.float64)
        if name.endswith("bias"):
            return torch.zeros(shape, dtype=torch.float64)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        scale = 0.006 * (residual if name.endswith(("attention.out.weight", "mlp.down.weight")) else 1.0)
        return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(scale).double()

    return value


def initialize(module: nn.Module, arch: Architecture, seed: int) -> None:
    """Fills a whole module in place with its first weights."""
    value = initial_weights(arch, seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(value(name, parameter.shape))
