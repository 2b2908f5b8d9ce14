"""Samples of any length in rows of one length, so that little is computed on padding. Pure: numbers in, arrays out.

Samples that share a row have segments of their own: the model lets none see another, and each counts its positions from 0
(Decoder.context). B rows, S sequence.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The tokens of one example, and which of them are learned."""

    ids: NDArray[np.int64]
    learn: NDArray[np.bool_]
    """One for each token: whether the model is trained to write it after those before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """The place of a sample."""

    row: int
    start: int
    segment: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """Rows of samples; what is left of a row is padding, a segment of its own without targets."""

    input_ids_BS: NDArray[np.int64]
    target_ids_BS: NDArray[np.int64]
    """The token after each; -100 where it is not learned, or belongs to another sample."""
    segment_ids_BS: NDArray[np.int64]
    positions_BS: NDArray[np.int64]
    spots: tuple[Spot, ...]
    """Spot of each sample, in the order in which they were given."""


def pack(
    samples: Sequence[Sample], sequence_length: int, *, together: int = 1, padding_id: int = 0, alone: bool = False
) -> Packed:
    """Lays samples into as few rows as best-fit decreasing finds; the same samples always into the same rows.

    Args:
        together: so many samples that follow one another share a row: 2 for the answers of a preference.
        padding_id: what stands where no sample is.
        alone: one group a row, in their order: a prompt leaves the rest of its row to the response.

    Raises ValueError where samples that belong together are longer than a row: nothing is cut."""
    if together < 1 or len(samples) % together:
        raise ValueError(f"{len(samples)} samples are no whole number of {together}")
    lengths = [len(sample.ids) for sample in samples]
    groups = [sum(lengths[first : first + together]) for first in range(0, len(samples), together)]
    for number, length in enumerate(groups):
        if length > sequence_length:
            raise ValueError(f"sample {number * together} needs {length} tokens of a row of {sequence_length}")
    spots: list[Spot | None] = [None] * len(samples)
    rows = [[group] for group in range(len(groups))] if alone else _rows(groups, sequence_length)
    for row, members in enumerate(rows):
        start = segment = 0
        for number in (group * together + one for group in members for one in range(together)):
            spots[number] = Spot(row=row, start=start, segment=segment)
            start, segment = start + lengths[number], segment + 1
    return _filled(samples, [spot for spot in spots if spot is not None], len(rows), sequence_length, padding_id)


def _rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return which go into each row: the longest first, each where the least room is left that is enough. A row's members, and
    the rows by their first member, are in the order of the samples."""
    free: list[tuple[int, int]] = []
    """(room, row), sorted."""
    rows: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        at = bisect_left(free, (lengths[number], -1))
        if at == len(free):
            rows.append([])
            room, row = capacity, len(rows) - 1
        else:
            room, row = free.pop(at)
        rows[row].append(number)
        insort(free, (room - lengths[number], row))
    return sorted(sorted(members) for members in rows)


def _filled(
    samples: Sequence[Sample], spots: Sequence[Spot], num_rows: int, sequence_length: int, padding_id: int
) -> Packed:
    shape = (num_rows, sequence_length)
    inputs, targets = np.full(shape, padding_id, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    segments, positions = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for sample, spot in zip(samples, spots, strict=True):
        part = slice(spot.start, spot.start + len(sample.ids))
        inputs[spot.row, part] = sample.ids
        targets[spot.row, part] = np.append(np.where(sample.learn[1:], sample.ids[1:], IGNORED), IGNORED)[
            : len(sample.ids)
        ]
        segments[spot.row, part] = spot.segment
        positions[spot.row, part] = np.arange(len(sample.ids))
    padded = segments < 0
    segments = np.where(padded, segments.max(axis=1, keepdims=True, initial=-1) + 1, segments)
    positions = np.where(padded, padded.cumsum(axis=1) - 1, positions)
    return Packed(
        input_ids_BS=inputs, target_ids_BS=targets, segment_ids_BS=segments, positions_BS=positions, spots=tuple(spots)
    )
