"""What each key may say alone, but not together. Each check takes what it needs and gives faults; what is merely slow
or wasteful (a padded vocabulary, uneven stages, an idle GPU) is priced by the planner, with a note."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from orchestrator.models.architecture import Architecture
from orchestrator.models.lora import sizes
from orchestrator.spec.errors import Fault, Keys
from orchestrator.spec.ppo_section import PpoSpec
from orchestrator.spec.resolve import NEEDED, SHAPE
from orchestrator.spec.sections import (
    BatchSpec,
    BpeTokenizer,
    ClusterSpec,
    DataSpec,
    ModelSpec,
    StrategySpec,
    TrainingSpec,
)
from strategies.strategy import MESH_ORDER

if TYPE_CHECKING:
    from clusters.cluster import Cluster


def check_model(model: ModelSpec) -> Iterator[Fault]:
    """One way of saying the model, and all of it."""
    shape = [word for word in SHAPE if getattr(model, word) is not None]
    ways = [f"`{word}`" for word in ("name", "path") if getattr(model, word) is not None]
    ways += [f"a shape (`{shape[0]}`, ...)"] if shape else []
    if len(ways) > 1:
        yield Fault(
            path=("model",),
            message=f"`model` says what it is in {len(ways)} ways, {' and '.join(ways)}; which one holds is open",
            fix="keep one of them: a catalog name, a path, or a shape",
        )
    elif model.path is not None and model.checkpoint is not None:
        yield Fault(
            path=("model", "checkpoint"),
            message="`model` names two weights, a `path` and a `checkpoint`; from which training starts is open",
            fix="keep one of them",
        )
    elif not ways and model.checkpoint is None:
        yield Fault(
            path=("model",),
            message="`model` names no model",
            fix="write a catalog name (`model: opt-1.3b`), a `path`, a `checkpoint`, or a shape (`family`, `num_layers`, ...)",
        )
    elif shape:
        missing = [word for word in NEEDED if word not in shape]
        if missing:
            yield Fault(
                path=("model",),
                message=f"`model` gives a shape without {', '.join(f'`{word}`' for word in missing)}",
                fix=f"add {' and '.join(f'`{word}:`' for word in missing)}, or use a catalog name (`model: opt-1.3b`)",
            )
    if model.initialize == "weights" and model.path is None and model.checkpoint is None and len(ways) == 1:
        yield Fault(
            path=("model", "initialize"),
            message="`model.initialize` is weights, but there are no weights: `model` has no `path` and no `checkpoint`",
            fix="give `path: FOLDER`, or `initialize: random`",
        )


def check_data(data: DataSpec) -> Iterator[Fault]:
    if isinstance(data.validation, tuple) and set(data.validation) & set(data.train):
        both = sorted(set(data.validation) & set(data.train))[0]
        yield Fault(
            path=("data", "validation"),
            message=f"`data.validation` holds {both}, which is trained on: its loss would say nothing",
            fix="name other files, or a fraction such as 0.005",
        )


BYTE_TOKENS = 257
"""The 256 bytes and the end of a text."""
_BPE: Keys = ("data", "tokenizer", "bpe")


def check_vocabulary(data: DataSpec, model: ModelSpec, shape: Architecture) -> Iterator[Fault]:
    """Tokens that the model has no row for, as far as the job tells them: a folder's tokenizer is looked at when it is read."""
    tokenizer, written = data.tokenizer, data.wrote("tokenizer")
    if not written and (model.path is not None or model.checkpoint is not None):
        return
    if isinstance(tokenizer, BpeTokenizer):
        needed, path = tokenizer.bpe, _BPE
        said = f"`data.tokenizer` learns {needed} tokens"
    elif tokenizer == "byte":
        needed, path = BYTE_TOKENS, _BPE[:2] if written else _BPE[:1]
        said = f"`data.tokenizer` is byte{'' if written else ' where the job does not say it'}, {needed} tokens"
    else:
        return
    smaller = f", or a tokenizer of {shape.vocab_size} tokens or fewer" if shape.vocab_size >= BYTE_TOKENS else ""
    if needed > shape.vocab_size:
        yield Fault(
            path=path,
            message=f"{said}, but the model's vocabulary has {shape.vocab_size}; the rest would have no row",
            fix=f"a model with vocab_size {-(-needed // 8) * 8} or more{smaller}",
        )
    elif needed < BYTE_TOKENS:
        yield Fault(
            path=path,
            message=f"{said}; a byte-level vocabulary begins with the {BYTE_TOKENS - 1} bytes and the end of a text",
            fix=f"write `bpe: {BYTE_TOKENS}` or more",
        )


def check_training(training: TrainingSpec) -> Iterator[Fault]:
    if training.steps is not None and training.tokens is not None:
        yield Fault(
            path=("training", "tokens"),
            message="`training` gives both `steps` and `tokens`; which one ends the run is open",
            fix="keep one of the two lines",
        )


def check_compile(training: TrainingSpec, strategy: StrategySpec) -> Iterator[Fault]:
    if training.wrote("compile") and strategy.compile is not None and training.compile is not strategy.compile:
        yield Fault(
            path=("training", "compile"),
            message=f"`training.compile` and `strategy.compile: {str(strategy.compile).lower()}` contradict each other",
            fix="keep one of the two lines",
        )


def check_cluster(cluster: ClusterSpec) -> Iterator[Fault]:
    if cluster.inter_node_gbps is not None and cluster.inter_node_measured_gbps is not None:
        yield Fault(
            path=("cluster", "inter_node_measured_gbps"),
            message="`cluster` gives both a line rate and a measured rate between nodes; they exclude each other",
            fix="keep `inter_node_gbps` (line rate) or `inter_node_measured_gbps` (used as it is)",
        )


def check_precision(training: TrainingSpec, cluster: Cluster) -> Iterator[Fault]:
    gpu = cluster.accelerator
    if gpu.kind != "cuda" or not gpu.peak_flops or training.precision in gpu.peak_flops:
        return
    usual = next((dtype for dtype in ("bf16", "fp16", "fp32") if dtype in gpu.peak_flops), "fp32")
    written = training.wrote("precision")
    said = f"`training.precision` is {training.precision}{'' if written else ' where the job does not say it'}"
    yield Fault(
        path=("training", "precision") if written else ("cluster",),
        message=f"{said}, which {gpu.name} has no units for",
        fix=f"write `precision: {usual}`, or choose another cluster",
    )


def check_shape(batch: BatchSpec, shape: Architecture) -> Iterator[Fault]:
    if batch.sequence_length > shape.max_position and shape.traits.positions == "learned":
        yield Fault(
            path=("batch", "sequence_length"),
            message=f"`batch.sequence_length` is {batch.sequence_length}, but {shape.name or 'the model'} has learned "
            f"positions for {shape.max_position} tokens; the rest would have none",
            fix=f"write `sequence_length: {shape.max_position}` or less, or give the shape inline with a larger `max_position`",
        )


def check_lora(training: TrainingSpec, shape: Architecture) -> Iterator[Fault]:
    """Adapters on layers that the model has, small enough to be any use."""
    if training.lora is None or training.lora.targets == "all-linear":
        return
    known = sizes(shape)
    for place, target in enumerate(training.lora.targets):
        if target not in known:
            yield Fault(
                path=("training", "lora", "targets", place),
                message=f"`training.lora.targets` names {target}, but family {shape.family} has no such layer in a block",
                fix=f"choose among {', '.join(known)}",
            )


def check_ppo(task: str | None, ppo: PpoSpec | None, batch: BatchSpec | None) -> Iterator[Fault]:
    """Task and section belong together, and a step's responses can be written and split."""
    if task is not None and (task == "ppo") != (ppo is not None):
        named = task == "ppo"
        yield Fault(
            path=("task",) if named else ("ppo",),
            message="`task` is ppo, and no `ppo` names the reward model"
            if named
            else f"`task` is {task}, and only task ppo reads `ppo`; nothing would come of it",
            fix="add `ppo: {reward: {checkpoint: runs/reward}}`" if named else "delete it, or write `task: ppo`",
        )
    if ppo is None or batch is None:
        return
    if ppo.response_tokens(batch.sequence_length) >= batch.sequence_length or batch.sequence_length < 2:
        yield Fault(
            path=("ppo", "response_length"),
            message=f"`ppo.response_length` is {ppo.response_length}, which leaves a prompt nothing of "
            f"batch.sequence_length {batch.sequence_length}",
            fix=f"write `response_length: {max(1, batch.sequence_length // 2)}`, or a longer sequence",
        )
    if ppo.minibatches > batch.global_batch_size:
        yield Fault(
            path=("ppo", "minibatches"),
            message=f"`ppo.minibatches` is {ppo.minibatches}, more than the {batch.global_batch_size} responses of a step",
            fix=f"write `minibatches: {batch.global_batch_size}` or fewer",
        )


def check_ppo_split(strategy: StrategySpec, task: str | None) -> Iterator[Fault]:
    """A response is written token by token: no pipeline, and its weights must be whole once a step."""
    degree = strategy.pipeline_parallel_degree
    if task == "ppo" and degree is not None and degree > 1:
        yield Fault(
            path=("strategy", "pipeline_parallel_degree"),
            message=f"`strategy.pipeline_parallel_degree` is {degree}, and task ppo refuses pipelines: a response is written "
            "token by token through all layers, so that all stages but one would wait",
            fix="pipeline_parallel_degree: 1, or leave it out; zero_stage: 3 or tensor_parallel_degree share the weights",
        )


def check_split(strategy: StrategySpec, shape: Architecture) -> Iterator[Fault]:
    """Heads and layers over the GPUs that share them."""
    tensor, pipeline = strategy.tensor_parallel_degree or 1, strategy.pipeline_parallel_degree or 1
    if shape.num_heads % tensor:
        good = [degree for degree in range(1, min(shape.num_heads, 64) + 1) if shape.num_heads % degree == 0]
        yield Fault(
            path=("strategy", "tensor_parallel_degree"),
            message=f"`strategy.tensor_parallel_degree` is {tensor}, which does not divide the {shape.num_heads} heads of "
            f"{shape.name or 'the model'}; a head cannot be shared",
            fix=f"write one of {', '.join(map(str, good))}, or delete the line and let the planner choose",
        )
    stages = pipeline * (strategy.num_virtual_stages or 1)
    if stages > shape.num_layers:
        key = "pipeline_parallel_degree" if pipeline > 1 else "num_virtual_stages"
        yield Fault(
            path=("strategy", key),
            message=f"`strategy` cuts {shape.num_layers} layers into {stages} pipeline stages; some would hold none",
            fix=f"keep pipeline_parallel_degree x num_virtual_stages at {shape.num_layers} or less",
        )
    layers = strategy.num_checkpointed_layers_per_stage
    if layers is not None and layers > shape.num_layers:
        yield Fault(
            path=("strategy", "num_checkpointed_layers_per_stage"),
            message=f"`strategy.num_checkpointed_layers_per_stage` is {layers}, but the model has {shape.num_layers} layers",
            fix="delete the line to recompute all of them",
        )


def check_degrees(strategy: StrategySpec, cluster: Cluster) -> Iterator[Fault]:
    """What is pinned must fit on the GPUs there are."""
    words = [
        word
        for word in (
            "data_parallel_degree",
            "tensor_parallel_degree",
            "pipeline_parallel_degree",
            "context_parallel_degree",
        )
        if getattr(strategy, word) is not None
    ]
    product = prod(getattr(strategy, word) for word in words)
    factors = " x ".join(f"{word} {getattr(strategy, word)}" for word in words)
    if product > cluster.num_gpus:
        yield Fault(
            path=("strategy", max(words, key=lambda word: getattr(strategy, word))),
            message=f"`strategy` needs {product} GPUs ({factors}), but {cluster.name} has {cluster.num_gpus}",
            fix=f"lower one of them so that the product is at most {cluster.num_gpus}, or delete one and let the planner choose",
        )


def check_context(
    strategy: StrategySpec, task: str, batch: BatchSpec | None, shape: Architecture | None
) -> Iterator[Fault]:
    """Sequences are split where a row is one sample, into an even number of chunks."""
    degree = strategy.context_parallel_degree or 1
    if degree > 1 and task != "pretrain":
        yield Fault(
            path=("strategy", "context_parallel_degree"),
            message=f"`strategy.context_parallel_degree` is {degree}, and task {task} packs several samples into a row, which is "
            "not split",
            fix="write `context_parallel_degree: 1`, or delete the line",
        )
    elif degree > 1 and shape is not None and shape.family == "glm":
        yield Fault(
            path=("strategy", "context_parallel_degree"),
            message=f"`strategy.context_parallel_degree` is {degree}, and family glm fills blanks in rows that are not split",
            fix="write `context_parallel_degree: 1`, or delete the line",
        )
    elif degree > 1 and batch is not None and batch.sequence_length % (2 * degree):
        longer = -(-batch.sequence_length // (2 * degree)) * 2 * degree
        yield Fault(
            path=("strategy", "context_parallel_degree"),
            message=f"`strategy.context_parallel_degree` is {degree}: it cuts a sequence into {2 * degree} chunks, which "
            f"sequence_length {batch.sequence_length} does not fill evenly",
            fix=f"write a sequence_length that {2 * degree} divides, such as {longer}, or a smaller degree",
        )


def check_mesh(strategy: StrategySpec) -> Iterator[Fault]:
    order = strategy.mesh_order
    if order is not None and sorted(order) != sorted(MESH_ORDER):
        yield Fault(
            path=("strategy", "mesh_order"),
            message=f"`strategy.mesh_order` is [{', '.join(order)}]; it must hold each axis once",
            fix=f"write [{', '.join(MESH_ORDER)}] in the order you want, farthest neighbours first",
        )
    group, data, context = (
        strategy.zero_group_size,
        strategy.data_parallel_degree,
        strategy.context_parallel_degree or 1,
    )
    data = data and data * context
    if group is not None and data is not None and data % group:
        product = f" x context_parallel_degree, {data}" if context > 1 else f" {data}"
        yield Fault(
            path=("strategy", "zero_group_size"),
            message=f"`strategy.zero_group_size` is {group}, which does not divide data_parallel_degree{product}; "
            "some ranks would have no group",
            fix=f"write `zero_group_size: {_near_divisor(data, group)}`, or delete the line to share over all {data}",
        )


def check_batch(strategy: StrategySpec, batch: BatchSpec, num_gpus: int | None) -> Iterator[Fault]:
    """global <= micro x accumulation x dp < global + micro x dp: the last micro batch of a replica may be short, none may
    be empty on all of them. Two of the three leave the third to be found."""
    total, accumulation = batch.global_batch_size, strategy.gradient_accumulation_steps
    micro, data = strategy.micro_batch_size, strategy.data_parallel_degree
    if accumulation is None:
        return
    pinned = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation, "data_parallel_degree": data}
    said = " x ".join(f"{word} {value}" for word, value in pinned.items() if value is not None)
    pass_size = (micro or 1) * (data or 1)  # sequences of one micro batch over all replicas, as far as pinned
    if micro is None or data is None:
        pass_size *= -(-total // (accumulation * pass_size))  # the free one, at its smallest
    if pass_size * (accumulation - 1) >= total:
        wanted = -(-total // pass_size)
        yield Fault(
            path=("strategy", "gradient_accumulation_steps"),
            message=f"`strategy` pins {said}, more than global_batch_size {total} needs: whole micro batches would be empty",
            fix=f"write `gradient_accumulation_steps: {wanted}`, or delete the line and let it follow",
        )
    elif pass_size * accumulation < total:
        wanted = -(-total // pass_size)
        yield Fault(
            path=("strategy", "gradient_accumulation_steps"),
            message=f"`strategy` pins {said} = {pass_size * accumulation} sequences a step, fewer than "
            f"global_batch_size {total}; the rest would never be read",
            fix=f"write `gradient_accumulation_steps: {wanted}`, or delete the line and let it follow",
        )
    elif micro is not None and data is None and num_gpus is not None:
        others = (strategy.tensor_parallel_degree or 1) * (strategy.pipeline_parallel_degree or 1)
        replicas = pass_size // micro
        if replicas * others > num_gpus:
            yield Fault(
                path=("strategy", "gradient_accumulation_steps"),
                message=f"`strategy` pins {said}: global_batch_size {total} then needs {replicas} replicas on "
                f"{replicas * others} GPUs, and there are {num_gpus}",
                fix="delete `gradient_accumulation_steps` and let it follow",
            )


def _near_divisor(whole: int, part: int) -> int:
    return max(divisor for divisor in range(1, min(whole, part) + 1) if whole % divisor == 0)
