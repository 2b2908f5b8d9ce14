"""Architecture -> Workload, for all families."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from orchestrator.models.architecture import (
    Architecture,
    Family,
    block_parameters,
    embedding_parameters,
    norm_parameters,
)
from orchestrator.models.lora import ROW_PARALLEL, Lora, sizes
from strategies.workload import Matmul, Split, Tensor, Workload

PUBLISHED: tuple[Family, ...] = ("gpt", "mpt", "llama", "bloom", "glm")
"""Families that other stacks published measurements of, which may be priced as those stacks hold them."""
PACKED = ("sft", "reward", "dpo")
"""Tasks whose rows hold several samples, which do not see each other."""


@lru_cache(maxsize=512)
def workload(
    arch: Architecture,
    lora: Lora | None = None,
    *,
    task: str = "pretrain",
    native: bool = True,
    eight_bit: bool = False,
) -> Workload:
    """Return what the strategies' cost doors see of an architecture that is trained for a task, all of it or its adapters alone.

    Args:
        native: price it as this project's own module holds it, which benchmarks.trace checks; otherwise as the stacks that
            published measurements of its family.
        eight_bit: the optimizer's moments take 8 bits.
    """
    whole = replace(_whole(arch, task, native), eight_bit=eight_bit)
    return whole if lora is None else _adapted(whole, arch, lora)


def _adapted(work: Workload, arch: Architecture, lora: Lora) -> Workload:
    """Return the workload of a frozen model with adapters.

    A frozen product keeps no input for a gradient of its weights: the norms' outputs go unless an adapter reads them, and so do
    the inputs of the feed-forward's last product, but of ReLU, which keeps its output for itself."""
    hidden, ffn, known, rank = arch.hidden_size, arch.ffn_size, sizes(arch), lora.rank
    tensors, matmuls = _adapters(arch, lora)
    read = [
        any(t in lora.targets for t in group) for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    ]
    rows = [target for target in lora.targets if target in ROW_PARALLEL]
    columns = sum(known[target].outputs for target in lora.targets if target not in ROW_PARALLEL)
    lets_go = (0 if arch.post_norm else 2 - sum(read)) * hidden
    lets_go_split = ffn if arch.traits.activation != "relu" and "down_proj" not in lora.targets else 0
    replicated = sum(tensor.num_elements for tensor in tensors if tensor.split == "replicated_partial")
    total = sum(tensor.num_elements for tensor in tensors)
    head = work.head_tensors[-1:] if work.num_outputs == 1 else ()  # a value head is trained beside the adapters
    trained = replace(
        work,
        block_parameters=total,
        block_replicated_parameters=replicated,
        embedding_parameters=0,
        head_parameters=sum(tensor.num_elements for tensor in head),
        position_rows=0,
        embedding_tensors=(),
        block_tensors=tuple(tensors),
        head_tensors=head,
        tied_embeddings=False,
        matmuls=tuple(matmuls),
    )
    return replace(
        work,
        trained=trained,
        trained_columns=sum(read),
        adapter_elements=rank * len(lora.targets),
        adapter_rows=len(rows),
        block_parameters=work.block_parameters + total,
        block_replicated_parameters=work.block_replicated_parameters + replicated,
        block_tensors=work.block_tensors + tuple(tensors),
        saved_whole_elements=work.saved_whole_elements - lets_go,
        saved_split_elements=work.saved_split_elements - lets_go_split,
        selective_whole_elements=work.selective_whole_elements + hidden * len(rows),
        selective_split_elements=work.selective_split_elements + columns,
        num_kernels=work.num_kernels + 4 * len(lora.targets),
    )


def _adapters(arch: Architecture, lora: Lora) -> tuple[list[Tensor], list[Matmul]]:
    """Return the adapters' parameters in a block and their products."""
    known, rank = sizes(arch), lora.rank
    tensors: list[Tensor] = []
    matmuls: list[Matmul] = []
    for group in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        mine = [target for target in lora.targets if target in group]
        if not mine:
            continue
        is_row = mine[0] in ROW_PARALLEL
        splits: tuple[Split, Split] = ("row", "replicated_partial") if is_row else ("replicated_partial", "column")
        for target in mine:
            tensors += [Tensor(rank, known[target].inputs, splits[0]), Tensor(known[target].outputs, rank, splits[1])]
            matmuls.append(
                Matmul(
                    name=f"{target} b",
                    inputs=rank,
                    outputs=known[target].outputs,
                    split="whole" if is_row else "column",
                )
            )
        first = "row" if is_row else "whole"
        matmuls.append(Matmul(name="a", inputs=known[mine[0]].inputs, outputs=rank * len(mine), split=first))
    return tensors, matmuls


def _whole(arch: Architecture, task: str, native: bool) -> Workload:
    """Return the workload of an architecture of which everything is trained."""
    hidden, ffn, kv, traits = arch.hidden_size, arch.ffn_size, arch.kv_size, arch.traits
    num_up = 2 if traits.gated else 1
    values = task == "reward"
    head = _value_head_tensors(arch) if values else _head_tensors(arch)
    # The module hands every query head keys and values of its own.
    attended = hidden if native and arch.num_kv_heads < arch.num_heads else kv
    turned = hidden + attended if traits.positions == "rotary" else 2 * attended if attended > kv else 0
    alibi = traits.positions == "alibi"
    # Saved of the feed-forward: ReLU its output; GeLU its input and output; a gate both projections, the activation of one
    # and the product.
    saved_ffn = {"relu": 1, "gelu": 2, "gelu_tanh": 2, "swiglu": 4, "geglu": 4}[traits.activation]
    # Read and written: ReLU and GeLU 2 f; a gate 5 f (activation 2, product 3); transposes of q, k, v and the output 4 h,
    # rotary q and k 3 h more.
    rotary = 3 * hidden if traits.positions == "rotary" else 0
    return Workload(
        num_layers=arch.num_layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=arch.num_heads,
        head_dim=arch.head_dim,
        kv_size=kv,
        vocab_size=arch.vocab_size,
        embedding_size=arch.embedding_size,
        tied_embeddings=arch.tied_embeddings and not values,
        block_parameters=block_parameters(arch),
        block_replicated_parameters=2 * norm_parameters(arch) + (2 * hidden if traits.bias else 0),
        embedding_parameters=embedding_parameters(arch),
        position_rows=arch.num_position_tables * arch.position_rows,
        head_parameters=sum(tensor.num_elements for tensor in head),
        embedding_tensors=_embedding_tensors(arch),
        block_tensors=_block_tensors(arch),
        head_tensors=head,
        post_norm=arch.post_norm,
        matmuls=(
            Matmul(name="qkv", inputs=hidden, outputs=hidden + 2 * kv, split="column"),
            Matmul(name="out", inputs=hidden, outputs=hidden, split="row"),
            Matmul(name="up", inputs=hidden, outputs=ffn, split="column", count=num_up),
            Matmul(name="down", inputs=ffn, outputs=hidden, split="row"),
        ),
        saved_whole_elements=4 * hidden,
        saved_split_elements=2 * hidden + 2 * attended + saved_ffn * ffn,
        selective_whole_elements=3 * hidden,
        selective_split_elements=2 * hidden + 2 * kv + num_up * ffn,
        traffic_whole_elements=2 * 2 * hidden + 2 * 3 * hidden,
        unfused_norm_elements=32 * hidden if traits.norm == "rms" and not native else 0,
        traffic_split_elements=(5 if traits.gated else 2) * ffn + 4 * hidden + rotary,
        num_kernels=14 + (3 if traits.gated else 0) + (4 if traits.positions == "rotary" else 0),
        recomputed_split_elements=turned + (2 * ffn if traits.gated else 0),
        attention_bias=arch.family == "bloom" and not native,
        native=native,
        num_outputs=1 if values else arch.vocab_size,
        bias_heads=arch.num_heads if native and alibi else 0,
        own_masks=native and (traits.blank_filling or task in PACKED),
        rotation_elements=4 * arch.head_dim if native and traits.positions == "rotary" else 0,
        embedding_saved_elements=hidden if native and traits.embedding_norm else 0,
    )


def _norm(arch: Architecture) -> tuple[Tensor, ...]:
    return (Tensor(arch.hidden_size, 1, "replicated"),) * (2 if arch.traits.norm_bias else 1)


def _block_tensors(arch: Architecture) -> tuple[Tensor, ...]:
    """Norm, q, k, v, out, norm, up, down, each weight before its bias."""
    hidden, ffn, kv, bias = arch.hidden_size, arch.ffn_size, arch.kv_size, arch.traits.bias

    def column(rows: int) -> tuple[Tensor, ...]:
        return Tensor(rows, hidden, "column"), *(Tensor(rows, 1, "column"),) * bias

    def row(inputs: int) -> tuple[Tensor, ...]:
        return Tensor(hidden, inputs, "row"), *(Tensor(hidden, 1, "replicated"),) * bias

    up = column(ffn) * (2 if arch.traits.gated else 1)
    return (*_norm(arch), *column(hidden), *column(kv) * 2, *row(hidden), *_norm(arch), *up, *row(ffn))


def _embedding_tensors(arch: Architecture) -> tuple[Tensor, ...]:
    tensors = [Tensor(arch.vocab_size, arch.embedding_size, "vocabulary")]
    tensors += [Tensor(arch.position_rows, arch.hidden_size, "sequence")] * arch.num_position_tables
    if arch.word_embedding_size is not None:  # it widens each rank's part of the looked-up rows
        tensors.append(Tensor(arch.hidden_size, arch.word_embedding_size, "replicated_partial"))
    return (*tensors, *(_norm(arch) if arch.traits.embedding_norm else ()))


def _value_head_tensors(arch: Architecture) -> tuple[Tensor, ...]:
    """Return the parameters of a value head: the norm and the projection of the other head, and one row."""
    tensors = list(_norm(arch)) if arch.final_norm else []
    if arch.word_embedding_size is not None:
        tensors.append(Tensor(arch.word_embedding_size, arch.hidden_size, "replicated"))
    return (*tensors, Tensor(1, arch.embedding_size, "replicated"))


def _head_tensors(arch: Architecture) -> tuple[Tensor, ...]:
    tensors = list(_norm(arch)) if arch.final_norm else []
    if arch.word_embedding_size is not None:
        tensors.append(Tensor(arch.word_embedding_size, arch.hidden_size, "replicated"))
    if not arch.tied_embeddings:
        tensors.append(Tensor(arch.vocab_size, arch.embedding_size, "vocabulary"))
    return tuple(tensors)
