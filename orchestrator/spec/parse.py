"""A job file or mapping -> Job, or all of its faults at once."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

import orchestrator.spec.checks as checks
from orchestrator.spec.errors import MAPPING, ErrorEntry, Fault, SpecError
from orchestrator.spec.job import Job
from orchestrator.spec.resolve import SHAPE, resolve_cluster, resolve_model
from orchestrator.spec.sections import ClusterSpec, ModelSpec

if TYPE_CHECKING:
    from clusters.cluster import Cluster
    from orchestrator.models.architecture import Architecture
    from orchestrator.spec.source import Document


def load_job(path: str | os.PathLike[str]) -> Job:
    """The job in a YAML file. SpecError holds every fault with its line and column."""
    from orchestrator.spec.source import read_document

    return job_of(read_document(Path(path)), directory=Path(path).parent, name=str(path))


def job_of(document: Document, *, directory: Path, name: str) -> Job:
    """The job in a document that was read already; its relative paths start at `directory`, and faults are told under `name`."""
    if "chain" in document.value:
        told = "`chain` makes this file a chain of jobs, and one job is wanted here"
        fault = Fault(path=("chain",), message=told, fix="validate, plan, run and status read chains", of_key=True)
        raise SpecError(located([fault], document, name))
    job, faults = _job(document.value, directory, document.faults)
    if job is not None and not faults:
        return _from(job, _file=name, _spots=document.value_spots)
    raise SpecError(located(faults, document, name))


def located(faults: Iterable[Fault], document: Document, file: str) -> list[ErrorEntry]:
    """Faults with their lines and columns, in the order of the file."""
    errors = []
    for fault in faults:
        line, column = document.spot(fault)
        errors.append(ErrorEntry(file=file, line=line, column=column, message=fault.message, fix=fault.fix))
    return sorted(errors, key=lambda error: (error["line"] or 0, error["column"] or 0))


def job_and_faults(
    mapping: dict[str, Any], file: Path, spots: dict[tuple[str | int, ...], tuple[int, int]]
) -> tuple[Job | None, list[Fault]]:
    """The job in a mapping that was put together from a file, None where it cannot be read, and what is wrong with it.

    Args:
        spots: where in the file its values stand.
    """
    job, faults = _job(mapping, file.parent, [])
    return None if job is None else _from(job, _file=str(file), _spots=spots), faults


def parse_job(mapping: Mapping[str, Any], *, directory: str | os.PathLike[str] = "") -> Job:
    """The job in a mapping, as load_job reads it; its relative paths start at `directory`."""
    if not isinstance(mapping, Mapping):
        raise SpecError([_entry(Fault(message=f"a job is a mapping, not {mapping!r:.60}", fix="pass a dict"))])
    job, faults = _job(dict(mapping), Path(directory), [])
    if job is not None and not faults:
        return job
    raise SpecError([_entry(fault) for fault in faults])


def _entry(fault: Fault) -> ErrorEntry:
    return ErrorEntry(file=MAPPING, line=None, column=None, message=fault.message, fix=fault.fix)


def _job(mapping: dict[str, Any], directory: Path, found: list[Fault]) -> tuple[Job | None, list[Fault]]:
    """The job, and what is wrong with it; where a part cannot be read, the others are still held against each other."""
    try:
        job = Job.model_validate(mapping)
    except ValidationError as error:
        from orchestrator.spec.messages import fault_of
        from orchestrator.spec.salvage import salvage

        faults = [fault_of(detail) for detail in error.errors(include_url=False)]
        sections, shaky = salvage(mapping, error)
        faults += _checks(sections, directory, shaky)
        return None, list({(fault.path, fault.message): fault for fault in (*found, *faults)}.values())
    return _from(job, _directory=directory), [*found, *_checks(job.__dict__, directory, set())]


def _from(job: Job, **origin: Any) -> Job:
    """The job with where it comes from; it is frozen for everybody else."""
    private = job.__pydantic_private__
    assert private is not None
    private.update(origin)
    return job


def _checks(sections: dict[str, Any], directory: Path, shaky: set[str]) -> Iterator[Fault]:
    """The faults of what the sections say together; a section that could not be read is absent, one that lost keys is
    `shaky`. What the names stand for is kept in `sections`, under the names of the job's cached properties."""
    get = sections.get
    batch, training, strategy, data = get("batch"), get("training"), get("strategy"), get("data")
    shape: Architecture | None = yield from _model(sections, directory, "model" in shaky)
    where: Cluster | None = yield from _cluster(sections, directory)
    if data is not None:
        yield from checks.check_data(data)
        if shape is not None:
            yield from checks.check_vocabulary(data, sections["model"], shape)
    if training is not None:
        yield from checks.check_training(training)
        if where is not None:
            yield from checks.check_precision(training, where)
        if shape is not None:
            yield from checks.check_lora(training, shape)
    if batch is not None and shape is not None:
        yield from checks.check_shape(batch, shape)
    yield from _ppo(sections, directory, "ppo" in shaky)
    if strategy is None or not strategy.model_fields_set:
        return
    if training is not None:
        yield from checks.check_compile(training, strategy)
    yield from checks.check_mesh(strategy)
    yield from checks.check_context(strategy, get("task", "pretrain"), batch, shape)
    yield from checks.check_ppo_split(strategy, get("task"))
    if shape is not None:
        yield from checks.check_split(strategy, shape)
    if where is not None:
        yield from checks.check_degrees(strategy, where)
    if batch is not None:
        yield from checks.check_batch(strategy, batch, where.num_gpus if where else None)


def _model(sections: dict[str, Any], directory: Path, shaky: bool) -> Generator[Fault, None, Architecture | None]:
    model = sections.get("model")
    if model is None:
        return None
    shape = yield from _shape(model, directory, shaky)
    if shape is not None:
        sections["architecture"] = shape
    return shape


def _ppo(sections: dict[str, Any], directory: Path, shaky: bool) -> Iterator[Fault]:
    """The faults of a ppo section, those of its models at their own places."""
    ppo, batch = sections.get("ppo"), sections.get("batch")
    if not shaky:
        yield from checks.check_ppo(sections.get("task"), ppo, batch)
    for role in ("reward", "critic", "reference"):
        model = None if ppo is None else getattr(ppo, role)
        if model is None:
            continue
        within = _shape(model, directory, shaky)
        shape = None
        while True:
            try:
                fault = next(within)
            except StopIteration as end:
                shape = end.value
                break
            yield replace(
                fault, path=("ppo", role, *fault.path[1:]), message=fault.message.replace("`model", f"`ppo.{role}")
            )
        if shape is not None and batch is not None:
            for fault in checks.check_shape(batch, shape):
                yield replace(fault, message=f"{fault.message} (ppo.{role})")


def _shape(model: ModelSpec, directory: Path, shaky: bool) -> Generator[Fault, None, Architecture | None]:
    if faults := list(checks.check_model(model)):
        if not shaky:  # otherwise they follow from the keys that could not be read
            yield from faults
        return None
    try:
        shape = resolve_model(model, directory)
    except ValueError as error:
        message, _, fix = str(error).partition(": ")
        fix = fix.partition(" Known: ")[0] if "did you mean" in fix else fix
        if model.path is not None:
            path: tuple[str, ...] = ("model", "path")
            message, fix = str(error), "name a folder with a config.json, or give the shape inline"
        elif model.checkpoint is not None and model.name is None and model.family is None:
            path = ("model", "checkpoint")
            message, fix = str(error), "name a run folder that has a checkpoint, or give name or shape beside it"
        else:
            named = [word for word in SHAPE if word in message.split()]
            path = ("model", named[-1] if named else "name")
            if model.name is not None and (directory / model.name / "config.json").is_file():
                fix = f"{model.name} is a folder with a config.json: write `model: {{path: {model.name}}}`"
        yield Fault(path=path, message=message, fix=fix)
        return None
    return shape


def _cluster(sections: dict[str, Any], directory: Path) -> Generator[Fault, None, Cluster | None]:
    cluster = sections.get("cluster")
    if cluster is None:
        return None
    if isinstance(cluster, ClusterSpec) and (faults := list(checks.check_cluster(cluster))):
        yield from faults
        return None
    try:
        where = sections["resolved_cluster"] = resolve_cluster(cluster, directory)
    except ValueError as error:
        head, _, advice = str(error).partition("\n")
        message, _, guess = head.partition("; did you mean ")
        fix = " ".join(line.strip().removeprefix("to fix: ") for line in advice.splitlines())
        fix = f"did you mean {guess}" if guess else fix or "write a catalog name (GPU-NxM), a file, auto, or keys"
        path = ("cluster", "gpu") if isinstance(cluster, ClusterSpec) and "GPU" in message else ("cluster",)
        yield Fault(path=path, message=message, fix=fix)
        return None
    return where
