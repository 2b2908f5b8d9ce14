"""The assignment of one worker: plain data, so that it travels as JSON and never as a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from orchestrator.training.limits import Limits
from strategies.strategy import Offload, Stage, Strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """One rank's part of a run."""

    job: Mapping[str, Any]
    """job.to_mapping()."""
    job_directory: str
    """Folder of the job file; the paths in the job are relative to it."""
    strategy: Strategy
    rank: int
    world_size: int
    local_rank: int = 0
    run_directory: str
    """runs/NAME, the same folder for all ranks; checkpoints/ in it."""
    data_directory: str
    """Folder in which `prepare` left the token shards."""
    device: str = "cpu"
    """cpu, or cuda:INDEX."""
    master_address: str = "127.0.0.1"
    master_port: int = 0
    """Port at which rank 0 opens the rendezvous. 0: a world of one needs none."""
    resume_from: str | None = None
    """Folder of a checkpoint. None: from the start."""
    peak_flops: float | None = None
    """Dense peak of one accelerator in the job's precision, FLOP/s: what MFU is a fraction of. None: no MFU."""
    num_threads: int = 1
    """torch's threads in this process; workers that share cores share them by this."""
    measure_memory: bool = True
    """Count live tensor bytes by component on the second step of this process."""
    limits: Limits = field(default_factory=Limits)
    """How long this rank may wait for what."""

    @property
    def tag(self) -> str:
        return f"rank {self.rank} of {self.world_size}"

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Assignment:
        """The inverse of to_mapping, through JSON too."""
        strategy, limits = strategy_from_mapping(mapping["strategy"]), Limits(**mapping.get("limits", {}))
        return cls(**{**mapping, "strategy": strategy, "limits": limits})


def strategy_from_mapping(mapping: Mapping[str, Any]) -> Strategy:
    """The inverse of dataclasses.asdict(strategy), through JSON too."""
    return Strategy(
        **{
            **mapping,
            "mesh_order": tuple(mapping["mesh_order"]),
            "offload": Offload(**mapping["offload"]),
            "stages": tuple(Stage(**stage) for stage in mapping["stages"]),
        }
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a worker ended; the same on every rank. A crash is no outcome: it raises."""

    kind: Literal["finished", "stopped", "failed"]
    step: int
    """Steps that are done."""
    cause: str | None = None
    """Why it stopped or failed, in one sentence for a person."""
    checkpoint: str | None = None
    """The newest checkpoint that this worker group wrote or started from."""
