"""`shardwise calibrate`: measure this machine, so that plans on it rest on its own numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from clusters.cluster import Cluster
from orchestrator.cli.errors import CommandError, ExitCode


@click.command(
    help="Measure this machine: matmul, memory, collectives, disk. `cluster: auto` then uses what was found."
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Also write a cluster file for a job.")
@click.option("--quick", is_flag=True, help="20 seconds in place of one or two minutes.")
@click.option("--json", "as_json", is_flag=True, help="Print the cluster as JSON.")
def command(output: Path | None, quick: bool, as_json: bool) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from clusters import describe

    columns = (TextColumn("measuring {task.fields[what]:24}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=1.0, what="...")

        def say(fraction: float, what: str) -> None:
            progress.update(task, completed=fraction, what=what)

        cluster = measured_cluster(quick=quick, say=say)
    if output is not None:
        write(output, cluster)
    if as_json:
        click.echo(json.dumps(describe.to_mapping(cluster), indent=2))
        return ExitCode.DONE
    Console().print(table(cluster))
    if output is not None:
        click.echo(f"wrote {output}; in a job: cluster: {output}")
    return ExitCode.DONE


def measured_cluster(*, quick: bool, say: Any) -> Cluster:
    """Return this machine, measured anew."""
    from clusters.calibration import measure
    from clusters.inventory import local

    devices = local.nvml_devices()
    try:
        if devices:
            return measure.cuda_cluster(local.cluster_of_devices(devices), quick=quick, say=say)
        cores = local.available_cores()
        calibration = measure.cpu_calibration(cores, quick=quick, fresh=True, say=say)
        return local.describe_cpu(calibration, cores=cores, memory_bytes=local.available_memory_bytes())
    except RuntimeError as error:
        what, _, where = str(error).partition("\n")
        fix = "shardwise doctor says what is wrong with this machine"
        raise CommandError(what, fix, ExitCode.FAILED, where=where) from None
    except ValueError as error:
        what, _, fix = str(error).partition("\n  to fix: ")
        raise CommandError(what, fix) from None


def write(output: Path, cluster: Cluster) -> None:
    """Into the file; runs that it already holds stay, with the errors that they showed."""
    from clusters import describe
    from clusters.calibration.runs import ERRORS
    from clusters.inventory.file import read_mapping, write_mapping

    mapping = describe.to_mapping(cluster)
    for name in ERRORS:  # of this machine's own record; the file tells of the runs that it holds
        mapping["calibration"].pop(name, None)
    if output.exists():
        try:
            before = read_mapping(output)
        except ValueError as error:
            raise CommandError(str(error), "--output FILE: a new file, or one that calibrate wrote") from None
        kept = before.get("calibration", {})
        for name in ERRORS:
            if name in kept:
                mapping["calibration"][name] = kept[name]
        if before.get("runs"):
            mapping["runs"] = before["runs"]
    try:
        write_mapping(output, mapping)
    except OSError as error:
        fix = "--output FILE in a folder that you may write"
        raise CommandError(f"{output} cannot be written: {error.strerror}", fix, ExitCode.FAILED) from None


def table(cluster: Cluster) -> Any:
    """Return what was measured, for a person."""
    from rich.table import Table

    calibration = cluster.calibration
    assert calibration is not None
    view = Table(title=cluster.name, title_justify="left", show_header=False, box=None, caption_justify="left")
    view.add_column(style="dim")
    view.add_column(justify="right")
    for dtype, flops in calibration.matmul_flops.items():
        view.add_row(f"matmul {dtype}, per {cluster.accelerator.kind} device", f"{flops / 1e9:,.1f} GFLOP/s")
    named = {
        "memory_bytes_per_s": "memory",
        "elementwise_bytes_per_s": "element-wise, new tensor",
        "optimizer_bytes_per_s": "fused AdamW",
        "disk_write_bytes_per_s": "disk, written through",
        "disk_read_bytes_per_s": "disk, read",
    }
    fields = {field.name: getattr(calibration, field.name) for field in dataclasses.fields(calibration)}
    for name, words in named.items():
        if fields[name]:
            view.add_row(words, f"{fields[name] / 1e9:,.2f} GB/s")
    if calibration.op_overhead_s:
        view.add_row("smallest operation", f"{calibration.op_overhead_s * 1e6:,.1f} us")
    for name, latency_s in calibration.collective_latency_s.items():
        rate = calibration.curves[name][-1][1]
        view.add_row(name.replace("_", " "), f"{rate / 1e9:,.2f} GB/s, {latency_s * 1e6:,.0f} us at least")
    view.add_row("source", calibration.source)
    return view
