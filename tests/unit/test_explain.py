"""Every alternative has one reason with its number; the page and the text show what the plan holds."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from clusters.catalog import load_cluster
from clusters.inventory.file import write_cluster
from orchestrator.cli import main
from orchestrator.planner.capacity import Question, capacity, told
from orchestrator.planner.plan import Plan, plan
from orchestrator.planner.problem import Choice
from orchestrator.planner.reasons.sensitivity import sensitivity
from orchestrator.planner.show.charts import ticks
from orchestrator.planner.show.page import page
from orchestrator.planner.show.text import render
from orchestrator.planner.show.words import bar, bytes_told, seconds_told
from orchestrator.spec import parse_job
from strategies.pipeline.cost import bubble_fraction
from strategies.pipeline.timeline import timeline
from strategies.strategy import Strategy


@pytest.fixture(scope="module")
def made() -> Plan:
    job: dict[str, Any] = {
        "version": 1,
        "name": "test",
        "model": "opt-30b",
        "batch": {"global_batch_size": 128, "sequence_length": 2048},
        "training": {"tokens": 30e9},
        "cluster": "a100-80gb-2x8",
    }
    return plan(parse_job(job))


def test_every_alternative_has_one_reason_with_a_number(made: Plan) -> None:
    rows = made.alternatives
    assert len(rows) >= 8
    assert all(re.search(r"instead: .*\d", one.because) for one in rows)
    speeds = [one.tokens_per_second_per_gpu for one in rows]
    assert speeds == sorted(speeds, reverse=True)


FOLLOWS = {
    "tensor_parallel_degree": {"data_parallel_degree", "zero_stage", "sequence_parallel", "states"},
    "pipeline_parallel_degree": {
        "data_parallel_degree",
        "zero_stage",
        "pipeline_schedule",
        "num_virtual_stages",
        "states",
    },
    "pipeline_schedule": {"num_virtual_stages"},
    "zero_stage": {"states"},
}
"""What may follow from a change, beside what is settled again."""
SETTLED = {
    *("micro_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "stages", "zero_group_size"),
    *("gather", "reduce"),
}


def test_an_alternative_differs_in_one_choice_and_what_is_settled_again(made: Plan) -> None:
    for one in made.alternatives:
        if one.changed == "offload":  # searched for, as the notes say
            continue
        differs = {f.name for f in fields(Strategy) if getattr(one.strategy, f.name) != getattr(made.strategy, f.name)}
        allowed = SETTLED | {one.changed} | FOLLOWS.get(one.changed, set())
        if "pipeline_schedule" not in differs or one.changed == "pipeline_schedule":
            assert one.changed in differs, one.because
        assert differs <= allowed | {"pipeline_schedule", "num_virtual_stages"}, one.because


def test_the_decisive_choices_appear_among_the_alternatives(made: Plan) -> None:
    changed = {one.changed for one in made.alternatives}
    assert {"tensor_parallel_degree", "pipeline_parallel_degree", "pipeline_schedule", "zero_stage"} <= changed


def test_less_simple_is_said_of_what_is_less_simple_alone() -> None:
    for model, where in (("opt-13b", "a100-80gb-1x8"), ("opt-1.3b", "a100-80gb-1x8"), ("opt-30b", "a100-80gb-2x8")):
        job = {
            "version": 1,
            "name": "simple",
            "model": model,
            "batch": {"global_batch_size": 256, "sequence_length": 2048},
            "cluster": where,
        }
        found = plan(parse_job(job))
        assert found.search is not None
        assert found.search.best is not None
        for one in found.alternatives:
            if "less simple" in one.because:
                zero = one.strategy.zero_stage - found.strategy.zero_stage
                stages = one.strategy.num_virtual_stages - found.strategy.num_virtual_stages
                assert one.fits
                assert zero > 0 or stages > 0 or one.changed not in ("zero_stage", "num_virtual_stages"), one.because


def test_offload_does_not_crowd_the_list_where_everything_fits() -> None:
    job = {
        "version": 1,
        "name": "easy",
        "model": "opt-1.3b",
        "batch": {"global_batch_size": 256, "sequence_length": 2048},
        "cluster": "a100-80gb-1x8",
    }
    assert [one.changed for one in plan(parse_job(job)).alternatives if one.strategy.offload.any] == []


def test_what_does_not_fit_says_by_how_much_and_where(made: Plan) -> None:
    reasons = [one.because for one in made.alternatives if not one.fits]
    assert reasons
    for reason in reasons:
        assert re.search(r"instead: [\d.]+ GiB( on stage \d+)?, [\d.]+ over", reason)


def test_the_plan_is_a_value_whose_json_searches_nothing(made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("searched")

    monkeypatch.setattr("orchestrator.planner.search.best_first.search", refuse)
    monkeypatch.setattr("orchestrator.planner.search.solve.search", refuse)
    monkeypatch.setattr("orchestrator.planner.problem.price_memory", refuse)
    assert made.to_dict()["alternatives"][0]["changed"] == made.alternatives[0].changed


def test_a_slower_link_is_answered_by_planning(made: Plan) -> None:
    rows = sensitivity(made.solution)
    assert [row["where"] for row in rows] == ["intra_node", "inter_node", "host_link"]
    for row in rows:
        assert row["best_step_s"] <= row["step_s"] * (1 + 1e-9)
        assert row["step_s"] >= made.price.time.step_s * (1 - 1e-9)


def test_the_text_shows_choice_bytes_time_speed_cost_and_others_in_88_columns(made: Plan) -> None:
    text = re.sub(r"\033\[[0-9;]*m", "", render(made, width=88))
    for word in ("strategy", "memory", "step", "tokens/s/GPU", "MFU", "days", "$", "others", "candidates"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_page_is_whole_and_asks_nothing_of_the_network(made: Plan) -> None:
    html = page(made)
    assert html.startswith("<!doctype html>")
    assert html.count("<section>") == html.count("</section>") >= 6
    assert html.count("<details>") == html.count("</details>") >= 10
    assert not re.search(r"(src|href)=|url\(|https?://", html)
    assert "prefers-color-scheme: dark" in html


def test_names_that_a_user_writes_are_escaped() -> None:
    html = page(
        plan(
            parse_job(
                {
                    "version": 1,
                    "name": "x",
                    "model": {"family": "opt", "num_layers": 2, "hidden_size": 64, "num_heads": 4},
                    "batch": {"global_batch_size": 4, "sequence_length": 64},
                    "cluster": {"gpu": "t4"},
                    "training": {"precision": "fp16"},
                }
            )
        )
    )
    assert "<script>" in html
    assert html.count("<script") == 1


@pytest.mark.parametrize(
    ("schedule", "virtual", "ranks", "micros"),
    [
        ("gpipe", 1, 4, 8),
        ("1f1b", 1, 4, 8),
        ("interleaved_1f1b", 2, 4, 8),
        ("interleaved_1f1b", 3, 2, 4),
        ("1f1b", 1, 8, 16),
    ],
)
def test_the_schedule_played_through_has_the_bubble_that_the_price_has(
    made: Plan, schedule: Any, virtual: int, ranks: int, micros: int
) -> None:
    choice = Choice(pipeline=ranks, schedule=schedule, virtual=virtual)
    bars = timeline(made.solution.problem.strategy(choice), num_micro_batches=micros)
    assert len(bars) == 2 * ranks * virtual * micros
    busy = sum(bar.end - bar.start for bar in bars) / ranks
    idle = max(bar.end for bar in bars) / busy - 1
    assert idle == pytest.approx(bubble_fraction(schedule, ranks, virtual, micros), abs=1e-9)


@pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zbv"])
def test_splitting_the_backward_shrinks_the_bubble(made: Plan, schedule: Any) -> None:
    choice = Choice(pipeline=4, schedule=schedule, virtual=2)
    bars = timeline(made.solution.problem.strategy(choice), num_micro_batches=8)
    busy = sum(bar.end - bar.start for bar in bars) / 4
    assert max(bar.end for bar in bars) / busy - 1 < 3 / 16
    for rank in range(4):
        mine = sorted((bar.start, bar.end) for bar in bars if bar.rank == rank)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(mine))


def test_capacity_answers_what_fits_and_the_smallest_that_does() -> None:
    from orchestrator.models.architecture import CATALOG

    question = Question(
        global_batch_size=64, sequence_length=2048, precision="bf16", tokens=10**9, tokens_per_second_per_gpu=1e9
    )
    table = capacity(
        [CATALOG["opt-6.7b"]], [1, 4], cluster_of=lambda n: load_cluster(f"a100-40gb-1x{n}"), question=question
    )
    assert [cell.num_gpus for cell in table.cells] == [1, 4]
    smallest = table.smallest["opt-6.7b"]
    assert smallest["fits_without_offload"] is not None
    assert 1 < smallest["fits_without_offload"].num_gpus <= 4
    assert smallest["meets_target"] is None
    assert any("smallest that fits" in line for line in told(table))
    assert table.to_dict()["smallest"]["opt-6.7b"]["meets_target"] is None


def capacity_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What the command prints as JSON."""
    assert main(["capacity", "--json", *arguments]) in (0, 3)
    return json.loads(capsys.readouterr().out)


def test_capacity_speaks_of_the_counts_that_were_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    asked = capacity_of(capsys, "--model", "llama-13b", "--gpu", "a100-80gb", "--gpus", "16,32")
    assert asked["smallest"]["llama-13b"] == {"fits": 16, "fits_without_offload": 16}


@pytest.mark.parametrize("model", ["llama-13b", "opt-30b"])
def test_of_a_range_the_smallest_is_looked_for_and_what_fits_without_offload_fits(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--model", model, "--gpu", "a100-80gb")
    found = capacity_of(capsys, *args, "--gpus", "4..32")["smallest"][model]
    assert 4 <= found["fits"] <= found["fits_without_offload"] < 8
    for size in range(4, found["fits_without_offload"]):
        (cell,) = capacity_of(capsys, *args, "--gpus", str(size))["cells"]
        assert not cell["without_offload"]["fits"]


def test_capacity_takes_a_cluster_and_a_price_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("gpu: a100-80gb\nnodes: 4\ngpus_per_node: 4\ninter_node_gbps: 100\nusd_per_gpu_hour: 3\n")
    args = ("--model", "opt-30b", "--tokens", "1e9")
    own = capacity_of(capsys, *args, "--cluster", str(file))
    assert [cell["num_gpus"] for cell in own["cells"]] == [1, 2, 4, 8, 16]
    assert (own["asked"]["gpus_per_node"], own["asked"]["usd_per_gpu_hour"]) == (4, 3)
    dear = capacity_of(capsys, *args, "--cluster", str(file), "--usd-per-gpu-hour", "6", "--gpus", "16")
    catalog = capacity_of(capsys, *args, "--gpu", "a100-80gb", "--gpus", "16")
    (slow, costly, fast) = own["cells"][-1], dear["cells"][0], catalog["cells"][0]
    assert costly["usd"] == pytest.approx(2 * slow["usd"])
    assert slow["tokens_per_second_per_gpu"] < fast["tokens_per_second_per_gpu"]
    one_plan = plan(
        parse_job(
            {
                "version": 1,
                "name": "same",
                "model": "opt-30b",
                "batch": {"global_batch_size": 1024, "sequence_length": 2048},
                "training": {"precision": "bf16"},
                "cluster": str(file),
            }
        )
    )
    assert slow["tokens_per_second_per_gpu"] == one_plan.tokens_per_second_per_gpu
    assert slow["throughput_error"] == one_plan.confidence["throughput_error"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpus", "8"], "--gpu a100-80gb, or --cluster FILE"),
        (["--gpu", "a100-80gb", "--cluster", "x.yaml"], "and not both"),
        (["--cluster", "missing.yaml"], "cannot read the cluster file"),
        (["--gpu", "a100-80bg"], "a100-80gb"),
        (["--gpu", "v100-32gb"], "training.precision bf16 cannot run on v100-32gb"),
        (["--gpu", "a100-80gb", "--budget-usd", "100"], "--tokens 300e9"),
    ],
)
def test_what_capacity_cannot_answer_is_said_and_how_to_fix_it(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["capacity", "--model", "opt-1.3b", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "to fix:" in error


def test_a_budget_needs_a_price_and_processors_are_not_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free, processors = tmp_path / "free.yaml", tmp_path / "cpu.yaml"
    write_cluster(free, replace(load_cluster("a100-80gb-1x2"), usd_per_gpu_hour=None))
    processors.write_text("gpu: cpu\nnodes: 1\ngpus_per_node: 2\n")
    asked = ["capacity", "--model", "opt-1.3b", "--tokens", "1e9", "--budget-usd", "100"]
    assert main([*asked, "--cluster", str(free)]) == 2
    assert "add --usd-per-gpu-hour" in capsys.readouterr().err
    assert main([*asked, "--cluster", str(free), "--usd-per-gpu-hour", "2"]) == 0
    assert "$2.00 a GPU-hour" in capsys.readouterr().out
    assert main([*asked, "--cluster", str(processors)]) == 2
    assert "capacity counts GPUs" in capsys.readouterr().err


def test_what_fits_but_takes_years_is_said_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page_file = tmp_path / "page.html"
    asked = [
        "--model",
        "llama-13b",
        "--gpu",
        "a100-80gb",
        "--gpus",
        "1,64",
        "--tokens",
        "300e9",
        "--finish-within",
        "60d",
    ]
    assert main(["capacity", *asked, "--html", str(page_file)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"smallest that fits: 1 GPU, but it takes \d\.\d years", text)
    assert re.search(r"smallest that meets every target: 64 GPUs, in \d+\.\d days", text)
    assert re.search(r"± \d\d%", text)
    html = page_file.read_text()
    for word in ("a100-80gb", "300B tokens", "done within 60.0 days", "$1.79", "stated error", "How long it takes"):
        assert word in html
    assert html.count('class="plate"') == html.count("tiny long") == 2  # the drawing of a wide screen and of a phone
    assert not re.search(r"(src|href)=|url\(|https?://(?!\S*[a-z])", html)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (967, 1042, [980, 1000, 1020, 1040]),
        (62, 140, [80, 100, 120, 140]),
        (3, 3, [3]),
        (0.012, 0.031, [0.015, 0.02, 0.025, 0.03]),
    ],
)
def test_an_axis_has_round_ticks(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_the_pipeline_is_drawn_for_a_phone_as_well() -> None:
    made = plan(
        parse_job(
            {
                "version": 1,
                "name": "piped",
                "model": "opt-13b",
                "batch": {"global_batch_size": 64, "sequence_length": 2048},
                "cluster": "a100-80gb-1x8",
                "strategy": {"pipeline_parallel_degree": 4},
            }
        )
    )
    section = re.search(r"<h2>Pipeline schedule</h2>.*?</section>", page(made))
    assert section is not None
    assert re.findall(r'viewBox="0 0 (\d+)', section[0]) == ["720", "360"]
    assert "scroll" not in section[0]


@pytest.mark.parametrize(("value", "text"), [(0, ""), (0.5, "█████"), (1.0, "█" * 10), (2.0, "█" * 10), (0.0125, "▏")])
def test_a_bar_has_eighths_and_never_leaves_its_columns(value: float, text: str) -> None:
    assert bar(value, 1.0, 10) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "12.3 ms"), (1.234, "1.23 s"), (300, "5.0 min"), (7200 * 2, "4.0 h"), (86400 * 3, "3.0 days")],
)
def test_seconds_are_told_in_the_unit_a_person_uses(value: float, text: str) -> None:
    assert seconds_told(value) == text


def test_bytes_are_told_in_gib_and_small_ones_in_mib() -> None:
    assert (bytes_told(3 * 2**30), bytes_told(5 * 2**20)) == ("3.0 GiB", "5 MiB")
