"""`make parity`: every strategy of the native engine against one plain process, as a table.

Three questions: does a strategy follow the plain run (fp64 proves it, fp32 and bf16 within a bound); does a run that
was saved under one strategy go on under another as if nothing had happened; and is a resumed run, under the same
strategy, the undisturbed one bit for bit. The reference is a loop of plain torch (torch.optim.AdamW, torch's clip).
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.pool import Pool
from orchestrator.models.architecture import make_architecture
from orchestrator.models.opt import OPT, initial_weights
from orchestrator.planner.stages import cut
from strategies.engines.engine import MicroBatch, OptimizerSettings
from strategies.engines.native import build_session
from strategies.strategy import MESH_ORDER, Offload, Strategy

ARCH = make_architecture(
    family="opt", num_layers=4, hidden_size=24, num_heads=4, ffn_size=44, vocab_size=61, max_position=16
)
GLOBAL_BATCH, SEQUENCE, SEED = 7, 12, 5
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


NOWHERE = Offload()


@dataclass(frozen=True)
class Case:
    world_size: int
    zero_stage: int
    recompute: str = "none"
    precision: str = "fp64"
    micro_batch_size: int = 2
    group: int = 0
    """0: all replicas."""
    gather: str = "per_micro_batch"
    reduce: str = "per_micro_batch"
    states: str = ""
    offload: Offload = NOWHERE
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    schedule: str = "1f1b"
    sequence_parallel: bool = False
    checkpointed: int | None = None
    """Layers of each stage that are computed again; None: all."""
    mesh_order: tuple[str, ...] = MESH_ORDER

    @property
    def data(self) -> int:
        return self.world_size // (self.tensor * self.pipeline)

    @property
    def strategy(self) -> Strategy:
        mixed = "mixed" if self.zero_stage < 2 else "sharded_fp32"
        return Strategy(
            data_parallel_degree=self.data,
            tensor_parallel_degree=self.tensor,
            pipeline_parallel_degree=self.pipeline,
            num_virtual_stages=self.virtual,
            pipeline_schedule=self.schedule,  # type: ignore[arg-type]
            sequence_parallel=self.sequence_parallel,
            mesh_order=self.mesh_order,  # type: ignore[arg-type]
            stages=cut(
                ARCH.num_layers,
                pipeline=self.pipeline,
                virtual=self.virtual,
                v_shaped=self.schedule == "zbv",
                head_layers=0.0,
                checkpointed=self.checkpointed if self.recompute != "none" else 0,
            ),
            zero_stage=self.zero_stage,
            zero_group_size=self.group or (self.data if self.zero_stage else 1),
            states=self.states or ("full" if self.precision in ("fp32", "fp64") else mixed),  # type: ignore[arg-type]
            activation_checkpointing=self.recompute,  # type: ignore[arg-type]
            micro_batch_size=self.micro_batch_size,
            gradient_accumulation_steps=self._num_micro_batches,
            gather=self.gather,  # type: ignore[arg-type]
            reduce=self.reduce,  # type: ignore[arg-type]
            offload=self.offload,
        )

    @property
    def _num_micro_batches(self) -> int:
        least = -(-GLOBAL_BATCH // (self.data * self.micro_batch_size))
        # Interleaving wants whole rounds of the pipeline: the last ones are filled up.
        return -(-least // self.pipeline) * self.pipeline if self.virtual > 1 else least

    def __str__(self) -> str:
        strategy = self.strategy
        group = f"/{strategy.zero_group_size}" if self.group else ""
        often = "".join(f" {n} per_step" for n in ("gather", "reduce") if getattr(strategy, n) == "per_step")
        split = f" tensor {self.tensor}{' sequence' * self.sequence_parallel}" * (self.tensor > 1)
        if self.pipeline > 1:
            split += f" pipeline {self.pipeline}x{self.virtual} {self.schedule}"
        if self.mesh_order != MESH_ORDER:
            split += f" {'-'.join(self.mesh_order)}"
        layers = "" if self.checkpointed is None else f" {self.checkpointed}"
        return (
            f"{self.precision} world {self.world_size}{split} ZeRO {self.zero_stage}{group} {self.recompute}{layers}"
            f" {strategy.gradient_accumulation_steps}x{self.micro_batch_size}{often} {self.states}{self._away}".rstrip()
        )

    @property
    def _away(self) -> str:
        kinds = {k: getattr(self.offload, k) for k in ("optimizer", "parameters", "activations")}
        fraction = f" x{self.offload.optimizer_fraction:g}" if self.offload.optimizer_fraction < 1 else ""
        return "".join(f" {kind} on {place}" for kind, place in kinds.items() if place != "none") + fraction


@dataclass(frozen=True)
class Trial:
    """One row of the table. Without `then` the case runs through; with it the run is saved halfway and goes on there."""

    case: Case
    then: Case | None = None

    @property
    def kind(self) -> str:
        return "parity" if self.then is None else "bitwise" if self.then == self.case else "resume"

    def __str__(self) -> str:
        return f"{self.kind:7}  {self.case}" + (f"  ->  {self.then}" if self.kind == "resume" else "")


@dataclass(frozen=True)
class Verdict:
    trial: Trial
    passed: bool
    loss: float
    """Worst deviation of a step's loss, nats; of the weights the same."""
    weights: float
    seconds: float


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """One repeated batch: fresh random targets would keep the loss near ln V and hide wrong gradients."""
    ids = torch.randint(0, ARCH.vocab_size, (GLOBAL_BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(SEED))
    return ids[:, :-1], ids[:, 1:]


def micro_batches(case: Case, rank: int) -> list[MicroBatch]:
    """This replica's share; what is missing is filled up with sequences of weight 0."""
    inputs, targets = batch()
    size, strategy = case.micro_batch_size, case.strategy
    replica = strategy.degrees.coordinates(rank)["data"]
    result = []
    for i in range(strategy.gradient_accumulation_steps):
        rows = [(i * case.data + replica) * size + j for j in range(size)]
        weight = torch.tensor([1.0 if row < GLOBAL_BATCH else 0.0 for row in rows])
        rows = [min(row, GLOBAL_BATCH - 1) for row in rows]
        result.append(MicroBatch(input_ids_BS=inputs[rows], target_ids_BS=targets[rows], weight_B=weight))
    return result


def reference(precision: str, num_steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of one process, in plain torch; 16 bit is held against fp32."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    module, value = OPT(ARCH).to(dtype), initial_weights(ARCH, SEED)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(value(name, parameter.shape))
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    vectors = [p for p in module.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.epsilon,
    )
    inputs, targets = batch()
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), OPTIMIZER.gradient_clip or 0.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in module.named_parameters()}


def session_of(case: Case) -> Any:
    with torch.device("meta"):
        module = OPT(ARCH)
    return build_session(
        module,
        strategy=case.strategy,
        precision=case.precision,
        weights=initial_weights(ARCH, SEED),
        optimizer=OPTIMIZER,
        bucket_bytes=BUCKET_BYTES,
    )


def steps(session: Any, case: Case, rank: int, count: int) -> list[float]:
    mine = micro_batches(case, rank)
    return [
        session.step(mine, num_target_tokens=GLOBAL_BATCH * SEQUENCE, learning_rate=LEARNING_RATE).loss
        for _ in range(count)
    ]


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """A sharded state with every tensor whole, as numpy (whose pickles need no shared memory)."""
    return {
        name: t.full_tensor().numpy() if hasattr(t, "full_tensor") else t.numpy().copy() if torch.is_tensor(t) else t
        for name, t in state.items()
    }


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


def play(rank: int, case: Case, count: int, load_from: str | None, save_to: str | None) -> Any:
    """On one rank: `count` steps; (losses, whole state) on rank 0."""
    session = session_of(case)
    if load_from:
        load(session, load_from)
    losses = steps(session, case, rank, count)
    if save_to:
        save(session, save_to)
    state = whole(session.state_dict())
    session.close()
    return losses, state


def all_of(results: list[Any]) -> tuple[list[float], dict[str, Any]]:
    """The losses, which every rank tells alike, and the states of all stages."""
    losses = results[0][0]
    assert all(told == losses for told, _ in results)
    state: dict[str, Any] = {}
    for _, part in results:
        for name, value in part.items():
            # A parameter that two stages hold is one.
            assert name not in state or (state[name] == value).all() if hasattr(value, "all") else True, name
            state[name] = value
    return losses, state


def judge(pool: Pool, trial: Trial) -> Verdict:
    case, then = trial.case, trial.then
    started = time.perf_counter()
    num_steps, loss_bound, weight_bound = BOUNDS[case.precision]
    expected, weights = reference(case.precision, num_steps)
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
    passed = loss <= loss_bound and (weight_bound is None or weight <= weight_bound)
    return Verdict(trial, passed, loss, weight, time.perf_counter() - started)


def compositions() -> list[Case]:
    """Tensor {1, 2} x pipeline {1, 2, 4} x data {1, 2} x ZeRO 0..3 x recompute x schedule, on up to 8 processes in fp64;
    some of them in fp32 and bf16, and with the axes of the mesh in another order."""
    cases = []
    schedules = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_zero_bubble", 2), ("zbv", 2)]
    for tensor, pipeline, data, recompute in itertools.product(
        (1, 2), (1, 2, 4), (1, 2), ("none", "selective", "full")
    ):
        world = tensor * pipeline * data
        if tensor == pipeline == 1 or world > 8:
            continue
        for stage, (schedule, virtual) in itertools.product(range(4 if data > 1 else 1), schedules):
            if (pipeline == 1 and schedule != "1f1b") or pipeline * virtual > ARCH.num_layers:
                continue
            cases.append(
                Case(
                    world_size=world,
                    zero_stage=stage,
                    recompute=recompute,
                    tensor=tensor,
                    pipeline=pipeline,
                    schedule=schedule,
                    virtual=virtual,
                    micro_batch_size=1,
                    sequence_parallel=tensor > 1 and recompute != "selective",
                    reduce="per_step" if pipeline > 1 and stage >= 2 else "per_micro_batch",
                    gather="per_step" if schedule == "zbv" and stage == 3 else "per_micro_batch",
                    checkpointed=1 if recompute == "full" and pipeline < 4 else None,
                )
            )
    plain = Case(world_size=8, zero_stage=1, tensor=2, pipeline=2, micro_batch_size=1, sequence_parallel=True)
    cases += [replace(plain, precision=precision) for precision in ("fp32", "bf16")]
    cases.append(replace(plain, mesh_order=("tensor", "pipeline", "data", "context")))
    return cases


def matrix() -> list[Trial]:
    """ZeRO 0..3 x recompute x world size in each precision; hybrid groups; gather and reduce once a step; accumulation;
    every pair of fourteen ways to save and to load; bitwise resumption with 3 and 4 workers."""
    cases = [
        Case(world_size=world, zero_stage=stage, recompute=recompute, precision=precision)
        for precision, world, stage, recompute in itertools.product(
            ("fp64", "fp32", "bf16"), (1, 2, 4), (0, 1, 2, 3), ("none", "selective", "full")
        )
    ]
    cases += [Case(world_size=3, zero_stage=stage) for stage in range(4)]
    cases += [Case(world_size=2, zero_stage=stage, precision="fp16") for stage in range(4)]
    cases += [Case(world_size=2, zero_stage=s, precision="bf16", states="mixed_fp32_gradients") for s in (0, 1)]
    groups = [Case(world_size=4, zero_stage=s, group=2, micro_batch_size=1) for s in (1, 2, 3)]
    often = itertools.product((2, 3), ("per_step", "per_micro_batch"), ("per_step", "per_micro_batch"))
    frequencies = [Case(world_size=2, zero_stage=s, micro_batch_size=1, gather=g, reduce=r) for s, g, r in often]
    cases += groups + frequencies + compositions()
    cases += [replace(case, gather="per_step", reduce="per_step") for case in groups[1:]]
    ends = [
        Case(world_size=w, zero_stage=s) for s, w in ((0, 1), (2, 1), (0, 2), (0, 4), (1, 2), (1, 3), (2, 2), (3, 4))
    ]
    ends += groups
    ends += [
        Case(world_size=4, zero_stage=3, tensor=2, sequence_parallel=True),
        Case(world_size=4, zero_stage=1, pipeline=2, virtual=2, schedule="interleaved_1f1b", micro_batch_size=1),
        Case(world_size=8, zero_stage=1, tensor=2, pipeline=2, micro_batch_size=1),
    ]
    trials = [Trial(case) for case in cases]
    trials += [Trial(a, b) for a, b in itertools.product(ends, ends) if a != b]
    for world, stage, precision in itertools.product((3, 4), (0, 1, 2, 3), ("fp32", "bf16", "fp16", "fp64")):
        case = Case(world_size=world, zero_stage=stage, precision=precision, micro_batch_size=1)
        trials.append(Trial(case, case))
    trials += [
        Trial(replace(case, precision=p), replace(case, precision=p)) for case in groups for p in ("fp32", "bf16")
    ]
    return trials


def main() -> int:
    parser = argparse.ArgumentParser(description="Every strategy of the native engine against one process.")
    parser.add_argument("--slice", type=int, help="only so many rows, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("parity", "resume", "bitwise"))
    args = parser.parse_args()
    trials = [trial for trial in matrix() if args.only in (None, trial.kind)]
    if args.slice:
        trials = random.Random(args.seed).sample(trials, args.slice)
    verdicts = []
    with Pool(max(t.world_size for trial in trials for t in (trial.case, trial.then) if t)) as pool:
        print(f"{'':4} {'loss':>8} {'weights':>8} {'s':>5}  worst deviation, of")
        for trial in trials:
            verdict = judge(pool, trial)
            verdicts.append(verdict)
            print(f"{'pass' if verdict.passed else 'FAIL'} {verdict.loss:8.1e} {verdict.weights:8.1e} "
                  f"{verdict.seconds:5.1f}  {trial}", flush=True)  # fmt: skip
    print(f"{sum(v.passed for v in verdicts)} of {len(verdicts)} pass in {sum(v.seconds for v in verdicts):.0f} s.")
    print("Bounds on loss and weights: " + "; ".join(
        f"{precision} over {count} steps {loss:g}" + (f" and {weight:g}" if weight else "")
        for precision, (count, loss, weight) in BOUNDS.items()) + "; bitwise 0 and 0")  # fmt: skip
    for kind in ("parity", "resume"):
        for precision in BOUNDS:
            mine = [v for v in verdicts if v.trial.kind == kind and v.trial.case.precision == precision]
            if mine:
                print(f"Worst of {len(mine)} {kind} rows in {precision}: loss {max(v.loss for v in mine):.1e}, "
                      f"weights {max(v.weights for v in mine):.1e}")  # fmt: skip
    return 0 if all(v.passed for v in verdicts) else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
