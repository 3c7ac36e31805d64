"""Novelty: how far a pixel's embedding lies from those that the model was trained on.

The dissimilarity index of Meyer & Pebesma (2021, "Predicting into unknown space? Estimating the
area of applicability of spatial prediction models", doi:10.1111/2041-210X.13650) in another scale.
As theirs it is the Euclidean distance to the nearest training pixel in the space of the
predictors, and ground that the training did not see says how far is far. What differs:

- Prototypes, the centres of k-means (Lloyd 1982, doi:10.1109/TIT.1982.1056489), stand for all
  training pixels.
- Predictors are not weighted by their importance nor standardised: bands share one scale.
- The unit is not the mean distance between training pixels, but the 99th percentile of the
  distances of held-out pixels. So 1 is the border of known ground; theirs, the area of
  applicability, ends at the upper whisker of cross-validated distances.
- Distances are taken between codes `q` as they are stored, so of sign(x) sqrt|x| for an embedding
  x: the space in which the quantisation is even. On real ground it tells known from new land
  about as well as x does, and makes everything here exact.

Why exact: pixels and prototypes are 64 integers of -128..127. Every sum of some of the terms of
`2 q.b`, `q.q` and `b.b` is then an integer up to 2^22, and every factor has at most 8 bits. So
float32 holds all of them without rounding, in any order of summation, with or without FMA, and even
where the device multiplies in TF32 or bfloat16 and adds up in float32. A novelty has the same bits
on every device, whatever the codes are and however the pixels are cut into blocks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from aeheight.embeddings import BANDS, valid
from aeheight.errors import InputError

PROTOTYPES: Final = 128
"""How many prototypes stand for the training pixels, at most."""

SAMPLE: Final = 20_000
"""Pixels that a sample keeps."""

BLOCK: Final = 4_096
"""Pixels whose distances to all prototypes are held at once: 2 MiB for 128 prototypes."""

_PERCENTILE: Final = 99
_ROUNDS: Final = 20


@dataclass(frozen=True, slots=True, eq=False)
class Novelty:
    """Where a model has been: `distance` is above 1 where it has not."""

    prototypes: NDArray[np.int8]
    """(k, 64) codes of the prototypes, k at least 1."""
    reach: float
    """Steps of the code from the nearest prototype that make a novelty of 1; at least 1."""

    @property
    def weights(self) -> NDArray[np.float32]:
        """(k, 64) twice the prototypes: `weights @ q - offsets` is `q.q` less the squares."""
        return np.multiply(self.prototypes, 2, dtype=np.float32)

    @property
    def offsets(self) -> NDArray[np.float32]:
        """(k, 1) squared length of each prototype."""
        return _square(self.prototypes.T)[:, None]

    def distance(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """Novelty of codes (64, ...): shape (...), from 0, NaN where there is no embedding.

        Another device gives the same bits with `weights`, `offsets` and `reach` moved there, and
        `q` the codes of about `BLOCK` pixels as float32 (64, n)::

            nearest = (weights @ q - offsets).max(axis=0)
            squares = (q * q).sum(axis=0) - nearest
            novelty = float32(sqrt(float64(squares)) / reach)

        That must not run under autocast, which would round `nearest` to half precision.
        """
        steps = np.sqrt(_squares(self, codes.reshape(len(codes), -1)))
        novelty = (steps / self.reach).reshape(codes.shape[1:])
        return np.where(valid(codes), novelty, np.nan).astype(np.float32)


class Sample:
    """At most so many of the pixels that were added, each with the same chance of being kept.

    A reservoir by random keys: every pixel draws one, and the smallest stay (Efraimidis & Spirakis
    2006, doi:10.1016/j.ipl.2005.11.003, with equal weights). The same pixels in the same order
    give the same sample, in pieces of any size.
    """

    def __init__(self, seed: int, size: int = SAMPLE) -> None:
        self._rng, self._size, self._bar = np.random.default_rng(seed), size, math.inf
        self._keys: NDArray[np.float64] = np.empty(0)
        self._codes = np.empty((BANDS, 0), np.int8)
        self._facts: tuple[NDArray[Any], ...] = ()

    @property
    def codes(self) -> NDArray[np.int8]:
        """(64, n) codes of the pixels that are kept, in the order in which they came."""
        return self._codes

    @property
    def facts(self) -> tuple[NDArray[Any], ...]:
        """What was added beside their codes, each (n,); empty before the first pixel."""
        return self._facts

    def add(self, codes: NDArray[np.int8], *facts: NDArray[Any]) -> None:
        """Offer pixels (64, n), and facts (n,) of them; those without embedding are passed over."""
        there = np.flatnonzero(valid(codes))
        keys = self._rng.random(there.shape)
        low = keys < self._bar
        if not low.any():
            return
        self._keys = np.concatenate([self._keys, keys[low]])
        self._codes = np.concatenate([self._codes, codes[:, there[low]]], axis=1)
        known = self._facts or [fact[:0] for fact in facts]
        pairs = zip(known, facts, strict=True)
        self._facts = tuple(np.concatenate([old, new[there[low]]]) for old, new in pairs)
        if self._keys.size > self._size:
            kept = np.sort(np.argpartition(self._keys, self._size)[: self._size])
            self._keys, self._codes = self._keys[kept], self._codes[:, kept]
            self._facts = tuple(fact[kept] for fact in self._facts)
            self._bar = float(self._keys.max())


def fit(training: Sample, validation: Sample, seed: int, k: int = PROTOTYPES) -> Novelty:
    """Prototypes of the training pixels, scaled by the validation pixels.

    At most 1 % of the validation pixels lie above 1. Where there are none, the training pixels
    stand in for them; the scale is then too small, since prototypes lie closer to their own pixels.
    Integers from beginning to end: the same samples and seed give the same bits on every machine
    (as long as NumPy's random numbers stay the same).

    Args:
        training: pixels that the model was trained on.
        validation: pixels of ground that was held out.
        seed: of the prototypes' start.
        k: how many prototypes there are at most; fewer where fewer pixels differ.

    Raises:
        InputError: there are no training pixels.
    """
    codes = training.codes
    if not codes.size:
        raise InputError(
            "there are no training pixels to tell where the model has been: let `split` leave more "
            "ground to training (smaller test, validation or buffer), or check that the "
            "embeddings cover it"
        )
    prototypes = _lloyd(codes, _start(codes, k, np.random.default_rng(seed)))
    held_out = validation.codes if validation.codes.size else codes
    squares = _squares(Novelty(prototypes, 1.0), held_out)
    # One of the distances that are there, so that nothing is rounded.
    reach = math.sqrt(np.percentile(squares, _PERCENTILE, method="inverted_cdf"))
    return Novelty(prototypes, max(reach, 1.0))


def _squares(novelty: Novelty, codes: NDArray[np.int8]) -> NDArray[np.float64]:
    """(n,) squared distances of codes (64, n) from the nearest prototype, in steps of the code."""
    squares = np.empty(codes.shape[1])
    for part, scores in _scored(novelty, codes):
        squares[part] = _square(codes[:, part]) - scores.max(axis=0)
    return squares


def _scored(
    novelty: Novelty, codes: NDArray[np.int8]
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Blocks of the pixels (64, n), and (k, block) how much they are like each prototype."""
    weights, offsets = novelty.weights, novelty.offsets
    for start in range(0, codes.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        yield part, weights @ codes[:, part].astype(np.float32) - offsets


def _square(codes: NDArray[np.int8]) -> NDArray[np.float32]:
    """(n,) squared lengths of codes (64, n)."""
    squares: NDArray[np.float32] = np.square(codes, dtype=np.float32).sum(axis=0)
    return squares


def _start(codes: NDArray[np.int8], k: int, rng: np.random.Generator) -> NDArray[np.int8]:
    """Up to k of the pixels (64, n), as (k, 64), none twice, far from each other.

    k-means++ (Arthur & Vassilvitskii 2007): the chance of a pixel is its squared distance from
    those that were taken before.
    """
    pixels, lengths = codes.astype(np.float32), _square(codes)
    taken = [int(rng.integers(lengths.size))]
    squares = np.full(lengths.size, np.inf)
    while True:
        last = taken[-1]
        away = lengths - 2 * (pixels[:, last] @ pixels) + lengths[last]
        squares = np.minimum(squares, away)
        total = np.cumsum(squares)
        if len(taken) == k or total[-1] == 0:
            return np.ascontiguousarray(codes[:, taken].T)
        taken.append(int(np.searchsorted(total, rng.integers(int(total[-1])), side="right")))


def _lloyd(codes: NDArray[np.int8], prototypes: NDArray[np.int8]) -> NDArray[np.int8]:
    """Move each prototype to the mean of the pixels (64, n) that it is nearest to, until none does.

    Means are rounded to codes, so that all distances stay exact; a prototype that is nearest to no
    pixel stays where it is.
    """
    for _ in range(_ROUNDS):
        before = prototypes
        scored = _scored(Novelty(before, 1.0), codes)
        nearest = np.concatenate([scores.argmax(axis=0) for _, scores in scored])
        count = np.bincount(nearest, minlength=len(before))
        sums = [np.bincount(nearest, band, len(before)) for band in codes]
        means = np.stack(sums, axis=1) / np.maximum(count, 1)[:, None]
        prototypes = np.where(count[:, None] > 0, np.rint(means), before).astype(np.int8)
        if np.array_equal(prototypes, before):
            break
    return np.unique(prototypes, axis=0)
