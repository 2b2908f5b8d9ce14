"""Shardwise: plan, run, watch and repair the training of large language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.planner.plan import PlanError, plan
    from orchestrator.spec import SpecError, load_job, parse_job

__all__ = ["PlanError", "SpecError", "load_job", "parse_job", "plan"]

_HOME = {
    "load_job": "orchestrator.spec",
    "parse_job": "orchestrator.spec",
    "SpecError": "orchestrator.spec",
    "plan": "orchestrator.planner.plan",
    "PlanError": "orchestrator.planner.plan",
}


def __getattr__(name: str) -> Any:
    """Hands on the public names, each imported at its first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
