"""What is renamed into place is on the disk before its name is. SIGKILL keeps the page cache and so cannot show it:
the order of the calls of fsync and rename is recorded instead."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from clusters.files import write_atomically
from orchestrator.control.folder import RunFolder
from orchestrator.models.architecture import make_architecture
from orchestrator.models.decoder import Decoder
from orchestrator.models.weights import write_folder
from orchestrator.planner.plan import plan
from orchestrator.spec import parse_job
from orchestrator.telemetry import report
from orchestrator.training import checkpoint
from orchestrator.training.prepare import Request, prepare
from orchestrator.training.tokenizer import keep_tokenizer
from tests.unit.test_checkpoint import INFO, session

JOB = {
    "version": 1,
    "name": "tiny",
    "model": "opt-125m",
    "data": {"train": ["corpus.txt"]},
    "batch": {"global_batch_size": 2, "sequence_length": 16},
    "training": {"steps": 3},
    "cluster": "a100-80gb",
}


@pytest.fixture
def renames(monkeypatch):
    """What was wrong with each rename: content that was not synced before it, or a folder not synced after it."""
    synced: set[Path] = set()
    faults: list[str] = []
    unsynced_folders: dict[Path, Path] = {}
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def recording_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.add(path)
        for target in [target for target, folder in unsynced_folders.items() if folder == path]:
            del unsynced_folders[target]
        return fsync(descriptor)

    def recording(do):
        def move(source, target, **settings):
            source, target = Path(source).absolute(), Path(target).absolute()
            inside = [source, *source.rglob("*")] if source.is_dir() else [source]
            faults.extend(f"{path} -> {target.name}: not synced before" for path in inside if path not in synced)
            synced.update(target / path.relative_to(source) for path in inside)
            if target.suffix != ".deleting":  # it may come back; without all its files it is refused
                unsynced_folders[target] = target.parent
            return do(source, target, **settings)

        return move

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording(replace))
    monkeypatch.setattr(os, "rename", recording(rename))
    return lambda: (
        faults + [f"{folder} was not synced after {target.name}" for target, folder in unsynced_folders.items()]
    )


def run_files(folder: Path) -> None:
    run = RunFolder(folder / "run")
    run.create()
    run.write_job(parse_job(JOB, directory=folder))
    run.write_plan({"version": 1, "strategy": {}})


def report_page(folder: Path) -> None:
    (folder / "plan.json").write_text(json.dumps(plan(parse_job(JOB, directory=folder)).to_dict()))
    report.write(folder)


def prepared_data_and_kept_tokenizer(folder: Path) -> None:
    (folder / "corpus.txt").write_text("a text to train on, and to merge bytes of. " * 400)
    index = prepare(Request(base=folder, train=("corpus.txt",), tokenizer=280), directory=folder / "tokens")
    keep_tokenizer(index, folder / "run")
    assert {path.name for path in (folder / "run" / "tokenizer").iterdir()} == {"tokenizer.json", "description.json"}


def weights_of_a_model(folder: Path) -> None:
    shape = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "ffn_size": 16, "vocab_size": 32, "max_position": 8}
    arch = make_architecture(family="opt", **shape)
    write_folder(folder / "opt", arch, Decoder(arch).named_parameters())


def checkpoints_written_twice(folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for step in (1, 2, 2):
            checkpoint.save(session(), folder, step=step, info=INFO, keep=1, background=False).wait()
    finally:
        dist.destroy_process_group()


def calibration(folder: Path) -> None:
    write_atomically(folder / "calibration.yaml", json.dumps({}))


@pytest.mark.parametrize(
    "write",
    [
        run_files,
        report_page,
        prepared_data_and_kept_tokenizer,
        weights_of_a_model,
        checkpoints_written_twice,
        calibration,
    ],
)
def test_everything_is_on_the_disk_before_it_bears_its_name(tmp_path, renames, write):
    torch.set_num_threads(1)
    write(tmp_path)
    assert renames() == []
