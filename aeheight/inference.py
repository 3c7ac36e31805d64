"""One region of a map: windows of the global lattice, through the model, blended, cropped.

Window origins come from the grid, never from the region, and every batch has the same shape: so a
pixel's height is the same whichever region asked for it, bit for bit.
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from aeheight.embeddings import NODATA, valid
from aeheight.windows import Lattice, Region

ReadCodes = Callable[[Region], NDArray[np.int8]]
"""(64, rows, columns) codes of any region, -128 past the grid's edge."""
ReadPrior = Callable[[Region], NDArray[np.float32]]
"""(rows, columns) prior of any region, NaN past the grid's edge."""

_T = TypeVar("_T", np.int8, np.float32)

_AHEAD = 1
"""Batches that are filled while the model works on the one before."""


class Pending(Protocol):
    """A batch that the model works on."""

    def result(self) -> NDArray[np.float32]:
        """(layers, batch, k, k), once it is there."""


Model = Callable[[NDArray[np.int8], NDArray[np.float32] | None, int], Pending]
"""(batch, 64, w, w) codes, (batch, w, w) prior and a halo to (layers, batch, k, k) values.

k = w - 2 * halo: the middle of every window. NaN where there is no embedding: a window that keeps
none is not run."""


def predict_region(
    model: Model,
    lattice: Lattice,
    region: Region,
    batch: int,
    read_codes: ReadCodes,
    read_prior: ReadPrior | None = None,
    *,
    layers: int = 1,
) -> NDArray[np.float32]:
    """The layers of a region's map, NaN where the model gives none.

    Args:
        model: takes batches of exactly `batch` windows.
        lattice: over the whole grid.
        region: any part of the grid.
        batch: windows in one forward pass; a short batch is filled with nodata.
        read_codes: called once, for all windows together.
        read_prior: likewise; None for a model without a prior.
        layers: that the model gives.

    Returns:
        (layers, rows, columns) float32.
    """
    windows = lattice.windows(region)
    seen = lattice.hull(region)
    codes = read_codes(seen)
    prior = read_prior(seen) if read_prior else None
    # A window that keeps nothing but nodata cannot change the map.
    kept = (w for w in windows if _keeps_any(codes, seen, lattice.kept(w).intersect(region)))
    blend, halo = _Blend(lattice, region, layers), lattice.halo
    running: deque[tuple[Sequence[Region], Pending]] = deque()
    while part := list(islice(kept, batch)):
        given = None if prior is None else _batched(prior, part, seen, batch, np.nan)
        running.append((part, model(_batched(codes, part, seen, batch, NODATA), given, halo)))
        if len(running) > _AHEAD:
            blend.take(*running.popleft())
    while running:
        blend.take(*running.popleft())
    return blend.result()


def _batched(
    array: NDArray[_T], windows: Sequence[Region], seen: Region, batch: int, nodata: float
) -> NDArray[_T]:
    """(batch, ..., w, w) of an array over `seen`: its windows, then nodata."""
    edge = windows[0].height
    out = np.full((batch, *array.shape[:-2], edge, edge), nodata, dtype=array.dtype)
    for target, window in zip(out, windows, strict=False):
        rows, cols = window.within(seen).slices
        target[...] = array[..., rows, cols]
    return out


def _keeps_any(codes: NDArray[np.int8], seen: Region, kept: Region | None) -> bool:
    if kept is None:
        return False
    rows, cols = kept.within(seen).slices
    return bool(valid(codes[:, rows, cols]).any())


class _Blend:
    """The weighted mean of the windows that keep a pixel, in the lattice's order.

    The order of the sums is the lattice's, for every region: the mean is the same to the last bit.
    """

    def __init__(self, lattice: Lattice, region: Region, layers: int) -> None:
        self._lattice = lattice
        self._region = region
        self._values: NDArray[np.float32] = np.full((layers, *region.shape), np.nan, np.float32)
        self._taper = lattice.taper() if lattice.blend else None
        self._sum = np.zeros(self._values.shape if lattice.blend else 0)
        self._weight = np.zeros(region.shape if lattice.blend else 0)

    def take(self, windows: Sequence[Region], batch: Pending) -> None:
        """Take in what came of a batch; its windows come first in it."""
        for window, values in zip(windows, np.moveaxis(batch.result(), 1, 0), strict=False):
            self._add(window, values)

    def _add(self, window: Region, values: NDArray[np.float32]) -> None:
        """Take in the kept middle of a window, (layers, k, k)."""
        kept = self._lattice.kept(window)
        shared = kept.intersect(self._region)
        if shared is None:
            return
        source = (..., *shared.within(kept).slices)
        target = (..., *shared.within(self._region).slices)
        if self._taper is None:  # every pixel is kept from one window
            self._values[target] = values[source]
            return
        weights = self._taper[source]
        self._sum[target] += weights * values[source].astype(np.float64)
        self._weight[target] += weights

    def result(self) -> NDArray[np.float32]:
        """(layers, rows, columns): NaN where nothing was kept."""
        if self._taper is not None:
            where = np.broadcast_to(self._weight > 0, self._sum.shape)
            np.divide(self._sum, self._weight, out=self._values, where=where, casting="same_kind")
        return self._values
