"""How far the heights of one ground are from those of another: how hard a test is.

A model errs more where heights are distributed unlike those that it was trained on. So the report
says how unlike they are, from histograms that add up over shards.

Sources:
    Vallender (1974), Calculation of the Wasserstein distance between probability distributions on
    the line, doi:10.1137/1118101.
    Inman & Bradley (1989), The overlapping coefficient as a measure of agreement between
    probability distributions, doi:10.1080/03610928908830127.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from aeheight.counts import Counts
from aeheight.metrics import CELL, Scatter

BINS: Final = 50
"""Most bins of the overlap: with more, samples of one distribution seem to differ by chance."""

TAIL: Final = 0.01
"""What is beyond this quantile of the training ground, at either end, it has hardly seen."""

Row = dict[str, int | float | None]


@dataclass(frozen=True)
class Heights:
    """How many pixels have which height; ``+`` merges two of them, exactly and in any order."""

    cells: Counts
    """Bin k holds the heights from k to k + 1 metres; whole numbers, so they add exactly."""

    @classmethod
    def of(cls, heights: NDArray[np.floating]) -> "Heights":
        """Count heights in metres, of any shape; NaN is passed over."""
        known = heights[~np.isnan(heights)].astype(np.float64)
        return cls(Counts.of(np.floor(known / CELL).astype(np.int64)))

    @classmethod
    def judged(cls, scatter: Scatter) -> "Heights":
        """The reference heights of the pixels of a scatter: those that have a prediction too."""
        rows = (scatter.cells.bins + 2**31) >> 32
        return cls(Counts.summed(rows, scatter.cells.counts))

    def __add__(self, other: "Heights") -> "Heights":
        return Heights(self.cells + other.cells)

    @property
    def n(self) -> int:
        """Pixels counted."""
        return int(self.cells.counts.sum())

    def summary(self) -> Row:
        """n, and mean, std, p5, p50, p95 in metres (bins count at their middle), None where empty.

        Quantiles are at most half a metre off.
        """
        if not self.n:
            return {"n": 0} | dict.fromkeys(("mean", "std", "p5", "p50", "p95"))
        middle, share = self._middles(), self.cells.counts / self.n
        mean = float(np.sum(middle * share))
        return {
            "n": self.n,
            "mean": mean,
            "std": math.sqrt(float(np.sum((middle - mean) ** 2 * share))),
            **{f"p{percent}": self._quantile(percent / 100) for percent in (5, 50, 95)},
        }

    def _middles(self) -> NDArray[np.float64]:
        middles: NDArray[np.float64] = (self.cells.bins.astype(np.float64) + 0.5) * CELL
        return middles

    def _quantile(self, q: float) -> float:
        return (self.cells.quantile(q) + 0.5) * CELL

    def beyond(self, low: float, high: float) -> float:
        """Share of the pixels below `low` or above `high`, metres."""
        middle = self._middles()
        return float(self.cells.counts[(middle < low) | (middle > high)].sum() / self.n)


def wasserstein(first: Heights, second: Heights) -> float | None:
    """Wasserstein-1 distance in metres: how far heights must move, on average, to be the others.

    The integral of the difference of the cumulative distributions (Vallender 1974). Against the
    heights themselves it is at most 1 m off, as they count in bins of 1 m. None where one is empty.
    """
    if not (first.n and second.n):
        return None
    bins = np.union1d(first.cells.bins, second.cells.bins)
    ahead = _cumulative(first, bins) - _cumulative(second, bins)
    return float(np.sum(np.abs(ahead[:-1]) * np.diff(bins))) * CELL


def _cumulative(heights: Heights, bins: NDArray[np.int64]) -> NDArray[np.float64]:
    """(k,) share of the pixels in each bin or below it."""
    counts = np.zeros(bins.size, np.int64)
    counts[np.searchsorted(bins, heights.cells.bins)] = heights.cells.counts
    shares: NDArray[np.float64] = np.cumsum(counts) / heights.n
    return shares


def overlap(first: Heights, second: Heights) -> float | None:
    """Overlap coefficient of two distributions: 1 where they are the same, 0 where apart.

    The sum of the smaller of both shares over common bins (Inman & Bradley 1989): equal bins from
    the lowest 1 % quantile of both to the highest 99 %, with what is beyond in the outermost; as
    many as the root of the smaller number of pixels, 50 at most, of whole metres. None where one
    is empty.
    """
    if not (first.n and second.n):
        return None
    number = min(BINS, math.isqrt(min(first.n, second.n)))
    low = math.floor(min(one.cells.quantile(TAIL) for one in (first, second)))
    high = math.floor(max(one.cells.quantile(1 - TAIL) for one in (first, second)))
    width = -(-(high - low + 1) // number)
    shares = []
    for one in (first, second):
        place = np.clip((one.cells.bins - low) // width, 0, number - 1)
        shares.append(np.bincount(place, one.cells.counts, number) / one.n)
    return float(np.minimum(*shares).sum())


def shift(heights: Mapping[str, Heights], trained: Heights | None) -> dict[str, Row]:
    """One row for each ground: its heights, and how far they are from those trained on.

    Args:
        heights: of each ground, by name.
        trained: of the ground that the model was trained on; None: not known.

    Returns:
        By name: `summary`, and `wasserstein_m` (metres), `overlap` (0 to 1) and `outside`: the
        share beyond the lowest and the highest 1 % of the training ground, 0.02 where heights are
        distributed alike. The last three are None where there is nothing to compare.
    """
    return {name: one.summary() | _from(trained, one) for name, one in heights.items()}


def _from(trained: Heights | None, ground: Heights) -> Row:
    if trained is None or not (trained.n and ground.n):
        return dict.fromkeys(("wasserstein_m", "overlap", "outside"))
    return {
        "wasserstein_m": wasserstein(trained, ground),
        "overlap": overlap(trained, ground),
        "outside": ground.beyond(trained._quantile(TAIL), trained._quantile(1 - TAIL)),
    }
