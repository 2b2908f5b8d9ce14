"""The private names of Ray that embedding it needs: which they are, whether this version has them, what is done with them."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

WORKS = "ray>=2.52,<2.61"
"""Both ends were run. Below 2.52, Ray has no tokens: whoever reaches its ports may run code."""
OLDEST = (2, 52)
NAMES = (
    # (module, name in it, what must occur in the code of a function: an argument, or an attribute that it sets)
    ("ray._private.worker", "_global_node", ""),
    ("ray._private.node", "Node.__init__", "all_processes"),
    ("ray._private.node", "Node.start_api_server", "include_dashboard"),
    ("ray._private.parameter", "RayParams.__init__", "no_monitor"),
    ("ray._private.parameter", "RayParams.__init__", "include_log_monitor"),
)


def missing() -> str | None:
    """Return what a person is to do where this Ray cannot be embedded; None where it can."""
    found = version("ray")
    why = [
        f"it lacks {module}.{name}" + f" with {word}" * bool(word)
        for module, name, word in NAMES
        if not _has(module, name, word)
    ]
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        why.insert(0, "it has no token authentication")
    if not why:
        return None
    return f"Ray {found} cannot be used: {'; '.join(why)}. To fix: pip install '{WORKS}'"


def _has(module: str, name: str, word: str) -> bool:
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    code = getattr(found, "__code__", None)
    return not word or (code is not None and word in (*code.co_varnames, *code.co_names))


def leave_out_what_is_not_used() -> None:
    """An embedded Ray needs no autoscaler, log monitor or dashboard: three Python processes, each a CPU second at the start.
    ray.init has no argument for that."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    plain = RayParams.__init__

    def without(self: Any, *arguments: Any, **settings: Any) -> None:
        plain(self, *arguments, **{**settings, "no_monitor": True, "include_log_monitor": False})

    RayParams.__init__ = without
    Node.start_api_server = lambda self, **settings: None


def processes() -> list[tuple[str, Any]]:
    """(kind, process) of all that ray.init has started."""
    from ray._private import worker

    return [(kind, info.process) for kind, infos in worker._global_node.all_processes.items() for info in infos]
