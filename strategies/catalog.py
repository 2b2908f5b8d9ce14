"""The table of what each engine can do. Core: it names no module of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from strategies.strategy import MESH_ORDER, Offload, States, Strategy

PRECISIONS = ("bf16", "fp16", "fp32", "fp64")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """One thing that an engine does not do."""

    field: str
    applies: Callable[[Strategy], bool]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Capability:
    """The abilities of an engine; what no limit names, it does."""

    semantics: str
    """The engine whose cost doors price it."""
    states: tuple[States, ...] = ()
    """Formats of the states that the engine keeps in 16-bit precision, by ZeRO stage."""
    whole_until: int = 1
    """The last ZeRO stage whose parameters stand whole on every rank."""
    buckets: bool = True
    """The engine holds what it reduces at ZeRO 0 to 2 in buckets as large as native's; False: in small ones, which no price
    counts."""
    gathers_ahead: bool = True
    """The engine fetches a block at ZeRO 3 while the one before is at work."""
    plans_ahead: bool = False
    """A plan prices what it is not built to do, too."""
    speed_error: float = 0.0
    """Relative error of tokens per second, at least, where seconds are another engine's (`benchmarks.bench engines`)."""
    memory_error: float = 0.0
    """The same of bytes."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the Strategy that a job leaves open and the planner does not vary."""
    package: str = ""
    """Package that must be installed beside torch."""
    precisions: Callable[[Strategy], tuple[str, ...]] = lambda _: PRECISIONS
    """Precisions that the engine computes in."""
    limits: tuple[Limit, ...] = ()


NO_FUSED_SOFTMAX = Limit(
    field="attention",
    applies=lambda s: s.attention == "fused_softmax",
    reason="no fused softmax is built: attention runs as `flash`, or as `math` with its scores written out",
)
NO_FUSED_NORM = Limit(
    field="fused_norm",
    applies=lambda s: s.fused_norm,
    reason="no fused norm is built: norms run as torch's own kernel",
)
NATIVE_STATES = (("mixed", "mixed_fp32_gradients", "full"), ("sharded_fp32", "full"))
"""Formats of the states that the native engine keeps at ZeRO 0 and 1, and at 2 and 3."""


def _hybrid(strategy: Strategy) -> bool:
    return strategy.tensor_parallel_degree > 1 or strategy.pipeline_parallel_degree > 1


def _colossalai_precisions(strategy: Strategy) -> tuple[str, ...]:
    """LowLevelZero steps in 32 bits, Gemini computes in 16; HybridParallel is tried in two, and shards states in 16 alone."""
    if _hybrid(strategy):
        return ("bf16",) if strategy.zero_stage else ("bf16", "fp32")
    return (PRECISIONS, PRECISIONS[:3], PRECISIONS[:3], PRECISIONS[:2])[strategy.zero_stage]


ENGINES: dict[str, Capability] = {
    "native": Capability(
        semantics="native",
        states=("mixed", "mixed", "sharded_fp32", "sharded_fp32"),
        plans_ahead=True,
        limits=(
            NO_FUSED_SOFTMAX,
            NO_FUSED_NORM,
            Limit(
                field="offload",
                applies=lambda s: (
                    s.offload.parameters != "none"
                    and (s.offload.optimizer == "none" or s.offload.optimizer_fraction < 1)
                ),
                reason="parameters leave the GPU together with all of the optimizer states that step them",
            ),
            Limit(
                field="offload",
                applies=lambda s: s.offload.parameters == "nvme" and s.zero_stage >= 2,
                reason="at ZeRO 2 and 3 FSDP2 holds the shards of the parameters, on the GPU or on the host, not on NVMe",
            ),
            Limit(
                field="states",
                applies=lambda s: s.states not in NATIVE_STATES[s.zero_stage >= 2],
                reason="the native engine keeps `mixed` or `mixed_fp32_gradients` at ZeRO 0 and 1, `sharded_fp32` at 2 and 3, "
                "`full` in fp32 and fp64",
            ),
            Limit(
                field="compile",
                applies=lambda s: s.compile and (_hybrid(s) or s.context_parallel_degree > 1),
                reason="torch.compile of blocks that talk to a tensor group or a context group, or run as a pipeline's stages, "
                "is not built",
            ),
        ),
    ),
    "colossalai": Capability(
        semantics="native",
        states=("mixed", "mixed", "mixed", "mixed"),
        whole_until=2,
        buckets=False,
        gathers_ahead=False,
        speed_error=0.25,
        memory_error=0.25,
        fixed={
            "tensor_parallel_degree": 1,
            "pipeline_parallel_degree": 1,
            "pipeline_schedule": "1f1b",
            "num_virtual_stages": 1,
            "sequence_parallel": False,
            "gather": "per_micro_batch",
            "offload": Offload(),
        },
        package="colossalai",
        precisions=_colossalai_precisions,
        limits=(
            NO_FUSED_SOFTMAX,
            NO_FUSED_NORM,
            Limit(
                field="context_parallel_degree",
                applies=lambda s: s.context_parallel_degree > 1,
                reason="the colossalai engine splits no sequences",
            ),
            Limit(
                field="sequence_parallel",
                applies=lambda s: s.sequence_parallel and s.tensor_parallel_degree > 1,
                reason="ColossalAI's Shardformer has none for OPT",
            ),
            Limit(
                field="pipeline_schedule",
                applies=lambda s: s.pipeline_parallel_degree > 1 and s.pipeline_schedule != "1f1b",
                reason="ColossalAI's OPT runs 1f1b alone: interleaved fails for it (0.5.0), zbv is untried",
            ),
            Limit(
                field="gradient_accumulation_steps",
                applies=lambda s: (
                    s.pipeline_parallel_degree > 1 and s.gradient_accumulation_steps < s.pipeline_parallel_degree
                ),
                reason="ColossalAI's 1f1b wants a micro batch for each stage at least; set a smaller micro_batch_size",
            ),
            Limit(
                field="zero_stage",
                applies=lambda s: _hybrid(s) and s.zero_stage > 1,
                reason="with tensor or pipeline parallelism ColossalAI's HybridParallel is built with ZeRO 0 and 1",
            ),
            Limit(
                field="attention",
                applies=lambda s: _hybrid(s) and s.attention == "flash",
                reason="Shardformer's OPT writes attention scores out on a CPU; set attention: math",
            ),
            Limit(
                field="activation_checkpointing",
                applies=lambda s: _hybrid(s) and s.activation_checkpointing != "none",
                reason="recompute is not built for the Hugging Face modules that tensor and pipeline parallelism run",
            ),
            Limit(
                field="mesh_order",
                applies=lambda s: _hybrid(s) and s.mesh_order != MESH_ORDER,
                reason="ColossalAI's mesh is pipeline, data, tensor, from the slowest axis to the fastest",
            ),
            Limit(
                field="zero_group_size",
                applies=lambda s: s.zero_stage > 0 and s.zero_group_size != s.data_parallel_degree,
                reason="ColossalAI shards over all data-parallel ranks",
            ),
            Limit(
                field="reduce",
                applies=lambda s: (
                    s.gradient_accumulation_steps > 1
                    and s.reduce != ("per_micro_batch" if s.zero_stage >= 2 else "per_step")
                ),
                reason="ColossalAI reduces gradients for every micro batch at ZeRO 2 and 3 and once a step at 0 and 1",
            ),
            Limit(
                field="gather",
                applies=lambda s: s.gather != "per_micro_batch",
                reason="ColossalAI's Gemini gathers for every micro batch",
            ),
            Limit(
                field="states",
                applies=lambda s: s.states not in (("mixed",) if s.zero_stage == 3 else ("mixed", "full")),
                reason="ColossalAI keeps `mixed` in 16-bit precisions, `full` in fp32 and fp64; ZeRO 3 (Gemini) is 16-bit alone",
            ),
            Limit(
                field="offload",
                applies=lambda s: (
                    "nvme" in (s.offload.optimizer, s.offload.parameters)
                    or s.offload.activations == "host"
                    or s.offload.optimizer_fraction < 1
                    or (s.offload.optimizer == "host" and (s.zero_stage == 0 or _hybrid(s)))
                    or (s.offload.parameters == "host" and (s.zero_stage < 3 or s.offload.optimizer == "none"))
                ),
                reason="ColossalAI moves all optimizer states to the host at ZeRO 1, 2 and 3, at 3 (Gemini) parameters too, and "
                "nothing else; with tensor or pipeline parallelism offload is not built",
            ),
            Limit(field="compile", applies=lambda s: s.compile, reason="ColossalAI's hooks do not compile"),
        ),
    ),
    "fairscale": Capability(
        semantics="native",
        states=("mixed", "mixed", "mixed", "sharded_fp32"),
        whole_until=2,
        gathers_ahead=False,
        speed_error=0.25,
        memory_error=0.25,
        fixed={
            "tensor_parallel_degree": 1,
            "pipeline_parallel_degree": 1,
            "gather": "per_micro_batch",
            "offload": Offload(),
        },
        package="fairscale",
        precisions=lambda s: PRECISIONS[:3] if s.zero_stage == 3 else PRECISIONS,
        limits=(
            NO_FUSED_SOFTMAX,
            NO_FUSED_NORM,
            *(
                Limit(
                    field=field,
                    applies=lambda s, field=field: getattr(s, field) > 1,  # type: ignore[misc]
                    reason="the fairscale engine splits the data alone (its Pipe is one process with threads)",
                )
                for field in ("tensor_parallel_degree", "pipeline_parallel_degree", "context_parallel_degree")
            ),
            Limit(
                field="zero_stage",
                applies=lambda s: s.zero_stage == 0,
                reason="fairscale shards by OSS (1), ShardedDataParallel (2) or FSDP (3); plain replicas are the native engine's",
            ),
            Limit(
                field="zero_group_size",
                applies=lambda s: s.zero_group_size != s.data_parallel_degree,
                reason="the fairscale engine shards over all data-parallel ranks",
            ),
            Limit(
                field="reduce",
                applies=lambda s: (
                    s.zero_stage == 2 and s.reduce == "per_micro_batch" and s.gradient_accumulation_steps > 1
                ),
                reason="the fairscale engine's ShardedDataParallel reduces once a step; set reduce: per_step",
            ),
            Limit(
                field="states",
                applies=lambda s: s.states not in ("sharded_fp32" if s.zero_stage == 3 else "mixed", "full"),
                reason="fairscale keeps `mixed` at ZeRO 1 and 2, `sharded_fp32` at 3, `full` in fp32 and fp64",
            ),
            Limit(
                field="gather",
                applies=lambda s: s.gather != "per_micro_batch",
                reason="fairscale's FSDP gathers for every micro batch",
            ),
            Limit(
                field="activation_checkpointing",
                applies=lambda s: s.activation_checkpointing == "selective",
                reason="fairscale's checkpoint_wrapper recomputes whole blocks: `none` or `full`",
            ),
            Limit(
                field="offload",
                applies=lambda s: (
                    (s.offload.optimizer, s.offload.parameters) not in (("none", "none"), ("host", "host"))
                    or s.offload.optimizer_fraction < 1
                    or (s.offload.parameters == "host" and s.zero_stage != 3)
                    or (s.offload.activations == "host" and s.activation_checkpointing != "full")
                ),
                reason="fairscale's FSDP (ZeRO 3) moves parameters and all optimizer states to the host together, and its "
                "checkpoint_wrapper the inputs of recomputed blocks; OffloadModel wants CUDA by design",
            ),
            Limit(field="compile", applies=lambda s: s.compile, reason="fairscale's hooks do not compile"),
        ),
    ),
}


PINNED_ALONE = (
    *("engine", "tensor_parallel_degree", "pipeline_parallel_degree", "context_parallel_degree", "zero_stage"),
    *("gather", "activation_checkpointing", "offload", "attention", "fused_norm", "compile"),
)
"""Fields that a pin alone may make impossible for the engine."""


def unbuilt_pins(pins: Mapping[str, Any]) -> Iterator[tuple[str, Limit]]:
    """Yield each pinned field that the engine does not carry out whatever else is chosen, and why."""
    pinned = Strategy(**{each.name: pins[each.name] for each in fields(Strategy) if each.name in pins})
    for name in PINNED_ALONE:
        if name in pins and (limit := unbuilt(pinned, field=name)) is not None:
            yield name, limit
    if "states" in pins:
        limits = [unbuilt(replace(pinned, zero_stage=zero), field="states") for zero in range(4)]
        if all(limits) and limits[0] is not None:
            yield "states", limits[0]


def unbuilt(strategy: Strategy, *, field: str | None = None) -> Limit | None:
    """The first choice (of one field, where it is given) that the strategy's engine does not carry out yet; None where it is
    built."""
    capability = ENGINES[strategy.engine]
    limits = (limit for limit in capability.limits if field in (None, limit.field))
    return next((limit for limit in limits if limit.applies(strategy)), None)


def wrong_precision(strategy: Strategy, precision: str) -> str | None:
    """Return what to say where the engine does not compute in a precision; None where it does."""
    known = ENGINES[strategy.engine].precisions(strategy)
    if precision in known:
        return None
    split = " with tensor or pipeline parallelism" if _hybrid(strategy) else ""
    return (
        f"training.precision {precision}: the {strategy.engine} engine at zero_stage {strategy.zero_stage}{split} computes in "
        f"{', '.join(known)}; set one of them, or another zero_stage, or engine: native"
    )
