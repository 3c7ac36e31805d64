"""Robust fits of a correction's terms to parts of its points, from sums that add.

Nothing here calls BLAS or LAPACK: they would give other bits with another number of threads, and
hundreds of matrices this small take them minutes where cores are busy.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aeheight.correction import Floats, Numbers, Surface

_HUBER = 1.345
"""Standard deviations from which on a residual counts linearly; 95 % efficient on normal errors."""
_FLOOR = 1e-3
"""Metres: the map's own error is taken for no less."""
_REFITS = 30
_SETTLED = 1e-3
"""Standard deviations of the noise: refits that move nothing further than this end."""


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """What a map tells where reference heights are, all (n,)."""

    x: Floats
    """Metres, on one plane for all of the map."""
    y: Floats
    predicted: Floats
    """The map, metres."""
    wanted: Floats
    """Reference - predicted, metres."""
    sigma: Floats
    """Standard deviation of the reference height, metres; 0 where it is not known."""

    def __len__(self) -> int:
        return len(self.x)

    @property
    def side(self) -> float:
        """The longer side of the box around them, metres."""
        return float(max(np.ptp(self.x), np.ptp(self.y)))

    def where(self, chosen: NDArray[np.bool_]) -> "Samples":
        """Some of them."""
        parts = (self.x, self.y, self.predicted, self.wanted, self.sigma)
        return Samples(*(part[chosen] for part in parts))


def median_nmad(values: Floats) -> tuple[float, float]:
    """Median and NMAD of (n,) values."""
    median = float(np.median(values))
    return median, 1.4826 * float(np.median(np.abs(values - median)))


def line(samples: Samples) -> tuple[Floats, float]:
    """What a robust line over the heights leaves, (n,) metres, and the map's own variance, m².

    With the latter beside the points' sigma, the NMAD of what is left is as it should be.
    """
    residual, fold = samples.wanted - np.median(samples.wanted), np.zeros(len(samples), np.int64)
    for _ in range(4):
        own = _own(residual, samples.sigma)
        residual = samples.wanted - Fits(samples, fold, own).added(2)
    return residual, own


def _own(residual: Floats, sigma: Floats) -> float:
    """The variance, m², for which residual / sqrt(sigma² + variance) has an NMAD of 1."""
    low, high = _FLOOR**2, max(median_nmad(residual)[1], _FLOOR) ** 2 + _FLOOR**2
    for _ in range(40):
        middle = float(np.sqrt(low * high))
        if median_nmad(residual / np.sqrt(sigma**2 + middle))[1] > 1:
            low = middle
        else:
            high = middle
    return high


class Fits:
    """A constant, a slope on the height, and a surface, fitted to all folds or to some.

    Huber's loss (1964, doi:10.1214/aoms/1177703732), weighted by sigma and the map's own error, by
    his pseudo-values: what is clipped changes, the matrix of the sums does not, and of folds it is
    the sum of theirs. The surface's coefficients are penalised.
    """

    def __init__(
        self, samples: Samples, fold: Numbers, own: float, spacing: float | None = None
    ) -> None:
        """Make the sums of every fold.

        Args:
            samples: to fit.
            fold: (n,) of each sample, from 0.
            own: variance of the map's own error, m².
            spacing: of the surface, metres; None: there is none.
        """
        self._samples, self._fold, self._own = samples, fold, own
        self.centre = float(samples.predicted.mean())
        self._board = None if spacing is None else _board(samples, spacing)
        terms = [np.ones(len(samples)), samples.predicted - self.centre]
        if self._board is not None:
            terms += list(self._board.shares(samples.x, samples.y))
        self._design = np.stack(terms, axis=1)
        self._limit = _HUBER * np.sqrt(samples.sigma**2 + own)
        self.weight = own / (samples.sigma**2 + own)
        self._weighted = self._design * self.weight[:, None]
        self._sums = [
            np.einsum("ni,nj->ij", self._weighted[fold == k], self._design[fold == k])
            for k in range(int(fold.max()) + 1)
        ]

    def added(
        self, terms: int, ratio: float = 0.0, without: frozenset[int] = frozenset()
    ) -> Floats:
        """(n,) metres that a fit to all folds but some adds at every sample.

        Args:
            terms: 1 for a constant, 2 with the slope (and the surface).
            ratio: standard deviation of the surface's coefficients, in those of the map's error.
            without: folds that are left out of the fit.
        """
        found = self._fit(terms, ratio, without)
        return np.asarray(np.einsum("nk,k->n", self._design[:, : len(found)], found))

    def whole(self, terms: int, ratio: float) -> tuple[float, float, Surface | None]:
        """Constant, slope and surface of a fit to all folds."""
        found = self._fit(terms, ratio, frozenset())
        slope = float(found[1]) if terms > 1 else 0.0
        if self._board is None:
            return float(found[0]), slope, None
        coefficients = found[2:].reshape(self._board.coefficients.shape)
        board = self._board
        surface = Surface(board.left, board.bottom, board.spacing, coefficients)
        return float(found[0]), slope, surface

    def _fit(self, terms: int, ratio: float, without: frozenset[int]) -> Floats:
        """(terms,) coefficients."""
        size = 1 if terms == 1 else self._design.shape[1]
        kept = ~np.isin(self._fold, list(without))
        sums = [part for fold, part in enumerate(self._sums) if fold not in without]
        penalty = np.full(size, 1e-9 * int(kept.sum()))
        if ratio:
            penalty[2:] += ratio**-2
        inverse = inverted(np.sum(sums, axis=0)[:size, :size] + np.diag(penalty))
        design, weighted = self._design[kept, :size], self._weighted[kept, :size]
        wanted, limit = self._samples.wanted[kept], self._limit[kept]
        fitted = np.full(len(wanted), np.median(wanted))
        for _ in range(_REFITS):
            pseudo = fitted + np.clip(wanted - fitted, -limit, limit)
            found = np.einsum("ij,j->i", inverse, np.einsum("nk,n->k", weighted, pseudo))
            before, fitted = fitted, np.einsum("nk,k->n", design, found)
            if np.abs(fitted - before).max() < _SETTLED * np.sqrt(self._own):
                break
        return np.asarray(found, dtype=np.float64)


def inverted(matrix: Floats) -> Floats:
    """The inverse of a symmetric positive definite matrix, by sweeping each of its pivots.

    Goodnight (1979), doi:10.1080/00031305.1979.10482685.
    """
    out = matrix.copy()
    for k in range(len(out)):
        pivot, column = out[k, k], out[:, k].copy()
        row = out[k] / pivot
        out -= np.multiply.outer(column, row)
        out[k] = row
        out[:, k] = -column / pivot
        out[k, k] = 1 / pivot
    return out


def _board(samples: Samples, spacing: float) -> Surface:
    """A surface of zeros over all samples, and no larger."""
    left, bottom = float(samples.x.min()), float(samples.y.min())
    sides = (np.ptp(samples.y), np.ptp(samples.x))
    shape = [max(int(np.ceil(side / spacing - 1e-9)), 1) + 3 for side in sides]
    return Surface(left, bottom, spacing, np.zeros(shape))
