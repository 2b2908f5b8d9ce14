"""PPO's four models on one rank: actor and critic trained by an engine, reference and reward model frozen and whole.

Every rank writes and scores its chunks of the global batch; then all ranks share the rollouts, which are small, and each replica
learns from its rows of them. So a response is the same under any number of replicas, but for the rounding of the weights.
G rows of the global batch, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from orchestrator.models.decoder import Decoder
from orchestrator.spec.ppo_section import PpoSpec
from orchestrator.training.batches import Share
from orchestrator.training.packing import IGNORED
from orchestrator.training.ppo.estimates import (
    KlController,
    RewardScale,
    advantages,
    token_kl,
    token_rewards,
    whitened,
)
from orchestrator.training.ppo.losses import TokenLogProbs, TokenValues
from orchestrator.training.ppo.rollouts import CHUNK_ROWS, Rows, log_probs, respond, scores, uniforms
from strategies.engines.engine import Loss, MicroBatch, Session, StepResult

CRITIC = "critic."
"""What the names of the critic's state begin with in a checkpoint; the actor's are those of any model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollouts:
    """Responses with what the frozen models say of them; the same on every rank, [G, ...]."""

    rows: Rows
    reference_GS: Tensor
    """Log-probabilities of the written tokens under the reference."""
    scores_G: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Writing:
    """What decides how responses are written."""

    seed: int
    response_length: int
    sequence_length: int
    vocab_size: int
    """Ids of the tokenizer."""
    end_of_text: int


class PpoSession:
    """See engine.Session; its step takes prompts, `learn`, in the place of micro batches."""

    def __init__(
        self,
        spec: PpoSpec,
        *,
        actor: Session,
        critic: Session,
        reference: Decoder,
        reward: Decoder,
        whole: Decoder | None,
        share: Share,
        tensor_rank: int,
        writing: Writing,
    ) -> None:
        """
        Args:
            whole: a module into which the actor's parameters are gathered to write with; None where the session's own is whole.
            tensor_rank: of this rank; the ranks of a tensor group tell the same, and the first of them is heard.
        """
        self.spec, self.actor, self.critic, self.reference, self.reward = spec, actor, critic, reference, reward
        self.module = actor.module
        self.whole, self.share, self.tensor_rank, self.writing = whole, share, tensor_rank, writing
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.scale = RewardScale()
        self.controller = KlController(coefficient=spec.kl.coefficient, target=spec.kl.target, horizon=spec.kl.horizon)

    # One step --------------------------------------------------------------------------------------------------------

    def learn(
        self,
        prompts_GP: NDArray[np.int64],
        lengths_G: NDArray[np.int64],
        *,
        step: int,
        learning_rate: float,
        critic_learning_rate: float,
    ) -> StepResult:
        """Write a response to each prompt of the global batch, and learn from all of them. Collective."""
        rollouts = self.rollouts(self._writer(), prompts_GP, lengths_G, step=step)
        rows = rollouts.rows
        written_GS = rows.written_BS
        old_GS = self._scores(self.actor, rows, TokenLogProbs())
        values_GS = torch.where(written_GS, self._scores(self.critic, rows, TokenValues()), 0.0)
        kl_GS = token_kl(old_GS, rollouts.reference_GS, written_GS)
        kl = float(kl_GS.sum(1).mean())
        told = {
            "reward": float(rollouts.scores_G.mean()),
            "kl": kl,
            "kl_coefficient": self.controller.coefficient,
            "response_tokens": float(written_GS.sum(1).double().mean()),
        }
        self.scale = self.scale.seen(rollouts.scores_G)
        rewarded_G = rollouts.scores_G
        if self.spec.normalize_rewards:
            rewarded_G = self.scale.normalized(rewarded_G, self.spec.reward_clip)
        rewards_GS = token_rewards(rewarded_G, kl_GS, written_GS, self.controller.coefficient)
        advantages_GS, returns_GS = advantages(
            rewards_GS, values_GS, written_GS, gamma=self.spec.gamma, lam=self.spec.lam
        )
        if self.spec.whiten_advantages:
            advantages_GS = whitened(advantages_GS, written_GS)
        self.controller = self.controller.seen(kl, len(prompts_GP))
        of_actor = {"old_log_probs_BS": old_GS, "advantages_BS": advantages_GS}
        of_critic = {"old_values_BS": values_GS, "returns_BS": returns_GS}
        policy, value = [], []
        for part in self._parts(len(prompts_GP), step):
            num_targets = int(written_GS[part].sum())
            micro_batches = self._micro_batches(rows, part, of_actor)
            policy.append(self.actor.step(micro_batches, num_targets=num_targets, learning_rate=learning_rate))
            micro_batches = self._micro_batches(rows, part, of_critic)
            value.append(self.critic.step(micro_batches, num_targets=num_targets, learning_rate=critic_learning_rate))
        told |= {
            "clipped": _mean([result.metrics["clipped"] for result in policy]),
            "value_loss": _mean([result.loss for result in value]),
            "critic_gradient_norm": _mean([result.gradient_norm for result in value]),
        }
        return StepResult(
            loss=_mean([result.loss for result in policy]),
            gradient_norm=_mean([result.gradient_norm for result in policy]),
            skipped=any(result.skipped for result in (*policy, *value)),
            metrics=told,
        )

    def _parts(self, num_rows: int, step: int) -> Iterator[list[int]]:
        """The rows of each optimizer step: a function of seed and step alone."""
        for epoch in range(self.spec.epochs):
            order = np.arange(num_rows)
            if self.spec.minibatches > 1:
                draws = uniforms(self.writing.seed ^ 1, step, order, self.spec.epochs)[:, epoch]
                order = np.argsort(draws, kind="stable")
            for part in np.array_split(order, self.spec.minibatches):
                yield [int(row) for row in part]

    # Rollouts --------------------------------------------------------------------------------------------------------

    def rollouts(
        self, model: nn.Module, prompts_GP: NDArray[np.int64], lengths_G: NDArray[np.int64], *, step: int
    ) -> Rollouts:
        """Let a whole model answer, and the frozen ones score: each rank its chunks of rows, then all of them everywhere."""
        device, length, count = self.share.device, self.writing.sequence_length, len(prompts_GP)
        ids_GS = torch.zeros(count, length, dtype=torch.int64, device=device)
        ends_G = torch.zeros(count, dtype=torch.int64, device=device)
        reference_GS = torch.zeros(count, length, dtype=torch.float64, device=device)
        scores_G = torch.zeros(count, dtype=torch.float64, device=device)
        prompts, lengths = torch.from_numpy(prompts_GP).to(device), torch.from_numpy(lengths_G).to(device)
        for number, first in enumerate(range(0, count, CHUNK_ROWS)):
            if number % self.size != self.rank:
                continue
            mine = slice(first, min(first + CHUNK_ROWS, count))
            rows = respond(
                model,
                prompts[mine],
                lengths[mine],
                response_length=self.writing.response_length,
                sequence_length=length,
                vocab_size=self.writing.vocab_size,
                end_of_text=self.writing.end_of_text,
                noise_BR=uniforms(
                    self.writing.seed, step, np.arange(mine.start, mine.stop), self.writing.response_length
                ),
            )
            ids_GS[mine], ends_G[mine] = rows.input_ids_BS, rows.lengths_B
            reference_GS[mine] = log_probs(self.reference, rows)
            scores_G[mine] = scores(self.reward, rows)
        for tensor in (ids_GS, ends_G, reference_GS, scores_G):  # of each row all ranks but one have zeros
            self._add(tensor)
        rows = Rows(input_ids_BS=ids_GS, prompt_lengths_B=lengths, lengths_B=ends_G)
        return Rollouts(rows=rows, reference_GS=reference_GS, scores_G=scores_G)

    def _writer(self) -> nn.Module:
        """The actor as a whole module in the precision of the training. Collective."""
        if self.whole is None:
            return self.actor.module
        state = self.actor.state_dict()
        with torch.no_grad():
            for name, parameter in self.whole.named_parameters():
                held = state[f"model.{name}"]
                parameter.copy_(held.full_tensor() if isinstance(held, DTensor) else held)
        return self.whole

    def _scores(self, session: Session, rows: Rows, loss: Loss) -> Tensor:
        """What a trained model tells of every position, [G, S] in fp64: each replica of its rows, then all everywhere."""
        total_GS = torch.zeros(rows.input_ids_BS.shape, dtype=torch.float64, device=self.share.device)
        everything = list(range(len(total_GS)))
        told = session.scores(self._micro_batches(rows, everything, {}), loss)
        for places, of_batch in zip(self.share.rows(len(total_GS)), told, strict=True):
            if self.tensor_rank or of_batch is None:
                continue
            for place, value in zip(places, of_batch.double().view(len(places), -1), strict=True):
                if place is not None:
                    total_GS[place] = value
        self._add(total_GS)
        return total_GS

    def _micro_batches(self, rows: Rows, part: Sequence[int], labels: Mapping[str, Tensor]) -> list[MicroBatch]:
        """This replica's micro batches of some rows; a filling row repeats a real one with weight 0."""
        result = []
        targets_GS = rows.target_ids_BS
        for places in self.share.rows(len(part)):
            picked = torch.tensor([part[0 if place is None else place] for place in places], device=self.share.device)
            weight_B = torch.tensor([0.0 if place is None else 1.0 for place in places], device=self.share.device)
            result.append(
                MicroBatch(
                    input_ids_BS=rows.input_ids_BS[picked],
                    target_ids_BS=targets_GS[picked].masked_fill(weight_B[:, None] == 0, IGNORED),
                    weight_B=weight_B,
                    labels={name: value[picked] for name, value in labels.items()},
                )
            )
        return result

    def _add(self, tensor: Tensor) -> None:
        if self.size > 1:
            dist.all_reduce(tensor)

    # Evaluation ------------------------------------------------------------------------------------------------------

    def judge(self, prompts_GP: NDArray[np.int64], lengths_G: NDArray[np.int64]) -> dict[str, float]:
        """Return the mean score of the actor's answers to these prompts and of the reference's, by the same noise; how often
        the reward model prefers the actor's, ties counted half; and the KL of an answer, in nats. Collective."""
        writer = self._writer()
        ours = self.rollouts(writer, prompts_GP, lengths_G, step=0)
        theirs = self.rollouts(self.reference, prompts_GP, lengths_G, step=0)
        old_GS = self._scores(self.actor, ours.rows, TokenLogProbs())
        kl_GS = token_kl(old_GS, ours.reference_GS, ours.rows.written_BS)
        wins_G = (ours.scores_G > theirs.scores_G).double() + 0.5 * (ours.scores_G == theirs.scores_G).double()
        return {
            "reward": float(ours.scores_G.mean()),
            "reference_reward": float(theirs.scores_G.mean()),
            "win_rate": float(wins_G.mean()),
            "kl": float(kl_GS.sum(1).mean()),
        }

    # Session ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The actor's state under the names of any model's, the critic's apart, and what was learned of rewards and KL."""
        return {
            **self.actor.state_dict(),
            **{f"{CRITIC}{name}": value for name, value in self.critic.state_dict().items()},
            "ppo.kl_coefficient": self.controller.coefficient,
            "ppo.rewards.count": self.scale.count,
            "ppo.rewards.mean": self.scale.mean,
            "ppo.rewards.squares": self.scale.squares,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See engine.Session."""
        of_critic = {name.removeprefix(CRITIC): value for name, value in state.items() if name.startswith(CRITIC)}
        self.actor.load_state_dict(state)
        self.critic.load_state_dict(of_critic)
        self.controller = KlController(
            coefficient=float(state["ppo.kl_coefficient"]),
            target=self.controller.target,
            horizon=self.controller.horizon,
        )
        self.scale = RewardScale(
            count=int(state["ppo.rewards.count"]),
            mean=float(state["ppo.rewards.mean"]),
            squares=float(state["ppo.rewards.squares"]),
        )

    def tensors(self) -> dict[str, list[Tensor]]:
        """See engine.Session; the frozen models and the copy to write with are parameters."""
        held: dict[str, list[Tensor]] = {}
        for session in (self.actor, self.critic):
            for component, tensors in session.tensors().items():
                held.setdefault(component, []).extend(tensors)
        for module in (self.reference, self.reward, self.whole):
            if module is not None:
                held.setdefault("parameters", []).extend(parameter.detach() for parameter in module.parameters())
        return held

    def close(self) -> None:
        """Frees what actor and critic hold."""
        self.critic.close()
        self.actor.close()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
