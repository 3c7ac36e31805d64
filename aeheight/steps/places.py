"""A map at single places, and its pixels on one plane: for what is told of points."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from aeheight.cube import Tree
from aeheight.grid import Grid, owned, reproject_bounds, transformer
from aeheight.windows import Region, whole

Floats = NDArray[np.float64]

DEGREES = "EPSG:4326"
_PROBES, _DRAWN = 500, 20_000
"""Pixels that are looked at; drawn from grids that an aoi may leave empty for the most part."""
_READERS = 8
"""Chunks that are read at the same time."""


def plane_of(grids: tuple[Grid, ...]) -> str:
    """One CRS in metres for all of a map: its own, or one around its middle."""
    crs = CRS.from_user_input(grids[0].crs)
    if len(grids) == 1 and not crs.is_geographic and crs.axis_info[0].unit_conversion_factor == 1:
        return grids[0].crs
    west, south, east, north = reproject_bounds(grids[0].bounds, grids[0].crs, DEGREES)
    lon, lat = west + (east - west) % 360 / 2, (south + north) / 2
    return f"+proj=aeqd +lon_0={lon:.6f} +lat_0={lat:.6f} +datum=WGS84 +units=m +type=crs"


def map_at(heights: Tree, year: int, lon: Floats, lat: Floats, layer: str = "height") -> Floats:
    """A layer of the map at (n,) places, metres; NaN where it has no value.

    Between pixel centres it is interpolated (bilinear): a footprint of 12 to 25 m sees about what
    four pixels of 10 m do. Of two zones the one counts that the place lies in.
    """
    out = np.full(len(lon), np.nan)
    for grid in heights.template.grids:
        x, y = transformer(DEGREES, grid.crs).transform(lon, lat)
        row, column = (grid.top - y) / grid.resolution, (x - grid.left) / grid.resolution
        found = _sampled(heights, grid, year, row, column, layer)
        out = np.where(np.isnan(out), found, out)
    return out


def probes(heights: Tree, year: int, plane: str) -> tuple[Floats, Floats]:
    """Where random pixels that have a height lie on a plane: x and y, however the map is cut."""
    template, rng = heights.template, np.random.default_rng(0)
    sizes = np.array([grid.shape[0] * grid.shape[1] for grid in template.grids])
    edge = template.cut.shard
    made = {
        (shard.group, shard.region.row // edge, shard.region.col // edge)
        for shard in template.shards("height")
    }
    drawn = rng.choice(len(sizes), _DRAWN, p=sizes / sizes.sum())
    xs, ys = [], []
    for number, grid in enumerate(template.grids):
        spots = np.floor(rng.random((2, int((drawn == number).sum()))).T * grid.shape).astype(int)
        inside = [(grid.name, *spot) in made for spot in (spots // edge).tolist()]
        row, column = spots[inside][: _PROBES * len(spots) // _DRAWN].T + 0.5
        known = ~np.isnan(_sampled(heights, grid, year, row, column))
        x, y = grid.left + column * grid.resolution, grid.top - row * grid.resolution
        moved = transformer(grid.crs, plane).transform(x[known], y[known])
        xs.append(moved[0])
        ys.append(moved[1])
    return np.concatenate(xs), np.concatenate(ys)


def _sampled(
    heights: Tree, grid: Grid, year: int, row: Floats, column: Floats, layer: str = "height"
) -> Floats:
    """The map at places of one grid's own ground, counted in pixels from its corner; else NaN."""
    out = np.full(len(row), np.nan)
    rows, columns = grid.shape
    inside = np.flatnonzero((row >= 0) & (row < rows) & (column >= 0) & (column < columns))
    chunk = heights.template.cut.chunk
    cells = np.stack([row[inside] // chunk, column[inside] // chunk], axis=1).astype(np.int64)
    found, cell = np.unique(cells, axis=0, return_inverse=True)

    def read(number: int) -> tuple[NDArray[np.intp], Floats]:
        members = inside[cell.ravel() == number]
        corner = found[number] * chunk
        region = Region(int(corner[0]), int(corner[1]), chunk, chunk).intersect(whole(grid.shape))
        assert region is not None
        region = region.expand(1)
        values = heights.read(grid.name, layer, year, region).astype(np.float64)
        values[~owned(heights.template.grids, grid, region)] = np.nan
        return members, bilinear(values, row[members] - region.row, column[members] - region.col)

    with ThreadPoolExecutor(_READERS) as pool:
        for members, values in pool.map(read, range(len(found))):
            out[members] = values
    return out


def bilinear(values: Floats, row: Floats, column: Floats) -> Floats:
    """Values between pixel centres; NaN where the pixel that holds the place has none.

    Of the four pixels around a place, those without a value do not count.

    Args:
        values: (rows, columns), NaN where there is none; one pixel wider than the places on all
            sides.
        row: (n,) from the upper edge, in pixels.
        column: (n,) from the left edge, in pixels.
    """
    first = [np.floor(axis - 0.5).astype(np.int64) for axis in (row, column)]
    down, along = row - 0.5 - first[0], column - 0.5 - first[1]
    total, weights = np.zeros(len(row)), np.zeros(len(row))
    for i, part in enumerate((1 - down, down)):
        for j, share in enumerate((1 - along, along)):
            value = values[first[0] + i, first[1] + j]
            weight = part * share * ~np.isnan(value)
            total += weight * np.nan_to_num(value)
            weights += weight
    held = values[np.floor(row).astype(np.int64), np.floor(column).astype(np.int64)]
    return np.where(np.isnan(held), np.nan, total / np.where(weights > 0, weights, 1))


def pixels_on(grid: Grid, region: Region, plane: str) -> tuple[Floats, Floats]:
    """Pixel centres on the plane, which broadcast to the region.

    They are counted from the grid's corner, so that they do not depend on how it is cut.
    """
    rows, columns = region.slices
    x, y = grid.x()[columns], grid.y()[rows]
    if grid.crs == plane:
        return x[None, :], y[:, None]
    moved = transformer(grid.crs, plane).transform(*np.meshgrid(x, y))
    return np.asarray(moved[0]), np.asarray(moved[1])
