"""What the pages under docs/ show is what the commands print, and every job in them is planned.

A `yaml` block is a job, or a part of one that is laid over a small job; one that begins with `# NAME.yaml` is also a file that
the page's commands find. A `console` block is run line by line, in a folder with a corpus/ and a small Hugging Face folder hf/;
`...` in its output stands for any text. ENDPOINT is answered by a small server of the tests.
Pages that train (`shardwise run` to its end) are tried by `make docs`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clusters.inventory.local import nvml_devices
from orchestrator.models.decoder import Decoder
from orchestrator.planner.plan import plan
from orchestrator.spec import parse_job
from orchestrator.spec.chain import Chain, load
from orchestrator.spec.hugging_face import read_architecture
from orchestrator.spec.source import parse_document
from tests.completion_server import serving
from tests.speakers import kept_run

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path.relative_to(DOCS) for path in DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```(?P<kind>yaml|console)\n(?P<text>.*?)^```", re.DOTALL | re.MULTILINE)
SMALL: dict[str, Any] = {
    "version": 1,
    "name": "small",
    "model": "opt-125m",
    "batch": {"global_batch_size": 64, "sequence_length": 128},
    "cluster": "a100-80gb-1x8",
}


def blocks(page: Path, kind: str) -> list[str]:
    return [block["text"] for block in BLOCK.finditer((DOCS / page).read_text()) if block["kind"] == kind]


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """(command, output) of the page, in order."""
    for text in blocks(page, "console"):
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield command, output


def trains(page: Path) -> bool:
    """A run of the page goes to its end."""
    return any(command.startswith("shardwise run") and not out.startswith("Error") for command, out in commands(page))


ENDPOINT = "http://127.0.0.1:8000/v1"
ADDRESS = ".endpoint"
"""File of a workspace that holds the address of the server which stands for ENDPOINT."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with text and a Hugging Face folder, as a reader of the pages has them."""
    import torch
    from tokenizers import ByteLevelBPETokenizer

    from orchestrator.models.architecture import make_architecture
    from orchestrator.models.decoder import initial_weights
    from orchestrator.models.weights import write_folder

    folder = tmp_path_factory.mktemp("docs")
    (folder / "corpus").mkdir()
    for part in range(4):
        lines = (f"{n} squared is {n * n}, and cubed it is {n**3}." for n in range(part * 1000, part * 1000 + 1000))
        (folder / "corpus" / f"part-{part}.txt").write_text("\n".join(lines))
    shape = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 512, "max_position": 128}
    arch = make_architecture(family="opt", **shape)
    value = initial_weights(arch, 1)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Decoder(arch).named_parameters()}
    write_folder(folder / "hf", arch, ((name, value(name, size).float()) for name, size in shapes.items()))
    tokenizer = ByteLevelBPETokenizer()
    files = [str(path) for path in sorted((folder / "corpus").iterdir())]
    tokenizer.train(files, vocab_size=512, special_tokens=["</s>"], show_progress=False)
    tokenizer.save(str(folder / "hf" / "tokenizer.json"))
    (folder / "hf" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "examples").mkdir()
    seeds = "self_instruct_seeds.jsonl"
    (folder / "examples" / seeds).write_bytes((DOCS.parent / "examples" / seeds).read_bytes())
    with serving() as served:
        (folder / ADDRESS).write_text(served.url)
        yield folder


def printed(command: str, folder: Path, last_code: int) -> tuple[str, int]:
    """What a person with 88 columns sees, and the exit code."""
    if command == "echo $?":
        return f"{last_code}\n", 0
    name, *arguments = shlex.split(command.replace(ENDPOINT, (folder / ADDRESS).read_text()))
    assert name == "shardwise", f"a page runs {name}; only shardwise and `echo $?` are tried here"
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "88", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.stdout + done.stderr, done.returncode


def write_jobs(page: Path, folder: Path) -> None:
    for text in blocks(page, "yaml"):
        if named := re.match(r"# (\S+\.yaml)\n", text):
            (folder / named[1]).write_text(text)


def as_pattern(output: str) -> re.Pattern[str]:
    """A line `...` stands for any lines, `...` in a line for any part of it."""
    any_lines, any_text = r"(?:[^\n]*\n)*?", r"[^\n]*"
    lines = (
        any_lines if line == "..." else any_text.join(map(re.escape, line.split("..."))) + "\n"
        for line in output.splitlines()
    )
    return re.compile("".join(lines))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=str)
def test_every_job_in_the_pages_is_planned(page: Path, workspace: Path) -> None:
    for text in blocks(page, "yaml"):
        for named in set(re.findall(r"checkpoint: runs/(sft|reward)", text)):
            if not (workspace / "runs" / named).exists():
                model = Decoder(read_architecture(workspace / "hf"), values=named == "reward")
                kept_run(workspace / "runs" / named, model, job={"task": named})
        mapping = parse_document(text).value
        if "chain" in mapping:
            (workspace / "chain.yaml").write_text(text)
            chain = load(workspace / "chain.yaml", directory=workspace / "runs")
            (workspace / "chain.yaml").unlink()
            jobs = chain.links if isinstance(chain, Chain) else ()
        else:
            jobs = (parse_job(mapping if "version" in mapping else SMALL | mapping, directory=workspace),)
        assert jobs, text
        for job in jobs:
            assert plan(job, top=0).strategy.num_gpus >= 1, text


def try_page(page: Path, folder: Path) -> None:
    write_jobs(page, folder)
    code = 0
    for command, output in commands(page):
        got, code = printed(command, folder, code)
        assert as_pattern(output).fullmatch(got), f"{page}: `{command}` prints\n{got}"


@pytest.mark.parametrize("page", [page for page in PAGES if [*commands(page)] and not trains(page)], ids=str)
def test_console_blocks_show_what_the_commands_print(page: Path, workspace: Path) -> None:
    if nvml_devices():
        pytest.skip("the pages show what a machine without GPUs prints")
    try_page(page, workspace)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("page", [page for page in PAGES if trains(page)], ids=str)
def test_the_pages_that_train_show_what_the_commands_print(page: Path, workspace: Path) -> None:
    if nvml_devices():
        pytest.skip("the pages show what a machine without GPUs prints")
    try_page(page, workspace)
