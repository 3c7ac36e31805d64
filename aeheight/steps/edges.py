"""Where two zones meet: how far the predictions of both are apart on the same ground.

Groups overlap by `cube.halo`, so both predict some ground. Each pair of groups is compared once,
on the pixels of the group that is first by name: wherever both predicted, the other's heights are
interpolated between the four pixels about the pixel's centre.
"""

from collections.abc import Iterator, Sequence
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from aeheight.cube import Tree
from aeheight.grid import Grid, reproject_bounds, transformer, utm_zone
from aeheight.metrics import Stats
from aeheight.windows import Region, tile, whole

_SQUARE = 512
"""Pixels: what is compared at once, so that memory does not grow with the shard."""

_MARGIN = 2
"""Pixels read about a region: for the interpolation, and for edges that bend."""

_DIGITS = 6
"""Of a pixel: lattices that coincide do so in spite of the projection's rounding."""


def pair_key(first: str, second: str) -> str:
    """The name of the sums of two groups.

    >>> pair_key("utm31n", "utm32n")
    'zones/utm31n-utm32n'
    """
    return f"zones/{first}-{second}"


def facing(grids: Sequence[Grid], grid: Grid) -> list[Grid]:
    """The grids of adjoining zones that a grid is compared with: those after it by name."""
    zone = utm_zone(grid.crs)
    return [
        other
        for other in grids
        if other.name > grid.name
        and zone is not None
        and (beyond := utm_zone(other.crs)) is not None
        and (beyond.number - zone.number) % 60 in (0, 1, 59)
    ]


def opposite(grid: Grid, region: Region, other: Grid) -> Region | None:
    """The pixels of another grid that lie under a region, and those about them.

    Args:
        grid: the region's.
        region: pixels of it.
        other: of an adjoining zone.

    Returns:
        Pixels of `other`, within it; None where it does not reach.
    """
    west, south, east, north = reproject_bounds(grid.part(region).bounds, grid.crs, other.crs)
    (top, left), (bottom, right) = other.offset(west, north), other.offset(east, south)
    row, col = floor(top) - _MARGIN, floor(left) - _MARGIN
    height, width = ceil(bottom) + _MARGIN - row, ceil(right) + _MARGIN - col
    return Region(row, col, height, width).intersect(whole(other.shape))


def compare(
    heights: Tree, group: str, year: int, region: Region, predicted: NDArray[np.float32]
) -> Iterator[tuple[str, Stats]]:
    """The sums of the differences between one group's prediction and those of the groups it faces.

    Args:
        heights: the map.
        group: of the region.
        year: of the map.
        region: pixels of the group's grid.
        predicted: (rows, columns) the map there, metres, NaN where there is none.

    Yields:
        `pair_key` and sums of each pair that has pixels here; d = `predicted` - the other's.
    """
    grid = heights.template.grid(group)
    for other in facing(heights.template.grids, grid):
        total = Stats.zero()
        for square in tile(region.shape, _SQUARE):
            place = Region(
                region.row + square.row, region.col + square.col, square.height, square.width
            )
            total += _compared(heights, grid, place, other, year, predicted[square.slices])
        if total.n:
            yield pair_key(group, other.name), total


def _compared(
    heights: Tree,
    grid: Grid,
    region: Region,
    other: Grid,
    year: int,
    predicted: NDArray[np.float32],
) -> Stats:
    beyond = opposite(grid, region, other)
    rows, cols = np.nonzero(~np.isnan(predicted))
    if beyond is None or not rows.size:
        return Stats.zero()
    there = heights.read(other.name, "height", year, beyond)
    if np.isnan(there).all():
        return Stats.zero()
    x = grid.left + (region.col + cols + 0.5) * grid.resolution
    y = grid.top - (region.row + rows + 0.5) * grid.resolution
    x, y = transformer(grid.crs, other.crs).transform(x, y)
    corner = other.part(beyond)
    found = bilinear(
        there,
        np.round((corner.top - y) / other.resolution - 0.5, _DIGITS),
        np.round((x - corner.left) / other.resolution - 0.5, _DIGITS),
    )
    both = ~np.isnan(found)
    return Stats.of(predicted[rows, cols][both], found[both])


def bilinear(
    values: NDArray[np.float32], row: NDArray[np.float64], col: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Values between the centres of pixels.

    Args:
        values: (rows, columns), NaN where there is none.
        row: (n,) places, 0 at the centre of the first row.
        col: (n,) the same, of columns.

    Returns:
        (n,) float64; NaN where one of the four pixels about a place is NaN or not in `values`.
    """
    top, left = np.floor(row).astype(np.int64), np.floor(col).astype(np.int64)
    inside = (top >= 0) & (left >= 0)
    inside &= (top < values.shape[0] - 1) & (left < values.shape[1] - 1)
    down, right = (row - top)[inside], (col - left)[inside]
    top, left = top[inside], left[inside]
    upper = values[top, left] * (1 - right) + values[top, left + 1] * right
    lower = values[top + 1, left] * (1 - right) + values[top + 1, left + 1] * right
    found = np.full(row.shape, np.nan)
    found[inside] = upper * (1 - down) + lower * down
    return found
