"""Chains on the command line: the plans of all links, and their runs one after the other."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.errors import ExitCode
from orchestrator.planner.show.words import bytes_told, length_told, strategy_told

if TYPE_CHECKING:
    from orchestrator.planner.plan import Plan
    from orchestrator.spec import Job
    from orchestrator.spec.chain import Chain


def show_plans(chain: Chain, *, as_json: bool, top: int) -> int:
    """Print the plan of each link, and what the chain takes in all. The exit code is the worst of the links'."""
    from orchestrator.planner.plan import plan
    from orchestrator.planner.show.text import render

    plans = [plan(job, top=top) for job in chain.links]
    totals = {key: _sum([made.cost[key] for made in plans]) for key in ("gpu_hours", "usd", "wall_s")}
    if as_json:
        told = {"version": 1, "chain": chain.name, "fits": all(made.fits for made in plans), "cost": totals}
        click.echo(json.dumps({**told, "links": [made.to_dict() for made in plans]}, indent=1))
        return max(made.exit_code for made in plans)
    click.echo(f"{chain.name}: {len(plans)} links, one after the other\n")
    for number, (made, sources) in enumerate(zip(plans, chain.sources, strict=True), start=1):
        after = f", from what {' and '.join(sources)} left" if sources else ""
        click.echo(f"{number} of {len(plans)}: {made.job.task}{after}")
        click.echo(render(made))
        click.echo()
    click.echo("\n".join(_table(plans, totals)))
    return max(made.exit_code for made in plans)


def _table(plans: list[Plan], totals: dict[str, float | None]) -> list[str]:
    """A line a link, and one for all."""
    width = max(len("in all"), *(len(made.job.name) for made in plans))
    lines = ["in short"]
    for made in plans:
        fits = "" if made.fits else "does not fit, "
        lines.append(
            f"  {made.job.name:<{width}}  {fits}{bytes_told(made.price.memory.peak_bytes)} on each of {made.strategy.num_gpus}, "
            f"{_long(made.cost)}: {strategy_told(made.strategy)}"
        )
    lines.append(f"  {'in all':<{width}}  {_long(totals)}")
    return lines


def _long(cost: dict[str, float | None]) -> str:
    if cost["wall_s"] is None:
        return "no length yet"
    return length_told(cost["wall_s"]) + ("" if cost["usd"] is None else f", ${cost['usd']:,.0f}")


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def run_chain(chain: Chain, *, fresh: bool, metrics_port: int | None, as_json: bool) -> int:
    """Run the links, or go on with the first that is not at its end. What is refused of any of them is refused before the first
    begins; a link that does not come to its end ends the chain, and the same command goes on with it."""
    from orchestrator.cli.foreground import process_began, run_one, say
    from orchestrator.cli.runs import write_links
    from orchestrator.control.refusals import refuse_incomplete
    from orchestrator.spec import acting

    for job in chain.links:
        acting.refuse_unbuilt(job)
        _told_refusal(refuse_incomplete, job)
    write_links(chain)
    results: list[dict[str, Any]] = []
    began_s: float | None = process_began()
    for number, job in enumerate(chain.links, start=1):
        click.echo(f"link      {number} of {len(chain.links)}: {job.name} ({job.task})", err=as_json)
        if not fresh and is_done(job, chain.runs):
            click.echo(f"done      all {job.num_steps:,} steps, before", err=as_json)
            results.append({"name": job.name, "ending": "finished", "step": job.num_steps, "exit_code": 0})
            continue
        told = run_one(
            job,
            directory=str(chain.runs),
            fresh=fresh,
            metrics_port=metrics_port,
            to_stderr=as_json,
            began_s=began_s or time.monotonic(),
        )
        began_s = None
        results.append(told)
        if not as_json:
            say(told, chain.file)
        if told["exit_code"]:
            break
    code = max(int(told["exit_code"]) for told in results)
    if as_json:
        click.echo(json.dumps({"chain": chain.name, "exit_code": code, "links": results}, indent=1))
    elif code == ExitCode.DONE:
        click.echo(f"chain     {chain.name}: all {len(chain.links)} links are done, in {chain.runs}")
    return code


def _told_refusal(refuse: Any, job: Job) -> None:
    from orchestrator.cli.errors import CommandError
    from orchestrator.control.folder import RunRefused

    try:
        refuse(job)
    except RunRefused as error:
        raise CommandError(f"link {job.name}: {error.message}", error.fix, where=error.where) from None


def is_done(job: Job, runs: Path) -> bool:
    """Whether a link came to its end, as the same job as now: its last checkpoint is whole."""
    from orchestrator.control.folder import RunFolder
    from orchestrator.training.manifest import latest

    folder = RunFolder(runs / job.name)
    found = latest(folder.checkpoints, report=lambda event: None, check=False)
    if found is None or job.num_steps is None or found.step < job.num_steps:
        return False
    _told_refusal(folder.check_continuation, job)
    return True
