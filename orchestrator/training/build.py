"""The session of a job: the module, its first weights, its loss, and the engine that splits it by the plan's strategy."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from orchestrator.models.architecture import Architecture
from orchestrator.models.decoder import Decoder
from orchestrator.models.lora import Lora
from orchestrator.spec.job import Job
from orchestrator.spec.sections import ModelSpec
from orchestrator.training.assignment import Assignment
from orchestrator.training.first_weights import first_weights
from orchestrator.training.losses import DpoLoss, RewardLoss
from strategies.engines.engine import Loss, OptimizerSettings, Session
from strategies.engines.loss import TokenLoss
from strategies.engines.native import build_session as build_native
from strategies.strategy import Strategy
from strategies.zero.states import DTYPES


def build(assignment: Assignment, job: Job, device: torch.device) -> Session:
    """The session of the model that a job trains."""
    values, loss = job.task == "reward", loss_of(job)
    return session_of(
        job, job.model, job.architecture, assignment.strategy, device, values=values, loss=loss, lora=job.lora
    )


def session_of(
    job: Job,
    model: ModelSpec,
    architecture: Architecture,
    strategy: Strategy,
    device: torch.device,
    *,
    values: bool,
    loss: Loss,
    lora: Lora | None = None,
) -> Session:
    """A module on the meta device, split by the engine, filled a parameter at a time: never whole in memory twice.

    Args:
        model: where its first weights come from.
        values: it tells a number for each token, and no next one.
    """
    with torch.device("meta"), LeftAsTheyAre():
        module = Decoder(architecture, attention=strategy.attention, values=values, lora=lora)
    optimizer = job.training.optimizer
    build_session: Any = build_native
    if strategy.engine != "native":
        build_session = import_module(f"strategies.engines.{strategy.engine}").build_session
    session: Session = build_session(
        module,
        strategy=strategy,
        precision=job.training.precision,
        weights=first_weights(model, architecture, job.directory, job.training.seed),
        optimizer=OptimizerSettings(
            name=optimizer.name,
            betas=optimizer.betas,
            epsilon=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            gradient_clip=optimizer.gradient_clip,
        ),
        device=device,
        deterministic=job.training.deterministic,
        loss=loss,
    )
    return session


def frozen(job: Job, model: ModelSpec, architecture: Architecture, device: torch.device, *, values: bool) -> Decoder:
    """A whole model that is not trained, in the precision of the training, filled a parameter at a time."""
    with torch.device("meta"), LeftAsTheyAre():
        module = Decoder(architecture, values=values)
    module = module.to(DTYPES[job.training.precision]).to_empty(device=device).eval().requires_grad_(False)
    weights = first_weights(model, architecture, job.directory, job.training.seed)
    for name, parameter in module.named_parameters():
        parameter.copy_(weights(name, parameter.shape))
    return module


def loss_of(job: Job) -> Loss:
    """Return what the job's task trains."""
    if job.task == "reward":
        return RewardLoss()
    if job.task == "dpo":
        return DpoLoss(beta=job.training.dpo_beta)
    return TokenLoss(job.training.z_loss)


class LeftAsTheyAre(TorchFunctionMode):
    """Leaves out torch's own first values: all are read or drawn afterwards, and on the meta device normal_ alone would
    import torch._dynamo, 0.7 s of every start."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))
