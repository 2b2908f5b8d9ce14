"""The project's own training step, played for one rank on fake devices: no GPU, no memory, no other process.

Third opinion between the closed form and a run: the very modules and the very apply doors under torch's FakeTensorMode and
its fake process group. Three steps: the first allocates what every later step has, of the second the bytes are
counted, of the third FLOPs and messages."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.models.architecture import Architecture
from orchestrator.models.opt import OPT
from orchestrator.planner.live import LiveBytes
from strategies.engines.engine import MicroBatch
from strategies.engines.native import NativeSession, build_session
from strategies.strategy import Offload, Stage, Strategy

SHORT_DEPTHS = (3, 5)
"""A deep model's step is played at two short depths: bytes and FLOPs are straight lines in the number of layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One rank's step."""

    tensor_peak_bytes: int
    peak_phase: str
    components: Mapping[str, int]
    """Bytes at the peak, by component (see LiveBytes)."""
    flops: float
    """Of one rank in the micro batches played, recompute included."""
    collective_bytes: Mapping[str, int]
    """Bytes handed to each kind of collective."""
    num_layers_traced: tuple[int, ...]
    num_micro_batches_traced: int
    seconds: float


def trace(arch: Architecture, strategy: Strategy, *, sequence_length: int, precision: str) -> Trace:
    """Plays a step of rank 0. Must be called where no process group is alive. ValueError for what is not built."""
    if dist.is_initialized():
        raise RuntimeError("a trace brings its own process group: call it in a process that has none")
    started = time.perf_counter()
    deep = arch.num_layers > SHORT_DEPTHS[-1]
    depths = SHORT_DEPTHS if deep else (arch.num_layers,)
    played = [_play(_at_depth(arch, strategy, depth), sequence_length, precision) for depth in depths]
    result = played[0]
    if deep:
        result = _line(played[0], played[1], depths, arch.num_layers)
    return replace(result, num_layers_traced=depths, seconds=time.perf_counter() - started)


def _at_depth(arch: Architecture, strategy: Strategy, depth: int) -> tuple[Architecture, Strategy]:
    stages = tuple(
        replace(
            stage,
            num_layers=depth,
            num_checkpointed_layers=round(stage.num_checkpointed_layers * depth / stage.num_layers),
        )
        for stage in strategy.stages
    )
    return replace(arch, num_layers=depth), replace(strategy, stages=stages)


def _line(low: Trace, high: Trace, depths: tuple[int, ...], depth: int) -> Trace:
    def at(a: float, b: float) -> float:
        return a + (b - a) / (depths[1] - depths[0]) * (depth - depths[0])

    names = set(low.components) | set(high.components)
    kinds = set(low.collective_bytes) | set(high.collective_bytes)
    return replace(
        high,
        tensor_peak_bytes=round(at(low.tensor_peak_bytes, high.tensor_peak_bytes)),
        components={n: round(at(low.components.get(n, 0), high.components.get(n, 0))) for n in sorted(names)},
        flops=at(low.flops, high.flops),
        collective_bytes={
            k: round(at(low.collective_bytes.get(k, 0), high.collective_bytes.get(k, 0))) for k in sorted(kinds)
        },
    )


def _play(shape: tuple[Architecture, Strategy], sequence_length: int, precision: str) -> Trace:
    arch, strategy = shape
    dist.init_process_group("fake", rank=0, world_size=strategy.num_gpus, store=FakeStore())
    try:
        with torch.device("meta"):
            module = OPT(arch, attention=strategy.attention)
        with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
            session = build_session(
                module, strategy=strategy, precision=precision, weights=lambda _, shape: torch.zeros(shape)
            )
            batches = _batches(strategy, sequence_length)
            _step(session, batches)
            with LiveBytes(session.tensors(), vocab_size=arch.vocab_size) as live:
                _step(session, batches)
            # Apart: FlopCounterMode keeps alive what checkpointing computes again.
            collectives = _Collectives()
            flops = FlopCounterMode(display=False)
            stack.enter_context(flops)
            stack.enter_context(collectives)
            _step(session, batches)
        return Trace(
            tensor_peak_bytes=live.peak_bytes,
            peak_phase=live.peak_phase,
            components={name: size for name, size in sorted(live.peak.items()) if size},
            flops=float(flops.get_total_flops()),
            collective_bytes=dict(collectives.bytes),
            num_layers_traced=(arch.num_layers,),
            num_micro_batches_traced=len(batches),
            seconds=0.0,
        )
    finally:
        dist.destroy_process_group()


def _batches(strategy: Strategy, sequence_length: int) -> list[MicroBatch]:
    shape = (strategy.micro_batch_size, sequence_length)
    # More than three micro batches hold no more than three do.
    return [
        MicroBatch(
            input_ids_BS=torch.zeros(shape, dtype=torch.int64),
            target_ids_BS=torch.zeros(shape, dtype=torch.int64),
            weight_B=torch.ones(shape[0]),
        )
        for _ in range(min(3, strategy.gradient_accumulation_steps))
    ]


def _step(session: NativeSession, batches: list[MicroBatch]) -> None:
    session.step(batches, num_target_tokens=1, learning_rate=1e-3)


class _Collectives(TorchDispatchMode):
    """Bytes given to each kind of collective."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = str(func._opname).strip("_").removesuffix("base")
            tensors = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, torch.Tensor)]
            self.bytes[name.strip("_")] += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


def _main() -> None:
    """The child: a question as JSON on standard input, the answer as the last line of standard output."""
    asked = json.load(sys.stdin)
    fields = asked["strategy"]
    fields["mesh_order"] = tuple(fields["mesh_order"])
    fields["offload"] = Offload(**fields["offload"])
    fields["stages"] = tuple(Stage(**stage) for stage in fields["stages"])
    played = trace(
        Architecture(**asked["arch"]),
        Strategy(**fields),
        sequence_length=asked["sequence_length"],
        precision=asked["precision"],
    )
    print(json.dumps(asdict(played)))


if __name__ == "__main__":
    _main()
