"""Height models on any region of a grid: thousands of rasters, or STAC items, as one surface.

Rasters on one lattice are one mosaic: they are put together pixel by pixel before anything is
averaged or interpolated, so that no seam shows where two meet. See `resample` for what follows.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from math import ceil, floor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from aeheight.errors import InputError
from aeheight.grid import Bounds, Grid, reproject_bounds, transformer
from aeheight.settings import AccessSettings, HeightSettings, RegionSettings
from aeheight.sources.datum import DatumShift, check_datum, shifted
from aeheight.sources.files import find_files
from aeheight.sources.rasters import Raster, Readers, place_problem, read_header
from aeheight.sources.resample import Lattice, resample
from aeheight.sources.stac import Item, find_items, item_raster, read_item, search_boxes
from aeheight.windows import Region, whole

__all__ = ["HeightSource", "Raster", "place", "read_heights", "scan_heights"]

_THREADS = 16
"""Headers read at once: it is waiting, not computing."""

_SHARED = 1e-2
"""Pixels: rasters lie on one lattice if no corner is further off."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class HeightSource:
    """Every raster of one height model that touches the grids."""

    rasters: tuple[Raster, ...]
    """In order of precedence: where two overlap, the first valid pixel counts. Those of one mosaic
    lie together, where the first of them was named."""
    access: AccessSettings
    shift: DatumShift | None
    """Conversion to the cube's vertical datum; None: none is needed."""


# --- the plan: headers and items ----------------------------------------------------------------


def scan_heights(
    settings: RegionSettings, wanted: HeightSettings, grids: Sequence[Grid], key: str
) -> HeightSource:
    """The rasters of a height model that touch a grid, from headers and items alone.

    Args:
        settings: resolves relative hrefs.
        wanted: the height model.
        grids: of all groups.
        key: `height` or `prior`, for messages.

    Raises:
        InputError: a file or item is missing or is no height model of the settings' kind; nothing
            touches the grids.
    """
    check_datum(wanted.vertical_datum, f"{key}.vertical_datum")
    scan = _scan_stac if wanted.source == "stac" else _scan_rasters
    rasters = scan(settings, wanted, grids, key)
    touching = [r for r in rasters if any(place(r, grid) is not None for grid in grids)]
    if not touching:
        raise InputError(
            f"{key}: none of its {len(rasters)} rasters touches the grid {list(grids[0].bounds)} "
            f"({grids[0].crs}); the first covers {list(rasters[0].bounds)} ({rasters[0].crs}): "
            "embeddings and heights must share ground"
        )
    return HeightSource(_mosaics(touching), wanted.access, None)


def _scan_rasters(
    settings: RegionSettings, wanted: HeightSettings, _grids: Sequence[Grid], key: str
) -> list[Raster]:
    hrefs = find_files(settings, wanted.href, key, wanted.access)
    return _together(lambda href: read_header(href, wanted, key), hrefs)


def _scan_stac(
    settings: RegionSettings, wanted: HeightSettings, grids: Sequence[Grid], key: str
) -> list[Raster]:
    areas = [reproject_bounds(grid.bounds, grid.crs, "EPSG:4326") for grid in grids]
    items = find_items(settings, wanted, list(search_boxes(areas)), key)
    return _together(lambda item: _item(item, wanted, key), items)


def _item(item: Item, wanted: HeightSettings, key: str) -> Raster:
    """From the item alone where its asset is far away, else checked against the file's header."""
    told, lacks = item_raster(item, wanted, key)
    if lacks is None and "://" in told.href:
        return told
    try:
        header = read_header(told.href, wanted, key)
    except InputError as error:
        lacking = f" lacks {lacks}, and its" if lacks else "'s"
        raise InputError(f"{key}: STAC item {item.id}{lacking} asset: {error}") from error
    if lacks is None and (problem := place_problem(header, told)):
        raise InputError(f"{key}: STAC item {item.id}: {told.href}: {problem}")
    nodata = told.nodata if header.nodata is None else header.nodata
    return replace(header, item=told.item, nodata=nodata)


def _together(work: Callable[[_T], Raster], what: Sequence[_T]) -> list[Raster]:
    """In order; of several errors the first in order."""
    with ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(work, one) for one in what]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def _mosaics(rasters: Sequence[Raster]) -> tuple[Raster, ...]:
    """The rasters with their lattices, those of one lattice together.

    Found here, for all of them: a task knows only some, and must find the same.
    """
    lattices: dict[tuple[str, str, str], list[tuple[Raster, list[Raster]]]] = {}
    order: list[list[Raster]] = []
    for raster in rasters:
        width, height = (f"{size:.4g}" for size in raster.resolution)
        alike = lattices.setdefault((raster.crs, width, height), [])
        members = next((mine for first, mine in alike if _congruent(raster, first)), None)
        if members is None:
            members = []
            alike.append((raster, members))
            order.append(members)
        members.append(raster)
    return tuple(
        replace(raster, mosaic=_rounded(members[0])) for members in order for raster in members
    )


def _congruent(raster: Raster, first: Raster) -> bool:
    """Whether all corners are corners of the other's pixels."""
    dx, dy = first.resolution
    off = np.subtract(raster.bounds, first.bounds) / (dx, dy, dx, dy)
    return bool(np.abs(off - np.round(off)).max() < _SHARED) and _as_many(raster, first)


def _as_many(raster: Raster, first: Raster) -> bool:
    """Whether the raster spans as many of the other's pixels as of its own."""
    west, south, east, north = raster.bounds
    spans = (north - south) / first.resolution[1], (east - west) / first.resolution[0]
    return bool(np.abs(np.subtract(spans, raster.shape)).max() < 2 * _SHARED)


def _rounded(raster: Raster) -> tuple[float, float, float, float]:
    """Sizes and corner of a lattice, whichever of its rasters is asked (but for untidy headers)."""
    dx, dy = (float(f"{size:.14g}") for size in raster.resolution)
    left, _, _, top = raster.bounds
    return dx, dy, round(left / dx % 1, 9) % 1 * dx, round(top / dy % 1, 9) % 1 * dy


# --- where rasters lie --------------------------------------------------------------------------


def place(raster: Raster, grid: Grid) -> Region | None:
    """The pixels of a grid that a raster may touch; None: none.

    Never too few: grown by the pixel that an interpolation reaches and by what bounds in another
    CRS may miss.
    """
    found = [
        region
        for part in _shared_bounds(raster, grid)
        for region in _pixels(part, raster.crs, grid)
        if region
    ]
    if not found:
        return None
    row, col = min(r.row for r in found), min(r.col for r in found)
    bottom, right = max(r.bottom for r in found), max(r.right for r in found)
    return Region(row, col, bottom - row, right - col)


def _shared_bounds(raster: Raster, grid: Grid) -> Iterator[Bounds]:
    """What a raster, grown by a pixel, and the grid share, in the raster's CRS."""
    lattice, (west, south, east, north) = raster.own_lattice, raster.bounds
    west, east = west - lattice.dx, east + lattice.dx
    south, north = south - lattice.dy, north + lattice.dy
    for w, s, e, n in _seen_from(grid, raster.crs):
        for turn in (-360.0, 0.0, 360.0) if lattice.turn else (0.0,):
            left, right = max(west, w + turn), min(east, e + turn)
            if left < right and max(south, s) < min(north, n):
                yield left, max(south, s), right, min(north, n)


@lru_cache(maxsize=1024)
def _seen_from(grid: Grid, crs: str) -> tuple[Bounds, ...]:
    """A grid's bounds in another CRS: two across the 180th meridian, endless where unknown."""
    try:
        bounds = reproject_bounds(grid.bounds, grid.crs, crs)
    except InputError:
        return ((-np.inf, -np.inf, np.inf, np.inf),)
    return tuple(search_boxes([bounds]))


def _pixels(bounds: Bounds, crs: str, grid: Grid) -> Iterator[Region | None]:
    every = whole(grid.shape)
    if crs == grid.crs:
        west, south, east, north = bounds
    else:
        slack = 1e-3 * max(bounds[2] - bounds[0], bounds[3] - bounds[1])
        west, south, east, north = transformer(crs, grid.crs).transform_bounds(
            bounds[0] - slack, bounds[1] - slack, bounds[2] + slack, bounds[3] + slack
        )
    if not np.isfinite([west, south, east, north]).all():
        yield every
        return
    across = Lattice.of(grid).turn is not None
    east = east + 360 if across and west > east else east
    for turn in (-360.0, 0.0, 360.0) if across else (0.0,):
        (top, left), (bottom, right) = (
            grid.offset(west + turn, north),
            grid.offset(east + turn, south),
        )
        row, col = floor(top) - 1, floor(left) - 1
        yield Region(row, col, ceil(bottom) + 1 - row, ceil(right) + 1 - col).intersect(every)


# --- reading ------------------------------------------------------------------------------------


def read_heights(source: HeightSource, grid: Grid, region: Region) -> NDArray[np.float32]:
    """Heights of a region, in the cube's vertical datum.

    Memory: about 50 MB beside the result, whatever the region and however fine the source (and
    GDAL's block cache). A file stays open while the region is read, so that a block under two
    squares is decoded once, as long as GDAL's cache holds a row of squares.

    Args:
        source: from `scan_heights`; of its rasters those may be left out whose `place` does not
            meet the region.
        grid: the whole grid.
        region: pixels of it.

    Returns:
        (rows, columns) float32 metres, NaN where there is none.

    Raises:
        OSError: a file breaks off.
        InputError: a file is not what was planned with, or holds a height that no ground has.
    """
    out = np.full(region.shape, np.nan, dtype=np.float32)
    with Readers(source.access) as readers:
        for lattice, members in groupby(source.rasters, key=lambda raster: raster.lattice):
            near = [(raster, place(raster, grid)) for raster in members]
            mosaic = _Mosaic(lattice, [raster for raster, there in near if there], readers)
            wanted = np.isnan(out) & _covered([there for _, there in near], region)
            found = resample(lattice, grid, region, wanted, mosaic.read)
            np.copyto(out, found, where=np.isnan(out))
    return shifted(source.shift, out, grid, region) if source.shift else out


def _covered(places: Sequence[Region | None], region: Region) -> NDArray[np.bool_]:
    covered = np.zeros(region.shape, dtype=bool)
    for there in places:
        if shared := there and there.intersect(region):
            covered[shared.within(region).slices] = True
    return covered


class _Mosaic:
    """Rasters of one lattice as one array without an end."""

    def __init__(self, lattice: Lattice, rasters: Sequence[Raster], readers: Readers) -> None:
        turn = lattice.whole_turn
        self._readers = readers
        self._placed = [
            (raster, replace(raster.place, col=raster.place.col + shift))
            for raster in rasters
            for shift in ((0, -turn, turn) if turn else (0,))
        ]

    def read(self, window: Region) -> NDArray[np.float32] | None:
        """Pixels of a window, the first valid of all rasters; None: no raster lies there."""
        values: NDArray[np.float32] | None = None
        for raster, there in self._placed:
            shared = there.intersect(window)
            if shared is None:
                continue
            if values is None:
                values = np.full(window.shape, np.nan, dtype=np.float32)
            target = values[shared.within(window).slices]
            if np.isnan(target).any():
                found = self._part(raster, shared.within(there))
                np.copyto(target, found, where=np.isnan(target))
        return values

    def _part(self, raster: Raster, part: Region) -> NDArray[np.float32]:
        # stackstac knows a CRS by its EPSG code only.
        if raster.item is not None and raster.crs.startswith("EPSG:"):
            return read_item(raster, part, self._readers)
        return self._readers.read(raster, part)
