"""Writes a corpus of real text that every machine has: the sources of Python's own standard library, a document a file.

python examples/make_corpus.py examples/corpus/stdlib.jsonl
"""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path


def main(target: Path) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    sources = sorted(
        path
        for path in library.rglob("*.py")
        if not {"test", "tests", "site-packages"} & set(path.relative_to(library).parts)
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    num_characters = 0
    with partial.open("w", encoding="utf-8") as file:
        for path in sources:
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                num_characters += len(text)
                file.write(json.dumps({"text": text}) + "\n")
    partial.replace(target)
    print(f"{target}: {len(sources)} files of Python's standard library, {num_characters / 1e6:.1f} MB of text")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
