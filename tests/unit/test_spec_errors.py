"""Every fault of a job says where it stands, what it is and how to fix it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.spec import SpecError, load_job, parse_job
from orchestrator.spec.errors import ErrorEntry
from orchestrator.spec.source import MAX_BYTES

GOOD = """version: 1
name: a
model: opt-125m
batch: {global_batch_size: 8, sequence_length: 128}
"""
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def faults(tmp_path: Path, text: str | bytes) -> list[ErrorEntry]:
    file = tmp_path / "job.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(SpecError) as caught:
        load_job(file)
    assert all(error["file"] == str(file) for error in caught.value.errors)
    return caught.value.errors


def with_model(model: str) -> str:
    return GOOD.replace("opt-125m", model)


# id: (text, line:column, part of the message, part of the fix)
ONE_FAULT = {
    # the file as YAML
    "empty": ("", "1:1", "the file is empty", "examples/opt-125m.yaml"),
    "only a comment": ("# later\n", "1:1", "the file is empty", "write a job"),
    "a list": ("- version: 1\n", "1:1", "a mapping of keys to values, not a list", "`key: value`"),
    "a single value": ("hello\n", "1:1", "not the single value 'hello'", "`key: value`"),
    "two documents": (GOOD + "---\nversion: 1\n", "6:1", "a second document", "split the file at `---`"),
    "tab": (GOOD + "training:\n\tsteps: 1\n", "6:1", "a tab indents this line", "two spaces"),
    "not UTF-8": (GOOD.encode() + b"# caf\xe9\n", "5:6", "byte 0xe9 is not UTF-8", "iconv"),
    "UTF-16": (GOOD.encode("utf-16"), "1:1", "is not UTF-8", "save the file as UTF-8"),
    "control character": (GOOD + "task: \x07\n", "5:7", "'\\x07' is not text", "delete it"),
    "open bracket": (GOOD + "training: {steps: 1\n", "6:1", "this is not YAML", "brackets of this line"),
    "colon in a value": (GOOD + "task: a: b\n", "5:8", "mapping values are not allowed", "in quotes"),
    "reserved character": (GOOD + "task: @b\n", "5:7", "cannot start any token", "put the value in quotes"),
    "tag": (GOOD + "task: !!python/object:os.system {}\n", "5:7", "!!python/object:os.system makes", "delete the tag"),
    "billion laughs": (LAUGHS + GOOD, "4:36", "more than 10000 values", "write the values out"),
    "anchor in itself": (GOOD + "data: &d {train: *d}\n", "5:18", "&d holds itself", "write the values out"),
    "no such anchor": (GOOD + "data: *d\n", "5:7", "alias *d has no anchor", "define &d first"),
    "too deep": (GOOD + f"data: {'[' * 200}{']' * 200}\n", "5:38", "deeper than 32 levels", "flatten it"),
    "a list as key": (GOOD + "? [a]\n: b\n", "5:3", "a key is a plain word", "`key: value`"),
    "duplicate key": (GOOD + "name: b\n", "5:1", "`name` was already given in line 2", "delete line 2 or line 5"),
    # keys
    "unknown key": (GOOD + "stratgy: auto\n", "5:1", "unknown key `stratgy` in a job; nothing", "mean `strategy`?"),
    "unknown inner key": (
        GOOD + "strategy:\n  zero_stagee: 1\n", "6:3", "unknown key `zero_stagee` in `strategy`", "mean `zero_stage`?",
    ),
    "misplaced key": (
        GOOD + "training:\n  learning_rate: 1e-3\n", "6:3", "unknown key", "belongs in `training.optimizer`",
    ),
    "misplaced pin": (GOOD + "zero_stage: 1\n", "5:1", "unknown key `zero_stage`", "belongs in `strategy`"),
    "unindented key": (GOOD + "data:\ntrain: [a]\n", "6:1", "unknown key `train`", "belongs in `data`: indent it under"),
    "a count of GPUs": (GOOD + "gpus: 8\n", "5:1", "unknown key `gpus`", "`cluster: GPU-1x8`"),
    "a large count of GPUs": (GOOD + "num_gpus: 64\n", "5:1", "unknown key `num_gpus`", "as in `a100-80gb-8x8`"),
    "GPUs of a cluster": (
        GOOD + "cluster: {gpu: a100-80gb, gpus: 8}\n", "5:27", "unknown key `gpus` in `cluster`", "mean `gpus_per_node`?",
    ),
    "lr": (GOOD + "lr: 1e-3\n", "5:1", "unknown key `lr`", "`learning_rate`? it belongs in `training.optimizer`"),
    "lr where the rate is": (
        GOOD + "training: {optimizer: {lr: 1e-3}}\n", "5:24", "unknown key `lr`", "did you mean `learning_rate`?",
    ),
    "zero": (GOOD + "zero: 2\n", "5:1", "unknown key `zero`", "did you mean `zero_stage`? it belongs in `strategy`"),
    "zero in the strategy": (GOOD + "strategy: {zero: 2}\n", "5:12", "unknown key `zero`", "did you mean `zero_stage`?"),
    "batch_size": (GOOD + "batch_size: 8\n", "5:1", "unknown key", "`global_batch_size`? it belongs in `batch`"),
    "foreign key": (GOOD + "qwerty: 1\n", "5:1", "unknown key `qwerty`", "known here: version, name, task"),
    "merge key": (GOOD + "training:\n  <<: {steps: 1}\n", "6:3", "unknown key `<<`", "no merge keys"),
    "missing section": (GOOD[: GOOD.index("batch")], "1:1", "`batch` is missing", "add `batch: {global_batch_size: 512"),
    "missing key": (
        GOOD.replace("global_batch_size: 8, ", ""), "4:1", "`batch.global_batch_size` is missing", "global_batch_size: 512",
    ),
    # values
    "no value": (GOOD.replace("name: a", "name:"), "2:6", "`name` has no value", "as in `name: opt-1.3b-alpaca`"),
    "no optional value": (GOOD + "objective:\n", "5:11", "`objective` has no value", "or delete the line"),
    "number in quotes": (GOOD + "training: {steps: '100'}\n", "5:19", "'100', not a whole number", "without quotes"),
    "100 billions": (GOOD + "training: {tokens: 100B}\n", "5:20", "'100B', not a whole number", "write 100e9"),
    "underscores": (GOOD + "training: {steps: 1_000}\n", "5:19", "'1_000', not a whole", "separators: 1000"),
    "leading zero": (GOOD + "training: {seed: 017}\n", "5:18", "'017', not a whole number", "write 17"),
    "sexagesimal": (GOOD + "training: {steps: 1:30}\n", "5:19", "'1:30', not a whole number", "as in `steps: 1000`"),
    "billions": (GOOD + "training: {tokens: 300B}\n", "5:20", "'300B', not a whole number", "write 300e9"),
    "yes": (GOOD + "training: {deterministic: yes}\n", "5:27", "'yes', not true or false", "write true"),
    "truth as number": (GOOD + "training: {steps: true}\n", "5:19", "is true, not a whole number", "a whole number"),
    "fraction of a step": (GOOD + "training: {steps: 1.5}\n", "5:19", "is 1.5, not a whole number", "a whole number"),
    "infinite": (GOOD + "training: {z_loss: .inf}\n", "5:20", "is inf, not a finite number", "a finite number"),
    "huge": (GOOD + f"training: {{steps: {'9' * 5000}}}\n", "5:19", "`training.steps` is inf", "a whole number"),
    "too small": (GOOD + "training: {steps: 0}\n", "5:19", "is 0; it must be at least 1", "at least 1"),
    "too large": (GOOD + "strategy: {zero_stage: 4}\n", "5:24", "is 4; it must be at most 3", "as in `zero_stage: 1`"),
    "unknown word": (GOOD + "training: {precision: bfloat16}\n", "5:23", "'bfloat16', which is none", "did you mean bf16?"),
    "far word": (GOOD + "objective: best\n", "5:12", "'best', which is none", "one of fastest, cheapest, fewest_gpus"),
    "unknown word in a list": (
        GOOD + "strategy: {mesh_order: [data, tensr]}\n", "5:31", "`strategy.mesh_order[1]` is 'tensr'", "mean tensor?",
    ),
    "other version": (GOOD.replace("version: 1", "version: 2"), "1:10", "the only version", "write `version: 1`"),
    "name with spaces": (GOOD.replace("name: a", "name: Opt 125M"), "2:7", "it names a folder", "`name: opt-125m`"),
    "name that climbs": (GOOD.replace("name: a", "name: ../../x"), "2:7", "it names a folder", "`name: x`"),
    "name as number": (GOOD.replace("name: a", "name: 2024"), "2:7", "2024, not text", "put it in quotes: '2024'"),
    "list as section": (GOOD + "training: [1]\n", "5:11", "is a list, not keys and values", "keys such as steps"),
    "word as strategy": (GOOD + "strategy: zero3\n", "5:11", "'zero3', neither auto nor keys", "keys such as engine"),
    "word as offload": (GOOD + "strategy: {offload: optimzer}\n", "5:21", "'optimzer', neither none", "mean optimizer?"),
    "offload to the CPU": (
        GOOD + "strategy: {offload: cpu}\n", "5:21", "'cpu'; `offload` says what leaves", "`offload: {optimizer: host}`",
    ),
    "optimizer to the CPU": (GOOD + "strategy: {offload: {optimizer: cpu}}\n", "5:33", "'cpu'", "did you mean host?"),
    "a precision in torch's words": (GOOD + "training: {precision: float32}\n", "5:23", "'float32'", "did you mean fp32?"),
    "activations to nvme": (GOOD + "strategy: {offload: {activations: nvme}}\n", "5:35", "'nvme'", "none, host"),
    "context parallel of an odd length": (
        GOOD.replace("sequence_length: 128", "sequence_length: 126") + "strategy: {context_parallel_degree: 2}\n",
        "5:37", "it cuts a sequence into 4 chunks, which sequence_length 126 does not fill evenly", "such as 128",
    ),
    "context parallel of packed rows": (
        GOOD + "task: sft\nstrategy: {context_parallel_degree: 2}\n",
        "6:37", "task sft packs several samples into a row, which is not split", "`context_parallel_degree: 1`",
    ),
    "duration": (GOOD + "targets: {for: 10 minutes}\n", "5:16", "'10 minutes'; it is not a duration", "as in 10m"),
    "interval": (GOOD + "checkpoint: {every: 0}\n", "5:21", "is 0; it is no interval", "(500), a duration (10m), or auto"),
    "no files": (GOOD + "data: {train: []}\n", "5:15", "`data.train` is empty", "as in `train: [corpus/*.txt]`"),
    "number as file": (GOOD + "data: {train: [a, 1]}\n", "5:19", "`data.train[1]` is 1, not text", "quotes: '1'"),
    "too few": (GOOD + "training: {optimizer: {betas: [0.9]}}\n", "5:31", "holds too few values", "[0.9, 0.95]"),
    "too many": (GOOD + "training: {optimizer: {betas: [0, 0, 0]}}\n", "5:31", "holds too many", "[0.9, 0.95]"),
    "beta of one": (GOOD + "training: {optimizer: {betas: [0, 1.0]}}\n", "5:35", "it must be below 1", "below 1"),
    "truth as fraction": (
        GOOD + "data: {train: [a], validation: true}\n", "5:32", "is true, not a number", "as in `validation: 0.005`",
    ),
    # names of models and clusters
    "unknown model": (with_model("opt-125"), "3:8", "model 'opt-125' is not in the catalog", "did you mean opt-125m"),
    "two models": (with_model("{name: opt-125m, family: opt}"), "3:1", "what it is in 2 ways", "keep one of them"),
    "no model": (with_model("{dropout: 0.1}"), "3:1", "`model` names no model", "model: opt-1.3b"),
    "half a shape": (with_model("{family: opt, num_layers: 2}"), "3:1", "a shape without `hidden_size`", "`num_heads:`"),
    "heads and width": (
        with_model("{family: opt, num_layers: 2, hidden_size: 10, num_heads: 3}"), "3:65", "does not divide by", "2 heads",
    ),
    "key-value heads": (
        with_model("{family: llama, num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: 3}"),
        "3:84", "num_heads 4 does not divide", "2 key/value heads",
    ),
    "no such folder": (with_model("{path: nowhere}"), "3:15", "config.json cannot be read", "a folder with a config.json"),
    "weights of nothing": (
        with_model("{name: opt-125m, initialize: weights}"), "3:37", "there are no weights", "`initialize: random`",
    ),
    "unknown cluster": (GOOD + "cluster: a100-80g-8x8\n", "5:10", "unknown GPU 'a100-80g'", "did you mean a100-80gb?"),
    "a count without nodes": (
        GOOD + "cluster: a100-40gb-8\n", "5:10", "a number of GPUs without nodes", "did you mean a100-40gb-1x8?",
    ),
    "a large count without nodes": (GOOD + "cluster: h100-80gb-64\n", "5:10", "without nodes", "mean h100-80gb-8x8?"),
    "no cluster file": (GOOD + "cluster: no.yaml\n", "5:10", "cannot read the cluster file", "a path that exists"),
    "unknown GPU": (GOOD + "cluster: {gpu: a100-80g}\n", "5:16", "unknown GPU 'a100-80g'", "did you mean a100-80gb?"),
    "two rates": (
        GOOD + "cluster: {gpu: t4, inter_node_gbps: 1, inter_node_measured_gbps: 2}\n",
        "5:66", "both a line rate and a measured rate", "keep `inter_node_gbps`",
    ),
    "NVLink on a T4": (GOOD + "cluster: {gpu: t4, intra_node: nvlink}\n", "5:1", "t4 has no NVLink", "intra_node: pcie"),
    # combinations
    "two lengths": (GOOD + "training: {steps: 1, tokens: 3e9}\n", "5:30", "both `steps` and `tokens`", "keep one"),
    "bf16 on a V100": (
        GOOD + "cluster: v100-16gb\ntraining: {precision: bf16}\n", "6:23", "v100-16gb has no units for", "`precision: fp16`",
    ),
    "bf16 by default on a V100": (GOOD + "cluster: v100-16gb\n", "5:10", "where the job does not say it", "precision: fp16"),
    "longer than the positions": (GOOD.replace("128}", "4096}"), "4:48", "positions for 2048 tokens", "sequence_length: 2048"),
    "heads over GPUs": (
        GOOD + "strategy: {tensor_parallel_degree: 5}\n", "5:36", "does not divide the 12 heads", "one of 1, 2, 3, 4, 6, 12,",
    ),
    "more stages than layers": (
        GOOD + "strategy: {pipeline_parallel_degree: 8, num_virtual_stages: 2}\n",
        "5:38", "cuts 12 layers into 16 pipeline stages", "at 12 or less",
    ),
    "more layers than there are": (
        GOOD + "strategy: {num_checkpointed_layers_per_stage: 13}\n", "5:47", "the model has 12 layers", "delete the line",
    ),
    "more GPUs than there are": (
        GOOD + "cluster: a100-80gb-1x8\nstrategy: {tensor_parallel_degree: 4, data_parallel_degree: 5}\n",
        "6:61", "needs 20 GPUs (data_parallel_degree 5 x tensor_parallel_degree 4), but a100-80gb-1x8 has 8", "at most 8",
    ),
    "mesh order": (GOOD + "strategy: {mesh_order: [data, tensor]}\n", "5:24", "each axis once", "[pipeline, data,"),
    "ZeRO group": (
        GOOD + "strategy: {data_parallel_degree: 6, zero_group_size: 4}\n",
        "5:54", "does not divide data_parallel_degree 6", "`zero_group_size: 3`",
    ),
    "batch not read": (
        GOOD + "strategy: {data_parallel_degree: 2, micro_batch_size: 1, gradient_accumulation_steps: 3}\n",
        "5:87", "= 6 sequences a step, fewer than global_batch_size 8", "`gradient_accumulation_steps: 4`",
    ),
    "empty micro batches": (
        GOOD + "strategy: {data_parallel_degree: 2, micro_batch_size: 1, gradient_accumulation_steps: 5}\n",
        "5:87", "whole micro batches would be empty", "`gradient_accumulation_steps: 4`",
    ),
    "more replicas than GPUs": (
        GOOD + "cluster: a100-80gb-1x4\nstrategy: {micro_batch_size: 1, gradient_accumulation_steps: 1}\n",
        "6:62", "needs 8 replicas on 8 GPUs, and there are 4", "delete `gradient_accumulation_steps`",
    ),
    "bytes without rows": (
        with_model("{family: opt, num_layers: 2, hidden_size: 8, num_heads: 2, vocab_size: 256}")
        + "data: {train: [a.txt], tokenizer: byte}\n",
        "5:35", "257 tokens, but the model's vocabulary has 256", "vocab_size 264 or more",
    ),
    "bytes by default without rows": (
        with_model("{family: opt, num_layers: 2, hidden_size: 8, num_heads: 2, vocab_size: 256}") + "data: {train: [a.txt]}\n",
        "5:1", "byte where the job does not say it, 257 tokens", "vocab_size 264 or more",
    ),
    "pieces without rows": (
        GOOD + "data: {train: [a.txt], tokenizer: {bpe: 60000}}\n",
        "5:41", "learns 60000 tokens, but the model's vocabulary has 50272", "or a tokenizer of 50272 tokens or fewer",
    ),
    "too few pieces": (GOOD + "data: {train: [a], tokenizer: {bpe: 100}}\n", "5:37", "begins with the 256 bytes", "`bpe: 257`"),
    "validation that is trained on": (
        GOOD + "data: {train: [a.txt], validation: [a.txt]}\n", "5:36", "a.txt, which is trained on", "name other files",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "place", "message", "fix"), ONE_FAULT.values(), ids=ONE_FAULT)
def test_a_fault_says_where_what_and_how_to_fix_it(tmp_path, text, place, message, fix):
    (error,) = faults(tmp_path, text)
    assert f"{error['line']}:{error['column']}" == place
    assert message in error["message"]
    assert fix in error["fix"]


def test_a_folder_that_is_named_like_a_catalog_model_is_suggested_as_a_path(tmp_path):
    (tmp_path / "hf").mkdir()
    (error,) = faults(tmp_path, with_model("hf"))
    assert "path" not in error["fix"]
    (tmp_path / "hf" / "config.json").write_text("{}")
    (error,) = faults(tmp_path, with_model("hf"))
    assert error["fix"] == "hf is a folder with a config.json: write `model: {path: hf}`"


def test_all_faults_of_a_file_are_shown_at_once_in_their_order(tmp_path):
    text = """version: 1
name: B
model: {family: opt, num_layers: 2, hidden_size: 10, num_heads: 3, foo: 1}
batch: {global_batch_size: 8, sequence_length: 128, x: 1}
cluster: a100-80gb-1x2
strategy: {zero_stage: 9, data_parallel_degree: 4}
training: {steps: 1, tokens: 1, precisn: fp8}
name: c
"""
    places = [f"{error['line']}:{error['column']}" for error in faults(tmp_path, text)]
    assert places == ["2:7", "3:65", "3:68", "4:53", "6:24", "6:49", "7:30", "7:33", "8:1"]


def test_what_only_follows_from_an_unreadable_key_is_not_shown(tmp_path):
    (error,) = faults(tmp_path, with_model("{nmae: opt-125m}"))
    assert "did you mean `name`?" in error["fix"]


@pytest.mark.parametrize(
    ("make", "message", "fix"),
    [
        (lambda file: None, "there is no such job", "did you mean {folder}/job.yml?"),
        (lambda file: file.mkdir(), "this is a folder", "name a YAML file in it"),
        (lambda file: file.write_bytes(b"#" * (MAX_BYTES + 1)), "larger than 256 KiB", "not the data that it points to"),
        (lambda file: os.truncate(os.open(file, os.O_CREAT | os.O_RDWR), 100_000_000), "larger than 256 KiB", "not the data"),
    ],
    ids=["missing", "folder", "too large", "100 MB"],
)  # fmt: skip
def test_what_is_no_job_file_is_refused_by_name(tmp_path, make, message, fix):
    file = tmp_path / "job.yaml"
    (tmp_path / "job.yml").write_text(GOOD)
    make(file)
    with pytest.raises(SpecError, match=message) as caught:
        load_job(file)
    (error,) = caught.value.errors
    assert error["file"] == str(file)
    assert fix.format(folder=tmp_path) in error["fix"]


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    file = tmp_path / "job.yaml"
    file.write_text(GOOD)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SpecError, match="cannot be read: Permission denied"):
        load_job(file)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            {"version": 1, "name": "a", "model": "opt-125m", "batch": {"global_batch_size": 8}},
            "`batch.sequence_length` is",
        ),
        ({1: 2}, "unknown key `1`"),
        (5, "a job is a mapping, not 5"),
    ],
)
def test_a_mapping_has_dotted_keys_in_place_of_lines(mapping, message):
    with pytest.raises(SpecError) as caught:
        parse_job(mapping)
    error = next(error for error in caught.value.errors if message in error["message"])
    assert (error["file"], error["line"], error["column"]) == ("<mapping>", None, None)
    assert str(caught.value).startswith("<mapping>: ")
