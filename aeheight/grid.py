"""Grids on the ground: CRS, resolution and bounds to shape, transform and pixel centres."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError

from aeheight.errors import InputError
from aeheight.windows import Region, Shape

Bounds = tuple[float, float, float, float]
"""West, south, east, north."""

_SNAP = 1e-3
"""Pixels: bounds closer than this to a whole pixel count as whole."""


def parse_crs(text: str) -> CRS:
    """The CRS that a user named.

    Raises:
        InputError: PROJ does not know it.
    """
    try:
        return CRS.from_user_input(text)
    except CRSError as error:
        raise InputError(
            f"PROJ does not know the CRS {text!r}; name one like EPSG:32610"
        ) from error


def crs_name(crs: Any) -> str:
    """`EPSG:32610` where the CRS has a code, else its WKT."""
    parsed = CRS.from_user_input(crs)
    authority = parsed.to_authority(min_confidence=70)
    return ":".join(authority) if authority else parsed.to_wkt()


@dataclass(frozen=True, slots=True)
class Grid:
    """Square, north-up pixels in one CRS; row 0 is the northernmost."""

    crs: str
    """Authority code such as `EPSG:32610`, or WKT where there is none."""
    resolution: float
    """Edge of a pixel in units of the CRS (metres, or degrees)."""
    left: float
    """Western edge (not centre) of column 0."""
    top: float
    """Northern edge (not centre) of row 0."""
    shape: Shape
    """Rows and columns."""

    @classmethod
    def from_bounds(cls, crs: str, resolution: float, bounds: Bounds) -> "Grid":
        """The grid that fills `bounds` exactly.

        Raises:
            InputError: empty bounds, or an extent that is no whole number of pixels.
        """
        west, south, east, north = bounds
        if not (west < east and south < north):
            raise InputError(f"bounds {list(bounds)} are empty; give [west, south, east, north]")
        rows, cols = (north - south) / resolution, (east - west) / resolution
        shape = (max(round(rows), 1), max(round(cols), 1))
        if abs(rows - shape[0]) > _SNAP or abs(cols - shape[1]) > _SNAP:
            raise InputError(
                f"bounds {list(bounds)} hold {rows:.3f} x {cols:.3f} pixels of {resolution}; "
                f"make both whole, for example east {west + shape[1] * resolution}, "
                f"south {north - shape[0] * resolution}"
            )
        return cls(crs_name(parse_crs(crs)), resolution, west, north, shape)

    @property
    def name(self) -> str:
        """The group's name in a cube: `utm10n`, `epsg4326`, `epsg2154`."""
        match = re.fullmatch(r"EPSG:32([67])(0[1-9]|[1-5]\d|60)", self.crs)
        if match:
            return f"utm{match[2]}{'n' if match[1] == '6' else 's'}"
        return re.sub(r"\W", "", self.crs).lower()[:32]

    @property
    def transform(self) -> Affine:
        """Pixel corner (column, row) to CRS coordinates; negative dy."""
        return Affine(self.resolution, 0, self.left, 0, -self.resolution, self.top)

    @property
    def bounds(self) -> Bounds:
        """West, south, east, north edges."""
        rows, cols = self.shape
        return (
            self.left,
            self.top - rows * self.resolution,
            self.left + cols * self.resolution,
            self.top,
        )

    @property
    def is_geographic(self) -> bool:
        """Whether the unit is degrees."""
        return bool(CRS.from_user_input(self.crs).is_geographic)

    def x(self) -> NDArray[np.float64]:
        """Pixel centres from west to east, shape (columns,)."""
        return self.left + (np.arange(self.shape[1], dtype=np.float64) + 0.5) * self.resolution

    def y(self) -> NDArray[np.float64]:
        """Pixel centres from north to south, shape (rows,)."""
        return self.top - (np.arange(self.shape[0], dtype=np.float64) + 0.5) * self.resolution

    def part(self, region: Region) -> "Grid":
        """The grid of a region (which may reach past this grid's edge)."""
        left = self.left + region.col * self.resolution
        top = self.top - region.row * self.resolution
        return Grid(self.crs, self.resolution, left, top, region.shape)

    def offset(self, left: float, top: float) -> tuple[float, float]:
        """(row, column) of a corner, in fractional pixels of this grid."""
        return (self.top - top) / self.resolution, (left - self.left) / self.resolution

    def pixel_metres(self) -> tuple[float, float]:
        """Height and width of a pixel on the ground at the grid's middle, in metres."""
        if not self.is_geographic:
            metres = CRS.from_user_input(self.crs).axis_info[0].unit_conversion_factor
            return self.resolution * metres, self.resolution * metres
        _west, south, _east, north = self.bounds
        per_degree = 111_320.0
        latitude = np.radians((south + north) / 2)
        return self.resolution * per_degree, float(self.resolution * per_degree * np.cos(latitude))


def reproject_bounds(bounds: Bounds, source: str, target: str) -> Bounds:
    """Bounds in another CRS that hold the whole of `bounds` (edges densified).

    In degrees, bounds that cross the 180th meridian come back with west above east.

    Raises:
        InputError: the bounds lie outside what the target CRS can show.
    """
    if source == target:
        return bounds
    moved = Transformer.from_crs(source, target, always_xy=True).transform_bounds(
        *bounds, densify_pts=21
    )
    if not np.all(np.isfinite(moved)):
        raise InputError(f"bounds {list(bounds)} in {source} cannot be shown in {target}")
    return (float(moved[0]), float(moved[1]), float(moved[2]), float(moved[3]))
