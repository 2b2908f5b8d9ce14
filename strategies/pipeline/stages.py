"""The cut: which layers each pipeline stage holds, and which pipeline rank holds each stage. Pure."""

from __future__ import annotations

from functools import lru_cache

from strategies.strategy import Stage


@lru_cache(maxsize=4096)
def layer_counts(num_layers: int, num_stages: int, head_layers: float) -> tuple[int, ...]:
    """Layers of each stage in model order.

    `head_layers` is the work of the output projection and the loss in units of one layer. Where the layers divide evenly
    they are cut evenly, as every published stack does. Otherwise the last stage holds what makes the slowest stage
    fastest, the head counted in whole layers, and of the others the first ones hold less, because they keep the most
    micro batches in flight (BLOOM-176B: 70 layers on 12 stages are 5, 6, ..., 6, 5, as it was trained)."""
    if num_layers % num_stages == 0:
        return (num_layers // num_stages,) * num_stages
    others, head = num_stages - 1, int(head_layers + 0.5)
    most = num_layers - others
    last = min(range(1, most + 1), key=lambda n: (max(-(-(num_layers - n) // others), n + head), -n))
    few, num_more = divmod(num_layers - last, others)
    return (few,) * (others - num_more) + (few + 1,) * num_more + (last,)


@lru_cache(maxsize=16384)
def cut(
    num_layers: int,
    pipeline: int,
    virtual: int,
    v_shaped: bool,
    head_layers: float,
    checkpointed: int | None,
) -> tuple[Stage, ...]:
    """The stages in model order.

    Args:
        v_shaped: zbv: a rank's second stage mirrors its first, so that the first and last stage share rank 0.
        checkpointed: layers of each stage that are computed again; None: all of them.
    """
    num_stages = pipeline * virtual
    stages, first = [], 0
    for index, count in enumerate(layer_counts(num_layers, num_stages, head_layers)):
        rank = min(index, num_stages - 1 - index) if v_shaped else index % pipeline
        stages.append(
            Stage(
                stage=index,
                pipeline_rank=rank,
                first_layer=first,
                num_layers=count,
                num_checkpointed_layers=count if checkpointed is None else min(checkpointed, count),
                embedding=index == 0,
                head=index == num_stages - 1,
            )
        )
        first += count
    return tuple(stages)
