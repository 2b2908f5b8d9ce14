"""Every loser has one reason with its number; the page and the text show what the plan holds."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest

from orchestrator.planner import explain
from orchestrator.planner.capacity import Question, capacity, told
from orchestrator.planner.html import capacity_page, page
from orchestrator.planner.plan import Plan, plan
from orchestrator.planner.problem import Choice
from orchestrator.planner.render import bar, bytes_told, render, seconds_told
from orchestrator.spec import parse_job
from strategies.pipeline.cost import bubble_fraction
from strategies.pipeline.timeline import timeline


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


def test_every_loser_has_one_reason_with_a_number(made: Plan) -> None:
    losers = made.alternatives
    assert len(losers) == 20
    assert all(re.search(r"\d", loser.because) or loser.because == "as fast, and less simple" for loser in losers)
    speeds = [loser.tokens_per_second_per_gpu for loser in losers]
    assert speeds == sorted(speeds, reverse=True)


def test_losers_are_the_best_of_other_families(made: Plan) -> None:
    def family(strategy: Any) -> tuple[Any, ...]:
        return (
            strategy.tensor_parallel_degree,
            strategy.pipeline_parallel_degree,
            strategy.zero_stage,
            strategy.offload,
        )

    families = [family(made.strategy), *(family(loser.strategy) for loser in made.alternatives)]
    assert len(set(families)) == len(families)


def test_what_does_not_fit_says_by_how_much_and_where(made: Plan) -> None:
    reasons = [loser.because for loser in made.alternatives if not loser.fits]
    assert reasons
    for reason in reasons:
        assert re.search(r"ZeRO \d.*: [\d.]+ GiB( on stage \d+)?, [\d.]+ over", reason)


def test_a_slower_link_is_answered_by_planning(made: Plan) -> None:
    rows = explain.sensitivity(made.solution)
    assert [row["where"] for row in rows] == ["intra_node", "inter_node", "host_link"]
    for row in rows:
        assert row["best_step_s"] <= row["step_s"] * (1 + 1e-9)
        assert row["step_s"] >= made.price.time.step_s * (1 - 1e-9)


def test_the_text_shows_choice_bytes_time_speed_cost_and_losers_in_88_columns(made: Plan) -> None:
    text = re.sub(r"\033\[[0-9;]*m", "", render(made, width=88))
    for word in ("strategy", "memory", "step", "tokens/s/GPU", "MFU", "days", "$", "losers", "candidates"):
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
    from clusters.catalog import load_cluster
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
    assert "<svg" in capacity_page(table)
    assert table.to_dict()["smallest"]["opt-6.7b"]["meets_target"] is None


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
