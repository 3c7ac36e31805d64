"""One mosaic over several zones: each resampled to one grid, and blended where zones meet.

A zone's predictions reach past its edge. Across that strip its weight falls linearly with the
distance to the edge: 1 as far inside as the strip is wide, one half on the edge, 0 where the
predictions end. Two neighbours' weights then add up to 1, and no step is left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from aeheight.errors import InputError
from aeheight.grid import Grid, Zone, crs_name, parse_crs, reproject_bounds, transformer, utm_zone
from aeheight.sources.resample import Lattice, resample
from aeheight.windows import Region, whole

Heights = NDArray[np.float32]
Floats = NDArray[np.float64]
Read = Callable[[Grid, Region], Heights]
"""Pixels of a region of a zone's grid, which may reach past it: NaN where there is none."""

_METRES_PER_DEGREE = 111_320.0
_LEAST = 1e-9
"""Weight of a zone far outside its own ground: it counts only where no other has a height."""
_MOST = 100
"""Times the zones' pixels: a mosaic with more is a slip of the pen."""
_NODES = 64
"""Pixels between exact weights; straight between them."""


def mosaic_grid(grids: Sequence[Grid], crs: str, resolution: float | None) -> Grid:
    """The grid of one mosaic over all zones, its edges on whole multiples of a pixel.

    Args:
        grids: of the zones.
        crs: of the mosaic.
        resolution: edge of its pixels in units of the CRS; None: that of the first grid's
            pixels (in degrees: on the meridian).

    Raises:
        InputError: a CRS that PROJ does not know, that is no map of the ground, or that cannot show
            the zones; or far more pixels than the zones have.
    """
    known = parse_crs(crs)
    if not (known.is_projected or known.is_geographic) or len(known.axis_info) != 2:
        raise InputError(
            f"export.crs {crs} is no horizontal CRS; name one such as EPSG:3035 or EPSG:4326"
        )
    name = crs_name(known)
    boxes = [reproject_bounds(grid.bounds, grid.crs, name) for grid in grids]
    if any(west > east for west, _, east, _ in boxes):
        raise InputError(
            f"the zones cross the 180th meridian, and a mosaic in {crs} would go around the world; "
            "choose an export.crs that has it in its middle"
        )
    wests, souths, easts, norths = zip(*boxes, strict=True)
    edge = resolution or _like(grids[0], name)
    pixels = (max(easts) - min(wests)) / edge * ((max(norths) - min(souths)) / edge)
    if pixels > _MOST * (ground := sum(rows * cols for rows, cols in (g.shape for g in grids))):
        raise InputError(
            f"a mosaic in {crs} with pixels of {edge:g} (units of the CRS) would have {pixels:.3g} "
            f"pixels, and the map has {ground:.3g}; name an export.resolution of "
            f"{_like(grids[0], name):.3g} or so, or a CRS in which the zones lie closer together"
        )
    left, top = floor(min(wests) / edge), ceil(max(norths) / edge)
    shape = top - floor(min(souths) / edge), ceil(max(easts) / edge) - left
    return Grid(name, edge, left * edge, top * edge, shape)


def _like(grid: Grid, crs: str) -> float:
    """The edge of a pixel of a grid in units of another CRS."""
    metres, known = grid.pixel_metres()[0], CRS.from_user_input(crs)
    if known.is_geographic:
        return metres / _METRES_PER_DEGREE
    return metres / float(known.axis_info[0].unit_conversion_factor)


@dataclass(frozen=True, slots=True)
class Mosaic:
    """Several zones as one grid."""

    grid: Grid
    """Of the mosaic."""
    zones: tuple[Grid, ...]
    """The zones' grids."""
    reach: float
    """Metres by which the zones' predictions reach past their edges."""

    @property
    def name(self) -> str:
        """Its folder's name, such as `mosaic-epsg3035`."""
        return f"mosaic-{self.grid.name}"

    def read(self, region: Region, read: Read) -> Heights:
        """The pixels of a region: the weighted mean of the zones that have a height there.

        Args:
            region: of the mosaic's grid.
            read: gives the zones' pixels.

        Returns:
            (rows, columns), NaN where no zone has one.
        """
        total, share = np.zeros(region.shape), np.zeros(region.shape)
        wanted = np.ones(region.shape, dtype=np.bool_)
        for zone in self.zones:
            source = partial(_in, zone, read)
            values = resample(Lattice.of(zone), self.grid, region, wanted, source)
            known = np.isfinite(values)
            if not known.any():
                continue
            weight = np.where(known, self._weight(zone, region), 0)
            total += np.where(known, values, 0) * weight
            share += weight
        mean = np.where(share > 0, total / np.where(share > 0, share, 1), np.nan)
        return mean.astype(np.float32)

    def touched(self, region: Region) -> list[tuple[Grid, Region]]:
        """The zones under a region, and the pixels of each that it may be made from."""
        part, found = self.grid.part(region), []
        for zone in self.zones:
            west, south, east, north = reproject_bounds(part.bounds, self.grid.crs, zone.crs)
            top, left = zone.offset(west, north)
            bottom, right = zone.offset(east, south)
            row, col = floor(top) - 2, floor(left) - 2
            there = Region(row, col, ceil(bottom) + 2 - row, ceil(right) + 2 - col)
            inside = there.intersect(whole(zone.shape))
            if inside:
                found.append((zone, inside))
        return found

    def _weight(self, zone: Grid, region: Region) -> Floats:
        """(rows, columns) from nearly 0 to 1; 1 everywhere for what is no UTM zone."""
        utm = utm_zone(zone.crs)
        if utm is None or len(self.zones) < 2:
            return np.ones(region.shape)
        # Nodes of the whole grid, so that a weight does not depend on the cut.
        rows = np.arange(region.row // _NODES, (region.bottom - 1) // _NODES + 2) * _NODES
        cols = np.arange(region.col // _NODES, (region.right - 1) // _NODES + 2) * _NODES
        weight = np.ones(region.shape)
        for metres in self._inside(utm, rows, cols):
            lines = [np.interp(np.arange(region.col, region.right), cols, line) for line in metres]
            step, at = np.divmod(np.arange(region.row, region.bottom) - rows[0], _NODES)
            part, above = (at / _NODES)[:, None], np.stack(lines)
            along = above[step] * (1 - part) + above[step + 1] * part
            weight *= np.clip(0.5 + along / (2 * self.reach), _LEAST, 1)
        return weight

    def _inside(
        self, zone: Zone, rows: NDArray[np.int64], cols: NDArray[np.int64]
    ) -> tuple[Floats, Floats]:
        """Metres from pixels to the nearer meridian of a UTM zone's edge, and to the equator.

        Negative outside of the zone; (rows, columns) each.
        """
        grid = self.grid
        x, y = np.meshgrid(
            grid.left + (cols + 0.5) * grid.resolution, grid.top - (rows + 0.5) * grid.resolution
        )
        lon, lat = transformer(grid.crs, "EPSG:4326").transform(x, y)
        away = np.abs((lon - zone.meridian + 180) % 360 - 180)
        east = (3 - away) * np.cos(np.radians(lat)) * _METRES_PER_DEGREE
        return east, (lat if zone.north else -lat) * _METRES_PER_DEGREE


def _in(zone: Grid, read: Read, region: Region) -> Heights | None:
    """Pixels of a zone, or None where a region lies wholly outside of it."""
    return read(zone, region) if region.intersect(whole(zone.shape)) else None
