"""From one lattice of pixels to another: means of a finer source, bilinear between coarser pixels.

A missing pixel (NaN) takes no part. All is worked out on whole squares of the grid, whose source
windows follow from the grid and the source alone: a height cannot depend on how the area was cut.

Why not GDAL's warper: it takes a turned target pixel for the box between two of its corners (from a
source turned by 45°, on a slope of 0.36, its means were up to 1.3 m off, these 0.1 m), takes its
scale from the shape that it is asked for, and drops half-covered pixels. Where no pixel is turned
both agree to the rounding of float32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from aeheight.grid import Grid, transformer
from aeheight.windows import Region

Floats = NDArray[np.float64]
Heights = NDArray[np.float32]
Way = Literal["copy", "average", "area", "bilinear"]
Read = Callable[[Region], Heights | None]

_CELL = 256
"""Pixels: edge of the squares of the grid that are worked out at once."""

_WINDOW = 1536 * 1536
"""Source pixels: a square that needs more of them is quartered."""

_NODES = 32
"""Source pixels between exact positions; straight between them (a kilometre bends by 2 cm)."""


@dataclass(frozen=True, slots=True)
class Lattice:
    """Where the pixels of a CRS lie: row 0 and column 0 start at one corner, and go on for ever."""

    crs: str
    dx: float
    """Width of a pixel in units of the CRS."""
    dy: float
    """Height of a pixel, above 0: rows go south."""
    left: float
    """Western edge of column 0."""
    top: float
    """Northern edge of row 0."""

    @classmethod
    def of(cls, grid: Grid) -> "Lattice":
        """A grid's."""
        return cls(grid.crs, grid.resolution, grid.resolution, grid.left, grid.top)

    @property
    def turn(self) -> float | None:
        """Columns once around the world; None where the CRS is not in degrees."""
        return 360 / self.dx if _in_degrees(self.crs) else None

    @property
    def whole_turn(self) -> int | None:
        """The same where columns meet after one turn."""
        turn = self.turn
        return round(turn) if turn and abs(turn - round(turn)) < 1e-2 else None


@lru_cache(maxsize=256)
def _in_degrees(crs: str) -> bool:
    known = CRS.from_user_input(crs)
    return bool(known.is_geographic) and known.axis_info[0].unit_name == "degree"


def resample(
    source: Lattice,
    grid: Grid,
    region: Region,
    wanted: NDArray[np.bool_],
    read: Read,
) -> Heights:
    """The pixels of a region from a source on another lattice.

    At most `_WINDOW` source pixels are held at once: about 50 MB, whatever the region.

    Args:
        source: where the source's pixels lie.
        grid: the whole grid.
        region: pixels of it.
        wanted: (rows, columns) of the region: whole squares without a wanted pixel are left out.
        read: source pixels of a region of `source`, NaN where missing; None: there is none.

    Returns:
        (rows, columns) float32, NaN where there is none.
    """
    out = np.full(region.shape, np.nan, dtype=np.float32)
    warp = _Warp(source, grid)
    for cell in _cells(region):
        shared = cell.intersect(region)
        if shared and wanted[shared.within(region).slices].any():
            warp.fill(cell, region, out, read)
    return out


def _cells(region: Region) -> Iterator[Region]:
    """The squares of the grid that hold a region."""
    for row in range(region.row // _CELL * _CELL, region.bottom, _CELL):
        for col in range(region.col // _CELL * _CELL, region.right, _CELL):
            yield Region(row, col, _CELL, _CELL)


class _Warp:
    def __init__(self, source: Lattice, grid: Grid) -> None:
        self.source, self.target = source, Lattice.of(grid)
        self.way, self.edges = _choose(source, self.target, grid.shape)

    def fill(self, cell: Region, region: Region, out: Heights, read: Read) -> None:
        """Write what a square shares with the region."""
        shared = cell.intersect(region)
        if shared is None:
            return
        rows, cols = self._positions(cell)
        window = self._window(cell, rows, cols)
        if window is None:
            return
        if window.size > _WINDOW and cell.height > 1 and self.way != "copy":
            for quarter in _quarters(cell):
                self.fill(quarter, region, out, read)
            return
        values = read(window)
        if values is not None:
            found = self._resampled(values, window, cell, rows, cols)
            out[shared.within(region).slices] = found[shared.within(cell).slices]

    def _positions(self, cell: Region) -> tuple[Floats, Floats]:
        """In source pixels: of pixel centres to interpolate, of edges to average or copy."""
        at: Floats = np.arange(cell.height + 1, dtype=np.float64)
        if self.way == "bilinear":
            at = at[:-1] + 0.5
        elif self.way == "area":  # only to see which pixels are needed
            at = np.linspace(0, cell.height, min(cell.height, 16) + 1, dtype=np.float64)
        return moved(self.target, self.source, cell.row + at, cell.col + at)

    def _window(self, cell: Region, rows: Floats, cols: Floats) -> Region | None:
        if self.way == "copy":
            return Region(round(rows.flat[0]), round(cols.flat[0]), *cell.shape)
        rows, cols = rows[np.isfinite(rows)], cols[np.isfinite(cols)]
        if not (rows.size and cols.size):
            return None
        margin = 2 if self.way == "area" else 1
        row, col = int(np.floor(rows.min())) - margin, int(np.floor(cols.min())) - margin
        bottom, right = int(np.ceil(rows.max())) + margin, int(np.ceil(cols.max())) + margin
        return Region(row, col, bottom - row, right - col)

    def _resampled(
        self, values: Heights, window: Region, cell: Region, rows: Floats, cols: Floats
    ) -> Heights:
        if self.way == "copy":
            return values
        if self.way == "area":
            return self._area_mean(values, window, cell)
        method = average if self.way == "average" else bilinear
        return method(values, rows - window.row, cols - window.col)

    def _area_mean(self, values: Heights, window: Region, cell: Region) -> Heights:
        """The mean of what is valid, each source pixel as a box of its extent in the grid."""
        total = np.zeros((2, (cell.height + 2) * (cell.width + 2)))
        # The more turned boxes under a pixel, the better they fill it: sixteen at least.
        cut = ceil(4 * max(self.edges))
        step, edges = max(_NODES // cut, 1), (self.edges[0] / cut, self.edges[1] / cut)
        for first in range(0, window.height, step):
            strip = values[first : first + step].repeat(cut, axis=0).repeat(cut, axis=1)
            valid = np.isfinite(strip)
            if valid.any():
                rows, cols = self._centres(window, first, strip.shape, cut, cell)
                # Counted from the cell's corner, with a rim of a pixel for what lies outside.
                rows, cols = rows - (cell.row - 1), cols - (cell.col - 1)
                _spread(strip, valid, rows, cols, edges, total, cell.shape)
        sums = total.reshape(2, cell.height + 2, cell.width + 2)[:, 1:-1, 1:-1]
        return _ratio(sums[0], sums[1], 1e-6)

    def _centres(
        self, window: Region, first: int, shape: tuple[int, int], cut: int, cell: Region
    ) -> tuple[Floats, Floats]:
        """Positions in the grid of the pixel centres of a strip of rows: exact at nodes.

        Args:
            window: what was read.
            first: row of it.
            shape: rows and columns of the strip, in parts of pixels.
            cut: parts of a pixel along an axis.
            cell: for the turn around the world.
        """
        nodes: Floats = np.arange(0, shape[1] + _NODES, _NODES, dtype=np.float64) + 0.5
        ends: Floats = np.array([0.5, shape[0] - 0.5], dtype=np.float64)
        rows, cols = moved(
            self.source,
            self.target,
            window.row + first + ends / cut,
            window.col + nodes / cut,
            cell.col + cell.width / 2,
        )
        along, down = np.arange(shape[1]) + 0.5, np.linspace(0, 1, shape[0])[:, None]

        def between(at: Floats) -> Floats:
            one, other = np.interp(along, nodes, at[0]), np.interp(along, nodes, at[1])
            found: Floats = one + down * (other - one)
            return found

        return between(rows), between(cols)


def _choose(
    source: Lattice, target: Lattice, shape: tuple[int, int]
) -> tuple[Way, tuple[float, float]]:
    """The way, and the edges (rows, columns) of a source pixel in pixels of the grid.

    Asked of the middle of the whole grid, so that it does not depend on the cut.
    """
    if _same(source, target):
        return "copy", (1.0, 1.0)
    row, col = shape[0] / 2, shape[1] / 2
    # One step down, and one to the right.
    at = np.array([row, row + 1, row]), np.array([col, col, col + 1])
    rows, cols = _moved_points(target, source, *at, None)
    steps = np.array([rows[1:] - rows[0], cols[1:] - cols[0]])
    if not np.isfinite(steps).all() or abs(np.linalg.det(steps)) < 1e-12:
        return "bilinear", (1.0, 1.0)
    inverse = np.linalg.inv(steps)  # a step down and one to the right in the source
    if (np.hypot(*inverse) > 0.999).any():
        return "bilinear", (1.0, 1.0)
    edges = np.minimum(np.hypot(*inverse.T), 1.0)
    return "average" if source.crs == target.crs else "area", (float(edges[0]), float(edges[1]))


def _same(source: Lattice, target: Lattice) -> bool:
    """Whether pixels coincide (to a millionth in size, a ten-thousandth in place)."""
    row, col = (target.top - source.top) / source.dy, (target.left - source.left) / source.dx
    off = max(abs(row - round(row)), abs(col - round(col)))
    size = max(abs(source.dx / target.dx - 1), abs(source.dy / target.dy - 1))
    return source.crs == target.crs and size < 1e-9 and off < 1e-4


def moved(
    source: Lattice, target: Lattice, rows: Floats, cols: Floats, near: float | None = None
) -> tuple[Floats, Floats]:
    """Positions of every row and column of one lattice in pixels of another.

    Args:
        source: the lattice that positions are given in.
        target: the lattice that they are wanted in.
        rows: (n,) positions; 0.5 is the centre of row 0.
        cols: (m,) positions.
        near: in degrees, the column from which all are at most half a turn away; None: the first,
            where columns meet after a turn. So positions do not leap at the 180th meridian.

    Returns:
        Rows and columns: (n, 1) and (1, m) in one CRS, else (n, m); infinite where the other CRS
        cannot show them.
    """
    if source.crs == target.crs:
        return _moved_points(source, target, rows[:, None], cols[None, :], near)
    return _moved_points(source, target, *np.meshgrid(rows, cols, indexing="ij"), near)


def _moved_points(
    source: Lattice, target: Lattice, rows: Floats, cols: Floats, near: float | None
) -> tuple[Floats, Floats]:
    x, y = source.left + cols * source.dx, source.top - rows * source.dy
    if source.crs != target.crs:
        x, y = transformer(source.crs, target.crs).transform(x, y)
    rows, cols = (target.top - y) / target.dy, (x - target.left) / target.dx
    turn, known = target.turn, np.isfinite(cols)
    if near is None and target.whole_turn and known.any():
        near = float(cols[known].flat[0])
    if turn and near is not None:
        cols = cols - turn * np.round((np.where(known, cols, near) - near) / turn)
    return rows, cols


def _quarters(cell: Region) -> Iterator[Region]:
    half = cell.height // 2
    for row in (cell.row, cell.row + half):
        for col in (cell.col, cell.col + half):
            yield Region(row, col, half, half)


def average(values: Heights, rows: Floats, cols: Floats) -> Heights:
    """The mean of what is valid in boxes, weighted by area.

    Args:
        values: (h, w), NaN where missing, with a pixel around all that is asked for.
        rows: edges of n boxes from north to south, as n + 1 positions in rows; any shape.
        cols: edges of m boxes from west to east.

    Returns:
        (n, m) float32, NaN where a box holds nothing valid.
    """
    rows, cols = rows.ravel(), cols.ravel()
    valid = np.isfinite(values)
    total = _sums(_sums(np.where(valid, values, np.float32(0)), rows).T, cols).T
    share = _sums(_sums(valid, rows).T, cols).T
    return _ratio(total, share, 1e-6 * float(np.diff(rows[:2])[0] * np.diff(cols[:2])[0]))


def _sums(values: NDArray[Any], edges: Floats) -> Floats:
    """(n, w) sums of the rows of (h, w) between n + 1 edges, parts of rows as parts.

    Each sum is its own, not the difference of running ones: those round by what lies far away.
    """
    inner, outer = np.ceil(edges).astype(np.int64), np.floor(edges).astype(np.int64)
    starts, ends = inner[:-1], outer[1:]
    pairs = np.stack([starts, np.minimum(ends, len(values) - 1)], axis=1).ravel()
    whole: Floats = np.add.reduceat(values, pairs, axis=0, dtype=np.float64)[::2]
    whole[ends <= starts] = 0  # reduceat gives a row for an empty range
    above, below = inner - edges, edges - outer
    first, last = values[outer[:-1]], values[ends]
    return whole + first * above[:-1, None] + last * below[1:, None]


def _spread(
    values: Heights,
    valid: NDArray[np.bool_],
    rows: Floats,
    cols: Floats,
    edges: tuple[float, float],
    total: Floats,
    shape: tuple[int, int],
) -> None:
    """Add pixels, as boxes that touch two rows and two columns at most, to sums and weights.

    Args:
        values: (h, w) metres.
        valid: (h, w) which count.
        rows: (h, w) of their centres, from the corner of a cell with a rim of one pixel.
        cols: (h, w) the same.
        edges: height and width of a box.
        total: (2, pixels) sums of values and of weights, added to.
        shape: rows and columns of the cell without its rim.
    """
    heights = np.where(valid, values, 0).ravel().astype(np.float64)
    counted = valid.ravel().astype(np.float64)
    wide = shape[1] + 2
    for row, share_row in _halves(rows, edges[0], shape[0]):
        for col, share_col in _halves(cols, edges[1], shape[1]):
            index, share = (row * wide + col).ravel(), (share_row * share_col).ravel()
            total[0] += np.bincount(index, share * heights, total.shape[1])
            total[1] += np.bincount(index, share * counted, total.shape[1])


def _halves(centres: Floats, edge: float, size: int) -> Iterator[tuple[NDArray[np.int64], Floats]]:
    """The two pixels that a box touches along an axis, with its share of each."""
    start = np.clip(np.nan_to_num(centres - edge / 2, posinf=0.0, neginf=0.0), 0, size + 1)
    first = start.astype(np.int64)
    share = np.minimum((first + 1 - start) / edge, 1)
    yield first, share
    yield np.minimum(first + 1, size + 1), 1 - share


def _ratio(total: Floats, share: Floats, least: float) -> Heights:
    there = share > least
    found = np.where(there, total / np.where(there, share, 1), np.nan)
    return found.astype(np.float32)


def bilinear(values: Heights, rows: Floats, cols: Floats) -> Heights:
    """Between the four nearest pixel centres; a missing one gives its weight to the others.

    Where the nearest pixel itself is missing there is nothing: voids keep their shape.

    Args:
        values: (h, w), NaN where missing, with a pixel around all that is asked for.
        rows: positions, 0.5 is the centre of row 0: (n, 1) or (n, m).
        cols: positions: (1, m) or (n, m).

    Returns:
        (n, m) float32.
    """
    known = np.isfinite(rows) & np.isfinite(cols)
    rows, cols = np.where(np.isfinite(rows), rows, 1), np.where(np.isfinite(cols), cols, 1)
    row, col = np.floor(rows - 0.5).astype(np.int64), np.floor(cols - 0.5).astype(np.int64)
    v, u = rows - 0.5 - row, cols - 0.5 - col
    total, share = np.zeros(known.shape), np.zeros(known.shape)
    for down, weight_row in ((0, 1 - v), (1, v)):
        for right, weight_col in ((0, 1 - u), (1, u)):
            corner = values[row + down, col + right]
            weight = np.where(np.isfinite(corner), weight_row * weight_col, 0)
            total += np.where(weight > 0, corner, 0) * weight
            share += weight
    nearest = values[np.floor(rows).astype(np.int64), np.floor(cols).astype(np.int64)]
    return _ratio(total, np.where(known & np.isfinite(nearest), share, 0), 1e-9)
