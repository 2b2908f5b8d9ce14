"""What a worker's training thread is doing, as another thread sees it."""

from __future__ import annotations

import json
import threading

import torch
import torch.distributed as dist

from orchestrator.training.pulse import Pulse, Sign


def test_a_phase_that_is_entered_is_a_new_sign_and_one_told_again_is_none():
    pulse = Pulse()
    assert pulse.sign().phase == "rendezvous"
    pulse.enter("step", 3)
    first, again = pulse.sign(), pulse.sign()
    pulse.enter("step", 4)
    assert (first.phase, first.step, again.count) == ("step", 3, first.count)
    assert pulse.sign().count == first.count + 1


def test_a_sign_travels_as_json_and_names_the_innermost_call_of_the_training_thread():
    pulse, release, seen = [], threading.Event(), []

    def train():
        pulse.append(Pulse())
        release.wait(20)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    while not (seen and "threading.py" in seen[-1].calls[-1]):
        seen += [each.sign() for each in pulse]
    release.set()
    assert seen[-1].calls[-1].endswith(" wait")
    assert any(call.endswith(" train") for call in seen[-1].calls)
    assert Sign.from_mapping(json.loads(json.dumps(seen[-1].to_mapping()))) == seen[-1]


def test_a_thread_that_waits_for_its_data_waits_for_no_other_rank():
    pulse = Pulse()
    pulse.enter("data", 7)
    assert not pulse.sign().waits


def test_a_thread_inside_a_collective_waits_for_other_ranks():
    """A receive from a rank that sends nothing: a world of two in one process, of which the other half is idle."""
    stores = dist.HashStore()
    seen: list[Sign] = []

    def one(rank, ready, done):
        group = dist.ProcessGroupGloo(stores, rank, 2, dist.distributed_c10d.default_pg_timeout)
        if rank == 0:
            pulse = Pulse()
            pulse.enter("step", 7)
            look = threading.Timer(0.5, lambda: (seen.append(pulse.sign()), done.set()))
            look.start()
            work = group.recv([torch.zeros(1)], 1, 0)
            ready.set()
            work.wait()
        else:
            ready.wait(10)
            done.wait(10)
            group.send([torch.ones(1)], 0, 0).wait()

    ready, done = threading.Event(), threading.Event()
    threads = [threading.Thread(target=one, args=(rank, ready, done), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [sign.waits for sign in seen] == [True]
    assert seen[0].step == 7
