"""Rules for which generated instructions and instances are kept, by their text alone (arXiv:2212.10560, 2.2, 4).

Every rule gives a reason to count by, or None.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from orchestrator.training.self_instruct.similarity import is_spaceless, tokens
from orchestrator.training.self_instruct.tasks import Instance

WORDS = (4, 150)
"""Shortest and longest instruction; the paper's code leaves out those of 3 words or less."""
CHARACTERS = (5, 300)
"""The same, where a script has no spaces."""
KEYWORDS = (
    "image", "images", "graph", "graphs", "picture", "pictures", "photo", "photos", "file", "files", "map", "maps", "draw",
    "plot", "go to", "video", "videos", "audio", "music", "flowchart", "diagram", "chart",
)  # fmt: skip
KEYWORDS_WITHOUT_SPACES = (
    "图片", "图像", "图表", "照片", "图形", "地图", "绘制", "画出", "画一", "视频", "音频", "音乐", "文件", "流程图", "示意图",
)  # fmt: skip
_KEYWORD = re.compile(rf"\b(?:{'|'.join(KEYWORDS)})\b|{'|'.join(KEYWORDS_WITHOUT_SPACES)}", re.IGNORECASE)


def why_not_instruction(instruction: str) -> str | None:
    """Why an instruction is left out: its length, what a model of text cannot do, how it begins."""
    if not instruction:
        return "empty"
    if not instruction[0].isalnum():
        return "begins with punctuation"
    length = len(tokens(instruction))
    shortest, longest = CHARACTERS if is_spaceless(instruction) else WORDS
    if length < shortest:
        return "too short"
    if length > longest:
        return "too long"
    if _KEYWORD.search(instruction):
        return "asks for more than text"
    if instruction.lower().startswith("write a program"):
        return "asks for a program"
    return None


def kept_instances(instances: Sequence[Instance]) -> tuple[Instance, ...]:
    """The instances that can teach something: with an output that is not the input again, each input once. Of an input with two
    different outputs none is kept."""
    outputs: dict[str, set[str]] = {}
    for instance in instances:
        outputs.setdefault(instance.input, set()).add(instance.output)
    kept = dict.fromkeys(
        instance
        for instance in instances
        if instance.output and instance.output != instance.input and len(outputs[instance.input]) == 1
    )
    return tuple(kept)
