"""Autoregressive blank filling (GLM, arXiv:2103.10360, section 2.1): text with masked spans, and the spans to be written.

A row is part A, a text in which one token stands for each masked span, and part B, the spans in random order. Attention reads
part A in both directions and part B from left to right; only part B is learned.

    input      Every  [MASK]  she  walks  .   [sop]   morning  ,
    target                                    morning ,        [eop]
    position   0      1       2    3      4   1       1        1
    in span    0      0       0    0      0   1       2        3

S tokens of a row, T of its text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.training.data import DataError, open_datasets
from orchestrator.training.tokenizer import HuggingFaceTokenizer, Tokenizer, load_saved

if TYPE_CHECKING:
    from orchestrator.models.architecture import Architecture
    from orchestrator.training.data import Dataset

DOCUMENT_SHARE = 0.5
"""Share of the rows that are of the document objective; the others are of the sentence objective."""
SENTENCE_SHARE = 0.15
"""Share of a text's tokens that are masked by the sentence objective at least."""
LEAST_TOKENS = 8
"""Fewest tokens of a row."""
IGNORED = -100
CACHED_ROWS = 64
_ENDS = ".?!;:\n。！？；：…"
_AFTER_ENDS = " \"')]”’»」』）"
_WORD = 2**64 - 1

Span = tuple[int, int]
"""(first token, token behind the last)."""


@dataclass(frozen=True, slots=True)
class Specials:
    """Ids of the tokens that blank filling adds to a text."""

    mask: int
    """Stands for a masked sentence."""
    document_mask: int
    """Stands for a masked rest of a document."""
    start: int
    """Begins a span of part B."""
    end: int
    """Ends it."""


_NAMES = (("[MASK]",), ("[gMASK]",), ("<|startofpiece|>", "<sop>"), ("<|endofpiece|>", "<eop>"))
"""Names that tokenizers of GLM give them, in the order of Specials."""


def specials_of(tokenizer: Tokenizer, vocab_size: int) -> Specials:
    """Return the special tokens: the tokenizer's where it has them, else the first ids behind its own. DataError where the model
    has no rows for them.

    Args:
        vocab_size: of the model.
    """
    ids: list[int] = []
    free = tokenizer.vocab_size
    for names in _NAMES:
        known = [_id_of(tokenizer, name) for name in names]
        found = next((token for token in known if token is not None), None)
        ids.append(free if found is None else found)
        free += found is None
    missing = [names[0] for names, token in zip(_NAMES, ids, strict=True) if token >= tokenizer.vocab_size]
    _check_room(missing, tokenizer.vocab_size, vocab_size)
    return Specials(*ids)


def check_room(tokenizer_vocab_size: int, vocab_size: int) -> None:
    """Raise DataError where a model has no rows for the special tokens beside a tokenizer that is still to be trained."""
    _check_room([names[0] for names in _NAMES], tokenizer_vocab_size, vocab_size)


def _check_room(missing: Sequence[str], tokenizer_vocab_size: int, vocab_size: int) -> None:
    needed = tokenizer_vocab_size + len(missing)
    if needed > vocab_size:
        raise DataError(
            f"family glm needs an id for each of {', '.join(missing)} beside the {tokenizer_vocab_size} tokens of the "
            f"tokenizer, and the model's vocab_size is {vocab_size}: set model.vocab_size to at least {needed} "
            f"({-(-needed // 8) * 8} divides by 8), or choose a data.tokenizer that has these tokens"
        )


def _id_of(tokenizer: Tokenizer, name: str) -> int | None:
    return tokenizer.inner.token_to_id(name) if isinstance(tokenizer, HuggingFaceTokenizer) else None


def sentence_ends(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Return [V], true where a token ends a sentence by its last character; the end of a text does."""
    ends_V = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
    for token in range(tokenizer.vocab_size):
        ends_V[token] = tokenizer.decode([token]).rstrip(_AFTER_ENDS).endswith(tuple(_ENDS))
    ends_V[tokenizer.end_of_text] = True
    return ends_V


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One sample."""

    input_ids_S: NDArray[np.int64]
    target_ids_S: NDArray[np.int64]
    """IGNORED where nothing is learned."""
    positions_2S: NDArray[np.int64]
    """Places in part A, those of a span that of its mask; and places within the span."""
    prefix_length: int
    """Tokens of part A."""


def blank_row(
    text: NDArray[np.int64],
    *,
    seed: int,
    sample: int,
    specials: Specials,
    ends_V: NDArray[np.bool_],
    positions_run_on: bool = False,
) -> Row:
    """Return the row that is made of T = S - 2 tokens: a function of the arguments alone, by a counter-based random draw.

    Half of the rows mask the rest of a document from a place on, 50 to 100 % of the text, uniformly. The others mask whole
    sentences, drawn until 15 % of the text are reached; each span more than one takes the room of two tokens, which are left out
    at the text's end.

    Args:
        positions_run_on: see `arranged`.
    """
    length = len(text) + 2
    draws = _uniform(seed, sample, 2 + len(text))
    if draws[0] < DOCUMENT_SHARE:
        spans, mask = [document_span(len(text), draws[1])], specials.document_mask
    else:
        spans, mask, room = [], specials.mask, 0
        while room == 0 or len(spans) > room:
            room = max(1, len(spans))
            text = text[: length - 2 * room]
            spans = sentence_spans(ends_V[text], draws[2:])
    return arranged(
        text,
        spans,
        mask=mask,
        specials=specials,
        length=length,
        positions_run_on=positions_run_on and mask == specials.document_mask,
    )


def _uniform(seed: int, sample: int, count: int) -> NDArray[np.float64]:
    """Return numbers in [0, 1) that Philox (Salmon et al. 2011) gives under the key (seed, sample)."""
    words = np.random.Philox(key=np.array([seed & _WORD, sample & _WORD], dtype=np.uint64)).random_raw(count)
    return (words >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)


def document_span(num_tokens: int, draw: float) -> Span:
    """Return the span of a text's last tokens, 50 to 100 % of them by a draw in [0, 1)."""
    least = -(-num_tokens // 2)
    return num_tokens - least - int(draw * (num_tokens - least + 1)), num_tokens


def sentence_spans(ends_T: NDArray[np.bool_], draws: NDArray[np.float64]) -> list[Span]:
    """Return whole sentences in drawn order, until they hold 15 % of the text's tokens or there are no more. The text's first and
    last sentence, which it may cut, are taken only where it has no other.

    Args:
        ends_T: true where a token ends a sentence; of several in a row, the last does.
        draws: of the sentence that begins at each token.
    """
    num_tokens = len(ends_T)
    last_T = ends_T & ~np.append(ends_T[1:], False)
    borders = [0, *(int(place) + 1 for place in np.flatnonzero(last_T))]
    whole = list(pairwise(borders[1:]))
    cut = [(0, borders[1])] if len(borders) > 1 else []
    cut += [(borders[-1], num_tokens)] if borders[-1] < num_tokens else []
    spans, covered = [], 0
    for start, end in sorted(whole or cut, key=lambda span: float(draws[span[0]])):
        spans.append((start, end))
        covered += end - start
        if covered >= SENTENCE_SHARE * num_tokens:
            break
    return spans


def arranged(
    text: NDArray[np.int64],
    spans: Sequence[Span],
    *,
    mask: int,
    specials: Specials,
    length: int,
    positions_run_on: bool = False,
) -> Row:
    """Return the row of S = `length` tokens that masks these spans of a text, filled up at its end with what is not learned.

    Args:
        spans: in the order of part B.
        positions_run_on: a span's positions go on behind part A, as GLM-130B has them of [gMASK] in place of a second
            dimension.
    """
    input_ids_S = np.full(length, specials.end, dtype=np.int64)
    target_ids_S = np.full(length, IGNORED, dtype=np.int64)
    positions_2S = np.zeros((2, length), dtype=np.int64)
    places: dict[Span, int] = {}
    at = read = 0
    for start, end in sorted(spans):
        kept = text[read:start]
        input_ids_S[at : at + len(kept)] = kept
        places[start, end] = at + len(kept)
        input_ids_S[at + len(kept)] = mask
        at, read = at + len(kept) + 1, end
    rest = text[read:]
    input_ids_S[at : at + len(rest)] = rest
    prefix_length = at = at + len(rest)
    positions_2S[0, :at] = np.arange(at)
    for start, end in spans:
        count = end - start + 1
        part = slice(at, at + count)
        input_ids_S[part] = [specials.start, *text[start:end]]
        target_ids_S[part] = [*text[start:end], specials.end]
        positions_2S[0, part] = np.arange(at, at + count) if positions_run_on else places[start, end]
        positions_2S[1, part] = np.arange(1, count + 1)
        at += count
    return Row(
        input_ids_S=input_ids_S, target_ids_S=target_ids_S, positions_2S=positions_2S, prefix_length=prefix_length
    )


class BlankDataset:
    """Rows of blank filling, each made of one sequence of a text when it is asked for; the same row every time."""

    def __init__(
        self, text: Dataset, *, seed: int, specials: Specials, ends_V: NDArray[np.bool_], positions_run_on: bool
    ) -> None:
        self.text, self.index, self.sequence_length = text, text.index, text.sequence_length + 2
        self._made: dict[str, Any] = {
            "seed": seed,
            "specials": specials,
            "ends_V": ends_V,
            "positions_run_on": positions_run_on,
        }
        self._row = lru_cache(CACHED_ROWS)(self._make)

    def __len__(self) -> int:
        return len(self.text)

    def _make(self, index: int) -> Row:
        return blank_row(self.text.sequences(np.array([index]))[0][0], sample=index, **self._made)

    def _rows(self, indices: NDArray[np.int64]) -> list[Row]:
        return [self._row(int(index)) for index in indices]

    def num_targets(self, indices: NDArray[np.int64]) -> int:
        """Return how many tokens of part B these rows have."""
        return sum(int((row.target_ids_S != IGNORED).sum()) for row in self._rows(indices))

    def sequences(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (input_ids_BS, target_ids_BS), each its own memory."""
        rows = self._rows(indices)
        return np.stack([row.input_ids_S for row in rows]), np.stack([row.target_ids_S for row in rows])

    def inputs(self, indices: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return what the module takes beside the tokens."""
        rows = self._rows(indices)
        return {
            "prefix_lengths_B": np.array([row.prefix_length for row in rows], dtype=np.int64),
            "positions_B2S": np.stack([row.positions_2S for row in rows]),
        }

    def labels(self, indices: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return what the loss takes beside the target ids: nothing."""
        return {}


def open_blanks(
    directory: Path | str, sequence_length: int, arch: Architecture, seed: int
) -> tuple[BlankDataset, BlankDataset | None]:
    """Return (train, validation) of a folder of prepared text; None where the held-out text does not fill one row. DataError
    where the model has no rows for the special tokens."""
    if sequence_length < LEAST_TOKENS:
        raise DataError(
            f"batch.sequence_length is {sequence_length}: a row with a blank takes {LEAST_TOKENS} tokens at least"
        )
    train, validation = open_datasets(directory, sequence_length - 2)
    tokenizer = load_saved(train.index.directory, train.index.tokenizer)
    specials, ends_V = specials_of(tokenizer, arch.vocab_size), sentence_ends(tokenizer)

    def blanks(text: Dataset) -> BlankDataset:
        return BlankDataset(
            text, seed=seed, specials=specials, ends_V=ends_V, positions_run_on=not arch.traits.block_positions
        )

    return blanks(train), None if validation is None else blanks(validation)
