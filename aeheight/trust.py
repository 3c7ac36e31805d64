"""Trust: how much of a network's correction is believed on ground that it has not seen.

A correction is taken apart into its level, the mean over the ground around a pixel, and its relief,
what is left. On real ground at 900 m, trained on one half and tested on the other, corrections that
were right on held-out blocks between the training ground made the far half up to 9 % worse than the
ridge alone. Of 209 trainings 72 were worse with the whole correction, and 16 with what is believed
here, by 0.2 % at most (pipelines/EXPERIMENTS.md, also on how these bounds were chosen). So both
parts must earn their keep on held-out ground, and the level must earn far more:

- relief: the factor that fits best what the level leaves of the held-out errors, less two standard
  errors of it (jackknife over blocks of ground, all years of one together: Efron & Stein 1981,
  doi:10.1214/aos/1176345462; shrinkage as in Copas 1983, doi:10.1111/j.2517-6161.1983.tb01258.x).
  Chance alone is then hardly ever believed. It is believed more often than that because the same
  ground chose the epoch: the best of many is the luckiest too.
- level: nothing, unless the whole correction explains a third of the base's squared errors on
  held-out ground; all of it that fits from two thirds on. A network that found the law explains
  most of what its base misses; one that found the place explains little.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

RADIUS: Final = 10
"""Pixels from a pixel to the edge of the square that its level is the mean of."""

FEWEST: Final = 6
"""Held-out blocks below which no standard error can be told, and no relief is kept."""

_ERRORS: Final = 2.0
_ALL_BUT_NOTHING: Final = 1 - 1e-9
_SOME, _MOST = 1 / 3, 2 / 3


@dataclass(frozen=True, slots=True)
class Trust:
    """Factors on the parts of a correction, 0 to 1."""

    relief: float
    """Of the correction less its local mean."""
    level: float
    """Of its local mean."""
    rmse: float | None = None
    """On the validation ground with these factors, metres; None: not measured."""

    @property
    def whole(self) -> bool:
        """Whether all of the correction is believed."""
        return self.relief == self.level == 1

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> "Trust":
        """What `to_dict` made of one."""
        return cls(**known)


WHOLE: Final = Trust(1.0, 1.0)
"""A correction as the network gives it."""


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """Held-out pixels of a piece of ground."""

    errors: NDArray[np.float64]
    """(n,) reference - base, metres."""
    relief: NDArray[np.float64]
    """(n,) of the correction, metres."""
    level: NDArray[np.float64]
    """(n,) of the correction, metres."""
    blocks: NDArray[np.int64]
    """(n,) which block of ground each lies in."""


def earned(pieces: Iterable[Held]) -> Trust:
    """The trust that a correction earns on held-out ground; one streaming pass over its pieces.

    Where there is no such ground, nothing is believed.
    """
    blocks: dict[int, NDArray[np.float64]] = {}
    for piece in pieces:
        for block, products in _products(piece):
            blocks[block] = blocks.get(block, 0) + products
    each = np.array(list(blocks.values())).reshape(-1, 4, 4)
    total = each.sum(axis=0)
    if total[0, 0] == 0:
        return Trust(0.0, 0.0)
    level = float(np.clip((_explained(total) - _SOME) / (_MOST - _SOME), 0, _fitting(total)))
    relief = _relief(each[:, 1, 0] - level * each[:, 1, 2], each[:, 1, 1])
    factors = np.array([1, -relief, -level, 0.0])
    rmse = float(np.sqrt(max(factors @ total @ factors, 0) / total[3, 3]))
    return Trust(relief, level, rmse)


def _products(held: Held) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """For each block (4, 4) sums of the products of errors, relief, level and ones."""
    rows = np.stack([held.errors, held.relief, held.level, np.ones_like(held.errors)])
    for block in np.unique(held.blocks):
        here = rows[:, held.blocks == block]
        yield int(block), here @ here.T


def _explained(total: NDArray[np.float64]) -> float:
    """Share of the base's squared errors that the whole correction takes away."""
    whole = np.array([1, -1, -1, 0.0])
    return 1 - float(whole @ total @ whole) / float(total[0, 0])


def _fitting(total: NDArray[np.float64]) -> float:
    """The level's own factor of least squares, 0 to 1: more of it would harm."""
    return float(np.clip(total[2, 0] / total[2, 2], 0, 1)) if total[2, 2] else 1.0


def _relief(product: NDArray[np.float64], square: NDArray[np.float64]) -> float:
    """The factor of least squares over all blocks (n,), less its standard errors; 0 to 1."""
    there = square > 0
    product, square = product[there], square[there]
    n = len(square)
    if n < FEWEST or square.max() > _ALL_BUT_NOTHING * square.sum():
        return 0.0
    without = (product.sum() - product) / (square.sum() - square)
    error = np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
    return float(np.clip(product.sum() / square.sum() - _ERRORS * error, 0, 1))
