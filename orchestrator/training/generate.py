"""Text from a checkpoint: the weights in one process, one token after the other.

Keys and values are kept, so a token costs a forward pass over itself alone, until the text is longer than the model's positions:
from there on each costs one over the whole window. Good for looking at what a model learned, not for serving it.
S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from orchestrator.models.context import Cache, Context, prefixed
from orchestrator.models.decoder import Decoder
from orchestrator.training.adapters import lora_of, whole_weights
from orchestrator.training.blanks import Specials
from orchestrator.training.checkpoint import Reader
from orchestrator.training.manifest import CheckpointRef, architecture_of, verify_files


def load_model(ref: CheckpointRef) -> Decoder:
    """The model of a checkpoint of any strategy, whole, in fp32; adapters are merged into the weights that they stand on. Raises
    CheckpointRefused, and ValueError where those weights are not whole."""
    arch = architecture_of(ref)
    with torch.device("meta"):
        model = Decoder(arch)
    if lora_of(ref, arch) is not None:
        merged = whole_weights(verify_files(ref), arch)
        first = next(merged)  # what is refused is refused before memory is taken
        model = model.to(torch.float32).to_empty(device="cpu").eval().requires_grad_(False)
        for name, tensor in chain([first], merged):
            model.get_parameter(name).copy_(tensor)
        return model
    reader = Reader(verify_files(ref))
    reader.refuse_unfit({f"model.{name}": parameter for name, parameter in model.named_parameters()})
    model = model.to(torch.float32).to_empty(device="cpu").eval().requires_grad_(False)
    targets: dict[str, Any] = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    reader.fill(targets)
    return model


@torch.inference_mode()
def generate(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    vocab_size: int,
    end_of_text: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """New token ids, at most max_tokens, until end_of_text, which is not among them; the same seed gives the same.

    Args:
        prompt: at least one id. Of what is longer than the position table its last part is seen.
        vocab_size: of the tokenizer; the model's table may be padded beyond it.
        temperature: 0 takes the likeliest token always.
        top_p: the smallest set of tokens whose probabilities reach it (nucleus sampling, arXiv:1904.09751).
    """
    if not prompt:
        raise ValueError("the prompt holds no token; give at least one character")
    window = model.arch.max_position
    generator = torch.Generator().manual_seed(seed)
    tokens, cache, cached = list(prompt), Cache(), 0
    for _ in range(max_tokens):
        if len(tokens) > window:  # the window moves on, and with it every position
            logits_BSV = model(torch.tensor([tokens[-window:]]))
        else:
            new = torch.tensor([tokens[cached:]])
            logits_BSV = model(new, after(cached, new.shape[1], cache))
            cached = len(tokens)
        token = choose(logits_BSV[0, -1, :vocab_size], temperature=temperature, top_p=top_p, generator=generator)
        if token == end_of_text:
            return
        tokens.append(token)
        yield token


@torch.inference_mode()
def fill(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    vocab_size: int,
    specials: Specials,
    end_of_text: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield new token ids that a model of blank filling writes for the rest of a text whose beginning is the prompt, at most
    max_tokens, until it ends the span or the text; see generate.

    Raises ValueError where max_tokens leaves the prompt no position: positions belong to the whole text, so no window moves."""
    room = model.arch.max_position - 2 - max_tokens
    if room < 1:
        raise ValueError(
            f"{max_tokens} new tokens leave no room for a prompt among {model.arch.max_position} positions: ask for at most "
            f"{max(1, model.arch.max_position - 3)}"
        )
    text = [*prompt[-room:], specials.document_mask, specials.start]
    place, generator, cache = len(text) - 2, torch.Generator().manual_seed(seed), Cache()
    allowed_V = torch.arange(model.arch.vocab_size) < vocab_size
    allowed_V[[specials.mask, specials.document_mask, specials.start]] = False
    allowed_V[specials.end] = True
    for written in range(max_tokens):
        new = text if not written else text[-1:]
        of_new_Q = torch.arange(len(text) - len(new), len(text))
        within_Q = (of_new_Q - place).clamp(min=0)
        position_Q = of_new_Q.clamp(max=place) if model.arch.traits.block_positions else of_new_Q
        whole = prefixed(torch.tensor([place + 1]), torch.zeros(1, 2, len(text), dtype=torch.int64))
        context = Context(position_Q[None], whole.seen_B1QS[:, :, of_new_Q], cache, within_Q[None])
        logits_V = model(torch.tensor([new]), context)[0, -1].masked_fill(~allowed_V, float("-inf"))
        token = choose(logits_V, temperature=temperature, top_p=top_p, generator=generator)
        if token in (specials.end, end_of_text):
            return
        text.append(token)
        yield token


def after(num_cached: int, num_new: int, cache: Cache) -> Context:
    """The context of new tokens that follow those in a cache, for rows without padding."""
    places_S = torch.arange(num_cached + num_new)
    new_Q = places_S[num_cached:]
    return Context(new_Q[None], (places_S[None, :] <= new_Q[:, None])[None, None], cache)


def choose(logits_V: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token id, drawn from the logits."""
    if temperature == 0:
        return int(logits_V.argmax())
    descending_V, ids_V = (logits_V.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    # A token stays if those before it do not reach top_p yet; the first always does.
    kept_V = descending_V.cumsum(-1) - descending_V < top_p
    kept_V[0] = True
    drawn = torch.multinomial(descending_V * kept_V, 1, generator=generator)
    return int(ids_V[drawn])
