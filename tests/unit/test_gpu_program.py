"""`make gpu` in a bare checkout: the dry run measures and predicts with torch, numpy, PyYAML and pydantic alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = ["ray", "rich", "click", "psutil", "pynvml", "pyarrow", "tokenizers", "safetensors", "prometheus_client"]
ABSENT += ["transformers", "accelerate"]


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """The JSON of a dry run in which none of ABSENT can be imported, in child processes neither."""
    folder = tmp_path_factory.mktemp("gpu")
    blocked = folder / "blocked"
    blocked.mkdir()
    for name in ABSENT:
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} is not there in a bare checkout')\n")
    output = folder / "gpu.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--steps", "1", "--output", str(output)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(blocked), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )
    return json.loads(output.read_text())


def test_the_machine_is_described(document):
    assert document["dry_run"]
    assert {"cluster", "accelerator", "num_gpus", "peak_flops", "torch", "cuda"} <= set(document["machine"])


def test_every_case_is_measured_beside_its_prediction(document):
    cases = document["cases"]
    shown = {(case["zero_stage"], case["activation_checkpointing"], case["offload"]["optimizer"]) for case in cases}
    assert shown == {(0, "none", "none"), (0, "none", "host"), (3, "full", "none")}
    for case in cases:
        assert "error" not in case
        for side in ("measured", "predicted"):
            assert {"step_s", "tokens_per_second_per_gpu", "mfu", "tensor_peak_bytes"} <= set(case[side])
            assert case[side]["tokens_per_second_per_gpu"] > 0
        assert {"peak_allocated_bytes", "peak_reserved_bytes", "components"} <= set(case["measured"])
        assert set(case["predicted_over_measured"]) == {
            "tokens_per_second",
            "tensor_peak_bytes",
            "allocated_bytes",
            "reserved_bytes",
        }
