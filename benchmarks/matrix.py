"""The rows of `make parity`: each room alone, compositions, ways to save and to load, and plans that the planner drew."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from benchmarks.cases import ADAPTED, ARCH, FAMILIES, TASK, TASKS, Case, Run, Task, Trial
from strategies.strategy import Offload


def compositions() -> list[Case]:
    """Tensor {1, 2} x pipeline {1, 2, 4} x data {1, 2} x ZeRO 0..3 x recompute x schedule, on up to 8 processes in fp64;
    some of them in fp32 and bf16, and with the axes of the mesh in another order."""
    cases = []
    schedules = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_zero_bubble", 2), ("zbv", 2)]
    for tensor, pipeline, data, recompute in itertools.product(
        (1, 2), (1, 2, 4), (1, 2), ("none", "selective", "full")
    ):
        world = tensor * pipeline * data
        if tensor == pipeline == 1 or world > 8:
            continue
        for stage, (schedule, virtual) in itertools.product(range(4 if data > 1 else 1), schedules):
            if (pipeline == 1 and schedule != "1f1b") or pipeline * virtual > ARCH.num_layers:
                continue
            cases.append(
                Case(
                    world_size=world,
                    zero_stage=stage,
                    recompute=recompute,
                    tensor=tensor,
                    pipeline=pipeline,
                    schedule=schedule,
                    virtual=virtual,
                    micro_batch_size=1,
                    sequence_parallel=tensor > 1 and recompute != "selective",
                    reduce="per_step" if pipeline > 1 and stage >= 2 else "per_micro_batch",
                    gather="per_step" if schedule == "zbv" and stage == 3 else "per_micro_batch",
                    checkpointed=1 if recompute == "full" and pipeline < 4 else None,
                )
            )
    plain = Case(world_size=8, zero_stage=1, tensor=2, pipeline=2, micro_batch_size=1, sequence_parallel=True)
    cases += [replace(plain, precision=precision) for precision in ("fp32", "bf16")]
    cases += [
        Case(world_size=2, zero_stage=0, precision="fp16", micro_batch_size=1, **split)
        for split in (
            {"tensor": 2, "sequence_parallel": True},
            {"pipeline": 2},
            {"pipeline": 2, "schedule": "zbv", "virtual": 2},
        )
    ]
    cases += [
        replace(plain, precision="fp16", zero_stage=stage, reduce="per_step" if stage == 2 else "per_micro_batch")
        for stage in (1, 2, 3)
    ]
    cases.append(replace(plain, mesh_order=("tensor", "pipeline", "data", "context")))
    return cases


def reductions() -> list[Case]:
    """ZeRO 2 and 3 under a pipeline, reduced with every micro batch; in 16 bit, and with replicas of a group, too."""
    schedules = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_zero_bubble", 1), ("zbv", 2)]
    cases = []
    for stage, (schedule, virtual) in itertools.product((2, 3), schedules):
        plain = Case(world_size=4, zero_stage=stage, pipeline=2, schedule=schedule, virtual=virtual, micro_batch_size=1)
        cases += [plain, replace(plain, world_size=8, group=2), replace(plain, precision="bf16")]
        # One micro batch: what a split backward brings late is all there is.
        cases += [replace(plain, precision="bf16", micro_batch_size=4, reduce="per_step")] if virtual == 1 else []
    return cases


HOST = Offload(optimizer="host", parameters="host", activations="host")
NVME = Offload(optimizer="nvme", parameters="host", activations="host")
FILES = Offload(optimizer="nvme", parameters="nvme", activations="host")
PART = Offload(optimizer="nvme", optimizer_fraction=0.4)


def offloaded() -> list[Case]:
    """What offload moves under tensor {1, 2} x pipeline {1, 2} x data {1, 2} x ZeRO 0..3; at stages 2 and 3 no parameter lies
    on NVMe."""
    cases = []
    schedules = itertools.cycle([("1f1b", 1), ("interleaved_1f1b", 2), ("zbv", 2), ("gpipe", 1)])
    recomputes = itertools.cycle(["none", "full", "selective"])
    for tensor, pipeline, data in itertools.product((1, 2), (1, 2), (1, 2)):
        for stage, offload in itertools.product(range(4 if data > 1 else 1), (HOST, NVME, FILES, PART)):
            if (tensor == pipeline == 1) or (offload == FILES and stage >= 2):
                continue
            schedule, virtual = next(schedules) if pipeline > 1 else ("1f1b", 1)
            cases.append(
                Case(
                    world_size=tensor * pipeline * data,
                    zero_stage=stage,
                    recompute=next(recomputes),
                    tensor=tensor,
                    pipeline=pipeline,
                    schedule=schedule,
                    virtual=virtual,
                    micro_batch_size=1,
                    sequence_parallel=tensor > 1 and stage != 1,
                    reduce="per_step" if pipeline > 1 and stage >= 2 else "per_micro_batch",
                    offload=offload,
                )
            )
    return cases


def contexts() -> list[Trial]:
    """Context 2 and 4 alone, in each family whose rows are one sample; beside tensor and sequence parallelism, every schedule,
    ZeRO 0 to 3, recompute and offload, so that each pair of choices is there; in 32 and 16 bit; saved under one split that goes
    on under another."""
    long = {
        task.arch.family: replace(task, sequence_length=16)
        for task in (TASK, *FAMILIES.values())
        if task.arch.family != "glm"
    }
    opt, llama, bloom = long["opt"], long["llama"], long["bloom"]

    def case(world: int, zero: int, context: int = 2, task: Task = opt, **more: Any) -> Case:
        micro = more.pop("micro_batch_size", 1)
        return Case(world_size=world, zero_stage=zero, context=context, task=task, micro_batch_size=micro, **more)

    split = {"tensor": 2, "sequence_parallel": True}
    wave = {"pipeline": 2, "schedule": "zbv", "virtual": 2}
    late = {"pipeline": 2, "schedule": "interleaved_zero_bubble", "virtual": 2}
    turns = {"pipeline": 2, "schedule": "interleaved_1f1b", "virtual": 2}
    cases = [
        *(case(2, 0, task=task) for task in long.values()),
        *(case(4, zero, 4, task=task) for zero, task in enumerate((opt, llama, bloom, opt))),
        case(8, 0, 4, bloom, **split, recompute="full"),
        case(8, 1, 2, llama, **split, recompute="selective", micro_batch_size=2),
        case(8, 2, 2, opt, tensor=2, recompute="full", group=2),
        case(8, 3, 2, bloom, **split, group=2, gather="per_step"),
        case(4, 0, 2, llama, **wave, recompute="selective"),
        case(4, 1, 2, bloom, **late, recompute="full", checkpointed=1),
        case(4, 2, 2, opt, **turns, reduce="per_step"),
        case(4, 3, 2, llama, pipeline=2, schedule="gpipe", recompute="full"),
        case(8, 3, 4, bloom, pipeline=2, recompute="selective", micro_batch_size=2),
        case(8, 2, 4, llama, **late, recompute="none"),
        case(8, 1, 2, opt, **wave, **split, recompute="full"),
        case(8, 0, 2, llama, pipeline=2, **split),
        case(8, 0, 2, opt, pipeline=4, schedule="gpipe"),
        case(4, 2, 2, opt, recompute="selective", offload=HOST),
        case(4, 1, 4, llama, recompute="full", offload=NVME),
        case(8, 1, 2, bloom, **split, pipeline=2, offload=HOST),
        case(4, 3, 2, llama, pipeline=2, offload=HOST, reduce="per_step"),
        case(2, 0, 2, bloom, recompute="full", offload=FILES),
        case(8, 1, 2, opt, tensor=2, group=2, mesh_order=("context", "tensor", "pipeline", "data")),
        *(case(4, zero, 2, llama, precision=precision) for zero, precision in ((1, "fp32"), (1, "bf16"), (3, "bf16"))),
    ]
    plain = Case(world_size=2, zero_stage=3, tensor=2, micro_batch_size=1, task=opt)
    moves = [(case(4, 2, 4), plain), (plain, case(4, 1, 4)), (case(4, 3), case(4, 1, 2, pipeline=2))]
    moves += [(case(4, 2, 2, precision="fp32"),) * 2]
    return [Trial(each) for each in cases] + [Trial(a, b) for a, b in moves]


def families() -> list[Trial]:
    """Every room under each family beside OPT: tensor and sequence parallelism, pipelines, ZeRO 0 to 3, recompute, offload; a
    run saved under one split that goes on under another. The same with packed rows."""
    splits = [
        Case(world_size=4, zero_stage=3, tensor=2, sequence_parallel=True),
        Case(world_size=4, zero_stage=0, tensor=2, pipeline=2, micro_batch_size=1),
        Case(world_size=4, zero_stage=1, pipeline=2, virtual=2, schedule="zbv", recompute="full", micro_batch_size=1),
        Case(world_size=2, zero_stage=2, recompute="selective"),
        Case(world_size=4, zero_stage=1, tensor=2, sequence_parallel=True, recompute="full", offload=HOST),
    ]
    trials = []
    # Frozen weights under what treats parameters and gradients in ways of its own.
    more = [
        Case(world_size=4, zero_stage=3, pipeline=2, virtual=2, schedule="zbv", micro_batch_size=1),
        Case(world_size=4, zero_stage=2, tensor=2, sequence_parallel=True, micro_batch_size=1),
        Case(world_size=2, zero_stage=2, pipeline=2, reduce="per_step", micro_batch_size=1),
        Case(world_size=2, zero_stage=2, micro_batch_size=1, precision="bf16"),
        Case(world_size=2, zero_stage=3, micro_batch_size=1, precision="bf16", offload=HOST),
        Case(world_size=2, zero_stage=1, micro_batch_size=1, offload=FILES),
        Case(world_size=2, zero_stage=1, tensor=2, pipeline=1, schedule="1f1b", micro_batch_size=1),
    ]
    trials += [Trial(Run(case.strategy, case.precision, task)) for task in ADAPTED for case in more]
    trials += [Trial(run, run) for run in [Run(more[0].strategy, "fp64", ADAPTED[0])]]
    for task in TASKS:
        runs = [Run(case.strategy, case.precision, task) for case in splits]
        trials += [Trial(run) for run in runs] + [Trial(runs[0], runs[2])]
    return trials


def matrix() -> list[Trial]:
    """ZeRO 0..3 x recompute x world size in each precision; hybrid groups; gather and reduce once a step; compositions;
    every pair of fourteen ways to save and to load; bitwise resumption with 3 and 4 workers."""
    cases = [
        Case(world_size=world, zero_stage=stage, recompute=recompute, precision=precision)
        for precision, world, stage, recompute in itertools.product(
            ("fp64", "fp32", "bf16"), (1, 2, 4), (0, 1, 2, 3), ("none", "selective", "full")
        )
    ]
    cases += [Case(world_size=3, zero_stage=stage) for stage in range(4)]
    cases += [Case(world_size=2, zero_stage=stage, precision="fp16") for stage in range(4)]
    cases += [Case(world_size=2, zero_stage=s, precision="bf16", states="mixed_fp32_gradients") for s in (0, 1)]
    groups = [Case(world_size=4, zero_stage=s, group=2, micro_batch_size=1) for s in (1, 2, 3)]
    often = itertools.product((2, 3), ("per_step", "per_micro_batch"), ("per_step", "per_micro_batch"))
    frequencies = [Case(world_size=2, zero_stage=s, micro_batch_size=1, gather=g, reduce=r) for s, g, r in often]
    cases += groups + frequencies + compositions() + reductions() + offloaded()
    cases += [replace(case, gather="per_step", reduce="per_step") for case in groups[1:]]
    ends = [
        Case(world_size=w, zero_stage=s) for s, w in ((0, 1), (2, 1), (0, 2), (0, 4), (1, 2), (1, 3), (2, 2), (3, 4))
    ]
    ends += groups
    ends += [
        Case(world_size=4, zero_stage=3, tensor=2, sequence_parallel=True),
        Case(world_size=4, zero_stage=1, pipeline=2, virtual=2, schedule="interleaved_1f1b", micro_batch_size=1),
        Case(world_size=8, zero_stage=1, tensor=2, pipeline=2, micro_batch_size=1),
    ]
    trials = [Trial(case) for case in cases] + families() + contexts()
    trials += [Trial(a, b) for a, b in itertools.product(ends, ends) if a != b]
    for world, stage, precision in itertools.product((3, 4), (0, 1, 2, 3), ("fp32", "bf16", "fp16", "fp64")):
        case = Case(world_size=world, zero_stage=stage, precision=precision, micro_batch_size=1)
        trials.append(Trial(case, case))
    away = [
        case for case in offloaded() if case.pipeline == 2 and case.world_size == 4 and case.offload in (NVME, PART)
    ]
    trials += [Trial(replace(case, precision="bf16"), replace(case, precision="bf16")) for case in away]
    trials += [
        Trial(replace(case, precision=p), replace(case, precision=p)) for case in groups for p in ("fp32", "bf16")
    ]
    return trials
