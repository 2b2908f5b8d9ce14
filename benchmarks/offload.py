"""`python -m benchmarks.offload`: what offload holds, what it costs, and what it makes possible.

Three tables. Memory: live bytes of a real step on this CPU beside the plan's, device, host and files apart. Limit: under
RLIMIT_DATA on the worker process (the kernel refuses it more private memory; mappings of files are not in it) the run in
memory fails and the one with its optimizer on NVMe files trains and equals, bit for bit, the unlimited run in memory. Speed:
seconds a step against the run in memory, beside the ratio that the plan predicts for this machine. `--adam` times torch's
three AdamW on the host.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from clusters.cluster import Cluster
from clusters.inventory.local import cpu_cluster
from orchestrator.models.architecture import Architecture, make_architecture
from orchestrator.models.decoder import Decoder, initial_weights
from orchestrator.planner.problem import Choice, Problem
from orchestrator.planner.trace.live_bytes import LiveBytes
from strategies.engines.engine import MicroBatch
from strategies.engines.native import build_session
from strategies.strategy import Offload

MIB = 2**20
SEQUENCE, SEED = 64, 3
MEMORY, HOST, NVME = Offload(), Offload(optimizer="host"), Offload(optimizer="nvme")
OFFLOADS = {
    "in memory": MEMORY,
    "optimizer on host": HOST,
    "optimizer on nvme": NVME,
    "half of it on nvme": Offload(optimizer="nvme", optimizer_fraction=0.5),
    "parameters too, host": Offload(optimizer="host", parameters="host"),
    "parameters too, nvme": Offload(optimizer="nvme", parameters="nvme"),
    "activations on host": Offload(activations="host"),
}


def shape(hidden: int, layers: int) -> Architecture:
    return make_architecture(
        family="opt", num_layers=layers, hidden_size=hidden, num_heads=hidden // 32, ffn_size=4 * hidden,
        vocab_size=2048, max_position=SEQUENCE,
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One process' training."""

    arch: Architecture
    offload: Offload
    zero_stage: int = 0
    precision: str = "fp32"
    num_steps: int = 3
    limit_bytes: int | None = None
    """RLIMIT_DATA above what the process has once torch is imported."""

    def problem(self, cluster: Cluster) -> Problem:
        return Problem(
            arch=self.arch, cluster=cluster, global_batch_size=2, sequence_length=SEQUENCE, precision=self.precision
        )

    def choice(self) -> Choice:
        return Choice(data=1, zero=self.zero_stage, micro=2, offload=self.offload)


@dataclass(frozen=True)
class Did:
    """What came of it; `error` where the limit struck."""

    error: str = ""
    losses: tuple[float, ...] = ()
    digest: str = ""
    """Of all final states' bits."""
    step_s: float = 0.0
    device_bytes: int = 0
    host_bytes: int = 0
    nvme_bytes: int = 0


def play(run: Run, cluster: Cluster) -> Did:
    """In a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, run, cluster))
    process.start()
    theirs.close()
    try:
        did: Did = ours.recv()
    except EOFError:
        did = Did(error="the process was ended")
    process.join()
    return did


def _child(pipe: Any, run: Run, cluster: Cluster) -> None:
    torch.set_num_threads(1)
    try:
        did = train(run, cluster)
    except (MemoryError, RuntimeError) as error:
        did = Did(error=str(error).splitlines()[0])
    pipe.send(did)


def data_bytes() -> int:
    """Private writable memory of this process, as RLIMIT_DATA counts it."""
    with open("/proc/self/status", encoding="utf-8") as file:
        rows = dict(line.split(":", 1) for line in file)
    return int(rows["VmData"].split()[0]) * 1024


def train(run: Run, cluster: Cluster) -> Did:
    """Builds and steps. RuntimeError from torch's allocator where the limit leaves no room."""
    problem = run.problem(cluster)
    strategy = problem.strategy(run.choice())
    warm_up(cluster)
    if run.limit_bytes is not None:
        limit = data_bytes() + run.limit_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with torch.device("meta"):
        module = Decoder(run.arch)
    session = build_session(module, strategy=strategy, precision=run.precision, weights=initial_weights(run.arch, SEED))
    ids = torch.arange(2 * (SEQUENCE + 1)).view(2, -1) * 7919 % run.arch.vocab_size
    batch = MicroBatch(input_ids_BS=ids[:, :-1], target_ids_BS=ids[:, 1:], weight_B=torch.ones(2))
    losses, seconds = [], []
    for index in range(run.num_steps):
        began = time.perf_counter()
        if index == 1:
            with LiveBytes(session.tensors(), vocab_size=run.arch.vocab_size) as live:
                losses.append(session.step([batch], num_targets=2 * SEQUENCE, learning_rate=1e-3).loss)
        else:
            losses.append(session.step([batch], num_targets=2 * SEQUENCE, learning_rate=1e-3).loss)
            seconds.append(time.perf_counter() - began)
    digest = hashlib.sha256()
    for _, value in sorted(session.state_dict().items()):
        if isinstance(value, torch.Tensor):
            local: Any = value.to_local() if hasattr(value, "to_local") else value  # type: ignore[attr-defined]
            digest.update(memoryview(local.numpy()))
    session.close()
    return Did(
        losses=tuple(losses),
        digest=digest.hexdigest(),
        step_s=statistics.median(seconds[1:]),
        device_bytes=live.peak_bytes,
        host_bytes=live.away_peak["host"],
        nvme_bytes=live.away_peak["nvme"],
    )


def warm_up(cluster: Cluster) -> None:
    """A tiny session, so that what libraries take for themselves is there before a limit is set."""
    tiny = Run(shape(32, 1), NVME)
    problem = tiny.problem(cluster)
    with torch.device("meta"):
        module = Decoder(tiny.arch)
    session = build_session(
        module, strategy=problem.strategy(tiny.choice()), precision="fp32", weights=initial_weights(tiny.arch, SEED)
    )
    ids = torch.zeros((1, 8), dtype=torch.int64)
    batch = MicroBatch(input_ids_BS=ids, target_ids_BS=ids, weight_B=torch.ones(1))
    session.step([batch], num_targets=8, learning_rate=1e-3)
    session.close()


def memory_table(arch: Architecture, cluster: Cluster) -> float:
    """The worst ratio of plan and live bytes, as a distance from 1."""
    print(f"{'ZeRO':4} {'precision':9} {'offload':21} {'device MiB: plan':>16} {'live':>7} {'ratio':>6}"
          f" {'host: plan':>11} {'live':>7} {'nvme: plan':>11} {'live':>7}")  # fmt: skip
    worst = 0.0
    for stage, precision in ((0, "fp32"), (1, "bf16"), (3, "bf16")):
        for name, offload in OFFLOADS.items():
            if stage == 3 and offload.parameters == "nvme":
                continue
            run = Run(arch, offload, zero_stage=stage, precision=precision)
            problem = run.problem(cluster)
            strategy = problem.strategy(run.choice())
            price = problem.memory(strategy)
            did = play(run, cluster)
            planned = price.stages[0].tensor_peak_bytes
            host = price.host_bytes_per_node - price.peak_bytes if offload.any else 0
            nvme = price.nvme_bytes_per_node
            pairs = [(planned, did.device_bytes), (host, did.host_bytes), (nvme, did.nvme_bytes)]
            worst = max([worst, *(abs(a / b - 1) for a, b in pairs if b)])
            numbers = [value / MIB for pair in pairs for value in pair]
            print(f"{stage:4} {precision:9} {name:21} {numbers[0]:16.1f} {numbers[1]:7.1f} {planned / did.device_bytes:6.3f}"
                  f" {numbers[2]:11.1f} {numbers[3]:7.1f} {numbers[4]:11.1f} {numbers[5]:7.1f}", flush=True)  # fmt: skip
    return worst


def limit_table(arch: Architecture, cluster: Cluster) -> bool:
    """Whether NVMe makes possible what memory does not, with the same bits."""
    free = play(Run(arch, MEMORY), cluster)
    away = play(Run(arch, NVME), cluster)
    limit = (free.device_bytes + away.device_bytes + away.host_bytes) // 2
    print(
        f"\nRLIMIT_DATA {limit / MIB:.0f} MiB above an idle worker; states alone {16 * parameters(arch) / MIB:.0f} MiB"
    )
    under = {name: play(Run(arch, o, limit_bytes=limit), cluster) for name, o in (("memory", MEMORY), ("nvme", NVME))}
    for name, did in under.items():
        told = did.error or f"losses {', '.join(f'{loss:.6f}' for loss in did.losses)}"
        print(f"  optimizer in {name:7} {told[:100]}")
    same = under["nvme"].losses == free.losses and under["nvme"].digest == free.digest != ""
    print(f"  equal to the unlimited run in memory, losses and all states bit for bit: {'yes' if same else 'NO'}")
    return same and bool(under["memory"].error)


def parameters(arch: Architecture) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(arch).parameters())


def speed_table(arch: Architecture, cluster: Cluster) -> None:
    print(
        f"\n{'offload':21} {'s/step':>7} {'of memory':>10} {'predicted':>10}   {parameters(arch) / 1e6:.0f} M parameters"
    )
    base: tuple[float, float] | None = None
    for name, offload in OFFLOADS.items():
        run = Run(arch, offload, num_steps=6)
        problem = run.problem(cluster)
        planned = problem.price(problem.strategy(run.choice())).time.step_s
        did = play(run, cluster)
        base = base or (did.step_s, planned)
        print(f"{name:21} {did.step_s:7.3f} {base[0] / did.step_s:10.2f} {base[1] / planned:10.2f}", flush=True)


def adam_table() -> None:
    torch.set_num_threads(1)
    print("\nAdamW on the host, one thread, 16 Mi fp32 elements; 28 bytes an element read and written")
    for kind in ("fused", "foreach", "for-loop"):
        parameter = torch.nn.Parameter(torch.randn(2**24))
        parameter.grad = torch.randn(2**24)
        optimizer = torch.optim.AdamW([parameter], fused=kind == "fused", foreach=kind == "foreach")
        optimizer.step()
        began = time.perf_counter()
        for _ in range(3):
            optimizer.step()
        seconds = (time.perf_counter() - began) / 3
        print(f"  {kind:8} {seconds * 1e3:7.1f} ms  {28 * 2**24 / seconds / 1e9:5.1f} GB/s")


def main() -> int:
    parser = argparse.ArgumentParser(description="Offload: bytes, a real memory limit, speed.")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--only", choices=("memory", "limit", "speed", "adam"))
    args = parser.parse_args()
    arch, cluster = shape(args.hidden, args.layers), cpu_cluster(per_node=1)
    passed = True
    if args.only in (None, "memory"):
        worst = memory_table(arch, cluster)
        print(f"plan within {100 * worst:.1f} % of live bytes, device, host and nvme")
    if args.only in (None, "limit"):
        passed = limit_table(arch, cluster)
    if args.only in (None, "speed"):
        speed_table(arch, cluster)
    if args.only in (None, "adam"):
        adam_table()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
