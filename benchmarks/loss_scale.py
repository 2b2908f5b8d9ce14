"""`python -m benchmarks.loss_scale`: the loss scale of the first steps in fp16, and what it leaves of the gradient of a logit.

One process trains a small model on one batch of PLAYED tokens. The gradients of weights are those of a mean over the batch, so
the scale takes the way that it would take at a larger one. The gradient of a logit is divided by tokens: told is what fp16
rounds away of that of an untrained one, among VOCABULARY, at each scale that the run has, divided by all tokens of the batch
that is asked for and as the engine divides it (native.share_of).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cases import ARCH, Case, Task
from benchmarks.parity import OPTIMIZER, SEED, micro_batches, module_of
from orchestrator.models.decoder import initial_weights
from strategies.engines.native import build_session, share_of
from strategies.engines.token_losses import token_losses

VOCABULARY = 50272
PLAYED, SEQUENCE = 4096, 16


def lost(factor: float) -> float:
    """Part of a logit's gradient, off the target, that is rounded away where a token's loss is multiplied by `factor`."""
    logits = torch.zeros(1, VOCABULARY, dtype=torch.float16, requires_grad=True)
    losses, _ = token_losses(logits, torch.tensor([0]))
    (losses.sum() * factor).backward()
    gradient, exact = logits.grad, factor / VOCABULARY
    assert gradient is not None
    return abs(float(gradient[0, 1]) - exact) / exact


def scales(num_steps: int) -> tuple[Counter[float], int, float]:
    """(steps at each scale, steps skipped, the last loss)."""
    task = Task(replace(ARCH, num_layers=2), PLAYED // SEQUENCE, SEQUENCE)
    case = Case(world_size=1, zero_stage=0, precision="fp16", micro_batch_size=8, task=task)
    with torch.device("meta"):
        module = module_of(task)
    session: Any = build_session(
        module, strategy=case.strategy, precision="fp16", weights=initial_weights(task.arch, SEED), optimizer=OPTIMIZER
    )
    batches, told, skipped, loss = micro_batches(case, 0), Counter[float](), 0, 0.0
    for _ in range(num_steps):
        told[session.scale] += 1
        result = session.step(batches, num_targets=PLAYED, learning_rate=1e-3)
        skipped, loss = skipped + result.skipped, result.loss
    return told, skipped, loss


def main() -> int:
    parser = argparse.ArgumentParser(description="The loss scale of the first steps in fp16.")
    parser.add_argument("--tokens", type=int, default=2**22, help="of a global batch")
    parser.add_argument("--micro-batch", type=int, default=2**11, help="tokens of a micro batch")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    told, skipped, loss = scales(args.steps)
    print(f"{args.steps} steps, {skipped} of them skipped, to a loss of {loss:.3f} nats")
    print(f"{'scale':>9} {'steps':>6}  lost of a logit's gradient: over {args.tokens} tokens, as the engine divides")
    for scale, count in told.items():
        whole = scale / args.tokens
        print(f"{scale:9.0f} {count:6}  {lost(whole):.1%}, {lost(whole / share_of(args.micro_batch, args.tokens)):.1%}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
