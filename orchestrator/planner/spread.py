"""The numbers of the error bar and of the choice, in one table, with unit and source. Pure.

`python -m benchmarks.coverage --write` computes them from published runs whose whole stack was left out of the fit, and writes
them here; nothing else sets them. Deviations are of ln(measured / predicted)."""

from __future__ import annotations

import math
from typing import NamedTuple

STACK = 0.054
"""Deviation between stacks (code and machine): the bias of a stack that the fit has not seen, around 0."""
NUM_STACKS = 8
"""Stacks that STACK rests on."""
ROW = {"sharded": 0.085, "dense": 0.107}
"""Deviation of one run around the bias of its stack, by kind: ZeRO 2 and 3 without tensor or pipeline parallelism, all else."""
OWN = 0.076
"""The same of runs within 15 % of the fastest of their model and machine, as the runs of a plan are."""
PAIR = 0.073
"""Deviation of the difference of two such runs of one model and machine: what is not common to a choice's alternatives."""
OTHER_GPU = 0.2
"""Further deviation on a GPU generation that the fit holds little of: the bias of the two V100 sources."""
FIT_CENTER, FIT_SPREAD = 0.060, 0.040
"""ln(peak / usable) at which half of the published layouts ran, and how fast that falls off: a logistic curve through the
verdicts of the only source with many of both (Aleph Alpha)."""

MEASURED_STACK, MEASURED_ROW = 0.2, 0.1
"""STACK and OWN of a `cpu` whose rates were measured. Assumed: measured alone they promised up to 1.4 times what training
reached, by the load of the machine."""
KNOWN_GPUS = ("a100", "a800", "h100")
"""GPU generations of the stacks."""
COVERAGE = 0.8
"""Part of all cases that a stated interval holds."""
UNANCHORED = ("flash_own", "compiled_traffic", "compiled_launches", "pcie", "pcie_hop_s", "split_s", "host_link", "gpus_per_uplink", "offload_hidden")  # fmt: skip  # noqa: E501
"""Assumed constants of time that change no published run's price, so that only their sources' ranges bound them."""


class Belief(NamedTuple):
    """What is believed of ln(measured / predicted) of one run: a bell around `center`."""

    center: float
    deviation: float
    multiple: float
    """Deviations on each side that hold COVERAGE of all cases."""

    @property
    def low(self) -> float:
        """Return measured over predicted at the interval's lower end."""
        return math.exp(self.center - self.multiple * self.deviation)

    @property
    def high(self) -> float:
        """Return measured over predicted at the interval's upper end."""
        return math.exp(self.center + self.multiple * self.deviation)


def t_multiple(degrees: float) -> float:
    """Return Student's t that holds COVERAGE between its negative and itself, for so many degrees of freedom (2 or more).

    Source: Abramowitz and Stegun 26.7.5, two terms; within 1 % from 3 degrees on."""
    z = 1.2815515594
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def unseen(stack: float, row: float, num_stacks: int) -> Belief:
    """Return what is believed of a run of a stack that was never seen: t x sqrt(tau^2 (1 + 1/K) + sigma^2)."""
    return Belief(0.0, math.hypot(stack * math.sqrt(1 + 1 / num_stacks), row), t_multiple(num_stacks - 1))


def after_runs(stack: float, row: float, num_stacks: int, *, mean: float, num_runs: int) -> Belief:
    """Return what is believed of the next run after `num_runs` of the same stack whose ln(measured / predicted) was `mean` on
    average: the posterior of the stack's bias, and the run's own error."""
    prior, told = 1 / (stack**2 * (1 + 1 / num_stacks)), num_runs / row**2
    variance = 1 / (prior + told)
    return Belief(variance * told * mean, math.sqrt(variance + row**2), t_multiple(num_stacks - 1 + num_runs))
