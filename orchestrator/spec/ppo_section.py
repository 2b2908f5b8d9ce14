"""The part of a job file that task ppo alone has, field by field; like sections.py, it is what the reference is made from."""

from __future__ import annotations

from pydantic import Field

from orchestrator.spec.sections import DEFAULTS, ModelSpec, Section
from orchestrator.spec.values import Count, Fraction, NotNegative, Positive


class KlSpec(Section):
    """What holds ppo's actor near its reference: each token's reward is lowered by `coefficient` times the log of the ratio of
    their probabilities (arXiv:2009.01325, section 3.4)."""

    coefficient: NotNegative = Field(default=0.05, examples=[0.05])
    """Beta, in reward per nat; the first one where there is a `target`."""
    target: Positive | None = Field(default=None, examples=[6.0])
    """KL of a response that the coefficient is adapted to, in nats (arXiv:1909.08593, section 2.2). Absent: it stays."""
    horizon: Count = Field(default=10_000, examples=[10000])
    """Responses over which an adapted coefficient changes by a fifth at most."""


class PpoSpec(Section):
    """Reinforcement learning from a reward model (arXiv:1707.06347, arXiv:2203.02155). A step writes `global_batch_size`
    responses, one to a prompt of the data, and learns from them. The actor is the job's `model`."""

    reward: ModelSpec = Field(examples=[{"checkpoint": "runs/reward"}])
    """The model that scores a response, frozen: one that task reward trained."""
    critic: ModelSpec | None = Field(default=None, examples=[{"checkpoint": "runs/reward"}])
    """The model that learns what score to expect at each token. Absent: it begins as the reward model."""
    reference: ModelSpec | None = Field(default=None, examples=[{"checkpoint": "runs/sft"}])
    """The model that the actor is held to, frozen. Absent: the actor's first weights."""
    response_length: Count | None = Field(default=None, examples=[256])
    """Tokens of a response at most; a prompt has the rest of `batch.sequence_length`. Absent: half of it."""
    epochs: Count = Field(default=1, examples=[4])
    """Times that a step's responses are learned from."""
    minibatches: Count = Field(default=1, examples=[4])
    """Parts that the responses are split into for each epoch, an optimizer step each."""
    gamma: Fraction = Field(default=1.0, examples=[1.0])
    """Discount of later rewards, per token."""
    lam: Fraction = Field(default=0.95, examples=[0.95])
    """Lambda of the generalized advantages, per token (arXiv:1506.02438)."""
    clip_range: Positive = Field(default=0.2, examples=[0.2])
    """Epsilon of the actor's clipped loss."""
    value_clip_range: Positive = Field(default=0.2, examples=[0.2])
    """How far a value may move from what it was when the responses were written."""
    kl: KlSpec = Field(default_factory=DEFAULTS, validate_default=True, examples=[{"coefficient": 0.05, "target": 6.0}])
    """What holds the actor near its reference."""
    normalize_rewards: bool = Field(default=True, examples=[True])
    """Scores are shifted and scaled to mean 0 and deviation 1 over all that the run has seen."""
    reward_clip: Positive | None = Field(default=5.0, examples=[5.0])
    """Largest normalized score, positive or negative. `null`: never clipped."""
    whiten_advantages: bool = Field(default=True, examples=[True])
    """Advantages are shifted and scaled to mean 0 and variance 1 over the tokens of a step."""
    critic_learning_rate: Positive | None = Field(default=None, examples=[5e-6])
    """Peak learning rate of the critic. Absent: as the actor's."""

    @property
    def of_critic(self) -> ModelSpec:
        """The critic's first weights."""
        return self.critic or self.reward

    def response_tokens(self, sequence_length: int) -> int:
        """Return the tokens of a response at most."""
        return self.response_length or sequence_length // 2
