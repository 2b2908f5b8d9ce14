"""The chunked loss is torch's cross entropy, value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from strategies.engines import token_losses as loss
from strategies.engines.engine import MicroBatch
from strategies.engines.loss import TokenLoss
from strategies.engines.token_losses import token_losses
from strategies.tensor.region import WHOLE


@pytest.fixture
def logits_NV() -> torch.Tensor:
    return torch.randn(9, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3


TARGETS_N = torch.tensor([0, 12, -100, 5, 5, -100, 1, 7, 3])


def token_loss(logits_NV, targets_N, z_loss=0.0):
    """(told, trained) of one micro batch whose only sequence has these logits and targets."""
    batch = MicroBatch(input_ids_BS=targets_N[None], target_ids_BS=targets_N[None], weight_B=torch.ones(1))
    told_K, trained = TokenLoss(z_loss)(WHOLE, logits_NV[None], batch)
    return told_K[0], trained


@pytest.mark.parametrize("chunk", [1, 13, 40, 10**6])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_equals_cross_entropy_at_any_chunk(logits_NV, monkeypatch, chunk, dtype, tolerance):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk)
    ours = logits_NV.to(dtype).requires_grad_()
    theirs = ours.detach().double().requires_grad_()
    told, trained = token_loss(ours, TARGETS_N)
    expected = F.cross_entropy(theirs, TARGETS_N, reduction="sum")
    (trained * 0.5).backward()
    (expected * 0.5).backward()
    assert told.dtype == torch.promote_types(dtype, torch.float32)
    assert not told.requires_grad
    assert told == trained
    torch.testing.assert_close(told.double(), expected, atol=tolerance, rtol=1e-6)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=tolerance, rtol=0)


def test_z_loss_is_trained_and_not_told(logits_NV, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 30)
    ours, theirs = logits_NV.clone().requires_grad_(), logits_NV.clone().requires_grad_()
    told, trained = token_loss(ours, TARGETS_N, z_loss=0.1)
    cross_entropy = F.cross_entropy(theirs, TARGETS_N, reduction="sum")
    expected = cross_entropy + 0.1 * theirs.logsumexp(-1)[TARGETS_N != -100].square().sum()
    trained.backward()
    expected.backward()
    torch.testing.assert_close(told, cross_entropy.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(trained, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=0)


def test_a_micro_batch_without_targets_costs_nothing(logits_NV):
    logits_NV.requires_grad_()
    told, trained = token_loss(logits_NV, torch.full((9,), -100), z_loss=0.1)
    trained.backward()
    assert told == 0
    assert not logits_NV.grad.any()


def test_each_tokens_loss_has_a_gradient_of_its_own(logits_NV):
    """What DPO and PPO weigh token by token."""
    ours, theirs = logits_NV.clone().requires_grad_(), logits_NV.clone().requires_grad_()
    weight_N = torch.linspace(-1, 2, 9, dtype=torch.float64)
    (token_losses(ours, TARGETS_N)[0] * weight_N).sum().backward()
    (F.cross_entropy(theirs, TARGETS_N, reduction="none") * weight_N).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=0)


def test_a_sequence_of_weight_0_counts_for_nothing(logits_NV):
    ids_BS = TARGETS_N[:8].view(2, 4)
    batch = MicroBatch(input_ids_BS=ids_BS, target_ids_BS=ids_BS, weight_B=torch.tensor([1.0, 0.0]))
    told_K, _ = TokenLoss()(WHOLE, logits_NV[:8].view(2, 4, 13), batch)
    assert TokenLoss().num_targets(batch) == 3
    torch.testing.assert_close(told_K[0], F.cross_entropy(logits_NV[:4], TARGETS_N[:4], reduction="sum"))
