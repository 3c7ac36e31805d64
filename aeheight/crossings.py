"""Do seams show? Steps of the errors across the edges of windows and shards, against steps beside.

Where windows or shards meet, two predictions lie side by side. If that leaves a step, the error
changes more from one side of the line to the other than it does one pixel further on. The ratio of
the two is 1 where nothing shows. Its uncertainty comes from stretches of line, as of a ratio of two
sums (Cochran 1977, Sampling techniques, section 6.4).
"""

import math
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from aeheight.windows import Region

MARGIN: Final = 2
"""Pixels that are needed about a piece of ground."""

STRETCH: Final = 64
"""Pixels of a line that count as one sample: nearer than that, steps go together."""


@dataclass(frozen=True, slots=True, eq=False)
class Crossings:
    """Sums over stretches of line; ``+`` merges two of them.

    A stretch ends where a piece of ground does: the interval is a little narrower where the edge of
    pieces is no multiple of STRETCH.
    """

    sums: NDArray[np.float64]
    """(7,) pairs of pixels, stretches, Σx, Σy, Σx², Σxy, Σy²: of a stretch, y is the sum of the
    absolute steps of d across the line, x the mean of the two sums beside it, metres."""

    @classmethod
    def zero(cls) -> Self:
        """No lines: what ``+`` leaves unchanged."""
        return cls(np.zeros(7))

    @classmethod
    def of(cls, errors: NDArray[np.floating], region: Region, every: int) -> Self:
        """The lines of one piece of ground.

        Args:
            errors: (rows + 2 * MARGIN, columns + 2 * MARGIN) d, metres; NaN where it is unknown.
            region: the piece, without the margin.
            every: pixels from one line to the next on the whole grid; the grid's edge is none.
        """
        total = cls.zero()
        tall = errors[:, MARGIN:-MARGIN], region.row, region.col, region.height
        wide = errors.T[:, MARGIN:-MARGIN], region.col, region.row, region.width
        for values, start, along, size in (tall, wide):
            first = -(-max(start, 1) // every) * every
            for line in range(first, start + size, every):
                strip = values[line - start : line - start + 2 * MARGIN].astype(np.float64)
                total += cls._of_line(strip, along)
        return total

    @classmethod
    def _of_line(cls, strip: NDArray[np.float64], along: int) -> Self:
        """Two pixels on either side of a line (4, k), of which the first lies `along` it."""
        beside, across, beyond = np.abs(np.diff(strip, axis=0))
        known = np.isfinite(beside + across + beyond)
        stretch = (along + np.arange(known.size)[known]) // STRETCH - along // STRETCH
        if not stretch.size:
            return cls.zero()
        x = np.bincount(stretch, (beside[known] + beyond[known]) / 2)
        y = np.bincount(stretch, across[known])
        there = np.unique(stretch).size
        return cls(np.array([stretch.size, there, x.sum(), y.sum(), x @ x, x @ y, y @ y]))

    def __add__(self, other: Self) -> Self:
        return type(self)(self.sums + other.sums)

    def summary(self) -> dict[str, Any] | None:
        """The mean step across lines and beside them, and their ratio; None where there are none.

        Returns:
            `pairs`; `across_m` and `beside_m`, metres; `ratio`, and its 95 % interval from `lo` to
            `hi`, None where there is one stretch, or no step beside.
        """
        pairs, stretches, x, y, xx, xy, yy = self.sums.tolist()
        if not pairs:
            return None
        told = {"pairs": int(pairs), "across_m": y / pairs, "beside_m": x / pairs}
        if x <= 0 or stretches < 2:
            return told | {"ratio": y / x if x > 0 else None, "lo": None, "hi": None}
        ratio = y / x
        left = max(yy - 2 * ratio * xy + ratio**2 * xx, 0.0)
        error = math.sqrt(left * stretches / (stretches - 1)) / x
        return told | {"ratio": ratio, "lo": ratio - 1.96 * error, "hi": ratio + 1.96 * error}
