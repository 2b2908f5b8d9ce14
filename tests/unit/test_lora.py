"""LoRA: adapters equal peft's, are all that is trained and kept, go on bit for bit, and leave as merged weights or for peft."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, OPTForCausalLM

from clusters.catalog import load_cluster
from orchestrator.cli import main
from orchestrator.models.architecture import CATALOG, make_architecture
from orchestrator.models.decoder import Decoder, initialize
from orchestrator.models.formats import FORMATS
from orchestrator.models.lora import PLACES, TARGETS, Lora, is_adapter, num_adapter_parameters, sizes
from orchestrator.models.weights import write_folder
from orchestrator.models.workloads import workload
from orchestrator.planner.problem import Choice, Problem
from orchestrator.spec import SpecError, parse_job
from orchestrator.spec.acting import unbuilt
from orchestrator.training.generate import load_model
from orchestrator.training.manifest import CheckpointRefused, verify
from tests.unit.test_rows import QUESTIONS, assignment_of, job_of, prepared
from tests.unit.test_training import run

# peft asks a model for what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SHAPES = {
    "llama": {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 48, "vocab_size": 61},
    "opt": {"hidden_size": 32, "num_heads": 4, "ffn_size": 48, "vocab_size": 61, "max_position": 24},
}
THEIRS = {
    "llama": {place: f"{place}" for place in TARGETS},
    "opt": {
        "q_proj": "q_proj",
        "k_proj": "k_proj",
        "v_proj": "v_proj",
        "o_proj": "out_proj",
        "up_proj": "fc1",
        "down_proj": "fc2",
    },
}
"""Our name of a linear layer -> transformers' in the family."""


def architecture(family: str):
    return make_architecture(family=family, num_layers=2, **SHAPES[family])


def adapted(family: str, targets: tuple[str, ...]) -> Decoder:
    """Both matrices of each adapter random, so that every gradient counts."""
    arch = architecture(family)
    module = Decoder(arch, lora=Lora(rank=3, alpha=7.0, targets=targets))
    initialize(module, arch, 3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name))).mul_(0.1)
    return module


def peer_of(module: Decoder, tmp_path: Path, targets: tuple[str, ...]) -> nn.Module:
    """The same weights in transformers under peft."""
    family = module.arch.family
    plain = [(name, p) for name, p in module.named_parameters() if not is_adapter(name)]
    write_folder(tmp_path / "base", module.arch, plain)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    names = [THEIRS[family][target] for target in targets]
    peer = get_peft_model(model, LoraConfig(r=3, lora_alpha=7.0, target_modules=names))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if is_adapter(name):
                peer.get_parameter(theirs(family, name)).copy_(parameter)
    return peer


def theirs(family: str, name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    place = FORMATS[family].key(f"{stem}.weight").removesuffix(".weight")
    return f"base_model.model.{place}.lora_{leaf[-1].upper()}.default.weight"


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("which", ["attention", "everywhere"])
def test_adapters_equal_pefts_in_logits_gradients_and_steps(family: str, which: str, tmp_path: Path) -> None:
    targets = ("q_proj", "v_proj") if which == "attention" else tuple(THEIRS[family])
    module = adapted(family, targets)
    peer = peer_of(module, tmp_path, targets)
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, eps=1e-6) for m in (module, peer)
    ]
    for _ in range(3):
        logits, wanted = module(ids), peer(ids).logits
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)
        for output in (logits, wanted):
            torch.nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None) == is_adapter(name)
            if is_adapter(name):
                torch.testing.assert_close(
                    parameter.grad, peer.get_parameter(theirs(family, name)).grad, atol=1e-5, rtol=0
                )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_only_adapters_and_a_value_head_are_trained() -> None:
    arch, lora = architecture("llama"), Lora(rank=3, alpha=6.0, targets=TARGETS)
    trained = {n for n, p in Decoder(arch, values=True, lora=lora).named_parameters() if p.requires_grad}
    assert trained == {
        f"blocks.{i}.{place}.{x}" for i in (0, 1) for place in PLACES.values() for x in ("lora_a", "lora_b")
    } | {"head.value.weight"}
    for task in ("sft", "reward"):
        module = Decoder(arch, lora=lora, values=task == "reward")
        count = sum(p.numel() for p in module.parameters() if p.requires_grad)
        assert count == workload(arch, lora, task=task).trains.num_parameters
        assert count == num_adapter_parameters(arch, lora) + (task == "reward") * arch.hidden_size


@pytest.mark.parametrize("name", ["opt-125m", "llama-7b", "mpt-7b", "gpt2", "bloom-560m", "glm-10b"])
def test_the_priced_parameters_are_the_modules(name: str) -> None:
    arch = CATALOG[name]
    lora = Lora(rank=8, alpha=16.0, targets=tuple(sizes(arch)))
    with torch.device("meta"):
        parameters = list(Decoder(replace(arch, num_layers=1), lora=lora).parameters())
    work = workload(replace(arch, num_layers=1), lora)
    assert sum(p.numel() for p in parameters) == work.num_parameters
    assert sum(p.numel() for p in parameters if p.requires_grad) == work.trains.num_parameters


# The price ----------------------------------------------------------------------------------------------------------------


def problem(lora: Lora | None) -> Problem:
    return Problem(
        arch=CATALOG["opt-1.3b"],
        cluster=load_cluster("a100-80gb-1x8"),
        global_batch_size=64,
        sequence_length=1024,
        precision="bf16",
        lora=lora,
    )


ATTENTION = Lora(rank=8, alpha=16.0, targets=("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("zero", "parameters", "states"), [(0, 2, 12), (1, 2, 12 / 8), (2, 2, 12 / 8), (3, 2 / 8, 12 / 8)]
)
def test_frozen_weights_have_no_gradient_master_or_state(zero: int, parameters: float, states: float) -> None:
    asked = problem(ATTENTION)
    strategy = asked.strategy(Choice(data=8, zero=zero, group=8 if zero else 1))
    stage = asked.memory(strategy).stages.fullest()
    frozen, adapters = CATALOG["opt-1.3b"], 24 * 2 * 2 * 8 * 2048
    whole = workload(frozen).num_parameters
    held = stage.parameters + stage.master_weights + stage.optimizer_states
    of_adapters = 4 / 8 if zero == 2 else 2 if zero < 2 else 4 / 8
    expected = parameters * whole + (of_adapters + (8 / 8 if zero >= 2 else states)) * adapters
    assert held == pytest.approx(expected, rel=2e-3)
    assert stage.gradients <= 4 * adapters


def test_a_step_without_gradients_of_frozen_weights_takes_two_thirds() -> None:
    choice = Choice(data=8, micro=8)
    plain, lora = (asked.time(asked.strategy(choice)) for asked in (problem(None), problem(ATTENTION)))
    assert 0.62 < lora.compute_s / plain.compute_s < 0.78
    assert lora.data_parallel_s < 0.05 * plain.data_parallel_s
    assert lora.optimizer_s < plain.optimizer_s


# A run --------------------------------------------------------------------------------------------------------------------

BASE = {"num_layers": 2, "hidden_size": 24, "num_heads": 3, "ffn_size": 44, "vocab_size": 264, "max_position": 600}
CHANGES = {
    "sft": [{"instruction": q, "input": "", "output": f"<{a}>"} for a, q in enumerate(QUESTIONS)],
    "dpo": [{"prompt": q, "chosen": str(2 * a + 1), "rejected": "?"} for a, q in enumerate(QUESTIONS)],
}


def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str = "sft", **lora):
    """(job, assignment) of a run on weights in a folder."""
    arch = make_architecture(family="opt", **BASE)
    module = Decoder(arch)
    initialize(module, arch, 11)
    if not (tmp_path / "base").exists():
        write_folder(tmp_path / "base", arch, module.named_parameters())
    mapping = job_of(tmp_path, task, CHANGES.get(task, CHANGES["dpo"]), tokenizer="byte")
    mapping["model"] = {"path": "base"}
    mapping["training"] = {**mapping["training"], "lora": {"rank": 4, "targets": ["q_proj", "down_proj"], **lora}}
    index = prepared(tmp_path, mapping, monkeypatch)
    return mapping, assignment_of(tmp_path, mapping, index.directory)


@pytest.mark.parametrize("task", ["sft", "reward", "dpo"])
def test_a_checkpoint_holds_adapters_alone_and_a_run_goes_on_bit_for_bit(tmp_path, monkeypatch, task: str) -> None:
    _, assignment = asked(tmp_path, monkeypatch, task)
    outcome, reports, _ = run(assignment)
    assert outcome.kind == "finished"
    assert reports[-1].loss < reports[0].loss
    first = Path(outcome.checkpoint).parent / "step-00000002"
    named = {name.partition("blocks.")[2] or name for name in tensors(first)}
    kept = {n for n in named if "lora" not in n and not n.startswith(("scaler", "optimizer.step"))}
    assert kept == (
        {f"{kind}.head.value.weight" for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")}
        if task == "reward"
        else set()
    )
    again, resumed, _ = run(replace(assignment, resume_from=str(first), run_directory=str(tmp_path / "again")))
    assert again.kind == "finished"
    assert [r.loss for r in resumed] == [r.loss for r in reports[2:]]


def tensors(path: Path) -> set[str]:
    from orchestrator.training.reader import Reader

    return set(Reader(verify(path)).entries)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    _, assignment = asked(tmp_path, monkeypatch)
    outcome, _, _ = run(assignment)
    return Path(outcome.checkpoint)


def test_convert_writes_merged_weights_and_a_folder_for_peft(trained: Path, tmp_path, capsys) -> None:
    assert main(["convert", str(trained), str(tmp_path / "merged"), "--json"]) == 0
    assert main(["convert", str(trained), str(tmp_path / "adapter"), "--adapter"]) == 0
    assert "peft.PeftModel" in capsys.readouterr().out
    ids = torch.randint(0, 264, (2, 12), generator=torch.Generator().manual_seed(1))
    base, merged = (OPTForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "merged"))
    with torch.no_grad():
        wanted = load_model(verify(trained))(ids)
        plain = base(ids).logits
        torch.testing.assert_close(merged(ids).logits, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits, wanted, atol=1e-5, rtol=0
        )
    assert (plain - wanted).abs().max() > 1e-3, "the adapters say something"


def test_weights_that_changed_under_the_adapters_are_refused(trained: Path, tmp_path, monkeypatch, capsys) -> None:
    _, assignment = asked(tmp_path, monkeypatch)
    file = tmp_path / "base" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert main(["convert", str(trained), str(tmp_path / "merged")]) == 2
    assert "adapters of other weights than" in capsys.readouterr().err
    outcome, _, _ = run(replace(assignment, resume_from=str(trained)))
    assert outcome.kind == "failed"
    assert "adapters of other weights than model.path has now" in outcome.cause
    file.rename(tmp_path / "elsewhere")
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(CheckpointRefused, match="which are not there: put the folder back"):
        load_model(verify(trained))


def test_a_run_with_other_adapters_does_not_go_on(trained: Path, tmp_path, monkeypatch) -> None:
    _, assignment = asked(tmp_path, monkeypatch, rank=5)
    outcome, _, _ = run(replace(assignment, resume_from=str(trained)))
    assert outcome.kind == "failed"
    assert "differs in training.lora.rank" in outcome.cause


def test_a_whole_model_has_no_adapters_to_convert(tmp_path, monkeypatch, capsys) -> None:
    mapping, assignment = asked(tmp_path, monkeypatch)
    del mapping["training"]["lora"]
    outcome, _, _ = run(replace(assignment, job=mapping))
    assert main(["convert", outcome.checkpoint, str(tmp_path / "adapter"), "--adapter"]) == 2
    assert "it holds a whole model, and no adapters" in capsys.readouterr().err


def test_dropout_of_adapters_and_another_engine_are_refused(tmp_path, monkeypatch) -> None:
    mapping, _ = asked(tmp_path, monkeypatch, dropout=0.1)
    mapping["strategy"] = {"engine": "fairscale", "zero_stage": 1}
    told = [(entry["message"], entry["fix"]) for entry in unbuilt(parse_job(mapping, directory=tmp_path))]
    assert any("`training.lora.dropout` is 0.1: dropout is not built" in message for message, _ in told)
    assert any("adapters beside frozen weights are trained on the native engine" in message for message, _ in told)


def test_a_layer_that_the_family_lacks_is_refused_by_its_place() -> None:
    job = {
        "version": 1,
        "name": "a",
        "model": "opt-125m",
        "batch": {"global_batch_size": 8, "sequence_length": 64},
        "training": {"lora": {"targets": ["q_proj", "gate_proj"]}},
    }
    with pytest.raises(SpecError, match=r"names gate_proj, but family opt has no such layer") as error:
        parse_job(job)
    assert "choose among q_proj, k_proj" in str(error.value)
    job["training"]["lora"]["targets"] = "all-linear"
    assert parse_job(job).lora == Lora(rank=8, alpha=16.0, targets=tuple(t for t in TARGETS if t != "gate_proj"))
    assert json.loads(json.dumps(parse_job(job).to_mapping())) == job
