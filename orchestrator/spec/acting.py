"""What acts on each field of a job, and which values nothing acts on yet.

`ACTS` names the function, as text, so that the core imports no runtime. `unbuilt` lists what a job asks for and nobody does:
`run` refuses it before anything starts, `validate` and `plan` note it. A value that a job does not write is never refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from orchestrator.spec.errors import ErrorEntry, Fault, Keys, SpecError, dotted, place
from orchestrator.spec.job import Job
from orchestrator.spec.sections import ModelSpec
from strategies.catalog import unbuilt_pins

_MODEL, _SHAPE = "orchestrator.spec.resolve:resolve_model", "orchestrator.spec.resolve:SHAPE"
_BASE, _PARTS = "clusters.describe:_base", "clusters.describe:_overridden"
_OPTIMIZER, _RATE = "orchestrator.training.build:session_of", "orchestrator.training.resume:rate_of"
_TARGETS = "orchestrator.planner.reasons.targets:wanted_of"
_PROBLEM, _STEPS = "orchestrator.planner.problem:Problem", "orchestrator.spec.job:Job"

_LEARN = "orchestrator.training.ppo.session:PpoSession"
_CHECKPOINT = "orchestrator.training.first_weights:named_checkpoint"
_ROLES = ("reward", "critic", "reference")
"""Models that a job of task ppo names beside the one that it trains."""
_SHAPE_WORDS = (
    "family", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_size", "vocab_size", "max_position",
    "tied_embeddings", "variant",
)  # fmt: skip
"""Keys of a model that give its shape."""

ACTS: Mapping[str, str] = {
    "version": _STEPS,
    "name": "orchestrator.control.run:run_job",
    "model.name": _MODEL,
    "model.path": _MODEL,
    **{f"model.{word}": _SHAPE for word in _SHAPE_WORDS},
    "model.initialize": _STEPS,
    "data.train": "orchestrator.training.prepare:request_of",
    "data.validation": "orchestrator.training.prepare:request_of",
    "data.tokenizer": "orchestrator.training.prepare:request_of",
    "data.tokenizer.bpe": "orchestrator.training.prepare:request_of",
    "data.template": "orchestrator.training.inputs:request_of",
    "data.on_bad": "orchestrator.training.inputs:request_of",
    "model.checkpoint": _CHECKPOINT,
    **{f"ppo.{role}.{word}": _SHAPE for role in _ROLES for word in _SHAPE_WORDS},
    **{f"ppo.{role}.{word}": _MODEL for role in _ROLES for word in ("name", "path")},
    **{f"ppo.{role}.checkpoint": _CHECKPOINT for role in _ROLES},
    **{f"ppo.{role}.initialize": "orchestrator.spec.sections:ModelSpec" for role in _ROLES},
    "ppo.response_length": "orchestrator.spec.ppo_section:PpoSpec",
    **{f"ppo.{word}": _LEARN for word in ("epochs", "minibatches")},
    **{f"ppo.{word}": f"{_LEARN}.learn" for word in ("gamma", "lam", "normalize_rewards", "reward_clip")},
    "ppo.whiten_advantages": f"{_LEARN}.learn",
    **{f"ppo.kl.{word}": _LEARN for word in ("coefficient", "target", "horizon")},
    **{f"ppo.{word}": "orchestrator.training.ppo.loop:learner_of" for word in ("clip_range", "value_clip_range")},
    "ppo.critic_learning_rate": "orchestrator.training.worker:settings_of",
    "batch.global_batch_size": "orchestrator.training.worker:set_up",
    "batch.sequence_length": "orchestrator.training.worker:datasets_of",
    "training.steps": _STEPS,
    "training.tokens": _STEPS,
    "training.precision": _OPTIMIZER,
    "training.optimizer.name": _OPTIMIZER,
    "training.optimizer.learning_rate": _RATE,
    **{f"training.optimizer.{word}": _OPTIMIZER for word in ("betas", "epsilon", "weight_decay", "gradient_clip")},
    **{f"training.schedule.{word}": _RATE for word in ("name", "warmup_steps", "final_fraction")},
    "training.seed": "orchestrator.training.worker:set_up",
    "training.evaluate_every": "orchestrator.training.loop:Loop",
    "training.compile": _STEPS,
    "training.z_loss": "orchestrator.training.build:loss_of",
    "training.dpo_beta": "orchestrator.training.build:loss_of",
    "training.deterministic": _OPTIMIZER,
    **{f"training.lora.{word}": "orchestrator.models.lora:Lora" for word in ("rank", "alpha", "targets")},
    **{f"cluster.{word}": _BASE for word in ("gpu", "nodes", "gpus_per_node")},
    **{f"cluster.{word}": _PARTS for word in ("intra_node", "inter_node_gbps", "inter_node_measured_gbps")},
    **{f"cluster.{word}": _PARTS for word in ("host_memory_gib", "nvme_gib", "usd_per_gpu_hour")},
    "strategy.engine": _OPTIMIZER,
    "strategy.data_parallel_degree": "orchestrator.training.worker:share_of",
    "strategy.tensor_parallel_degree": "strategies.tensor.apply:apply",
    "strategy.pipeline_parallel_degree": "strategies.pipeline.apply:cut",
    "strategy.context_parallel_degree": "strategies.context.apply:apply",
    "strategy.expert_parallel_degree": "orchestrator.spec.sections:StrategySpec",
    "strategy.num_virtual_stages": "strategies.pipeline.apply:_check",
    "strategy.pipeline_schedule": "strategies.pipeline.runner:PipelineRunner",
    "strategy.sequence_parallel": "strategies.tensor.apply:apply",
    "strategy.zero_stage": "strategies.zero.apply:apply",
    "strategy.zero_group_size": "strategies.engines.mesh:lay",
    "strategy.states": "strategies.zero.apply:apply",
    "strategy.gather": "strategies.zero.fsdp:FsdpStates",
    "strategy.reduce": "strategies.zero.fsdp:FsdpStates",
    "strategy.mesh_order": "strategies.strategy:Strategy",
    "strategy.activation_checkpointing": "strategies.recompute.apply:apply",
    "strategy.num_checkpointed_layers_per_stage": "strategies.recompute.apply:apply",
    "strategy.offload.optimizer": "strategies.offload.apply:apply",
    "strategy.offload.parameters": "strategies.offload.apply:apply",
    "strategy.offload.activations": "strategies.offload.apply:apply",
    "strategy.offload.optimizer_fraction": "strategies.offload.apply:apply",
    "strategy.micro_batch_size": "orchestrator.training.worker:share_of",
    "strategy.gradient_accumulation_steps": "orchestrator.planner.problem:check_batch",
    "strategy.attention": "orchestrator.training.build:session_of",
    "strategy.compile": "strategies.recompute.apply:apply",
    "objective": _PROBLEM,
    "targets.tokens_per_second_per_gpu": _TARGETS,
    "targets.tolerance": _TARGETS,
    "targets.budget_usd": _TARGETS,
    "targets.finish_within": _TARGETS,
    "checkpoint.directory": "orchestrator.control.run:run_job",
    "checkpoint.every": "orchestrator.training.worker:settings_of",
    "checkpoint.keep": "orchestrator.training.worker:settings_of",
    "recovery.max_restarts": "orchestrator.control.recovery:on_failure",
    "recovery.on_oom": "orchestrator.control.recovery:on_failure",
    **{f"queue.{word}": "orchestrator.control.controller:submit" for word in ("priority", "preemptible", "max_wait")},
}
"""Field, dotted -> the function or class that acts on it in a run, `module:name`; its source speaks of the field."""


def _eight_bit(job: Job) -> bool:
    return job.training.optimizer.name == "adamw_8bit"


@dataclass(frozen=True, kw_only=True, slots=True)
class Unbuilt:
    """Values of one field that nothing acts on."""

    keys: Keys
    asked: Callable[[Job], bool]
    """Whether the job writes such a value."""
    told: str
    """What follows, after "`field` is VALUE"."""
    fix: str


def _drops(job: Job, *, role: str) -> bool:
    model: ModelSpec | None = None if job.ppo is None else getattr(job.ppo, role)
    return model is not None and model.dropout > 0


UNBUILT: tuple[Unbuilt, ...] = (
    Unbuilt(
        keys=("task",),
        asked=lambda job: job.task in ("sft", "reward", "dpo", "ppo") and job.architecture.traits.blank_filling,
        told="family glm learns by filling blanks, and samples that share a row have none",
        fix="task: pretrain, or a model of another family",
    ),
    Unbuilt(
        keys=("data", "template"),
        asked=lambda job: job.task == "pretrain" and job.data is not None and job.data.wrote("template"),
        told="task pretrain reads text, and no template is applied to it",
        fix="leave template out, or task: sft",
    ),
    Unbuilt(
        keys=("data", "on_bad"),
        asked=lambda job: job.task == "pretrain" and job.data is not None and job.data.wrote("on_bad"),
        told="task pretrain reads text, of which no record can be bad",
        fix="leave on_bad out",
    ),
    Unbuilt(
        keys=("training", "dpo_beta"),
        asked=lambda job: job.task != "dpo" and job.training.wrote("dpo_beta"),
        told="only task dpo has it",
        fix="leave dpo_beta out, or task: dpo",
    ),
    Unbuilt(
        keys=("training", "lora", "rank"),
        asked=lambda job: job.lora is not None and job.task == "ppo",
        told="adapters are not built for ppo: whoever writes responses would need them merged",
        fix="leave lora out, or train by dpo",
    ),
    Unbuilt(
        keys=("training", "lora", "rank"),
        asked=lambda job: job.lora is not None and job.model.checkpoint is not None,
        told="adapters stand beside the weights of a Hugging Face folder, not of a checkpoint",
        fix="`shardwise convert` the checkpoint and name the folder, model: {path: FOLDER}, or leave lora out",
    ),
    Unbuilt(
        keys=("training", "lora", "rank"),
        asked=lambda job: job.lora is not None and job.task != "ppo" and not job.initializes_from_weights,
        told="adapters stand beside weights that stay as they are, and this job's are random",
        fix="name a trained model, `model: {path: FOLDER}`, or leave lora out",
    ),
    Unbuilt(
        keys=("training", "lora", "dropout"),
        asked=lambda job: job.training.lora is not None and job.training.lora.dropout > 0,
        told="dropout is not built: a run would train without it",
        fix="dropout: 0, or leave it out",
    ),
    Unbuilt(
        keys=("strategy", "engine"),
        asked=lambda job: job.lora is not None and job.strategy.engine in ("colossalai", "fairscale"),
        told="adapters beside frozen weights are trained on the native engine alone",
        fix="engine: native, or leave training.lora out",
    ),
    Unbuilt(
        keys=("training", "optimizer", "name"),
        asked=lambda job: _eight_bit(job) and job.training.precision == "fp64",
        told="its kernels step fp32 masters, and fp64 is for proofs",
        fix="precision: fp32, or name: adamw",
    ),
    Unbuilt(
        keys=("strategy", "engine"),
        asked=lambda job: _eight_bit(job) and job.strategy.engine in ("colossalai", "fairscale"),
        told="8-bit moments are the native engine's alone",
        fix="engine: native, or training.optimizer.name: adamw",
    ),
    Unbuilt(
        keys=("strategy", "offload", "optimizer"),
        asked=lambda job: (
            _eight_bit(job) and job.strategy.offload is not None and job.strategy.offload.optimizer != "none"
        ),
        told="the optimizer that runs on the host has 32-bit moments",
        fix="offload: none, or training.optimizer.name: adamw",
    ),
    Unbuilt(
        keys=("training", "z_loss"),
        asked=lambda job: job.task in ("reward", "dpo", "ppo") and job.training.z_loss > 0,
        told="the loss of this task is no cross entropy of tokens, to which it could be added",
        fix="leave z_loss out",
    ),
    Unbuilt(
        keys=("strategy", "engine"),
        asked=lambda job: job.task != "pretrain" and job.strategy.engine in ("colossalai", "fairscale"),
        told="samples that share a row are kept apart on the native engine alone",
        fix="engine: native, or leave it out",
    ),
    Unbuilt(
        keys=("model", "dropout"),
        asked=lambda job: job.model.dropout > 0,
        told="dropout is not built: a run would train without it, and a plan counts no masks",
        fix="dropout: 0, or leave it out",
    ),
    *(
        Unbuilt(
            keys=("ppo", role, "dropout"),
            asked=partial(_drops, role=role),
            told="dropout is not built",
            fix="dropout: 0, or leave it out",
        )
        for role in _ROLES
    ),
    Unbuilt(
        keys=("training", "compile"),
        asked=lambda job: job.training.compile == "auto",
        told="nothing measures yet where torch.compile pays: nothing would be compiled",
        fix="compile: true or false",
    ),
    Unbuilt(
        keys=("training", "deterministic"),
        asked=lambda job: job.training.deterministic and job.strategy.engine in ("colossalai", "fairscale"),
        told="the engine that strategy.engine names reduces gradients in the order of arrival",
        fix="deterministic: false, or engine: native",
    ),
    Unbuilt(
        keys=("training", "evaluate_every"),
        asked=lambda job: job.training.evaluate_every is not None and job.data is not None and job.data.validation == 0,
        told="data.validation is 0: there is no text to evaluate on, and no evaluation would come",
        fix="leave evaluate_every out, or set data.validation to files or to a fraction such as 0.005",
    ),
    Unbuilt(
        keys=("strategy", "tensor_parallel_degree"),
        asked=lambda job: job.architecture.num_kv_heads % (job.strategy.tensor_parallel_degree or 1) != 0,
        told="it does not divide model.num_kv_heads, and copying key and value heads is priced, not built",
        fix="a degree that divides the key and value heads",
    ),
    Unbuilt(
        keys=("strategy", "engine"),
        asked=lambda job: (
            job.strategy.engine == "colossalai"
            and job.architecture.family != "opt"
            and max(job.strategy.tensor_parallel_degree or 1, job.strategy.pipeline_parallel_degree or 1) > 1
        ),
        told="with tensor or pipeline parallelism it splits Hugging Face's modules, and only that of family opt",
        fix="engine: native, or a model of family opt",
    ),
    Unbuilt(
        keys=("strategy", "sequence_parallel"),
        asked=lambda job: (
            bool(job.strategy.sequence_parallel)
            and job.batch.sequence_length % (job.strategy.tensor_parallel_degree or 1) != 0
        ),
        told="tensor_parallel_degree does not divide batch.sequence_length, and padding a sequence is not built",
        fix="sequence_parallel: false, or a sequence_length that the degree divides",
    ),
    Unbuilt(
        keys=("strategy", "num_checkpointed_layers_per_stage"),
        asked=lambda job: (
            bool(job.strategy.num_checkpointed_layers_per_stage) and job.strategy.activation_checkpointing == "none"
        ),
        told="activation_checkpointing is none: no layer would be computed again",
        fix="activation_checkpointing: full or selective, or leave the number out",
    ),
    Unbuilt(
        keys=("strategy", "reduce"),
        asked=lambda job: (
            job.strategy.reduce == "per_micro_batch"
            and job.strategy.zero_stage in (0, 1)
            and job.strategy.engine in (None, "native")
            and job.strategy.gradient_accumulation_steps != 1
        ),
        told="at zero_stage 0 and 1 the native engine reduces gradients once a step, since they stand whole anyway",
        fix="reduce: per_step, or leave it out",
    ),
    Unbuilt(
        keys=("strategy", "offload", "optimizer_fraction"),
        asked=lambda job: job.strategy.offload is not None and job.strategy.offload.optimizer_fraction == 0,
        told="no part of the optimizer states leaves the GPU",
        fix="offload: none, or a fraction above 0",
    ),
    Unbuilt(
        keys=("targets", "for"),
        asked=lambda job: job.targets.for_ is not None,
        told="nothing waits for a target to be missed so long: a run shows its speed against the target all the time",
        fix="leave `for` out",
    ),
    Unbuilt(
        keys=("recovery", "on_oom"),
        asked=lambda job: job.recovery.on_oom != "stop",
        told="replanning is not built: out of memory, the run stops and says what needs less",
        fix="on_oom: stop, or leave it out",
    ),
    Unbuilt(
        keys=("recovery", "on_lost_gpus"),
        asked=lambda job: job.recovery.on_lost_gpus != "stop",
        told="a run on other GPUs is not built: where its GPUs do not come back, the run stops",
        fix="on_lost_gpus: stop, or leave it out",
    ),
    Unbuilt(
        keys=("recovery", "on_loss_spike"),
        asked=lambda job: job.recovery.on_loss_spike is not None,
        told="nothing looks for a jump of the loss: a loss that is not finite stops the run, any other goes on",
        fix="leave on_loss_spike out",
    ),
)
"""What `run` refuses until it is built. An issue that builds one deletes its row and adds the field to ACTS."""


def unbuilt(job: Job) -> list[ErrorEntry]:
    """Return all that the job writes and nothing acts on, each with its place and its fix."""
    return [job.entry(fault) for fault in _faults(job)]


def refuse_unbuilt(job: Job) -> None:
    """Raise SpecError with all of unbuilt(job), where there is any."""
    if entries := unbuilt(job):
        raise SpecError(entries)


def notes(job: Job) -> list[str]:
    """Return a sentence for a plan's reader for each of unbuilt(job)."""
    return [f"{entry['message']}; `run` refuses it ({place(entry)})" for entry in unbuilt(job)]


def _faults(job: Job) -> Iterator[Fault]:
    from orchestrator.spec.messages import flow

    for row in UNBUILT:
        if row.asked(job):
            value: Any = job.model_dump(mode="json", by_alias=True)
            for key in row.keys:
                value = value[key]
            yield Fault(path=row.keys, message=f"`{dotted(row.keys)}` is {flow(value)}: {row.told}", fix=row.fix)
    for name, limit in unbuilt_pins(job.pins):
        path: Keys = ("training", name) if name == "compile" and job.strategy.compile is None else ("strategy", name)
        native = job.strategy.engine in (None, "native")
        fix = f"leave {name} out and let the planner choose" + ("" if native else ", or set engine: native")
        yield Fault(path=path, message=f"`{dotted(path)}` is {_said(job, name)}: {limit.reason}", fix=fix)


def _said(job: Job, name: str) -> str:
    from orchestrator.spec.messages import flow

    value = job.pins[name]
    if name != "offload":
        return flow(value)
    return "of " + ", ".join(
        kind for kind in ("optimizer", "parameters", "activations") if getattr(value, kind) != "none"
    )
