"""How each family stands in a Hugging Face folder: names of parameters, how they are stored, and config.json. Pure tables.

Three ways of storing differ from ours: GPT-2 keeps its linears transposed, [inputs, outputs]; GPT-2, BLOOM and MPT keep
query, key and value as one tensor; BLOOM's is interleaved by head, [A, 3, D, H].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.models.architecture import Architecture, Family

FUSED = ("attention.q", "attention.k", "attention.v")
"""The linears that some families store as one, in this order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One family's folder."""

    model_type: str
    architectures: str
    base: str
    """First word of all names but the head's; folders of the model without its head lack it."""
    layer: str
    """Prefix of a block's names, `{}` for its index."""
    parts: Mapping[str, str]
    """Our name of a module within a block -> theirs."""
    outside: Mapping[str, str]
    """The same outside the blocks."""
    fused: str = ""
    """Name of query, key and value in one, within a block. Empty: they are apart."""
    by_head: bool = False
    """The one tensor is interleaved by head."""
    transposed: bool = False
    """Linears within a block are stored [inputs, outputs]."""
    config: Callable[[Architecture], dict[str, Any]]
    """The shape, in the words of their config.json."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that shapes cannot tell: a folder that says otherwise would load, and compute something else. A key that a folder
    leaves out has this value in transformers, too."""

    def key(self, name: str) -> str:
        """The tensor that holds our parameter. KeyError for a name that the family does not have."""
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
        if block is None:
            return f"{self.outside[stem]}.{kind}"
        part = self.fused if self.fused and block[2] in FUSED else self.parts[block[2]]
        return f"{self.layer.format(block[1])}{part}.{kind}"

    def piece(self, name: str) -> int | None:
        """Return which third of that tensor it is; None: the whole."""
        stem = name.rpartition(".")[0].partition(".")[2].partition(".")[2]
        return FUSED.index(stem) if self.fused and stem in FUSED else None

    def is_transposed(self, name: str) -> bool:
        """True where the tensor is stored [inputs, outputs]."""
        return self.transposed and name.startswith("blocks.") and not name.endswith(("norm.weight", "bias"))


def _opt_config(arch: Architecture) -> dict[str, Any]:
    return {
        "num_hidden_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_heads,
        "ffn_dim": arch.ffn_size,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position,
        "tie_word_embeddings": arch.tied_embeddings,
        "word_embed_proj_dim": arch.embedding_size,
        "do_layer_norm_before": not arch.post_norm,
        "dropout": arch.dropout,
    }


def _gpt2_config(arch: Architecture) -> dict[str, Any]:
    return {
        "n_layer": arch.num_layers,
        "n_embd": arch.hidden_size,
        "n_head": arch.num_heads,
        "n_inner": arch.ffn_size,
        "vocab_size": arch.vocab_size,
        "n_positions": arch.max_position,
        "tie_word_embeddings": arch.tied_embeddings,
        "layer_norm_epsilon": arch.norm_epsilon,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), arch.dropout),
    }


def _mpt_config(arch: Architecture) -> dict[str, Any]:
    return {
        "n_layers": arch.num_layers,
        "d_model": arch.hidden_size,
        "n_heads": arch.num_heads,
        "expansion_ratio": arch.ffn_size // arch.hidden_size,
        "vocab_size": arch.vocab_size,
        "max_seq_len": arch.max_position,
        "tie_word_embeddings": arch.tied_embeddings,
        "layer_norm_epsilon": arch.norm_epsilon,
        **dict.fromkeys(("resid_pdrop", "emb_pdrop"), arch.dropout),
    }


def _llama_config(arch: Architecture) -> dict[str, Any]:
    return {
        "num_hidden_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "intermediate_size": arch.ffn_size,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position,
        "tie_word_embeddings": arch.tied_embeddings,
        "rms_norm_eps": arch.norm_epsilon,
        "rope_theta": arch.rope_theta,
        "attention_dropout": arch.dropout,
    }


def _bloom_config(arch: Architecture) -> dict[str, Any]:
    return {
        "n_layer": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "n_head": arch.num_heads,
        "vocab_size": arch.vocab_size,
        "seq_length": arch.max_position,
        "tie_word_embeddings": arch.tied_embeddings,
        "layer_norm_epsilon": arch.norm_epsilon,
        **dict.fromkeys(("hidden_dropout", "attention_dropout"), arch.dropout),
    }


FORMATS: Mapping[Family, Format] = {
    "opt": Format(
        model_type="opt",
        architectures="OPTForCausalLM",
        base="model.",
        layer="model.decoder.layers.{}.",
        parts={
            "attention.q": "self_attn.q_proj",
            "attention.k": "self_attn.k_proj",
            "attention.v": "self_attn.v_proj",
            "attention.out": "self_attn.out_proj",
            "attention_norm": "self_attn_layer_norm",
            "mlp.up": "fc1",
            "mlp.down": "fc2",
            "mlp_norm": "final_layer_norm",
        },
        outside={
            "embed.tokens": "model.decoder.embed_tokens",
            "embed.positions": "model.decoder.embed_positions",
            "embed.project": "model.decoder.project_in",
            "head.norm": "model.decoder.final_layer_norm",
            "head.project": "model.decoder.project_out",
            "head.output": "lm_head",
        },
        config=_opt_config,
        fixed={
            "activation_function": "relu",
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
        },
    ),
    "gpt": Format(
        model_type="gpt2",
        architectures="GPT2LMHeadModel",
        base="transformer.",
        layer="transformer.h.{}.",
        fused="attn.c_attn",
        transposed=True,
        parts={
            "attention.out": "attn.c_proj",
            "attention_norm": "ln_1",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
            "mlp_norm": "ln_2",
        },
        outside={
            "embed.tokens": "transformer.wte",
            "embed.positions": "transformer.wpe",
            "head.norm": "transformer.ln_f",
            "head.output": "lm_head",
        },
        config=_gpt2_config,
        fixed={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
    "mpt": Format(
        model_type="mpt",
        architectures="MptForCausalLM",
        base="transformer.",
        layer="transformer.blocks.{}.",
        fused="attn.Wqkv",
        parts={
            "attention.out": "attn.out_proj",
            "attention_norm": "norm_1",
            "mlp.up": "ffn.up_proj",
            "mlp.down": "ffn.down_proj",
            "mlp_norm": "norm_2",
        },
        outside={"embed.tokens": "transformer.wte", "head.norm": "transformer.norm_f", "head.output": "lm_head"},
        config=_mpt_config,
        fixed={
            "no_bias": True,
            "attn_config.alibi": True,
            "attn_config.alibi_bias_max": 8,
            "attn_config.attn_type": "multihead_attention",
            "attn_config.clip_qkv": None,
            "attn_config.softmax_scale": None,
            "attn_config.prefix_lm": False,
            "attn_config.qk_ln": False,
            "logit_scale": None,
        },
    ),
    "llama": Format(
        model_type="llama",
        architectures="LlamaForCausalLM",
        base="model.",
        layer="model.layers.{}.",
        parts={
            "attention.q": "self_attn.q_proj",
            "attention.k": "self_attn.k_proj",
            "attention.v": "self_attn.v_proj",
            "attention.out": "self_attn.o_proj",
            "attention_norm": "input_layernorm",
            "mlp.gate": "mlp.gate_proj",
            "mlp.up": "mlp.up_proj",
            "mlp.down": "mlp.down_proj",
            "mlp_norm": "post_attention_layernorm",
        },
        outside={"embed.tokens": "model.embed_tokens", "head.norm": "model.norm", "head.output": "lm_head"},
        config=_llama_config,
        fixed={
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_scaling": None,
            "rope_parameters.rope_type": "default",
            "rope_parameters.partial_rotary_factor": 1.0,
        },
    ),
    "bloom": Format(
        model_type="bloom",
        architectures="BloomForCausalLM",
        base="transformer.",
        layer="transformer.h.{}.",
        fused="self_attention.query_key_value",
        by_head=True,
        parts={
            "attention.out": "self_attention.dense",
            "attention_norm": "input_layernorm",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
            "mlp_norm": "post_attention_layernorm",
        },
        outside={
            "embed.tokens": "transformer.word_embeddings",
            "embed.norm": "transformer.word_embeddings_layernorm",
            "head.norm": "transformer.ln_f",
            "head.output": "lm_head",
        },
        config=_bloom_config,
        fixed={"apply_residual_connection_post_layernorm": False},
    ),
}
"""The words are those of transformers' modeling_*.py and configuration_*.py."""


def format_of(arch: Architecture) -> Format:
    """The format of an architecture's family. ValueError where transformers has no class that computes it."""
    if arch.family not in FORMATS:
        raise ValueError(
            f"transformers has no class that computes family {arch.family}, whose models fill blanks (its GlmForCausalLM is "
            f"GLM-4, another model), so there is no Hugging Face folder of it; these have one: {', '.join(FORMATS)}"
        )
    return FORMATS[arch.family]


def config_of_architecture(arch: Architecture) -> dict[str, Any]:
    """The config.json of an architecture. ValueError where no class of transformers computes its family, or the family's
    cannot have its shape."""
    form = format_of(arch)
    if arch.family in ("mpt", "bloom") and arch.ffn_size != 4 * arch.hidden_size:
        raise ValueError(
            f"{form.architectures} has a feed-forward layer of 4 x {arch.hidden_size}, not of {arch.ffn_size}: this shape "
            "cannot be written as a Hugging Face folder"
        )
    if arch.num_kv_heads != arch.num_heads and arch.family != "llama":
        raise ValueError(
            f"{form.architectures} has as many key/value heads as heads, {arch.num_heads}, not {arch.num_kv_heads}: this "
            "shape cannot be written as a Hugging Face folder"
        )
    fixed = {word: value for word, value in form.fixed.items() if "." not in word and not word.startswith("_")}
    return {"architectures": [form.architectures], "model_type": form.model_type, **fixed, **form.config(arch)}
