"""Every time limit of a run, in seconds: how long each kind of wait may take before it counts as a failure.

One value serves the supervisor, the process that holds Ray and the workers, who get it in their Assignment. Deadlines are
counted on the monotonic clock.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

SCALE = "SHARDWISE_LIMITS_SCALE"
"""Environment variable that `shardwise run` reads: a factor for all limits below, for tests of what happens when one is
passed. A factor above 1 gives a machine in trouble more time."""
LEAST_S = 2.0
"""No limit is scaled below this, or below what it was: a process is not always scheduled within less."""
LEAST_START_S = 120.0
"""The same for the start of processes: Python, Ray and torch are as slow under a small factor as under a large one."""
START = ("begin_s", "ray_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limits of one run. A healthy run never comes near one, on slow storage and a loaded machine either."""

    begin_s: float = 900.0
    """Seconds from the order to start a worker group to processes that answer: Python imports torch over a slow network
    folder."""
    ray_s: float = 600.0
    """Ray's own part of it: placement, and the actors' first answer."""
    rendezvous_s: float = 600.0
    """Seconds from the first worker's arrival at the rendezvous to the last one's, and to a torch process group."""
    setup_s: float = 1800.0
    """Seconds from the process group to the first step: data, weights and, where a run goes on, the checkpoint. Reading many
    bytes is given more, see `for_bytes`."""
    first_step_s: float = 1800.0
    """The first steps of a process at least: memory is allocated and code compiled, and no step was measured yet."""
    progress_s: float = 300.0
    """Least time without any rank's sign of life after which a run counts as hung. Slow steps are given more, see `step`."""
    progress_steps: float = 10.0
    """A step may take this many times the longest one of late, or the predicted one where none was measured."""
    evaluation_steps: float = 16.0
    """An evaluation may take as long as this many steps may."""
    collective_s: float = 3600.0
    """Longest wait for other ranks inside one collective, in gloo and NCCL. It only bounds what the supervisor does not see: a
    verdict of the supervisor comes first and names the rank that is waited for."""
    save_s: float = 900.0
    """A checkpoint at least, from the copy to the rename. Writing many bytes is given more, see `save`."""
    save_times: float = 5.0
    """A checkpoint may take this many times the longest one that this run measured."""
    slowest_storage_bytes_per_s: float = 100e6
    """Rate that a checkpoint's storage is trusted to write and read over all ranks where nothing was measured."""
    grace_s: float = 3.0
    """After a worker failed: how long the others may tell what they saw, so that the cause is told and not a consequence."""
    finish_s: float = 30.0
    """After a worker reported the end: how long the others may take to."""
    answer_s: float = 30.0
    """A process that did not answer for this long is named as one that does not answer, where the run hangs."""
    kill_s: float = 10.0
    """Seconds from SIGKILL to the end of a process. One that the kernel holds in a read or write that never ends outlives it."""

    def scaled(self, factor: float) -> Limits:
        """All seconds times the factor; counts and bytes per second stay."""
        if not factor > 0:
            raise ValueError(f"{SCALE} is {factor}; it must be a number above 0")
        seconds = {name: getattr(self, name) for name in self.__slots__ if name.endswith("_s") and "_per_" not in name}
        least = {name: LEAST_START_S if name in START else LEAST_S for name in seconds}
        return replace(self, **{name: max(min(value, least[name]), value * factor) for name, value in seconds.items()})

    def step(self, step_s: float | None, *, first: bool) -> float:
        """Longest time of a step, seconds; `step_s` is the longest one of late, before that the predicted one."""
        least = self.first_step_s if first else self.progress_s
        return max(least, self.progress_steps * (step_s or 0.0))

    def for_bytes(self, num_bytes: float) -> float:
        """Return what storage is given to move so many bytes, seconds."""
        return num_bytes / self.slowest_storage_bytes_per_s

    def save(self, *, num_bytes: float, longest_s: float | None) -> float:
        """Longest time of a checkpoint, seconds.

        Args:
            num_bytes: of the whole checkpoint, over all ranks.
            longest_s: the longest one that this run wrote; None before the first."""
        known = self.for_bytes(num_bytes) if longest_s is None else self.save_times * longest_s
        return max(self.save_s, known)

    def for_steps_of(self, step_s: float | None) -> Limits:
        """The limits of a run whose steps are predicted to take `step_s`: a collective waits longer than any step may take."""
        patient = 2 * self.step(step_s, first=True)
        return replace(self, collective_s=max(self.collective_s, patient))


def from_environment(environment: Mapping[str, str] = os.environ) -> Limits:
    """The limits as the environment scales them. ValueError where the factor is no number above 0."""
    text = environment.get(SCALE, "1")
    try:
        factor = float(text)
    except ValueError:
        raise ValueError(f"{SCALE} is {text!r}; it must be a number above 0") from None
    return Limits().scaled(factor)
