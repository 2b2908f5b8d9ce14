"""The losses of a reward model and of DPO are the papers' formulas, whatever shares a row."""

from __future__ import annotations

import math

import pytest
import torch

from orchestrator.training.losses import DpoLoss, RewardLoss
from strategies.engines.engine import MicroBatch
from strategies.tensor.region import WHOLE

SEGMENTS_BS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
TARGETS_BS = torch.tensor([[1, 2, 0, 3, 4, -100], [2, -100, 3, 1, 1, 0]])


def rows(**labels):
    return MicroBatch(
        input_ids_BS=TARGETS_BS.clamp(min=0),
        target_ids_BS=TARGETS_BS,
        weight_B=torch.tensor([1.0, 1.0]),
        inputs={"segment_ids_BS": SEGMENTS_BS},
        labels=labels,
    )


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_a_reward_model_ranks_the_values_at_the_ends_of_two_answers():
    values_BS = torch.tensor([[0.0, 1.5, 0.0, 0.0, 0.5, 9.0], [2.0, 0, 0, 0, 0, 3.0]], dtype=torch.float64)
    values_BS.requires_grad_()
    batch = rows(pairs_BP2=torch.tensor([[[1, 4], [-1, -1]], [[0, 5], [-1, -1]]]))
    told_K, trained = RewardLoss()(WHOLE, values_BS, batch)
    trained.backward()
    assert RewardLoss().num_targets(batch) == 2
    assert told_K.tolist() == pytest.approx([-log_sigmoid(1.0) - log_sigmoid(-1.0), 1.0, 0.0])
    share = 1 / (1 + math.exp(1.0))  # sigmoid(-margin) of the first pair
    assert values_BS.grad[0].tolist() == pytest.approx([0, -share, 0, 0, share, 0])
    assert values_BS.grad[1].tolist() == pytest.approx([share - 1, 0, 0, 0, 0, 1 - share])


def test_dpo_is_equation_7_on_the_answers_tokens_alone():
    logits_BSV = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    batch = rows(
        pairs_BP2=torch.tensor([[[1, 0]], [[0, 1]]]),
        reference_BP2=torch.tensor([[[-3.0, -1.0]], [[-2.0, -4.0]]]),
    )
    log_p = logits_BSV.log_softmax(-1)
    answers = [  # chosen and rejected of each row: where their tokens are
        (log_p[0, 2, 0] + log_p[0, 3, 3] + log_p[0, 4, 4], log_p[0, 0, 1] + log_p[0, 1, 2]),
        (log_p[1, 0, 2], log_p[1, 2, 3] + log_p[1, 3, 1] + log_p[1, 4, 1] + log_p[1, 5, 0]),
    ]
    references = [(-3.0, -1.0), (-2.0, -4.0)]
    margins = [
        0.3 * ((chosen - of_chosen) - (rejected - of_rejected))
        for (chosen, rejected), (of_chosen, of_rejected) in zip(answers, references, strict=True)
    ]
    expected = -sum(torch.nn.functional.logsigmoid(margin) for margin in margins)
    told_K, trained = DpoLoss(beta=0.3)(WHOLE, logits_BSV, batch)
    assert told_K.tolist() == pytest.approx([expected.item(), sum(m.item() > 0 for m in margins), sum(margins).item()])
    ours, theirs = (torch.autograd.grad(x, logits_BSV, retain_graph=True)[0] for x in (trained, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", [RewardLoss(), DpoLoss()])
def test_a_pair_in_a_filling_row_counts_for_nothing(loss):
    pairs = {"pairs_BP2": torch.tensor([[[0, 1]], [[0, 1]]]), "reference_BP2": torch.zeros(2, 1, 2)}
    output = torch.randn((2, 6, 5) if isinstance(loss, DpoLoss) else (2, 6), generator=torch.Generator().manual_seed(1))
    both = rows(**pairs)
    empty = MicroBatch(**{name: getattr(both, name) for name in both.__slots__} | {"weight_B": torch.zeros(2)})
    assert (loss.num_targets(both), loss.num_targets(empty)) == (2, 0)
    assert loss(WHOLE, output, empty)[0].tolist() == [0, 0, 0]
