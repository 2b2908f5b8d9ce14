"""Our training step against Hugging Face's OPTForCausalLM under its own Trainer: the same model, batch, dtype, optimizer.

In one process, one torch thread, each beside the matmul peak measured before and after it, because a machine that others
use too is never as fast twice. Seconds are the medians of wall time; CPU time of the thread stands beside them.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from orchestrator.models.architecture import CATALOG, Architecture
from orchestrator.models.decoder import Decoder, initial_weights
from orchestrator.models.workloads import workload
from strategies.engines.engine import MicroBatch, OptimizerSettings
from strategies.engines.native import build_session
from strategies.pipeline.stages import cut
from strategies.strategy import Strategy

LEARNING_RATE = 1e-4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARMUP_STEPS = 2


def measure(model: str, *, precision: str, sequence_length: int, num_steps: int, compiled: bool) -> dict[str, Any]:
    """One row: ours and theirs."""
    arch = CATALOG[model]
    ids = torch.randint(arch.vocab_size, (1, sequence_length + 1), generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], list[tuple[float, float]]]] = {
        "ours": lambda: ours(arch, ids, precision, num_steps, compiled),
        "hugging_face": lambda: hugging_face(arch, ids, precision, num_steps, compiled),
    }
    flops = workload(arch).model_flops_per_token(sequence_length) * sequence_length
    row: dict[str, Any] = {"model": model, "precision": precision, "sequence_length": sequence_length}
    row["compiled"] = compiled
    for name, run in runs.items():
        before = product_flops(precision)
        times = run()[WARMUP_STEPS:]
        peak = max(before, product_flops(precision))
        wall = statistics.median(wall for wall, _ in times)
        row[name] = {
            "wall_s": wall,
            "cpu_s": statistics.median(cpu for _, cpu in times),
            "peak_flops": peak,
            "fraction_of_peak": flops / wall / peak,
        }
    # Of the fractions: what the machine lost between the two is no merit of either.
    row["ratio"] = row["hugging_face"]["wall_s"] / row["ours"]["wall_s"]
    row["ratio_of_fractions"] = row["ours"]["fraction_of_peak"] / row["hugging_face"]["fraction_of_peak"]
    row["ratio_of_cpu_time"] = row["hugging_face"]["cpu_s"] / row["ours"]["cpu_s"]
    return row


def product_flops(precision: str, *, num_calls: int = 5) -> float:
    """The best of a few calls of the MLP's product."""
    x, w = (torch.randn(shape).to(DTYPES[precision]) for shape in ((512, 768), (768, 3072)))
    best = float("inf")
    for _ in range(num_calls + 1):
        started = time.perf_counter()
        torch.mm(x, w)
        best = min(best, time.perf_counter() - started)
    return 2 * 512 * 768 * 3072 / best


def ours(
    arch: Architecture, ids: torch.Tensor, precision: str, num_steps: int, compiled: bool
) -> list[tuple[float, float]]:
    strategy = Strategy(
        states="full" if precision == "fp32" else "mixed",
        compile=compiled,
        stages=cut(arch.num_layers, pipeline=1, virtual=1, v_shaped=False, head_layers=0.0, checkpointed=0),
    )
    with torch.device("meta"):
        module = Decoder(arch)
    session = build_session(
        module,
        strategy=strategy,
        precision=precision,
        weights=initial_weights(arch, 0),
        optimizer=OptimizerSettings(betas=(0.9, 0.999), weight_decay=0.1, gradient_clip=1.0),
    )
    batch = MicroBatch(input_ids_BS=ids[:, :-1], target_ids_BS=ids[:, 1:], weight_B=torch.ones(1))
    times = []
    for _ in range(WARMUP_STEPS + num_steps):
        wall, cpu = time.perf_counter(), time.thread_time()
        session.step([batch], num_targets=ids.shape[1] - 1, learning_rate=LEARNING_RATE)
        times.append((time.perf_counter() - wall, time.thread_time() - cpu))
    session.close()
    return times


def hugging_face(
    arch: Architecture, ids: torch.Tensor, precision: str, num_steps: int, compiled: bool
) -> list[tuple[float, float]]:
    from transformers import OPTConfig, OPTForCausalLM, Trainer, TrainerCallback, TrainingArguments

    config = OPTConfig(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        num_hidden_layers=arch.num_layers,
        ffn_dim=arch.ffn_size,
        num_attention_heads=arch.num_heads,
        max_position_embeddings=arch.max_position,
        dropout=0.0,
        attention_dropout=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marks.append((time.perf_counter(), time.thread_time()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append((time.perf_counter(), time.thread_time()))

    sample = {"input_ids": ids[0, :-1], "labels": ids[0, :-1], "attention_mask": torch.ones_like(ids[0, :-1])}
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=WARMUP_STEPS + num_steps,
            per_device_train_batch_size=1,
            learning_rate=LEARNING_RATE,
            weight_decay=0.1,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=precision == "bf16",
            use_cpu=True,
            torch_compile=compiled,
            lr_scheduler_type="constant",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=OPTForCausalLM(config),
            args=settings,
            train_dataset=[sample] * (WARMUP_STEPS + num_steps),
            callbacks=[Clock()],
        )
        trainer.train()
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]
