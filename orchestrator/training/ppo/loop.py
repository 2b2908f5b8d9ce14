"""Task ppo in the training loop: its session from the job, its step from the prompts of the global batch, its evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.models.decoder import Decoder
from orchestrator.spec.job import Job
from orchestrator.training.assignment import Assignment
from orchestrator.training.batches import Batch, Share
from orchestrator.training.build import frozen, session_of
from orchestrator.training.data import Dataset
from orchestrator.training.loop import Loop
from orchestrator.training.ppo.losses import PolicyLoss, ValueLoss
from orchestrator.training.ppo.session import PpoSession, Writing
from orchestrator.training.tokenizer import check_vocabulary
from strategies.engines.engine import Evaluation, StepResult
from strategies.pipeline.stages import cut
from strategies.strategy import Strategy


def learner_of(assignment: Assignment, job: Job, device: torch.device, share: Share, prompts: Dataset) -> PpoSession:
    """The four models of a ppo job on this rank. ValueError where the user has something to mend. Collective."""
    spec, strategy = job.ppo, assignment.strategy
    assert spec is not None
    if strategy.pipeline_parallel_degree > 1:
        raise ValueError(
            "task ppo refuses pipelines: a response is written token by token; pipeline_parallel_degree: 1"
        )
    of_critic, of_reward = job.architecture_of(spec.of_critic), job.architecture_of(spec.reward)
    of_reference = job.architecture_of(spec.reference or job.model)
    tokenizer = prompts.index.tokenizer
    for arch in (of_critic, of_reward, of_reference):
        check_vocabulary(prompts.index.vocab_size, arch.vocab_size)
    if of_critic.num_kv_heads % strategy.tensor_parallel_degree:
        raise ValueError(
            f"tensor_parallel_degree {strategy.tensor_parallel_degree} does not divide the critic's {of_critic.num_kv_heads} key "
            "and value heads: pin a degree that does"
        )
    actor = session_of(
        job, job.model, job.architecture, strategy, device, values=False, loss=PolicyLoss(spec.clip_range)
    )
    critic = session_of(
        job,
        spec.of_critic,
        of_critic,
        _of_critic(strategy, of_critic.num_layers),
        device,
        values=True,
        loss=ValueLoss(spec.value_clip_range),
    )
    whole: Decoder | None = None
    if not _is_whole(strategy):
        whole = frozen(job, job.model, job.architecture, device, values=False)
    length = job.batch.sequence_length
    return PpoSession(
        spec,
        actor=actor,
        critic=critic,
        reference=frozen(job, spec.reference or job.model, of_reference, device, values=False),
        reward=frozen(job, spec.reward, of_reward, device, values=True),
        whole=whole,
        share=share,
        tensor_rank=strategy.degrees.coordinates(assignment.rank)["tensor"],
        writing=Writing(
            seed=job.training.seed,
            response_length=spec.response_tokens(length),
            sequence_length=length,
            vocab_size=prompts.index.vocab_size,
            end_of_text=int(cast("Any", tokenizer["end_of_text"])),
        ),
    )


def _is_whole(strategy: Strategy) -> bool:
    """Whether the actor's own module can write: no parameter is split or elsewhere, and no block runs otherwise than plainly."""
    split = strategy.zero_stage >= 2 or strategy.tensor_parallel_degree > 1
    plain = strategy.activation_checkpointing == "none" and not strategy.compile and not strategy.offload.any
    return plain and not split


def _of_critic(strategy: Strategy, num_layers: int) -> Strategy:
    """The actor's strategy for a critic of another depth."""
    if not strategy.stages:
        return strategy
    again = strategy.stages[0]
    all_of_them = again.num_checkpointed_layers == again.num_layers
    checkpointed = None if all_of_them else again.num_checkpointed_layers
    return replace(strategy, stages=cut(num_layers, 1, 1, False, 0.0, checkpointed))


class PpoLoop(Loop):
    """The loop of task ppo: a batch holds prompts."""

    session: PpoSession  # type: ignore[assignment]

    def _train(self, batch: Batch) -> StepResult:
        prompts_GP, lengths_G = prompts_of(self.batches.dataset, batch.indices)
        return self.session.learn(
            prompts_GP,
            lengths_G,
            step=batch.step,
            learning_rate=self.settings.learning_rate(batch.step),
            critic_learning_rate=self.settings.critic_learning_rate(batch.step),
        )

    def _evaluated(self, dataset: Dataset, indices: NDArray[np.int64]) -> Evaluation:
        found = self.session.judge(*prompts_of(dataset, indices))
        count = len(indices)
        metrics = {name: value * count for name, value in found.items()}
        return Evaluation(loss=-metrics["reward"], num_targets=count, metrics=metrics)


def prompts_of(dataset: Dataset, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(prompts, their lengths): each stands alone in its row, which goes on with padding."""
    ids, _ = dataset.sequences(indices)
    lengths = (dataset.inputs(indices)["segment_ids_BS"] == 0).sum(1)
    return ids[:, : int(lengths.max())], lengths
