"""The command `shardwise`: one verb per file, imported when it is called."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from importlib import import_module

import click

from orchestrator.cli.errors import ExitCode, answer, show

VERBS: Mapping[str, tuple[str, str, str]] = {
    # verb: (module, attribute that holds its click.Command, what `shardwise --help` says)
    "validate": ("orchestrator.cli.validate", "command", "Check a job and show all of its faults."),
    "calibrate": ("orchestrator.cli.calibrate", "command", "Measure this machine, for plans that rest on its numbers."),
    "doctor": ("orchestrator.cli.doctor", "command", "Check whether this machine is fit to plan and to run."),
    "plan": ("orchestrator.cli.plan", "command", "Plan a job: strategy, bytes, speed, cost, and why."),
    "estimate": ("orchestrator.cli.estimate", "command", "Bytes of one strategy, by component and pipeline rank."),
    "capacity": ("orchestrator.cli.capacity", "command", "Models x GPU counts: what fits, how fast, for how much."),
    "run": ("orchestrator.cli.run", "command", "Train a job here and now, or go on where it stopped."),
    "serve": ("orchestrator.cli.serve", "command", "Take jobs by HTTP, queue them and run them here."),
    "submit": ("orchestrator.cli.jobs", "submit", "Give a job to the service."),
    "list": ("orchestrator.cli.jobs", "list_", "The service's jobs."),
    "watch": ("orchestrator.cli.jobs", "watch", "A job of the service as it goes on."),
    "pause": ("orchestrator.cli.jobs", "pause", "Stop a job of the service after a checkpoint."),
    "resume": ("orchestrator.cli.jobs", "resume", "Let a paused or failed job of the service go on."),
    "cancel": ("orchestrator.cli.jobs", "cancel", "End a job of the service."),
    "nodes": ("orchestrator.cli.jobs", "nodes", "The service's machines."),
    "cordon": ("orchestrator.cli.jobs", "cordon", "Start no more jobs on a machine of the service."),
    "uncordon": ("orchestrator.cli.jobs", "uncordon", "Start jobs on it again."),
    "status": ("orchestrator.cli.status", "command", "How far runs are: step, loss, speed, state."),
    "events": ("orchestrator.cli.events", "command", "What happened to a run, and why."),
    "logs": ("orchestrator.cli.logs", "command", "What a worker of a run printed."),
    "prepare": ("orchestrator.cli.prepare", "command", "Tokenize a job's text; what is there already is used."),
    "generate": ("orchestrator.cli.generate", "command", "Sample text from a checkpoint."),
    "chat": ("orchestrator.cli.chat", "command", "Talk with a checkpoint."),
    "self-instruct": (
        "orchestrator.cli.self_instruct",
        "command",
        "Let a model write instruction data from seed tasks.",
    ),
    "convert": ("orchestrator.cli.convert", "command", "Write a checkpoint as a Hugging Face folder."),
    "export": ("orchestrator.cli.export", "command", "A RayJob or a Slurm script that runs a job on one node."),
    "schema": ("orchestrator.cli.schema", "command", "Print the JSON Schema of a job."),
}


class Verbs(click.Group):
    """The table above as a click group that imports only the verb that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, attribute, _ = VERBS[cmd_name]
        found: click.Command = getattr(import_module(module), attribute)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        verb = args[0]
        if verb not in VERBS and not verb.startswith("-"):
            near = difflib.get_close_matches(verb, VERBS, n=1)
            guess = f"did you mean `shardwise {near[0]}`? " if near else ""
            error = click.UsageError(f"there is no verb `{verb}`", ctx)
            error.fix = f"{guess}known: {', '.join(VERBS)}"  # type: ignore[attr-defined]
            raise error
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, text) for verb, (_, _, text) in VERBS.items()])


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version

        click.echo(f"shardwise {version('shardwise')}")
        ctx.exit()


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def shardwise() -> None:
    """Plans, runs, watches and repairs the training of large language models, from one YAML job."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code (ExitCode). What a verb returns, if anything, is that code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        result = shardwise.main(arguments or ["--help"], prog_name="shardwise", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except (click.Abort, KeyboardInterrupt):
        show("cancelled")
        return ExitCode.CANCELLED
    except click.ClickException as error:
        return _usage(error)
    except BrokenPipeError:  # the reader has seen enough: `shardwise schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return ExitCode.DONE
    except Exception as error:
        return answer(error)
    return int(result) if isinstance(result, int) else ExitCode.DONE


def _usage(error: click.ClickException) -> int:
    ctx = getattr(error, "ctx", None)
    path = ctx.command_path if ctx is not None else "shardwise"
    usage = " ".join(ctx.get_usage().split()) if ctx is not None else ""
    show(error.format_message().rstrip("."), where=usage, fix=getattr(error, "fix", "") or f"see `{path} --help`")
    return ExitCode.BAD_INPUT
