"""The plan's contract: names, sums, pins, refusals, targets, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.planner.plan import Plan, PlanError, plan
from orchestrator.planner.search.anchors import MULTIPLE, unanchored
from orchestrator.planner.show.text import render
from orchestrator.planner.spread import PAIR
from orchestrator.spec import parse_job
from strategies.catalog import unbuilt

NAMES = {
    "": "version fits job model cluster strategy memory time throughput cost placement confidence alternatives targets_met "
    "targets search nearest sensitivity",
    "strategy": "engine num_gpus data_parallel_degree tensor_parallel_degree pipeline_parallel_degree "
    "context_parallel_degree expert_parallel_degree mesh_order num_virtual_stages pipeline_schedule sequence_parallel "
    "zero_stage zero_group_size states gather reduce activation_checkpointing offload micro_batch_size "
    "gradient_accumulation_steps attention fused_norm compile stages",
    "strategy.stages": "stage pipeline_rank first_layer num_layers num_checkpointed_layers embedding head",
    "memory": "usable_bytes peak_bytes host_bytes_per_node nvme_bytes_per_node stages",
    "memory.stages": "pipeline_rank peak_phase parameters gathered_parameters master_weights gradients optimizer_states "
    "activations logits communication_buffers temporary reserve tensor_peak_bytes peak_bytes",
    "time": "step_s compute_s recompute_s tensor_parallel_s context_parallel_s data_parallel_s data_parallel_exposed_s "
    "pipeline_bubble_s pipeline_transfer_s offload_s optimizer_s",
    "throughput": "tokens_per_second tokens_per_second_per_gpu model_tflops_per_gpu mfu hfu",
    "cost": "gpu_hours usd wall_s",
    "placement": "rank node local_rank data context tensor pipeline",
    "confidence": "source throughput_error memory_error coverage tokens_per_second_per_gpu_low tokens_per_second_per_gpu_high "
    "widened_by fits_probability fits_source",
    "alternatives": "strategy peak_bytes tokens_per_second_per_gpu rejected_because",
    "search": "candidates feasible seconds",
}
"""The words of the contract. More may be added, none taken away."""
COMPONENTS = NAMES["memory.stages"].split()[2:12]


def job(**changes: Any) -> dict[str, Any]:
    mapping: dict[str, Any] = {
        "version": 1,
        "name": "test",
        "model": "opt-13b",
        "batch": {"global_batch_size": 64, "sequence_length": 2048},
        "training": {"steps": 1000},
        "cluster": "a100-80gb-1x8",
    }
    return mapping | changes


def planned(**changes: Any) -> Plan:
    return plan(parse_job(job(**changes)))


PINNED = {
    "data_parallel_degree": 2,
    "tensor_parallel_degree": 2,
    "pipeline_parallel_degree": 2,
    "pipeline_schedule": "1f1b",
    "num_virtual_stages": 1,
    "sequence_parallel": True,
    "zero_stage": 1,
    "zero_group_size": 2,
    "activation_checkpointing": "full",
    "offload": {},
    "micro_batch_size": 2,
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return planned().to_dict()


@pytest.mark.parametrize("place", NAMES)
def test_the_json_has_every_name_of_the_contract(document: dict[str, Any], place: str) -> None:
    value: Any = document
    for key in place.split(".") if place else ():
        value = value[key]
    if isinstance(value, list):
        value = value[0]
    assert set(NAMES[place].split()) <= set(value)


def test_the_json_is_json(document: dict[str, Any]) -> None:
    assert json.loads(json.dumps(document, allow_nan=False)) == document


@pytest.mark.parametrize("strategy", ["auto", PINNED], ids=["searched", "pinned"])
def test_parts_sum_to_their_whole(strategy: Any) -> None:
    got = planned(strategy=strategy).to_dict()
    time = dict(got["time"])
    whole, hidden = time.pop("step_s"), time.pop("data_parallel_s")
    assert sum(time.values()) == pytest.approx(whole)
    assert hidden >= time["data_parallel_exposed_s"]
    for stage in got["memory"]["stages"]:
        assert sum(stage[name] for name in COMPONENTS) == stage["peak_bytes"]
        assert stage["tensor_peak_bytes"] == stage["peak_bytes"] - stage["reserve"]
    assert got["memory"]["peak_bytes"] == max(stage["peak_bytes"] for stage in got["memory"]["stages"])
    assert got["fits"] == (got["memory"]["peak_bytes"] <= got["memory"]["usable_bytes"])
    stages = got["strategy"]["stages"]
    assert sum(stage["num_layers"] for stage in stages) == 40
    assert [stage["first_layer"] for stage in stages] == [
        sum(other["num_layers"] for other in stages[:i]) for i in range(len(stages))
    ]


def test_placement_fills_nodes_in_order_and_keeps_a_tensor_group_together() -> None:
    got = planned(cluster="a100-80gb-2x4", strategy=PINNED).to_dict()["placement"]
    assert [(row["node"], row["local_rank"]) for row in got] == [divmod(rank, 4) for rank in range(8)]
    groups: dict[tuple[int, int], set[int]] = {}
    for row in got:
        groups.setdefault((row["pipeline"], row["data"]), set()).add(row["node"])
    assert all(len(nodes) == 1 for nodes in groups.values())


def test_a_pinned_strategy_is_taken_as_it_is() -> None:
    got = planned(strategy=PINNED).to_dict()
    assert {key: got["strategy"][key] for key in PINNED if key != "offload"} == {
        k: v for k, v in PINNED.items() if k != "offload"
    }
    assert got["search"]["candidates"] == 1


@pytest.mark.parametrize(
    "name", ["data_parallel_degree", "zero_stage", "micro_batch_size", "activation_checkpointing", "offload"]
)
def test_what_is_left_out_the_planner_chooses_and_the_rest_stays(name: str) -> None:
    pins = {key: value for key, value in PINNED.items() if key not in (name, "zero_group_size")}
    got = planned(strategy=pins)
    for key, value in pins.items():
        if key != "offload":
            assert getattr(got.strategy, key) == value
    assert got.search is not None
    fixed = planned(strategy=PINNED)
    assert not fixed.fits or got.price.time.step_s <= fixed.price.time.step_s * (1 + 1e-12)


def test_a_pinned_strategy_that_does_not_fit_is_priced_and_told_what_would() -> None:
    pins = PINNED | {
        "data_parallel_degree": 8,
        "tensor_parallel_degree": 1,
        "pipeline_parallel_degree": 1,
        "zero_stage": 0,
    }
    got = planned(
        strategy={key: value for key, value in pins.items() if key != "zero_group_size"} | {"zero_group_size": 1}
    )
    assert not got.fits
    assert got.exit_code == 3
    assert got.price.time.step_s > 0
    changes = [row["change"] for row in got.nearest]
    assert "leave out zero_stage" in changes


def test_a_model_that_no_strategy_fits_is_a_plan_with_what_would_fit() -> None:
    got = planned(
        model="opt-175b",
        cluster="t4",
        batch={"global_batch_size": 8, "sequence_length": 1024},
        training={"precision": "fp16"},
    )
    answer = got.to_dict()
    assert answer["fits"] is False
    assert got.exit_code == 3
    assert answer["memory"]["peak_bytes"] > answer["memory"]["usable_bytes"]
    assert [row["num_gpus"] for row in answer["nearest"]] == sorted(row["num_gpus"] for row in answer["nearest"])
    assert answer["nearest"]


def test_a_question_on_the_side_that_breaks_a_rule_is_told_and_ends_nothing() -> None:
    pins = {
        "data_parallel_degree": 1,
        "tensor_parallel_degree": 8,
        "pipeline_parallel_degree": 8,
        "num_virtual_stages": 3,
        "pipeline_schedule": "interleaved_1f1b",
        "micro_batch_size": 2,
        "sequence_parallel": False,
        "activation_checkpointing": "none",
        "zero_stage": 0,
        "offload": "none",
    }
    got = planned(model="opt-175b", cluster="a100-80gb-8x8", strategy=pins)
    answer = got.to_dict()
    assert not answer["fits"]
    assert "leave out activation_checkpointing" in [row["change"] for row in answer["nearest"]]
    (refused,) = answer["nearest_refused"]
    assert refused.startswith(
        "64 nodes of 8: interleaved_1f1b over 3 virtual stages runs micro batches in whole rounds"
    )
    assert "no answer for 64 nodes of 8" in render(got)


REFUSED = {
    "zbv with one stage a rank": (
        PINNED | {"pipeline_schedule": "zbv"},
        "zbv holds exactly 2 stages",
    ),
    "1f1b with two stages a rank": (PINNED | {"num_virtual_stages": 2}, "1f1b holds one stage"),
    "interleaved with a ragged round": (
        PINNED
        | {
            "pipeline_schedule": "interleaved_1f1b",
            "num_virtual_stages": 2,
            "micro_batch_size": 32,
            "data_parallel_degree": 2,
        },
        "whole rounds",
    ),
    "16-bit states in fp32": ({"states": "mixed"}, "keeps 16-bit parameters"),
}


def test_a_pinned_schedule_leaves_out_pipelines_of_more_stages_than_layers() -> None:
    answer = planned(
        model={"family": "opt", "num_layers": 3, "hidden_size": 64, "num_heads": 4},
        strategy={"pipeline_schedule": "interleaved_1f1b", "num_virtual_stages": 2},
    ).to_dict()
    assert answer["strategy"]["pipeline_parallel_degree"] == 1


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_a_fix(name: str) -> None:
    strategy, message = REFUSED[name]
    training = {"precision": "fp32"} if "fp32" in name else {"steps": 10}
    with pytest.raises(PlanError, match=message) as error:
        planned(strategy=strategy, training=training)
    assert "to fix:" in str(error.value)


@pytest.mark.parametrize(
    ("pins", "name"),
    [
        ({"offload": {"parameters": "host"}}, "offload of parameters"),
    ],
)
def test_a_run_refuses_what_is_not_built_if_it_was_written(pins: dict[str, Any], name: str) -> None:
    with pytest.raises(PlanError, match=f"{name} cannot run"):
        plan(parse_job(job(strategy=pins)), built_only=True)


def test_a_run_searches_what_is_built_and_keeps_the_faster_plan_it_left_out() -> None:
    run = plan(parse_job(job()), built_only=True)
    assert unbuilt(run.strategy) is None
    everything = planned()
    if everything.price.time.step_s < run.price.time.step_s:
        assert run.left_out is not None
        assert run.left_out.strategy == everything.strategy


def test_an_odd_batch_and_lost_gpus_have_a_plan() -> None:
    got = planned(cluster="a100-80gb-7x8", batch={"global_batch_size": 512, "sequence_length": 2048})
    s = got.strategy
    places = s.micro_batch_size * s.gradient_accumulation_steps * s.data_parallel_degree
    assert 512 <= places < 512 + s.micro_batch_size * s.data_parallel_degree
    pinned = planned(
        cluster="a100-80gb-7x8",
        batch={"global_batch_size": 512, "sequence_length": 2048},
        strategy=PINNED
        | {"data_parallel_degree": 7, "tensor_parallel_degree": 8, "pipeline_parallel_degree": 1, "zero_group_size": 7},
    )
    assert any("does not divide" in note for note in pinned.notes)


def test_idle_gpus_are_said() -> None:
    got = planned(strategy=PINNED | {"data_parallel_degree": 1, "zero_group_size": 1})
    assert got.strategy.num_gpus == 4
    assert any("4 of 8 GPUs stay idle" in note for note in got.notes)


def test_a_setting_without_effect_is_priced_with_a_note() -> None:
    got = planned(strategy={"tensor_parallel_degree": 1, "sequence_parallel": True})
    assert any("sequence_parallel has no effect" in note for note in got.notes)


@pytest.mark.parametrize(
    ("targets", "met"),
    [
        ({"tokens_per_second_per_gpu": 100}, True),
        ({"tokens_per_second_per_gpu": 1e6}, False),
        ({"budget_usd": 1e9}, True),
        ({"budget_usd": 0.01}, False),
        ({"finish_within": "300d"}, True),
        ({"finish_within": "1s"}, False),
    ],
)
def test_targets_are_held_against_the_plan(targets: dict[str, Any], met: bool) -> None:
    got = planned(targets=targets)
    answer = got.to_dict()
    assert answer["fits"] is True
    assert answer["targets_met"] is met
    assert got.exit_code == (0 if met else 3)
    (row,) = answer["targets"]
    assert {"name", "wanted", "got", "would_meet"} <= set(row)
    assert row["name"] in targets


def test_a_target_that_another_size_meets_names_it() -> None:
    free = planned(training={"steps": 10_000})
    wall_s = free.cost["wall_s"]
    assert wall_s is not None
    tight = planned(training={"steps": 10_000}, targets={"finish_within": f"{int(wall_s * 0.6)}s"})
    (row,) = tight.targets
    assert row["met"] is False
    assert row["would_meet"].startswith("16 GPUs")


def test_targets_that_no_size_meets_together_each_name_the_size_that_meets_it_alone() -> None:
    free = planned(training={"steps": 10_000})
    wall_s, usd = free.cost["wall_s"], free.cost["usd"]
    assert wall_s is not None
    assert usd is not None
    targets = {"finish_within": f"{int(wall_s * 0.6)}s", "budget_usd": usd / 10}
    got = planned(training={"steps": 10_000}, targets=targets)
    rows = {row["name"]: row for row in got.targets}
    assert [row["would_meet"] for row in rows.values()] == [None, None]
    assert rows["finish_within"]["would_meet_alone"].startswith("16 GPUs")
    assert rows["budget_usd"]["would_meet_alone"] is None
    text = " ".join(render(got).split())
    assert "no size within a factor of 8 meets all targets; this one alone: 16 GPUs" in text
    assert text.count("no size within a factor of 8 meets it") == 1


def test_the_cheapest_costs_no_more_than_the_fastest_and_the_fewest_uses_no_more() -> None:
    fastest, cheapest, fewest = (planned(objective=name) for name in ("fastest", "cheapest", "fewest_gpus"))
    assert cheapest.cost["usd"] is not None
    assert fastest.cost["usd"] is not None
    assert cheapest.cost["usd"] <= fastest.cost["usd"] * (1 + 1e-9)
    assert fewest.strategy.num_gpus <= cheapest.strategy.num_gpus
    assert fastest.price.time.step_s <= min(cheapest.price.time.step_s, fewest.price.time.step_s)


def test_without_a_length_or_a_price_the_cost_is_unknown() -> None:
    assert planned(training={"precision": "bf16"}).to_dict()["cost"] == {"gpu_hours": None, "usd": None, "wall_s": None}


def test_planning_imports_neither_torch_nor_ray() -> None:
    heavy = ["torch", "ray", "pandas", "fastapi", "transformers", "prometheus_client", "pyarrow", "tokenizers"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({heavy})); from orchestrator import parse_job, plan; "
        f"plan(parse_job({job()!r})).to_dict()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(("model", "sequences"), [("opt-66b", 512), ("opt-175b", 1024)])
def test_a_run_of_a_large_model_takes_the_fastest_plan_as_it_is(model: str, sequences: int) -> None:
    job = parse_job(
        {
            "version": 1,
            "name": "t",
            "model": model,
            "batch": {"global_batch_size": sequences, "sequence_length": 2048},
            "cluster": "a100-80gb-8x8",
        }
    )
    built = plan(job, built_only=True)
    assert built.fits
    assert built.left_out is None
    assert built.strategy == plan(job).strategy


def test_a_machine_that_cannot_be_measured_is_a_plan_error_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("this machine cannot be measured: torch is not installed\n  to fix: pip install torch")

    monkeypatch.setattr("clusters.inventory.local.discover", fail)
    with pytest.raises(PlanError, match="torch is not installed\n  to fix: pip install torch"):
        plan(parse_job(job() | {"cluster": "auto"}))


ASKED_WRONG: dict[str, tuple[dict[str, Any], int, str]] = {
    "a node without a GPU": (
        {"cluster": {"gpu": "a100-80gb", "nodes": 1, "gpus_per_node": 0}},
        2,
        "`cluster.gpus_per_node` is 0; it must be at least 1",
    ),
    "a cluster without a GPU": ({"cluster": {"nodes": 1}}, 2, "`cluster.gpu` is missing"),
    "no bandwidth": (
        {"cluster": {"gpu": "a100-80gb", "nodes": 2, "inter_node_gbps": 0}},
        2,
        "`cluster.inter_node_gbps` is 0; it must be above 0",
    ),
    "heads that no degree divides": (
        {
            "model": {"family": "opt", "num_layers": 12, "hidden_size": 754, "num_heads": 13},
            "strategy": {"tensor_parallel_degree": 4},
        },
        2,
        "does not divide the 13 heads",
    ),
    "a model that no cluster holds": (
        {
            "model": {"family": "opt", "num_layers": 2000, "hidden_size": 262144, "num_heads": 2048},
            "cluster": "a100-80gb",
        },
        3,
        "nothing tried does",
    ),
    "a target that nobody can meet": (
        {"targets": {"tokens_per_second_per_gpu": 1e6}},
        3,
        "no size within a factor of 8 meets it",
    ),
}


@pytest.mark.parametrize("name", ASKED_WRONG)
def test_what_cannot_be_had_is_said_with_exit_code_2_or_3(name: str, tmp_path: Path, capsys: Any) -> None:
    changes, code, words = ASKED_WRONG[name]
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(job(**changes)))
    assert main(["plan", str(file), "--top", "0"]) == code
    out, err = capsys.readouterr()
    assert words in " ".join((out + err).split())
    assert "Traceback" not in err
    assert "to fix:" in err or code == 3
    if code == 3:
        assert main(["plan", str(file), "--json"]) == code
        answer = json.loads(capsys.readouterr().out)
        assert not (answer["fits"] and answer["targets_met"])


def test_thirteen_heads_that_no_degree_divides_are_planned_without_tensor_parallelism() -> None:
    got = planned(model={"family": "opt", "num_layers": 12, "hidden_size": 754, "num_heads": 13})
    assert got.fits
    assert got.strategy.tensor_parallel_degree == 1


def test_the_slowest_link_slows_a_pipeline_that_crosses_it() -> None:
    slow = {"gpu": "a100-80gb", "nodes": 2, "gpus_per_node": 8, "inter_node_measured_gbps": 1e-3}
    pins = {"pipeline_parallel_degree": 4, "data_parallel_degree": 4, "tensor_parallel_degree": 1}
    crossing = planned(cluster=slow, strategy=pins)
    inside = planned(cluster=slow | {"nodes": 1}, strategy=pins | {"data_parallel_degree": 2})
    assert crossing.price.time.pipeline_transfer_s > 100 * inside.price.time.pipeline_transfer_s


def test_the_error_stated_for_a_gpu_that_no_published_run_was_held_against_is_an_assumption() -> None:
    known, unknown = planned(), planned(cluster={"gpu": "rtx-4090", "nodes": 1, "gpus_per_node": 8}, model="opt-1.3b")
    assert known.confidence["throughput_error"] < 0.25
    assert unknown.confidence["throughput_error"] > 0.3
    assert "hardly any run on this GPU" in unknown.confidence["source"]


def test_a_link_that_the_choice_does_not_use_cannot_change_it() -> None:
    got = planned(model="opt-125m", cluster="a100-80gb-1x8")
    rows = {row["where"]: row for row in got.sensitivity}
    assert rows.keys() == {"intra_node", "host_link"}
    assert rows["host_link"]["same_choice"]
    assert rows["host_link"]["step_s"] == got.price.time.step_s
    assert planned(strategy=PINNED).sensitivity == []


def test_the_choice_that_a_slower_link_would_change_is_planned() -> None:
    got = planned(model="opt-30b", cluster={"gpu": "a100-80gb", "nodes": 2, "inter_node_gbps": 40})
    (row,) = [row for row in got.sensitivity if row["where"] == "inter_node"]
    weaker = planned(model="opt-30b", cluster={"gpu": "a100-80gb", "nodes": 2, "inter_node_gbps": 36})
    assert row["strategy"] == weaker.strategy
    assert row["best_step_s"] == pytest.approx(weaker.price.time.step_s)


ASKED = {
    "model": "opt-6.7b",
    "cluster": "a100-40gb-1x8",
    "batch": {"global_batch_size": 512, "sequence_length": 2048},
}


@pytest.mark.parametrize("objective", ["fastest", "cheapest"])
def test_a_gain_that_nothing_anchors_is_taken_from_a_multiple_of_the_paired_error_on(objective) -> None:
    got = planned(**ASKED, objective=objective)
    taken = planned(**ASKED, objective=objective, strategy={"offload": {"optimizer": "host"}})
    assert not got.strategy.offload.any
    assert unanchored(got.strategy) == ()
    gain = taken.tokens_per_second_per_gpu / got.tokens_per_second_per_gpu - 1
    assert 0 < gain < MULTIPLE * PAIR
    (note,) = [note for note in got.notes if "is predicted" in note]
    assert "no published run anchors" in note
    assert re.search(r"runs of both for \d+ minutes would settle it", note)
    (first, *_) = [one for one in got.alternatives if one.fits]
    assert first.tokens_per_second_per_gpu > got.tokens_per_second_per_gpu
    assert "less certain by more than that" in first.because


def test_offload_is_taken_where_a_target_needs_it() -> None:
    best = max(one.tokens_per_second_per_gpu for one in planned(**ASKED).alternatives if one.fits)
    got = planned(**ASKED, targets={"tokens_per_second_per_gpu": 0.999 * best, "tolerance": 0.0})
    assert got.strategy.offload.any
    assert got.targets_met


def test_a_gain_of_offload_beyond_the_margin_is_taken_and_the_plan_without_is_told() -> None:
    asked = ASKED | {"model": "opt-30b", "cluster": "a100-80gb-1x8"}
    got, plain = planned(**asked), planned(**asked, strategy={"offload": "none"})
    assert got.strategy.offload.any
    assert got.tokens_per_second / plain.tokens_per_second - 1 > MULTIPLE * PAIR
    (note,) = [note for note in got.notes if note.startswith("without offload")]
    assert f"{plain.tokens_per_second_per_gpu:,.0f} tokens/s/GPU" in note
    assert not any(note.startswith("without offload") for note in plain.notes)


def test_a_tight_plan_says_so_and_names_the_first_step_down() -> None:
    got = planned(**ASKED | {"model": "opt-13b"})
    assert got.price.memory.peak_bytes > 0.97 * got.price.memory.usable_bytes
    (note,) = [note for note in got.notes if note.startswith("tight")]
    assert "of 100 cases" in note
    assert "first step down: " in note
    assert not any(note.startswith("tight") for note in planned(model="opt-125m", cluster="a100-80gb").notes)
