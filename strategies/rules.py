"""Rules between choices: combinations that are impossible, and settings that change nothing. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from strategies.strategy import Strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A combination of choices that is impossible or has no effect. Each room states its own; rooms.py folds over them."""

    fields: tuple[str, ...]
    """The choices that meet, the one to change first."""
    applies: Callable[[Strategy], bool]
    reason: str
    """A sentence that may name any field of the strategy in braces."""
    fix: str

    def formatted(self, strategy: Strategy) -> str:
        """Return the reason with the strategy's own values put in."""
        return self.reason.format_map(_Fields(strategy))


class _Fields(dict[str, object]):
    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def __missing__(self, name: str) -> object:
        return getattr(self.strategy, name)
