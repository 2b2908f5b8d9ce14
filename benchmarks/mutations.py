"""Checkpoints and tokenizer folders that someone else has altered: is nothing of them run, and is each answered in a sentence?

    python -m benchmarks.mutations [--count 1000] [--seed 0]

Half of the mutants are checkpoints, each with a manifest that vouches for it, so that sums do not stop it: bits, cuts, other
values in manifest and index, pickles that call something, archives that unpack to much. Each is converted, sampled from and
resumed. The others are tokenizer folders, loaded for training and for sampling. A mutant passes where nothing in it was called
or unpickled, no exception left the command, and its answer came soon and within memory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.mutants import CHECKPOINT_MUTANTS, mutate_tokenizer
from orchestrator.cli import main as shardwise
from orchestrator.models.architecture import make_architecture
from orchestrator.models.decoder import Decoder, initial_weights
from orchestrator.spec import parse_job
from orchestrator.training import checkpoint
from orchestrator.training.checkpoint import CheckpointInfo
from orchestrator.training.data import DataError
from orchestrator.training.manifest import MANIFEST
from orchestrator.training.prepare import prepare_job
from orchestrator.training.resume import resumable
from orchestrator.training.tokenizer import keep_tokenizer, kept_tokenizer, load_tokenizer

SHAPE = {
    "family": "opt",
    "num_layers": 1,
    "hidden_size": 8,
    "num_heads": 2,
    "ffn_size": 16,
    "vocab_size": 280,
    "max_position": 16,
}
SOON_S = 20.0
MOST_MORE_BYTES = 1 << 30
"""How much the process may grow over all mutants."""
WATCHED = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
)
"""Events of Python's audit that no reading of ours causes: a program started, a class looked up for a pickle."""


class Caught:
    """What the audit saw while a mutant was read."""

    def __init__(self) -> None:
        self.active, self.events = False, list[str]()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.active and event in WATCHED:
            self.events.append(f"{event} {arguments!r}"[:200])


# The originals --------------------------------------------------------------------------------------------------------


def make_run(directory: Path) -> Path:
    """A run's folder with one checkpoint and a tokenizer, as training leaves it."""
    (directory / "corpus.txt").write_text("a text to train on, with words that come again. " * 300)
    mapping = {
        "version": 1,
        "name": "tiny",
        "model": SHAPE,
        "data": {"train": ["corpus.txt"], "tokenizer": {"bpe": 280}},
        "batch": {"global_batch_size": 2, "sequence_length": 16},
        "training": {"steps": 3},
        "cluster": "a100-80gb",
    }
    index = prepare_job(parse_job(mapping, directory=directory))
    run = directory / "runs" / "tiny"
    keep_tokenizer(index, run)
    arch = make_architecture(**SHAPE)
    info = CheckpointInfo(
        job=mapping,
        architecture=asdict(arch),
        num_steps=3,
        strategy={},
        data={"tokenizer": index.tokenizer["fingerprint"], "tokens": index.fingerprint},
    )
    with one_rank():
        checkpoint.save(session_of(arch), run / "checkpoints", step=3, info=info, background=False).wait()
    return run


def session_of(arch: Any) -> Any:
    """The weights alone, in place of an engine's session."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Decoder(arch).named_parameters()}
    read = initial_weights(arch, 1)
    state = {f"model.{name}": read(name, shape).float() for name, shape in shapes.items()}
    return SimpleNamespace(state_dict=lambda: state, load_state_dict=lambda new: None)


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# Readers --------------------------------------------------------------------------------------------------------------


def verb(*arguments: str) -> str:
    """What a command answered. AssertionError where that is a fault of ours."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = shardwise(list(arguments))
    text = out.getvalue()
    if "Traceback" in text or "fault of shardwise" in text:
        raise AssertionError(f"{arguments[0]}: {text.strip()[-300:]}")
    return f"{arguments[0]} {code}"


def resume(path: Path, mapping: dict[str, Any], info: CheckpointInfo, session: Any) -> str:
    """As a worker does: manifest, sums, tensors."""
    job = parse_job(mapping, directory=path.parents[3])
    with one_rank():
        try:
            ref = checkpoint.verify_together(resumable(path, job, info))
            checkpoint.load(session, ref)
        except ValueError:  # a failed outcome with the cause in a sentence
            return "resume refused"
    return "resume done"


def load_both(given: Path, run: Path) -> str:
    """A tokenizer folder for training, and the one that a run kept, for sampling."""
    answers = []
    for load in (lambda: load_tokenizer(str(given), Path("/")), lambda: kept_tokenizer(run)):
        try:
            tokenizer = load()
            tokenizer.decode(tokenizer.encode("words that come again, \u00e9\U0001f600"))
            answers.append("loads")
        except DataError:
            answers.append("refused")
    return "tokenizers " + ", ".join(answers)


# The table -------------------------------------------------------------------------------------------------------------


def play(count: int, seed: int, directory: Path) -> tuple[Counter[str], list[str]]:
    """(answers, faults) of `count` mutants of each kind."""
    run = make_run(directory)
    original = run / "checkpoints" / "step-00000003"
    manifest = json.loads((original / MANIFEST).read_text())
    info = CheckpointInfo(**{key: manifest[key] for key in ("job", "architecture", "num_steps", "strategy", "data")})
    session = session_of(make_architecture(**SHAPE))
    mutant, sprung = directory / "mutant", directory / "sprung"
    answers: Counter[str] = Counter()
    faults: list[str] = []
    caught = Caught()

    def read(label: str, readers: list[Callable[[], str]]) -> None:
        started = time.monotonic()
        for reader in readers:
            caught.active = True
            try:
                with alarm(SOON_S):
                    answers[reader()] += 1
            except (SpentError, AssertionError) as error:
                faults.append(f"{label}: {error}")
            except BaseException as error:
                faults.append(f"{label}: {type(error).__name__}: {error}"[:400])
            caught.active = False
        if sprung.exists() or caught.events:
            faults.append(f"{label}: something was run: {caught.events[:2]}")
            shutil.rmtree(sprung, ignore_errors=True)
            caught.events.clear()
        if (took := time.monotonic() - started) > SOON_S:
            faults.append(f"{label}: took {took:.0f} s")

    for number in range(count):
        rng = random.Random(seed * 1_000_003 + number)
        shutil.rmtree(mutant, ignore_errors=True)
        kind = CHECKPOINT_MUTANTS[number % len(CHECKPOINT_MUTANTS)]
        path = mutant / "runs" / "tiny" / "checkpoints" / original.name
        shutil.copytree(run, path.parent.parent)
        kind(path, rng, sprung)
        readers: list[Callable[[], str]] = [
            partial(verb, "convert", str(path), str(mutant / "hf")),
            partial(verb, "generate", str(path), "--max-tokens", "2", "--prompt", "a"),
            partial(resume, path, manifest["job"], info, session),
        ]
        read(f"checkpoint {number} ({kind.__name__})", readers)
    for number in range(count):
        rng = random.Random(seed * 1_000_003 + 500_000 + number)
        shutil.rmtree(mutant, ignore_errors=True)
        shutil.copytree(run, mutant / "run")
        given = mutant / "given"
        shutil.copytree(run / "tokenizer", given)
        (given / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
        if number % 3 == 0:
            inner = json.loads((given / "tokenizer.json").read_text())["model"]
            (given / "vocab.json").write_text(json.dumps(inner["vocab"]))
            merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in inner["merges"]]
            (given / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
            (given / "tokenizer.json").unlink()
        mutate_tokenizer(given, rng)
        mutate_tokenizer(mutant / "run" / "tokenizer", rng)
        readers = [
            partial(load_both, given, mutant / "run"),
            partial(verb, "convert", str(mutant / "run"), str(mutant / "hf")),
            partial(verb, "generate", str(mutant / "run"), "--max-tokens", "2", "--prompt", "a"),
        ]
        read(f"tokenizer {number}", readers)
    return answers, faults


class SpentError(BaseException):
    """A mutant took too long; no Exception, so that no handler takes it for its own."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise SpentError(f"no answer within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        answers, faults = play(given.count, given.seed, Path(folder))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > MOST_MORE_BYTES:
        faults.append(f"the process grew by {grown / 2**20:.0f} MiB")
    for answer, number in sorted(answers.items()):
        print(f"{number:6}  {answer}")
    print("\n".join(faults[:20]))
    seconds = time.monotonic() - started
    print(
        f"{2 * given.count} mutants, seed {given.seed}, {len(faults)} faults, {grown / 2**20:.0f} MiB more, {seconds:.0f} s"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
