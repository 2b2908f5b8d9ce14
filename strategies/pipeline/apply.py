"""Pipeline parallelism, done to a module: `cut` leaves a rank the parameters of its stages, `schedule` says who runs them.

Parameters keep their names: a block is called by its place in the whole model. The module brings `embed`, `blocks`, `head`,
`hidden_size` and `shared`, the parameters of the embedding that the head uses too. Where the head stands on another rank
than the embedding, that rank holds its own copy of them: one parameter, whose gradients are added once a step, after the
reduction over replicas and before clipping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from strategies.engines.engine import Build
from strategies.pipeline.messages import Channel, pipeline_of
from strategies.pipeline.runner import PipelineRunner, PlainRunner
from strategies.pipeline.schedules import stage_rank
from strategies.strategy import SPLIT_BACKWARD, Stage, Strategy
from strategies.tensor.region import WHOLE, Region


def cut(build: Build) -> Build:
    """Drops what other ranks hold. Raises ValueError for stages that do not make up the model."""
    strategy, module = build.strategy, build.module
    if strategy.pipeline_parallel_degree == 1:
        return build
    blocks: Any = module.blocks
    _check(strategy, len(blocks))
    rank = build.mesh.rank("pipeline")
    held = tuple(stage for stage in strategy.stages if stage.pipeline_rank == rank)
    layers = {i for stage in held for i in range(stage.first_layer, stage.first_layer + stage.num_layers)}
    for name in [name for name, _ in blocks.named_children()]:
        if int(name) not in layers:
            del blocks._modules[name]  # an nn.ModuleList iterates over what is left, under its old names
    embedding, head = any(stage.embedding for stage in held), any(stage.head for stage in held)
    shared: tuple[str, ...] = getattr(module, "shared", ())
    trains = any(module.get_parameter(name).requires_grad for name in shared)
    first = next(stage.pipeline_rank for stage in strategy.stages if stage.embedding)
    last = next(stage.pipeline_rank for stage in strategy.stages if stage.head)
    if not embedding:
        _drop(module, "embed.", keep=shared if head else ())
    if not head:
        _drop(module, "head.", keep=())
    requests = replace(build.requests, held=held)
    if trains and first != last:
        pair, groups = _pairs(build, first, last)
        requests = replace(requests, shared_group=pair, groups=tuple(groups))
        if not (embedding or head):
            shared = ()
    else:
        shared = ()
    return replace(build, shared=shared, requests=requests)


def schedule(build: Build) -> Build:
    """Chooses who runs the micro batches."""
    strategy = build.strategy
    if strategy.pipeline_parallel_degree == 1:
        return replace(build, requests=replace(build.requests, runner=PlainRunner))
    if strategy.pipeline_schedule in SPLIT_BACKWARD:
        region = Region() if build.region is WHOLE else build.region
        region.pending = []
        build = replace(build, region=region)
    channels = _channels(build)
    _open(build, channels)
    groups = (*build.requests.groups, *channels.values())
    requests = replace(build.requests, runner=PipelineRunner, channels=channels, groups=groups)
    return replace(build, requests=requests)


def _check(strategy: Strategy, num_layers: int) -> None:
    degree, virtual = strategy.pipeline_parallel_degree, strategy.num_virtual_stages
    stages = sorted(strategy.stages, key=lambda stage: stage.stage)
    ends = [0, *(stage.first_layer + stage.num_layers for stage in stages)]
    follow = len(stages) == degree * virtual and [stage.first_layer for stage in stages] == ends[:-1]
    if not follow or ends[-1] != num_layers or not (stages[0].embedding and stages[-1].head):
        raise ValueError(
            f"stages {_told(stages)} do not cut {num_layers} layers for pipeline_parallel_degree {degree} x "
            f"num_virtual_stages {virtual}; give one stage each, from the embedding to the head, without gaps"
        )
    for stage in stages:
        right = stage_rank(strategy.pipeline_schedule, degree, len(stages), stage.stage)
        if stage.pipeline_rank != right:
            raise ValueError(
                f"stage {stage.stage} stands on pipeline_rank {stage.pipeline_rank}; {strategy.pipeline_schedule} "
                f"runs it on {right}"
            )


def _told(stages: list[Stage]) -> str:
    return ", ".join(f"{s.first_layer}..{s.first_layer + s.num_layers - 1}" for s in stages) or "(none)"


def _drop(module: nn.Module, prefix: str, *, keep: tuple[str, ...]) -> None:
    """Takes parameters out of a part that no stage of this rank runs."""
    for name, _ in list(module.named_parameters()):
        if name.startswith(prefix) and name not in keep:
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._parameters[leaf] = None


def _pairs(build: Build, first: int, last: int) -> tuple[Any, list[Any]]:
    """(this rank's group of the two stages that share parameters, all groups made): every rank must make every group."""
    ranks = build.mesh.ranks
    mine, rank = None, dist.get_rank()
    for pair in zip(ranks[first].flatten().tolist(), ranks[last].flatten().tolist(), strict=True):
        group = dist.new_group(sorted(pair))
        if rank in pair:
            mine = group
    return mine, [mine] if mine is not None else []


def _channels(build: Build) -> dict[Channel, Any]:
    """Return this rank's channels, each a group of two ranks: on NCCL a communicator and stream of its own. The mesh's pipeline
    group would not do: its messages would share one order, in which two ranks that both send first wait for each other."""
    ranks, mine = build.mesh.ranks, {}
    for channel in pipeline_of(build.strategy).channels():
        ends = (ranks[channel.source].flatten().tolist(), ranks[channel.target].flatten().tolist())
        for pair in zip(*ends, strict=True):
            group = dist.new_group(sorted(pair))
            if dist.get_rank() in pair:
                mine[channel] = group
    return mine


def _open(build: Build, channels: Mapping[Channel, Any]) -> None:
    """Sends one byte through each channel. NCCL makes a communicator at its first message, and both ranks wait there: left to
    the first step, whose receives are asked for ahead of the sends, they would wait for ever."""
    ranks, rank = build.mesh.ranks, build.mesh.rank("pipeline")
    place = (build.mesh.rank("replicate"), build.mesh.rank("tensor"), build.mesh.rank("shard"))
    for channel, group in channels.items():
        byte = torch.zeros(1, dtype=torch.uint8, device=build.device)
        if rank == channel.source:
            dist.send(byte, int(ranks[(channel.target, *place)]), group=group)
        else:
            dist.recv(byte, int(ranks[(channel.source, *place)]), group=group)
