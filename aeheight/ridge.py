"""The ridge regression of height on the embedding, pixel by pixel, from sums that add.

The baseline that every map is judged by, and the base that a network may correct: a linear term
extrapolates to heights that training ground does not have.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from aeheight import loops
from aeheight.embeddings import decode_table, valid
from aeheight.errors import InputError

_BLOCK = 65_536

SHORTEST: Final = 1e-3
"""Embeddings are taken to be at least so long, so that one of zeros divides nothing by 0."""


def squares() -> NDArray[np.float64]:
    """(256,) squared value of every code, by unsigned byte, 0 for nodata: what a length sums."""
    return np.square(decode_table(0.0), dtype=np.float64)


def lengths(codes: NDArray[np.int8]) -> NDArray[np.float64]:
    """Euclidean lengths of the embeddings of codes (64, ...), shape (...), at least `SHORTEST`.

    1 for a pixel as it is delivered, less for a mean over pixels that differ: 0.68 to 1 in pixels
    of 900 m. How unlike the parts of a pixel are says little of their height, so a regression on
    x / sqrt|x| carries further than one on x. Added up band by band, as `Ridge.predict` does.
    """
    tables = np.broadcast_to(squares(), (len(codes), 256))
    return np.maximum(np.sqrt(_looked_up(codes, tables, 0.0)), SHORTEST)


def _looked_up(
    codes: NDArray[np.int8], tables: NDArray[np.float64], start: float
) -> NDArray[np.float64]:
    """`start` and what the codes (64, ...) stand for in tables (64, 256), band by band: (...)."""
    flat = np.ascontiguousarray(codes).reshape(len(codes), -1)
    total: NDArray[np.float64] = loops.looked_up(flat, tables, start).reshape(codes.shape[1:])
    return total


@dataclass(frozen=True, slots=True)
class Ridge:
    """A linear regression of height on the embedding, pixel by pixel."""

    weights: NDArray[np.float64]
    """(64,) metres for one unit of each band."""
    intercept: float
    """Metres."""
    mean: float
    """Mean of the heights that it was fitted on, metres: the simplest baseline."""
    n: int
    """Pixels that it was fitted on."""
    evened: bool = False
    """Whether it takes embeddings divided by the root of their length, as `lengths` says."""

    @property
    def terms(self) -> NDArray[np.float64]:
        """What each code of each band adds to the height, metres: (64, 256), by unsigned byte."""
        return self.weights[:, None] * decode_table(0.0).astype(np.float64)

    def predict(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """Heights in metres of codes (64, ...): shape (...), NaN where there is no embedding.

        Bands are added one by one, so that a pixel's value has the same bits wherever it lies and
        whichever device computes it, which a matrix product does not promise.
        """
        return np.where(valid(codes), self.total(codes), np.nan).astype(np.float32)

    def total(self, codes: NDArray[np.int8]) -> NDArray[np.float64]:
        """As `predict`, before it is rounded; any value where there is no embedding."""
        total = _looked_up(codes, self.terms, 0.0 if self.evened else self.intercept)
        return total / np.sqrt(lengths(codes)) + self.intercept if self.evened else total


@dataclass(frozen=True, slots=True, eq=False)
class RidgeSums:
    """All that a ridge regression needs of its pixels; `+` merges the sums of two sets.

    Centred float64 moments and their pairwise update: Chan, Golub & LeVeque (1983),
    doi:10.1080/00031305.1983.10483115.
    """

    n: int
    """Pixels."""
    mean_x: NDArray[np.float64]
    """(64,) mean of each band."""
    mean_y: float
    """Mean height, metres."""
    c_xx: NDArray[np.float64]
    """(64, 64) sum of the products of the bands' deviations from their means."""
    c_xy: NDArray[np.float64]
    """(64,) the same of bands and height, metres."""
    m2_y: float
    """Sum of the squared deviations of the heights, square metres."""
    evened: bool = False
    """As in `Ridge`; both sets must be of one kind."""

    @classmethod
    def of(
        cls, codes: NDArray[np.int8], heights: NDArray[np.float32], *, evened: bool = False
    ) -> "RidgeSums":
        """The sums of codes (64, n) and heights (n,) in metres; all of them must be there."""
        bands, n = codes.shape
        none, square = np.zeros(bands), np.zeros((bands, bands))
        total = cls(0, none, 0.0, square, none, 0.0, evened)
        for start in range(0, n, _BLOCK):
            stop = start + _BLOCK
            total += cls._of_block(codes[:, start:stop], heights[start:stop], evened)
        return total

    @classmethod
    def _of_block(
        cls, codes: NDArray[np.int8], heights: NDArray[np.float32], evened: bool
    ) -> "RidgeSums":
        x = decode_table()[codes].astype(np.float64)
        if evened:
            x /= np.sqrt(lengths(codes))
        y = heights.astype(np.float64)
        mean_x, mean_y = x.mean(axis=1), float(y.mean())
        x -= mean_x[:, None]
        y -= mean_y
        return cls(y.size, mean_x, mean_y, x @ x.T, x @ y, float(y @ y), evened)

    def __add__(self, other: "RidgeSums") -> "RidgeSums":
        n = self.n + other.n
        if n == 0:
            return self
        share = other.n / n
        step_x, step_y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        weight = self.n * share
        return RidgeSums(
            n,
            self.mean_x + step_x * share,
            self.mean_y + step_y * share,
            self.c_xx + other.c_xx + np.outer(step_x, step_x) * weight,
            self.c_xy + other.c_xy + step_x * (step_y * weight),
            self.m2_y + other.m2_y + step_y * step_y * weight,
            self.evened,
        )

    def solve(self, alpha: float) -> Ridge:
        """The ridge regression of these pixels: `(Cxx + penalty I) w = Cxy`.

        Args:
            alpha: the penalty as a share of the mean variance of a band.

        Raises:
            InputError: fewer than two pixels, or heights or embeddings that are all the same.
        """
        if self.n < 2:
            raise InputError(
                f"{self.n} training pixels have both an embedding and a reference height, and a "
                "model needs at least 2: let `split` leave more ground to training "
                "(smaller test, validation or buffer), or check that `height` covers it"
            )
        spread = float(np.trace(self.c_xx)) / len(self.c_xy)
        if math.sqrt(self.m2_y / self.n) < 1e-6 or spread == 0:
            what = "embeddings" if spread == 0 else f"heights ({self.mean_y:.3f} m)"
            raise InputError(
                f"the {what} of all {self.n} training pixels are the same, so there is nothing to "
                "learn: let `split` leave other ground to training, or check the sources"
            )
        penalised = self.c_xx + alpha * spread * np.eye(len(self.c_xy))
        weights = np.linalg.solve(penalised, self.c_xy).astype(np.float64)
        intercept = self.mean_y - float(weights @ self.mean_x)
        return Ridge(weights, intercept, self.mean_y, self.n, self.evened)

    def rmse(self, ridge: Ridge) -> float:
        """Root mean square error in metres of `ridge`, solved from these sums, on their pixels."""
        w = ridge.weights
        squares = self.m2_y - 2 * float(w @ self.c_xy) + float(w @ self.c_xx @ w)
        return math.sqrt(max(squares, 0.0) / self.n)
