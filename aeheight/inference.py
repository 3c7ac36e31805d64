"""One region of a map: windows of the global lattice, through the model, blended, cropped.

Window origins come from the grid, never from the region, and every batch has the same shape: so a
pixel's height is the same whichever region asked for it, bit for bit.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from aeheight.embeddings import BANDS, NODATA, valid
from aeheight.windows import Lattice, Region

ReadCodes = Callable[[Region], NDArray[np.int8]]
"""(64, rows, columns) codes of any region, -128 past the grid's edge."""
ReadPrior = Callable[[Region], NDArray[np.float32]]
"""(rows, columns) prior of any region, NaN past the grid's edge."""
Model = Callable[[NDArray[np.int8], NDArray[np.float32] | None], NDArray[np.float32]]
"""(batch, 64, w, w) codes and (batch, w, w) prior to (batch, w, w) heights.

NaN where there is no embedding: a window that keeps none is not run."""


def predict_region(
    model: Model,
    lattice: Lattice,
    region: Region,
    batch: int,
    read_codes: ReadCodes,
    read_prior: ReadPrior | None = None,
) -> NDArray[np.float32]:
    """The heights of a region, NaN where the model gives none.

    Args:
        model: takes batches of exactly `batch` windows.
        lattice: over the whole grid.
        region: any part of the grid.
        batch: windows in one forward pass; a short batch is filled with nodata.
        read_codes: called once, for all windows together.
        read_prior: likewise; None for a model without a prior.

    Returns:
        (rows, columns) float32 metres.
    """
    windows = lattice.windows(region)
    seen = lattice.hull(region)
    codes = read_codes(seen)
    prior = read_prior(seen) if read_prior else None
    # A window that keeps nothing but nodata cannot change the map.
    windows = [w for w in windows if _keeps_any(codes, seen, lattice.kept(w).intersect(region))]
    blend = _Blend(lattice, region)
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch]
        edge = lattice.window
        codes_batch = np.full((batch, BANDS, edge, edge), NODATA, dtype=np.int8)
        prior_batch = None if prior is None else np.full((batch, edge, edge), np.nan, np.float32)
        for i, window in enumerate(part):
            rows, cols = window.within(seen).slices
            codes_batch[i] = codes[:, rows, cols]
            if prior is not None and prior_batch is not None:
                prior_batch[i] = prior[rows, cols]
        for window, heights in zip(part, model(codes_batch, prior_batch), strict=False):
            blend.add(window, heights)
    return blend.result()


def _keeps_any(codes: NDArray[np.int8], seen: Region, kept: Region | None) -> bool:
    if kept is None:
        return False
    rows, cols = kept.within(seen).slices
    return bool(valid(codes[:, rows, cols]).any())


class _Blend:
    """The weighted mean of the windows that keep a pixel, in the lattice's order.

    The order of the sums is the lattice's, for every region: the mean is the same to the last bit.
    """

    def __init__(self, lattice: Lattice, region: Region) -> None:
        self._lattice = lattice
        self._region = region
        self._taper = lattice.taper()
        self._sum = np.zeros(region.shape)
        self._weight = np.zeros(region.shape)

    def add(self, window: Region, heights: NDArray[np.float32]) -> None:
        """Take in a window's result, shape (window, window)."""
        kept = self._lattice.kept(window)
        shared = kept.intersect(self._region)
        if shared is None:
            return
        values = heights[shared.within(window).slices].astype(np.float64)
        weights = self._taper[shared.within(kept).slices]
        target = shared.within(self._region).slices
        self._sum[target] += weights * values
        self._weight[target] += weights

    def result(self) -> NDArray[np.float32]:
        """The region's heights: NaN where nothing was kept."""
        out = np.full(self._region.shape, np.nan, dtype=np.float32)
        np.divide(self._sum, self._weight, out=out, where=self._weight > 0, casting="same_kind")
        return out
