"""The loop of Self-Instruct (arXiv:2212.10560, section 2.2): propose tasks, judge each, write instances, grow the pool.

What a round asks is a function of the seed, its number and what the rounds before it accepted; so a run that died asks the same
again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.training.self_instruct import prompts
from orchestrator.training.self_instruct.generator import Completion, Generator, Request
from orchestrator.training.self_instruct.heuristics import kept_instances, why_not_instruction
from orchestrator.training.self_instruct.journal import Journal, State
from orchestrator.training.self_instruct.similarity import Pool
from orchestrator.training.self_instruct.tasks import Task

PROPOSAL_TOKENS, LABEL_TOKENS, INSTANCE_TOKENS = 1024, 8, 512
"""Most tokens of the completions; the paper's are 1024, 3 and 300."""


class Barren(RuntimeError):
    """So many rounds in a row gave nothing that the generator will hardly give more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a run draws and judges."""

    seed: int
    temperature: float
    """Temperature of proposals; labels and instances are the likeliest ones."""
    top_p: float
    max_similarity: float
    """A candidate as similar as this to any instruction of the pool is left out (ROUGE-L; the paper's is 0.7)."""
    max_barren_rounds: int = 20
    """Rounds in a row without an accepted task, after which the run gives up."""


def identity(seeds: Sequence[Task], settings: Settings, generator: Generator) -> dict[str, Any]:
    """Return what the course of a run depends on, for its journal."""
    text = json.dumps([asdict(task) for task in seeds], ensure_ascii=False)
    return {
        "seeds": hashlib.sha256(text.encode()).hexdigest()[:16],
        "generator": generator.name,
        "seed": settings.seed,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_similarity": settings.max_similarity,
    }


class SelfInstruct:
    """One run: its seeds, its generator and its journal."""

    def __init__(self, seeds: Sequence[Task], generator: Generator, settings: Settings, journal: Journal) -> None:
        self._seeds = [task.instruction for task in seeds]
        self._generator, self._settings, self._journal = generator, settings, journal
        self._pool = Pool([*self._seeds, *(text for texts in journal.state.generated for text in texts)])

    def grow(self, count: int, changed: Callable[[State], None] = lambda state: None) -> None:
        """Goes on until `count` tasks are accepted in all. Raises Barren and GeneratorFailed; all decisions so far are kept."""
        state, barren = self._journal.state, 0
        while state.num_accepted < count:
            if state.num_decided == len(state.candidates):
                if barren == self._settings.max_barren_rounds:
                    raise Barren(f"{barren} rounds in a row gave no task that could be kept")
                self._propose()
                barren += 1
            else:
                event = self._decide(state.candidates[state.num_decided])
                barren = 0 if event["event"] == "accept" else barren
                self._journal.record(event)
            changed(state)

    def _propose(self) -> None:
        state = self._journal.state
        number = state.num_rounds
        before = [text for texts in state.generated for text in texts]
        shown = prompts.sampled(self._seeds, before, seed=self._settings.seed, round_number=number)
        completion = self._complete(
            prompts.propose(shown),
            PROPOSAL_TOKENS,
            (prompts.end_of_proposals(len(shown)),),
            of=f"{number}",
            temperature=self._settings.temperature,
        )
        found = prompts.proposals(completion.text, num_shown=len(shown), truncated=completion.truncated)
        self._journal.record({"event": "propose", "round": number, "shown": shown, "candidates": found})

    def _decide(self, instruction: str) -> dict[str, Any]:
        """The event that a candidate becomes."""
        state = self._journal.state
        at = {"round": state.num_rounds - 1, "candidate": state.num_decided, "instruction": instruction}

        def rejected(reason: str, **more: Any) -> dict[str, Any]:
            return {"event": "reject", **at, "reason": reason, **more}

        if reason := why_not_instruction(instruction):
            return rejected(reason)
        similarity, nearest = self._pool.nearest(instruction)
        compared = {"nearest": nearest, "similarity": round(similarity, 4)}
        if similarity >= self._settings.max_similarity:
            return rejected("too similar", **compared)
        of = f"{at['round']}/{at['candidate']}"
        answer = self._complete(prompts.classify(instruction), LABEL_TOKENS, (), of=f"{of}/kind")
        kind = prompts.is_classification(answer.text)
        if kind is None:
            return rejected("kind not told", completion=answer.text)
        prompt = prompts.instantiate(instruction, classification=kind)
        answer = self._complete(prompt, INSTANCE_TOKENS, (prompts.NEXT_TASK,), of=f"{of}/instances")
        instances = prompts.instances(answer.text, classification=kind, truncated=answer.truncated)
        kept = kept_instances(instances)
        if not kept:
            return rejected("no instance", completion=answer.text)
        self._pool.add(instruction)
        return {
            "event": "accept",
            **at,
            "is_classification": kind,
            **compared,
            "instances": [asdict(instance) for instance in kept],
        }

    def _complete(
        self, prompt: str, max_tokens: int, stop: tuple[str, ...], *, of: str, temperature: float = 0.0
    ) -> Completion:
        digest = hashlib.sha256(f"{self._settings.seed}/{of}".encode()).digest()
        return self._generator.complete(
            Request(
                prompt=prompt,
                max_tokens=max_tokens,
                stop=stop,
                temperature=temperature,
                top_p=self._settings.top_p,
                seed=int.from_bytes(digest[:4], "little") >> 1,
            )
        )
