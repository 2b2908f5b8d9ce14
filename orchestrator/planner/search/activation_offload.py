"""What carrying activations to the host and back adds to a step at least, whatever is recomputed. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orchestrator.planner.problem import Problem
from strategies.offload.cost import HIDDEN, activations_s, exposed_s
from strategies.rank import Share
from strategies.strategy import Strategy


def least_carried_s(problem: Problem, strategies: Mapping[str, Strategy]) -> tuple[float, float]:
    """(seconds that a layer adds to one micro batch, what is computed again among them; seconds that the head may hide of all
    layers'), under the kindest recomputing.

    `strategies`: one micro batch on one tensor group, by what is recomputed, "none" always among them. Of checkpointed and
    plain layers any mix may be best: seconds are piecewise linear in it, so its ends and kinks are tried."""
    tokens, length = strategies["none"].micro_batch_size * problem.sequence_length, problem.sequence_length
    roof, bytes_of = problem.roof, problem.rank_memory
    shape = bytes_of.shape(strategies["none"])
    layer = roof.layer(strategies["none"], shape, tokens, length)
    link = {
        kind: activations_s(bytes_of.micro(each).of(Share(1, int(kind != "none"), False, False)), problem.cluster)
        for kind, each in strategies.items()
    }
    forward_s, backward_s = layer.forward_s, layer.backward_s

    def options() -> Iterator[float]:
        yield exposed_s(link["none"], forward_s=forward_s, backward_s=backward_s)
        if "selective" in link:
            sent = exposed_s(link["selective"], forward_s=forward_s, backward_s=backward_s)
            yield sent + layer.again_selective_s
        if "full" in link:
            less = link["none"] - link["full"]
            kinks = [(link["none"] - 2 * HIDDEN * phase) / less for phase in (forward_s, backward_s)] if less else []
            for mix in (1.0, *kinks):
                if 0 <= mix <= 1:
                    sent = exposed_s(link["none"] - mix * less, forward_s=forward_s, backward_s=backward_s)
                    yield sent + mix * layer.again_full_s

    return min(options()), HIDDEN * roof.head(tokens, shape.split)
