"""The queue's decisions: who starts, who makes room, and the sentence that says why another waits."""

from __future__ import annotations

import random
import time
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control.queue import (
    MOST_TRIED,
    START_S,
    Decision,
    Node,
    Running,
    Waiting,
    bound_s,
    decide,
    earliest,
    freed,
    placed,
)

TWO = [Node("n0", 4), Node("n1", 4)]


def gpus(node: str, *numbers: int) -> tuple[tuple[str, int], ...]:
    return tuple((node, number) for number in numbers)


def started(decision: Decision) -> dict[str, tuple[tuple[str, int], ...]]:
    return {start.name: start.gpus for start in decision.starts}


# Gangs and order ------------------------------------------------------------------------------------------------------


def test_a_job_gets_all_of_its_gpus_or_none():
    made = decide([Waiting("a", "ada", 8, 2), Waiting("b", "ada", 1, queued_s=1)], [], TWO, now=0)
    assert started(made) == {"a": (*gpus("n0", 0, 1, 2, 3), *gpus("n1", 0, 1, 2, 3))}
    busy = [Running("x", "bob", gpus("n1", 2))]
    made = decide([Waiting("a", "ada", 8, 2)], busy, TWO, now=0)
    assert made.starts == ()
    needs = "is next: needs 8 GPUs on 2 nodes, 7 are free, 4 of them on a node"
    assert made.reasons == {"a": f"{needs}; waits until x ends, and no plan says when"}


@pytest.mark.parametrize(
    ("job", "nodes", "where"),
    [
        (Waiting("a", "ada", 2), {"n0": [0, 1, 2, 3], "n1": [2, 3]}, gpus("n1", 2, 3)),  # fills a node that is begun
        (Waiting("a", "ada", 3), {"n0": [0, 1, 2, 3], "n1": [2, 3]}, gpus("n0", 0, 1, 2)),
        (Waiting("a", "ada", 4, 2), {"n0": [1], "n1": [0, 1, 2, 3], "n2": [2, 3]}, (*gpus("n2", 2, 3), *gpus("n1", 0, 1))),
        (Waiting("a", "ada", 4), {"n0": [0, 1, 2], "n1": [3]}, None),  # one node, as its plan says: four are free on two
    ],
)  # fmt: skip
def test_a_job_is_placed_on_as_many_nodes_as_its_plan_has(job, nodes, where):
    assert placed(nodes, job) == where


@pytest.mark.parametrize(
    ("waiting", "usage", "order"),
    [
        ([Waiting("late", "ada", 4, queued_s=2), Waiting("early", "ada", 4, queued_s=1)], {}, ["early", "late"]),
        ([Waiting("low", "ada", 4), Waiting("high", "ada", 4, priority=1, queued_s=9)], {}, ["high", "low"]),
        ([Waiting("a", "ada", 4), Waiting("b", "bob", 4, queued_s=9)], {"ada": 3600.0}, ["b", "a"]),  # bob had less
        (
            [*(Waiting(f"a{n}", "ada", 4, queued_s=n) for n in range(3)), Waiting("b", "bob", 4, queued_s=9)],
            {},
            ["a0", "b"],  # one of each, though all of ada's are older
        ),
    ],
)
def test_the_order_is_by_priority_then_by_what_users_have_had_then_by_age(waiting, usage, order):
    made = decide(waiting, [], TWO, now=10, usage=usage)
    assert [start.name for start in made.starts] == order


def test_a_quota_holds_back_its_user_and_nobody_else():
    waiting = [Waiting("a", "ada", 2, queued_s=1), Waiting("b", "bob", 2, queued_s=2)]
    made = decide(waiting, [Running("x", "ada", gpus("n0", 0, 1))], TWO, now=5, quotas={"ada": 3})
    assert list(started(made)) == ["b"]
    assert made.reasons == {"a": "needs 2 GPUs on a node; ada uses 2 of a quota of 3"}


def test_a_job_that_no_node_can_take_holds_back_nobody():
    nodes = [Node("n0", 4), Node("n1", 4, cordoned=True)]
    made = decide([Waiting("a", "ada", 8, 2), Waiting("b", "ada", 1, queued_s=1)], [], nodes, now=5)
    assert started(made) == {"b": gpus("n0", 0)}
    assert made.reasons == {"a": "needs 8 GPUs on 2 nodes; those that take jobs have 4 GPUs on a node"}


def test_a_job_that_waited_longer_than_it_wants_is_given_up():
    waiting = [Waiting("a", "ada", 1, queued_s=0, max_wait_s=9), Waiting("b", "ada", 1, queued_s=0, max_wait_s=11)]
    made = decide(waiting, [], TWO, now=10)
    assert (made.expired, list(started(made))) == (("a",), ["b"])


# Backfill -------------------------------------------------------------------------------------------------------------

BUSY = [Running("x", "bob", gpus("n0", 0, 1, 2, 3), ends_s=100.0), Running("y", "bob", gpus("n1", 0), ends_s=400.0)]
HEAD = Waiting("head", "ada", 4)


@pytest.mark.parametrize(
    ("job", "starts"),
    [
        (Waiting("short", "ada", 1, queued_s=1, bound_s=50), True),
        (Waiting("long", "ada", 3, queued_s=1, bound_s=5000), True),  # on n1, which the head does not need
        (Waiting("wide", "ada", 4, queued_s=1, bound_s=50), False),
    ],
)
def test_a_later_job_starts_before_the_head_where_that_does_not_delay_it(job, starts):
    made = decide([HEAD, job], BUSY, TWO, now=0)
    assert (made.head, made.reserved_s, made.reserved) == ("head", 100.0, gpus("n0", 0, 1, 2, 3))
    assert (job.name in started(made)) == starts
    assert all(start.backfilled for start in made.starts)
    told = "is next: needs 4 GPUs on a node, 3 are free; in at most 100 s, when x ends"
    assert made.reasons["head"] == told


@pytest.mark.parametrize(
    ("bound", "starts"), [(99.0, True), (100.0, True), (101.0, False), (None, False)], ids=["ends", "just", "late", "unknown"]
)  # fmt: skip
def test_a_job_on_the_heads_own_gpus_must_end_in_time(bound, starts):
    busy = [Running("x", "bob", gpus("n0", 0, 1), ends_s=100.0)]
    made = decide([HEAD, Waiting("b", "ada", 2, queued_s=1, bound_s=bound)], busy, TWO[:1], now=0)
    assert (list(started(made)) == ["b"]) == starts
    if not starts:
        assert made.reasons["b"] == "needs 2 GPUs on a node, and would delay head, which is next"


def test_a_plans_stated_error_makes_it_take_longer():
    assert bound_s(1000.0, 0.2) == START_S + 1200
    assert bound_s(1000.0, 0.2, done=0.5) == START_S + 600
    assert bound_s(None, 0.2) is None


def test_a_backfilled_job_that_takes_longer_than_planned_makes_room():
    late = Running("b", "bob", gpus("n0", 0, 1), ends_s=50.0, backfilled=True, lost_gpu_s=10)
    made = decide([HEAD], [late], TWO[:1], now=60)
    assert [(one.name, one.cause) for one in made.preemptions] == [
        ("b", "makes room for head, it takes longer than its plan said")
    ]
    assert decide([HEAD], [late._replace(ends_s=70.0)], TWO[:1], now=60).preemptions == ()
    assert decide([HEAD], [late._replace(preemptible=False)], TWO[:1], now=60).preemptions == ()


# Preemption -----------------------------------------------------------------------------------------------------------


def test_what_is_preempted_costs_the_least_work():
    busy = [
        Running("a", "bob", gpus("n0", 0, 1), lost_gpu_s=50),
        Running("b", "bob", gpus("n0", 2, 3), lost_gpu_s=60),
        Running("c", "bob", gpus("n1", 0, 1, 2, 3), lost_gpu_s=100),
    ]
    head = HEAD._replace(priority=1)
    assert [one.name for one in decide([head], busy, TWO, now=0).preemptions] == ["c"]
    busy[2] = busy[2]._replace(preemptible=False)
    made = decide([head], busy, TWO, now=0)
    assert sorted(one.name for one in made.preemptions) == ["a", "b"]
    assert made.reasons["head"] == "is next: a, b is stopped for it"
    assert decide([HEAD], busy, TWO, now=0).preemptions == (), "of the same priority"
    stopping = [one._replace(stopping=True) for one in busy[:2]]
    assert decide([head], [*stopping, busy[2]], TWO, now=0).preemptions == (), "they make room already"


def test_nobody_is_preempted_in_vain():
    busy = [Running("a", "bob", gpus("n0", 0)), Running("b", "bob", gpus("n0", 1), preemptible=False)]
    assert decide([HEAD._replace(priority=1)], busy, TWO[:1], now=0).preemptions == ()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 50)), min_size=1, max_size=6), st.integers(1, 6))
def test_the_cheapest_set_is_the_cheapest_of_all_sets(jobs, needed):
    """On one node, against all subsets."""
    busy, at = [], 0
    for number, (size, cost) in enumerate(jobs):
        busy.append(Running(f"j{number}", "bob", gpus("n0", *range(at, at + size)), lost_gpu_s=cost))
        at += size
    node = Node("n0", max(at, needed))
    made = decide([Waiting("head", "ada", needed, priority=1)], busy, [node], now=0)
    if made.starts:
        return
    missing = needed - (node.num_gpus - at)
    sets = [some for size in range(1, len(busy) + 1) for some in combinations(busy, size)]
    best = min(sum(one.lost_gpu_s for one in some) for some in sets if sum(len(one.gpus) for one in some) >= missing)
    chosen = {one.name for one in made.preemptions}
    assert sum(one.lost_gpu_s for one in busy if one.name in chosen) == best


# Always ---------------------------------------------------------------------------------------------------------------


@st.composite
def states(draw):
    nodes = [
        Node(f"n{n}", draw(st.integers(1, 8)), draw(st.integers(0, 9)) == 0) for n in range(draw(st.integers(1, 4)))
    ]
    random_ = draw(st.randoms(use_true_random=False))
    open_ = [(node.name, gpu) for node in nodes for gpu in range(node.num_gpus)]
    random_.shuffle(open_)
    running = []
    while open_ and draw(st.booleans()):
        taken, open_ = open_[: (size := random_.randint(1, 4))], open_[size:]
        running.append(
            Running(
                f"r{len(running)}", random_.choice("xyz"), tuple(taken), random_.randint(0, 2),
                random_.choice([None, 50.0, 150.0, 500.0]), random_.random() < 0.7, random_.random() * 100,
                random_.random() < 0.3, random_.random() < 0.2,
            )
        )  # fmt: skip
    waiting = []
    for number in range(draw(st.integers(0, 12))):
        spread = random_.choice([1, 1, 2, 3])
        bound = random_.choice([None, 20.0, 90.0, 400.0])
        size, priority = spread * random_.randint(1, 8), random_.randint(0, 2)
        waiting.append(Waiting(f"w{number}", random_.choice("xyz"), size, spread, priority, number, bound))
    return nodes, running, waiting, {"x": random_.randint(1, 12)}


@settings(max_examples=400, deadline=None)
@given(states())
def test_no_gpu_is_given_twice_and_backfill_never_delays_the_head(state):
    nodes, running, waiting, quotas = state
    now = 100.0
    made = decide(waiting, running, nodes, now=now, quotas=quotas)
    by_name = {job.name: job for job in waiting}
    given_ = [gpu for start in made.starts for gpu in start.gpus] + [gpu for one in running for gpu in one.gpus]
    assert len(given_) == len(set(given_))
    open_ = {(node.name, gpu) for node in nodes if not node.cordoned for gpu in range(node.num_gpus)}
    for start in made.starts:
        job = by_name[start.name]
        assert set(start.gpus) <= open_
        assert len(start.gpus) == job.num_gpus
        per_node = [sum(where == node.name for where, _ in start.gpus) for node in nodes]
        assert sum(count > 0 for count in per_node) <= job.num_nodes
        assert max(per_node) <= job.per_node
    had = sum(len(one.gpus) for one in running if one.user == "x")
    new = sum(len(start.gpus) for start in made.starts if by_name[start.name].user == "x")
    assert new == 0 or had + new <= quotas["x"]
    assert {start.name for start in made.starts} | made.reasons.keys() == by_name.keys()
    if made.head is None:
        return
    head = by_name[made.head]
    stopped = {one.name for one in made.preemptions}
    then = [one._replace(stopping=one.stopping or one.name in stopped) for one in running]
    in_turn = [start for start in made.starts if not start.backfilled]
    before = [*then, *(as_running(start, by_name, now) for start in in_turn)]
    free = {node.name: [] for node in nodes if not node.cordoned}
    free = freed(free, open_ - {gpu for one in before for gpu in one.gpus})
    undelayed = earliest(free, before, head, now)[0]
    all_of_them = [*before, *(as_running(start, by_name, now) for start in made.starts if start.backfilled)]
    free = freed({node: [] for node in free}, open_ - {gpu for one in all_of_them for gpu in one.gpus})
    assert earliest(free, all_of_them, head, now)[0] <= undelayed


def as_running(start, by_name, now) -> Running:
    job = by_name[start.name]
    ends_s = None if job.bound_s is None else now + job.bound_s
    return Running(job.name, job.user, start.gpus, job.priority, ends_s, backfilled=start.backfilled)


# A queue of 60 jobs on 8 x 8 GPUs, on a simulated clock ---------------------------------------------------------------


def simulated(seed: int, *, overrun: float = 0.0):
    """Return {job: (first start, end)}, the jobs, and how long GPUs were busy, of one simulated queue.

    A job takes at most what its plan says; with `overrun`, that share of them takes twice as long."""
    random_ = random.Random(seed)
    nodes = [Node(f"n{number}", 8) for number in range(8)]
    shapes = [(1, 1), (2, 1), (4, 1), (8, 1), (16, 2), (32, 4), (64, 8)]
    jobs, takes = {}, {}
    for number in range(60):
        num_gpus, num_nodes = random_.choices(shapes, weights=(12, 10, 10, 10, 6, 3, 2))[0]
        bound = random_.uniform(100, 3000)
        name = f"job-{number:02d}"
        jobs[name] = Waiting(
            name, random_.choice(("ada", "bob", "eve")), num_gpus, num_nodes, random_.choice((0, 0, 0, 1)),
            random_.uniform(0, 2000), bound,
        )  # fmt: skip
        takes[name] = bound * (2.0 if random_.random() < overrun else random_.uniform(0.4, 1.0))
    left, running, ended, first, now, busy = dict(takes), {}, {}, {}, 0.0, 0.0
    promised: dict[str, float] = {}
    usage: dict[str, float] = {}
    while len(ended) < len(jobs):
        waiting = [
            job._replace(bound_s=job.bound_s * left[name] / takes[name])
            for name, job in jobs.items()
            if job.queued_s <= now and name not in running and name not in ended
        ]
        made = decide(waiting, list(running.values()), nodes, now=now, usage=usage)
        held = [gpu for one in running.values() for gpu in one.gpus] + [gpu for s in made.starts for gpu in s.gpus]
        assert len(held) == len(set(held)), "a GPU is given twice"
        if made.head is not None:
            promised[made.head] = min(promised.get(made.head, made.reserved_s), made.reserved_s)
        for one in made.preemptions:  # a checkpoint, and it waits again
            assert jobs[one.name].priority < jobs[made.head].priority or running[one.name].backfilled
            del running[one.name]
        for start in made.starts:
            job = jobs[start.name]
            bound = next(one.bound_s for one in waiting if one.name == start.name)
            running[start.name] = Running(
                job.name, job.user, start.gpus, job.priority, now + bound, lost_gpu_s=60.0 * job.num_gpus,
                backfilled=start.backfilled,
            )  # fmt: skip
            first.setdefault(start.name, now)
        ends = [left[name] for name in running]
        arrivals = [job.queued_s - now for job in jobs.values() if job.queued_s > now]
        lates = [one.ends_s - now for one in running.values() if one.ends_s > now]
        passed = 0.0 if made.preemptions else max(1e-6, min(ends + arrivals + lates, default=1.0))
        now += passed
        assert now < 1e6, "the queue does not move"
        for name in list(running):
            left[name] -= passed
            size = jobs[name].num_gpus
            busy += passed * size
            usage[jobs[name].user] = usage.get(jobs[name].user, 0.0) + passed * size
            if left[name] <= 1e-6:
                ended[name] = now
                del running[name]
    return {name: (first[name], ended[name]) for name in jobs}, jobs, busy / (64 * now)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("overrun", [0.0, 0.3], ids=["as planned", "longer than planned"])
def test_sixty_jobs_of_every_size_share_64_gpus(seed, overrun):
    times, jobs, busy = simulated(seed, overrun=overrun)
    assert len(times) == 60
    assert busy > 0.6, "GPUs stand idle while jobs wait"
    waits = {
        high: [times[name][0] - job.queued_s for name, job in jobs.items() if job.priority == high] for high in (0, 1)
    }
    assert sum(waits[1]) / len(waits[1]) < 0.5 * sum(waits[0]) / len(waits[0]), "priority shortens the wait"
    whole = [name for name, job in jobs.items() if job.num_gpus == 64]
    assert all(times[name][0] < max(end for _, end in times.values()) for name in whole), "the largest is not starved"


# Ten thousand ---------------------------------------------------------------------------------------------------------


def test_a_pass_over_ten_thousand_jobs_looks_at_a_bounded_number():
    """Counted in calls of `placed`; the time of a pass is printed by benchmarks/service.py."""
    from orchestrator.control import queue

    nodes = [Node(f"n{number}", 8) for number in range(8)]
    busy = [Running(f"r{n}", "bob", gpus(f"n{n}", *range(6)), ends_s=1e4) for n in range(8)]
    counts = []
    for number in (1_000, 10_000):
        waiting = [Waiting(f"w{n}", f"u{n % 7}", 4, queued_s=n, bound_s=2e4) for n in range(number)]
        calls = 0
        real = queue.placed

        def counted(free, job, real=real):
            nonlocal calls
            calls += 1
            return real(free, job)

        queue.placed = counted
        try:
            began = time.perf_counter()
            made = decide(waiting, busy, nodes, now=0)
            assert time.perf_counter() - began < 5
        finally:
            queue.placed = real
        assert len(made.reasons) == MOST_TRIED + 1
        counts.append(calls)
    assert counts[0] == counts[1]
