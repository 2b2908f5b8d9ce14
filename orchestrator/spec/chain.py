"""A chain: jobs that run one after the other, each link from what an earlier one trained. Core: a file in, jobs out.

A chain file is a job file in which `chain` lists the links. A link has a name and the keys of a job; what it does not say it
takes from the top of the file, a section as a whole. `from: LINK` stands in the place of `model`, of the link itself or of a role
of ppo.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.models.architecture import make_architecture
from orchestrator.spec.errors import ErrorEntry, Fault, Keys, SpecError, nearest
from orchestrator.spec.job import Job
from orchestrator.spec.parse import job_and_faults, located
from orchestrator.spec.resolve import SHAPE

if TYPE_CHECKING:
    from orchestrator.spec.source import Document

ROLES = ("reward", "critic", "reference")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """The links of a chain, in their order; each is a job whose weights come from where an earlier one leaves them."""

    name: str
    file: str
    links: tuple[Job, ...]
    sources: tuple[tuple[str, ...], ...]
    """Names of the links that each link starts from."""
    runs: Path
    """Parent of the links' run folders, absolute."""

    @property
    def made(self) -> frozenset[str]:
        """The run folders that the links leave."""
        return frozenset(str(self.runs / job.name) for job in self.links)


def load(path: str | os.PathLike[str], *, directory: str | Path | None = None) -> Job | Chain:
    """The job or the chain in a YAML file. SpecError holds every fault with its line and column.

    Args:
        directory: parent of the run folders; absent: checkpoint.directory.
    """
    from orchestrator.spec.parse import load_job
    from orchestrator.spec.source import read_document

    document = read_document(Path(path))
    if "chain" not in document.value:
        return load_job(path)
    reader = _Reader(document, Path(path), None if directory is None else Path(directory))
    chain = reader.chain()
    faults = [*document.faults, *reader.faults]
    if chain is not None and not faults:
        return chain
    raise SpecError(located(faults, document, str(path)))


@dataclass(slots=True)
class _Reader:
    document: Document
    file: Path
    directory: Path | None
    faults: list[Fault] = field(default_factory=list)
    jobs: dict[str, Job] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    """Names of the links that the link at hand starts from."""

    @property
    def mapping(self) -> Mapping[str, Any]:
        return self.document.value

    def chain(self) -> Chain | None:
        name, links = self.mapping.get("name"), self.mapping["chain"]
        if not isinstance(name, str) or not NAME.fullmatch(name):
            self._fault(("name",), "`name` of a chain names the folder of its runs", "write `name: my-chain`")
            name = "chain"
        if not isinstance(links, list) or not links or not all(isinstance(link, Mapping) for link in links):
            fix = "write `chain: [{name: sft, task: sft, ...}, ...]`"
            self._fault(("chain",), "`chain` is no list of links, each with keys of its own", fix)
            return None
        shared = {key: value for key, value in self.mapping.items() if key not in ("chain", "name")}
        parent = self._parent(shared) / name
        sources = []
        for number, link in enumerate(links):
            self.used = set()
            self._link(number, dict(link), shared, parent)
            sources.append(tuple(sorted(self.used)))
        if len(self.jobs) < len(links):
            return None
        return Chain(
            name=name, file=str(self.file), links=tuple(self.jobs.values()), sources=tuple(sources), runs=parent
        )

    def _parent(self, shared: Mapping[str, Any]) -> Path:
        """checkpoint.directory of the whole chain; what is wrong with it is told as the job's."""
        section = shared.get("checkpoint")
        told = section.get("directory", "runs") if isinstance(section, Mapping) else "runs"
        return (self.directory or Path(told if isinstance(told, str) and told else "runs")).resolve()

    def _fault(self, path: Keys, message: str, fix: str) -> None:
        self.faults.append(Fault(path=path, message=message, fix=fix))

    def _link(self, number: int, link: dict[str, Any], shared: Mapping[str, Any], parent: Path) -> None:
        place: Keys = ("chain", number)
        name = link.get("name")
        if isinstance(name, str) and name in self.jobs:
            self._fault((*place, "name"), f"two links are called {name}", "give each a name of its own")
            return
        if isinstance(link.get("checkpoint"), Mapping) and "directory" in link["checkpoint"]:
            told = "`checkpoint.directory` of a link: the links of a chain share one folder"
            self._fault((*place, "checkpoint", "directory"), told, "write it at the top of the file")
        if "from" in link:
            if "model" in link:
                fix = "keep one of them"
                self._fault((*place, "from"), "a link has `model` and `from`; which one it trains is open", fix)
            link["model"] = self._model(link.pop("from"), (*place, "from"), parent)
        if isinstance(link.get("ppo"), Mapping):
            link["ppo"] = dict(link["ppo"])
            for role in ROLES:
                told = link["ppo"].get(role)
                if isinstance(told, Mapping) and "from" in told:
                    if len(told) > 1:
                        fix = f"write `{role}: {{from: {told['from']}}}`"
                        self._fault((*place, "ppo", role), "`from` stands in the place of a model's other keys", fix)
                    link["ppo"][role] = self._model(told["from"], (*place, "ppo", role, "from"), parent)
        merged = {key: value for key, value in {**shared, **link}.items() if value is not None or key in link}
        spots = {keys: spot for keys, spot in self.document.value_spots.items() if keys[:1] and keys[0] in shared}
        own = {keys[2:]: spot for keys, spot in self.document.value_spots.items() if keys[:2] == place}
        spots = {keys: spot for keys, spot in spots.items() if keys[0] not in link} | own
        job, faults = job_and_faults(merged, self.file, spots)
        for fault in faults:
            of_link = bool(fault.path) and (fault.path[0] in link or fault.path[0] not in shared)
            moved = fault
            if of_link:
                keys: Keys = fault.path
                if keys[:1] == ("model",) and "model" not in self.mapping["chain"][number]:
                    keys = ("from",)
                moved = replace(fault, path=(*place, *keys), message=f"{fault.message} (link {name or number + 1})")
            if moved not in self.faults:
                self.faults.append(moved)
        if job is not None:
            self.jobs[job.name] = job

    def _model(self, source: Any, path: Keys, parent: Path) -> dict[str, Any] | None:
        """The model of an earlier link, with the weights that it will leave."""
        if source not in self.jobs:
            guess = nearest(str(source), list(self.jobs))
            known = ", ".join(self.jobs) or "none"
            fix = f"did you mean {guess}?" if guess else f"name an earlier link; those are: {known}"
            self._fault(path, f"`from` is {source!r}, which is no earlier link of the chain", fix)
            return None
        self.used.add(source)
        job = self.jobs[source]
        told = job.to_mapping()["model"]
        if isinstance(told, str):
            told = {"name": told}
        if told.get("name") is None and told.get("family") is None:  # the shape is in a file that the link itself reads
            shape = {word: value for word in SHAPE if (value := getattr(job.architecture, word, None)) is not None}
            if make_architecture(**shape) != replace(job.architecture, name=make_architecture(**shape).name):
                fix = "`shardwise convert` what that link leaves, and name the folder"
                self._fault(path, f"the model of link {source} has a shape that no keys say", fix)
        else:
            shape = {word: told[word] for word in ("name", *SHAPE) if word in told}
        return {**shape, "checkpoint": str(parent / source)}


def entries(chain: Chain) -> list[ErrorEntry]:
    """What keeps a valid chain from running: settings that nothing acts on, and files that are not here and no link makes."""
    from orchestrator.spec.acting import unbuilt
    from orchestrator.spec.files import missing

    return [entry for job in chain.links for entry in (*unbuilt(job), *missing(job, made=chain.made))]
