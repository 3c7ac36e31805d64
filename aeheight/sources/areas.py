"""Areas of ground that settings name: a share of the blocks, bounds, or a GeoJSON file."""

import json
from collections.abc import Sequence
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.features import bounds as geometry_bounds
from rasterio.features import geometry_mask
from rasterio.warp import transform_geom

from aeheight.errors import InputError
from aeheight.grid import Grid, Zone, utm_zone
from aeheight.settings import Bounds, RegionSettings
from aeheight.windows import Region, whole

_FAR, _POLE = 12.0, 84.5
"""Degrees from a zone's meridian, and of latitude, in which its coordinates are asked for."""
_RIM = 1e-6
"""Pixels: bounds that reach into one by less do not ask for it."""
_STEP = 0.05
"""Degrees between the corners of an outline before it is moved to another CRS: there its straight
lines are bent."""


def read_area(
    settings: RegionSettings, wanted: float | Bounds | str, grid: Grid
) -> float | NDArray[np.bool_]:
    """What `split.test` or `split.validation` means on a (part of a) grid.

    Args:
        settings: resolves a relative file.
        wanted: a share, bounds in the grid's CRS, or a GeoJSON file in degrees.
        grid: the pixels that are asked for.

    Returns:
        The share as it is, else (rows, columns) whether a pixel's centre lies inside.

    Raises:
        InputError: the file is missing or is no GeoJSON with polygons.
    """
    if isinstance(wanted, float | int):
        return float(wanted)
    if not isinstance(wanted, str):
        west, south, east, north = wanted
        y, x = grid.y(), grid.x()
        return np.logical_and.outer((y > south) & (y < north), (x > west) & (x < east))
    moved = _moved(read_shapes(settings, wanted, "split"), grid.crs, f"split: {wanted}")
    outside: NDArray[np.bool_] = geometry_mask(moved, grid.shape, grid.transform)
    return ~outside


def area_touches(settings: RegionSettings, wanted: Bounds | str, grid: Grid) -> bool:
    """Whether the bounds of an area and of a grid meet.

    Raises:
        InputError: see `read_area`.
    """
    areas = (
        [wanted]
        if not isinstance(wanted, str)
        else boxes(_moved(read_shapes(settings, wanted, "split"), grid.crs, f"split: {wanted}"))
    )
    west, south, east, north = grid.bounds
    return any(w < east and west < e and s < north and south < n for w, s, e, n in areas)


def read_shapes(settings: RegionSettings, wanted: str, key: str) -> list[Any]:
    """The polygons of a GeoJSON file, in degrees.

    Raises:
        InputError: the file is missing or is no GeoJSON with polygons.
    """
    path = Path(settings.resolve(wanted))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        shapes = (
            [part["geometry"] for part in found["features"]]
            if "features" in found
            else [found.get("geometry", found)]
        )
        if not shapes or any("Polygon" not in shape["type"] for shape in shapes):
            raise ValueError("it holds other shapes, or none")
        for west, south, east, north in map(geometry_bounds, shapes):
            if not (-180 <= west <= east <= 180 and -90 <= south <= north <= 90):
                raise ValueError(f"its bounds {[west, south, east, north]} are no degrees")
        return shapes
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{key}: {path} is no GeoJSON with polygons: {error}") from error


def read_aoi(settings: RegionSettings) -> list[Any] | None:
    """The polygons of `aoi` in degrees, or None where it is not given.

    Raises:
        InputError: bounds that are no area in degrees; see also `read_shapes`.
    """
    return None if settings.aoi is None else shapes_of(settings, settings.aoi, "aoi")


def shapes_of(settings: RegionSettings, wanted: Bounds | str, key: str) -> list[Any]:
    """The polygons in degrees of bounds in degrees, or of a GeoJSON file.

    Raises:
        InputError: bounds that are no area in degrees; see also `read_shapes`.
    """
    if isinstance(wanted, str):
        return read_shapes(settings, wanted, key)
    west, south, east, north = wanted
    if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south < north <= 90) or (
        west == east
    ):
        raise InputError(
            f"{key} {list(wanted)} is no area in degrees; give [west, south, east, north] "
            "(west above east: across the 180th meridian)"
        )
    if west > east and east + 360 - west > 180:
        raise InputError(
            f"{key} {list(wanted)}: west above east means across the 180th meridian, and that "
            f"is {east + 360 - west:g} degrees wide; give [west, south, east, north]"
        )
    boxes = [(west, east)] if west < east else [(west, 180.0), (-180.0, east)]
    return [_rectangle((w, south, e, north)) for w, e in boxes]


def _rectangle(bounds: Bounds) -> dict[str, Any]:
    west, south, east, north = bounds
    ring = [(west, south), (east, south), (east, north), (west, north), (west, south)]
    return {"type": "Polygon", "coordinates": [ring]}


def boxes(shapes: Sequence[Any]) -> list[Bounds]:
    """The bounds of every polygon."""
    return [geometry_bounds(shape) for shape in shapes]


def pixels_of(shapes: Sequence[Any], grid: Grid, key: str) -> Region | None:
    """The smallest region of a grid that holds all of its ground in some polygons; None: none.

    Args:
        shapes: GeoJSON polygons in degrees.
        grid: of the pixels.
        key: the setting that named them, for the error.
    """
    found = np.array(boxes(_moved(shapes, grid.crs, key)))
    if not np.isfinite(found).all():
        return None
    top, left = grid.offset(float(found[:, 0].min()), float(found[:, 3].max()))
    bottom, right = grid.offset(float(found[:, 2].max()), float(found[:, 1].min()))
    row, col = floor(top + _RIM), floor(left + _RIM)
    height, width = ceil(bottom - _RIM) - row, ceil(right - _RIM) - col
    if height < 1 or width < 1:
        return None
    return Region(row, col, height, width).intersect(whole(grid.shape))


def outside(shapes: Sequence[Any], grid: Grid, key: str) -> NDArray[np.bool_]:
    """(rows, columns) whether a pixel's centre lies in none of some polygons in degrees."""
    moved = _moved(shapes, grid.crs, key)
    mask: NDArray[np.bool_] = geometry_mask(moved, grid.shape, grid.transform)
    return mask


def clipped(bounds: Bounds, west: float, east: float) -> Bounds | None:
    """Bounds in degrees between two meridians, which may be given past 180; None: nothing."""
    for turn in (-360, 0, 360):
        low, high = max(bounds[0] + turn, west), min(bounds[2] + turn, east)
        if low < high:
            return low, bounds[1], high, bounds[3]
    return None


def squares_inside(shapes: Sequence[Any], grid: Grid, edge: int) -> NDArray[np.bool_]:
    """Which squares of a grid polygons in degrees touch, at a corner or inside.

    Args:
        shapes: GeoJSON polygons.
        grid: is cut into squares from its north-western corner.
        edge: of a square, in pixels.

    Returns:
        (rows of squares, columns of squares).
    """
    rows, cols = (-(-size // edge) for size in grid.shape)
    board = Grid(grid.crs, grid.resolution * edge, grid.left, grid.top, (rows, cols))
    moved = _moved(shapes, grid.crs, "aoi")
    mask: NDArray[np.bool_] = geometry_mask(
        moved, board.shape, board.transform, all_touched=True, invert=True
    )
    return mask


def _moved(shapes: Sequence[Any], crs: str, name: str) -> list[Any]:
    try:
        zone = utm_zone(crs)
        return [transform_geom("EPSG:4326", crs, _near(_dense(shape), zone)) for shape in shapes]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{name} is no GeoJSON with polygons: {error}") from error


def _near(shape: Any, zone: Zone | None) -> Any:
    """A polygon pressed into the degrees where a zone's coordinates mean something.

    Corners beyond move to the rim of these degrees: what lies inside is the same.
    """
    if zone is None:
        return shape
    west, _, east, _ = geometry_bounds(shape)
    turn = 360 * round((zone.meridian - (west + east) / 2) / 360) if east - west < 180 else 0
    low, high = zone.meridian - _FAR, zone.meridian + _FAR
    rings = [
        [
            [(min(max(x + turn, low), high), min(max(y, -_POLE), _POLE)) for x, y in ring]
            for ring in polygon
        ]
        for polygon in shape["coordinates"]
    ]
    return {"type": "MultiPolygon", "coordinates": rings}


def _dense(shape: Any) -> Any:
    """A polygon with corners every `_STEP` degrees along its edges."""
    many = shape["coordinates"] if shape["type"] == "MultiPolygon" else [shape["coordinates"]]
    rings = [[_dense_ring(ring) for ring in polygon] for polygon in many]
    return {"type": "MultiPolygon", "coordinates": rings}


def _dense_ring(ring: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    corners = np.asarray([corner[:2] for corner in ring], dtype=np.float64)
    lengths = np.abs(np.diff(corners, axis=0)).max(axis=1)
    parts = [
        np.linspace(a, b, max(int(np.ceil(length / _STEP)), 1), endpoint=False)
        for a, b, length in zip(corners[:-1], corners[1:], lengths, strict=True)
    ]
    return [(float(x), float(y)) for x, y in np.concatenate([*parts, corners[-1:]])]
