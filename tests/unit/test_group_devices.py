"""What a session hands to its process groups lies on the accelerator: NCCL takes nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_every_tensor_that_a_session_sends_lies_on_the_accelerator():
    """The loop's groups for decisions and checkpoints, which are gloo's beside NCCL too, are no part of a session."""
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fake_accelerator"],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert child.returncode == 0, child.stderr
    told = json.loads(child.stdout.splitlines()[-1])
    assert told.pop("a host tensor") == [["allreduce_", "cpu"]], "what does not lie there is seen"
    assert not {row: seen for row, seen in told.items() if {device for _, device in seen} != {"played"}}
    kinds = {operation for seen in told.values() for operation, _ in seen}
    assert kinds >= {"allreduce_", "_allgather_base_", "_reduce_scatter_base_", "send", "recv_"}
