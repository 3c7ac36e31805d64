"""Trust: how much of a network's correction is believed on ground that it has not seen.

A correction is taken apart into its level, the mean over the ground around a pixel, and its relief,
what is left. On real ground at 900 m, trained on one half and tested on the other, corrections that
were right on held-out blocks between the training ground made the far half up to 9 % worse than the
ridge alone. Of 209 trainings 72 were worse with the whole correction, and 16 with what is believed
here, by 0.2 % at most (pipelines/EXPERIMENTS.md, also on how these bounds were chosen). So both
parts must earn their keep on held-out ground, and the level must earn far more:

- relief: the factor that fits the held-out errors best, less two standard errors of it (jackknife
  over patches: Efron & Stein 1981, doi:10.1214/aos/1176345462; shrinkage as in Copas 1983,
  doi:10.1111/j.2517-6161.1983.tb01258.x). Chance alone is then hardly ever believed.
- level: nothing, unless the whole correction explains a third of the base's squared errors on
  held-out ground; all of it from two thirds on. A network that found the law explains most of what
  its base misses; one that found the place explains little.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

RADIUS: Final = 10
"""Pixels from a pixel to the edge of the square that its level is the mean of."""

FEWEST: Final = 4
"""Patches with held-out ground below which no standard error can be told, and no relief is kept."""

_ERRORS: Final = 2.0
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
    """Held-out pixels of one patch."""

    errors: NDArray[np.float64]
    """(n,) reference - base, metres."""
    relief: NDArray[np.float64]
    """(n,) of the correction, metres."""
    level: NDArray[np.float64]
    """(n,) of the correction, metres."""


def earned(patches: Iterable[Held]) -> Trust:
    """The trust that a correction earns on held-out ground; one streaming pass over its patches.

    Where there is no such ground, nothing is believed.
    """
    products = [_products(patch) for patch in patches if patch.errors.size]
    each = np.array(products).reshape(-1, 4, 4)
    total = each.sum(axis=0)
    if total[0, 0] == 0:
        return Trust(0.0, 0.0)
    level = float(np.clip((_explained(total) - _SOME) / (_MOST - _SOME), 0, 1))
    relief = max(_relief(each[:, 1, 0], each[:, 1, 1]), level)
    factors = np.array([1, -relief, -level, 0.0])
    rmse = float(np.sqrt(max(factors @ total @ factors, 0) / total[3, 3]))
    return Trust(relief, level, rmse)


def _products(held: Held) -> NDArray[np.float64]:
    """(4, 4) sums of the products of errors, relief, level and ones."""
    rows = np.stack([held.errors, held.relief, held.level, np.ones_like(held.errors)])
    products: NDArray[np.float64] = rows @ rows.T
    return products


def _explained(total: NDArray[np.float64]) -> float:
    """Share of the base's squared errors that the whole correction takes away."""
    whole = np.array([1, -1, -1, 0.0])
    return 1 - float(whole @ total @ whole) / float(total[0, 0])


def _relief(product: NDArray[np.float64], square: NDArray[np.float64]) -> float:
    """The factor of least squares over all patches (n,), less its standard errors; 0 to 1."""
    there = square > 0
    product, square = product[there], square[there]
    n = len(square)
    if n < FEWEST:
        return 0.0
    without = (product.sum() - product) / (square.sum() - square)
    error = np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
    return float(np.clip(product.sum() / square.sum() - _ERRORS * error, 0, 1))
