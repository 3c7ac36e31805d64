"""Do the intervals of height ± spread hold the true heights? From integer sums that merge."""

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from aeheight import loops
from aeheight.counts import check_labels
from aeheight.errors import InputError

Summary = dict[str, float | None]

_PARTS: Final = 16
"""Bins of |d| / spread for each whole one."""
_LARGEST: Final = 8
"""From here on |d| / spread is counted as one."""
_MILLIMETRES: Final = 1000

GLOSSARY: Final[dict[str, str]] = {
    "coverage": "Share of the pixels whose reference lies within predicted ± spread: 0.9 "
    "is what the spread is calibrated for.",
    "spread": "Mean spread, half the width of the 90 % interval, metres.",
    "score": "Mean of width + 20 × how far the reference lies outside, metres: the lower "
    "the better, for intervals that are both narrow and right (Gneiting & Raftery 2007).",
    "factor": "What the spreads would have to be multiplied by to hold 90 % here.",
}
"""What each figure of a summary means."""


@dataclass(frozen=True, slots=True, eq=False)
class Intervals:
    """Sums over pixels that have a reference, a height and a spread; `+` merges them, exactly.

    The interval score: Gneiting & Raftery (2007), doi:10.1198/016214506000001437, eq. 43.
    """

    sums: NDArray[np.int64]
    """(4 + k,) pixels, those within, their spreads and what lies outside in millimetres; then a
    histogram of |d| / spread, the last bin for all from 8 on."""

    @classmethod
    def zero(cls) -> Self:
        """Nothing judged: what `+` leaves unchanged."""
        return cls(np.zeros(4 + _PARTS * _LARGEST + 1, np.int64))

    @classmethod
    def of(cls, difference: NDArray[np.float32], spread: NDArray[np.float32]) -> Self:
        """Sum up pixels (n,): predicted - reference and spread, metres; errors as `by`."""
        return cls.by(difference, spread, np.zeros(difference.shape, np.int32), 1)[0]

    @classmethod
    def by(
        cls,
        difference: NDArray[np.float32],
        spread: NDArray[np.float32],
        labels: NDArray[np.int32],
        count: int,
    ) -> list[Self]:
        """Sum up ground by classes, in one pass.

        Args:
            difference: predicted - reference, metres, any shape.
            spread: metres above 0, the same shape; NaN where there is none.
            labels: the same shape, or several such along a first axis: number of the class of each
                pixel, -1 for those not judged; where there are a label and a spread, the
                difference is finite.
            count: of classes, of all axes together.

        Raises:
            InputError: shapes differ, a label is no class, or a spread is infinite or not above 0.
        """
        check_labels({"difference": difference, "spread": spread}, labels, count)
        if (strange := spread[(spread <= 0) | np.isinf(spread)]).size:
            raise InputError(
                f"{strange.size} spreads are {strange[0]} m and the like; a spread is above 0, and "
                "NaN where there is none: make the map again with aeheight predict --overwrite"
            )
        d, s = (np.ascontiguousarray(values).reshape(-1) for values in (difference, spread))
        flat = np.ascontiguousarray(labels).reshape(labels.size // max(d.size, 1), d.size)
        return [cls(sums) for sums in loops.within(d, s, flat, count, _PARTS, _LARGEST)]

    def __add__(self, other: Self) -> Self:
        return type(self)(self.sums + other.sums)

    def summary(self) -> Summary:
        """The figures that `GLOSSARY` explains; None where there are no pixels.

        `factor` is right to 1/16, and None from 8 on.
        """
        n, within, half, outside = (int(value) for value in self.sums[:4])
        if n == 0:
            return dict.fromkeys(GLOSSARY)
        return {
            "coverage": within / n,
            "spread": half / n / _MILLIMETRES,
            "score": (2 * half + 20 * outside) / n / _MILLIMETRES,
            "factor": self._factor(0.9 * n),
        }

    def calibration(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Edges (k + 1,) of |d| / spread, the last infinite, and counts (k,)."""
        counts = self.sums[4:]
        return np.append(np.linspace(0, _LARGEST, counts.size), np.inf), counts

    def _factor(self, wanted: float) -> float | None:
        """|d| / spread below which so many pixels lie, linear within a bin."""
        below = np.concatenate([[0], np.cumsum(self.sums[4:-1])])
        if below[-1] < wanted:
            return None
        edges = np.arange(below.size) / _PARTS
        k = int(np.searchsorted(below, wanted))
        share = (wanted - below[k - 1]) / (below[k] - below[k - 1])
        return float(edges[k - 1] + share / _PARTS)
