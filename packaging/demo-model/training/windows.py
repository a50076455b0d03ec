"""Training windows: stretches of the token stream, some of them in fill-in-the-middle form."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from prepare import END_OF_TEXT, FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX

Ids = npt.NDArray[np.int64]

FIM_SHARE = 0.3
FIM_LENGTH = (64, 512)  # tokens of one rearranged stretch, both inclusive


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one training step sees: `rows` windows of `length` tokens, and the token after each."""

    length: int
    rows: int


def fill_in_the_middle(ids: Ids, rng: np.random.Generator) -> Ids:
    """Rearranges [N] ids as prefix, suffix, middle with their marks, N again: four ids at the end make room.

    The order of Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle" (PSM).
    """
    body = ids[:-4]
    start, end = sorted(int(cut) for cut in rng.integers(1, len(body), 2))
    parts = ([FIM_PREFIX], body[:start], [FIM_SUFFIX], body[end:], [FIM_MIDDLE], body[start:end], [END_OF_TEXT])
    return np.concatenate(parts).astype(np.int64)


def window(stream: Ids, length: int, rng: np.random.Generator) -> Ids:
    """[length + 1] ids from a random place; a share of those that lie within one file is rearranged."""
    start = int(rng.integers(0, len(stream) - length - 1))
    ids = stream[start : start + length + 1]
    shortest, longest = min(FIM_LENGTH[0], length), min(FIM_LENGTH[1], length)
    if rng.random() >= FIM_SHARE or END_OF_TEXT in ids[:longest]:
        return ids
    size = int(rng.integers(shortest, longest + 1))
    return np.concatenate([fill_in_the_middle(ids[:size], rng), ids[size:]])


def batch(stream: Ids, shape: Shape, rng: np.random.Generator) -> Ids:
    """[rows, length + 1] ids."""
    return np.stack([window(stream, shape.length, rng) for _ in range(shape.rows)])
