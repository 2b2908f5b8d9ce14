"""A checkpoint is whole or it is refused by name; what was saved comes back bit for bit under another strategy."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from orchestrator.models.architecture import make_architecture
from orchestrator.models.decoder import Decoder, initial_weights
from orchestrator.training import checkpoint
from orchestrator.training.checkpoint import CheckpointFailed, CheckpointInfo, CheckpointRefused
from orchestrator.training.manifest import (
    before,
    fingerprint,
    latest,
    prune,
    put_in_place,
    read_manifest,
    remove_replaced,
    sweep,
    verify,
)
from strategies.engines.engine import MicroBatch
from strategies.engines.native import build_session
from strategies.strategy import Strategy
from tests.ranks import spawn

INFO = CheckpointInfo(job={"name": "tiny"}, architecture={}, num_steps=8, strategy={}, data={"tokenizer": "byte"})
BATCH = MicroBatch(
    input_ids_BS=torch.arange(24).view(2, 12) % 61,
    target_ids_BS=(torch.arange(24).view(2, 12) * 7 + 1) % 61,
    weight_B=torch.ones(2),
)


def architecture(hidden_size=24):
    # 61 tokens and 3 ranks: uneven shards, and biases with fewer rows than ranks have turns.
    return make_architecture(
        family="opt", num_layers=2, hidden_size=hidden_size, num_heads=3, ffn_size=44, vocab_size=61, max_position=16
    )


def session(*, zero_stage=0, replicas=1, seed=1, hidden_size=24, precision="fp32"):
    arch = architecture(hidden_size)
    with torch.device("meta"):
        module = Decoder(arch)
    states = "full" if precision != "bf16" else "sharded_fp32" if zero_stage >= 2 else "mixed"
    strategy = Strategy(
        data_parallel_degree=replicas,
        zero_stage=zero_stage,
        zero_group_size=replicas if zero_stage else 1,
        states=states,
    )
    return build_session(module, strategy=strategy, precision=precision, weights=initial_weights(arch, seed))


def step(engine):
    return engine.step([BATCH], num_targets=24 * dist.get_world_size(), learning_rate=1e-2).loss


def whole(engine):
    """The state of all ranks, copied."""
    state = {name: value for name, value in engine.state_dict().items() if torch.is_tensor(value)}
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for name, t in state.items()}


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


@pytest.fixture
def world_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints of steps 1, 2 and 3; tests take copies."""
    folder = tmp_path_factory.mktemp("written")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    engine = session()
    for number in (1, 2, 3):
        step(engine)
        checkpoint.save(engine, folder, step=number, info=INFO, background=False).wait()
    dist.destroy_process_group()
    return folder


@pytest.fixture
def saved(written, world_of_one, tmp_path):
    """Checkpoints of steps 1, 2 and 3."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return tmp_path


# Whole or refused ---------------------------------------------------------------------------------------------------


def flip_a_bit(path):
    with open(path / "__0_0.distcp", "r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))


def cut_short(path):
    with open(path / "__0_0.distcp", "r+b") as file:
        file.truncate(1000)


def edit_manifest(path):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"step": 99}))


def swap_metadata(path):
    shutil.copy(path.parent / "step-00000002" / ".metadata", path / ".metadata")
    data = bytearray((path / ".metadata").read_bytes())
    data[-3] ^= 1
    (path / ".metadata").write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (flip_a_bit, "__0_0.distcp was altered"),
        (cut_short, "__0_0.distcp has 1000 bytes instead of"),
        (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda path: (path / "manifest.json").unlink(), "no manifest.json, so it was never finished"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (edit_manifest, "manifest.json was altered"),
        (swap_metadata, ".metadata"),
    ],
)
def test_a_torn_or_altered_checkpoint_is_refused_by_name_and_the_one_before_it_is_used(saved, harm, reason):
    harm(saved / "step-00000003")
    with pytest.raises(CheckpointRefused, match="step-00000003"):
        verify(saved / "step-00000003")
    events = []
    ref = latest(saved, report=events.append)
    assert ref is not None
    assert ref.step == 2
    (event,) = events
    assert (event.kind, event.step) == ("checkpoint_refused", 3)
    assert reason in event.cause
    assert "step-00000003" in event.cause


def test_of_no_checkpoint_there_is_no_latest(tmp_path):
    assert latest(tmp_path / "absent", report=print) is None
    (tmp_path / "step-00000005.partial").mkdir()
    (tmp_path / "notes").mkdir()
    assert latest(tmp_path, report=print) is None


def test_a_manifest_that_names_a_file_outside_its_folder_is_refused(saved):
    path = saved / "step-00000003" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    manifest["files"]["../step-00000002/.metadata"] = {"bytes": 1, "sha256": ""}
    path.write_text(json.dumps(manifest | {"checksum": fingerprint(manifest)}))
    with pytest.raises(CheckpointRefused, match="outside the folder"):
        read_manifest(path.parent)


def rewritten(path, **changes):
    """The checkpoint with a manifest that vouches for its files as they are now, as someone who may write there can make it."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    del manifest["checksum"]
    for name, entry in manifest["files"].items():
        entry |= {"bytes": (path / name).stat().st_size, "sha256": checkpoint.sha256(path / name)}
    (path / "manifest.json").write_text(json.dumps(manifest | {"checksum": fingerprint(manifest)}))
    return path


class Trap:
    """Makes a file of its own where it is unpickled by a reader that trusts it."""

    def __init__(self, sprung):
        self.sprung = sprung

    def __reduce__(self):
        return (Path.touch, (self.sprung,))


def trapped_index(path, trap):
    (path / ".metadata").write_bytes(pickle.dumps(trap))


def trapped_bytes(path, trap):
    """Every tensor is declared as bytes with a size, so that torch would read them, and load the bytes as a pickle."""
    metadata = torch_metadata(path)
    for index, place in list(metadata.storage_data.items()):
        entry = BytesStorageMetadata()
        entry.size = metadata.state_dict_metadata[index.fqn].size
        metadata.state_dict_metadata[index.fqn] = entry
        metadata.storage_data[MetadataIndex(index.fqn)] = place
    data = pickle.dumps(trap)
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, len(data)
    (path / "__0_0.distcp").write_bytes(data)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def trapped_pieces(path, trap):
    """Every piece of a tensor is a pickle, where torch.load expects an archive."""
    metadata = torch_metadata(path)
    data = pickle.dumps(trap)
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, len(data)
    (path / "__0_0.distcp").write_bytes(data)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def torch_metadata(path):
    return pickle.loads((path / ".metadata").read_bytes())


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (trapped_index, "which no checkpoint of ours contains"),
        (trapped_bytes, "is BytesStorageMetadata, and a checkpoint of ours holds tensors alone"),
        (trapped_pieces, "__0_0.distcp cannot be read"),
    ],
)
def test_a_checkpoint_that_carries_code_and_a_matching_manifest_runs_none(saved, tmp_path_factory, harm, told):
    sprung = tmp_path_factory.mktemp("trap") / "sprung"
    path = saved / "step-00000003"
    harm(path, Trap(sprung))
    ref = verify(rewritten(path))
    with pytest.raises(CheckpointRefused) as refused:
        checkpoint.load(session(), ref)
    assert told in str(refused.value)
    assert not sprung.exists()


def test_torch_reads_a_checkpoint_of_ours(saved):
    wanted = {"model.head.norm.weight": torch.zeros(24)}
    got = {"model.head.norm.weight": torch.ones(24)}
    checkpoint.read_into(wanted, verify(saved / "step-00000003"))
    dcp.load(got, storage_reader=dcp.FileSystemReader(saved / "step-00000003"))
    assert_equal(got, wanted)


# The history of a run -------------------------------------------------------------------------------------------------


def saved_again(folder, step, *, keep, resumed_from):
    saver = checkpoint.Saver(folder, INFO, keep=keep, resumed_from=resumed_from)
    return saver.save(session(), step=step, background=False).wait()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_manifest_tells_its_place_in_the_history(saved):
    saved_again(saved, 2, keep=None, resumed_from=verify(saved / "step-00000001"))
    manifest = read_manifest(saved / "step-00000002").manifest
    assert (manifest["sequence"], manifest["first_sequence"]) == (4, 4)
    assert manifest["resumed_from"] == {"name": "step-00000001", "step": 1, "sequence": 1}
    assert read_manifest(saved / "step-00000001").manifest["resumed_from"] is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_corrupt_newest_checkpoint_is_passed_over_and_never_kept_for_a_good_one(saved, keep):
    """1 and 2 are good, 3 has a flipped bit: the run goes on from 2, and writes 4; or a step that was there, or before."""
    flip_a_bit(saved / "step-00000003")
    origin = latest(saved, report=lambda event: None)
    assert origin.step == 2
    saved_again(saved, 4, keep=keep, resumed_from=origin)
    assert names(saved) == [f"step-0000000{n}" for n in (1, 2, 4)][-keep:]
    assert latest(saved, report=print).step == 4


def test_the_newest_is_the_last_that_was_written_not_the_one_of_the_highest_step(saved):
    origin = verify(saved / "step-00000001")
    saved_again(saved, 2, keep=2, resumed_from=origin)
    assert names(saved) == ["step-00000001", "step-00000002"], "3 was left behind when the run went back to 1"
    assert latest(saved, report=print).manifest["sequence"] == 4


def test_checkpoints_without_a_sequence_come_before_those_with_one_in_order_of_their_steps(saved):
    for step in (1, 2, 3):
        path = saved / f"step-0000000{step}"
        manifest = json.loads((path / "manifest.json").read_text())
        old = {k: v for k, v in manifest.items() if k not in ("sequence", "first_sequence", "resumed_from", "checksum")}
        (path / "manifest.json").write_text(json.dumps(old | {"checksum": fingerprint(old)}))
    origin = verify(saved / "step-00000002")
    assert latest(saved, report=print).step == 3
    assert before(latest(saved, report=print)) == origin.path
    saved_again(saved, 3, keep=2, resumed_from=origin)
    assert names(saved) == ["step-00000002", "step-00000003"]
    assert latest(saved, report=print).manifest["sequence"] == 1


def test_nothing_is_deleted_for_a_checkpoint_that_was_not_verified(saved):
    with pytest.raises(ValueError, match="was not verified"):
        prune(read_manifest(saved / "step-00000003"), 1)
    (saved / "step-00000001" / "manifest.json").unlink()  # does not count, and stays for inspection
    assert [path.name for path in prune(verify(saved / "step-00000003"), 1)] == ["step-00000002"]
    assert names(saved) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("crash", range(8))
def test_a_crash_between_any_two_calls_leaves_the_old_checkpoint_of_a_step_or_the_new_one(saved, monkeypatch, crash):
    """Step 3 is written again while the one that is there is good. The crash is an exception that nothing catches."""
    calls = itertools.count()

    def stopping(do):
        def call(*arguments, **settings):
            if next(calls) >= crash:
                raise KeyboardInterrupt
            return do(*arguments, **settings)

        return call

    partial = saved / "step-00000003.key-1.partial"
    shutil.copytree(saved / "step-00000003", partial)
    rewritten(partial, sequence=9, first_sequence=9, resumed_from={"name": "step-00000002", "step": 2, "sequence": 2})
    for name in ("replace", "rename", "fsync", "rmdir"):
        monkeypatch.setattr(os, name, stopping(getattr(os, name)))
    with contextlib.suppress(KeyboardInterrupt):
        put_in_place(partial, saved / "step-00000003")
        remove_replaced(saved / "step-00000003")
    monkeypatch.undo()
    assert latest(saved, report=print).step == 3, "before anything is swept"
    sweep(saved)
    assert names(saved) == [f"step-0000000{n}" for n in (1, 2, 3)]
    assert latest(saved, report=print).manifest["sequence"] in (3, 9)


def test_what_a_killed_process_left_is_swept(saved):
    for name in ("step-00000004.partial", "step-00000001.deleting"):
        (saved / name).mkdir()
        (saved / name / "__0_0.distcp").write_bytes(b"half")
    assert len(sweep(saved)) == 2
    assert sorted(path.name for path in saved.iterdir()) == [f"step-0000000{n}" for n in (1, 2, 3)]


# Writing ------------------------------------------------------------------------------------------------------------


def test_a_background_checkpoint_holds_the_step_of_the_call_though_training_went_on(world_of_one, tmp_path):
    engine, other = session(), session(seed=2)
    step(engine)
    wanted, scalars = whole(engine), {k: v for k, v in engine.state_dict().items() if not torch.is_tensor(v)}
    group = dist.new_group(backend="gloo")
    pending = checkpoint.save(engine, tmp_path, step=1, info=INFO, group=group)
    step(engine)
    checkpoint.load(other, verify(pending.wait()), group=group)
    assert_equal(whole(other), wanted)
    assert {name: other.state_dict()[name] for name in scalars} == scalars


def test_a_step_that_is_saved_again_replaces_the_older_one_and_keep_is_obeyed(saved):
    engine = session(seed=7)
    checkpoint.save(engine, saved, step=3, info=INFO, keep=2, background=False).wait()
    assert sorted(path.name for path in saved.iterdir()) == ["step-00000002", "step-00000003"]
    other = session()
    checkpoint.load(other, verify(saved / "step-00000003"))
    assert_equal(whole(other), whole(engine))


def test_a_full_disk_fails_the_checkpoint_leaves_the_older_ones_and_no_rubbish(saved):
    engine = session()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a write beyond it is an OSError, as on a full disk
    try:
        pending = checkpoint.save(engine, saved, step=4, info=INFO, background=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(CheckpointFailed, match=r"step-00000004 could not be written: rank 0: .*File too large"):
        pending.wait()
    assert sorted(path.name for path in saved.iterdir()) == [f"step-0000000{n}" for n in (1, 2, 3)]
    assert latest(saved, report=print).step == 3


def test_a_folder_that_cannot_be_made_fails_the_checkpoint_and_not_the_training(world_of_one, tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    pending = checkpoint.save(session(), tmp_path / "checkpoints", step=1, info=INFO, background=False)
    assert pending.done()
    with pytest.raises(CheckpointFailed, match="NotADirectoryError"):
        pending.wait()


# Loading ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_shape_is_refused_before_a_tensor_is_read(saved):
    with pytest.raises(CheckpointRefused, match=r"has shape \[.*\], this model's \["):
        checkpoint.load(session(hidden_size=48), verify(saved / "step-00000003"))
    with pytest.raises(CheckpointRefused, match=r"lacks 1 tensors of this model, model\.of\.another among them"):
        checkpoint.read_into({"model.of.another": torch.zeros(1)}, verify(saved / "step-00000003"))


def test_weights_are_read_without_a_process_group(saved):
    dist.destroy_process_group()
    target = {"model.head.norm.weight": torch.zeros(24)}
    checkpoint.read_into(target, verify(saved / "step-00000003"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert target["model.head.norm.weight"].abs().sum() > 0


def _rank(rank: int, world: int, folder: str, saves: bool) -> None:
    torch.set_num_threads(1)
    root = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{root}/join-{world}", rank=rank, world_size=world)
    group = dist.new_group(backend="gloo")
    for precision, saved_at, loaded_at in (("fp32", 3, (0, 1, 2)), ("bf16", 1, (0, 3)), ("fp64", 0, (1,))):
        if saves:
            engine = session(zero_stage=saved_at, replicas=world, precision=precision)
            step(engine)
            checkpoint.save(engine, root / precision, step=1, info=INFO, group=group).wait()
            state = whole(engine)
            if rank == 0:
                torch.save(state, root / f"{precision}.pt")
            dist.barrier()
        for zero_stage in loaded_at:
            engine = session(zero_stage=zero_stage, replicas=world, seed=9, precision=precision)
            checkpoint.load(engine, read_manifest(root / precision / "step-00000001"), group=group)
            assert_equal(whole(engine), torch.load(root / f"{precision}.pt"))
            assert engine.num_steps == 1
    dist.destroy_process_group()


def test_any_zero_stage_and_world_size_loads_any_others(tmp_path):
    spawn(_rank, 3, str(tmp_path), True, world_size=3)
    for precision in ("fp32", "bf16", "fp64"):
        files = [path.stat().st_size for path in (tmp_path / precision / "step-00000001").glob("*.distcp")]
        assert len(files) == 3
        assert max(files) < 2 * min(files), "each rank writes its share"
    spawn(_rank, 2, str(tmp_path), False, world_size=2)
