"""Run folders by name, for the verbs that look at runs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.errors import CommandError, ExitCode

if TYPE_CHECKING:
    from orchestrator.control.folder import RunFolder
    from orchestrator.spec.chain import Chain

CHAIN = "chain.json"
"""File in the folder of a chain's runs: the links and their lengths, for who looks before they have begun."""


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


def write_links(chain: Chain) -> None:
    """Leave in the folder of the runs what links there will be."""
    from clusters.files import write_atomically

    chain.runs.mkdir(parents=True, exist_ok=True)
    links = [{"name": job.name, "task": job.task, "steps": job.num_steps} for job in chain.links]
    write_atomically(chain.runs / CHAIN, json.dumps({"chain": chain.name, "links": links}, indent=1))


def links_of(folder: Path) -> list[tuple[str, int | None]]:
    """(name, steps) of each link of the chain whose runs lie in a folder. Empty: it is no chain's."""
    try:
        told = json.loads((folder / CHAIN).read_text(encoding="utf-8"))
        return [(str(link["name"]), link["steps"]) for link in told["links"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
