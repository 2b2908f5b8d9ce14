"""How likely a plan is to fit, from its priced bytes. Pure.

For what is built here the traced step says what tensors a rank holds, and what is beside them lies in the range of the reserve's
constants; no run on a GPU has measured it yet. For other stacks it is what one published source's verdicts show."""

from __future__ import annotations

import math

from orchestrator.planner import spread
from orchestrator.planner.problem import Problem
from strategies.constants import MEMORY, table
from strategies.price.memory import MemoryPrice

LIKELY = 0.9
"""Probability of fitting that a choice must have, where any has it and none is pinned."""
UNIFORM = math.sqrt(12)
"""A range over its deviation, every value in it as likely as another."""


def fits_probability(problem: Problem, memory: MemoryPrice) -> tuple[float, str]:
    """(probability that a plan fits, what it rests on)."""
    on_host = memory.host_bytes_per_node <= memory.host_usable_bytes
    if not on_host or memory.nvme_bytes_per_node > memory.nvme_usable_bytes:
        return 0.0, "host memory or NVMe"
    if not problem.work.native:
        x = (math.log(memory.peak_bytes / memory.usable_bytes) - spread.FIT_CENTER) / spread.FIT_SPREAD
        return 1 / (1 + math.exp(min(x, 700.0))), "verdicts of one published source (Aleph Alpha)"
    known, kind = table(type(MEMORY)), problem.cluster.accelerator.kind
    names = ("fragmentation", "context_bytes") if kind == "cuda" else ("cpu_fragmentation", "cpu_process_bytes")
    (least, most), (kept_least, kept_most) = (known[name].range for name in names)
    tensors = memory.stages.fullest().tensor_peak_bytes
    measured, engine = problem.cluster.calibration, problem.engine
    wrong = max(engine.memory_error, (measured.memory_error if measured else None) or 0.0)
    expected = tensors * (1 + (least + most) / 2) + (kept_least + kept_most) / 2
    deviation = math.hypot(tensors * (most - least) / UNIFORM, (kept_most - kept_least) / UNIFORM, tensors * wrong)
    room = (problem.cluster.accelerator.memory_bytes - expected) / deviation
    return (1 + math.erf(room / math.sqrt(2))) / 2, "the traced step's tensors and the range of the reserve beside them"
