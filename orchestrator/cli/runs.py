"""Run folders by name, for the verbs that look at runs."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.chain import links_of
from orchestrator.cli.errors import CommandError, ExitCode

if TYPE_CHECKING:
    from orchestrator.control.folder import RunFolder

directory_option: Callable[[Any], Any] = click.option(
    "--directory", default="runs", show_default=True, metavar="FOLDER", help="Parent of the run folders."
)


def run_folder(run: str, directory: str) -> RunFolder:
    """A name in the directory, or the path of a run folder."""
    from orchestrator.control.folder import RunFolder

    for path in (Path(directory) / run, Path(run)):
        if (path / "events.jsonl").exists() or (path / "job.yaml").exists():
            return RunFolder(path)
    known = [folder.path.name for folder in run_folders(directory)]
    known += [f"{chain.name}/{name}" for chain in chain_folders(directory) for name, _ in links_of(chain)]
    near = difflib.get_close_matches(run, known, n=1)
    fix = f"did you mean {near[0]}? " if near else ""
    fix += f"known: {', '.join(known)}" if known else "--directory FOLDER, where `run` put it"
    raise CommandError(f"there is no run {run}", fix, ExitCode.NOT_FOUND, where=str(Path(directory).resolve()))


def run_folders(directory: str) -> list[RunFolder]:
    from orchestrator.control.folder import RunFolder

    parent = Path(directory)
    found = parent.iterdir() if parent.is_dir() else ()
    return [RunFolder(path) for path in sorted(found) if (path / "job.yaml").exists()]


def chain_folders(directory: str) -> list[Path]:
    """The folders in which the links of a chain run."""
    parent = Path(directory)
    return [path for path in (sorted(parent.iterdir()) if parent.is_dir() else ()) if links_of(path)]


def chain_folder(run: str, directory: str) -> Path | None:
    """The folder of a chain by its name or path; None where it is no chain's."""
    return next((path for path in (Path(directory) / run, Path(run)) if links_of(path)), None)
