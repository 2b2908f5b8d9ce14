"""A chain of jobs (chatgpt-mini): how much PPO raises the reward of held-out prompts over several seeds, and whether a killed
chain is that of an undisturbed one.

    python -m benchmarks.recipe [FILE] [--directory FOLDER] [--seeds 1,2,3]     the chain, then its ppo link with each seed
    python -m benchmarks.recipe [FILE] [--directory FOLDER] --kills             the chain twice, once killed in every link

In each link a worker and the `run` process are killed by SIGKILL at random steps; then `run` is called again where it must be.
Every loss and every number of a step that was ever reported, those done again included, is compared bit for bit.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.chaos import last_step, num_reports, victims
from orchestrator.control.processes import end_marked
from orchestrator.spec.chain import Chain, load
from orchestrator.telemetry.records import Event, StepReport, read

FILE = Path(__file__).parents[1] / "examples" / "chatgpt-mini.yaml"
LIMIT_S = 3600.0
TARGETS = ("worker", "run")


def start(file: Path, directory: Path, log: Path) -> psutil.Popen:
    with log.open("a") as out:
        return psutil.Popen(
            [sys.executable, "-m", "orchestrator.cli", "run", str(file), "--directory", str(directory), "--json"],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def read_chain(file: Path, directory: Path) -> Chain:
    chain = load(file, directory=directory)
    if not isinstance(chain, Chain):
        raise SystemExit(f"{file} is no chain")
    return chain


def finish(run: psutil.Popen, chain: Chain, log: Path) -> None:
    """Waits for the end of a chain; nothing of it is left behind."""
    try:
        if run.wait(timeout=LIMIT_S) != 0:
            raise RuntimeError(f"the chain ended with exit code {run.returncode}; see {log}")
    finally:
        if run.poll() is None:
            run.kill()
        for job in chain.links:
            end_marked(str(chain.runs / job.name))


def told(chain: Chain) -> dict[tuple[str, int], list[tuple[float, dict[str, float]]]]:
    """(link, step) -> every report of it, as often as it was done."""
    found: dict[tuple[str, int], list[tuple[float, dict[str, float]]]] = {}
    for job in chain.links:
        for report in read(chain.runs / job.name / "metrics.jsonl", StepReport):
            found.setdefault((job.name, report.step), []).append((report.loss, dict(report.metrics)))
    return found


def differences(calm: Chain, wild: Chain) -> list[str]:
    """What is not bit for bit as in the undisturbed chain."""
    wanted, found = told(calm), told(wild)
    wrong = [f"{link} step {step} is missing" for link, step in wanted.keys() - found.keys()]
    for (link, step), reports in found.items():
        (expected,) = wanted.get((link, step), [(0.0, {})])
        wrong += [f"{link} step {step}: {report} instead of {expected}" for report in reports if report != expected]
    return sorted(wrong)


def disturb(file: Path, chain: Chain, directory: Path, log: Path, rng: random.Random) -> list[tuple[str, str, int]]:
    """Runs the chain to its end through a kill of each target in each link; (link, target, last step on record) of each."""
    run, kills = start(file, directory, log), []
    try:
        for job in chain.links:
            folder = chain.runs / job.name
            assert job.num_steps is not None
            for target in rng.sample(TARGETS, len(TARGETS)):
                enough = num_reports(folder) + rng.randint(1, max(1, job.num_steps // 4))
                if not struck(run, folder, target, enough, rng):
                    raise RuntimeError(f"link {job.name} was over before its {target} could be killed; see {log}")
                kills.append((job.name, target, last_step(folder)))
                if target == "run":
                    run.wait(timeout=60)
                    run = start(file, directory, log)
    except BaseException:
        run.kill()
        raise
    finish(run, chain, log)
    return kills


def struck(run: psutil.Popen, folder: Path, target: str, enough: int, rng: random.Random) -> bool:
    """Waits for so many reports and kills; False where the run or its patience is over before."""
    deadline = time.monotonic() + LIMIT_S
    while run.poll() is None and time.monotonic() < deadline:
        if num_reports(folder) >= enough and (found := victims(target, run, folder, rng)):
            for process in found:
                process.kill()
            return True
        time.sleep(0.02)
    return False


def evaluated(folder: Path) -> dict[str, float]:
    """What the last evaluation of a run told."""
    found = [event.details["metrics"] for event in read(folder / "events.jsonl", Event) if event.kind == "evaluation"]
    return dict(found[-1])


def seeds(file: Path, chain: Chain, directory: Path, log: Path, wanted: list[int]) -> list[dict[str, float]]:
    """The ppo link once more with each seed, on the same actor and reward model."""
    link = next(job for job in chain.links if job.task == "ppo")
    rows = []
    for seed in wanted:
        mapping: dict[str, Any] = link.to_mapping()
        mapping["name"] = f"{link.name}-{seed}"
        mapping["training"]["seed"] = seed
        for word in ("train", "validation"):
            if isinstance(paths := mapping["data"].get(word), list):
                mapping["data"][word] = [str(file.resolve().parent / path) for path in paths]
        copy = directory / f"{mapping['name']}.yaml"
        copy.write_text(yaml.safe_dump(mapping), encoding="utf-8")
        run = start(copy, chain.runs, log)
        if run.wait(timeout=LIMIT_S) != 0:
            raise RuntimeError(f"seed {seed} ended with exit code {run.returncode}; see {log}")
        row = {"seed": float(seed), **evaluated(chain.runs / mapping["name"])}
        rows.append(row)
        print(
            f"seed {seed}: reward {row['reward']:.3f}, of the reference {row['reference_reward']:.3f}, raised by "
            f"{row['reward'] - row['reference_reward']:.3f}; win rate {row['win_rate']:.3f}; KL {row['kl']:.2f} nats",
            flush=True,
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=FILE)
    parser.add_argument("--directory", type=Path, help="folder of the runs; one that is there is gone on with")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--kills", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    args = parser.parse_args(arguments)
    directory = args.directory or Path(tempfile.mkdtemp(prefix="recipe-"))
    directory.mkdir(parents=True, exist_ok=True)
    log, began = directory / "log", time.monotonic()
    chain = read_chain(args.file, directory)
    finish(start(args.file, directory, log), chain, log)
    print(f"{chain.name}: {time.monotonic() - began:.0f} s, runs in {chain.runs}", flush=True)
    for job in chain.links:
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in evaluated(chain.runs / job.name).items())
        print(f"  {job.name}: {numbers or 'a loss alone'}", flush=True)
    if args.kills:
        wild = read_chain(args.file, directory / "killed")
        kills = disturb(args.file, wild, directory / "killed", log, random.Random(args.seed))
        wrong = differences(chain, wild)
        print("\n".join([*(f"killed {target} of {link} at step {step}" for link, target, step in kills), *wrong]))
        print(f"{len(kills)} kills, {len(wrong)} differences")
        return 1 if wrong else 0
    raised = [row["reward"] - row["reference_reward"] for row in seeds(
        args.file, chain, directory, log, [int(seed) for seed in args.seeds.split(",")]
    )]  # fmt: skip
    spread = statistics.stdev(raised) if len(raised) > 1 else float("nan")
    print(f"raised by {statistics.mean(raised):.3f} on average, standard deviation over seeds {spread:.3f}")
    return 0 if statistics.mean(raised) > 2 * spread else 1


if __name__ == "__main__":
    sys.exit(main())
