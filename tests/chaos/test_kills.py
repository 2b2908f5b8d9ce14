"""kill -9 of a worker, of Ray's raylet and of everything at once: the run resumes and its losses are those of the
undisturbed run, bit for bit. Three workers: two hide the order in which gradients are summed. `make chaos` is the long form.
"""

from __future__ import annotations

import random

import pytest

from benchmarks import chaos
from orchestrator.telemetry.records import Event, read

pytestmark = pytest.mark.ray


def test_a_killed_run_has_the_losses_of_an_undisturbed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(chaos, "TARGETS", ("worker", "raylet", "everything"))
    monkeypatch.setattr(chaos, "MOMENTS", ("step", "checkpoint", "step"))
    log = tmp_path / "log"
    calm = chaos.job(tmp_path, name="calm", workers=3, steps=60)
    wild = chaos.job(tmp_path, name="wild", workers=3, steps=60)
    wanted = chaos.undisturbed(calm, tmp_path / "runs" / "calm", log)
    folder = tmp_path / "runs" / "wild"
    kills = list(chaos.disturb(wild, folder, kills=3, rng=random.Random(1), log=log))
    assert sorted(kill.target for kill in kills) == ["everything", "raylet", "worker"]
    assert chaos.differences(folder, wanted) == []
    assert len(wanted) == 60
    events = list(read(folder / "events.jsonl", Event))
    causes = {event.details["failure"] for event in events if event.kind == "restart"}
    assert {"worker_lost", "ray_lost"} <= causes
    assert not [event for event in events if event.kind == "checkpoint_refused"]
