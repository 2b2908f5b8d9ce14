"""Responses that an actor writes to prompts: rows at once, keys and values kept, noise by seed, step, row and position.

Rows are generated in chunks of a fixed size, whatever the strategy, so that a matrix product has the same shape everywhere.
B rows, P tokens of the longest prompt, S positions, Q queries, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.models.context import Cache, Context
from orchestrator.training.data import mixed
from orchestrator.training.packing import IGNORED

CHUNK_ROWS = 16
"""Rows that are generated and scored at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Prompts with their responses: each begins at position 0, and what is behind it is padding."""

    input_ids_BS: Tensor
    prompt_lengths_B: Tensor
    lengths_B: Tensor
    """Tokens of prompt and response."""

    @property
    def written_BS(self) -> Tensor:
        """Return true at the positions that wrote a token of the response: from the prompt's last one on."""
        places_S = torch.arange(self.input_ids_BS.shape[1], device=self.input_ids_BS.device)
        return (places_S >= self.prompt_lengths_B[:, None] - 1) & (places_S < self.lengths_B[:, None] - 1)

    @property
    def target_ids_BS(self) -> Tensor:
        """Return the token that each position wrote; -100 where it belongs to no response."""
        following_BS = self.input_ids_BS.roll(-1, 1)
        return torch.where(self.written_BS, following_BS, IGNORED)


def uniforms(seed: int, step: int, rows: NDArray[np.int64], num_positions: int) -> NDArray[np.float64]:
    """Return [rows, positions] numbers in [0, 1): each a function of seed, step, row and position alone."""
    key = mixed(np.array([seed], dtype=np.uint64))
    key = mixed(key ^ np.uint64(step))
    of_rows = mixed(key ^ rows.astype(np.uint64))
    words = mixed(of_rows[:, None] ^ np.arange(num_positions, dtype=np.uint64)[None, :])
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


@torch.no_grad()
def respond(
    model: nn.Module,
    prompts_BP: Tensor,
    prompt_lengths_B: Tensor,
    *,
    response_length: int,
    sequence_length: int,
    vocab_size: int,
    end_of_text: int,
    noise_BR: NDArray[np.float64],
) -> Rows:
    """Let a model write a response to each prompt, at most response_length tokens, the end of the text among them.

    Args:
        prompts_BP: each begins at position 0; what is behind it is not looked at.
        vocab_size: of the tokenizer; the model's table may be padded beyond it.
        noise_BR: numbers in [0, 1) by which tokens are drawn.
    """
    device, count = prompts_BP.device, len(prompts_BP)
    longest = int(prompt_lengths_B.max())
    # All prompts end at the same place, so that the next token stands at the same place too; what is before one is unseen.
    unseen_B = longest - prompt_lengths_B
    source_BP = torch.arange(longest, device=device) - unseen_B[:, None]
    new_BQ = torch.where(source_BP >= 0, prompts_BP.gather(1, source_BP.clamp(min=0)), end_of_text)
    noise = torch.from_numpy(noise_BR).to(device)
    cache, cached = Cache(), 0
    written, ended_B = [], torch.zeros(count, dtype=torch.bool, device=device)
    for number in range(response_length):
        logits_BV = model(new_BQ, _context(unseen_B, cached, new_BQ.shape[1], cache))[:, -1, :vocab_size]
        cached += new_BQ.shape[1]
        token_B = torch.where(ended_B, end_of_text, drawn(logits_BV, noise[:, number]))
        written.append(torch.where(ended_B, -1, token_B))
        ended_B = ended_B | (token_B == end_of_text)
        if bool(ended_B.all()):
            break
        new_BQ = token_B[:, None]
    responses_BR = torch.stack(written, 1)
    return _joined(prompts_BP, prompt_lengths_B, responses_BR, sequence_length, end_of_text)


def _context(unseen_B: Tensor, cached: int, new: int, cache: Cache) -> Context:
    """The context of new tokens behind those in a cache, in rows of which the first tokens are filling. These see themselves,
    lest their attention be nothing at all; no other token sees them."""
    places_S = torch.arange(cached + new, device=unseen_B.device)
    places_Q = places_S[cached:]
    seen_BQS = (places_S[None, None, :] <= places_Q[None, :, None]) & (
        places_S[None, None, :] >= unseen_B[:, None, None]
    )
    itself_QS = places_S[None, :] == places_Q[:, None]
    positions_BQ = (places_Q[None, :] - unseen_B[:, None]).clamp(min=0)
    return Context(positions_BQ, (seen_BQS | itself_QS)[:, None], cache)


def drawn(logits_BV: Tensor, noise_B: Tensor) -> Tensor:
    """Return a token for each row, drawn by inverting the cumulative distribution at a number in [0, 1), in fp64."""
    cumulative_BV = logits_BV.double().softmax(-1).cumsum(-1)
    threshold_B1 = (noise_B * cumulative_BV[:, -1])[:, None]
    found: Tensor = torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0]
    return found.clamp(max=logits_BV.shape[1] - 1)


def _joined(prompts_BP: Tensor, lengths_B: Tensor, responses_BR: Tensor, sequence_length: int, padding_id: int) -> Rows:
    """Prompts and responses as rows; -1 stands for what was not written."""
    places_S = torch.arange(sequence_length, device=prompts_BP.device)
    of_response_BS = places_S[None, :] - lengths_B[:, None]
    widened_BS = nn.functional.pad(prompts_BP, (0, max(0, sequence_length - prompts_BP.shape[1])))[:, :sequence_length]
    picked_BS = responses_BR.gather(1, of_response_BS.clamp(0, responses_BR.shape[1] - 1))
    beyond_BS = (of_response_BS >= responses_BR.shape[1]) | (picked_BS < 0)
    ids_BS = torch.where(of_response_BS < 0, widened_BS, torch.where(beyond_BS, padding_id, picked_BS))
    return Rows(input_ids_BS=ids_BS, prompt_lengths_B=lengths_B, lengths_B=lengths_B + (responses_BR >= 0).sum(1))


@torch.no_grad()
def log_probs(model: nn.Module, rows: Rows) -> Tensor:
    """Return the log-probability of each written token under a whole model, in fp64, 0 elsewhere; [B, S]."""
    logits_BSV: Tensor = model(rows.input_ids_BS)
    wide_BSV = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))
    targets_BS = rows.target_ids_BS
    picked_BS = wide_BSV.log_softmax(-1).gather(2, targets_BS.clamp(min=0)[..., None])[..., 0]
    return torch.where(rows.written_BS, picked_BS, 0.0).double()


@torch.no_grad()
def scores(model: nn.Module, rows: Rows) -> Tensor:
    """Return the reward model's score of each response, its value at the last token, in fp64; [B]."""
    values_BS: Tensor = model(rows.input_ids_BS)
    return values_BS.gather(1, (rows.lengths_B - 1)[:, None])[:, 0].double()
