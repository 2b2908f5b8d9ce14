"""The losses of PPO's actor and critic, as an engine takes them (engine.Loss): sums over the written tokens of a micro batch.

A micro batch of rollouts has the written tokens as its targets (-100 elsewhere). Rows of text for the pretraining loss are rows
of the same micro batches, told apart by `pretraining_B`.
B micro batch, S sequence, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from orchestrator.training.packing import IGNORED
from orchestrator.training.ppo.estimates import clipped_policy_losses, clipped_value_losses

if TYPE_CHECKING:
    from strategies.engines.engine import MicroBatch
    from strategies.tensor.region import Region


def _targets(batch: MicroBatch, device: torch.device) -> Tensor:
    """The target ids, none of which counts in a row that only fills up."""
    return batch.target_ids_BS.to(device).masked_fill(batch.weight_B.to(device)[:, None] == 0, IGNORED)


def _log_probs(region: Region, logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    losses_N, _ = region.token_losses(logits_BSV.flatten(0, 1), targets_BS.flatten())
    return -losses_N.view(targets_BS.shape)


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The clipped surrogate of the actor (Schulman 2017, equation 7), plus gamma times the cross entropy of pretraining text
    where rows of it are there (PPO-ptx, Ouyang 2022, equation 2).

    Labels: old_log_probs_BS, advantages_BS; pretraining_B, which is 0 for a rollout and else what a token of that row of text
    weighs: gamma x (written tokens of the global batch) / (its tokens of text), for the engine divides by the former."""

    clip_range: float = 0.2
    names: ClassVar[tuple[str, ...]] = ("loss", "clipped", "kl_of_update")

    def __call__(self, region: Region, output: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        targets_BS = _targets(batch, output.device)
        log_probs_BS = _log_probs(region, output, targets_BS)
        labels = {name: value.to(log_probs_BS) for name, value in batch.labels.items()}
        old_BS = labels["old_log_probs_BS"]
        losses_BS, clipped_BS = clipped_policy_losses(log_probs_BS, old_BS, labels["advantages_BS"], self.clip_range)
        written_BS = self._written(targets_BS, batch)
        zero = losses_BS.new_zeros(())
        trained = torch.where(written_BS, losses_BS, zero).sum()
        told = torch.stack(
            [
                trained.detach(),
                (clipped_BS & written_BS).sum().to(trained.dtype),
                torch.where(written_BS, old_BS - log_probs_BS.detach(), zero).sum(),
            ]
        )
        if "pretraining_B" in labels:  # the log-probability of what does not count is 0
            trained = trained - (labels["pretraining_B"][:, None] * log_probs_BS).sum()
        return told, trained

    def num_targets(self, batch: MicroBatch) -> Tensor:
        return self._written(_targets(batch, batch.weight_B.device), batch).sum()

    @staticmethod
    def _written(targets_BS: Tensor, batch: MicroBatch) -> Tensor:
        written_BS = targets_BS != IGNORED
        if "pretraining_B" not in batch.labels:
            return written_BS
        return written_BS & (batch.labels["pretraining_B"].to(targets_BS.device) == 0)[:, None]


@dataclass(frozen=True, slots=True)
class ValueLoss:
    """The clipped squared error of the critic. Labels: old_values_BS, returns_BS."""

    clip_range: float = 0.2
    names: ClassVar[tuple[str, ...]] = ("loss", "clipped")

    def __call__(self, region: Region, output: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        written_BS = _targets(batch, output.device) != IGNORED
        wide_BS = output.to(torch.promote_types(output.dtype, torch.float32))
        labels = {name: value.to(wide_BS) for name, value in batch.labels.items()}
        losses_BS, clipped_BS = clipped_value_losses(
            wide_BS, labels["old_values_BS"], labels["returns_BS"], self.clip_range
        )
        trained = torch.where(written_BS, losses_BS, losses_BS.new_zeros(())).sum()
        return torch.stack([trained.detach(), (clipped_BS & written_BS).sum().to(trained.dtype)]), trained

    def num_targets(self, batch: MicroBatch) -> Tensor:
        return (_targets(batch, batch.weight_B.device) != IGNORED).sum()


@dataclass(frozen=True, slots=True)
class TokenLogProbs:
    """Tells the log-probability of each target of a micro batch, flattened, in nats, 0 where none counts. For Session.scores:
    nothing is trained with it."""

    names: ClassVar[tuple[str, ...]] = ("loss",)

    def __call__(self, region: Region, output: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        told = _log_probs(region, output, _targets(batch, output.device)).flatten()
        return told.detach(), told.sum()

    def num_targets(self, batch: MicroBatch) -> Tensor:
        return (_targets(batch, batch.weight_B.device) != IGNORED).sum()


@dataclass(frozen=True, slots=True)
class TokenValues:
    """Tells the value at each position of a micro batch, flattened. For Session.scores: nothing is trained with it."""

    names: ClassVar[tuple[str, ...]] = ("loss",)

    def __call__(self, region: Region, output: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        told = output.to(torch.promote_types(output.dtype, torch.float32)).flatten()
        return told.detach(), told.sum()

    def num_targets(self, batch: MicroBatch) -> Tensor:
        return (_targets(batch, batch.weight_B.device) != IGNORED).sum()
