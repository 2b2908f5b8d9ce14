"""The formula behind each number of a plan, with its own numbers put in. Text for the page; the arithmetic is elsewhere. Pure."""

from __future__ import annotations

from orchestrator.planner.plan import Plan
from orchestrator.planner.show.words import choices_told
from strategies.zero.eight_bit import MOMENT_BYTES
from strategies.zero.state_bytes import BYTES, reduces_early

GIB = 2**30


def memory_formulas(plan: Plan) -> dict[str, str]:
    """Return the formulas by component of a stage."""
    s, problem = plan.strategy, plan.solution.problem
    parameter, gradient, master, moments = BYTES[s.states]
    group, words = s.num_shards, choices_told(s)
    scheduled, recompute = words["schedule"] or "no pipeline", words["recompute"] or "no recompute"
    tokens = s.micro_batch_size * problem.sequence_length
    shared = f", over a ZeRO group of {group}" if group > 1 else ""
    split = f"tensor {s.degrees.tensor}, pipeline {s.degrees.pipeline}"
    model = f"this rank's part of {problem.work.trains.num_parameters:,} parameters ({split})"
    frozen = ""
    if problem.lora is not None:
        model = model.replace(" parameters", " trained parameters")
        frozen = f"; and of the {problem.work.num_parameters:,} parameters the frozen ones, {problem.precision}"
    two = "two Adam moments" + (" in 8 bits and a scale for 256, where a matrix is large" if problem.eight_bit else "")
    return {
        "parameters": f"{parameter} bytes ({s.states}) x {model}" + (shared if reduces_early(s) else "") + frozen,
        "gathered_parameters": "whole copies of sharded parameters while blocks compute: the block at work and "
        "the one fetched ahead, or all of a stage with gather: per_step",
        "master_weights": f"{master} bytes ({s.states}) x {model}{shared}",
        "gradients": f"{gradient} bytes ({s.states}) x {model}" + (shared if reduces_early(s) else ""),
        "optimizer_states": f"{MOMENT_BYTES if problem.eight_bit else moments} bytes ({s.states}, {two}) x {model}{shared}",
        "activations": f"what the layers leave for backward of {tokens:,} tokens a micro batch, times the micro batches "
        f"in flight on this rank ({scheduled}); {recompute}. arXiv:2205.05198 with the "
        "model's own constants",
        "logits": f"{tokens:,} tokens x vocabulary {problem.work.vocab_size:,} / tensor {s.degrees.tensor}, "
        "in fp32 for the loss",
        "communication_buffers": "gradients on their way to their shard, and buckets",
        "temporary": "the working set of one block's backward, or of the optimizer",
        "reserve": "what is not tensors: the driver's context, libraries, communicators, and the allocator's fragmentation",
    }


def time_formulas(plan: Plan) -> dict[str, str]:
    """Return the formulas by part of a step."""
    s, problem = plan.strategy, plan.solution.problem
    accumulation = s.gradient_accumulation_steps
    layers = max(stage.num_layers for stage in s.stages) * s.num_virtual_stages
    return {
        "compute_s": f"{accumulation} micro batches x the slowest rank's {layers} layers and its head: products by a "
        "roofline with an efficiency that grows with their size, attention, element-wise work by bytes; backward twice forward",
        "recompute_s": f"the forward of checkpointed layers once more, {accumulation} times",
        "tensor_parallel_s": f"{accumulation} x the collectives of layers, embedding, head and loss over "
        f"{s.degrees.tensor} GPUs; recomputing a layer sends its forward again",
        "context_parallel_s": f"{accumulation} x the keys, values and their gradients that travel around "
        f"{s.degrees.context} GPUs, less what attention over those that are here hides",
        "data_parallel_exposed_s": f"gradients and parameters over {s.num_replicas} replicas "
        f"({plan.price.time.data_parallel_s:.3g} s in all), less what backward hides; gradients that tensor ranks, first "
        "and last stage add up; the norm",
        "pipeline_bubble_s": f"(p - 1) / (m v) of the busy time, a third of it where weight gradients fill the gaps: "
        f"p {s.degrees.pipeline}, m {accumulation}, v {s.num_virtual_stages}",
        "pipeline_transfer_s": "one activation from stage to stage and one gradient back, of every micro batch",
        "offload_s": "bytes over the host link, the host's own optimizer, and the disk, less what overlaps",
        "optimizer_s": "AdamW as one pass over the states, clipping as two passes over the gradients, at memory bandwidth",
        "step_s": f"the sum of its parts, for {problem.global_batch_size:,} sequences of {problem.sequence_length:,} tokens",
    }


def headline_formulas(plan: Plan) -> dict[str, str]:
    """Return the formulas by number of the summary."""
    problem, s, time = plan.solution.problem, plan.strategy, plan.price.time
    flops = problem.work.model_flops_per_token(problem.sequence_length)
    peak = problem.cluster.accelerator.peak_flops[problem.precision]
    rates = plan.throughput
    price = plan.cluster.usd_per_gpu_hour
    return {
        "speed": f"{problem.global_batch_size:,} x {problem.sequence_length:,} tokens / {time.step_s:.4g} s / {s.num_gpus} GPUs",
        "mfu": f"{rates['tokens_per_second_per_gpu']:,.1f} tokens/s x {flops / 1e9:,.2f} GFLOP a token (6 N + 12 L h s, PaLM, "
        f"arXiv:2204.02311, app. B) / {peak / 1e12:,.0f} TFLOP/s dense {problem.precision}",
        "hfu": "MFU with the recomputed products counted as well",
        "peak": "the fullest GPU at the worst moment of a step, against "
        f"{plan.price.memory.usable_bytes / GIB:,.1f} GiB: what the driver reports, less the memory error as a margin",
        "wall": f"{plan.job.num_steps or 0:,} steps x {time.step_s:.4g} s",
        "usd": f"GPU-hours x {'no known price' if price is None else f'{price:,.2f} USD'} a GPU and hour, used GPUs only",
        "error": f"{plan.confidence['source']}",
    }
