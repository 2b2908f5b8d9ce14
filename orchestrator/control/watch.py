"""Whether a worker group hangs: signs of life in, a verdict out. Pure, but for the small clock at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.training.limits import Limits
from orchestrator.training.pulse import Sign

RECENT_STEPS = 20
"""Steps of which the longest tells how long one may take."""
FIRST_STEPS = 3
"""Steps of a worker group that are slow: memory is allocated, code compiled, live bytes are counted."""
LONGEST_GAP_S = 1.0
"""Between two looks of the supervisor: what is longer was a supervisor that was stopped itself and saw nothing."""
TOGETHER_S = 1.0
"""Ranks whose last signs of life lie within this of each other are named together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """The state of one rank at a moment, as far as it is known."""

    sign: Sign | None
    """Last sign of the rank; None: it never answered."""
    silent_s: float
    """Since a new sign of life: it entered another phase."""
    unanswered_s: float
    """Since it answered at all, the same as before even."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How fast this run has been, for how long anything may take."""

    predicted_step_s: float | None = None
    recent_steps_s: tuple[float, ...] = ()
    """Seconds of the latest steps of this worker group."""
    longest_save_s: float | None = None
    checkpoint_bytes: float = 0.0

    @property
    def step_s(self) -> float | None:
        return max(self.recent_steps_s, default=self.predicted_step_s)

    def stepped(self, seconds: float) -> Pace:
        recent = (*self.recent_steps_s, seconds)[-RECENT_STEPS:]
        return replace(self, recent_steps_s=recent)

    def saved(self, seconds: float) -> Pace:
        return replace(self, longest_save_s=max(seconds, self.longest_save_s or 0.0))


def allowed_s(phase: str | None, pace: Pace, limits: Limits) -> float:
    """How long a rank may stay in a phase, seconds; None: it did not answer yet, or begins."""
    step_s = limits.step(pace.step_s, first=len(pace.recent_steps_s) < FIRST_STEPS)
    match phase:
        # Every rank took part in the steps that were done: one last seen before them is past that by now.
        case None | "rendezvous" | "setup" if pace.recent_steps_s:
            return step_s
        case None | "rendezvous":
            return max(limits.rendezvous_s, limits.begin_s)
        case "setup":
            return limits.setup_s + limits.for_bytes(pace.checkpoint_bytes)
        case "evaluation":
            return max(step_s, limits.evaluation_steps * limits.progress_steps * (pace.step_s or 0.0))
        case (
            "checkpoint" | "end"
        ):  # one is copied, another may be on its way: the worker gives up on each by itself, before
            return 2 * limits.save(num_bytes=pace.checkpoint_bytes, longest_s=pace.longest_save_s)
        case _:
            return step_s


def stop_s(pace: Pace, limits: Limits) -> float:
    """Longest time from a stop that was asked for to its end: the step in flight, a checkpoint that is being written already,
    and the last one."""
    return allowed_s("step", pace, limits) + allowed_s("checkpoint", pace, limits)


def hang(ranks: Mapping[int, Rank], *, host_silent_s: float, quiet_s: float, pace: Pace, limits: Limits) -> str | None:
    """The verdict: None while the group may well be healthy, else a sentence that names who does not go on.

    Args:
        ranks: all of them.
        host_silent_s: since the process that holds Ray said anything.
        quiet_s: since the last sign of life from anyone: a new phase, a step, an event.

    The group is given as long as the most patient of its ranks' phases: ranks that wait for one that writes a checkpoint are as
    healthy as that one."""
    phases = {None if rank.sign is None else rank.sign.phase for rank in ranks.values()} or {None}
    allowed = max(allowed_s(phase, pace, limits) for phase in phases)
    if quiet_s <= allowed:
        return None
    told = f"no sign of life for {quiet_s:.0f} s, {allowed:.0f} s are allowed"
    if host_silent_s > min(limits.answer_s, quiet_s / 2):
        return f"{told}: the process that holds Ray does not answer"
    return f"{told}: {_blame(ranks, min(limits.answer_s, quiet_s / 2))}"


def _blame(ranks: Mapping[int, Rank], answer_s: float) -> str:
    """Return the ranks that hold up the others: who does not answer; else who waits for no other rank; else who was silent
    longest."""
    mute = [number for number, rank in ranks.items() if rank.unanswered_s > answer_s]
    if mute:
        return "; ".join(_told(mute, ranks, " does not answer, last seen", stands=False))
    busy = [number for number, rank in ranks.items() if rank.sign is not None and not rank.sign.waits]
    if len(busy) in (0, len(ranks)):
        longest = max((rank.silent_s for rank in ranks.values()), default=0.0)
        busy = [number for number, rank in ranks.items() if longest - rank.silent_s <= TOGETHER_S]
    return "; ".join(_told(busy, ranks, " is"))


def _told(numbers: Sequence[int], ranks: Mapping[int, Rank], says: str, *, stands: bool = True) -> list[str]:
    """Ranks in the same place are told of together; `stands`: it is still where its last sign says."""
    places: dict[str, list[int]] = {}
    for number in sorted(numbers):
        sign = ranks[number].sign
        where = " before its first answer" if sign is None else f" in step {sign.step}, phase {sign.phase}"
        if sign is not None and sign.calls and stands:
            where += f", at {sign.calls[-1]}"
        places.setdefault(where, []).append(number)
    return [f"rank {', '.join(map(str, found))} of {len(ranks)}{says}{where}" for where, found in places.items()]


@dataclass(kw_only=True)
class Watch:
    """The supervisor's record of one worker group. `now_s` counts only the time in which it looked: a supervisor that was
    stopped, or a machine that slept, has seen no hang."""

    num_workers: int
    now_s: float = 0.0
    _looked_at: float | None = None
    _quiet_since: float = 0.0
    _host_at: float = 0.0
    _signs: dict[int, Sign] = field(default_factory=dict)
    _new_at: dict[int, float] = field(default_factory=dict)
    _answered_at: dict[int, float] = field(default_factory=dict)

    def look(self, monotonic_s: float) -> None:
        if self._looked_at is not None:
            self.now_s += min(LONGEST_GAP_S, max(0.0, monotonic_s - self._looked_at))
        self._looked_at = monotonic_s

    def progressed(self) -> None:
        """A step or an event came, by whatever way."""
        self._quiet_since = self.now_s

    def heard(self, signs: Iterable[tuple[int, Sign]]) -> None:
        """The process that holds Ray spoke, with the answers that it got."""
        self._host_at = self.now_s
        for rank, sign in signs:
            before = self._signs.get(rank)
            if before is None or before.count != sign.count:
                self._new_at[rank] = self.now_s
                self.progressed()
            self._signs[rank], self._answered_at[rank] = sign, self.now_s

    @property
    def quiet_s(self) -> float:
        return self.now_s - self._quiet_since

    @property
    def host_silent_s(self) -> float:
        return self.now_s - self._host_at

    def ranks(self) -> dict[int, Rank]:
        return {
            rank: Rank(
                sign=self._signs.get(rank),
                silent_s=self.now_s - self._new_at.get(rank, 0.0),
                unanswered_s=self.now_s - self._answered_at.get(rank, 0.0),
            )
            for rank in range(self.num_workers)
        }
