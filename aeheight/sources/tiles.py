"""AlphaEarth tiles: what their headers promise, and their codes on any region of the lattice.

Tiles come bottom-up (positive dy in the transform) from Google and north-up from exports; both are
read by integer pixel windows and flipped where needed, so that codes are copied, never resampled.
"""

import json
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from aeheight.embeddings import BANDS, NODATA, encode, parse_tile_name, valid
from aeheight.errors import InputError
from aeheight.grid import Grid, crs_name, reproject_bounds
from aeheight.settings import Bounds, RegionSettings
from aeheight.sources.files import find_files, geometry_problem, opened
from aeheight.windows import Region, whole

_FLOATS = ("float32", "float64")
_STRIP = 256
"""Rows of a float export that are held at once."""


@dataclass(frozen=True, slots=True)
class EmbeddingTile:
    """One raster of 64 bands, as its header describes it."""

    href: str
    grid: Grid
    """Its pixels, north-up, whichever way up the file is."""
    bottom_up: bool
    """Whether the file's first row is the southernmost."""
    year: int
    dtype: str
    """`int8` codes, or a float export that is quantised when read."""

    def placed(self, grid: Grid) -> Region:
        """The tile as a region of `grid` (which it may reach past).

        Raises:
            InputError: the tile is in another CRS or on another pixel lattice.
        """
        row, col = grid.offset(self.grid.left, self.grid.top)
        same = (
            self.grid.crs == grid.crs
            and abs(self.grid.resolution / grid.resolution - 1) < 1e-6
            and abs(row - round(row)) < 1e-3
            and abs(col - round(col)) < 1e-3
        )
        if not same:
            raise InputError(
                f"{self.href} ({self.grid.crs}, {self.grid.resolution} units a pixel, corner "
                f"{self.grid.left}, {self.grid.top}) is not on the grid's lattice ({grid.crs}, "
                f"{grid.resolution}, {grid.left}, {grid.top}); embeddings are never resampled: "
                "leave grid out, or give it the tiles' CRS, resolution and pixel edges"
            )
        return Region(round(row), round(col), *self.grid.shape)

    def touches(self, grid: Grid) -> bool:
        """Whether the bounds meet, in the grid's CRS."""
        try:
            west, south, east, north = reproject_bounds(self.grid.bounds, self.grid.crs, grid.crs)
        except InputError:
            return False
        w, s, e, n = grid.bounds
        return west < e and w < east and south < n and s < north

    def overlaps(self, grid: Grid) -> bool:
        """Whether the tile shares a pixel with the grid; see `placed` for errors."""
        return self.placed(grid).intersect(whole(grid.shape)) is not None


def scan_tiles(settings: RegionSettings) -> list[EmbeddingTile]:
    """The tiles of the wanted years, in order of their hrefs, from headers alone.

    Raises:
        InputError: see `sources.scan`.
    """
    wanted = settings.embeddings
    if wanted.source != "cog":
        raise InputError(
            f"embeddings.source {wanted.source!r} cannot be read yet; download the tiles and "
            "give them with source: cog"
        )
    hrefs = find_files(settings, wanted.href, "embeddings")
    named = {href: parse_tile_name(Path(href).as_posix()).year for href in hrefs}
    have = {year for known in named.values() for year in ([known] if known else wanted.years)}
    if missing := sorted(set(wanted.years) - have):
        raise InputError(
            f"embeddings.year: no tile of {missing} among {wanted.href!r}; there are {sorted(have)}"
        )
    return [
        tile
        for href in hrefs
        if named[href] is None or named[href] in wanted.years
        for tile in _scan_tile(href, named[href], wanted.years)
    ]


def _scan_tile(href: str, named: int | None, years: tuple[int, ...]) -> list[EmbeddingTile]:
    """The tile, once for every year that it may stand for."""
    if named is None and len(years) > 1:
        raise InputError(
            f"{href}: its path names no year, and the settings ask for {list(years)}; lay the "
            "tiles in folders YEAR/ZONE/, or read one year"
        )
    with opened(href) as dataset:
        problem = _problem(dataset)
        if problem:
            raise InputError(f"{href} is no AlphaEarth tile: {problem}")
        transform, bottom_up = dataset.transform, dataset.transform.e > 0
        top = transform.f + transform.e * dataset.height if bottom_up else transform.f
        grid = Grid(crs_name(dataset.crs), transform.a, transform.c, top, dataset.shape)
        return [EmbeddingTile(href, grid, bottom_up, named or years[0], dataset.dtypes[0])]


def _problem(dataset: Any) -> str | None:
    kinds = set(dataset.dtypes)
    if problem := geometry_problem(dataset):
        return problem
    if dataset.count != BANDS:
        return f"{dataset.count} bands instead of {BANDS}"
    if len(kinds) > 1 or not kinds & {"int8", *_FLOATS}:
        return f"values are {', '.join(sorted(kinds))} instead of int8 (or a float export)"
    if kinds == {"int8"} and dataset.nodata not in (None, NODATA):
        return f"nodata is {dataset.nodata:g} instead of {NODATA}"
    transform = dataset.transform
    if abs(abs(transform.e) / transform.a - 1) > 1e-6:
        return f"pixels are {transform.a} x {abs(transform.e)}, not square"
    return None


def region_grid(settings: RegionSettings, tiles: list[EmbeddingTile]) -> Grid:
    """The grid that the settings give, or else the tiles' own lattice around all of them.

    Raises:
        InputError: the tiles do not fix one grid, or `aoi` misses them.
    """
    if settings.grid:
        wanted = settings.grid
        return Grid.from_bounds(wanted.crs, wanted.resolution, wanted.bounds)
    kinds = sorted({(tile.grid.crs, tile.grid.resolution) for tile in tiles})
    if len(kinds) > 1:
        raise InputError(
            f"the tiles lie in several CRS or resolutions ({kinds}); give one of them in `grid`, "
            "and the tiles of that zone in embeddings.href"
        )
    first = tiles[0].grid
    placed = [tile.placed(first) for tile in tiles]
    top, left = min(r.row for r in placed), min(r.col for r in placed)
    cover = Region(
        top, left, max(r.bottom for r in placed) - top, max(r.right for r in placed) - left
    )
    if settings.aoi is None:
        return first.part(cover)
    inside = _pixels(first, _aoi_bounds(settings)).intersect(cover)
    if inside is None:
        raise InputError(
            f"aoi {settings.aoi!r} misses the tiles; it is in degrees: west, south, east, north"
        )
    return first.part(inside)


def _pixels(grid: Grid, bounds_degrees: Bounds) -> Region:
    west, south, east, north = bounds_degrees
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
        raise InputError(
            f"aoi {list(bounds_degrees)} is no area in degrees; give [west, south, east, north]"
        )
    west, south, east, north = reproject_bounds(bounds_degrees, "EPSG:4326", grid.crs)
    top, left = grid.offset(west, north)
    bottom, right = grid.offset(east, south)
    row, col = floor(top), floor(left)
    return Region(row, col, max(ceil(bottom) - row, 1), max(ceil(right) - col, 1))


def _aoi_bounds(settings: RegionSettings) -> Bounds:
    if not isinstance(settings.aoi, str):
        assert settings.aoi is not None
        return settings.aoi
    path = Path(settings.resolve(settings.aoi))
    try:
        corners = np.array(list(_positions(json.loads(path.read_text()))))
        west, south = corners.min(axis=0)
        east, north = corners.max(axis=0)
    except (OSError, ValueError) as error:
        raise InputError(f"aoi: {path} is no GeoJSON with coordinates: {error}") from error
    return (float(west), float(south), float(east), float(north))


def _positions(node: Any) -> Any:
    """Every (longitude, latitude) of a GeoJSON object."""
    if isinstance(node, dict):
        for key in ("features", "geometry", "geometries", "coordinates"):
            yield from _positions(node.get(key))
    elif isinstance(node, list):
        if node and isinstance(node[0], int | float):
            yield node[:2]
        else:
            for part in node:
                yield from _positions(part)


def read_embeddings(
    tiles: tuple[EmbeddingTile, ...], grid: Grid, region: Region, year: int
) -> NDArray[np.int8]:
    """The codes of a region: (64, rows, columns), -128 where no tile has any.

    Where tiles overlap, the first (in the order given) that is valid counts.
    """
    out = np.full((BANDS, *region.shape), NODATA, dtype=np.int8)
    for tile in tiles:
        place = tile.placed(grid)
        shared = place.intersect(region)
        if tile.year != year or shared is None:
            continue
        codes = _read(tile, shared.within(place))
        target = out[(slice(None), *shared.within(region).slices)]
        take = valid(codes) & ~valid(target)
        np.copyto(target, codes, where=take)
    return out


def _read(tile: EmbeddingTile, part: Region) -> NDArray[np.int8]:
    """Codes of a part of one tile, north-up; `part` counts from its north-western corner."""
    row = tile.grid.shape[0] - part.bottom if tile.bottom_up else part.row
    with opened(tile.href) as dataset:
        if tile.dtype in _FLOATS:
            values = np.empty((BANDS, *part.shape), dtype=np.int8)
            for first in range(0, part.height, _STRIP):  # floats of a whole shard would be 8 times
                strip = Window(part.col, row + first, part.width, min(_STRIP, part.height - first))
                values[:, first : first + _STRIP] = _quantised(
                    dataset.read(window=strip), dataset.nodata, tile.href
                )
        else:
            values = dataset.read(window=Window(part.col, row, part.width, part.height))
    missing = (values == NODATA).any(axis=0)
    values[:, missing] = NODATA
    codes: NDArray[np.int8] = values[:, ::-1] if tile.bottom_up else values
    return codes


def _quantised(values: NDArray[np.floating], declared: float | None, href: str) -> NDArray[np.int8]:
    """The codes of a float export: exact, since it holds nothing but decoded codes."""
    if declared is not None and not np.isnan(declared):
        values[:, (values == declared).any(axis=0)] = np.nan
    strange = values[np.abs(values) > 1]
    if strange.size:
        raise InputError(
            f"{href}: values like {strange[0]:g} lie outside -1 to 1; if that is the "
            "missing-value, declare it in the file (gdal_edit.py -a_nodata); codes must be int8"
        )
    return encode(values)
