"""shardwise estimate: the bytes of one strategy on every pipeline rank, without a GPU. What a job and the options leave open, the
planner chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from orchestrator.cli.errors import CommandError
from orchestrator.planner.plan import Plan, plan
from orchestrator.spec import Job, load_job, parse_job

SHOWN = ("version", "fits", "model", "cluster", "strategy", "memory")
"""Keys of the plan that --json prints."""


@click.command("estimate")
@click.argument("job", required=False)
@click.option("--model", metavar="NAME", help="A catalog model, in place of a job.")
@click.option("--cluster", metavar="NAME", help="A catalog cluster such as a100-80gb-8x8 (GPU-NxM), or a file.")
@click.option("--data", "data_parallel_degree", type=click.IntRange(min=1), help="Data-parallel degree. [what is left]")
@click.option("--tensor", "tensor_parallel_degree", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--pipeline", "pipeline_parallel_degree", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--zero", "zero_stage", type=click.IntRange(0, 3), default=0, show_default=True, help="ZeRO stage.")
@click.option("--sequence-parallel", is_flag=True)
@click.option("--recompute", type=click.Choice(["none", "selective", "full"]), default="none", show_default=True)
@click.option(
    "--offload",
    type=click.Choice(["none", "optimizer", "parameters", "activations"]),
    default="none",
    show_default=True,
)
@click.option("--micro-batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences.")
@click.option("--accumulation", type=click.IntRange(min=1), default=1, show_default=True, help="Micro batches a step.")
@click.option("--sequence-length", type=click.IntRange(min=1), default=2048, show_default=True)
@click.option("--precision", type=click.Choice(["bf16", "fp16", "fp32", "fp64"]), default="bf16", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the plan's memory and strategy as JSON.")
@click.option("--trace", is_flag=True, help="Play the step on fake devices too (seconds; needs torch, no GPU).")
def command(job: str | None, as_json: bool, trace: bool, **flags: Any) -> int:
    """The bytes that JOB's strategy holds on every pipeline rank, each option in place of what JOB says; without JOB, those of
    the strategy that the options name."""
    context = click.get_current_context()
    given = {name for name in flags if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    asked = _changed(load_job(job), {name: flags[name] for name in sorted(given)}) if job else None
    made = plan(asked or parse_job(_mapping(flags)), top=0)
    if trace:
        from orchestrator.planner.trace.child import with_trace

        made = with_trace(made)
    if as_json:
        import json

        whole = made.to_dict()
        click.echo(json.dumps({key: whole[key] for key in (*SHOWN, *(("trace",) if trace else ()))}, indent=1))
    else:
        click.echo("\n".join(_table(made)))
    return 0 if made.fits else 3


PINS = {
    "recompute": "activation_checkpointing",
    "accumulation": "gradient_accumulation_steps",
    **{
        name: name
        for name in (
            *("data_parallel_degree", "tensor_parallel_degree", "pipeline_parallel_degree", "zero_stage"),
            *("sequence_parallel", "offload", "micro_batch_size"),
        )
    },
}
"""Option -> the field of the strategy that it pins."""


def _changed(job: Job, options: dict[str, Any]) -> Job:
    """The job with the options in place of what it says."""
    if not options:
        return job
    if "model" in options:
        raise CommandError(
            f"--model {options['model']} stands in place of a job, and {job.file} is one",
            "leave out the one or the other",
        )
    mapping = job.to_mapping()
    pinned = {} if mapping.get("strategy", "auto") == "auto" else dict(mapping["strategy"])
    pinned |= {PINS[name]: value for name, value in options.items() if name in PINS}
    mapping["strategy"] = pinned
    if "sequence_length" in options:
        mapping["batch"] = mapping["batch"] | {"sequence_length": options["sequence_length"]}
    if "precision" in options:
        mapping["training"] = mapping.get("training", {}) | {"precision": options["precision"]}
    if "cluster" in options:
        file = Path(options["cluster"])
        mapping["cluster"] = str(file.resolve()) if file.is_file() else options["cluster"]
    return parse_job(mapping, directory=job.directory)


def _mapping(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags as a job with everything pinned."""
    if not flags["model"] or not flags["cluster"]:
        raise CommandError(
            "neither a job nor a model and a cluster",
            "`shardwise estimate job.yaml`, or `shardwise estimate --model opt-13b --cluster a100-80gb-1x8 --zero 3`",
        )
    from clusters.catalog import load_cluster

    try:
        num_gpus = load_cluster(flags["cluster"]).num_gpus
    except ValueError as error:
        message, _, fix = str(error).partition("\n  to fix: ")
        raise CommandError(message, fix or "see `ls clusters/catalog`") from None
    data = flags["data_parallel_degree"] or max(
        1, num_gpus // flags["tensor_parallel_degree"] // flags["pipeline_parallel_degree"]
    )
    same = ("tensor_parallel_degree", "pipeline_parallel_degree", "zero_stage", "sequence_parallel", "micro_batch_size")
    return {
        "version": 1,
        "name": "estimate",
        "model": flags["model"],
        "batch": {
            "global_batch_size": flags["micro_batch_size"] * flags["accumulation"] * data,
            "sequence_length": flags["sequence_length"],
        },
        "training": {"precision": flags["precision"]},
        "cluster": flags["cluster"],
        "strategy": {
            "data_parallel_degree": data,
            "zero_group_size": data if flags["zero_stage"] else 1,
            "pipeline_schedule": "1f1b",
            "num_virtual_stages": 1,
            "activation_checkpointing": flags["recompute"],
            "offload": {} if flags["offload"] == "none" else flags["offload"],
            **{name: flags[name] for name in same},
        },
    }


def _table(made: Plan) -> list[str]:
    """Components down, pipeline ranks across: the first, the last, and the fullest."""
    from orchestrator.planner.show.text import trace_told
    from orchestrator.planner.show.words import COMPONENTS, bytes_told, painted, strategy_told

    memory = made.price.memory
    fullest = memory.stages.fullest()
    shown = sorted({0, fullest.pipeline_rank, len(memory.stages) - 1})
    stages = [memory.stages[rank] for rank in shown]
    heads = [f"rank {stage.pipeline_rank}" if len(memory.stages) > 1 else "every GPU" for stage in stages]
    lines = [f"{strategy_told(made.strategy)}; states {made.strategy.states}", ""]
    lines.append(f"  {'':<24}" + "".join(f"{head:>16}" for head in heads))
    rows = [(name, [getattr(stage, name) for stage in stages]) for name, _ in COMPONENTS]
    rows += [(name, [getattr(stage, name) for stage in stages]) for name in ("tensor_peak_bytes", "peak_bytes")]
    for name, values in rows:
        if any(values):
            label = name.replace("_", " ")
            lines.append(f"  {label:<24}" + "".join(f"{bytes_told(value):>16}" for value in values))
    lines.append(f"  {'at its peak in':<24}" + "".join(f"{stage.peak_phase:>16}" for stage in stages))
    verdict = painted("fits", "32") if made.fits else painted("does not fit", "31")
    lines += ["", f"  {verdict}: {bytes_told(memory.peak_bytes)} of {bytes_told(memory.usable_bytes)} usable"]
    if memory.host_bytes_per_node:
        lines.append(
            f"  host memory of each node: {bytes_told(memory.host_bytes_per_node)} of {bytes_told(memory.host_usable_bytes)}"
        )
    if made.trace is not None:
        lines += ["", *(f"  {line}" for line in trace_told(made.trace))]
    return lines + [f"  note: {note}" for note in made.notes]
