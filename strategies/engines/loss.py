"""The loss of pretraining: cross entropy of the target tokens that count, added up (token_losses.py has its arithmetic)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from strategies.engines.engine import MicroBatch
from strategies.engines.token_losses import IGNORED
from strategies.tensor.region import Region


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Cross entropy of the target tokens that count, in nats (see engine.Loss).

    With z_loss, what is trained adds z_loss x log-partition squared (PaLM, arXiv:2204.02311, section 5); it is not told."""

    z_loss: float = 0.0
    names: ClassVar[tuple[str, ...]] = ("loss",)

    def __call__(self, region: Region, output: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        losses_N, partition_N = region.token_losses(output.flatten(0, 1), _targets(batch).flatten().to(output.device))
        loss = losses_N.sum()
        trained = loss + self.z_loss * partition_N.square().sum() if self.z_loss else loss
        return loss.detach()[None], trained

    def num_targets(self, batch: MicroBatch) -> Tensor:
        return (_targets(batch) != IGNORED).sum()


TOKEN_LOSS = TokenLoss()
"""The loss of pretraining."""


def _targets(batch: MicroBatch) -> Tensor:
    """The target ids, none of which counts in a sequence that only fills up."""
    return batch.target_ids_BS.masked_fill(batch.weight_B[:, None] == 0, IGNORED)
