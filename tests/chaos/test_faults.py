"""A run that loses its terminal, hears half a line, is told to end with all its processes, and then, called again, has a rank
stopped in a collective: its losses are those of the undisturbed run, bit for bit. `make faults` is the long form.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from benchmarks import chaos, faults
from orchestrator.control.processes import marked
from orchestrator.telemetry.records import Event, read
from orchestrator.training.limits import SCALE
from orchestrator.training.manifest import latest

pytestmark = pytest.mark.ray
STEPS = 60


def test_a_run_ends_as_it_should_through_faults_and_names_each(tmp_path):
    calm = chaos.job(tmp_path, name="calm", workers=2, steps=STEPS)
    wanted = chaos.undisturbed(calm, tmp_path / "runs" / "calm", tmp_path / "log")
    scene = faults.Scene(
        directory=tmp_path,
        file=chaos.job(tmp_path, name="wild", workers=2, steps=STEPS),
        folder=tmp_path / "runs" / "wild",
        log=tmp_path / "log",
    )
    try:
        scene.start("nohup")
        scene.until_step(2)
        scene.hang_up()
        faults.garble(scene)
        faults.to_all(scene, signal.SIGTERM)
        assert scene.wait() == 5
        newest = latest(scene.folder / "checkpoints", report=lambda event: None)
        assert newest is not None
        assert newest.step == chaos.last_step(scene.folder) < STEPS - 10

        stuck = {
            "at": "collective",
            "rank": 1,
            "step": newest.step + 6,
            "how": "stop",
            "flag": str(tmp_path / "struck"),
        }
        scene.environment = {
            SCALE: "0.05",
            "STUCK": json.dumps(stuck),
            "PYTHONPATH": f"{Path(faults.__file__).parent / 'stuck'}:{chaos.ROOT}",
        }
        scene.start()
        assert scene.wait() == 0, scene.log.read_text()
    finally:
        scene.close()
    assert chaos.differences(scene.folder, wanted) == []
    causes = {event.kind: event.cause for event in read(scene.folder / "events.jsonl", Event)}
    assert "SIGTERM" in causes["stopped"]
    assert "Input/output error" in causes["watcher_dropped"]
    assert "not JSON" in causes["line_skipped"]
    assert "rank 1 of 2 does not answer" in causes["hang"]
    assert causes["restart"] == causes["hang"]
    assert marked(str(scene.folder.resolve())) == []
