"""The four prompts of Self-Instruct, and what is read from the completions.

Pure: which tasks are shown is a function of the seed and the round. The order of steps is the paper's (arXiv:2212.10560,
section 2.2); the wording and the examples are ours. A prompt ends where the completion begins; a chat model may repeat that
beginning.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from orchestrator.training.self_instruct.tasks import Instance

NUM_SHOWN, NUM_GENERATED_SHOWN = 8, 2
"""Tasks in a prompt for new ones, and how many of them are generated ones; seeds where there are none yet."""
NUM_NEW = 8
"""New tasks that a prompt asks for."""

_PROPOSE = (
    "Below is a list of varied tasks that a language model can do by text alone. Continue the list with new tasks: different "
    "from all others in subject and kind, each in one or two sentences, some in English and some in Chinese if the list has "
    "both.\n\n"
)
_CLASSIFY = """\
Does the task have a small, fixed set of possible answers (labels)? Answer Yes or No.

Task: Decide whether the review is positive or negative.
Fixed labels: Yes

Task: Write a short thank-you note to a neighbour.
Fixed labels: No

Task: 判断下面的句子是陈述句还是疑问句。
Fixed labels: Yes

Task: 用三句话介绍你的家乡。
Fixed labels: No

Task: Name the odd one out of four given words.
Fixed labels: No

Task: Tell which of the topics sports, politics or science the headline belongs to.
Fixed labels: Yes

Task: """
_INPUT_FIRST = """\
Give examples for each task. Where a task needs no input, write "Input: none".

Task: Sort the numbers from small to large.
Example 1
Input: 9, 2, 5
Output: 2, 5, 9
Example 2
Input: 30, 10, 20, 40
Output: 10, 20, 30, 40

Task: 给出两个节约用水的建议。
Example 1
Input: none
Output: 1. 刷牙时关上水龙头。
2. 用洗菜的水浇花。

Task: Turn the sentence into the past tense.
Example 1
Input: She walks to work.
Output: She walked to work.

Task: """
_OUTPUT_FIRST = """\
Give, for each label of a task, an input to which the label is the answer.

Task: Decide whether the review is positive or negative.
Label: positive
Input: The soup was hot and the waiter was kind. We will come again.
Label: negative
Input: We waited an hour, and the food was cold.

Task: 判断下面的句子是陈述句还是疑问句。
Label: 陈述句
Input: 今天下午我们去公园。
Label: 疑问句
Input: 你几点下班？

Task: """
NEXT_TASK = "\nTask:"
"""Ends a completion that goes on with a further task."""
_NONE = frozenset({"", "none", "none.", "n/a", "无", "无。", "<noinput>"})
_TASK = re.compile(r"(?:^|\n)\s*Task\s*(\d+)\s*[:：.]")
_EXAMPLE = re.compile(r"(?:^|\n)\s*Example\s*\d+\s*[:：.]?[ \t]*(?=\n|$)")
_INPUT = re.compile(r"^\s*Input\s*[:：]", re.IGNORECASE)
_OUTPUT = re.compile(r"(?:^|\n)\s*Output\s*[:：]", re.IGNORECASE)
_LABEL = re.compile(r"(?:^|\n)\s*Label\s*[:：]", re.IGNORECASE)
_LABEL_INPUT = re.compile(r"\n\s*Input\s*[:：]", re.IGNORECASE)


def sampled(seeds: Sequence[str], generated: Sequence[str], *, seed: int, round_number: int) -> list[str]:
    """The instructions that a round shows: two generated ones and seeds up to eight, in random order; fewer where there are
    fewer. A function of the seed, the round and what was generated in the rounds before."""
    draw = random.Random(f"{seed}/{round_number}")
    shown = draw.sample(generated, min(NUM_GENERATED_SHOWN, len(generated)))
    shown += draw.sample(seeds, min(NUM_SHOWN - len(shown), len(seeds)))
    draw.shuffle(shown)
    return shown


def propose(shown: Sequence[str]) -> str:
    """The prompt for new instructions after those that are shown."""
    listed = "".join(f"Task {number}: {_one_line(text)}\n" for number, text in enumerate(shown, 1))
    return f"{_PROPOSE}{listed}Task {len(shown) + 1}:"


def end_of_proposals(num_shown: int) -> str:
    """Text that begins the first task beyond those asked for."""
    return f"\nTask {num_shown + NUM_NEW + 1}:"


def proposals(text: str, *, num_shown: int, truncated: bool) -> list[str]:
    """The new instructions of a completion, each once. What was cut off in the middle is left out, and so is what a chat model
    says before the list."""
    found = list(_TASK.finditer(text))
    if not found or int(found[0][1]) != num_shown + 1:
        text = f"Task {num_shown + 1}:{text}"
        found = list(_TASK.finditer(text))
    ends = [*(match.start() for match in found[1:]), len(text)]
    parts = [text[match.end() : end] for match, end in zip(found, ends, strict=True)]
    if truncated:
        parts = parts[:-1]
    return list(dict.fromkeys(line for part in parts[:NUM_NEW] if (line := _one_line(part))))


def classify(instruction: str) -> str:
    """The prompt that asks whether a task is a classification."""
    return f"{_CLASSIFY}{_one_line(instruction)}\nFixed labels:"


def is_classification(text: str) -> bool | None:
    """Return what a completion says: yes or no, None where it says neither."""
    word = re.match(r"\W*(?:fixed labels\s*[:：])?\W*(yes\b|no\b|不是|否|是)", text, re.IGNORECASE)
    return None if word is None else word[1].lower() in ("yes", "是")


def instantiate(instruction: str, *, classification: bool) -> str:
    """The prompt for instances of a task. Of a classification the label comes first: with the input first, models give one label
    nearly always."""
    asked = _one_line(instruction)
    return f"{_OUTPUT_FIRST}{asked}\nLabel:" if classification else f"{_INPUT_FIRST}{asked}\nExample 1\nInput:"


def instances(text: str, *, classification: bool, truncated: bool) -> list[Instance]:
    """The instances of a completion, without one that was cut off in the middle."""
    text = text.partition(NEXT_TASK)[0]
    found = _labelled(text) if classification else _in_order(text)
    return found[:-1] if truncated else found


def _in_order(text: str) -> list[Instance]:
    """Input, then output."""
    if not _INPUT.match(_EXAMPLE.sub("", text, count=1) if _EXAMPLE.match(text) else text):
        text = f"Input:{text}"
    found = []
    for part in _EXAMPLE.split(text):
        given, mark, output = _split(part, _OUTPUT)
        if mark and _INPUT.match(given):
            found.append(Instance(input=_given(_INPUT.sub("", given)), output=output.strip()))
    return found


def _labelled(text: str) -> list[Instance]:
    """Label, then input."""
    if not _LABEL.match(text):
        text = f"Label:{text}"
    found = []
    for part in _LABEL.split(text)[1:]:
        label, mark, given = _split(part, _LABEL_INPUT)
        if mark:
            found.append(Instance(input=_given(given), output=label.strip()))
    return found


def _split(text: str, mark: re.Pattern[str]) -> tuple[str, bool, str]:
    match = mark.search(text)
    return (text, False, "") if match is None else (text[: match.start()], True, text[match.end() :])


def _given(text: str) -> str:
    text = text.strip()
    return "" if text.lower() in _NONE else text


def _one_line(text: str) -> str:
    return " ".join(text.split())
