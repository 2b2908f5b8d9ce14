"""The tracker's bytes are those that can be counted by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from orchestrator.planner.trace.live_bytes import LiveBytes


def test_a_two_layer_step_holds_the_bytes_one_can_count_by_eye():
    first, head = torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 1000, bias=False)
    x = torch.randn(32, 64)
    parameters = [*first.parameters(), *head.parameters()]

    def loss() -> torch.Tensor:
        return F.cross_entropy(head(F.relu(first(x))), torch.zeros(32, dtype=torch.long))

    with LiveBytes({"parameters": parameters}, vocab_size=1000) as live:
        value = loss()
        in_forward = dict(live.live)
        value.backward()

    assert in_forward["parameters"] == 4 * (64 * 64 + 1000 * 64)
    assert in_forward["logits"] == 4 * 32 * 1000, "the log-softmax alone is kept: logits themselves are freed"
    hidden_bytes = 4 * 32 * 64
    assert hidden_bytes <= in_forward["activations"] <= hidden_bytes + 1024
    del value
    assert live.live["temporary"] == 4 * (64 * 64 + 1000 * 64), "what is left of backward is the gradients"
    assert live.peak_phase == "backward"
    assert live.peak_bytes >= sum(in_forward.values())


def test_a_storage_that_is_resized_changes_the_count_and_the_patch_is_taken_back():
    before = torch.UntypedStorage.resize_
    tensor = torch.zeros(100)
    with LiveBytes({"parameters": [tensor]}) as live:
        gathered = torch.empty(0)
        gathered.untyped_storage().resize_(4096)
        assert live.live["gathered_parameters"] == 4096
        gathered.untyped_storage().resize_(0)
        assert live.live["gathered_parameters"] == 0
    assert torch.UntypedStorage.resize_ is before
    assert live.peak_bytes == 400 + 4096
