"""How far errors go together: the semivariogram of a map's errors, from sums that add up.

Neighbouring pixels err together. Test ground is independent of training ground only where it is
farther away than that, so a split's buffer should be at least the correlation length.

Pairs of pixels are counted within one task's shard: sums add up over shards, and what is read does
not grow. Another cut into shards therefore counts a few other pairs, up to another largest lag.

Sources:
    Matheron (1963), Principles of geostatistics, doi:10.2113/gsecongeo.58.8.1246.
    Chilès & Delfiner (2012), Geostatistics, doi:10.1002/9781118136188, for the practical range.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from aeheight import loops
from aeheight.errors import InputError

LAGS: Final = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512)
"""Distances in pixels, about half an octave apart; a shard counts those up to half its edge."""

REACHED: Final = 0.95
"""Share of the sill at which errors no longer go together: what is left is a correlation of 5 %."""

FEWEST: Final = 100
"""Pairs below which the semivariance of a lag is not looked at."""


@dataclass(frozen=True, eq=False)
class Variogram:
    """Sums over pairs of pixels at each of the `LAGS`; ``+`` merges two of them."""

    pairs: NDArray[np.int64]
    """(lags,) pairs of pixels, along rows and along columns."""

    squares: NDArray[np.float64]
    """(lags,) sum of the squared differences of their errors, m²."""

    @classmethod
    def zero(cls) -> "Variogram":
        """No pairs: what ``+`` leaves unchanged."""
        return cls(np.zeros(len(LAGS), np.int64), np.zeros(len(LAGS)))

    @classmethod
    def of(cls, errors: NDArray[np.floating], judged: NDArray[np.bool_]) -> "Variogram":
        """The pairs of one shard.

        Args:
            errors: (rows, columns) predicted - reference, metres.
            judged: (rows, columns) pixels that count.

        Raises:
            InputError: shapes differ, or an error that counts is NaN or infinite.
        """
        if errors.ndim != 2 or errors.shape != judged.shape:
            raise InputError(
                f"errors have shape {errors.shape} and judged {judged.shape}; give equal ones of "
                "rows and columns"
            )
        if not np.isfinite(errors[judged]).all():
            raise InputError("an error that counts is NaN or infinite; leave it out of `judged`")
        known = np.where(judged, errors, 0.0)
        total = cls.zero()
        for turned in (known, judged), (known.T, judged.T):
            values, there = map(np.ascontiguousarray, turned)
            for k, lag in enumerate(LAGS):
                if lag <= len(values) // 2:
                    pairs, squares = loops.steps(values, there, lag)
                    total.pairs[k] += pairs
                    total.squares[k] += squares
        return total

    def __add__(self, other: "Variogram") -> "Variogram":
        return Variogram(self.pairs + other.pairs, self.squares + other.squares)

    def semivariance(self) -> NDArray[np.float64]:
        """(lags,) half the mean squared difference, m² (Matheron 1963); NaN for a lack of pairs."""
        enough = self.pairs >= FEWEST
        return np.where(enough, self.squares / np.maximum(2 * self.pairs, 1), np.nan)

    @property
    def farthest(self) -> int | None:
        """The largest lag that has enough pairs, pixels; None: no lag has."""
        seen = np.flatnonzero(self.pairs >= FEWEST)
        return LAGS[seen[-1]] if seen.size else None

    def length(self, sill: float) -> float | None:
        """The practical range in pixels: where the semivariance first reaches 95 % of the sill.

        Between lags it is interpolated, from 0 at lag 0: errors that are independent from pixel to
        pixel have a length below 1.

        Args:
            sill: the variance of all errors, m²: what the semivariance of errors rises to where
                they no longer go together.

        Returns:
            None where no lag reaches it: errors go together farther than is seen here. 0 where
            errors do not vary.
        """
        seen = self.pairs >= FEWEST
        if sill <= 0 and seen.any():
            return 0.0
        lags = np.concatenate([[0.0], np.asarray(LAGS, np.float64)[seen]])
        rise = np.concatenate([[0.0], self.semivariance()[seen]])
        beyond = np.flatnonzero(rise >= REACHED * sill)
        if not beyond.size or not beyond[0]:
            return None
        k = int(beyond[0])
        part = (REACHED * sill - rise[k - 1]) / (rise[k] - rise[k - 1])
        return float(lags[k - 1] + part * (lags[k] - lags[k - 1]))

    def summary(self, sill: float, pixel: float, buffer: int | None) -> dict[str, Any]:
        """All of it, as JSON can hold it.

        Args:
            sill: the variance of all errors, m².
            pixel: edge of a pixel, metres.
            buffer: pixels between ground of different use; None: it says nothing of this model.

        Returns:
            `length_px` and `length_m`, None where the length is not seen; `farthest_px`, the
            largest lag with enough pairs; `buffer_px`, and whether it is as wide as the length
            (`covered`, None where that is not known); `sill_m2`; and for every lag `lags_px`,
            `pairs` and `semivariance_m2`.
        """
        length = self.length(sill)
        return {
            "length_px": length,
            "length_m": None if length is None else length * pixel,
            "farthest_px": self.farthest,
            "buffer_px": buffer,
            "covered": self._covered(buffer, length),
            "sill_m2": sill,
            "lags_px": list(LAGS),
            "pairs": self.pairs.tolist(),
            "semivariance_m2": [None if np.isnan(v) else float(v) for v in self.semivariance()],
        }

    def _covered(self, buffer: int | None, length: float | None) -> bool | None:
        if buffer is None or self.farthest is None:
            return None
        if length is not None:
            return buffer >= length
        return False if buffer <= self.farthest else None
