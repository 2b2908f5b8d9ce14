"""Arithmetic of PPO on rollouts: per-token KL and rewards, advantages, the running scale of rewards, the coefficient of the KL.

Pure functions of tensors. A row of a rollout holds a prompt, a response and padding; what is estimated for a token stands at the
position before it, from which the model wrote it, and `written_BS` is true at the positions that wrote the response. They follow
one another in a row.

Sources: PPO, Schulman 2017 (arXiv:1707.06347); GAE, Schulman 2015 (arXiv:1506.02438); fine-tuning from human preferences, Ziegler
2019 (arXiv:1909.08593); summaries, Stiennon 2020 (arXiv:2009.01325); InstructGPT, Ouyang 2022 (arXiv:2203.02155).
B rows, S positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

LARGEST_KL_ERROR = 0.2
"""Bound of the controller's relative error (Ziegler 2019, section 2.2)."""


def token_kl(log_probs_BS: Tensor, reference_BS: Tensor, written_BS: Tensor) -> Tensor:
    """Return log pi(y_t) - log pi_ref(y_t) of each written token, in nats, 0 elsewhere. Summed over a response it estimates the
    divergence KL(pi, pi_ref) of that response (Stiennon 2020, section 3.4; its estimator has this expectation under pi)."""
    return torch.where(written_BS, log_probs_BS - reference_BS, 0.0)


def token_rewards(scores_B: Tensor, kl_BS: Tensor, written_BS: Tensor, coefficient: float) -> Tensor:
    """Return the reward of each written token: R(x, y) = r(x, y) - beta log(pi(y|x) / pi_ref(y|x)) (Stiennon 2020, section 3.4;
    Ouyang 2022, equation 2), the KL paid at each token and the score received at the last one."""
    following_BS = torch.zeros_like(written_BS)
    following_BS[:, :-1] = written_BS[:, 1:]
    last_BS = written_BS & ~following_BS
    return torch.where(last_BS, scores_B[:, None], 0.0) - coefficient * torch.where(written_BS, kl_BS, 0.0)


def advantages(
    rewards_BS: Tensor, values_BS: Tensor, written_BS: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return (generalized advantages, returns) of each written token, 0 elsewhere.

    A_t = delta_t + gamma lambda A_{t+1} with delta_t = r_t + gamma V(s_{t+1}) - V(s_t) (Schulman 2017, equations 11 and 12); the
    episode ends behind the last written token, where V and A are 0. The returns that the critic learns are A_t + V(s_t)."""
    result_BS = torch.zeros_like(rewards_BS)
    advantage_B = next_value_B = rewards_BS.new_zeros(len(rewards_BS))
    for position in range(rewards_BS.shape[1] - 1, -1, -1):
        written_B = written_BS[:, position]
        delta_B = rewards_BS[:, position] + gamma * next_value_B - values_BS[:, position]
        advantage_B = torch.where(written_B, delta_B + gamma * lam * advantage_B, 0.0)
        next_value_B = torch.where(written_B, values_BS[:, position], 0.0)
        result_BS[:, position] = advantage_B
    return result_BS, torch.where(written_BS, result_BS + values_BS, 0.0)


def whitened(advantages_BS: Tensor, written_BS: Tensor) -> Tensor:
    """Return advantages of mean 0 and variance 1 over all written tokens of a rollout (Ziegler 2019's code; the variance without
    Bessel's correction), 0 elsewhere. One token alone has no variance and becomes 0."""
    held_N = advantages_BS[written_BS]
    scale = torch.rsqrt(held_N.var(unbiased=False) + 1e-8)
    return torch.where(written_BS, (advantages_BS - held_N.mean()) * scale, 0.0)


def clipped_policy_losses(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Return (-L^CLIP, whether the clipped term is taken) of each token, where
    L^CLIP = min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A)
    with rho = pi(y_t) / pi_old(y_t) (Schulman 2017, equation 7)."""
    ratio = (log_probs - old_log_probs).exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(free, held), held > free


def clipped_value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Return (1/2 max((V - R)^2, (clip(V, V_old - epsilon, V_old + epsilon) - R)^2), whether the clipped term is taken) of each
    token: the critic moves no farther in one rollout than the policy does (Ziegler 2019's code; Schulman 2017's L^VF, equation 9,
    without a clip)."""
    held = torch.maximum(torch.minimum(values, old_values + clip_range), old_values - clip_range)
    of_free, of_held = (values - returns).square(), (held - returns).square()
    return 0.5 * torch.maximum(of_free, of_held), of_held > of_free


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardScale:
    """Mean and spread of all scores that a run has seen, by which it normalizes them: a reward model is fixed up to a shift alone
    (Ziegler 2019, section 2.1; Stiennon 2020, section 3.4 sets its mean to 0)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared differences from the mean."""

    def seen(self, scores_B: Tensor) -> Self:
        """Return the scale with further scores, merged as Chan, Golub and LeVeque do (1983): what matters is no order."""
        wide = scores_B.double()
        count, mean = len(wide), float(wide.mean())
        total, difference = self.count + count, mean - self.mean
        return replace(
            self,
            count=total,
            mean=self.mean + difference * count / total,
            squares=self.squares + float((wide - mean).square().sum()) + difference**2 * self.count * count / total,
        )

    def normalized(self, scores_B: Tensor, clip: float | None) -> Tensor:
        """Return (score - mean) / standard deviation, bounded to +-clip. As long as all scores are equal: score - mean."""
        spread = math.sqrt(self.squares / self.count) if self.squares > 0 else 1.0
        result = (scores_B - self.mean) / spread
        return result if clip is None else result.clamp(-clip, clip)


@dataclass(frozen=True, kw_only=True, slots=True)
class KlController:
    """The coefficient of the KL in the reward, beta; with a target it follows the divergence that is seen (Ziegler 2019, section
    2.2): e = clip(KL / target - 1, -0.2, 0.2), beta <- beta (1 + e n / horizon) after n rollouts."""

    coefficient: float
    target: float | None = None
    """KL of a whole response, in nats; None keeps the coefficient."""
    horizon: int = 10_000
    """Rollouts over which the coefficient may grow by a fifth."""

    def seen(self, kl: float, num_rollouts: int) -> Self:
        """Return the controller after rollouts with this mean KL of a response."""
        if self.target is None:
            return self
        error = min(max(kl / self.target - 1, -LARGEST_KL_ERROR), LARGEST_KL_ERROR)
        return replace(self, coefficient=self.coefficient * (1 + error * num_rollouts / self.horizon))
