"""kill -9 of a worker and of `run` in every link of a chain: the same steps, bit for bit. The long form is
`python -m benchmarks.recipe --kills`."""

from __future__ import annotations

import json
import random

import pytest
import yaml

from benchmarks import recipe

pytestmark = pytest.mark.ray

MODEL = {"family": "opt", "num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 264, "max_position": 64}
STEPS = 24


def test_a_chain_that_is_killed_in_each_link_does_the_same_steps(tmp_path):
    records = [
        {
            "instruction": f"say {n}",
            "output": f"it is {n}",
            "prompt": f"say {n}",
            "chosen": f"it is {n}",
            "rejected": "no",
        }
        for n in range(60)
    ]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    training = {"steps": STEPS, "precision": "fp32", "schedule": {"warmup_steps": 0}}
    chain = {
        "version": 1,
        "name": "wild",
        "cluster": {"gpu": "cpu", "nodes": 1, "gpus_per_node": 1},
        "strategy": {"zero_stage": 0, "micro_batch_size": 2},
        "batch": {"global_batch_size": 4, "sequence_length": 64},
        "checkpoint": {"every": 3},
        "recovery": {"max_restarts": 1000},
        "training": training,
        "data": {"train": ["records.jsonl"], "validation": 0.1, "template": "plain", "tokenizer": "byte"},
        "chain": [
            {"name": "sft", "task": "sft", "model": MODEL},
            {
                "name": "ppo",
                "task": "ppo",
                "from": "sft",
                "ppo": {"reward": MODEL, "response_length": 8, "kl": {"target": 0.1, "horizon": 50}},
            },
        ],
    }
    file, log = tmp_path / "chain.yaml", tmp_path / "log"
    file.write_text(yaml.safe_dump(chain))
    calm = recipe.read_chain(file, tmp_path / "calm")
    recipe.finish(recipe.start(file, tmp_path / "calm", log), calm, log)
    wild = recipe.read_chain(file, tmp_path / "killed")
    kills = recipe.disturb(file, wild, tmp_path / "killed", log, random.Random(3))
    assert [(link, target) for link, target, _ in sorted(kills)] == [
        ("ppo", "run"), ("ppo", "worker"), ("sft", "run"), ("sft", "worker"),
    ]  # fmt: skip
    assert recipe.differences(calm, wild) == []
    assert len(recipe.told(calm)) == 2 * STEPS
