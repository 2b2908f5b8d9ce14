"""Pipeline parallelism, priced: micro batches in flight, the bubble, transfers.

Source: GPipe arXiv:1811.06965; 1F1B and interleaving arXiv:2104.04473, section 2.2; zero bubble arXiv:2401.10241."""

from __future__ import annotations

from strategies.strategy import SPLIT_BACKWARD, Strategy
from strategies.workload import Workload

READS = ("pipeline_parallel_degree", "pipeline_schedule", "num_virtual_stages", "gradient_accumulation_steps")


def in_flight(strategy: Strategy, pipeline_rank: int) -> float:
    """Micro batches whose activations a pipeline rank holds at once, counted in whole shares of its layers."""
    degree, micro_batches = strategy.pipeline_parallel_degree, strategy.gradient_accumulation_steps
    if degree == 1:
        return 1.0
    if strategy.pipeline_schedule == "gpipe":
        return float(micro_batches)
    if strategy.pipeline_schedule == "zbv":
        return float(min(micro_batches, degree))
    virtual = strategy.num_virtual_stages
    if virtual == 1:
        return float(min(micro_batches, degree - pipeline_rank))
    warm_up = 2 * (degree - pipeline_rank - 1) + (virtual - 1) * degree + 1
    return min(micro_batches, warm_up / virtual)


def bubble_fraction(strategy: Strategy) -> float:
    """Idle time over busy time: (p - 1) / (m v); about a third of it where weight gradients fill the gaps."""
    degree = strategy.pipeline_parallel_degree
    fraction = (degree - 1) / (strategy.gradient_accumulation_steps * strategy.num_virtual_stages)
    return fraction / 3 if strategy.pipeline_schedule in SPLIT_BACKWARD else fraction


def transfer_bytes(work: Workload, strategy: Strategy, *, tokens: int, element: int) -> float:
    """One activation from stage to stage; backward sends as much. Split over the tensor group (scatter and gather)."""
    if strategy.pipeline_parallel_degree == 1:
        return 0.0
    return tokens * work.hidden_size * element / strategy.tensor_parallel_degree
