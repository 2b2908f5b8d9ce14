"""Generators complete a prompt: an endpoint or a local checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class GeneratorFailed(RuntimeError):
    """A generator that cannot go on: what is wrong, and in `.fix` what to do. What was accepted before is kept."""

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.fix = fix


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt, and how its completion is drawn."""

    prompt: str
    max_tokens: int
    stop: tuple[str, ...]
    """Texts that end the completion; none of them is in it."""
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A completion that a model wrote."""

    text: str
    truncated: bool
    """Whether max_tokens or the context cut it off."""


class Generator(Protocol):
    """A source of completions."""

    @property
    def name(self) -> str:
        """Name in the provenance of a sample."""

    def complete(self, request: Request) -> Completion:
        """Raises GeneratorFailed."""
