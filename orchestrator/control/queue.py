"""Which waiting jobs start, which running ones make room, and why each other one waits. Pure: jobs, nodes and a time in,
decisions out; the service carries them out, and a simulator may ask the same function.

A job gets all of its GPUs or none. The order is by priority, then by what users have had (fair share), then by age. The first job
that does not fit is the *head*: GPUs are reserved for it at the earliest moment that the running jobs' plans promise, and a later
job starts before it only where that moment stays as it is (EASY backfill: Lifka, "The ANL/IBM SP scheduling system", 1995).
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import inf
from typing import NamedTuple

Gpu = tuple[str, int]
"""(name of the node, number of the GPU on it)"""
Free = dict[str, list[int]]
"""Node -> the numbers of its free GPUs, ascending."""

START_S = 60.0
"""Seconds added to what a plan says a job takes: processes start, data is prepared, the last checkpoint is written."""
MOST_TRIED = 500
"""Jobs behind the head that one pass looks at for backfill."""
MOST_COMBINED = 10
"""Jobs on one node among which the cheapest set to preempt is found by trying all; of more, the cheapest are tried."""
LONGEST_CHARGE_S = 3600.0
"""Seconds for which a job that is let in is charged to its user while the others of the same pass are put in order."""


class Node(NamedTuple):
    name: str
    num_gpus: int
    cordoned: bool = False


class Waiting(NamedTuple):
    """A job with a plan, without GPUs."""

    name: str
    user: str
    num_gpus: int
    num_nodes: int = 1
    """Nodes that its plan spreads the GPUs over, equally."""
    priority: int = 0
    queued_s: float = 0.0
    bound_s: float | None = None
    """Longest time that it takes by its plan and the plan's stated error; None: the plan does not say."""
    max_wait_s: float | None = None
    """Longest wait; None: any, or it has been started before."""

    @property
    def per_node(self) -> int:
        return -(-self.num_gpus // self.num_nodes)


class Running(NamedTuple):
    """A job that has GPUs."""

    name: str
    user: str
    gpus: tuple[Gpu, ...]
    priority: int = 0
    ends_s: float | None = None
    """Latest end by its plan and the plan's stated error; None: the plan does not say."""
    preemptible: bool = True
    lost_gpu_s: float = 0.0
    """GPU-seconds of work that a preemption now would cost."""
    backfilled: bool = False
    """It was let in before a job that came first, since it would not delay it."""
    stopping: bool = False
    """It was asked to stop already."""


class Start(NamedTuple):
    name: str
    gpus: tuple[Gpu, ...]
    backfilled: bool
    cause: str
    ends_s: float | None
    """Latest end by the plan and its stated error."""


class Preemption(NamedTuple):
    name: str
    cause: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    starts: tuple[Start, ...] = ()
    preemptions: tuple[Preemption, ...] = ()
    expired: tuple[str, ...] = ()
    """Jobs that have waited longer than they want to."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Job -> why it waits, one sentence; those far behind the head are not in it."""
    reserved: tuple[Gpu, ...] = ()
    """GPUs that the head gets, and nobody else who would still have them at `reserved_s`."""
    reserved_s: float = inf
    head: str | None = None


def bound_s(wall_s: float | None, error: float | None, done: float = 0.0) -> float | None:
    """Return the longest time that a job still takes: what its plan says, slower by the stated error of its speed."""
    return None if wall_s is None else START_S + wall_s * (1 - done) * (1 + (error or 0.0))


def decide(
    waiting: Sequence[Waiting],
    running: Sequence[Running],
    nodes: Sequence[Node],
    *,
    now: float,
    quotas: Mapping[str, int] | None = None,
    usage: Mapping[str, float] | None = None,
) -> Decision:
    """Return what one pass over the queue does.

    Args:
        quotas: user -> GPUs that its jobs may have at a time; absent: all.
        usage: user -> GPU-seconds had before, for the fair share."""
    expired = {job.name for job in waiting if job.max_wait_s is not None and now - job.queued_s > job.max_wait_s}
    pass_ = _Pass(running, nodes, now, quotas or {})
    num_behind = 0
    for number, job in enumerate(in_order(waiting, running, usage or {}, now)):
        if job.name in expired:
            continue
        num_behind += pass_.head is not None
        if num_behind > MOST_TRIED:
            break
        if num_behind and not any(pass_.free.values()):
            pass_.behind(job, number)
        else:
            pass_.look_at(job)
    return Decision(
        starts=tuple(pass_.starts),
        preemptions=tuple(pass_.preemptions),
        expired=tuple(sorted(expired)),
        reasons=pass_.reasons,
        reserved=pass_.reserved,
        reserved_s=pass_.reserved_s,
        head=None if pass_.head is None else pass_.head.name,
    )


def in_order(
    waiting: Iterable[Waiting], running: Iterable[Running], usage: Mapping[str, float], now: float
) -> Iterator[Waiting]:
    """Yield waiting jobs as they are to be looked at: by priority; then the oldest of the user who has had least; every job that
    is given counts as had."""
    had: dict[str, float] = defaultdict(float, usage)
    for running_job in running:
        had[running_job.user] += len(running_job.gpus) * LONGEST_CHARGE_S
    by_priority: dict[int, dict[str, list[Waiting]]] = defaultdict(lambda: defaultdict(list))
    for job in waiting:
        by_priority[job.priority][job.user].append(job)
    for _, by_user in sorted(by_priority.items(), reverse=True):
        for jobs in by_user.values():
            jobs.sort(key=lambda job: (job.queued_s, job.name), reverse=True)
        users = [(had[user], jobs[-1].queued_s, user) for user, jobs in by_user.items()]
        heapq.heapify(users)
        while users:
            _, _, user = heapq.heappop(users)
            job = by_user[user].pop()
            yield job
            had[user] += job.num_gpus * min(LONGEST_CHARGE_S, job.bound_s or LONGEST_CHARGE_S)
            if by_user[user]:
                heapq.heappush(users, (had[user], by_user[user][-1].queued_s, user))


def placed(free: Free, job: Waiting) -> tuple[Gpu, ...] | None:
    """Return GPUs for a job on as many nodes as its plan has, on those with the fewest to spare; None where there are none."""
    fit = sorted((len(gpus), node) for node, gpus in free.items() if len(gpus) >= job.per_node)
    if len(fit) < job.num_nodes:
        return None
    taken = [(node, gpu) for _, node in fit[: job.num_nodes] for gpu in free[node][: job.per_node]]
    return tuple(taken[: job.num_gpus])


def freed(free: Free, gpus: Iterable[Gpu]) -> Free:
    """Return `free` with more GPUs, of the nodes that it has."""
    more: dict[str, set[int]] = {node: set(own) for node, own in free.items()}
    for node, gpu in gpus:
        if node in more:
            more[node].add(gpu)
    return {node: sorted(own) for node, own in more.items()}


def without(free: Free, gpus: Iterable[Gpu]) -> Free:
    """Return `free` without some GPUs."""
    gone = set(gpus)
    return {node: [gpu for gpu in own if (node, gpu) not in gone] for node, own in free.items()}


def earliest(free: Free, running: Iterable[Running], job: Waiting, now: float) -> tuple[float, tuple[Gpu, ...], str]:
    """Return when a job fits by the running jobs' latest ends, on which GPUs, and whose end it waits for; inf: nobody knows."""
    if (gpus := placed(free, job)) is not None:
        return now, gpus, ""
    for one in sorted(running, key=lambda one: (_end(one, now), one.name)):
        free = freed(free, one.gpus)
        if (gpus := placed(free, job)) is not None:
            return _end(one, now), gpus, one.name
    return inf, (), ""


def _end(job: Running, now: float) -> float:
    """Return the latest end of a job; one that is stopping or overdue may end at any moment."""
    if job.stopping:
        return now
    return inf if job.ends_s is None else max(now, job.ends_s)


class _Pass:
    """One pass over the queue: what is free, what was decided."""

    def __init__(
        self, running: Sequence[Running], nodes: Sequence[Node], now: float, quotas: Mapping[str, int]
    ) -> None:
        self.running, self.now, self.quotas = list(running), now, quotas
        self.open = [node for node in nodes if not node.cordoned]
        used = {gpu for job in running for gpu in job.gpus}
        self.free: Free = {
            node.name: [gpu for gpu in range(node.num_gpus) if (node.name, gpu) not in used] for node in self.open
        }
        self.in_use: dict[str, int] = defaultdict(int)
        for job in running:
            self.in_use[job.user] += len(job.gpus)
        self.starts: list[Start] = []
        self.preemptions: list[Preemption] = []
        self.reasons: dict[str, str] = {}
        self.head: Waiting | None = None
        self.reserved: tuple[Gpu, ...] = ()
        self.reserved_s = inf

    def look_at(self, job: Waiting) -> None:
        """Start a job, or make it the head, or say why it waits."""
        if (why := self._never(job)) is not None or (why := self._over_quota(job)) is not None:
            self.reasons[job.name] = why
        elif self.head is not None:
            self._backfill(job)
        elif (gpus := placed(self.free, job)) is not None:
            self._start(job, gpus, backfilled=False, cause=f"{job.num_gpus} GPUs are free, and no job is before it")
        else:
            self._wait_first(job)

    def behind(self, job: Waiting, number: int) -> None:
        assert self.head is not None
        self.reasons[job.name] = f"{number} jobs are before it; {self.head.name} is next"

    def _start(self, job: Waiting, gpus: tuple[Gpu, ...], *, backfilled: bool, cause: str) -> None:
        self.free = without(self.free, gpus)
        self.in_use[job.user] += job.num_gpus
        ends_s = None if job.bound_s is None else self.now + job.bound_s
        self.starts.append(Start(job.name, gpus, backfilled, cause, ends_s))
        self.running.append(Running(job.name, job.user, gpus, job.priority, ends_s, preemptible=False))

    def _never(self, job: Waiting) -> str | None:
        """Why a job does not fit the nodes even where they are empty."""
        if sum(node.num_gpus >= job.per_node for node in self.open) >= job.num_nodes:
            return None
        has = f"{sum(node.num_gpus for node in self.open)} GPUs on {_nodes(len(self.open))}"
        return f"needs {_shape(job)}; those that take jobs have {has}"

    def _over_quota(self, job: Waiting) -> str | None:
        quota = self.quotas.get(job.user)
        if quota is None or self.in_use[job.user] + job.num_gpus <= quota:
            return None
        return f"needs {_shape(job)}; {job.user} uses {self.in_use[job.user]} of a quota of {quota}"

    def _backfill(self, job: Waiting) -> None:
        assert self.head is not None
        ends_s = inf if job.bound_s is None else self.now + job.bound_s
        gpus = placed(without(self.free, self.reserved), job)
        if gpus is None and ends_s <= self.reserved_s < inf:
            gpus = placed(self.free, job)
        if gpus is not None:
            cause = f"{job.num_gpus} GPUs are free, and {self.head.name}, which is next, starts no later for it"
            self._start(job, gpus, backfilled=True, cause=cause)
        elif placed(self.free, job) is None:
            self.reasons[job.name] = f"needs {_shape(job)}, {self._free_told()}; {self.head.name} is next"
        else:
            self.reasons[job.name] = f"needs {_shape(job)}, and would delay {self.head.name}, which is next"

    def _wait_first(self, job: Waiting) -> None:
        """Make a job the head: GPUs are reserved for it, and others make room where they must."""
        self.head = job
        soon = freed(self.free, (gpu for one in self.running if one.stopping for gpu in one.gpus))
        victims = () if placed(soon, job) is not None else self._victims(job, soon)
        if victims:
            for one in victims:
                told = "which comes first" if one.priority < job.priority else "it takes longer than its plan said"
                self.preemptions.append(Preemption(one.name, f"makes room for {job.name}, {told}"))
            names = {one.name for one in victims}
            stopping = [one._replace(stopping=one.stopping or one.name in names) for one in self.running]
            self.reserved_s, self.reserved, _ = earliest(self.free, stopping, job, self.now)
            self.reasons[job.name] = f"is next: {', '.join(sorted(names))} is stopped for it"
            return
        self.reserved_s, self.reserved, whose = earliest(self.free, self.running, job, self.now)
        if self.reserved_s == inf:
            when = f"waits until {whose} ends, and no plan says when"
        else:
            when = f"in at most {_time(self.reserved_s - self.now)}, when {whose} ends"
        self.reasons[job.name] = f"is next: needs {_shape(job)}, {self._free_told()}; {when}"

    def _victims(self, job: Waiting, soon: Free) -> tuple[Running, ...]:
        """Return the jobs to preempt, those that cost the least work; none where that does not help."""
        may = [
            one
            for one in self.running
            if one.preemptible
            and not one.stopping
            and (one.priority < job.priority or (one.priority == job.priority and self._is_late(one)))
        ]
        chosen: dict[str, Running] = {}
        left = dict(soon)
        for _ in range(job.num_nodes):
            ways = [(*_cheapest(own, node, job.per_node, may, chosen), node) for node, own in left.items()]
            ways = [way for way in ways if way[0] < inf]
            if not ways:
                return ()
            _, victims, node = min(ways, key=lambda way: (way[0], len(way[1]), way[2]))
            chosen |= {one.name: one for one in victims}
            del left[node]
        for one in sorted(
            chosen.values(), key=lambda one: -one.lost_gpu_s
        ):  # a job over two nodes may make another needless
            others = [other for other in chosen.values() if other is not one]
            if placed(freed(soon, (gpu for other in others for gpu in other.gpus)), job) is not None:
                del chosen[one.name]
        return tuple(chosen.values())

    def _is_late(self, one: Running) -> bool:
        """Return whether a job that was let in before its turn runs longer than its plan said."""
        return one.backfilled and one.ends_s is not None and one.ends_s <= self.now

    def _free_told(self) -> str:
        most = max((len(own) for own in self.free.values()), default=0)
        total = sum(len(own) for own in self.free.values())
        return f"{total} are free" + (f", {most} of them on a node" if total > most else "")


def _cheapest(
    own: Sequence[int], node: str, needed: int, may: Sequence[Running], chosen: Mapping[str, Running]
) -> tuple[float, tuple[Running, ...]]:
    """Return the least GPU-seconds that are lost where so many GPUs of a node become free, and the jobs that make room."""

    def gives(one: Running) -> int:
        return sum(where == node for where, _ in one.gpus)

    missing = needed - len(own) - sum(gives(one) for one in chosen.values())
    if missing <= 0:
        return 0.0, ()
    there = sorted((one for one in may if one.name not in chosen and gives(one)), key=lambda one: one.lost_gpu_s)
    there = there[:MOST_COMBINED]
    best: tuple[float, tuple[Running, ...]] = (inf, ())
    for number in range(1, len(there) + 1):
        for some in combinations(there, number):
            cost = sum(one.lost_gpu_s for one in some)
            if cost < best[0] and sum(gives(one) for one in some) >= missing:
                best = cost, some
    return best


def _shape(job: Waiting) -> str:
    gpus = f"{job.num_gpus} GPU{'' if job.num_gpus == 1 else 's'}"
    return f"{gpus} on {_nodes(job.num_nodes)}"


def _nodes(number: int) -> str:
    return "a node" if number == 1 else f"{number} nodes"


def _time(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
