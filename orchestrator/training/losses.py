"""The losses of training from preferences: a reward model's ranking, and DPO. Pretraining and sft use engines/loss.py.

A pair of answers stands in one row, as two packed samples: `pairs_BP2` says where, [chosen, rejected] of each of the row's P
pairs, -1 where the row has fewer. Sums over pairs, as engine.Loss wants it.
B micro batch, S sequence, P pairs of a row, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from strategies.engines.engine import MicroBatch
    from strategies.tensor.region import Region


def _pairs(batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """(pairs_BP2 with 0 in the place of none, whether each pair is there and counts, [B, P])."""
    pairs_BP2 = batch.labels["pairs_BP2"].to(device)
    counted_BP = (pairs_BP2[..., 0] >= 0) & (batch.weight_B.to(device)[:, None] != 0)
    return pairs_BP2.clamp(min=0), counted_BP


def _ranked(margin_BP: Tensor, counted_BP: Tensor) -> tuple[Tensor, Tensor]:
    """(told_3: loss, chosen before rejected, margin; trained) of a Bradley-Terry model: -log sigmoid(margin) a pair."""
    zero = margin_BP.new_zeros(())
    trained = torch.where(counted_BP, -F.logsigmoid(margin_BP), zero).sum()
    right = ((margin_BP > 0) & counted_BP).sum()
    margin = torch.where(counted_BP, margin_BP, zero).sum()
    return torch.stack([trained.detach(), right.to(margin.dtype), margin.detach()]), trained


@dataclass(frozen=True, slots=True)
class RewardLoss:
    """Ranks a chosen answer above a rejected one: -log sigmoid(r_chosen - r_rejected), each reward the value at the answer's last
    token, whose place `pairs_BP2` holds (InstructGPT, arXiv:2203.02155, equation 1)."""

    names: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin")

    def __call__(self, region: Region, output: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        pairs_BP2, counted_BP = _pairs(batch, output.device)
        wide_BS = output.to(torch.promote_types(output.dtype, torch.float32))
        rewards_BP2 = wide_BS.gather(1, pairs_BP2.flatten(1)).view(pairs_BP2.shape)
        return _ranked(rewards_BP2[..., 0] - rewards_BP2[..., 1], counted_BP)

    def num_targets(self, batch: MicroBatch) -> Tensor:
        return _pairs(batch, batch.weight_B.device)[1].sum()


def sequence_log_probabilities(region: Region, logits_BSV: Tensor, batch: MicroBatch) -> Tensor:
    """The log-probability of each sample's target tokens, [B, number of samples in the fullest row], in nats."""
    targets_BS = batch.target_ids_BS.to(logits_BSV.device)
    losses_N, _ = region.token_losses(logits_BSV.flatten(0, 1), targets_BS.flatten())
    segments_BS = batch.inputs["segment_ids_BS"].to(logits_BSV.device)
    sums = losses_N.new_zeros(len(segments_BS), int(segments_BS.max()) + 1)
    return sums.scatter_add(1, segments_BS, -losses_N.view(segments_BS.shape))


@dataclass(frozen=True, slots=True)
class PairLogProbabilities:
    """Tells the log-probability of each answer of a micro batch, pairs_BP2 flattened, in nats. For Session.scores: nothing is
    trained with it."""

    names: ClassVar[tuple[str, ...]] = ("loss",)

    def __call__(self, region: Region, output: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        pairs_BP2, _ = _pairs(batch, output.device)
        told = sequence_log_probabilities(region, output, batch).gather(1, pairs_BP2.flatten(1)).flatten()
        return told.detach(), told.sum()

    def num_targets(self, batch: MicroBatch) -> Tensor:
        return _pairs(batch, batch.weight_B.device)[1].sum()


@dataclass(frozen=True, slots=True)
class DpoLoss:
    """Direct preference optimization (arXiv:2305.18290, equation 7): -log sigmoid of beta times how much more the policy prefers
    the chosen answer than the reference does. `pairs_BP2` holds segments of the row, `reference_BP2` the log-probabilities of
    the same answers under the reference, in nats."""

    beta: float = 0.1
    names: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin")

    def __call__(self, region: Region, output: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        pairs_BP2, counted_BP = _pairs(batch, output.device)
        of_segments = sequence_log_probabilities(region, output, batch)
        policy_BP2 = of_segments.gather(1, pairs_BP2.flatten(1)).view(pairs_BP2.shape)
        gain_BP2 = policy_BP2 - batch.labels["reference_BP2"].to(policy_BP2)
        return _ranked(self.beta * (gain_BP2[..., 0] - gain_BP2[..., 1]), counted_BP)

    def num_targets(self, batch: MicroBatch) -> Tensor:
        return _pairs(batch, batch.weight_B.device)[1].sum()
