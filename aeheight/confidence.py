"""Confidence intervals of a map's accuracy, by a block bootstrap over stored sums.

Pixels are not independent samples: their number says nothing of how well an RMSE is known. Blocks
of ground wider than errors go together hardly depend on each other. They are drawn with
replacement, as many as there are, and the metrics of each draw come from the sums of its blocks:
no pixel is read again.

Sources:
    Künsch (1989), The jackknife and the bootstrap for general stationary observations,
    doi:10.1214/aos/1176347265.
    Lahiri (2003), Resampling methods for dependent data, doi:10.1007/978-1-4757-3803-2.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from aeheight.blocks import Blocks
from aeheight.counts import Counts
from aeheight.metrics import BIN

LEVEL: Final = 0.95
"""Share of repeated surveys whose interval would hold the true value."""

METRICS: Final = ("rmse", "mean", "median", "nmad", "le90", "r2")
"""What has an interval, by the names of `metrics.GLOSSARY`."""

FEW: Final = 20
"""Blocks below which intervals tend to be too narrow."""

_MOST_BINS: Final = 4096
"""Bins of d in one draw: of more, odd numbers of bins are joined."""

_AT_ONCE: Final = 256
"""Blocks whose histograms are laid out side by side."""


def draw(blocks: int, draws: int, seed: int) -> NDArray[np.int64]:
    """(draws, blocks) how often each block is drawn, by numpy's PCG64 generator."""
    share = np.full(blocks, 1 / blocks)
    return np.random.default_rng(seed).multinomial(blocks, share, size=draws)


def resampled(
    blocks: Blocks, weights: NDArray[np.int64]
) -> tuple[dict[str, NDArray[np.float64]], float]:
    """The METRICS of every draw.

    Moments are exact; quantiles are at most half of the width told off, nmad 1.5 times it.

    Args:
        blocks: (b) of them, each with pixels.
        weights: (draws, b) from `draw`.

    Returns:
        (draws,) of each metric in metres (r2: of 1, NaN on ground that is all the same), and the
        width of the bins of d, metres.
    """
    n, sum_d, sum_squares, mean_r, m2_r = blocks.moments.T
    times = weights.astype(np.float64)
    pixels, squares = times @ n, times @ sum_squares
    offset = mean_r - np.average(mean_r, weights=n)
    mean = (times @ (n * offset)) / pixels
    relief = times @ (m2_r + n * offset**2) - pixels * mean**2
    found = {
        "rmse": np.sqrt(squares / pixels),
        "mean": (times @ sum_d) / pixels,
        "r2": 1 - squares / np.where(relief > 0, relief, np.nan),
    }
    factor, bins, drawn = _histograms(blocks, times)
    width = factor * BIN
    quantiles = np.array([_quantiles(bins, counts) for counts in drawn]) * width
    return found | dict(zip(("median", "nmad", "le90"), quantiles.T, strict=True)), width


def interval(values: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """The percentile interval of LEVEL; None, None where a draw left it undefined."""
    if not np.isfinite(values).all():
        return None, None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _quantiles(bins: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[float, float, float]:
    """Median, NMAD and LE90 of one draw, in bins."""
    there = counts > 0
    histogram = Counts(bins[there], counts[there])
    median = histogram.quantile(0.5)
    deviation = histogram.folded(median).quantile(0.5) / 2
    return median, 1.4826 * deviation, histogram.folded(0).quantile(0.9) / 2


def _histograms(
    blocks: Blocks, times: NDArray[np.float64]
) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """(bins of BIN in one, (k,) those that hold something, (draws, k) counts of each draw)."""
    factor, bins = 1, blocks.bins
    while (occupied := np.unique(bins)).size > _MOST_BINS:
        factor = 2 * factor + 1
        bins = (blocks.bins + factor // 2) // factor
    place, owners = np.searchsorted(occupied, bins), blocks.owners
    drawn = np.zeros((len(times), occupied.size))
    for start in range(0, len(blocks.keys), _AT_ONCE):
        first, last = np.searchsorted(owners, [start, start + _AT_ONCE])
        size = min(_AT_ONCE, len(blocks.keys) - start)
        flat = (owners[first:last] - start) * occupied.size + place[first:last]
        dense = np.bincount(flat, blocks.cells.counts[first:last], size * occupied.size)
        drawn += times[:, start : start + size] @ dense.reshape(size, -1)  # whole numbers: exact
    return factor, occupied, drawn.astype(np.int64)
