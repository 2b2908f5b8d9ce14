"""Files as a stranger or a broken disk would leave them: JSON and bytes with something changed."""

from __future__ import annotations

import random
from copy import deepcopy

ODD = (None, True, -1, 2**70, "", "\ud800", "x" * 1000, [], {}, [[]], {"a": 1}, "<|endoftext|>", 0)


def mutated(value, rng: random.Random):
    """A JSON value with one place of it changed or taken away."""
    places = [()]
    for place in places:
        inside = value
        for key in place:
            inside = inside[key]
        keys = (
            list(inside) if isinstance(inside, dict) else list(range(len(inside))) if isinstance(inside, list) else []
        )
        places += [(*place, key) for key in rng.sample(keys, min(6, len(keys)))]
    *way, last = rng.choice(places[1:])
    inside = value
    for key in way:
        inside = inside[key]
    if rng.random() < 0.3:
        del inside[last]
    else:
        inside[last] = deepcopy(rng.choice(ODD))
    return value


def mutated_bytes(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 3, 20))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(4):
            case 0:
                changed[at : at + 1] = rng.randbytes(1)
            case 1:
                del changed[at : at + rng.randrange(1, 50)]
            case 2:
                changed[at:at] = rng.randbytes(4)
            case _:
                del changed[max(at, 1) :]
    return bytes(changed)
