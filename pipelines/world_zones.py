"""The demo world across two UTM zones: its codes, cut where they meet, on the lattice of each.

As with real tiles, the cut is ragged. Zone 31 goes some pixels past the meridian; zone 32 begins
before it here and behind it there, so that the two overlap in places and leave a gap in others.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pyproj import Transformer

from aeheight.embeddings import NODATA
from pipelines.world_files import TILE_PIXEL, Corner

EAST_CRS = "EPSG:32632"
MEETING = 6.0
"""The meridian between the zones 31 and 32, degrees east."""

PAST = 30.0
"""Metres past the meridian up to which zone 31 has pixels."""

RAGGED = 50.0
"""Metres by which the western edge of zone 32 winds about the meridian."""

WINDING = 200.0
"""Metres northward in which it goes on by one radian."""

METRES_PER_DEGREE = 111_320.0


@dataclass(frozen=True)
class Part:
    """Codes on the native lattice of one zone."""

    crs: str
    """EPSG:code."""
    corner: Corner
    """North-west."""
    codes: NDArray[np.int8]
    """(64, rows, columns), north up, -128 where there are none."""


def west_of_meeting(crs: str, north: float, edge: float) -> float:
    """The western edge of a square whose middle lies on the meridian, metres.

    Args:
        crs: The western zone.
        north: Its northern edge, metres.
        edge: Its length, metres.
    """
    eastings = np.arange(500_000, 900_000, TILE_PIXEL)
    middle = np.full_like(eastings, north - edge / 2)
    lon, _ = Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(eastings, middle)
    return float(eastings[np.searchsorted(lon, MEETING)] - edge / 2)


def cut(whole: Part) -> list[Part]:
    """The western zone's part of a world, and the eastern zone's.

    Args:
        whole: All codes, on the lattice of the western zone.

    Returns:
        West: the same pixels, up to the meridian and some past it. East: pixels of the eastern
        zone's 10 m lattice, each with the code of the pixel of `whole` that holds its centre.
    """
    y, x = _centres(whole.corner, whole.codes.shape[1:])
    beyond = _east_of_meeting(whole.crs, x, y) > PAST
    columns = int(np.flatnonzero(~beyond.all(axis=0))[-1]) + 1
    codes = np.where(beyond, np.int8(NODATA), whole.codes)[..., :columns]
    return [Part(whole.crs, whole.corner, codes), _east(whole)]


def _east(whole: Part) -> Part:
    rows, columns = whole.codes.shape[1:]
    left, top = whole.corner
    box = left, top - rows * TILE_PIXEL, left + columns * TILE_PIXEL, top
    move = Transformer.from_crs(whole.crs, EAST_CRS, always_xy=True)
    west, south, east, north = (round(edge / TILE_PIXEL) for edge in move.transform_bounds(*box))
    corner = west * TILE_PIXEL, north * TILE_PIXEL
    y, x = _centres(corner, (north - south, east - west))
    there_x, there_y = move.transform(x, y, direction="INVERSE")
    row = np.floor((top - there_y) / TILE_PIXEL).astype(int)
    column = np.floor((there_x - left) / TILE_PIXEL).astype(int)
    held = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    held &= _east_of_meeting(EAST_CRS, x, y) > RAGGED * np.sin(y / WINDING)
    first = int(np.flatnonzero(held.any(axis=0))[0])
    row, column, held = row[:, first:], column[:, first:], held[:, first:]
    codes = np.full((len(whole.codes), *held.shape), NODATA, np.int8)
    codes[:, held] = whole.codes[:, row[held], column[held]]
    return Part(EAST_CRS, (corner[0] + first * TILE_PIXEL, corner[1]), codes)


def _centres(
    corner: Corner, shape: tuple[int, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Northing and easting of every pixel centre, (rows, columns) each."""
    y = corner[1] - (np.arange(shape[0]) + 0.5) * TILE_PIXEL
    x = corner[0] + (np.arange(shape[1]) + 0.5) * TILE_PIXEL
    down, right = np.meshgrid(y, x, indexing="ij")
    return down, right


def _east_of_meeting(
    crs: str, x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Metres east of the meridian."""
    lon, lat = Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(x, y)
    return np.asarray((lon - MEETING) * METRES_PER_DEGREE * np.cos(np.radians(lat)))
