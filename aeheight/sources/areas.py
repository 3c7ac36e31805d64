"""Areas of ground that a split names: a share of the blocks, bounds, or a GeoJSON file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.features import bounds as geometry_bounds
from rasterio.features import geometry_mask
from rasterio.warp import transform_geom

from aeheight.errors import InputError
from aeheight.grid import Grid
from aeheight.settings import Bounds, RegionSettings


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
    moved = _moved(settings, wanted, grid)
    outside: NDArray[np.bool_] = geometry_mask(moved, grid.shape, grid.transform)
    return ~outside


def area_touches(settings: RegionSettings, wanted: Bounds | str, grid: Grid) -> bool:
    """Whether the bounds of an area and of a grid meet.

    Raises:
        InputError: see `read_area`.
    """
    areas = (
        [geometry_bounds(shape) for shape in _moved(settings, wanted, grid)]
        if isinstance(wanted, str)
        else [wanted]
    )
    west, south, east, north = grid.bounds
    return any(w < east and west < e and s < north and south < n for w, s, e, n in areas)


def read_shapes(settings: RegionSettings, wanted: str) -> list[Any]:
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
        return shapes
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"split: {path} is no GeoJSON with polygons: {error}") from error


def _moved(settings: RegionSettings, wanted: str, grid: Grid) -> list[Any]:
    shapes = read_shapes(settings, wanted)
    try:
        return [transform_geom("EPSG:4326", grid.crs, shape) for shape in shapes]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"split: {wanted} is no GeoJSON with polygons: {error}") from error
