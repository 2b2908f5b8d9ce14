"""Activation checkpointing, priced: bytes a layer leaves for backward, and seconds of computing the rest again.

Source: arXiv:2205.05198, sections 4 and 5. We depart in the elements, which are the model's own (see Workload), and in
`selective`: it keeps the outputs of products and attention, as apply.py does, not everything but attention's scores."""

from __future__ import annotations

from collections.abc import Mapping

from strategies.constants import MemoryConstants
from strategies.price.roofline import Roofline
from strategies.rank import MicroBatchBytes, PassSeconds, Question, Shape
from strategies.room import Room
from strategies.strategy import Strategy
from strategies.workload import Workload

NORM_BYTES = 16
"""A token's mean and reciprocal deviation of two norms."""


def saved_bytes(
    work: Workload,
    strategy: Strategy,
    constants: MemoryConstants,
    *,
    shape: Shape,
    selective: bool,
    tokens: int,
    sequence_length: int,
    element: int,
) -> float:
    """Return the bytes that one layer leaves for backward, of one micro batch of `tokens`; with everything kept, or
    `selective`."""
    tensor, rows = shape.split, 2 + work.adapter_rows
    if selective:
        whole, split = work.selective_whole_elements, work.selective_split_elements
    else:
        whole, split = work.saved_whole_elements, work.saved_split_elements
        if work.unfused_norm_elements and not strategy.fused_norm and element == 2:
            whole += int(constants.unfused_norm_elements * work.hidden_size)
    if shape.whole_split > 1 and selective and work.native:
        # Row-parallel products are kept as they are made: a part of the whole sum, before it is scattered.
        products = rows * work.hidden_size
        elements = products + (whole - products + split) / tensor
    elif shape.whole_split > 1:
        elements = (whole + split) / tensor
    else:
        elements = whole + split / tensor
    elements += work.adapter_elements
    heads = work.num_heads / tensor
    saved = tokens * elements * element
    if strategy.attention == "flash" and not work.attention_bias:
        # log-sum-exp of each head
        return saved + tokens * (4.0 * heads + (0 if selective else NORM_BYTES))
    if selective:
        copies = 1.0 if work.native else 0.0
    else:
        copies = 2.0 if work.native else constants.score_copies
    scores = score_bytes(work, strategy, split=tensor, tokens=tokens, sequence_length=sequence_length, element=element)
    return saved + copies * scores


def score_bytes(
    work: Workload, strategy: Strategy, *, split: int, tokens: int, sequence_length: int, element: int
) -> float:
    """Return the bytes of one copy of a layer's attention scores; 0 where the kernel never writes them."""
    if strategy.attention == "flash" and not work.attention_bias:
        return 0.0
    return tokens * work.num_heads / split * sequence_length * element


def selective_recomputed_bytes(work: Workload, shape: Shape, *, tokens: int, element: int) -> float:
    """Return the bytes that selective checkpointing holds more of a layer when it has made the rest again: the outputs of two
    norms, the sum between them and the activation are there, the two row-parallel outputs and what the activation was made of
    are gone. A gate, rotated and repeated keys come on top."""
    again = element * work.recomputed_split_elements / shape.split
    if shape.whole_split > 1:
        return tokens * (max(0.0, element * work.hidden_size * (3 / shape.split - 2) + again) + NORM_BYTES)
    return float(tokens * (element * work.hidden_size + again + NORM_BYTES))


def mask_bytes(
    work: Workload, strategy: Strategy, *, split: int, tokens: int, sequence_length: int, element: int
) -> float:
    """Return the bytes that one layer of the project's own module keeps for attention beside queries, keys and values: its mask
    or bias, a number for each query and key, which a flash kernel takes in the scores' dtype; sines and cosines of rotary
    positions. Where all rows have the same positions, one row's serve the micro batch."""
    rows = strategy.micro_batch_size if work.own_masks else 1
    queries = tokens // strategy.micro_batch_size
    held = float(queries * work.rotation_elements)
    if strategy.attention == "flash" and work.takes_masks:
        held += queries * sequence_length * (work.bias_heads / split or 1.0)
    return rows * held * element


def repeats_sums(work: Workload, strategy: Strategy) -> bool:
    """Whether recomputing a layer repeats what its forward pass adds up over a tensor group."""
    kind = strategy.activation_checkpointing
    return kind == "full" or (kind == "selective" and work.native)


def recomputed_flops_per_token(work: Workload, strategy: Strategy, sequence_length: int) -> float:
    """Return the FLOPs a token of computing checkpointed blocks again: what hfu counts and mfu does not. What `selective` makes
    again are no products."""
    if strategy.activation_checkpointing != "full":
        return 0.0
    layers = sum(stage.num_checkpointed_layers for stage in strategy.stages)
    return work.recomputed_flops_per_token(layers, sequence_length)


class Recompute(Room):
    """Layers whose activations are computed again in the backward pass."""

    name = "recompute"
    reads: Mapping[str, tuple[str, ...]] = {
        "micro_batch": ("micro_batch_size", "activation_checkpointing", "attention", "fused_norm"),
        "pass_s": ("micro_batch_size", "activation_checkpointing", "attention", "fused_norm", "compile"),
    }
    apply = ("strategies.recompute.apply:apply",)

    def micro_batch(
        self, question: Question, strategy: Strategy, shape: Shape, micro: MicroBatchBytes
    ) -> MicroBatchBytes:
        work, constants, kind = question.work, question.constants, strategy.activation_checkpointing
        tokens, element, length = shape.tokens(question, strategy), question.element, question.sequence_length

        def saved(selective: bool) -> float:
            sizes = {"tokens": tokens, "sequence_length": length, "element": element}
            return saved_bytes(work, strategy, constants, shape=shape, selective=selective, **sizes)

        masks = mask_bytes(work, strategy, split=shape.split, tokens=tokens, sequence_length=length, element=element)
        layer = kept = saved(False) + masks
        recomputed = wide = 0.0
        # What the first norm and the sum behind attention make.
        between = micro.hidden * (1 if shape.whole_split > 1 else 2)
        if kind == "full":
            kept = micro.residual
            recomputed = layer - kept
            if (
                work.trained is not None
            ):  # an adapter's output and the sum with its linear layer's, when it is made again
                recomputed += 2 * micro.hidden
            wide = micro.hidden * work.ffn_size / work.hidden_size / shape.split + between
            if not work.native:
                scores = score_bytes(
                    work, strategy, split=shape.split, tokens=tokens, sequence_length=length, element=element
                )
                recomputed = constants.recompute_layers * (layer - constants.score_copies * scores)
                recomputed += constants.recompute_scores * scores
        elif kind == "selective":
            kept = saved(True)
            # Beside an adapter, whose products it keeps too, it keeps more than `none`.
            if not (work.native and (shape.whole_split > 1 or work.trained is not None)):
                kept = min(layer, kept)
            recomputed = masks + selective_recomputed_bytes(work, shape, tokens=tokens, element=element)
            wide = between
        if work.bias_heads and strategy.attention == "flash" and kind != "none":
            # A bias is made before a copy of it is masked, while the layer that is made again has nothing else yet.
            made = 2 * masks + 2 * micro.hidden + tokens // strategy.micro_batch_size * length
            recomputed = max(recomputed, made - micro.working)
        return micro._replace(layer=layer, checkpointed=kept, recomputed=recomputed, wide_checkpointed=wide)

    def pass_s(self, roof: Roofline, question: Question, strategy: Strategy, shape: Shape) -> tuple[PassSeconds, ...]:
        kind = strategy.activation_checkpointing
        if kind == "none":
            return ()
        layer = roof.layer(strategy, shape, shape.tokens(question, strategy), question.sequence_length)
        seconds = layer.again_full_s if kind == "full" else layer.again_selective_s
        return (PassSeconds("recompute_s", checkpointed=seconds),)

    def choice_words(self, strategy: Strategy) -> str:
        if strategy.activation_checkpointing == "none":
            return ""
        done = sum(stage.num_checkpointed_layers for stage in strategy.stages)
        layers = sum(stage.num_layers for stage in strategy.stages)
        how_many = "" if done == layers else f" of {done} of {layers} layers"
        return f"{strategy.activation_checkpointing} recompute{how_many}"


ROOM = Recompute()
