"""The decoder that trains here, as one torch module for all families: OPT, GPT-2/3, MPT, LLaMA, BLOOM, GLM.

A family is a set of switches (`Traits` in architecture.py): norm, positions, activation, biases. On the same weights the
module equals Hugging Face's class of that family (tests/unit/test_models.py); of GLM, which has none there, a transcription of
the published model (tests/unit/test_glm.py).

B micro batch, S sequence, H hidden, A heads, K key/value heads, D head dim, F ffn, V vocabulary. Local shares under tensor
parallel keep the letters: heads are counted from the tensor, never from the configuration.
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
from orchestrator.models.context import Context, packed, prefixed
from orchestrator.models.lora import PLACES, A, B, Lora
from orchestrator.models.norm import make_norm
from strategies.engines.sequence import WHOLE_SEQUENCE
from strategies.tensor.region import WHOLE

SPLIT: dict[str, str] = {
    "embed.tokens.weight": "vocabulary",
    "embed.positions.weight": "sequence",
    "embed.block_positions.weight": "sequence",
    "embed.project.weight": "replicated_partial",  # it widens each rank's part of the looked-up rows
    "embed.norm.*": "replicated",
    # Of an adapter's two products the one at the split side is split; the other rank's gradient is a part of a sum.
    **{
        f"blocks.*.{place}.{leaf}": kind
        for place in ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")
        for leaf, kind in (("weight", "column"), ("bias", "column"), (A, "replicated_partial"), (B, "column"))
    },
    **{
        f"blocks.*.{place}.{leaf}": kind
        for place in ("attention.out", "mlp.down")
        for leaf, kind in (("weight", "row"), ("bias", "replicated"), (A, "row"), (B, "replicated_partial"))
    },
    "blocks.*_norm.*": "replicated",
    "head.norm.*": "replicated",
    "head.project.weight": "replicated",
    "head.output.weight": "vocabulary",
    "head.value.weight": "replicated",
}
"""How tensor parallelism splits each parameter: the model's own knowledge, so that no strategy names a family."""

ATTENTION = ("flash", "fused_softmax", "math")
"""flash: scaled_dot_product_attention, which keeps no [S, S] scores; the others write them out in torch."""


def rotated(x_BASD: Tensor, theta: float, positions_BS: Tensor | None = None) -> Tensor:
    """Rotary positions (arXiv:2104.09864) as LLaMA applies them: dimension d turns together with d + D / 2, by the angle
    position x theta ** (-2 d / D). Angles are computed in fp32, in fp64 for a model in fp64."""
    sequence, head_dim = x_BASD.shape[2:]
    wide = torch.promote_types(x_BASD.dtype, torch.float32)
    exponent_E = torch.arange(0, head_dim, 2, device=x_BASD.device, dtype=wide) / head_dim
    positions = torch.arange(sequence, device=x_BASD.device) if positions_BS is None else positions_BS[:, None]
    angles_SE = positions[..., None].to(wide) * (1.0 / theta**exponent_E)
    cos_SD = torch.cat([angles_SE, angles_SE], -1).cos().to(x_BASD.dtype)
    sin_SD = torch.cat([angles_SE, angles_SE], -1).sin().to(x_BASD.dtype)
    first, second = x_BASD.chunk(2, -1)
    return x_BASD * cos_SD + torch.cat([-second, first], -1) * sin_SD


def alibi_slopes(num_heads: int) -> list[float]:
    """The slope of each head (ALiBi, arXiv:2108.12409, section 3): 2 ** (-8 i / n) for n heads, n a power of two; other
    counts take the slopes of the power below, then every second one of the power above."""

    def of_power(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

    below = 2 ** int(math.log2(num_heads))
    return of_power(below) + of_power(2 * below)[0::2][: num_heads - below]


class Attention(nn.Module):
    """Self-attention, x_BSH -> x_BSH: causal, unless the context says which tokens are seen."""

    def __init__(self, arch: Architecture, kind: str, layer: int) -> None:
        super().__init__()
        self.layer = layer
        hidden, bias = arch.hidden_size, arch.traits.bias
        self.head_dim, self.num_heads, self.kind = arch.head_dim, arch.num_heads, kind
        self.positions, self.theta = arch.traits.positions, arch.rope_theta
        # Apart: on a CPU as fast as one [3H, H] (110 against 111 ms, 1 thread, B1 S512 H768, forward and backward), and a
        # column split keeps whole heads.
        self.q = nn.Linear(hidden, hidden, bias=bias)
        self.k, self.v = (nn.Linear(hidden, arch.kv_size, bias=bias) for _ in range(2))
        self.out = nn.Linear(hidden, hidden, bias=bias)
        self.region, self.sequence = WHOLE, WHOLE_SEQUENCE

    def forward(self, x_BSH: Tensor, context: Context | None = None) -> Tensor:
        columns = self.region.columns(x_BSH, self.q, self.k, self.v)
        batch, sequence, _ = columns[0].shape  # whole, where x_BSH may be split by sequence
        q_BASD, k_BKSD, v_BKSD = (y.view(batch, sequence, -1, self.head_dim).transpose(1, 2) for y in columns)
        if context is not None:
            y_BASD = self._attend(q_BASD, k_BKSD, v_BKSD, context)
        else:
            if self.positions == "rotary":
                places_1S = self.sequence.places(sequence, x_BSH.device)[None]
                q_BASD, k_BKSD = (rotated(x, self.theta, places_1S) for x in (q_BASD, k_BKSD))
            bias = self._alibi_of(q_BASD) if self.positions == "alibi" else None
            y_BASD = self.sequence.attention(q_BASD, k_BKSD, v_BKSD, flash=self.kind == "flash", bias=bias)
        return self.region.row(y_BASD.transpose(1, 2).reshape(batch, sequence, -1), self.out)

    def _attend(self, q_BASD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, context: Context) -> Tensor:
        """Return the attention of rows that are not simply one sample from its first token on, y_BASD."""
        if self.positions == "rotary":
            q_BASD, k_BKSD = (rotated(x, self.theta, context.positions_BS) for x in (q_BASD, k_BKSD))
        if context.cache is not None:
            k_BKSD, v_BKSD = context.cache.extend(self.layer, k_BKSD, v_BKSD)
        if (group := q_BASD.shape[1] // k_BKSD.shape[1]) > 1:  # grouped-query heads (arXiv:2305.13245)
            k_BKSD, v_BKSD = k_BKSD.repeat_interleave(group, 1), v_BKSD.repeat_interleave(group, 1)
        mask = context.seen_B1QS  # true where a key is seen, or what is added to the scores
        if self.positions == "alibi":
            num_keys, sequence = k_BKSD.shape[2], q_BASD.shape[2]
            keys_S = torch.arange(num_keys, device=q_BASD.device)
            bias = self._alibi_of(q_BASD)(keys_S[num_keys - sequence :], keys_S)
            # Of four dimensions, as flash attention on a CPU wants it: of three it writes the scores out.
            mask = bias[None].masked_fill(~mask, float("-inf"))
        if self.kind == "flash":
            return F.scaled_dot_product_attention(q_BASD, k_BKSD, v_BKSD, attn_mask=mask)
        scores = q_BASD @ k_BKSD.transpose(-1, -2) / math.sqrt(self.head_dim)
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ v_BKSD

    def _alibi_of(self, q_BASD: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return what makes, of the places of queries and keys, what ALiBi adds to the scores of this rank's heads, [A, Q, S]:
        slope x (key - query)."""
        heads = q_BASD.shape[1]
        first = self.region.rank * heads
        slopes = alibi_slopes(self.num_heads)[first : first + heads]
        slopes_A = torch.tensor(slopes, device=q_BASD.device, dtype=q_BASD.dtype)

        def bias(queries_Q: Tensor, keys_S: Tensor) -> Tensor:
            return slopes_A[:, None, None] * (keys_S[None, :] - queries_Q[:, None]).to(q_BASD.dtype)

        return bias


class MLP(nn.Module):
    """The feed-forward layer, x_BSH -> x_BSH: two linears around an activation, or a gate beside the first one
    (arXiv:2002.05202)."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        hidden, ffn, bias = arch.hidden_size, arch.ffn_size, arch.traits.bias
        self.activation = ACTIVATIONS[arch.traits.activation]
        self.gate = nn.Linear(hidden, ffn, bias=bias) if arch.traits.gated else None
        self.up, self.down = nn.Linear(hidden, ffn, bias=bias), nn.Linear(ffn, hidden, bias=bias)
        self.region = WHOLE

    def forward(self, x_BSH: Tensor) -> Tensor:
        if self.gate is None:
            (y,) = self.region.columns(x_BSH, self.up)
            return self.region.row(self.activation(y), self.down)
        gate, y = self.region.columns(x_BSH, self.gate, self.up)
        return self.region.row(self.activation(gate) * y, self.down)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "swiglu": F.silu,
    "geglu": F.gelu,
}
"""The function by its name in Traits; of a gated layer, that of the gate."""


class Block(nn.Module):
    """One layer; the norm stands before each half, or behind its residual (OPT-350M, GLM-130B)."""

    def __init__(self, arch: Architecture, kind: str, layer: int) -> None:
        super().__init__()
        self.post_norm = arch.post_norm
        self.residual = math.sqrt(2 * arch.num_layers) if arch.traits.deep_norm else 1.0
        self.attention_norm = make_norm(arch)
        self.attention = Attention(arch, kind, layer)
        self.mlp_norm = make_norm(arch)
        self.mlp = MLP(arch)

    def forward(self, x_BSH: Tensor, *context: Context) -> Tensor:
        if self.post_norm:
            x_BSH = self.attention_norm(torch.add(self.attention(x_BSH, *context), x_BSH, alpha=self.residual))
            y: Tensor = self.mlp_norm(torch.add(self.mlp(x_BSH), x_BSH, alpha=self.residual))
            return y
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH), *context)
        z: Tensor = x_BSH + self.mlp(self.mlp_norm(x_BSH))
        return z


class Embed(nn.Module):
    """input_ids_BS -> x_BSH: tokens, widened where the table is narrower, plus learned positions or a norm where the
    family has them."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        width, learned = arch.embedding_size, arch.traits.positions == "learned"
        self.offset, self.max_position = arch.traits.position_offset, arch.max_position
        self.tokens = nn.Embedding(arch.vocab_size, width)
        self.positions = nn.Embedding(arch.position_rows, arch.hidden_size) if learned else None
        in_blocks = arch.traits.block_positions
        self.block_positions = nn.Embedding(arch.position_rows, arch.hidden_size) if in_blocks else None
        self.project = nn.Linear(width, arch.hidden_size, bias=False) if width != arch.hidden_size else None
        self.norm = make_norm(arch) if arch.traits.embedding_norm else None
        self.region, self.sequence = WHOLE, WHOLE_SEQUENCE
        self.frozen = False
        """Nothing of it is trained, but something behind it is."""

    def forward(self, input_ids_BS: Tensor, context: Context | None = None) -> Tensor:
        sequence = input_ids_BS.shape[1]
        whole = sequence * self.sequence.size
        if self.positions is not None and whole > self.max_position:
            raise ValueError(f"a sequence of {whole} tokens is longer than max_position {self.max_position}")
        x = self.region.rows(self.tokens, input_ids_BS)
        if self.project is not None:
            x = self.project(x)
        if self.positions is not None:
            places = self.sequence.places(sequence, input_ids_BS.device)
            positions = places if context is None else context.positions_BS
            x = x + self.region.rows(self.positions, positions + self.offset)
        if self.block_positions is not None:
            given = None if context is None else context.block_positions_BS
            x = x + self.region.rows(self.block_positions, torch.zeros_like(input_ids_BS) if given is None else given)
        x = self.region.leave(x)
        x = x if self.norm is None else self.norm(x)
        # So that every block runs the same backward pass, the first one too, wherever its adapters are.
        return x.requires_grad_() if self.frozen and torch.is_grad_enabled() else x


class Head(nn.Module):
    """x_BSH -> logits_BSV. A tied output reads the token table where it stands, so that it survives sharding."""

    def __init__(self, arch: Architecture, embed: Embed) -> None:
        super().__init__()
        width = arch.embedding_size
        self.norm = make_norm(arch) if arch.final_norm else None
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


class ValueHead(nn.Module):
    """x_BSH -> values_BS, one number a token: the reward of the text up to it, or what a critic expects of it."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        width = arch.embedding_size
        self.norm = make_norm(arch) if arch.final_norm else None
        self.project = nn.Linear(arch.hidden_size, width, bias=False) if width != arch.hidden_size else None
        self.value = nn.Linear(width, 1, bias=False)
        self.region = WHOLE

    def forward(self, x_BSH: Tensor) -> Tensor:
        if self.norm is not None:
            x_BSH = self.norm(x_BSH)
        if self.project is not None:
            x_BSH = self.project(x_BSH)
        values_BS: Tensor = self.value(x_BSH).sum(-1)  # of one: a tensor of its own, since FSDP2 warns of a view
        return self.region.whole(values_BS)


class Decoder(nn.Module):
    """A whole model, input_ids_BS -> logits_BSV, or with `values` -> values_BS. Raises ValueError for what is not
    built."""

    split = SPLIT

    def __init__(
        self, arch: Architecture, *, attention: str = "flash", values: bool = False, lora: Lora | None = None
    ) -> None:
        super().__init__()
        if arch.dropout:
            raise ValueError(f"dropout {arch.dropout} is not built; set model.dropout to 0")
        if attention not in ATTENTION:
            raise ValueError(f"attention {attention!r} is not known: choose one of {', '.join(ATTENTION)}")
        self.embed = Embed(arch)
        self.blocks = nn.ModuleList(Block(arch, attention, layer) for layer in range(arch.num_layers))
        self.head = ValueHead(arch) if values else Head(arch, self.embed)
        self.hidden_size, self.arch = arch.hidden_size, arch
        self.divides = {"num_heads": arch.num_heads, "num_kv_heads": arch.num_kv_heads}
        """Counts that tensor_parallel_degree must divide: a head is never split."""
        self.shared = ("embed.tokens.weight",) if arch.tied_embeddings and not values else ()
        """Parameters of the embedding that the head uses too."""
        if lora is not None:
            self._adapt(lora)

    def _adapt(self, lora: Lora) -> None:
        """Freezes what is there, except a value head, and gives the blocks their adapters."""
        self.requires_grad_(False)
        if isinstance(self.head, ValueHead):
            self.head.value.requires_grad_(True)
        self.embed.frozen = True
        for block in self.blocks:
            for target in lora.targets:
                linear: Any = block.get_submodule(PLACES[target])
                if linear is None:
                    raise ValueError(f"{target} is no linear layer of family {self.arch.family}")
                linear.register_parameter(A, nn.Parameter(torch.empty(lora.rank, linear.in_features)))
                linear.register_parameter(B, nn.Parameter(torch.empty(linear.out_features, lora.rank)))
                linear.lora_scale = lora.scale

    def hugging_face(self) -> tuple[dict[str, Any], Callable[[str], str]]:
        """(configuration, name of a parameter) of the same model there, for engines that split Hugging Face's modules."""
        from orchestrator.models.formats import FORMATS, config_of_architecture

        if self.arch.family != "opt":
            raise ValueError(f"a model of family {self.arch.family} is not split by Hugging Face's modules; opt is")
        return config_of_architecture(self.arch), FORMATS["opt"].key

    def context(
        self,
        *,
        segment_ids_BS: Tensor | None = None,
        prefix_lengths_B: Tensor | None = None,
        positions_B2S: Tensor | None = None,
    ) -> Context:
        """Return what `forward` takes where rows hold several samples, or blanks and what fills them; made once for all
        blocks."""
        if segment_ids_BS is not None:
            return packed(segment_ids_BS)
        assert prefix_lengths_B is not None
        assert positions_B2S is not None
        return prefixed(prefix_lengths_B, positions_B2S)

    def forward(self, input_ids_BS: Tensor, *context: Context) -> Tensor:
        x_BSH = self.embed(input_ids_BS, *context)
        for block in self.blocks:
            x_BSH = block(x_BSH, *context)
        output: Tensor = self.head(x_BSH)
        return output


def initial_weights(arch: Architecture, seed: int) -> Callable[[str, torch.Size], Tensor]:
    """(name, shape) -> that parameter's first value in fp64, a function of seed and name alone.

    Normal, of the family's standard deviation, the projections back into the residual stream divided by sqrt(2 L), biases 0,
    norms 1: GPT-2, section 2.3; OPT, section 2.2. Adapters begin as peft's do: A uniform within 1 / sqrt(inputs), B zero. With
    DeepNorm the matrices of a block are Xavier's, of standard deviation
    sqrt(2 / (inputs + outputs)), those of values, attention's output and the feed-forward divided by sqrt(2 L): GLM-130B,
    section 2.1. A parameter at a time, so that a sharded model never exists whole."""
    residual = 1 / math.sqrt(2 * arch.num_layers)

    def deviation(name: str, shape: torch.Size) -> float:
        if arch.traits.deep_norm and name.startswith("blocks."):
            return math.sqrt(2 / sum(shape)) * (1.0 if name.endswith(("q.weight", "k.weight")) else residual)
        into_stream = name.endswith(("attention.out.weight", "mlp.down.weight"))
        return arch.traits.initial_deviation * (residual if into_stream else 1.0)

    def value(name: str, shape: torch.Size) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=torch.float64)
        if name.endswith(("bias", B)):
            return torch.zeros(shape, dtype=torch.float64)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        if name.endswith(A):
            bound = 1 / math.sqrt(shape[1])
            return torch.rand(shape, generator=generator, dtype=torch.float32).mul_(2).sub_(1).mul_(bound).double()
        return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(deviation(name, shape)).double()

    return value


def initialize(module: nn.Module, arch: Architecture, seed: int) -> None:
    """Fills a whole module in place with its first weights."""
    value = initial_weights(arch, seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(value(name, parameter.shape))
