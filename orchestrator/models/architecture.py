"""Model families and published sizes: their shapes and exact parameter counts. Pure.

h hidden size, w word embedding size, f feed-forward size, k key/value width, V vocabulary, P positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

Family = Literal["opt", "gpt", "mpt", "llama", "bloom", "glm"]
FAMILIES: tuple[Family, ...] = get_args(Family)
Variant = Literal["10b", "130b"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
"""The published forms of GLM."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """The traits that all models of a family share."""

    activation: Literal["relu", "gelu", "gelu_tanh", "swiglu", "geglu"]
    """GELU exact (MPT) or by its tanh approximation (GPT-2, BLOOM); swiglu and geglu gate a second projection."""
    positions: Literal["learned", "alibi", "rotary"]
    bias: bool
    """Linear layers have a bias."""
    norm: Literal["layer", "rms"] = "layer"
    norm_bias: bool = True
    norm_epsilon: float = 1e-5
    initial_deviation: float = 0.02
    """Standard deviation of the first weights."""
    position_offset: int = 0
    """Rows of the position table before position 0 (OPT: 2, where fairseq kept its padding index)."""
    block_positions: bool = False
    """Positions have a second dimension with a table of its own: the place within a masked span, 0 outside (GLM-10B). Both tables
    have a row more than max_position."""
    embedding_norm: bool = False
    tied_embeddings: bool = True
    """Default of the job file's tied_embeddings, as published."""
    vocab_size: int = 50257
    """Default of the job file's vocab_size, as published."""
    max_position: int = 2048
    post_norm: bool = False
    """A norm after the residual in place of one before the sub-layer."""
    deep_norm: bool = False
    """The residual is multiplied by (2 num_layers) ** 0.5 before it is added and normed (DeepNorm, arXiv:2203.00555)."""
    final_norm: bool = True
    """A norm before the head; a post-norm OPT has none."""
    blank_filling: bool = False
    """Pretraining fills blanks: a row is a text with masked spans, which attention reads in both directions, and the spans, which
    are written token by token (arXiv:2103.10360)."""

    @property
    def gated(self) -> bool:
        """The feed-forward has three matrices: gate, up, down."""
        return self.activation in ("swiglu", "geglu")


# Sources: OPT arXiv:2205.01068 and its Hugging Face configs; GPT-3 arXiv:2005.14165; MPT the config of mosaicml/mpt-7b
# (no_bias, alibi, low_precision_layernorm); LLaMA arXiv:2302.13971; BLOOM arXiv:2211.05100; GLM-130B arXiv:2210.02414
# and its code, which numbers the norms otherwise: its input norm of layer 0 is our embedding norm, its final norm our last
# layer's second one. GLM-10B arXiv:2103.10360 and its code (tables of max_sequence_length + 1 rows).
TRAITS: Mapping[Family, Traits] = {
    "opt": Traits(
        activation="relu",
        positions="learned",
        bias=True,
        position_offset=2,
        vocab_size=50272,
        initial_deviation=0.006,
    ),
    "gpt": Traits(activation="gelu_tanh", positions="learned", bias=True),
    "mpt": Traits(activation="gelu", positions="alibi", bias=False, norm_bias=False, vocab_size=50432),
    "llama": Traits(
        activation="swiglu",
        positions="rotary",
        bias=False,
        norm="rms",
        norm_bias=False,
        norm_epsilon=1e-6,
        tied_embeddings=False,
        vocab_size=32000,
    ),
    "bloom": Traits(activation="gelu_tanh", positions="alibi", bias=True, embedding_norm=True, vocab_size=250880),
    "glm": Traits(
        activation="geglu",
        positions="rotary",
        bias=True,
        embedding_norm=True,
        vocab_size=150528,
        post_norm=True,
        deep_norm=True,
        final_norm=False,
        blank_filling=True,
    ),
}
"""Traits of each family; of GLM those of GLM-130B."""
GLM_10B = Traits(
    activation="gelu_tanh",
    positions="learned",
    bias=True,
    block_positions=True,
    vocab_size=50304,
    max_position=1024,
    blank_filling=True,
)


def traits_of(family: Family, variant: Variant | None) -> Traits:
    """Traits that all models of a family, and of its variant where it has some, share."""
    return GLM_10B if family == "glm" and variant == "10b" else TRAITS[family]


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The shape of a decoder. Fields up to tied_embeddings are the job file's; the rest follow from family and name."""

    family: Family
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    vocab_size: int
    max_position: int
    tied_embeddings: bool
    name: str = ""
    word_embedding_size: int | None = None
    """Width of the embedding where projections lead to hidden_size and back (OPT-350M: 512). None: hidden_size."""
    post_norm: bool = False
    """The norm comes after the residual (OPT-350M and GLM-130B, which then have no final norm)."""
    dropout: float = 0.0
    norm_epsilon: float = 1e-5
    """Added to the variance in every norm."""
    rope_theta: float = 10_000.0
    """Base of the rotary angles; without effect where positions are not rotary."""
    variant: Variant | None = None
    """Form of a GLM: GLM-10B's (two-dimensional learned positions, pre-norm, GELU) or GLM-130B's (rotary positions,
    DeepNorm, GeGLU). None: another family."""

    def __post_init__(self) -> None:
        if self.family not in TRAITS:
            close = get_close_matches(str(self.family), FAMILIES, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"family {self.family!r} is not known: choose one of {', '.join(FAMILIES)}{hint}")
        if self.variant not in (VARIANTS if self.family == "glm" else (None,)):
            forms = f"choose one of {', '.join(VARIANTS)}" if self.family == "glm" else "only family glm has variants"
            raise ValueError(f"variant {self.variant!r} is not one of family {self.family}: {forms}")
        for field in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "ffn_size",
            "vocab_size",
            "max_position",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}: it must be at least 1")
        if self.word_embedding_size is not None and self.word_embedding_size < 1:
            raise ValueError(f"word_embedding_size is {self.word_embedding_size}: it must be at least 1")
        for field, number in (("norm_epsilon", self.norm_epsilon), ("rope_theta", self.rope_theta)):
            if not number > 0.0:
                raise ValueError(f"{field} is {number}: it must be above 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}: it must be at least 0 and below 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide by num_heads {self.num_heads}: "
                f"{_near(self.hidden_size, self.num_heads)} heads would, or hidden_size "
                f"{_ceil_to(self.hidden_size, self.num_heads)}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide by num_kv_heads {self.num_kv_heads}: "
                f"{_near(self.num_heads, self.num_kv_heads)} key/value heads would"
            )
        if self.traits.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"hidden_size / num_heads is {self.head_dim}: {self.family} rotates pairs of them, so it "
                f"must be even; hidden_size {2 * self.num_heads * (self.head_dim // 2 + 1)} would do"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_size(self) -> int:
        """Width of the keys, and of the values."""
        return self.num_kv_heads * self.head_dim

    @property
    def embedding_size(self) -> int:
        """Width of a row of the embedding."""
        return self.hidden_size if self.word_embedding_size is None else self.word_embedding_size

    @property
    def traits(self) -> Traits:
        return traits_of(self.family, self.variant)

    @property
    def final_norm(self) -> bool:
        """A norm before the head."""
        return self.traits.final_norm and not (self.family == "opt" and self.post_norm)

    @property
    def position_rows(self) -> int:
        """Rows of each table of learned positions; 0 without one."""
        traits = self.traits
        if traits.positions != "learned":
            return 0
        return self.max_position + traits.position_offset + traits.block_positions

    @property
    def num_position_tables(self) -> int:
        """Tables of learned positions: 2 where they have two dimensions."""
        return (self.traits.positions == "learned") + self.traits.block_positions


def embedding_parameters(arch: Architecture) -> int:
    """Tokens, learned positions, projection to the hidden size, embedding norm."""
    tokens = arch.vocab_size * arch.embedding_size
    positions = arch.num_position_tables * arch.position_rows * arch.hidden_size
    norm = norm_parameters(arch) if arch.traits.embedding_norm else 0
    return tokens + positions + _projection(arch) + norm


def block_parameters(arch: Architecture) -> int:
    """One layer: two norms, attention, feed-forward."""
    hidden, ffn, kv = arch.hidden_size, arch.ffn_size, arch.kv_size
    num_up = 2 if arch.traits.gated else 1
    weights = hidden * (hidden + 2 * kv) + hidden * hidden + (num_up + 1) * hidden * ffn
    biases = (hidden + 2 * kv) + hidden + num_up * ffn + hidden if arch.traits.bias else 0
    return weights + biases + 2 * norm_parameters(arch)


def head_parameters(arch: Architecture) -> int:
    """Final norm, projection back to the embedding's width, and the output matrix unless it is the embedding's."""
    norm = norm_parameters(arch) if arch.final_norm else 0
    output = 0 if arch.tied_embeddings else arch.vocab_size * arch.embedding_size
    return norm + _projection(arch) + output


def norm_parameters(arch: Architecture) -> int:
    """One norm over the hidden size."""
    return arch.hidden_size * (2 if arch.traits.norm_bias else 1)


def num_parameters(arch: Architecture) -> int:
    """Exact count; tied embeddings count once."""
    return embedding_parameters(arch) + arch.num_layers * block_parameters(arch) + head_parameters(arch)


def make_architecture(
    *,
    family: str,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    ffn_size: int | None = None,
    vocab_size: int | None = None,
    max_position: int | None = None,
    tied_embeddings: bool | None = None,
    name: str = "",
    word_embedding_size: int | None = None,
    post_norm: bool | None = None,
    dropout: float = 0.0,
    norm_epsilon: float | None = None,
    rope_theta: float = 10_000.0,
    variant: str | None = None,
) -> Architecture:
    """An architecture, with what was left out as its family publishes it.

    Raises ValueError that says what does not fit and what would."""
    if family == "glm" and variant is None:
        variant = "130b"
    # Architecture refuses another family, or variant, below, with advice.
    traits = traits_of(family if family in TRAITS else "opt", variant)  # type: ignore[arg-type]
    if word_embedding_size == hidden_size:
        word_embedding_size = None
    return Architecture(
        family=family,  # type: ignore[arg-type]
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        ffn_size=default_ffn_size(traits, hidden_size) if ffn_size is None else ffn_size,
        vocab_size=traits.vocab_size if vocab_size is None else vocab_size,
        max_position=traits.max_position if max_position is None else max_position,
        tied_embeddings=traits.tied_embeddings if tied_embeddings is None else tied_embeddings,
        name=name,
        word_embedding_size=word_embedding_size,
        post_norm=traits.post_norm if post_norm is None else post_norm,
        dropout=dropout,
        norm_epsilon=traits.norm_epsilon if norm_epsilon is None else norm_epsilon,
        rope_theta=rope_theta,
        variant=variant,  # type: ignore[arg-type]
    )


def default_ffn_size(traits: Traits, hidden_size: int) -> int:
    """4h; gated 8h/3, so that three matrices cost what two did, rounded up to a multiple of 256 (LLaMA's code)."""
    return _ceil_to(-(-8 * hidden_size // 3), 256) if traits.gated else 4 * hidden_size


def find_architecture(name: str) -> Architecture:
    """The catalog's entry. ValueError with the nearest known names."""
    if name in CATALOG:
        return CATALOG[name]
    close = get_close_matches(name.lower(), CATALOG, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(f"model {name!r} is not in the catalog: {hint}Known: {', '.join(CATALOG)}")


def _projection(arch: Architecture) -> int:
    return 0 if arch.word_embedding_size is None else arch.word_embedding_size * arch.hidden_size


def _ceil_to(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _near(whole: int, part: int) -> int:
    """The divisor of `whole` nearest to `part`."""
    return min((d for d in range(1, whole + 1) if whole % d == 0), key=lambda d: abs(d - part))


# name: family, layers, hidden size, heads, then what differs from the family's default.
_OPT_350M = {"word_embedding_size": 512, "post_norm": True}
_GPT2 = {"max_position": 1024}
_SIZES: dict[str, tuple[Family, int, int, int, Mapping[str, int | bool | str]]] = {
    # arXiv:2205.01068, table 1
    "opt-125m": ("opt", 12, 768, 12, {}),
    "opt-350m": ("opt", 24, 1024, 16, _OPT_350M),
    "opt-1.3b": ("opt", 24, 2048, 32, {}),
    "opt-2.7b": ("opt", 32, 2560, 32, {}),
    "opt-6.7b": ("opt", 32, 4096, 32, {}),
    "opt-13b": ("opt", 40, 5120, 40, {}),
    "opt-30b": ("opt", 48, 7168, 56, {}),
    "opt-66b": ("opt", 64, 9216, 72, {}),
    "opt-175b": ("opt", 96, 12288, 96, {}),
    "gpt2": ("gpt", 12, 768, 12, _GPT2),
    "gpt2-medium": ("gpt", 24, 1024, 16, _GPT2),
    "gpt2-large": ("gpt", 36, 1280, 20, _GPT2),
    "gpt2-xl": ("gpt", 48, 1600, 25, _GPT2),
    # arXiv:2005.14165, table 2.1, two rows changed to what their own columns allow: 1.3B prints 24 heads of 128 for a
    # width of 2048 (16 here), 13B a width of 5140 for 40 heads of 128 (5120 here).
    "gpt3-125m": ("gpt", 12, 768, 12, {}),
    "gpt3-350m": ("gpt", 24, 1024, 16, {}),
    "gpt3-760m": ("gpt", 24, 1536, 16, {}),
    "gpt3-1.3b": ("gpt", 24, 2048, 16, {}),
    "gpt3-2.7b": ("gpt", 32, 2560, 32, {}),
    "gpt3-6.7b": ("gpt", 32, 4096, 32, {}),
    "gpt3-13b": ("gpt", 40, 5120, 40, {}),
    "gpt3-175b": ("gpt", 96, 12288, 96, {}),
    "mpt-7b": ("mpt", 32, 4096, 32, {}),
    "mpt-30b": ("mpt", 48, 7168, 64, {"max_position": 8192}),
    # arXiv:2302.13971, table 2; 33B is the paper's 32.5B, often called 30B
    "llama-7b": ("llama", 32, 4096, 32, {}),
    "llama-13b": ("llama", 40, 5120, 40, {}),
    "llama-33b": ("llama", 60, 6656, 52, {}),
    "llama-65b": ("llama", 80, 8192, 64, {}),
    # arXiv:2211.05100, table 3
    "bloom-560m": ("bloom", 24, 1024, 16, {}),
    "bloom-1b1": ("bloom", 24, 1536, 16, {}),
    "bloom-1b7": ("bloom", 24, 2048, 16, {}),
    "bloom-3b": ("bloom", 30, 2560, 32, {}),
    "bloom-7b1": ("bloom", 30, 4096, 32, {}),
    "bloom-176b": ("bloom", 70, 14336, 112, {}),
    # arXiv:2103.10360, table 9; arXiv:2210.02414, appendix B
    "glm-10b": ("glm", 48, 4096, 64, {"variant": "10b"}),
    "glm-130b": ("glm", 70, 12288, 96, {}),
}

CATALOG: Mapping[str, Architecture] = {
    name: make_architecture(
        name=name,
        family=family,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        **differs,  # type: ignore[arg-type]
    )
    for name, (family, num_layers, hidden_size, num_heads, differs) in _SIZES.items()
}
