"""Self-Instruct: what is shown, read, and kept, as tables; the endpoint's faults; the loop, killed and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.training.collect import collect
from orchestrator.training.data import DataError
from orchestrator.training.examples import Message
from orchestrator.training.packing import Sample
from orchestrator.training.self_instruct import prompts
from orchestrator.training.self_instruct.endpoint import EndpointGenerator
from orchestrator.training.self_instruct.generator import GeneratorFailed, Request
from orchestrator.training.self_instruct.heuristics import kept_instances, why_not_instruction
from orchestrator.training.self_instruct.similarity import Pool, is_spaceless, rouge_l
from orchestrator.training.self_instruct.tasks import Instance, Task, read_seeds
from orchestrator.training.templates import AlpacaTemplate, encode
from orchestrator.training.tokenizer import train_bpe
from tests.completion_server import Served, drips, hangs_up, says, serving
from tests.speakers import kept_run, learned

SEEDS = Path(__file__).parents[2] / "examples" / "self_instruct_seeds.jsonl"

# Similarity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ("Write a poem.", "Write a poem.", 1.0),
        ("Write a poem.", "write, a: POEM", 1.0),
        ("Write a long poem", "Write a short poem", 2 * 3 / 8),
        ("one two three", "three two one", 2 * 1 / 6),
        ("给出三个建议。", "给出三个建议", 1.0),
        ("给出三个建议", "给出五个建议", 2 * 5 / 12),
        ("用 Python 写代码", "用 Java 写代码", 2 * 4 / 10),
        ("Назови три города", "Назови два города", 2 * 2 / 6),
        ("東京の人口は", "東京の面積は", 2 * 4 / 12),
        ("abc", "xyz", 0.0),
        ("...", "...", 0.0),
        ("", "abc", 0.0),
    ],
)
def test_rouge_l_is_over_words_and_over_chinese_characters(one, other, wanted):
    assert rouge_l(one, other) == pytest.approx(wanted)
    assert Pool([one]).nearest(other) == (pytest.approx(wanted), one if wanted else "")


def test_the_pool_gives_the_most_similar_instruction():
    pool = Pool(["Write a poem about rain", "列出五种水果", "Name the capital of a country"])
    assert pool.nearest("Name the capital of the country") == (pytest.approx(10 / 12), "Name the capital of a country")
    pool.add("Name the capital of the country")
    assert pool.nearest("name the capital of the country!")[0] == 1.0
    assert Pool().nearest("anything") == (0.0, "")


def test_a_pool_of_more_words_than_there_are_characters_before_the_surrogates_still_tells_them_apart():
    pool = Pool([" ".join(f"w{n}" for n in range(60_000))])
    assert pool.nearest("w55262 w55263 w55264 w59999")[0] == pytest.approx(2 * 4 / 60_004)


@pytest.mark.parametrize(
    ("text", "wanted"), [("用三句话介绍你自己", True), ("Say 你好 to them all", False), ("", False)]
)
def test_a_text_is_measured_in_characters_where_most_of_it_has_no_spaces(text, wanted):
    assert is_spaceless(text) == wanted


# Heuristics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("Suggest a name for a cat.", None),
        ("列出五种常见的水果。", None),
        ("2 + 2 is what number exactly?", None),
        ("Paragraph by paragraph, explain the contract.", None),  # no word `graph`
        ("计划一次周末旅行。", None),
        ("", "empty"),
        ("- Suggest a name for a cat.", "begins with punctuation"),
        ("“说说”你的家乡在哪里", "begins with punctuation"),
        ("Name a cat", "too short"),
        ("写首诗", "too short"),
        ("word " * 151, "too long"),
        ("长" * 301, "too long"),
        ("Describe the image of the cat.", "asks for more than text"),
        ("Explain what the Graph shows here.", "asks for more than text"),
        ("Go to the shop and buy milk.", "asks for more than text"),
        ("请描述这张图片里的动物。", "asks for more than text"),
        ("Write a program that sorts numbers.", "asks for a program"),
    ],
)
def test_instructions_are_left_out_by_length_beginning_and_what_they_ask_for(instruction, reason):
    assert why_not_instruction(instruction) == reason


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([("a", "b")], [("a", "b")]),
        ([("", "b")], [("", "b")]),
        ([("a", "")], []),
        ([("a", "a")], []),
        ([("a", "b"), ("a", "b"), ("c", "d")], [("a", "b"), ("c", "d")]),
        ([("a", "b"), ("a", "c"), ("d", "e")], [("d", "e")]),
    ],
)
def test_instances_are_left_out_that_teach_nothing_or_contradict(given, kept):
    assert [(one.input, one.output) for one in kept_instances([Instance(input=i, output=o) for i, o in given])] == kept


# Prompts and completions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_seeds", "num_generated", "wanted"),
    [(20, 20, (6, 2)), (20, 1, (7, 1)), (20, 0, (8, 0)), (3, 20, (3, 2)), (1, 0, (1, 0))],
)
def test_a_prompt_shows_two_generated_tasks_and_seeds_up_to_eight(num_seeds, num_generated, wanted):
    seeds, generated = [f"s{n}" for n in range(num_seeds)], [f"g{n}" for n in range(num_generated)]
    shown = prompts.sampled(seeds, generated, seed=1, round_number=3)
    assert Counter(text[0] for text in shown) == Counter(s=wanted[0], g=wanted[1])
    assert len(set(shown)) == len(shown)
    assert shown == prompts.sampled(seeds, generated, seed=1, round_number=3)


def test_rounds_and_seeds_show_different_tasks():
    seeds = [f"s{n}" for n in range(20)]
    drawn = {tuple(prompts.sampled(seeds, [], seed=s, round_number=r)) for s in range(3) for r in range(5)}
    assert len(drawn) == 15


@pytest.mark.parametrize(
    ("text", "truncated", "wanted"),
    [
        (" Sort them.\nTask 4: Name\n  two.\nTask 5：写诗。", False, ["Sort them.", "Name two.", "写诗。"]),
        (" Sort them.\nTask 4: Name tw", True, ["Sort them."]),
        ("Task 3: Sort them.\nTask 4: Name two.", False, ["Sort them.", "Name two."]),
        ("Sure! Here they are:\n\nTask 3: Sort them.", False, ["Sort them."]),
        (" Sort them.\nTask 4: Sort them.\nTask 5:\nTask 6: Go.", False, ["Sort them.", "Go."]),
        ("\n".join(f"Task {n}: t{n}" for n in range(3, 30)), False, [f"t{n}" for n in range(3, 11)]),
        ("", False, []),
        ("half", True, []),
    ],
)
def test_new_instructions_are_read_from_a_list_that_goes_on(text, truncated, wanted):
    assert prompts.proposals(text, num_shown=2, truncated=truncated) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (" Yes", True), ("No.", False), ("\n\nYES\nTask", True), ("Fixed labels: No", False), ("**Yes**", True), ("是的。", True),
        ("否", False), ("不是", False), ("", None), ("Perhaps", None), ("Nobody knows", None), ("Yesterday", None),
    ],
)  # fmt: skip
def test_yes_and_no_are_read_and_nothing_else_is(text, wanted):
    assert prompts.is_classification(text) is wanted


@pytest.mark.parametrize(
    ("text", "truncated", "wanted"),
    [
        (" a\nOutput: b", False, [("a", "b")]),
        (" none\nOutput: b\nc", False, [("", "b\nc")]),
        (" a\nOutput: b\nExample 2\nInput: 无\nOutput: d", False, [("a", "b"), ("", "d")]),
        (" a\nOutput: b\nExample 2\nInput: c\nOutput: d", True, [("a", "b")]),
        ("Example 1\nInput: a\nOutput: b\n\nTask: another\nExample 1\nInput: x\nOutput: y", False, [("a", "b")]),
        ("Input： 甲\nOutput： 乙", False, [("甲", "乙")]),
        (" a, and no output at all", False, []),
        ("", False, []),
    ],
)
def test_instances_of_a_task_are_read_input_first(text, truncated, wanted):
    found = prompts.instances(text, classification=False, truncated=truncated)
    assert [(one.input, one.output) for one in found] == wanted


@pytest.mark.parametrize(
    ("text", "truncated", "wanted"),
    [
        (" good\nInput: a\nLabel: bad\nInput: b", False, [("a", "good"), ("b", "bad")]),
        (" good\nInput: a\nLabel: bad\nInput: b", True, [("a", "good")]),
        ("Label: good\nInput: a\nTask: next\nLabel: x\nInput: y", False, [("a", "good")]),
        (" good, and no input", False, []),
    ],
)
def test_instances_of_a_classification_are_read_label_first(text, truncated, wanted):
    found = prompts.instances(text, classification=True, truncated=truncated)
    assert [(one.input, one.output) for one in found] == wanted


# Seeds ---------------------------------------------------------------------------------------------------------------


def test_the_seeds_of_the_examples_are_tasks_in_two_languages_that_pass_our_own_filters():
    seeds = read_seeds(SEEDS)
    chinese = [seed for seed in seeds if is_spaceless(seed.instruction)]
    assert (len(seeds), len(chinese)) == (22, 9)
    pool = Pool()
    for seed in seeds:
        assert why_not_instruction(seed.instruction) is None, seed.instruction
        assert pool.nearest(seed.instruction)[0] < 0.7, seed.instruction
        assert kept_instances(seed.instances) == seed.instances
        pool.add(seed.instruction)


def test_seeds_are_read_in_both_forms_from_lines_and_from_a_list(tmp_path):
    records = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {
            "id": "seed_1",
            "instruction": "问好",
            "instances": [{"input": "", "output": "你好"}],
            "is_classification": False,
        },
    ]
    wanted = [
        Task(instruction="Add.", instances=(Instance(input="1 and 2", output="3"),)),
        Task(instruction="问好", instances=(Instance(input="", output="你好"),)),
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert read_seeds(tmp_path / "a.json") == read_seeds(tmp_path / "a.jsonl") == wanted


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "s.jsonl:2: is not JSON"),
        ("[]", "s.jsonl:2: is no object"),
        ('{"instruction": " ", "output": "a"}', "instruction is missing, empty or no text"),
        ('{"instruction": "a"}', "output is missing, empty or no text"),
        ('{"instruction": "a", "instances": []}', "instances is no list"),
        ('{"instruction": "a", "instances": [{"input": "", "output": ""}]}', r"instances\[0\]\.output is missing"),
        ('{"instruction": "\\ud800", "output": "a"}', "holds half a character"),
    ],
)
def test_a_seed_that_is_none_is_told_by_file_and_line(tmp_path, line, told):
    (tmp_path / "s.jsonl").write_text('{"instruction": "fine", "output": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=told):
        read_seeds(tmp_path / "s.jsonl")


# The endpoint --------------------------------------------------------------------------------------------------------

ASKED = Request(prompt="Say hi", max_tokens=9, stop=("\nTask:",), temperature=0.5, top_p=0.9, seed=7)


def endpoint(served: Served, **changes) -> EndpointGenerator:
    return EndpointGenerator(
        **{"url": served.url, "model": "m", "backoff_s": 0.01, "num_attempts": 3, "timeout_s": 5} | changes
    )


@pytest.mark.parametrize(
    ("api", "wanted"),
    [
        ("chat", {"path": "/v1/chat/completions", "messages": [{"role": "user", "content": "Say hi"}]}),
        ("completions", {"path": "/v1/completions", "prompt": "Say hi"}),
    ],
)
def test_an_endpoint_is_asked_in_the_form_of_its_api(api, wanted):
    with serving() as served:
        served.answer = lambda prompt, seed: f"{prompt} {seed} 好"
        served.finish_reason = "length"
        got = endpoint(served, api=api, key="sk-1").complete(ASKED)
    same = {"model": "m", "max_tokens": 9, "stop": ["\nTask:"], "temperature": 0.5, "top_p": 0.9, "seed": 7}
    assert served.asked == [wanted | same]
    assert served.headers[0]["Authorization"] == "Bearer sk-1"
    assert (got.text, got.truncated) == ("Say hi 7 好", True)


@pytest.mark.parametrize(
    "fault",
    [
        says(500, "oops"),
        says(503),
        says(429, "slow down", Retry_After="0"),
        says(200, "no json"),
        says(200, '{"choices": []}'),
        says(200, '{"choices": [{"message": {"content": null}}]}'),
        says(200, '{"choices": [{"message": {"content": "\\ud800"}}]}'),
        hangs_up,
        drips,
    ],
    ids=["500", "503", "429", "no json", "no choice", "no content", "half a character", "hangs up", "never ends"],
)
def test_a_fault_that_may_pass_is_met_by_asking_again(fault):
    with serving() as served:
        served.answer = lambda prompt, seed: "hi"
        served.faults = [fault, fault]
        assert endpoint(served, timeout_s=0.3).complete(ASKED).text == "hi"
        assert len(served.asked) == 3


def test_an_endpoint_that_stays_silent_is_given_up_with_what_it_said_last():
    with serving() as served:
        served.delay_s = 1.0
        started = time.monotonic()
        with pytest.raises(GeneratorFailed, match="failed 2 times, the last time so: TimeoutError"):
            endpoint(served, timeout_s=0.1, num_attempts=2).complete(ASKED)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("code", "fix"),
    [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "check --endpoint"), (302, "check --endpoint")],
)
def test_what_the_user_has_to_mend_is_told_at_once_without_the_key(code, fix):
    with serving() as served:
        served.faults = [says(code, "key sk-secret is not known", Location=f"{served.url}/elsewhere")]
        with pytest.raises(GeneratorFailed, match=f"HTTP {code}.*the key. is not known") as error:
            endpoint(served, key="sk-secret").complete(ASKED)
        assert len(served.asked) == 1
    assert "sk-secret" not in str(error.value)
    assert fix in error.value.fix


@pytest.mark.parametrize(
    ("url", "key", "told"),
    [
        ("ftp://host/v1", None, "no http:// or https:// address"),
        ("file:///etc/passwd", None, "no http:// or https:// address"),
        ("host:80/v1", None, "no http:// or https:// address"),
        ("http://example.org/v1", "sk-1", "would carry the key of OPENAI_API_KEY readable"),
        ("https://example.org/v1", "sk\n1", "holds a character that no HTTP header can carry"),
    ],
)
def test_an_address_that_is_none_or_would_show_the_key_is_refused(url, key, told):
    with pytest.raises(ValueError, match=told):
        EndpointGenerator(url=url, model="m", key=key)


# The loop ------------------------------------------------------------------------------------------------------------


def arguments(served: Served, out: Path, *more: str) -> list[str]:
    return ["self-instruct", str(SEEDS), str(out), "--endpoint", served.url, "--model", "m", "--seed", "5", *more]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_pool_grows_to_the_count_and_sft_reads_the_samples(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    with serving() as served:
        served.faults = [None, says(200, "garbage"), None, hangs_up]
        assert main(arguments(served, out, "--count", "12", "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    samples, events = lines(out), lines(tmp_path / "out.jsonl.journal")
    accepted = [event for event in events if event["event"] == "accept"]
    assert told["tasks"] == len(accepted) == 12
    assert told["samples"] == len(samples) == sum(len(event["instances"]) for event in accepted)
    assert told["rounds"] == sum(event["event"] == "propose" for event in events)
    assert told["rejected"] == Counter(event["reason"] for event in events if event["event"] == "reject")
    assert {"asks for more than text", "too short"} <= told["rejected"].keys()
    assert len(collect([out], "sft").places) == len(samples)
    pool = Pool(seed.instruction for seed in read_seeds(SEEDS))
    for event in accepted:
        assert why_not_instruction(event["instruction"]) is None
        similarity, _ = pool.nearest(event["instruction"])
        assert event["similarity"] == pytest.approx(similarity, abs=1e-4)
        assert similarity < 0.7
        pool.add(event["instruction"])
    first = samples[0]
    assert first.keys() == {"instruction", "input", "output", "provenance"}
    assert first["provenance"] | {"nearest": "", "similarity": 0} == {
        "generator": f"m at {served.url.split('/')[2]}",
        "seed": 5,
        "round": 0,
        "candidate": accepted[0]["candidate"],
        "is_classification": accepted[0]["is_classification"],
        "nearest": "",
        "similarity": 0,
    }
    assert any(sample["provenance"]["is_classification"] for sample in samples)


def cut_last_line(out: Path) -> None:
    """What a death in the middle of writing a decision down leaves."""
    journal = out.with_name(out.name + ".journal")
    raw = journal.read_bytes()
    last = json.loads(raw.splitlines()[-1])
    journal.write_bytes(raw[:-7])
    samples = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(samples[: len(samples) - len(last["instances"])]))


def cut_samples(out: Path) -> None:
    """What a death between journal and samples leaves, in the middle of a character even."""
    raw = out.read_bytes()
    out.write_bytes(raw[: raw.rindex("好".encode()) + 1])


@pytest.mark.parametrize("death", [lambda out: None, cut_last_line, cut_samples, Path.unlink])
def test_a_run_goes_on_where_it_stopped_with_the_same_samples_as_one_that_never_did(tmp_path, capsys, death):
    with serving() as served:
        assert main(arguments(served, tmp_path / "whole.jsonl", "--count", "9")) == 0
        whole = served.asked
        served.asked = []
        parted = tmp_path / "parted.jsonl"
        assert main(arguments(served, parted, "--count", "4")) == 0
        death(parted)
        assert main(arguments(served, parted, "--count", "9")) == 0
    assert parted.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    again = Counter(map(str, served.asked)) - Counter(map(str, whole))
    assert again.total() <= (2 if death is cut_last_line else 0), "at most the requests of the decision that was lost"
    served.asked = []
    assert main(arguments(served, parted, "--count", "9")) == 0
    assert served.asked == []


def test_a_run_that_is_killed_at_any_moment_goes_on(tmp_path):
    command = [sys.executable, "-m", "orchestrator.cli"]
    with serving() as served:
        assert main(arguments(served, tmp_path / "whole.jsonl", "--count", "20")) == 0
        num_requests, out = len(served.asked), tmp_path / "killed.jsonl"
        served.delay_s = 0.01
        for part in (1, 2, 3):
            served.asked = []
            child = subprocess.Popen([*command, *arguments(served, out, "--count", "20")])
            deadline = time.monotonic() + 60
            while len(served.asked) < num_requests // 5 and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            os.kill(child.pid, signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL, f"the run ended before its kill in part {part}"
        assert main(arguments(served, out, "--count", "20")) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_an_endpoint_that_fails_ends_the_run_and_keeps_what_was_accepted(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    with serving() as served:
        served.faults = [None] * 12 + [says(401, "no such key")]
        assert main(arguments(served, out)) == 1
        shown = capsys.readouterr()
        assert f"{out}: " in shown.out
        assert "refuses the request: HTTP 401" in shown.err
        assert "OPENAI_API_KEY" in shown.err
        kept = out.read_bytes()
        assert kept
        assert main(arguments(served, out, "--count", "8")) == 0
    assert out.read_bytes().startswith(kept)


def test_a_generator_that_gives_nothing_is_given_up(tmp_path, capsys):
    with serving() as served:
        served.answer = lambda prompt, seed: "I cannot do that."
        assert main(arguments(served, tmp_path / "out.jsonl")) == 1
        assert len(served.asked) == 40
    shown = capsys.readouterr()
    assert "20 rounds in a row gave no task that could be kept" in shown.err
    assert "rejected   20: 20 kind not told" in shown.out


def test_what_is_not_the_same_run_is_refused(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    with serving() as served:
        out.write_text("mine\n")
        assert main(arguments(served, out)) == 2
        assert "no Self-Instruct run left it" in capsys.readouterr().err
        out.unlink()
        assert main(arguments(served, out, "--count", "2")) == 0
        assert main(arguments(served, out, "--count", "2", "--max-similarity", "0.5")) == 2
        assert "was begun otherwise: max_similarity 0.7 then and 0.5 now" in capsys.readouterr().err
        out.write_text("mine\n")
        assert main(arguments(served, out, "--count", "3")) == 2
        assert "was changed since the run wrote it" in capsys.readouterr().err
        (tmp_path / "out.jsonl.journal").write_text('{"event": "begin"}\n{"event": "accept"}\n')
        assert main(arguments(served, out)) == 2
        assert "out.jsonl.journal:2 was altered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--endpoint", "nowhere", "--model", "m"], "no http:// or https:// address"),
        (["--model", "nobody"], "there is no run nobody"),
        (["--model", "nobody", "--api", "chat"], "--api is of an endpoint"),
    ],
)
def test_a_wrong_generator_is_told(tmp_path, capsys, more, told):
    assert main(["self-instruct", str(SEEDS), str(tmp_path / "out.jsonl"), *more]) in (2, 6)
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_local_checkpoint_writes_samples(tmp_path, capsys):
    """It was taught by heart what to say to the three prompts that its first task takes."""
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text(json.dumps({"instruction": "Greet.", "output": "Hi."}) + "\n")
    new = "Name a day of rest."
    known = [
        (prompts.propose(["Greet."]), f" {new}\nTask 3: Say"),
        (prompts.classify(new), " No"),
        (prompts.instantiate(new, classification=False), " none\nOutput: 周日"),
    ]
    tokenizer = train_bpe((prompt + text for prompt, text in known), 600)
    samples: list[Sample] = []
    for prompt, text in known:
        asked = (Message(role="user", content=prompt), Message(role="assistant", content=text))
        samples.append(encode(asked, AlpacaTemplate(), tokenizer))
    longest = max(len(sample.ids) for sample in samples)
    model = learned(samples, vocab_size=tokenizer.vocab_size, max_position=longest + 30)
    kept_run(tmp_path / "runs" / "teacher", model, tokenizer=tokenizer, job={"name": "teacher", "task": "sft"})
    out = tmp_path / "out.jsonl"
    command = ["self-instruct", str(seeds), str(out), "--model", "teacher", "--directory", str(tmp_path / "runs")]
    assert main([*command, "--count", "1", "--temperature", "0"]) == 0
    assert f"{out}: 1 of 1 tasks, 1 samples, after 1 rounds" in capsys.readouterr().out
    (sample,) = lines(out)
    assert (sample["instruction"], sample["input"], sample["output"]) == (new, "", "周日")
    assert sample["provenance"]["generator"] == "teacher/step-00000001"
