"""shardwise capacity: models x numbers of GPUs, and the smallest cluster that fits or meets a target."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

import click

from orchestrator.cli.errors import CommandError, ExitCode

if TYPE_CHECKING:
    from clusters.cluster import Cluster
    from orchestrator.models.architecture import Architecture
    from orchestrator.planner.capacity import Question

_RANGE = re.compile(r"([1-9][0-9]*)\.\.([1-9][0-9]*)")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@click.command("capacity")
@click.option(
    "--model", "models", multiple=True, required=True, metavar="NAME", help="A catalog model; may be repeated."
)
@click.option("--gpu", metavar="NAME", help="A catalog GPU, such as a100-80gb.")
@click.option(
    "--cluster", metavar="FILE", help="In place of --gpu: a cluster file, of which GPU, node, network and price count."
)
@click.option(
    "--gpus", metavar="RANGE", help="1..64 (doublings) or 8,16,24. [1..64; with --cluster up to what the file has]"
)
@click.option("--gpus-per-node", type=click.IntRange(min=1), help="[8; with --cluster what the file has]")
@click.option(
    "--usd-per-gpu-hour", type=click.FloatRange(min=0, min_open=True), metavar="USD", help="A price of your own."
)
@click.option("--tokens", type=float, metavar="N", help="Length of the training, for days and dollars (300e9).")
@click.option(
    "--global-batch-size", type=click.IntRange(min=1), default=1024, show_default=True, help="Sequences a step."
)
@click.option("--sequence-length", type=click.IntRange(min=1), default=2048, show_default=True)
@click.option("--precision", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True)
@click.option("--target", type=float, metavar="TOKENS/S/GPU", help="Mark what is as fast as this.")
@click.option("--finish-within", metavar="DURATION", help="Mark what is done in time: 30d.")
@click.option("--budget-usd", type=float, metavar="USD", help="Mark what costs no more.")
@click.option(
    "--rlhf", metavar="CRITIC", help="Plan PPO in place of pretraining, with this model as critic and reward model."
)
@click.option("--json", "as_json", is_flag=True, help="Print {cells[], smallest{}}.")
@click.option("--html", metavar="FILE", help="Write a heat map as one self-contained page.")
def command(
    models: tuple[str, ...],
    gpu: str | None,
    cluster: str | None,
    gpus: str | None,
    gpus_per_node: int | None,
    usd_per_gpu_hour: float | None,
    tokens: float | None,
    global_batch_size: int,
    sequence_length: int,
    precision: str,
    target: float | None,
    finish_within: str | None,
    budget_usd: float | None,
    rlhf: str | None,
    as_json: bool,
    html: str | None,
) -> int:
    """Tells what fits on how many GPUs, how fast, in how many days, at what price."""
    from orchestrator.planner.capacity import Question, capacity, told

    question = Question(
        global_batch_size=global_batch_size,
        sequence_length=sequence_length,
        precision=precision,
        tokens=int(tokens) if tokens else None,
        tokens_per_second_per_gpu=target,
        finish_within_s=_seconds(finish_within),
        budget_usd=budget_usd,
    )
    if (finish_within or budget_usd) and not tokens:
        raise CommandError("a deadline or a budget needs the length of the training", "add --tokens 300e9")
    base = _base(gpu, cluster, gpus_per_node, usd_per_gpu_hour)
    if budget_usd and base.usd_per_gpu_hour is None:
        raise CommandError(
            f"no price of {base.accelerator.name} is known, so no budget can be kept", "add --usd-per-gpu-hour 2.5"
        )
    sizes, between = _sizes(gpus or f"1..{base.num_gpus if cluster else 64}", base.gpus_per_node)
    archs = [_architecture(name) for name in models]
    if rlhf is not None:
        if tokens or target or html:
            raise CommandError("--rlhf prices one step of PPO", "leave out --tokens, --target and --html")
        critic = _architecture(rlhf)
        return _rlhf(archs, critic, [_sized(base, size) for size in sizes], question, as_json)
    table = capacity(archs, sizes, cluster_of=partial(_sized, base), question=question, between=between)
    refused = [cell.refused for cell in table.cells]
    if refused[0] is not None and all(refused):
        raise CommandError(refused[0].reason, refused[0].fix)
    if html:
        from orchestrator.planner.show.capacity_page import write_capacity

        write_capacity(table, html)
    if as_json:
        import json

        click.echo(json.dumps(table.to_dict(), indent=1))
    else:
        click.echo("\n".join(told(table)))
    good = [cell.meets if question.has_target else cell.fits for cell in table.cells]
    return ExitCode.DONE if any(good) else ExitCode.DOES_NOT_FIT


def _rlhf(
    archs: list[Architecture], critic: Architecture, clusters: list[Cluster], question: Question, as_json: bool
) -> int:
    """Print of each actor and cluster whether a step of PPO fits; half of a sequence is prompt, half response."""
    from orchestrator.planner.rlhf import Rlhf, best

    half, cells = question.sequence_length // 2, []
    for arch in archs:
        rlhf = Rlhf(
            actor=arch,
            critic=critic,
            reference=arch,
            reward=critic,
            prompt_tokens=question.sequence_length - half,
            response_tokens=half,
            rollouts=question.global_batch_size,
        )
        for cluster in clusters:
            price = best(rlhf, cluster, precision=question.precision)
            cells.append({"model": arch.name, "num_gpus": cluster.num_gpus, "told": price.told(), **price.to_dict()})
    if as_json:
        import json

        click.echo(json.dumps({"version": 1, "critic": critic.name, "cells": cells}, indent=1))
    else:
        for cell in cells:
            verdict = f"{cell['step_s']:,.0f} s a step" if cell["fits"] else "does not fit"
            size = f"{cell['peak_bytes'] / 2**30:.1f} GiB"
            click.echo(f"{cell['model']:<12} {cell['num_gpus']:>5} {size:>11} {verdict:>16}  {cell['told']}")
    return ExitCode.DONE if any(cell["fits"] for cell in cells) else ExitCode.DOES_NOT_FIT


def _base(gpu: str | None, cluster: str | None, gpus_per_node: int | None, usd_per_gpu_hour: float | None) -> Cluster:
    """Return the cluster that is resized: one node of the catalog's, or the file's."""
    from dataclasses import replace

    from clusters.catalog import load_cluster

    if (gpu is None) == (cluster is None):
        raise CommandError(
            "capacity needs the GPUs that it counts", "add --gpu a100-80gb, or --cluster FILE, and not both"
        )
    try:
        base = load_cluster(cluster) if cluster is not None else load_cluster(f"{gpu}-1x{gpus_per_node or 8}")
    except ValueError as error:
        message, _, fix = str(error).partition("\n  to fix: ")
        raise CommandError(message, fix or "`shardwise doctor` shows what is known") from None
    if base.accelerator.kind != "cuda":
        raise CommandError(
            f"{base.name}: capacity counts GPUs, this is a {base.accelerator.kind}", "`shardwise plan` plans it"
        )
    price = base.usd_per_gpu_hour if usd_per_gpu_hour is None else usd_per_gpu_hour
    return replace(base, gpus_per_node=gpus_per_node or base.gpus_per_node, usd_per_gpu_hour=price)


def _sized(base: Cluster, size: int) -> Cluster:
    """Return the cluster with so many GPUs: some of one node, or whole nodes."""
    from dataclasses import replace

    most = base.gpus_per_node
    nodes, per_node = (1, size) if size <= most else (size // most, most)
    name = f"{base.accelerator.name}-{nodes}x{per_node}"
    return replace(base, name=name, num_nodes=nodes, gpus_per_node=per_node)


def _architecture(name: str) -> Architecture:
    from difflib import get_close_matches

    from orchestrator.models.architecture import CATALOG

    if name not in CATALOG:
        near = get_close_matches(name, CATALOG, 1)
        raise CommandError(
            f"there is no model {name!r} in the catalog",
            f"did you mean {near[0]}?" if near else f"one of {', '.join(CATALOG)}",
        )
    return CATALOG[name]


def _sizes(text: str, gpus_per_node: int) -> tuple[list[int], list[int]]:
    """Return the numbers of GPUs to show, and those among which the smallest are looked for besides.

    1..64: doublings from 1 to 64, both ends among them, and all between that fill nodes. 8,16,24: those, and none besides."""
    match = _RANGE.fullmatch(text.strip())
    if match:
        first, last = int(match[1]), int(match[2])
        sizes = []
        while first < last:
            sizes.append(first)
            first *= 2
        sizes.append(last)
    elif re.fullmatch(r"\s*[1-9][0-9]*\s*(,\s*[1-9][0-9]*\s*)*", text):
        sizes = sorted({int(part) for part in text.split(",")})
    else:
        raise CommandError(f"--gpus {text!r} is no number of GPUs", "write 1..64 (doublings), or 8,16,24")
    wrong = [size for size in sizes if size > gpus_per_node and size % gpus_per_node]
    if wrong or sizes[-1] > 10**6 or (match and int(match[1]) > int(match[2])):
        raise CommandError(
            f"--gpus {text!r} does not fill nodes of {gpus_per_node}",
            f"multiples of {gpus_per_node} beyond one node, ascending",
        )
    every = range(sizes[0], sizes[-1] + 1) if match else ()
    return sizes, [size for size in every if size <= gpus_per_node or size % gpus_per_node == 0]


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]*)([smhd])", text)
    if not match:
        raise CommandError(
            f"--finish-within {text!r} is not a duration", "write a whole number and s, m, h or d, as in 30d"
        )
    return float(int(match[1]) * _UNITS[match[2]])
