"""Grids on the ground: CRS, resolution and bounds to shape, transform and pixel centres."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError, ProjError

from aeheight.errors import InputError
from aeheight.windows import Region, Shape, whole

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
        if zone := utm_zone(self.crs):
            return f"utm{zone.number:02d}{'n' if zone.north else 's'}"
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

    def pixel_widths(self) -> NDArray[np.float64]:
        """Width of a pixel on the ground in each row (rows, 1), metres: no cut of a grid shows."""
        height, width = self.pixel_metres()
        rows = np.arange(self.shape[0])[:, None] + 0.5
        if not self.is_geographic:
            return np.full(rows.shape, width)
        widths: NDArray[np.float64] = np.cos(np.radians(self.top - rows * self.resolution)) * height
        return widths


@lru_cache(maxsize=256)
def transformer(source: str, target: str) -> Transformer:
    """From x, y of one CRS to x, y of another; made once (making one takes milliseconds)."""
    return Transformer.from_crs(source, target, always_xy=True)


@dataclass(frozen=True, slots=True)
class Zone:
    """A UTM zone: six degrees of longitude in one hemisphere."""

    number: int
    """1 to 60."""
    north: bool

    @property
    def meridian(self) -> int:
        """Its middle, degrees east."""
        return 6 * self.number - 183

    @property
    def bounds(self) -> Bounds:
        """West, south, east, north in degrees, as far as UTM is used."""
        south, north = (0.0, 84.0) if self.north else (-80.0, 0.0)
        return float(self.meridian - 3), south, float(self.meridian + 3), north


@lru_cache(maxsize=256)
def utm_zone(crs: str) -> Zone | None:
    """The zone of a CRS `EPSG:326xx` or `EPSG:327xx`; None for any other."""
    match = re.fullmatch(r"EPSG:32([67])(0[1-9]|[1-5]\d|60)", crs)
    return Zone(int(match[2]), match[1] == "6") if match else None


_SPARSE = 1024
"""Pixels between the places where a region is first asked whose ground it is."""

_CLEAR = 1e-3
"""Degrees: what lies this far from another's ground at such places does so between them too."""


def owned(grids: Sequence[Grid], grid: Grid, region: Region) -> NDArray[np.bool_]:
    """Whose ground lies in a region of one of several grids, so that all ground counts once.

    A pixel belongs to the grid whose zone it lies in: of all zones that there are, the one whose
    central meridian is nearest (and on the meridian where two meet, the eastern), then the one of
    its hemisphere.

    Args:
        grids: every grid of a cube.
        grid: one of them.
        region: pixels of it; they may reach past it.

    Returns:
        (rows, columns) whether the pixel's centre is the grid's own; all are where `grids` are
        no UTM zones, or it is the only one.
    """
    zones = [zone for zone in (utm_zone(each.crs) for each in grids) if zone]
    if len(zones) < 2 or utm_zone(grid.crs) is None:
        return np.ones(region.shape, dtype=bool)
    every = [np.append(np.arange(0, size, _SPARSE), size - 1) for size in region.shape]
    lead = _lead(zones, grid, region, *every)
    if (lead > _CLEAR).all() or (lead < -_CLEAR).all():
        return np.full(region.shape, lead.flat[0] > 0)
    pixels = [np.arange(size) for size in region.shape]
    own: NDArray[np.bool_] = _lead(zones, grid, region, *pixels) >= 0
    return own


def near_own(grids: Sequence[Grid], grid: Grid, edge: int, halo: int) -> NDArray[np.bool_]:
    """Which squares of one of several grids hold the grid's own ground, or lie near it.

    Args:
        grids: every grid of a cube.
        grid: one of them.
        edge: of a square, in pixels.
        halo: pixels by which a square is grown first.

    Returns:
        (rows of squares, columns of squares), as `windows.tile` cuts them; see `owned`.
    """
    board = [-(-size // edge) for size in grid.shape]
    zones = [zone for zone in (utm_zone(each.crs) for each in grids) if zone]
    if len(zones) < 2 or utm_zone(grid.crs) is None:
        return np.ones(board, dtype=bool)
    starts = [np.arange(squares) * edge for squares in board]
    rims = [np.stack([s - halo, s + edge - 1 + halo], axis=1).ravel() for s in starts]
    lead = _lead(zones, grid, whole(grid.shape), *rims).reshape(board[0], 2, board[1], 2)
    near: NDArray[np.bool_] = lead.max(axis=(1, 3)) >= 0
    return near


def _lead(
    zones: Sequence[Zone],
    grid: Grid,
    region: Region,
    rows: NDArray[np.int64],
    cols: NDArray[np.int64],
) -> NDArray[np.float64]:
    """By how many degrees pixels of a region are nearer to their own zone than to any other.

    Args:
        zones: of all grids.
        grid: the region's.
        region: pixels of the grid.
        rows: rows of the region that are asked for.
        cols: columns that are asked for.

    Returns:
        (rows, columns); 0 or more where the pixel is the grid's own.
    """
    x = grid.left + (region.col + cols + 0.5) * grid.resolution
    y = grid.top - (region.row + rows + 0.5) * grid.resolution
    lon, lat = transformer(grid.crs, "EPSG:4326").transform(*np.meshgrid(x, y))
    lon = np.round(lon, 9)

    def distance(zone: Zone) -> NDArray[np.float64]:
        east = (lon - zone.meridian + 180) % 360 - 180
        # A tie is the eastern zone's; of one zone's hemispheres, the pixel's.
        bias = np.where(east < 0, 0, 1e-7) + 1e-8 * ((lat >= 0) != zone.north)
        return np.asarray(np.abs(east) + bias, dtype=np.float64)

    own = utm_zone(grid.crs)
    others = [distance(zone) for zone in zones if zone != own]
    assert own is not None
    lead: NDArray[np.float64] = np.min(others, axis=0) - distance(own)
    return lead


def reproject_bounds(bounds: Bounds, source: str, target: str) -> Bounds:
    """Bounds in another CRS that hold the whole of `bounds` (edges densified).

    In degrees, bounds that cross the 180th meridian come back with west above east.

    Raises:
        InputError: the bounds lie outside what the target CRS can show, or it is of another planet.
    """
    if source == target:
        return bounds
    try:
        moved = transformer(source, target).transform_bounds(*bounds, densify_pts=21)
    except ProjError as error:
        raise InputError(
            f"bounds {list(bounds)} in {source} cannot be shown in {target}: {error}"
        ) from error
    if not np.all(np.isfinite(moved)):
        raise InputError(f"bounds {list(bounds)} in {source} cannot be shown in {target}")
    return (float(moved[0]), float(moved[1]), float(moved[2]), float(moved[3]))
