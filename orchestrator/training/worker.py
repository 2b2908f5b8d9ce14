"""One worker: joins the others, builds the model under the plan's strategy, resumes, trains.

The same code runs in a Ray actor, under torchrun, in a plain process and in tests: `train` takes an Assignment and two
functions, and knows nothing of who started it. As a program:

    python -m orchestrator.training.worker ASSIGNMENT.json     # rank and rendezvous from the environment, if it has them
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as distributed_c10d
from torch._C._distributed_c10d import HashStore, Store, TCPStore

from orchestrator.models.workloads import workload
from orchestrator.spec import parse_job
from orchestrator.spec.job import Job
from orchestrator.spec.values import Duration
from orchestrator.telemetry.journal import Journal
from orchestrator.telemetry.records import Event, StepReport
from orchestrator.training import checkpoint
from orchestrator.training.adapters import told_of
from orchestrator.training.assignment import Assignment, Outcome
from orchestrator.training.batches import Batches, Share
from orchestrator.training.blanks import open_blanks
from orchestrator.training.build import build
from orchestrator.training.checkpoint import CheckpointInfo, Saver
from orchestrator.training.data import DataIndex, Dataset, open_datasets
from orchestrator.training.first_weights import check_tokenizers, marks, said_by_weights
from orchestrator.training.loop import Groups, Loop, Reporter, Settings
from orchestrator.training.network import interface_towards
from orchestrator.training.ppo.loop import PpoLoop, learner_of
from orchestrator.training.pulse import Pulse
from orchestrator.training.rank_log import LOG, Logged
from orchestrator.training.reference import add_references
from orchestrator.training.resume import newest_whole, rate_of, resumable, tell_of_resume
from orchestrator.training.rows import open_rows
from orchestrator.training.schedule import CheckpointEvery
from orchestrator.training.tokenizer import check_vocabulary, keep_tokenizer


def train(
    assignment: Assignment,
    *,
    report: Callable[[StepReport | Event], None],
    should_stop: Callable[[], str | None],
    sync: Callable[[], object] = lambda: None,
    ends_with_process: bool = False,
    listener: socket.socket | None = None,
    pulse: Pulse | None = None,
) -> Outcome:
    """Trains one rank's part of a run to its end, a stop or a failure; collective over the world.

    A mistake of the user's is a failed Outcome with the cause in a sentence; a crash raises.

    Args:
        report: called on rank 0 alone, from this thread, once a step and for every event.
        should_stop: asked on every rank after every step; a cause, from any rank, is "checkpoint and stop".
        sync: called on rank 0 before a checkpoint is written: what was reported is to be on the disk before it.
        ends_with_process: the caller ends this process when it has told the result. The groups are left as they are then:
            taking them down may hang or abort the process, and what it has to tell would be lost.
        listener: of rank 0, a socket that is bound to the rendezvous already; None binds one.
        pulse: where this thread says what it is doing, for others to look at.
    """
    clock = Phases()
    pulse = pulse or Pulse()
    torch.set_num_threads(assignment.num_threads)
    job = parse_job(assignment.job, directory=Path(assignment.job_directory))
    device = torch.device(assignment.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    LOG.info("%s: process %d on %s, threads: %d", assignment.tag, os.getpid(), device, assignment.num_threads)
    join(assignment, device, listener)
    clock.lap("join_s")
    loop: Loop | None = None
    returned = False
    try:
        pulse.enter("setup")
        world = Groups()
        if world.rank == 0:
            reporter = Reporter(Logged(report), sync, pulse)
        else:
            reporter = Reporter(Logged(lambda record: None), pulse=pulse)
        try:
            loop = set_up(assignment, job, device, world, clock, reporter, should_stop)
        except (
            ValueError
        ) as error:  # the user's: a strategy that is not built, a checkpoint that is refused, data amiss
            reporter.event("refused", 0, str(error))
            returned = True
            return Outcome(kind="failed", step=0, cause=str(error), checkpoint=assignment.resume_from)
        outcome = loop.run()
        LOG.info("%s at step %d%s", outcome.kind, outcome.step, f": {outcome.cause}" if outcome.cause else "")
        returned = True
        return outcome
    finally:
        if loop is not None and (returned or not ends_with_process):
            loop.close()
        if not ends_with_process:
            dist.destroy_process_group()


def set_up(
    assignment: Assignment,
    job: Job,
    device: torch.device,
    world: Groups,
    clock: Phases,
    reporter: Reporter,
    should_stop: Callable[[], str | None],
) -> Loop:
    """Data, model, checkpoint: everything before the first step. ValueError where the user has something to mend."""
    train_set, validation = datasets_of(assignment, job)
    check_vocabulary(train_set.index.vocab_size, job.architecture.vocab_size)
    check_tokenizers(job, train_set.index)
    info = info_of(assignment, job, train_set.index)
    ref = None if assignment.resume_from is None else resumable(Path(assignment.resume_from), job, info)
    settings = settings_of(assignment, job, info)
    if world.rank == 0:
        keep_words(assignment, job, train_set.index)
        checkpoint.sweep(settings.checkpoint_directory)
    clock.lap("data_s")
    share = share_of(assignment, device)
    if job.task == "ppo":
        session: Any = learner_of(assignment, job, device, share, train_set)
    else:
        session = build(assignment, job, device)
    if job.task == "dpo":
        copies = assignment.strategy.tensor_parallel_degree
        add_references(session, (train_set, validation), share, Path(assignment.run_directory), copies=copies)
    clock.lap("build_s")
    done = 0
    ref = None if ref is None else newest_whole(ref, job, info, world, reporter)
    if ref is not None:
        checkpoint.load(session, ref, group=world.checkpoints)
        done = ref.step
        tell_of_resume(ref, settings, job, reporter)
    clock.lap("load_s")
    batches = Batches(
        train_set,
        share,
        seed=job.training.seed,
        global_batch_size=job.batch.global_batch_size,
        first_step=done + 1,
    )
    reporter.event("worker_started", done, "the model stands and the first batch is read", **clock.laps)
    return (PpoLoop if job.task == "ppo" else Loop)(
        session,
        settings,
        batches=batches,
        validation=validation,
        share=share,
        world=world,
        reporter=reporter,
        should_stop=should_stop,
        saver=Saver(
            settings.checkpoint_directory,
            info,
            keep=settings.keep,
            resumed_from=ref,
            group=world.checkpoints,
            limits=assignment.limits,
        ),
        done=done,
        loaded_from=None if ref is None else str(ref.path),
    )


# Set-up --------------------------------------------------------------------------------------------------------------


def join(assignment: Assignment, device: torch.device, listener: socket.socket | None = None) -> None:
    """The torch process group of the whole world: gloo between CPUs, nccl between GPUs with gloo for what lies on the host."""
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    patience = timedelta(seconds=assignment.limits.collective_s)
    # A group that is made without a timeout, as a DeviceMesh makes its own, takes torch's 30 minutes, not the world's.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, patience)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun opened the rendezvous
        dist.init_process_group(backend, timeout=patience)
        return
    if assignment.master_address in ("127.0.0.1", "localhost") and sys.platform == "linux":
        # A world on one machine is for that machine alone, whatever the environment says of others; nccl opens its first
        # connection like gloo, on an interface of its own choice.
        os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
    elif assignment.world_size > 1:  # several nodes: the others reach this one where it reaches rank 0
        name = interface_towards(assignment.master_address, assignment.master_port)
        os.environ.update(GLOO_SOCKET_IFNAME=name, NCCL_SOCKET_IFNAME=f"={name}")
        LOG.info("ranks talk through interface %s, rank 0 is at %s", name, assignment.master_address)
    store: Store = HashStore() if assignment.world_size == 1 else rendezvous(assignment, listener)
    dist.init_process_group(
        backend, store=store, rank=assignment.rank, world_size=assignment.world_size, timeout=patience
    )


def rendezvous(assignment: Assignment, listener: socket.socket | None) -> TCPStore:
    """The store through which the ranks find each other. It listens on the one address that they are told, not on all
    interfaces of the machine, as torch would by itself."""
    is_master = assignment.rank == 0
    if is_master and listener is None:
        listener = socket.create_server((assignment.master_address, assignment.master_port))
    return TCPStore(
        assignment.master_address,
        assignment.master_port,
        assignment.world_size,
        is_master=is_master,
        timeout=timedelta(seconds=assignment.limits.rendezvous_s),
        master_listen_fd=listener.detach() if is_master and listener is not None else None,
    )


def datasets_of(assignment: Assignment, job: Job) -> tuple[Dataset, Dataset | None]:
    """Return (train, validation): what was prepared, and where the model's family learns by filling blanks, rows with blanks."""
    folder, length = assignment.data_directory, job.batch.sequence_length
    if job.task != "pretrain":
        return open_rows(folder, length)
    if job.architecture.traits.blank_filling:
        return open_blanks(folder, length, job.architecture, job.training.seed)
    return open_datasets(folder, length)


def share_of(assignment: Assignment, device: torch.device) -> Share:
    strategy = assignment.strategy
    return Share(
        replica=strategy.degrees.coordinates(assignment.rank)["data"],
        num_replicas=strategy.data_parallel_degree,
        micro_batch_size=strategy.micro_batch_size,
        device=device,
    )


def info_of(assignment: Assignment, job: Job, index: DataIndex) -> CheckpointInfo:
    """Return what the checkpoints of this run say of it."""
    lora = told_of(job)
    weights = {"weights": str(lora["fingerprint"])} if lora is not None else marks(job)
    return CheckpointInfo(
        job=assignment.job,
        architecture=asdict(job.architecture),
        num_steps=length_of(job),
        strategy=asdict(assignment.strategy),
        data={"tokenizer": index.tokenizer["fingerprint"], "tokens": index.fingerprint} | weights,
        lora=lora,
    )


def keep_words(assignment: Assignment, job: Job, index: DataIndex) -> None:
    """Leave the tokenizer in the run folder, and what the weights that training starts from say of special tokens."""
    keep_tokenizer(index, Path(assignment.run_directory), said_by_weights(job.model, job.directory))


def settings_of(assignment: Assignment, job: Job, info: CheckpointInfo) -> Settings:
    every = job.checkpoint.every
    checkpoint_every = None
    if isinstance(every, Duration):
        checkpoint_every = CheckpointEvery(seconds=float(every))
    elif every != "auto":
        checkpoint_every = CheckpointEvery(num_steps=int(every))
    return Settings(
        num_steps=info.num_steps,
        learning_rate=rate_of(job, info.num_steps),
        critic_learning_rate=rate_of(
            job, info.num_steps, peak=None if job.ppo is None else job.ppo.critic_learning_rate
        ),
        tokens_per_step=job.tokens_per_step,
        evaluate_every=job.training.evaluate_every,
        checkpoint_every=checkpoint_every,
        keep=job.checkpoint.keep,
        checkpoint_directory=Path(assignment.run_directory) / "checkpoints",
        info=info,
        model_flops_per_token=workload(job.architecture, job.lora, task=job.task).model_flops_per_token(
            job.batch.sequence_length
        ),
        peak_flops=assignment.peak_flops,
        # A compiled block is opaque to a dispatch mode.
        measure_memory=assignment.measure_memory and not assignment.strategy.compile,
        vocab_size=job.architecture.vocab_size,
    )


def length_of(job: Job) -> int:
    if job.num_steps is None:
        raise ValueError("the job gives no length: set training.steps or training.tokens")
    return job.num_steps


# Small tools ---------------------------------------------------------------------------------------------------------


class Phases:
    """Seconds of each phase before the first step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._mark = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._mark = now - self._mark, now
        LOG.info("%-5s  %.2f s", name.removesuffix("_s"), self.laps[name])


def main(arguments: list[str]) -> int:
    """Runs an assignment from a file and writes metrics.jsonl and events.jsonl into its run folder, without Ray."""
    if len(arguments) != 1:
        print("usage: python -m orchestrator.training.worker ASSIGNMENT.json", file=sys.stderr)
        return 2
    assignment = from_environment(Assignment.from_mapping(json.loads(Path(arguments[0]).read_text(encoding="utf-8"))))
    run_directory = Path(assignment.run_directory)
    run_directory.mkdir(parents=True, exist_ok=True)
    asked: list[str] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell ignores Ctrl-C for what it runs behind
            signal.signal(number, lambda received, _: asked.append(signal.Signals(received).name))

    journal = Journal(run_directory)
    outcome = train(
        assignment, report=journal.write, sync=journal.sync, should_stop=lambda: asked[0] if asked else None
    )
    if assignment.rank == 0 and (missing := journal.sync()):
        print(missing, file=sys.stderr)
    if assignment.rank == 0:
        print(json.dumps(asdict(outcome)))
    return {"finished": 0, "failed": 1, "stopped": 5}[outcome.kind]


def from_environment(assignment: Assignment) -> Assignment:
    """One file serves all ranks: what a launcher such as torchrun knows is in RANK, LOCAL_RANK and WORLD_SIZE."""
    environment = os.environ
    if "RANK" not in environment:
        return assignment
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    return replace(
        assignment,
        rank=int(environment["RANK"]),
        world_size=int(environment.get("WORLD_SIZE", assignment.world_size)),
        local_rank=local_rank,
        device=f"cuda:{local_rank}" if assignment.device.startswith("cuda") else assignment.device,
        master_address=environment.get("MASTER_ADDR", assignment.master_address),
        master_port=int(environment.get("MASTER_PORT", assignment.master_port)),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
