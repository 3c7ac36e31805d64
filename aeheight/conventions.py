"""How a group of a tree says where it lies: CF coordinates, `grid_mapping`, GeoZarr attributes.

rioxarray reads either, odc-geo CF only; so both are written. Nothing here knows of Zarr.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from aeheight.grid import Grid, utm_zone

_CONVENTIONS = "https://raw.githubusercontent.com/zarr-conventions"
_GEOZARR = [
    {
        "schema_url": f"{_CONVENTIONS}/geo-proj/refs/tags/v1/schema.json",
        "spec_url": "https://github.com/zarr-conventions/geo-proj/blob/v1/README.md",
        "uuid": "f17cb550-5864-4468-aeb7-f3180cfb622f",
        "name": "proj:",
        "description": "Coordinate reference system information for geospatial data",
    },
    {
        "schema_url": f"{_CONVENTIONS}/spatial/refs/tags/v1/schema.json",
        "spec_url": "https://github.com/zarr-conventions/spatial/blob/v1/README.md",
        "uuid": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4",
        "name": "spatial:",
        "description": "Spatial coordinate information",
    },
]

_MULTISCALES = {
    "schema_url": f"{_CONVENTIONS}/multiscales/refs/tags/v1/schema.json",
    "spec_url": "https://github.com/zarr-conventions/multiscales/blob/v1/README.md",
    "uuid": "d35379db-88df-4056-af3a-620245f8e347",
    "name": "multiscales",
    "description": "Multiscale layout of zarr datasets",
}

_LENGTHS = {"metre": "m", "foot": "international_foot", "US survey foot": "US_survey_foot"}
"""UDUNITS' names of PROJ's units; others are told as so many metres."""


@dataclass(frozen=True, slots=True)
class Coordinate:
    """One coordinate array of a group."""

    name: str
    """Also its dimension, unless it is a single value."""
    values: NDArray[Any]
    attributes: dict[str, Any]


def crs_attributes(crs: str) -> dict[str, str]:
    """`proj:code` where a CRS has one, such as `ESRI:54009`, else `proj:wkt2`."""
    if ":" in crs and len(crs) < 32:
        return {"proj:code": crs}
    return {"proj:wkt2": CRS.from_user_input(crs).to_wkt()}


def group_attributes(grid: Grid) -> dict[str, Any]:
    """CF and GeoZarr attributes of a group."""
    zone = utm_zone(grid.crs)
    return {
        "Conventions": "CF-1.11",
        "zarr_conventions": _GEOZARR,
        **crs_attributes(grid.crs),
        "spatial:dimensions": ["y", "x"],
        "spatial:transform": list(grid.transform)[:6],
        "spatial:transform_type": "affine",
        "spatial:bbox": list(grid.bounds),
        "spatial:shape": list(grid.shape),
        "spatial:registration": "pixel",
        **({"zone_bounds_degrees": list(zone.bounds)} if zone else {}),
    }


def pyramid_attributes(levels: Sequence[Grid]) -> dict[str, Any]:
    """GeoZarr attributes of a group that holds levels of one grid, named `0`, `1`, ...

    Args:
        levels: grids from fine to coarse, each of pixels twice as wide as the one before.
    """
    layout: list[dict[str, Any]] = [
        {
            "asset": str(number),
            **({"derived_from": str(number - 1)} if number else {}),
            "transform": {"scale": [2.0 if number else 1.0] * 2, "translation": [0.0, 0.0]},
            "spatial:transform": list(grid.transform)[:6],
            "spatial:shape": list(grid.shape),
        }
        for number, grid in enumerate(levels)
    ]
    return {
        **group_attributes(levels[0]),
        "zarr_conventions": [_MULTISCALES, *_GEOZARR],
        "multiscales": {"layout": layout, "resampling_method": "average"},
    }


def coordinates(grid: Grid, years: Sequence[int], bands: Sequence[str]) -> list[Coordinate]:
    """CF coordinates at pixel centres, and the grid mapping `spatial_ref`.

    Args:
        grid: the group's.
        years: of the time axis; empty: there is none. `time` is 1 January of the year.
        bands: names along the band axis; empty: there is none.
    """
    degrees = grid.is_geographic
    names = ("latitude", "longitude") if degrees else ("projection_y_coordinate",
                                                       "projection_x_coordinate")  # fmt: skip
    units = ("degrees_north", "degrees_east") if degrees else [_length(grid.crs)] * 2
    found = [
        Coordinate("y", grid.y(), {"standard_name": names[0], "units": units[0], "axis": "Y"}),
        Coordinate("x", grid.x(), {"standard_name": names[1], "units": units[1], "axis": "X"}),
        Coordinate("spatial_ref", np.array(0, dtype=np.int64), _grid_mapping(grid)),
    ]
    if years:
        found.append(time_coordinate(years))
    if bands:
        about = {"long_name": "embedding band", "band_names": list(bands)}
        found.append(Coordinate("band", np.arange(len(bands), dtype=np.int16), about))
    return found


def _length(crs: str) -> str:
    """The unit of a projected CRS as CF (UDUNITS) has it."""
    axis = CRS.from_user_input(crs).axis_info[0]
    return _LENGTHS.get(axis.unit_name, f"{axis.unit_conversion_factor!r} m")


def time_coordinate(years: Sequence[int]) -> Coordinate:
    """1 January of every year, in days since 1970."""
    days = np.array([np.datetime64(f"{year}-01-01", "D") for year in years])
    attributes = {
        "standard_name": "time",
        "axis": "T",
        "units": "days since 1970-01-01",
        "calendar": "proleptic_gregorian",
    }
    return Coordinate("time", days.astype(np.int64), attributes)


def _grid_mapping(grid: Grid) -> dict[str, Any]:
    crs = CRS.from_user_input(grid.crs)
    transform = " ".join(repr(float(value)) for value in grid.transform.to_gdal())
    return crs.to_cf() | {"spatial_ref": crs.to_wkt(), "GeoTransform": transform}
