"""Offload, done: requests that zero carries out when it makes its states, and blocks whose activations leave the device.

    optimizer    host, nvme   master weights and moments: adam.py, for the parameters that optimizer_fraction reaches
    parameters   host, nvme   whole ones (ZeRO 0 and 1) come block by block: stream.py
                 host         shards (ZeRO 2 and 3): torch's FSDP2, which steps them on the host
    activations  host         what a block saves for its backward pass: activations.py

Files: files.py. On a CPU machine host and device are one memory; what is moved is moved all the same, and declared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.distributed.fsdp import CPUOffloadPolicy

from strategies.engines.engine import Build
from strategies.offload import activations
from strategies.offload.adam import OffloadedAdam
from strategies.offload.files import ScratchFile, padded
from strategies.offload.stream import homes
from strategies.zero.state_bytes import reduces_early
from strategies.zero.states import DTYPES, Adam


def apply(build: Build) -> Build:
    """Raises ValueError for what no part of ours can do."""
    offload, strategy = build.strategy.offload, build.strategy
    requests = build.requests
    if not 0 < offload.optimizer_fraction <= 1:
        raise ValueError(
            f"offload.optimizer_fraction {offload.optimizer_fraction} must be above 0 and at most 1; "
            "leave offload.optimizer out to offload nothing"
        )
    if offload.optimizer != "none" and build.optimizer.name == "adamw_8bit":
        raise ValueError(
            "offload.optimizer steps 32-bit moments on the host; set optimizer.name to adamw, or offload.optimizer to none"
        )
    shards_on_host = reduces_early(strategy) and offload.parameters != "none"
    if offload.parameters != "none" and (offload.optimizer == "none" or offload.optimizer_fraction < 1):
        raise ValueError(
            f"offload.parameters {offload.parameters} wants what steps them away too; set offload.optimizer to host or nvme "
            "and optimizer_fraction to 1"
        )
    if shards_on_host:
        if offload.parameters == "nvme":
            raise ValueError(
                f"offload.parameters nvme at zero_stage {strategy.zero_stage} is not built on the native engine, where "
                "FSDP2 holds the shards; set it to host, or zero_stage to 0 or 1"
            )
        requests = replace(requests, fsdp_offload=CPUOffloadPolicy(pin_memory=build.device.type == "cuda"))
    elif offload.parameters != "none":
        requests = replace(requests, homes=homes(to_file=offload.parameters == "nvme"))
    if offload.optimizer == "nvme" or (offload.optimizer == "host" and not shards_on_host):
        requests = replace(requests, adam=_adam)
    if offload.activations == "host":
        activations.move(build)
    return replace(build, requests=requests)


def _adam(build: Build, device: torch.device, dtype: torch.dtype) -> Adam:
    sizes = {name: parameter.shape for name, parameter in build.module.named_parameters() if parameter.requires_grad}
    fraction = build.strategy.offload.optimizer_fraction
    # Every rank that holds a parameter, or the same part of one, must step it in the same place: two processors round
    # differently. So whole parameters are weighed, and of those that two stages share none leaves alone.
    layouts = build.layout
    weighed = {name: (layouts[name].shape if name in layouts else shape).numel() for name, shape in sizes.items()}
    if fraction < 1:
        weighed = {name: size for name, size in weighed.items() if name not in build.shared}
    away = chosen(weighed, fraction)
    file = None
    if build.strategy.offload.optimizer == "nvme" and away:
        shards = build.requests.num_shards
        wide = max(4, DTYPES[build.precision].itemsize)
        rows = [-(-sizes[name][0] // shards) * (sizes[name].numel() // sizes[name][0]) for name in away]
        file = ScratchFile(sum(3 * padded(count * wide) for count in rows))
    return OffloadedAdam(build.optimizer, device, dtype, away=away, file=file)


def chosen(sizes: Mapping[str, int], fraction: float) -> frozenset[str]:
    """Parameters that hold the fraction of all elements, or as little less as taking the largest that still fits leaves:
    the same on every rank."""
    room = fraction * sum(sizes.values()) + 1e-6
    taken = []
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        if size <= room:
            taken.append(name)
            room -= size
    return frozenset(taken)
