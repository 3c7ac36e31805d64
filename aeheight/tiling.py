"""Web Mercator tiles, values at a point and small pictures of COGs, by rio-tiler."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from morecantile import Tile
from numpy.typing import NDArray
from PIL import Image
from rasterio.warp import transform_bounds
from rio_tiler.colormap import cmap
from rio_tiler.constants import WEB_MERCATOR_TMS
from rio_tiler.errors import PointOutsideBounds
from rio_tiler.io import Reader

from aeheight.grid import Bounds

FINEST = 22
"""The last zoom level that has tiles."""
_SAMPLE = 384
"""Longest edge of the picture of a file from which colour limits are taken, pixels."""
_EQUATOR = 40_075_016.7
"""Metres around it, as Web Mercator has it."""
_GDAL = {
    "GDAL_CACHEMAX": 64_000_000,  # bytes of blocks
    "GDAL_NUM_THREADS": "1",
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
}


def exists(x: int, y: int, zoom: int) -> bool:
    """Whether there is a tile of this name."""
    return 0 <= zoom <= FINEST and 0 <= x < 1 << zoom and 0 <= y < 1 << zoom


def tile_bounds(x: int, y: int, zoom: int) -> Bounds:
    """West, south, east, north in degrees."""
    west, south, east, north = WEB_MERCATOR_TMS.bounds(Tile(x, y, zoom))
    return west, south, east, north


def tile_png(
    paths: Sequence[Path],
    x: int,
    y: int,
    zoom: int,
    size: int,
    colours: str,
    limits: tuple[float, float],
) -> bytes:
    """A tile in colours, as PNG; transparent where no file has a value.

    Args:
        paths: COGs; where they overlap the first that has a value counts.
        x: column of the tile.
        y: row of the tile, from the north.
        zoom: level of the tile.
        size: edge in pixels.
        colours: name of a colour map.
        limits: values of its first and last colour; what lies beyond has these colours.

    Raises:
        OSError: a file is missing or damaged.
    """
    values = np.full((size, size), np.nan, np.float32)
    for path in paths:
        _fill(values, path, WEB_MERCATOR_TMS.xy_bounds(Tile(x, y, zoom)))
        if not np.isnan(values).any():
            break
    return _png(_numbers(values, limits), colours)


@contextmanager
def _opened(path: Path) -> Iterator[Reader]:
    """A file, and its name in what goes wrong with it: GDAL tells it only where it is missing."""
    try:
        with rasterio.Env(**_GDAL), Reader(str(path)) as source:
            yield source
    except OSError as error:
        if str(path) in str(error):
            raise
        raise OSError(f"{path}: {error}") from error


def _fill(values: NDArray[np.float32], path: Path, area: Bounds) -> None:
    """Put the pixels of a file where a tile has none yet.

    Only the part of the tile that the file covers is read: a tile of a whole country looks into
    hundreds of files, and each costs as its pixels there do.
    """
    with _opened(path) as source:
        mercator = WEB_MERCATOR_TMS.rasterio_crs
        rows, cols = _covered(transform_bounds(source.crs, mercator, *source.bounds), area, values)
        if rows.start >= rows.stop or cols.start >= cols.stop:
            return
        edge, part = (area[2] - area[0]) / len(values), values[rows, cols]
        west, north = area[0] + cols.start * edge, area[3] - rows.start * edge
        box = (west, north - part.shape[0] * edge, west + part.shape[1] * edge, north)
        found = source.part(
            box, dst_crs=mercator, bounds_crs=mercator, height=part.shape[0], width=part.shape[1]
        )
    np.copyto(part, found.array[0].astype(np.float32).filled(np.nan), where=np.isnan(part))


def _covered(bounds: Bounds, area: Bounds, values: NDArray[np.float32]) -> tuple[slice, slice]:
    """Rows and columns of a tile that bounds lie in, and one more on each side."""
    size = len(values)
    edge = (area[2] - area[0]) / size
    left, right = (bounds[0] - area[0]) / edge, (bounds[2] - area[0]) / edge
    top, bottom = (area[3] - bounds[3]) / edge, (area[3] - bounds[1]) / edge
    first = [max(math.floor(start) - 1, 0) for start in (top, left)]
    last = [min(math.ceil(stop) + 1, size) for stop in (bottom, right)]
    return slice(first[0], last[0]), slice(first[1], last[1])


def _numbers(values: NDArray[np.float32], limits: tuple[float, float]) -> NDArray[np.uint8]:
    """Places in the palette: 0 where nothing is known, else 1 to 255."""
    missing, (low, high) = np.isnan(values), limits
    scaled = 1 + (np.where(missing, low, values) - low) / (high - low) * 255
    return np.where(missing, 0, np.clip(scaled, 1, 255)).astype(np.uint8)


def _png(numbers: NDArray[np.uint8], colours: str) -> bytes:
    """With a palette: a third of the bytes and of the time of one in RGBA."""
    data, picture = io.BytesIO(), Image.fromarray(numbers).convert("P")
    picture.putpalette(_palette(colours))
    picture.save(data, "PNG", transparency=0, compress_level=3)
    return data.getvalue()


@lru_cache(maxsize=32)
def _palette(colours: str) -> bytes:
    """Red, green, blue of 256 entries; the first is for what is not known."""
    table: Any = cmap.get(colours)
    return bytes(3) + bytes(part for number in range(1, 256) for part in table[number][:3])


def value_at(paths: Sequence[Path], lon: float, lat: float) -> float | None:
    """The value of the pixel at a place, of the first file that has one.

    Raises:
        OSError: a file is missing or damaged.
    """
    for path in paths:
        try:
            with _opened(path) as source:
                value = source.point(lon, lat).array
        except PointOutsideBounds:
            continue
        if not np.ma.getmaskarray(value)[0] and np.isfinite(value[0]):
            return float(value[0])
    return None


def sample(path: Path) -> NDArray[np.float32]:
    """A small picture of a file, from its overviews; NaN where nothing is known.

    Raises:
        OSError: the file is missing or damaged.
    """
    with _opened(path) as source:
        found = source.preview(max_size=_SAMPLE).array[0]
    values: NDArray[np.float32] = found.astype(np.float32).filled(np.nan)
    return values


def native_zoom(metres: float, latitude: float) -> int:
    """The zoom level whose tiles of 256 px are as fine as pixels of so many metres.

    >>> native_zoom(10, 46)
    14
    """
    wanted = _EQUATOR * math.cos(math.radians(latitude)) / 256 / metres
    return min(max(math.ceil(math.log2(wanted) - 0.01), 0), FINEST)


@lru_cache(maxsize=32)
def ramp(colours: str, steps: int = 32) -> tuple[str, ...]:
    """Colours of a map from first to last, such as `#440154`."""
    palette = _palette(colours)
    picked = [1 + round(254 * step / (steps - 1)) for step in range(steps)]
    return tuple(f"#{palette[3 * number : 3 * number + 3].hex()}" for number in picked)
