"""PPO's rewards, advantages, losses and controllers equal the papers' equations, written out in NumPy, on the same rollouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orchestrator.training.packing import IGNORED
from orchestrator.training.ppo import estimates
from orchestrator.training.ppo.losses import PolicyLoss, TokenLogProbs, TokenValues, ValueLoss
from strategies.engines.engine import MicroBatch
from strategies.tensor.region import WHOLE

TOLERANCE = 1e-5
ROWS, LENGTH, VOCABULARY = 6, 11, 13
SPANS = [(3, 9), (0, 10), (4, 5), (2, 10), (5, 6), (1, 8)]
"""First position of each row that writes a token of its response, and the one behind its last."""


class Rollout:
    """Rollouts of six rows, of one to ten written tokens, and the numbers of four models on them."""

    def __init__(self, seed: int, dtype=np.float64) -> None:
        random = np.random.default_rng(seed)
        self.ids = random.integers(0, VOCABULARY, (ROWS, LENGTH))
        self.logits = random.normal(size=(ROWS, LENGTH, VOCABULARY)).astype(dtype)
        of_tokens = (ROWS, LENGTH)
        self.old, self.reference = (np.log(random.uniform(0.02, 0.6, of_tokens)).astype(dtype) for _ in range(2))
        self.values, self.old_values, self.returns = (random.normal(size=of_tokens).astype(dtype) for _ in range(3))
        self.advantages = random.normal(size=of_tokens).astype(dtype)
        self.scores = random.normal(2.0, 3.0, size=ROWS).astype(dtype)
        self.written = np.zeros(of_tokens, dtype=bool)
        for row, (first, behind) in enumerate(SPANS):
            self.written[row, first:behind] = True

    def log_probs(self) -> np.ndarray:
        """log pi of each written token, by hand."""
        result = np.zeros((ROWS, LENGTH))
        for row, position in zip(*np.nonzero(self.written), strict=True):
            z = self.logits[row, position].astype(np.float64)
            result[row, position] = z[self.ids[row, position + 1]] - np.log(np.exp(z).sum())
        return result

    def batch(self, **labels) -> MicroBatch:
        following = np.concatenate([self.ids[:, 1:], np.zeros((ROWS, 1), dtype=np.int64)], 1)
        return MicroBatch(
            input_ids_BS=torch.from_numpy(self.ids),
            target_ids_BS=torch.from_numpy(np.where(self.written, following, IGNORED)),
            weight_B=torch.ones(ROWS),
            labels={name: torch.from_numpy(np.asarray(value)) for name, value in labels.items()},
        )


def close(ours, theirs) -> None:
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.fixture(params=[(0, np.float64), (1, np.float32), (2, np.float64)], ids=["fp64", "fp32", "another fp64"])
def rollout(request) -> Rollout:
    return Rollout(*request.param)


def test_a_token_pays_its_kl_and_the_last_one_receives_the_score(rollout):
    """Stiennon 2020, section 3.4: R(x, y) = r(x, y) - beta log(pi / pi_ref)."""
    expected, of_kl = np.zeros((ROWS, LENGTH)), np.zeros((ROWS, LENGTH))
    for row, (first, behind) in enumerate(SPANS):
        for t in range(first, behind):
            of_kl[row, t] = rollout.old[row, t] - rollout.reference[row, t]
            expected[row, t] = -0.07 * of_kl[row, t] + (rollout.scores[row] if t == behind - 1 else 0)
    written = torch.from_numpy(rollout.written)
    kl = estimates.token_kl(torch.from_numpy(rollout.old), torch.from_numpy(rollout.reference), written)
    close(kl, of_kl)
    close(estimates.token_rewards(torch.from_numpy(rollout.scores), kl, written, 0.07), expected)
    totals = expected.sum(1)
    close(totals, rollout.scores - 0.07 * of_kl.sum(1))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_the_weighted_sum_of_all_later_residuals(rollout, gamma, lam):
    """Schulman 2015, equation 16: A_t = sum over l of (gamma lambda)^l delta_{t+l}; the returns are A + V."""
    rewards = rollout.advantages
    expected = np.zeros((ROWS, LENGTH))
    for row, (first, behind) in enumerate(SPANS):
        v = [*rollout.values[row, first:behind].astype(np.float64), 0.0]
        delta = [rewards[row, first + i] + gamma * v[i + 1] - v[i] for i in range(behind - first)]
        for i in range(len(delta)):
            expected[row, first + i] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(delta)))
    found, returns = estimates.advantages(
        torch.from_numpy(rewards),
        torch.from_numpy(rollout.values),
        torch.from_numpy(rollout.written),
        gamma=gamma,
        lam=lam,
    )
    close(found, expected)
    close(returns, np.where(rollout.written, expected + rollout.values, 0))


def test_with_lambda_1_and_no_discount_a_return_is_the_reward_that_is_still_to_come(rollout):
    written = torch.from_numpy(rollout.written)
    rewards = torch.where(written, torch.from_numpy(rollout.advantages), 0.0)
    _, returns = estimates.advantages(rewards, torch.from_numpy(rollout.values), written, gamma=1.0, lam=1.0)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    close(returns, torch.where(written, to_come, 0.0))


def test_advantages_are_whitened_over_written_tokens_alone(rollout):
    held = rollout.advantages[rollout.written].astype(np.float64)
    expected = (rollout.advantages - held.mean()) / np.sqrt(held.var() + 1e-8)
    found = estimates.whitened(torch.from_numpy(rollout.advantages), torch.from_numpy(rollout.written))
    close(found, np.where(rollout.written, expected, 0))


def test_the_actors_loss_is_equation_7_summed_over_written_tokens(rollout):
    """Schulman 2017: L^CLIP = E[min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A)], maximized."""
    log_probs, total, clipped = rollout.log_probs(), 0.0, 0
    for row, t in zip(*np.nonzero(rollout.written), strict=True):
        ratio = np.exp(log_probs[row, t] - rollout.old[row, t])
        a = rollout.advantages[row, t]
        free, held = ratio * a, min(max(ratio, 0.8), 1.2) * a
        total += min(free, held)
        clipped += held < free
    batch = rollout.batch(old_log_probs_BS=rollout.old, advantages_BS=rollout.advantages)
    loss = PolicyLoss(clip_range=0.2)
    told, trained = loss(WHOLE, torch.from_numpy(rollout.logits), batch)
    assert 5 < clipped < rollout.written.sum()  # both branches are met
    close(told, [-total, clipped, (rollout.old - log_probs)[rollout.written].sum()])
    close(trained, -total)
    assert loss.num_targets(batch) == rollout.written.sum()


def test_the_actors_gradient_is_that_of_the_unclipped_tokens(rollout):
    """d(-rho A)/d logits = -rho A (one-hot - softmax) where the clipped term is not taken, else 0."""
    log_probs, expected = rollout.log_probs(), np.zeros(rollout.logits.shape)
    for row, t in zip(*np.nonzero(rollout.written), strict=True):
        ratio, a = np.exp(log_probs[row, t] - rollout.old[row, t]), rollout.advantages[row, t]
        if (ratio > 1.2 and a > 0) or (ratio < 0.8 and a < 0):
            continue
        z = rollout.logits[row, t].astype(np.float64)
        softmax = np.exp(z) / np.exp(z).sum()
        expected[row, t] = -ratio * a * (np.eye(VOCABULARY)[rollout.ids[row, t + 1]] - softmax)
    logits = torch.from_numpy(rollout.logits).requires_grad_()
    batch = rollout.batch(old_log_probs_BS=rollout.old, advantages_BS=rollout.advantages)
    PolicyLoss(clip_range=0.2)(WHOLE, logits, batch)[1].backward()
    close(logits.grad, expected)


def test_rows_of_text_add_the_pretraining_loss_by_their_weight(rollout):
    """Ouyang 2022, equation 2: ... + gamma E[log pi(x)], and what is told is of the rollouts alone."""
    log_probs = rollout.log_probs()
    of_text = np.array([0, 0, 0, 0, 0.3, 0.3])
    alone = rollout.batch(old_log_probs_BS=rollout.old, advantages_BS=rollout.advantages)
    without = MicroBatch(
        input_ids_BS=alone.input_ids_BS,
        target_ids_BS=alone.target_ids_BS,
        weight_B=torch.from_numpy((of_text == 0).astype(np.float32)),
        labels=alone.labels,
    )
    both = rollout.batch(old_log_probs_BS=rollout.old, advantages_BS=rollout.advantages, pretraining_B=of_text)
    logits, loss = torch.from_numpy(rollout.logits), PolicyLoss()
    told_alone, trained_alone = loss(WHOLE, logits, without)
    told, trained = loss(WHOLE, logits, both)
    close(told, told_alone)
    close(trained, trained_alone.numpy() - 0.3 * log_probs[4:][rollout.written[4:]].sum())
    assert loss.num_targets(both) == rollout.written[:4].sum() == loss.num_targets(without)


def test_the_critics_loss_takes_the_larger_of_the_free_and_the_clipped_error(rollout):
    total, clipped = 0.0, 0
    for row, t in zip(*np.nonzero(rollout.written), strict=True):
        v, old, r = (float(x[row, t]) for x in (rollout.values, rollout.old_values, rollout.returns))
        free, held = (v - r) ** 2, (old + min(max(v - old, -0.3), 0.3) - r) ** 2
        total += 0.5 * max(free, held)
        clipped += held > free + 1e-12  # old + (v - old) is v but for rounding
    batch = rollout.batch(old_values_BS=rollout.old_values, returns_BS=rollout.returns)
    told, trained = ValueLoss(clip_range=0.3)(WHOLE, torch.from_numpy(rollout.values), batch)
    assert 5 < clipped < rollout.written.sum()
    close(told, [total, clipped])
    close(trained, total)


def test_scores_of_a_session_are_log_probabilities_and_values(rollout):
    told, _ = TokenLogProbs()(WHOLE, torch.from_numpy(rollout.logits), rollout.batch())
    close(told.view(ROWS, LENGTH), rollout.log_probs())
    told, _ = TokenValues()(WHOLE, torch.from_numpy(rollout.values), rollout.batch())
    close(told.view(ROWS, LENGTH), rollout.values)


def test_a_filling_row_counts_for_nothing(rollout):
    whole = rollout.batch(
        old_log_probs_BS=rollout.old,
        advantages_BS=rollout.advantages,
        old_values_BS=rollout.old_values,
        returns_BS=rollout.returns,
    )
    empty = MicroBatch(**{name: getattr(whole, name) for name in whole.__slots__} | {"weight_B": torch.zeros(ROWS)})
    for loss, output in ((PolicyLoss(), rollout.logits), (ValueLoss(), rollout.values)):
        told, trained = loss(WHOLE, torch.from_numpy(output), empty)
        assert told.tolist() == [0.0] * len(loss.names)
        assert trained.item() == 0 == loss.num_targets(empty)


def test_the_scale_of_rewards_is_that_of_all_scores_that_were_seen(rollout):
    parts = [rollout.scores[:1], rollout.scores[1:4], rollout.scores[4:]]
    scale = estimates.RewardScale()
    for part in parts:
        scale = scale.seen(torch.from_numpy(part))
    wide = rollout.scores.astype(np.float64)
    close([scale.count, scale.mean, scale.squares], [ROWS, wide.mean(), ((wide - wide.mean()) ** 2).sum()])
    normalized = (wide - wide.mean()) / wide.std()
    assert np.abs(normalized).max() > 1.0
    close(scale.normalized(torch.from_numpy(rollout.scores), None), normalized)
    close(scale.normalized(torch.from_numpy(rollout.scores), 1.0), np.clip(normalized, -1, 1))


def test_equal_scores_are_only_shifted():
    scale = estimates.RewardScale().seen(torch.full((3,), 2.0))
    assert scale.normalized(torch.tensor([2.0, 3.0]), None).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("kl", "error"), [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (5.4, -0.1), (0.0, -0.2), (-3.0, -0.2)])
def test_the_kl_controller_follows_the_bounded_relative_error(kl, error):
    """Ziegler 2019, section 2.2."""
    controller = estimates.KlController(coefficient=0.2, target=6.0, horizon=1000)
    close(controller.seen(kl, 64).coefficient, 0.2 * (1 + error * 64 / 1000))


def test_without_a_target_the_coefficient_stays():
    controller = estimates.KlController(coefficient=0.2)
    assert controller.seen(50.0, 64) == controller
