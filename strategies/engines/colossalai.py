"""The ColossalAI engine: its Booster with TorchDDPPlugin (ZeRO 0), LowLevelZeroPlugin (1 and 2) and GeminiPlugin
(3), and HybridParallelPlugin for tensor and pipeline parallelism.

The step (loss, norm, clip, loss scale) is the native session's and the AdamW the project's; who holds, reduces and gathers what
is ColossalAI's. docs/reference/engines.md says what is left out, and why.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from strategies.engines.colossalai_boosted import Boosted, BoosterRunner, LowLevelZero, TorchDdp
from strategies.engines.engine import Build, Loss, OptimizerSettings, Requests
from strategies.engines.held import HeldSession, refuse_unbuilt, refuse_world
from strategies.engines.installed import engine_module
from strategies.engines.loss import TOKEN_LOSS
from strategies.engines.mesh import NAMES, Mesh, lay
from strategies.strategy import Strategy
from strategies.tensor.region import WHOLE
from strategies.zero.states import Weights

BUCKETS, LARGEST_BUCKET_M = 16, 12.0
"""A model's gradients are reduced in so many messages at least; LowLevelZeroPlugin's own bucket, 12 Mi elements, holds all of a
small model's, unsharded and copied."""


def build_session(
    module: nn.Module,
    *,
    strategy: Strategy,
    precision: str,
    weights: Weights,
    optimizer: OptimizerSettings | None = None,
    device: torch.device | str = "cpu",
    deterministic: bool = False,
    loss: Loss = TOKEN_LOSS,
) -> HeldSession:
    """Build a session as native.build_session does. Raises ValueError, with the field's name, for what ColossalAI cannot do."""
    _refuse(strategy, precision, deterministic)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # colossalai imports it, and it asks for GPU kernels
    engine_module("colossalai", "colossalai")
    split = strategy.tensor_parallel_degree > 1 or strategy.pipeline_parallel_degree > 1
    kind, runner = _kind(strategy, split=split)
    # ColossalAI keeps its own groups.
    alone = Mesh(sizes=dict.fromkeys(NAMES, 1), ranks=torch.arange(strategy.num_gpus))
    build = Build(
        module=module,
        strategy=strategy,
        precision=precision,
        device=torch.device(device),
        mesh=lay(strategy, torch.device(device).type) if split else alone,
        region=WHOLE,
        optimizer=optimizer or OptimizerSettings(),
        requests=Requests(runner=runner),
    )
    if build.device.type == "cpu":
        engine_module("strategies", "strategies.engines.colossalai_cpu").install()
    engine_module("colossalai", "colossalai.logging").get_dist_logger()._logger.setLevel(logging.WARNING)
    return HeldSession(build, kind(build, weights), loss=loss, owns_group=False)


def _kind(strategy: Strategy, *, split: bool) -> tuple[type[Boosted], type[BoosterRunner]]:
    if split:
        from strategies.engines.colossalai_hybrid import Hybrid, HybridRunner

        return Hybrid, HybridRunner
    if strategy.zero_stage == 3:
        from strategies.engines.colossalai_gemini import Gemini

        return Gemini, BoosterRunner
    return LowLevelZero if strategy.zero_stage else TorchDdp, BoosterRunner


def _refuse(strategy: Strategy, precision: str, deterministic: bool) -> None:
    refuse_unbuilt(strategy, precision)
    states = "mixed" if precision in ("bf16", "fp16") else "full"
    if strategy.states != states:
        raise ValueError(f"states {strategy.states!r} in {precision}: ColossalAI keeps {states}; set that")
    if deterministic:
        raise ValueError(
            "deterministic: ColossalAI's buckets are reduced in the order of arrival; set it to false, or engine: native"
        )
    refuse_world(strategy, f"{strategy.num_gpus} GPUs of the strategy want")
