"""`make parity`: every strategy of the native engine against one plain process, as a table.

Four questions: does a strategy follow the plain run (fp64 proves it, fp32 and bf16 within a bound); so does what the planner
draws under a memory budget; does a run that was saved under one strategy go on under another as if nothing had happened; and
is a resumed run, under the same strategy, the undisturbed one bit for bit. The reference is a loop of plain torch
(torch.optim.AdamW, torch's clip).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from benchmarks.cases import Case, Run, Task, Trial
from benchmarks.drawn import coverage, drawn
from benchmarks.matrix import matrix
from benchmarks.pool import Pool
from orchestrator.models.decoder import Decoder, initial_weights
from orchestrator.training.blanks import Specials, blank_row
from orchestrator.training.losses import DpoLoss, RewardLoss
from strategies.engines.engine import Loss, MicroBatch, OptimizerSettings
from strategies.engines.loss import TOKEN_LOSS
from strategies.engines.native import build_session
from strategies.tensor.region import WHOLE

SEED = 5
NUM_DRAWN = 40
LEARNING_RATE = 1e-2
# epsilon 1e-6: with 1e-8 Adam turns rounding of vanishing gradients into steps of full size.
OPTIMIZER = OptimizerSettings(betas=(0.9, 0.95), epsilon=1e-6, weight_decay=0.1, gradient_clip=1.0)
BOUNDS: dict[str, tuple[int, float, float | None]] = {
    "fp64": (20, 1e-10, 1e-9),
    "fp32": (3, 1e-5, None),
    "bf16": (10, 5e-2, None),
    "fp16": (10, 5e-2, None),
}
"""Steps, bound on losses, bound on final weights; the 16-bit ones are held against fp32."""
BUCKET_BYTES = 4096
"""Several buckets for this tiny model."""


@dataclass(frozen=True)
class Verdict:
    trial: str
    passed: bool
    loss: float
    """Worst deviation of a step's loss, nats; of the weights the same."""
    weights: float
    seconds: float


def batch(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """One repeated batch: fresh random targets would keep the loss near ln V and hide wrong gradients."""
    shape = task.global_batch_size, task.sequence_length + 1
    ids = torch.randint(0, task.arch.vocab_size, shape, generator=torch.Generator().manual_seed(SEED))
    return ids[:, :-1], ids[:, 1:]


LOSSES: dict[str, Loss] = {"tokens": TOKEN_LOSS, "reward": RewardLoss(), "dpo": DpoLoss(beta=0.5)}


def whole_batch(task: Task) -> MicroBatch:
    """The global batch as one micro batch."""
    inputs, targets = batch(task)
    count, length = inputs.shape
    if task.arch.traits.blank_filling:
        return blanks(task)
    if not task.packed:
        return MicroBatch(input_ids_BS=inputs, target_ids_BS=targets, weight_B=torch.ones(count))
    starts = 1 + torch.arange(count) % (length - 1)  # of the second sample of each row
    segments = {"segment_ids_BS": (torch.arange(length) >= starts[:, None]).long()}
    ends = torch.stack([starts - 1, torch.full_like(starts, length - 1)], -1)[:, None]
    labels = {
        "tokens": {},
        "reward": {"pairs_BP2": ends},
        "dpo": {
            "pairs_BP2": torch.tensor([1, 0]).expand(count, 1, 2),
            "reference_BP2": torch.linspace(-9, -4, 2 * count, dtype=torch.float64).view(count, 1, 2),
        },
    }[task.loss]
    return MicroBatch(
        input_ids_BS=inputs, target_ids_BS=targets, weight_B=torch.ones(count), inputs=segments, labels=labels
    )


def blanks(task: Task) -> MicroBatch:
    """The global batch as rows with blanks; in the place of a text, the batch's tokens, of which every fifth ends a sentence."""
    texts = batch(task)[0].numpy()[:, :-2]
    specials, ends_V = Specials(57, 58, 59, 60), np.arange(task.arch.vocab_size) % 5 == 0
    rows = [
        blank_row(
            text,
            seed=SEED,
            sample=sample,
            specials=specials,
            ends_V=ends_V,
            positions_run_on=not task.arch.traits.block_positions,
        )
        for sample, text in enumerate(texts)
    ]
    return MicroBatch(
        input_ids_BS=torch.from_numpy(np.stack([row.input_ids_S for row in rows])),
        target_ids_BS=torch.from_numpy(np.stack([row.target_ids_S for row in rows])),
        weight_B=torch.ones(len(rows)),
        inputs={
            "prefix_lengths_B": torch.tensor([row.prefix_length for row in rows]),
            "positions_B2S": torch.from_numpy(np.stack([row.positions_2S for row in rows])),
        },
    )


def micro_batches(case: Case | Run, rank: int) -> list[MicroBatch]:
    """This replica's share; what is missing is filled up with sequences of weight 0."""
    whole = whole_batch(case.task)
    strategy, count = case.strategy, case.task.global_batch_size
    size, replica = strategy.micro_batch_size, strategy.degrees.coordinates(rank)["data"]
    result = []
    for i in range(strategy.gradient_accumulation_steps):
        rows = [(i * strategy.data_parallel_degree + replica) * size + j for j in range(size)]
        weight = torch.tensor([1.0 if row < count else 0.0 for row in rows])
        rows = [min(row, count - 1) for row in rows]
        result.append(
            MicroBatch(
                input_ids_BS=whole.input_ids_BS[rows],
                target_ids_BS=whole.target_ids_BS[rows],
                weight_B=weight,
                inputs={name: value[rows] for name, value in whole.inputs.items()},
                labels={name: value[rows] for name, value in whole.labels.items()},
            )
        )
    return result


def reference(task: Task, precision: str, num_steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of one process, in plain torch; 16 bit is held against fp32."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    module, value = module_of(task).to(dtype), initial_weights(task.arch, SEED)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(value(name, parameter.shape))
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    matrices = [p for p in trained.values() if p.dim() >= 2]
    vectors = [p for p in trained.values() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.epsilon,
    )
    whole, criterion = whole_batch(task), LOSSES[task.loss]
    context = [module.context(**whole.inputs)] if whole.inputs else []
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        output = module(whole.input_ids_BS, *context)
        if task.loss == "tokens":
            loss = torch.nn.functional.cross_entropy(output.flatten(0, 1), whole.target_ids_BS.flatten())
        else:
            loss = criterion(WHOLE, output, whole)[1] / criterion.num_targets(whole)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), OPTIMIZER.gradient_clip or 0.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in trained.items()}


def module_of(task: Task) -> Decoder:
    return Decoder(task.arch, values=task.loss == "reward", lora=task.lora)


def session_of(case: Case | Run, bucket_bytes: int = BUCKET_BYTES) -> Any:
    with torch.device("meta"):
        module = module_of(case.task)
    return build_session(
        module,
        strategy=case.strategy,
        precision=case.precision,
        weights=initial_weights(case.task.arch, SEED),
        optimizer=OPTIMIZER,
        bucket_bytes=bucket_bytes,
        loss=LOSSES[case.task.loss],
    )


def steps(session: Any, case: Case | Run, rank: int, num_steps: int) -> list[float]:
    mine, task = micro_batches(case, rank), case.task
    count = int(LOSSES[task.loss].num_targets(whole_batch(task)))
    return [session.step(mine, num_targets=count, learning_rate=LEARNING_RATE).loss for _ in range(num_steps)]


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """A sharded state with every tensor whole, as numpy (whose pickles need no shared memory)."""
    # It advises on the speed of gathers over two axes.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    return {
        name: t.full_tensor().numpy() if hasattr(t, "full_tensor") else t.numpy().copy() if torch.is_tensor(t) else t
        for name, t in state.items()
    }


Piece = tuple[tuple[int, ...], tuple[slice, ...], Any]
"""(shape of the whole, where this rank's part lies in it, the part)."""


def pieces(state: dict[str, Any]) -> dict[str, Any]:
    """What this rank holds of a sharded state: no message, where whole() sends several for each of 200 tensors."""
    result: dict[str, Any] = {}
    for name, value in state.items():
        if not torch.is_tensor(value):
            result[name] = value
            continue
        local, offsets = value, (0,) * value.dim()
        if isinstance(value, DTensor):
            local = value.to_local()
            _, offsets = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
        places = tuple(slice(start, start + size) for start, size in zip(offsets, local.shape, strict=True))
        result[name] = tuple(value.shape), places, local.detach().numpy().copy()
    return result


def save(session: Any, folder: str) -> None:
    state = {n: t if torch.is_tensor(t) else torch.tensor(t) for n, t in session.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


def load(session: Any, folder: str) -> None:
    state = session.state_dict()
    targets = {n: t if torch.is_tensor(t) else torch.tensor(t) for n, t in state.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(targets, checkpoint_id=folder, no_dist=not dist.is_initialized())
    session.load_state_dict({n: t if torch.is_tensor(state[n]) else targets[n].item() for n, t in targets.items()})


def play(rank: int, case: Case | Run, count: int, load_from: str | None, save_to: str | None) -> Any:
    """On one rank: `count` steps; (losses, its pieces of the state)."""
    session = session_of(case)
    if load_from:
        load(session, load_from)
    losses = steps(session, case, rank, count)
    if save_to:
        save(session, save_to)
    state = pieces(session.state_dict())
    session.close()
    return losses, state


def all_of(results: list[Any]) -> tuple[list[float], dict[str, Any]]:
    """The losses, which every rank tells alike, and the whole state; what several ranks hold must be the same bits."""
    losses = results[0][0]
    assert all(told == losses for told, _ in results)
    state: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    for _, part in results:
        for name, piece in part.items():
            if not isinstance(piece, tuple):
                assert state.setdefault(name, piece) == piece, name
                continue
            shape, places, values = piece
            if name not in state:
                state[name], seen[name] = np.zeros(shape, values.dtype), np.zeros(shape, bool)
            again = seen[name][places]
            assert (state[name][places][again] == values[again]).all(), name
            state[name][places] = values
            seen[name][places] = True
    assert all(covered.all() for covered in seen.values())
    return losses, state


def judge(pool: Pool, trial: Trial) -> Verdict:
    case, then = trial.case, trial.then
    started = time.perf_counter()
    num_steps, loss_bound, weight_bound = BOUNDS[case.precision]
    expected, weights = reference(case.task, case.precision, num_steps)
    if then is None:
        losses, state = all_of(pool.run(play, case, num_steps, None, None, world_size=case.world_size))
    else:
        half = num_steps // 2
        with tempfile.TemporaryDirectory() as folder:
            losses, _ = all_of(pool.run(play, case, half, None, folder, world_size=case.world_size))
            rest, state = all_of(pool.run(play, then, num_steps - half, folder, None, world_size=then.world_size))
        losses += rest
    if trial.kind == "bitwise":
        expected, undisturbed = all_of(pool.run(play, case, num_steps, None, None, world_size=case.world_size))
        same = all(
            (state[name] == value).all() for name, value in undisturbed.items() if name.startswith("optimizer.e")
        )
        weights = {n[6:]: torch.from_numpy(t) for n, t in undisturbed.items() if n.startswith("model.")}
        loss_bound, weight_bound = (0.0, 0.0) if same else (-1.0, -1.0)
    loss = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    weight = max(float((torch.from_numpy(state[f"model.{n}"]) - w).abs().max()) for n, w in weights.items())
    passed = bool(loss <= loss_bound and (weight_bound is None or weight <= weight_bound))
    return Verdict(str(trial), passed, loss, weight, time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description="Every strategy of the native engine against one process.")
    parser.add_argument("--slice", type=int, help="only so many rows, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("parity", "drawn", "family", "context", "resume", "bitwise"))
    parser.add_argument("--log", type=Path, help="keeps the rows' verdicts; those it has are not played again")
    args = parser.parse_args()
    trials = [*matrix(), *(Trial(run) for run in drawn(NUM_DRAWN, args.seed))]
    trials = [trial for trial in trials if args.only in (None, trial.kind)]
    if args.slice:
        trials = random.Random(args.seed).sample(trials, args.slice)
    known = _known(args.log)
    verdicts = []
    with Pool(max(trial.world_size for trial in trials)) as pool:
        print(f"{'':4} {'loss':>8} {'weights':>8} {'s':>5}  worst deviation, of")
        for trial in trials:
            verdict = known.get(str(trial)) or judge(pool, trial)
            verdicts.append(verdict)
            print(f"{'pass' if verdict.passed else 'FAIL'} {verdict.loss:8.1e} {verdict.weights:8.1e} "
                  f"{verdict.seconds:5.1f}  {trial}", flush=True)  # fmt: skip
            if args.log and str(trial) not in known:
                with args.log.open("a") as log:
                    log.write(json.dumps(asdict(verdict)) + "\n")
    _summarize(verdicts, trials)
    return 0 if all(v.passed for v in verdicts) else 1


def _known(log: Path | None) -> dict[str, Verdict]:
    lines = log.read_text().splitlines() if log and log.exists() else []
    verdicts = [Verdict(**json.loads(line)) for line in lines]
    return {verdict.trial: verdict for verdict in verdicts}


def _summarize(verdicts: list[Verdict], trials: list[Trial]) -> None:
    print(f"{sum(v.passed for v in verdicts)} of {len(verdicts)} pass in {sum(v.seconds for v in verdicts):.0f} s.")
    print("Bounds on loss and weights: " + "; ".join(
        f"{precision} over {count} steps {loss:g}" + (f" and {weight:g}" if weight else "")
        for precision, (count, loss, weight) in BOUNDS.items()) + "; bitwise 0 and 0")  # fmt: skip
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for trial, verdict in zip(trials, verdicts, strict=True):
        groups.setdefault((trial.kind, trial.case.precision), []).append(verdict)
    print(f"{'rows':8} {'':4} {'pass':>9} {'loss':>8} {'weights':>8} {'s':>6}")
    for (kind, precision), mine in groups.items():
        print(f"{kind:8} {precision:4} {sum(v.passed for v in mine):>3} of {len(mine):>3} {max(v.loss for v in mine):8.1e} "
              f"{max(v.weights for v in mine):8.1e} {sum(v.seconds for v in mine):6.0f}")  # fmt: skip
    runs = [trial.case for trial in trials if trial.kind == "drawn" and isinstance(trial.case, Run)]
    if runs:
        held = coverage(runs)
        print("The planner's draws hold: " + ", ".join(f"{name} {count}" for name, count in held.items()))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
