"""A child process that plays training steps on an accelerator which is only a name, and tells where the tensors lay that its
process groups were given. `python -m tests.fake_accelerator` prints one JSON object: row -> list of [operation, device].

torch's device for others to build on (PrivateUse1) is given to Python here, for the whole process; under FakeTensorMode it needs
no kernel but those that make an empty tensor outside the mode."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from benchmarks.cases import Case
from benchmarks.matrix import HOST
from benchmarks.parity import micro_batches, module_of
from strategies.engines.native import build_session

DEVICE = "played"


class Stream:
    """A stream or an event on which nothing runs."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def nothing(self, *_: Any, **__: Any) -> None: ...

    wait_stream = wait_event = synchronize = record = wait = nothing

    def record_event(self, event: Any = None) -> Any:
        return event or Stream()

    def query(self) -> bool:
        return True


class Module(_DummyBackendModule):
    """What torch.cuda is to CUDA, as far as FSDP2 asks."""

    Stream = Event = Stream

    def current_stream(self, *_: Any) -> Stream:
        return Stream()

    def stream(self, _: Any) -> Any:
        return nullcontext()

    def set_device(self, _: Any) -> None: ...

    def synchronize(self, *_: Any) -> None: ...


def empty(size: Any, *_: Any, dtype: Any = None, **__: Any) -> torch.Tensor:
    return torch._C._acc.create_empty_tensor(size, dtype or torch.get_default_dtype())


class Handed(TorchDispatchMode):
    """(operation, device) of every tensor that a process group is given while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.seen |= {(str(func._opname), tensor.device.type) for tensor in tensors}
        return func(*args, **(kwargs or {}))


def rows() -> list[Case]:
    half = Case(world_size=4, zero_stage=0, precision="bf16", micro_batch_size=2)
    piped = replace(half, pipeline=2)
    return [
        half,
        replace(half, zero_stage=1, group=2),
        replace(half, zero_stage=2),
        replace(half, zero_stage=3, group=2),
        replace(half, tensor=2),
        replace(half, zero_stage=3, tensor=2, sequence_parallel=True),
        replace(piped, schedule="gpipe", zero_stage=1),
        replace(piped, schedule="interleaved_1f1b", virtual=2),
        replace(piped, schedule="zbv", virtual=2, zero_stage=3),
        replace(half, world_size=2, zero_stage=1, offload=HOST),
    ]


def played(case: Case) -> set[tuple[str, str]]:
    """Two steps, an evaluation and a state dict of rank 0."""
    dist.init_process_group(f"cpu:fake,{DEVICE}:fake", rank=0, world_size=case.world_size, store=FakeStore())
    try:
        with torch.device("meta"):
            module = module_of(case.task)
        with FakeTensorMode(allow_non_fake_inputs=True), Handed() as handed:
            session = build_session(
                module,
                strategy=case.strategy,
                precision=case.precision,
                weights=lambda _, shape: torch.zeros(shape),
                device=DEVICE,
            )
            for _ in range(2):
                session.step(micro_batches(case, 0), num_targets=1, learning_rate=1e-3)
            with suppress(DataDependentOutputException):  # its last line reads the loss, which a fake tensor has not
                session.evaluate(micro_batches(case, 0))
            session.state_dict()
        return handed.seen
    finally:
        dist.destroy_process_group()


def told_of_a_host_tensor() -> set[tuple[str, str]]:
    dist.init_process_group(f"cpu:fake,{DEVICE}:fake", rank=0, world_size=2, store=FakeStore())
    try:
        with Handed() as handed:
            dist.all_reduce(torch.zeros(1))
        return handed.seen
    finally:
        dist.destroy_process_group()


def main() -> None:
    _setup_privateuseone_for_python_backend(DEVICE, backend_module=Module())
    for name in ("empty.memory_format", "empty_strided"):
        torch.library.impl(f"aten::{name}", "PrivateUse1")(empty)
    torch.library.impl("aten::_copy_from", "PrivateUse1")(lambda source, target, non_blocking=False: target)
    found = {"a host tensor": told_of_a_host_tensor(), **{str(case): played(case) for case in rows()}}
    print(json.dumps({row: sorted(seen) for row, seen in found.items()}))


if __name__ == "__main__":
    main()
