"""The halves of a sequence: which tokens a context rank holds, and which keys of another rank its queries see. Pure.

A causal query sees the keys before it, so ranks that held one stretch each would compute from 1 to 2c - 1 parts. Each holds two
chunks of 2c instead, one from either end: rank r chunks r and 2c - 1 - r. Then every rank computes as much at every step of the
ring, half of its queries x keys (as in Striped Attention, arXiv:2311.09431, and the zigzag order of Llama 3, arXiv:2407.21783,
section 3.3.2).

S tokens of one rank, c context_parallel_degree.
"""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """The part of queries x keys that a rank computes with the keys of another one; halves 0 and 1 are its two chunks."""

    queries: tuple[int, int]
    """Halves of this rank's queries: from, until."""
    keys: tuple[int, int]
    """Halves of the other rank's keys: from, until."""
    causal: bool
    """Among them a query sees the keys up to its own place; otherwise all."""


def chunks(rank: int, size: int) -> tuple[int, int]:
    """Return the two chunks of 2c that a rank holds, in the order of the sequence."""
    return rank, 2 * size - 1 - rank


def part(rank: int, source: int) -> Part:
    """Return what a rank computes with the keys and values of the rank `source`."""
    if source == rank:
        return Part((0, 2), (0, 2), causal=True)
    if source < rank:  # its early chunk comes before both of ours, its late one after both
        return Part((0, 2), (0, 1), causal=False)
    return Part((1, 2), (0, 2), causal=False)  # both of its chunks lie between ours


def positions(rank: int, size: int, sequence: int) -> tuple[range, range]:
    """Return the places in the whole sequence of the tokens that a rank holds. ValueError where the chunks are not even."""
    if sequence % (2 * size):
        fit = -(-sequence // (2 * size)) * 2 * size
        raise ValueError(
            f"context_parallel_degree {size} cuts a sequence into {2 * size} chunks, which {sequence} tokens do not fill evenly\n"
            f"  to fix: a sequence_length that {2 * size} divides, such as {fit}, or a smaller degree"
        )
    length = sequence // (2 * size)
    first, second = (range(chunk * length, (chunk + 1) * length) for chunk in chunks(rank, size))
    return first, second
