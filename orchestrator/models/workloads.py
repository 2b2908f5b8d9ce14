"""Architecture -> Workload, for all families."""

from __future__ import annotations

from functools import lru_cache

from orchestrator.models.architecture import (
    Architecture,
    block_parameters,
    embedding_parameters,
    head_parameters,
    norm_parameters,
)
from strategies.workload import Matmul, Workload


@lru_cache(maxsize=256)
def workload(arch: Architecture) -> Workload:
    """What the strategies' cost doors see of an architecture."""
    hidden, ffn, kv = arch.hidden_size, arch.ffn_size, arch.kv_size
    gated = arch.traits.gated
    ups = ("gate", "up") if gated else ("up",)
    matmuls = (
        Matmul(name="q", inputs=hidden, outputs=hidden, split="column"),
        Matmul(name="k", inputs=hidden, outputs=kv, split="column"),
        Matmul(name="v", inputs=hidden, outputs=kv, split="column"),
        Matmul(name="out", inputs=hidden, outputs=hidden, split="row"),
        *(Matmul(name=name, inputs=hidden, outputs=ffn, split="column") for name in ups),
        Matmul(name="down", inputs=ffn, outputs=hidden, split="row"),
    )
    # Saved: both norms' inputs and outputs, q k v, the attention's output; then what the MLP's backward needs.
    mlp = {"relu": ffn, "gelu": 2 * ffn, "swiglu": 4 * ffn, "geglu": 4 * ffn}[arch.traits.activation]
    attention = 2 * hidden + hidden + 2 * kv + hidden
    saved = attention + 2 * hidden + mlp
    products = hidden + hidden + 2 * kv + 2 * hidden + len(ups) * ffn + hidden
    row_biases = 2 * hidden if arch.traits.bias else 0
    return Workload(
        num_layers=arch.num_layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=arch.num_heads,
        head_dim=arch.head_dim,
        kv_size=kv,
        vocab_size=arch.vocab_size,
        embedding_size=arch.embedding_size,
        tied_embeddings=arch.tied_embeddings,
        block_parameters=block_parameters(arch),
        block_replicated_parameters=2 * norm_parameters(arch) + row_biases,
        embedding_parameters=embedding_parameters(arch),
        head_parameters=head_parameters(arch),
        matmuls=matmuls,
        saved_elements=saved,
        saved_elements_selective=min(saved, products),
        # Two norms (read, write), two residual additions (two reads, one write), the activation (read, write).
        elementwise_elements=4 * hidden + 6 * hidden + (3 if gated else 2) * ffn,
        num_kernels=14 + (3 if gated else 0) + (4 if arch.traits.positions == "rotary" else 0),
    )
