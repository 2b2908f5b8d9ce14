"""The text of a run: what comes or changes after it began is told by name, and never slips into its training."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest

from orchestrator.cli import main
from orchestrator.control import text
from orchestrator.control.folder import RunFolder, RunRefused
from orchestrator.spec import parse_job
from orchestrator.telemetry.records import Event, append_line, encode
from orchestrator.training.data import DataError
from orchestrator.training.inputs import changes, request_of
from orchestrator.training.manifest import CheckpointRef
from orchestrator.training.prepare import prepare_job

JOB = {
    "version": 1,
    "name": "small",
    "model": "opt-125m",
    "data": {"train": ["texts"], "validation": 0.1},
    "batch": {"global_batch_size": 4, "sequence_length": 64},
    "training": {"steps": 10},
}


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"the text of {name}\n" * 100)
    return parse_job(JOB, directory=tmp_path)


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "small")
    folder.create()
    return folder


def begin(job, folder, resume=None):
    """What a start of the run does with its text: (tokens, what a person is told)."""
    reads = text.text_of(job, folder, resume)
    return text.prepared(job, folder, reads, resume, lambda done, total: None), text.told(reads)


def saved(folder, index):
    """A checkpoint that was trained on these tokens."""
    folder.metrics.write_text("{}\n")
    return CheckpointRef(
        path=folder.checkpoints / "step-00000005", step=5, manifest={"data": {"tokens": index.fingerprint}}
    )


def add(job):
    (job.directory / "texts" / "c.txt").write_text("the text of c\n" * 100)


def change(job):
    with open(job.directory / "texts" / "b.txt", "a") as file:
        file.write("one more line\n")


def rewrite(job):
    (job.directory / "texts" / "b.txt").write_text("another line.\n" * 100)


def delete(job):
    (job.directory / "texts" / "a.txt").unlink()


def touch(job):
    os.utime(job.directory / "texts" / "a.txt", (1, 1))


CHANGES = [
    (add, "texts/c.txt was added"),
    (change, "texts/b.txt has 1,414 bytes instead of 1,400"),
    (rewrite, "texts/b.txt has another content of the same 1,400 bytes"),
    (delete, "texts/a.txt is gone"),
    (lambda job: shutil.rmtree(job.directory / "texts"), "texts/a.txt is gone, texts/b.txt is gone"),
    (touch, ""),
]


@pytest.mark.parametrize(("happens", "told"), CHANGES)
def test_a_run_goes_on_with_the_tokens_that_it_began_with(job, folder, happens, told):
    before, said = begin(job, folder)
    assert said == ""
    tokens = [before.tokens(name).tobytes() for split in before.files.values() for name, _ in split]
    happens(job)
    if told and (job.directory / "texts").exists():
        assert prepare_job(job).fingerprint != before.fingerprint  # another job's, say; it makes a folder of its own
    now, said = begin(job, folder, saved(folder, before))
    assert now == before
    assert [now.tokens(name).tobytes() for split in now.files.values() for name, _ in split] == tokens
    assert (f"({told}); the run goes on with the tokens that it began with" in said) if told else said == ""


@pytest.mark.parametrize(("happens", "told"), CHANGES[:-1])
def test_a_checkpoint_whose_text_is_gone_is_refused_by_the_files_names(job, folder, happens, told):
    before, _ = begin(job, folder)
    resume = saved(folder, before)
    happens(job)
    shutil.rmtree(before.directory)
    with pytest.raises(RunRefused, match="put the files back as they were") as refused:
        begin(job, folder, resume)
    assert f"another text than it was trained on: {told}; the tokens it began with are gone" in refused.value.message
    assert before.fingerprint not in str(refused.value)


def test_tokens_that_are_gone_are_made_again_of_the_same_text(job, folder):
    before, _ = begin(job, folder)
    shutil.rmtree(before.directory)
    assert begin(job, folder, saved(folder, before)) == (before, "")


def test_a_run_that_saved_nothing_begins_anew_with_what_is_there_and_says_so(job, folder):
    before, _ = begin(job, folder)
    folder.metrics.write_text("{}\n")
    add(job)
    assert begin(job, folder)[0] == before
    shutil.rmtree(before.directory)
    now, said = begin(job, folder)
    assert "texts/c.txt was added); no step was saved, so it begins anew with the text as it is now" in said
    assert begin(job, folder, saved(folder, now)) == (now, "")


def test_a_run_that_never_did_a_step_takes_the_text_as_it_is(job, folder):
    before, _ = begin(job, folder)
    add(job)
    now, said = begin(job, folder)
    assert (now.fingerprint == before.fingerprint, said) == (False, "")
    shutil.rmtree(job.directory / "texts")
    with pytest.raises(DataError, match="texts does not exist"):
        text.text_of(job, folder, None)


def test_a_run_from_before_text_was_pinned_finds_its_tokens_by_the_checkpoint(job, folder):
    before, _ = begin(job, folder)
    (folder.path / text.PINNED).unlink()
    add(job)
    now, said = begin(job, folder, saved(folder, before))
    assert now == before
    assert "texts/c.txt was added" in said
    (folder.path / text.PINNED).unlink(missing_ok=True)
    shutil.rmtree(before.directory)
    with pytest.raises(RunRefused, match="which file changed is not on record"):
        begin(job, folder, saved(folder, before))


def test_the_change_is_noted_and_an_event_names_the_files(job, folder):
    index, _ = begin(job, folder)
    add(job)
    noted = []
    reads = text.text_of(job, folder, saved(folder, index), note=noted.append)
    assert noted == [f"text      {text.told(reads)}"]
    event = text.changed_event(reads, 5)
    assert (event.kind, event.step, event.details) == ("text_changed", 5, {"changes": ["texts/c.txt was added"]})


def test_prepare_lists_the_tokens_of_the_text_as_it_was(job, tmp_path, capsys):
    (tmp_path / "job.yaml").write_text(job.to_yaml())
    before = prepare_job(job)
    add(job)
    assert main(["prepare", str(tmp_path / "job.yaml")]) == 0
    assert f"before     {before.directory}: the text as it was; delete it when" in capsys.readouterr().out


def test_a_tokenizer_that_changed_is_told(tmp_path, job):
    with_tokenizer = parse_job(
        {**JOB, "data": {"train": ["texts/b.txt"], "tokenizer": "tokenizer", "validation": 0}}, directory=tmp_path
    )
    indices = []
    for words in ("one two three ", "four five six "):
        (tmp_path / "texts" / "a.txt").write_text(words * 100)
        bpe = parse_job(
            {**JOB, "data": {"train": ["texts/a.txt"], "tokenizer": {"bpe": 280}, "validation": 0}}, directory=tmp_path
        )
        shutil.copytree(prepare_job(bpe).directory, tmp_path / "tokenizer", dirs_exist_ok=True)
        indices.append(prepare_job(with_tokenizer))
    first, second = (changes(request_of(with_tokenizer), index) for index in indices)
    assert (first, second) == (["data.tokenizer: tokenizer is another tokenizer than it was"], [])


def test_a_good_finished_run_stays_finished_when_it_cannot_go_on(job, folder, capsys, monkeypatch):
    from orchestrator.control import run
    from orchestrator.control.run import View, run_job
    from orchestrator.control.supervisor import Stop

    class Nothing:
        def end(self, within_s):
            """There is nothing to end."""

    before, _ = begin(job, folder)
    folder.write_job(job)
    for kind, step in (("run", 0), ("finished", 10)):
        event = Event(time_unix_s=time.time(), kind=kind, step=step, cause="it was good", details={})
        append_line(folder.events, encode(event))
    change(job)
    shutil.rmtree(before.directory)
    longer = parse_job({**JOB, "training": {"steps": 20}, "cluster": "a100-80gb"}, directory=job.directory)
    monkeypatch.setattr("clusters.inventory.local.nvml_devices", lambda: [0])
    folder.write_job(longer)
    resume = saved(folder, before)
    monkeypatch.setattr(run.manifest, "latest", lambda *_, **__: resume)
    with pytest.raises(RunRefused, match=r"texts/b\.txt has 1,414 bytes instead of 1,400"):
        run_job(longer, view=View(), stop=Stop(), directory=folder.path.parent, start_host=lambda path: Nothing())
    assert main(["status", "small", "--directory", str(folder.path.parent), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["state"], row["step"]) == ("finished", 0)
