"""Tasks of a run on a node of a Ray cluster: tell the version of its code, look at folders, end a group's workers."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

Version = Mapping[str, str]


def make_version() -> Callable[[], dict[str, str]]:
    """Return a function that tells the version of Shardwise where it is called, and a digest of its source. It is made here so
    that Ray sends it whole: a node may have no Shardwise, or one without this module."""

    def version() -> dict[str, str]:
        import hashlib
        import importlib.metadata
        import importlib.util
        from pathlib import Path

        digest = hashlib.sha256()
        for package in ("clusters", "strategies", "orchestrator"):
            found = importlib.util.find_spec(package)
            if found is None or not found.submodule_search_locations:
                return {}
            root = Path(list(found.submodule_search_locations)[0])
            for file in sorted(root.rglob("*.py")):
                digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
        return {"version": importlib.metadata.version("shardwise"), "code": digest.hexdigest()[:12]}

    return version


def versions_told(node: str, theirs: Version, mine: Version) -> str:
    """Return that a node has another Shardwise than the run, with both versions."""
    if not theirs:
        return f"{node} has no Shardwise (`run` is {_told(mine)}). To fix: install the same on all nodes"
    return f"{node} has Shardwise {_told(theirs)}, and `run` is {_told(mine)}. To fix: install the same on all nodes"


def _told(version: Version) -> str:
    return f"{version['version']} with code {version['code']}"


@contextlib.contextmanager
def shared_word(folder: Path) -> Iterator[tuple[Path, Callable[[str], bool]]]:
    """Write a word into a folder that all nodes are to see; with it goes a function that tells whether a node has answered."""
    word = folder / f".shared-{secrets.token_hex(8)}"
    word.write_text(word.name)
    try:
        yield word, lambda node_id: _answer(word, node_id).exists()
    finally:
        for file in folder.glob(f"{word.name}*"):
            file.unlink(missing_ok=True)


def look(word: str, paths: Sequence[str]) -> list[str]:
    """Return which of the paths this node does not see; answers to the word that another node wrote."""
    import ray

    path = Path(word)
    try:
        if path.read_text() == path.name:
            _answer(path, ray.get_runtime_context().get_node_id()).touch()
    except OSError:
        return [str(path.parent)]
    return [each for each in paths if not Path(each).exists()]


def _answer(word: Path, node_id: str) -> Path:
    return word.with_name(f"{word.name}-{node_id}")


def not_shared_told(node: str, missing: Sequence[str]) -> str:
    """Return that a node does not see what the others see."""
    return (
        f"{node} does not see {', '.join(missing)}: all nodes must see the run folder and the weights at the same path. "
        "To fix: --directory FOLDER on a file system that they share, or a cluster of one node"
    )


def end_group(mark: str, leave_s: float) -> list[int]:
    """End the workers of a run on this node, after they had so long to leave; return the process ids of those that outlive
    SIGKILL."""
    from orchestrator.control.processes import GROUP_MARK, end_marked, gone, marked

    gone([process.pid for process in marked(mark, name=GROUP_MARK)], within_s=leave_s)
    return end_marked(mark, name=GROUP_MARK)
