"""`shardwise export kuberay|slurm JOB`: what starts a job on one node of a Kubernetes or Slurm cluster, sized by its plan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clusters.files import write_atomically
from orchestrator.cli.errors import CommandError, ExitCode
from orchestrator.spec import load_job

if TYPE_CHECKING:
    from orchestrator.control.export.node import Node
    from orchestrator.planner.plan import Plan
    from orchestrator.spec import Job


class DurationType(click.ParamType[int]):
    """A whole number and s, m, h or d, as in a job; seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from pydantic import TypeAdapter, ValidationError

        from orchestrator.spec.values import Seconds

        try:
            seconds = int(TypeAdapter(Seconds).validate_python(value))
        except ValidationError:
            self.fail(f"{value!r} is not a duration: write a whole number and s, m, h or d, as in 10m", param, ctx)
        if seconds < 60:
            self.fail(f"{value!r} is less than a minute", param, ctx)
        return seconds


DURATION = DurationType()


def sized(function: Callable[..., Any]) -> Callable[..., Any]:
    """The argument and the options that both exports share."""
    for decorate in (
        click.option("--output", metavar="FILE", type=click.Path(path_type=Path), help="[default: standard output]"),
        click.option(
            "--grace", type=DURATION, metavar="10m", help="For the last checkpoint. [from the plan, 5m or more]"
        ),
        click.option("--memory-gib", type=click.IntRange(min=1), help="Host memory of the node. [from the plan]"),
        click.option("--cpus", type=click.IntRange(min=1), help="Cores of the node. [from the plan]"),
        click.argument("job"),
    ):
        function = decorate(function)
    return function


@click.group("export")
def command() -> None:
    """Writes what starts a job on one node of a cluster, with the resources of its plan. A job of several
    nodes is refused."""


@command.command("slurm")
@sized
@click.option(
    "--time-limit",
    type=DURATION,
    metavar="24h",
    help="Of one turn. [the plan's length at the slow end]",
)
@click.option("--partition", metavar="NAME")
@click.option("--account", metavar="NAME")
@click.option("--qos", metavar="NAME")
@click.option("--gpu-type", metavar="NAME", help="As Slurm calls it: --gpus-per-node=NAME:8.")
@click.option(
    "--setup", metavar="LINE", multiple=True, help="A line of shell before the run, such as 'module load cuda'."
)
@click.option("--directory", metavar="FOLDER", help="Parent of the run folder [default: checkpoint.directory].")
def slurm(job: str, output: Path | None, directory: str | None, **options: Any) -> int:
    """Writes a batch script for sbatch. It writes a checkpoint before its time limit, asks for another turn and goes on there."""
    from orchestrator.control.export.node import told
    from orchestrator.control.export.slurm import Options, script

    loaded, made, node = _planned(job, options)
    words = {key: options[key] for key in ("partition", "account", "qos", "gpu_type")}
    for key, value in (*words.items(), *(("setup", line) for line in options["setup"])):
        if value is not None and ("\n" in value or (key != "setup" and value.split() != [value])):
            raise CommandError(f"--{key.replace('_', '-')} is {value!r}: one word, on one line", "quote no blanks")
    text = script(
        loaded.name,
        str(Path(job).resolve()),
        node,
        Options(**words, time_limit_s=options["time_limit"], setup=options["setup"]),
        folder=str(Path.cwd()),
        directory=directory,
        told=told(made),
    )
    return _write(text, output)


@command.command("kuberay")
@sized
@click.option("--image", required=True, help="With Shardwise, ray[default], a CUDA build of torch, nvidia-ml-py.")
@click.option("--claim", default="shardwise", show_default=True, help="PersistentVolumeClaim: the text, and the runs.")
@click.option("--namespace", metavar="NAME", help="[default: kubectl's]")
@click.option("--node-selector", metavar="KEY=VALUE", multiple=True, help="Label of the nodes that may take the pod.")
@click.option("--retries", type=click.IntRange(min=0), default=3, show_default=True, help="New pods after a failure.")
@click.option("--time-limit", type=DURATION, metavar="24h", help="After which Kubernetes ends the job. [none]")
def kuberay(job: str, output: Path | None, **options: Any) -> int:
    """Writes a RayJob, and a ConfigMap with the job file, for kubectl apply."""
    from importlib.metadata import version

    from orchestrator.control.export.kuberay import Options, manifests, text_of
    from orchestrator.control.export.node import paths_of, told

    loaded, made, node = _planned(job, options)
    wrong = [pair for pair in options["node_selector"] if not all(pair.partition("="))]
    if wrong:
        raise CommandError(f"--node-selector is {wrong[0]!r}", "write KEY=VALUE, such as nvidia.com/gpu.product=NAME")
    chosen = Options(
        image=options["image"],
        claim=options["claim"],
        namespace=options["namespace"],
        node_selector=dict(pair.split("=", 1) for pair in options["node_selector"]),
        retries=options["retries"],
        time_limit_s=options["time_limit"],
    )
    text = Path(job).read_text(encoding="utf-8")
    with refusals():
        documents = manifests(loaded, text, node, chosen, ray_version=version("ray"))
    named = ", ".join(path for _, path in paths_of(loaded))
    return _write(text_of(documents, [told(made), f"At the root of the claim {chosen.claim}: {named}"]), output)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """A RunRefused as the error of a command."""
    from orchestrator.control.folder import RunRefused

    try:
        yield
    except RunRefused as error:
        raise CommandError(error.message, error.fix, where=error.where) from None


def _planned(job: str, options: dict[str, Any]) -> tuple[Job, Plan, Node]:
    """The job, its plan and the node that it needs, or the error that `run` would answer with there."""
    from orchestrator.control.export.node import node_of, planned
    from orchestrator.control.refusals import DoesNotFit
    from orchestrator.planner.show.text import render

    loaded = load_job(job)
    try:
        with refusals():
            made = planned(loaded)
    except DoesNotFit as error:
        click.echo(render(error.plan), err=True)
        fix = "see `would fit` above; `shardwise plan` shows all of it"
        raise CommandError("the plan does not fit this node", fix, ExitCode.DOES_NOT_FIT) from None
    memory = options["memory_gib"]
    node = node_of(
        made,
        num_cores=options["cpus"],
        memory_bytes=None if memory is None else memory * 2**30,
        grace_s=options["grace"],
    )
    return loaded, made, node


def _write(text: str, output: Path | None) -> int:
    if output is None:
        click.echo(text, nl=False)
    else:
        write_atomically(output, text)
    return ExitCode.DONE
