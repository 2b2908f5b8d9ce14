"""The README's console blocks are what the commands print. `python -m tests.golden.test_readme` writes them anew."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```console\n\$ (?P<command>[^\n]+)\n(?P<output>.*?)```", re.DOTALL)
SEARCH_TIME = re.compile(r"; [\d.]+ m?s$", re.MULTILINE)
"""The one number that differs from run to run."""


def printed(command: str) -> str:
    """What a person with 80 columns sees."""
    name, *arguments = shlex.split(command)
    assert name == "shardwise", f"README runs {name}; only shardwise is tried here"
    result = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return result.stdout + result.stderr


def test_console_blocks_show_what_the_commands_print() -> None:
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert blocks
    for command, output in blocks:
        assert SEARCH_TIME.sub("", output) == SEARCH_TIME.sub("", printed(command)), (
            f"README's output of `{command}` is old: python -m tests.golden.test_readme"
        )


def refresh() -> None:
    readme = ROOT / "README.md"
    text = BLOCK.sub(lambda m: f"```console\n$ {m['command']}\n{printed(m['command'])}```", readme.read_text())
    readme.write_text(text)


if __name__ == "__main__":
    refresh()
