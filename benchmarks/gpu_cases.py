"""What `make gpu` measures: models, batch shapes, recomputing and offload. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from clusters.cluster import Cluster
from clusters.hardware import Calibration
from clusters.inventory.local import describe_cpu
from orchestrator.models.architecture import CATALOG, Architecture, make_architecture
from orchestrator.planner.problem import Choice, Problem
from strategies.strategy import Offload, Strategy


class Variation(NamedTuple):
    """Sequences of a micro batch, tokens of a sequence, what is computed again, what leaves the GPU."""

    micro: int
    length: int
    recompute: str = "none"
    offload: Offload = Offload()


OPTIMIZER, ACTIVATIONS = Offload(optimizer="host"), Offload(activations="host")
VARIATIONS = {
    "opt-125m": (
        *(Variation(8, 1024, kind) for kind in ("none", "full")),
        *(Variation(32, 1024, kind) for kind in ("none", "selective", "full")),
        *(Variation(16, 2048, kind) for kind in ("none", "full")),
        *(Variation(32, 1024, "none", offload) for offload in (OPTIMIZER, ACTIVATIONS)),
    ),
    "opt-1.3b": (
        *(Variation(4, 1024, kind) for kind in ("none", "full")),
        *(Variation(16, 1024, kind) for kind in ("none", "selective", "full")),
        *(Variation(4, 2048, kind) for kind in ("none", "full")),
        *(Variation(16, 1024, "none", offload) for offload in (OPTIMIZER, ACTIVATIONS)),
    ),
    # 16 bytes a parameter are more than any one GPU has: its optimizer is in host memory.
    "opt-6.7b": (
        *(Variation(2, 1024, kind, OPTIMIZER) for kind in ("none", "full")),
        *(Variation(8, 1024, kind, OPTIMIZER) for kind in ("none", "selective", "full")),
        Variation(4, 2048, "full", OPTIMIZER),
    ),
}
TINY = make_architecture(
    family="opt", num_layers=2, hidden_size=64, num_heads=4, ffn_size=256, vocab_size=264, max_position=64
)
WARMUP_STEPS, HOST_STEPS = 3, 3
"""Steps before the clock, and at most so many where the optimizer is in host memory: they take seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One configuration to measure."""

    model: str
    arch: Architecture
    strategy: Strategy
    sequence_length: int
    precision: str
    device_type: str
    num_warmup_steps: int
    num_steps: int

    @property
    def tokens_per_step(self) -> int:
        strategy = self.strategy
        sequences = strategy.data_parallel_degree * strategy.micro_batch_size * strategy.gradient_accumulation_steps
        return sequences * self.sequence_length


def pretended() -> Cluster:
    """Two CPU workers with round numbers: a dry run shows that the program works, not how fast a machine is."""
    nominal = Calibration(
        source="nominal, for a dry run", matmul_flops={"fp32": 5e10}, memory_bytes_per_s=1e10, op_overhead_s=1e-5
    )
    return describe_cpu(nominal, cores=2, memory_bytes=8 * 2**30)


def cases(cluster: Cluster, *, zero_stages: list[int], models: list[str], num_steps: int) -> list[tuple[Case, Problem]]:
    """Every variation under every ZeRO stage; a dry run, on whatever small machine, takes three."""
    tiny = cluster.accelerator.kind == "cpu"
    precision = next(name for name in ("bf16", "fp16", "fp32") if name in cluster.accelerator.peak_flops)
    world = cluster.num_gpus
    found = []
    for model in ["tiny"] if tiny else models:
        for stage in zero_stages:
            dry = (Variation(2, 32, "full"),) if stage else (Variation(2, 32), Variation(2, 32, "none", OPTIMIZER))
            for variation in dry if tiny else VARIATIONS[model]:
                problem = Problem(
                    arch=TINY if tiny else CATALOG[model],
                    cluster=cluster,
                    global_batch_size=world * variation.micro,
                    sequence_length=variation.length,
                    precision=precision,
                )
                choice = Choice(
                    data=world,
                    micro=variation.micro,
                    zero=stage,
                    group=world if stage else 1,
                    recompute=variation.recompute,
                    offload=variation.offload,
                )
                on_host = variation.offload.optimizer == "host"
                case = Case(
                    model=model,
                    arch=problem.arch,
                    strategy=problem.strategy(choice),
                    sequence_length=variation.length,
                    precision=precision,
                    device_type=cluster.accelerator.kind,
                    num_warmup_steps=1 if tiny or on_host else WARMUP_STEPS,
                    num_steps=min(num_steps, HOST_STEPS) if on_host else num_steps,
                )
                found.append((case, problem))
    return found
