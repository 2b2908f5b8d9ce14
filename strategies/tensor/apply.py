"""Tensor parallelism, done to a module: each parameter is cut to this rank's part, as the model's own table says.

The module brings `split` (parameter pattern -> SPLITS), `divides` (what the degree must divide) and parts that have a
`region`; they stay plain modules with plain local tensors, so that every later room works on what it finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from strategies.engines.engine import Build, Layout
from strategies.tensor.region import SplitRegion

SPLITS: dict[str, int | None] = {
    "column": 0,
    "row": 1,
    "vocabulary": 0,
    "sequence": 0,
    "replicated": None,
    "replicated_partial": None,
}
"""Kind -> the dimension that is split. sequence: a table of positions. replicated: whole on every rank, its gradient whole
too, or with sequence parallel a part of it; replicated_partial: always a part of it."""


def apply(build: Build) -> Build:
    """Cuts the parameters, which stand on the meta device, and lets the module's regions talk to the group.

    Raises ValueError where the degree does not divide what the model says it must, or the model says nothing."""
    strategy = build.strategy
    size, rank = strategy.tensor_parallel_degree, build.mesh.rank("tensor")
    if size == 1:
        return build
    module: Any = build.module
    table: Mapping[str, str] | None = getattr(module, "split", None)
    if table is None:
        raise ValueError(
            f"tensor_parallel_degree {size} wants a module that says how it is split; {type(module).__name__} does not: "
            "set tensor_parallel_degree to 1"
        )
    for what, count in module.divides.items():
        if count % size:
            fit = [n for n in range(1, count + 1) if count % n == 0]
            raise ValueError(
                f"tensor_parallel_degree {size} does not divide {what} {count}; set it to one of "
                f"{', '.join(map(str, fit))}"
            )
    layout: dict[str, Layout] = {}
    num_rows = 0
    for name, parameter in list(module.named_parameters()):
        kind = _kind(table, name)
        dim = SPLITS[kind]
        if dim is not None:
            with unset_fake_temporarily():  # FSDP2 changes their dtype in place, which a trace's tensors do not allow
                _cut(module, name, dim, size, rank)
        if kind == "vocabulary":
            num_rows = parameter.shape[0]
        partial = kind == "replicated_partial" or (kind == "replicated" and strategy.sequence_parallel)
        layout[name] = Layout(shape=parameter.shape, dim=dim, size=size, rank=rank, partial=partial)
    region = SplitRegion(
        build.mesh.group("tensor"),
        rank=rank,
        size=size,
        sequence_parallel=strategy.sequence_parallel,
        num_rows=num_rows,
    )
    return replace(build, layout=layout, region=region)


def _kind(table: Mapping[str, str], name: str) -> str:
    kinds = [kind for pattern, kind in table.items() if fnmatchcase(name, pattern)]
    if len(kinds) != 1 or kinds[0] not in SPLITS:
        raise ValueError(
            f"the module's table says {kinds or 'nothing'} of {name}; it must say one of {', '.join(SPLITS)}"
        )
    return kinds[0]


def _cut(module: nn.Module, name: str, dim: int, size: int, rank: int) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    whole = getattr(owner, leaf)
    part = Layout(shape=whole.shape, dim=dim, size=size, rank=rank, partial=False).part(whole)
    last = Layout(shape=whole.shape, dim=dim, size=size, rank=size - 1, partial=False).part(whole)
    if not last.numel():
        raise ValueError(
            f"tensor_parallel_degree {size} leaves the last rank nothing of {name}, {list(whole.shape)}; set it lower"
        )
    cut = nn.Parameter(torch.empty(part.shape, dtype=whole.dtype, device="meta"), requires_grad=whole.requires_grad)
    setattr(owner, leaf, cut)
