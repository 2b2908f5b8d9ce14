"""shardwise plan JOB: which strategy, what every GPU holds, how fast, at what price, and why the others lost."""

from __future__ import annotations

import shutil

import click

from orchestrator.cli.errors import CommandError
from orchestrator.planner.plan import plan
from orchestrator.spec.chain import Chain, load


@click.command("plan")
@click.argument("job")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON (docs/reference/plan.md).")
@click.option("--html", metavar="FILE", help="Write the plan as one self-contained page.")
@click.option("--top", type=click.IntRange(min=0), help="Alternatives to list. [3 as text, 20 in JSON and HTML]")
@click.option("--sensitivity", is_flag=True, help="Say what a 10 % slower link would pick. [always in JSON and HTML]")
@click.option("--trace", is_flag=True, help="Play the step on fake devices too (seconds; needs torch, no GPU).")
def command(job: str, as_json: bool, html: str | None, top: int | None, sensitivity: bool, trace: bool) -> int:
    """Plans JOB, a YAML file. Nothing is started, no GPU is needed. Exit code 3: does not fit, or misses a target."""
    loaded = load(job)
    if isinstance(loaded, Chain):
        from orchestrator.cli.chain import show_plans

        if html or trace:
            raise CommandError("a chain has a plan for each link", "--json, or plan a link as a job of its own")
        return show_plans(loaded, as_json=as_json, top=top if top is not None else 20 if as_json else 0)
    made = plan(loaded, top=top if top is not None else 20 if as_json or html else 3)
    if trace:
        from orchestrator.planner.trace.child import with_trace

        made = with_trace(made)
    if html:
        from orchestrator.planner.show.page import write_page

        write_page(made, html)
    if as_json:
        import json

        click.echo(json.dumps(made.to_dict(), indent=1))
        return made.exit_code
    from orchestrator.planner.show.text import render

    click.echo(render(made, width=shutil.get_terminal_size((88, 24)).columns, sensitivity=sensitivity))
    if html:
        click.echo(f"\n  the page is {html}")
    return made.exit_code
