"""The project's own training step, played for one rank on fake devices: no GPU, no memory, no other process.

Third opinion between the closed form and a run: the very modules, the very apply doors and the very schedule under torch's
FakeTensorMode and its fake process group, whose messages arrive at once. Three steps: the first allocates what every later
step has, of the second the bytes are counted, of the third FLOPs and messages."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.models.architecture import Architecture, block_parameters
from orchestrator.models.decoder import Decoder
from orchestrator.models.lora import Lora
from orchestrator.models.workloads import PACKED
from orchestrator.planner.trace.live_bytes import LiveBytes
from strategies.engines.engine import BUCKET_BYTES, MicroBatch, OptimizerSettings
from strategies.engines.loss import TokenLoss
from strategies.engines.native import NativeSession, build_session
from strategies.strategy import SPLIT_BACKWARD, Offload, Stage, Strategy
from strategies.tensor.region import Region
from strategies.zero.state_bytes import IN_FLIGHT, reduces_early
from strategies.zero.states import DTYPES

SHORT, STEP = 3, 2
"""A deep stage is played with so many layers of a kind, and with so many more: bytes and FLOPs are straight lines in the number
of layers (tests/unit/test_trace.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One rank's step."""

    pipeline_rank: int
    peaks: Mapping[str, Mapping[str, int]]
    """Phase -> bytes on the device by component (see LiveBytes) at that phase's peak."""
    away: Mapping[str, int]
    """Place (host, nvme) -> bytes there at their peak."""
    flops: float
    """FLOPs of one rank in the micro batches played, recompute included."""
    collective_bytes: Mapping[str, int]
    """Bytes handed to each kind of collective."""
    num_layers_traced: tuple[int, ...]
    """Layers of the rank, in each play."""
    num_micro_batches_traced: int
    seconds: float

    @property
    def peak_phase(self) -> str:
        return max(self.peaks, key=lambda phase: sum(self.peaks[phase].values()))

    @property
    def components(self) -> dict[str, int]:
        """Bytes at the peak, by component."""
        return {name: size for name, size in sorted(self.peaks[self.peak_phase].items()) if size}

    @property
    def tensor_peak_bytes(self) -> int:
        return sum(self.components.values())

    def to_dict(self) -> dict[str, Any]:
        """The fields but the single phases, and the peak."""
        told = {name: value for name, value in asdict(self).items() if name != "peaks"}
        names = ("peak_phase", "components", "tensor_peak_bytes")
        return {**told, **{name: getattr(self, name) for name in names}}


class _Less(NamedTuple):
    """Parts of a rank's step that a play leaves out: layers of each of its stages, and micro batches."""

    recomputed: int
    kept: int
    """Layers that are not computed again."""
    micro_batches: int


def trace(
    arch: Architecture,
    strategy: Strategy,
    *,
    sequence_length: int,
    precision: str,
    lora: Lora | None = None,
    task: str = "pretrain",
    eight_bit: bool = False,
    pipeline_rank: int = 0,
    bytes_only: bool = False,
    whole: bool = False,
) -> Trace:
    """Plays a step of the first rank of a pipeline rank. Must be called where no process group is alive. ValueError for what
    is not built. bytes_only: no FLOPs and messages, in less time; whole: all layers, however
    deep."""
    if dist.is_initialized():
        raise RuntimeError("a trace brings its own process group: call it in a process that has none")
    started = time.perf_counter()
    optimizer = OptimizerSettings(name="adamw_8bit" if eight_bit else "adamw")
    mine = [stage for stage in strategy.stages if stage.pipeline_rank == pipeline_rank]
    batches = _batches(arch, strategy, sequence_length, task, pipeline_rank)
    piled = strategy.degrees.pipeline > 1 and strategy.pipeline_schedule == "gpipe"
    short = arch.num_layers if whole else _shortest(arch, strategy, precision) if lora is None else SHORT
    most = _Less(
        min(stage.num_checkpointed_layers for stage in mine) - short,
        min(stage.num_layers - stage.num_checkpointed_layers for stage in mine) - short,
        len(batches) - SHORT if piled else 0,
    )
    layers: list[int] = []

    def play(less: _Less) -> Trace:
        stages = _short(strategy.stages, pipeline_rank, less)
        layers.append(sum(stage.num_layers for stage in stages if stage.pipeline_rank == pipeline_rank))
        short = replace(strategy, stages=stages)
        held = replace(arch, num_layers=sum(stage.num_layers for stage in stages))
        less_batches = batches[less.micro_batches :]
        return _play(held, lora, optimizer, short, less_batches, precision, task, pipeline_rank, bytes_only)

    result = _lines(play, _Less(0, 0, 0), most, not reduces_early(strategy))
    return replace(result, num_layers_traced=tuple(dict.fromkeys(layers)), seconds=time.perf_counter() - started)


def _shortest(arch: Architecture, strategy: Strategy, precision: str) -> int:
    """Layers that show what a deep stage holds: three, and at ZeRO 0 and 1 as many as fill the buckets that are under way."""
    if reduces_early(strategy):
        return SHORT
    gradients = block_parameters(arch) * DTYPES[precision].itemsize / strategy.degrees.tensor
    return max(SHORT, math.ceil(IN_FLIGHT * BUCKET_BYTES / gradients))


def _lines(play: Callable[[_Less], Trace], less: _Less, most: _Less, buckets: bool) -> Trace:
    """Return a step's trace: what `less` leaves out is left out, what `most` allows is played twice, shorter, and drawn out."""
    for name, amount in most._asdict().items():
        if amount > STEP:
            most = most._replace(**{name: 0})
            low = _lines(play, less._replace(**{name: amount}), most, buckets)
            high = _lines(play, less._replace(**{name: amount - STEP}), most, buckets)
            return _line(low, high, amount / STEP, buckets)
    return play(less)


def _line(low: Trace, high: Trace, times: float, buckets: bool) -> Trace:
    """buckets: ZeRO 0 and 1 fill theirs more or less well, which no line follows, and the optimizer holds one or two."""

    def sizes(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
        return {name: round(at(a.get(name, 0), b.get(name, 0))) for name in sorted({*a, *b})}

    def at(a: float, b: float) -> float:
        return a + (b - a) * times

    peaks = {phase: sizes(low.peaks[phase], high.peaks[phase]) for phase in high.peaks}
    if buckets:
        peaks["optimizer"]["temporary"] = max(each.peaks["optimizer"].get("temporary", 0) for each in (low, high))
    return replace(
        high,
        peaks=peaks,
        away=sizes(low.away, high.away),
        flops=at(low.flops, high.flops),
        collective_bytes=sizes(low.collective_bytes, high.collective_bytes),
    )


def _short(stages: Sequence[Stage], pipeline_rank: int, less: _Less) -> tuple[Stage, ...]:
    """Return this rank's stages with fewer layers, the others' with one: who plays only talks to them."""
    result, first = [], 0
    for stage in stages:
        count, recomputed = 1, 0
        if stage.pipeline_rank == pipeline_rank:
            count = stage.num_layers - less.recomputed - less.kept
            recomputed = stage.num_checkpointed_layers - less.recomputed
        result.append(replace(stage, first_layer=first, num_layers=count, num_checkpointed_layers=recomputed))
        first += count
    return tuple(result)


def _play(
    arch: Architecture,
    lora: Lora | None,
    optimizer: OptimizerSettings,
    strategy: Strategy,
    batches: list[MicroBatch],
    precision: str,
    task: str,
    pipeline_rank: int,
    bytes_only: bool,
) -> Trace:
    rank = strategy.degrees.rank({"pipeline": pipeline_rank})
    dist.init_process_group("fake", rank=rank, world_size=strategy.num_gpus, store=FakeStore())
    try:
        with torch.device("meta"):
            module = Decoder(arch, attention=strategy.attention, lora=lora, values=task == "reward")
        with FakeTensorMode(allow_non_fake_inputs=True):
            session = build_session(
                module,
                strategy=strategy,
                precision=precision,
                weights=lambda _, shape: torch.zeros(shape),
                optimizer=optimizer,
                # Of dpo, whose reference is numbers, the same bytes are alive as of sft.
                loss=_SumOfValues() if task == "reward" else TokenLoss(),
            )
            _step(session, batches[: strategy.degrees.pipeline])
            local_vocab = -(-arch.vocab_size // strategy.degrees.tensor)
            with LiveBytes(session.tensors(), vocab_size=local_vocab) as live:
                live.watch(session.states)
                _step(session, batches)
            # Apart: FlopCounterMode keeps alive what checkpointing computes again.
            with FlopCounterMode(display=False) as flops, _Collectives() as collectives:
                if not bytes_only:
                    _step(session, batches)
        return Trace(
            pipeline_rank=pipeline_rank,
            peaks={phase: components for phase, (_, components) in live.peaks.items()},
            away=live.away_peak,
            flops=float(flops.get_total_flops()),
            collective_bytes=dict(collectives.bytes),
            num_layers_traced=(arch.num_layers,),
            num_micro_batches_traced=len(batches),
            seconds=0.0,
        )
    finally:
        dist.destroy_process_group()


def _batches(
    arch: Architecture, strategy: Strategy, sequence_length: int, task: str, pipeline_rank: int
) -> list[MicroBatch]:
    """A step's, without those that hold no more than the ones before: beyond three in a row, or what is in flight."""
    shape = (strategy.micro_batch_size, sequence_length)
    count, degree = strategy.gradient_accumulation_steps, strategy.degrees.pipeline
    if degree == 1:
        count = min(count, 3)
    elif strategy.pipeline_schedule != "gpipe":
        single = strategy.num_virtual_stages == 1 and strategy.pipeline_schedule not in SPLIT_BACKWARD
        rounds = 3 if strategy.pipeline_schedule == "zbv" else 2
        count = min(count, degree - pipeline_rank + 2 if single else rounds * degree)
    batch = MicroBatch(
        input_ids_BS=torch.zeros(shape, dtype=torch.int64),
        target_ids_BS=torch.zeros(shape, dtype=torch.int64),
        weight_B=torch.ones(shape[0]),
        inputs=_inputs(arch, task, shape),
    )
    return [batch] * count


class _SumOfValues:
    """A loss of a value head: all its values, of a few of which a ranking is made."""

    names = ("loss",)

    def __call__(self, region: Region, output: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        total = output.float().sum()
        return total.detach()[None], total

    def num_targets(self, batch: MicroBatch) -> torch.Tensor:
        return batch.weight_B.sum()


def _inputs(arch: Architecture, task: str, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return what the module's context is made of: samples that share a row, or blanks and what fills them."""
    batch, length = shape
    if task in PACKED:
        return {"segment_ids_BS": torch.zeros(shape, dtype=torch.int64)}
    if arch.traits.blank_filling:
        places = torch.zeros(batch, 2, length, dtype=torch.int64)
        return {"prefix_lengths_B": torch.zeros(batch, dtype=torch.int64), "positions_B2S": places}
    return {}


def _step(session: NativeSession, batches: list[MicroBatch]) -> None:
    session.step(batches, num_targets=1, learning_rate=1e-3)


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
    played = [
        trace(
            Architecture(**asked["arch"]),
            Strategy(**fields),
            eight_bit=asked["eight_bit"],
            lora=asked["lora"] and Lora(**asked["lora"] | {"targets": tuple(asked["lora"]["targets"])}),
            sequence_length=asked["sequence_length"],
            precision=asked["precision"],
            task=asked["task"],
            pipeline_rank=rank,
        ).to_dict()
        for rank in asked["pipeline_ranks"]
    ]
    print(json.dumps(played))


if __name__ == "__main__":
    _main()
