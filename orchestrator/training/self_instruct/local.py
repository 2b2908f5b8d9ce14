"""A local checkpoint as a generator. A model that was taught to answer is asked by its template; any other goes on from the
prompt."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.models.decoder import Decoder
from orchestrator.training.chat import Answer, ContextFull, Ends, Sampling, ends_of
from orchestrator.training.examples import Message
from orchestrator.training.self_instruct.generator import Completion, GeneratorFailed, Request
from orchestrator.training.templates import Template, encode
from orchestrator.training.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class LocalGenerator:
    """A model in this process."""

    name: str
    model: Decoder
    tokenizer: Tokenizer
    template: Template | None
    """None: the prompt is gone on from as it is."""

    def complete(self, request: Request) -> Completion:
        sampling = Sampling(
            max_tokens=request.max_tokens, temperature=request.temperature, top_p=request.top_p, seed=request.seed
        )
        ends = Ends(texts=request.stop)
        if self.template is None:
            ids = self.tokenizer.encode(request.prompt)
        else:
            asked = (Message(role="user", content=request.prompt),)
            ids = encode(asked, self.template, self.tokenizer).ids.tolist()
            own = ends_of(self.template, self.tokenizer)
            ends = Ends(tokens=own.tokens, texts=(*own.texts, *request.stop))
        try:
            answer = Answer(self.model, self.tokenizer, ids, ends, sampling)
        except ContextFull:
            raise GeneratorFailed(
                f"a prompt has {len(ids):,} tokens, and the model sees {self.model.arch.max_position:,}",
                "choose a model with a longer context, or shorter seed tasks",
            ) from None
        for _ in answer:
            pass
        return Completion(text=answer.text, truncated=answer.ended != "end_of_answer")
