"""Rasters of classes, such as land cover, onto any region of a grid: the nearest pixel of each.

The nearest is found here, from pixel centres by PROJ, and not by GDAL's warp, whose approximation
would depend on how the area was cut.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from aeheight.errors import InputError
from aeheight.grid import Grid, transformer
from aeheight.settings import AccessSettings, ClassSettings, RegionSettings
from aeheight.sources.files import find_files, geometry_problem, opened, read_raster
from aeheight.sources.heights import place
from aeheight.sources.rasters import Raster, as_raster, place_problem
from aeheight.windows import Region, tile

MISSING = -1
"""What a pixel without a class holds."""

LARGEST = 2**28 - 1
"""No class is beyond: four times as many are numbers of 32 bits still."""

_SQUARE = 256
"""Pixels of the grid that are looked up at once,"""

_MOST = 4_000_000
"""unless they lie on more pixels of the raster than this: then a quarter of them."""

_DIGITS = 6
"""Of a pixel: a centre on the edge of two falls to the same one whatever rounding does."""


@dataclass(frozen=True, slots=True)
class ClassSource:
    """Every raster of one set of classes that touches the grids."""

    rasters: tuple[Raster, ...]
    """In order of precedence: where two overlap, the first valid pixel counts."""
    access: AccessSettings


def scan_classes(
    settings: RegionSettings, name: str, wanted: ClassSettings, grids: Sequence[Grid]
) -> ClassSource:
    """The class rasters that touch a grid, from headers alone.

    Args:
        settings: resolves relative hrefs.
        name: of the classes, for messages.
        wanted: of the region file.
        grids: of all groups.

    Raises:
        InputError: a file is missing or holds no classes; none touches the grids.
    """
    key = f"evaluate.classes.{name}"
    hrefs = find_files(settings, wanted.href, key, wanted.access)
    rasters = [_header(href, wanted, key) for href in hrefs]
    touching = tuple(r for r in rasters if any(place(r, grid) is not None for grid in grids))
    if not touching:
        raise InputError(
            f"{key}: none of its {len(rasters)} rasters touches the grid {list(grids[0].bounds)} "
            f"({grids[0].crs}); the first covers {list(rasters[0].bounds)} ({rasters[0].crs})"
        )
    return ClassSource(touching, wanted.access)


def _header(href: str, wanted: ClassSettings, key: str) -> Raster:
    with opened(href, wanted.access) as dataset:
        if problem := _problem(dataset, wanted.nodata):
            raise InputError(f"{key}: {href}: {problem}")
        nodata = wanted.nodata if dataset.nodata is None else dataset.nodata
        return as_raster(href, dataset, None if nodata is None else float(nodata))


def _problem(dataset: Any, wanted: int | None) -> str | None:
    """Why an open raster holds no classes, or None."""
    if dataset.count != 1:
        return f"it has {dataset.count} bands; a raster of classes has one"
    if np.dtype(dataset.dtypes[0]).kind not in "iu":
        return (
            f"it holds {dataset.dtypes[0]}, and classes are whole numbers; if they are, write them "
            "so first (gdal_translate -ot Int16)"
        )
    if None not in (wanted, dataset.nodata) and wanted != dataset.nodata:
        return (
            f"it declares {dataset.nodata:g} as its missing-value, `nodata` says {wanted}; leave "
            "`nodata` out, or mend the file (gdal_edit.py -a_nodata)"
        )
    return geometry_problem(dataset)


def read_classes(source: ClassSource, grid: Grid, region: Region) -> NDArray[np.int64]:
    """Classes of a region: of each pixel that of the raster's pixel under its centre.

    Args:
        source: from `scan_classes`.
        grid: the whole grid.
        region: pixels of it.

    Returns:
        (rows, columns) values of the raster, MISSING where there is none.

    Raises:
        OSError: a file breaks off.
        InputError: a file is not what its header said, or holds a class below 0 or beyond LARGEST.
    """
    out = np.full(region.shape, MISSING, np.int64)
    for raster in source.rasters:
        there = place(raster, grid)
        shared = there.intersect(region) if there else None
        part = out[shared.within(region).slices] if shared else out[:0]
        if shared is None or not (part == MISSING).any():
            continue
        found = _found(raster, source.access, grid, shared)
        np.copyto(part, found, where=part == MISSING)
    return out


def _found(raster: Raster, access: AccessSettings, grid: Grid, region: Region) -> NDArray[np.int64]:
    def pixels(dataset: Any) -> NDArray[np.int64]:
        if problem := place_problem(as_raster("", dataset, None), raster):
            raise InputError(f"{raster.href}: {problem}")
        out = np.full(region.shape, MISSING, np.int64)
        for square in tile(region.shape, _SQUARE):
            ground = Region(region.row + square.row, region.col + square.col, *square.shape)
            out[square.slices] = _nearest(dataset, raster, grid, ground)
        return out

    return read_raster(raster.href, pixels, access)


def _nearest(dataset: Any, raster: Raster, grid: Grid, region: Region) -> NDArray[np.int64]:
    rows, cols = _under(raster, grid, region)
    inside = (rows >= 0) & (rows < raster.shape[0]) & (cols >= 0) & (cols < raster.shape[1])
    out = np.full(region.shape, MISSING, np.int64)
    if not inside.any():
        return out
    row, col = int(rows[inside].min()), int(cols[inside].min())
    size = int(rows[inside].max()) + 1 - row, int(cols[inside].max()) + 1 - col
    if size[0] * size[1] > _MOST and region.size > 1:
        for quarter in _quarters(region):
            out[quarter.within(region).slices] = _nearest(dataset, raster, grid, quarter)
        return out
    values = dataset.read(1, window=Window(col, row, size[1], size[0]))
    found = values[rows[inside] - row, cols[inside] - col]
    there = np.ones(found.shape, bool) if raster.nodata is None else found != raster.nodata
    if (strange := found[there & ((found < 0) | (found > LARGEST))]).size:
        raise InputError(
            f"{raster.href}: {strange.size} pixels are of class {strange[0]}; classes are 0 to "
            f"{LARGEST}: if that is a missing-value, name it in `nodata`"
        )
    out[inside] = np.where(there, found.astype(np.int64), MISSING)
    return out


def _under(
    raster: Raster, grid: Grid, region: Region
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the raster, as its file has them, under the centres of pixels."""
    x = grid.left + (region.col + np.arange(region.width) + 0.5) * grid.resolution
    y = grid.top - (region.row + np.arange(region.height) + 0.5) * grid.resolution
    xs, ys = np.meshgrid(x, y)
    if raster.crs != grid.crs:
        xs, ys = transformer(grid.crs, raster.crs).transform(xs, ys)
    dx, _, left, _, dy, top = raster.transform
    far = -1.0e9  # where the raster's CRS cannot show a pixel, it has none
    places = (np.nan_to_num(v, nan=far, posinf=far, neginf=far)
              for v in ((ys - top) / dy, (xs - left) / dx))  # fmt: skip
    rows, cols = (np.floor(np.round(v, _DIGITS)).astype(np.int64) for v in places)
    return rows, cols


def _quarters(region: Region) -> Iterator[Region]:
    edge = -(-max(region.shape) // 2)
    for part in tile(region.shape, edge):
        yield Region(region.row + part.row, region.col + part.col, *part.shape)
