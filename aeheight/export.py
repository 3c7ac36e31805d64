"""Cloud-optimised GeoTIFFs: windows of a map to a file that every GIS opens.

The file is written window by window into a plain GeoTIFF, from which GDAL makes the COG with its
overviews: memory is bounded by a window, and the disk holds the plain file (4 bytes a pixel), its
overviews and the COG for a while. GDAL may leave a file cut off on a full disk and say nothing, so
every file is read back.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from pyproj import CRS
from rasterio._err import CPLE_BaseError
from rasterio.enums import Resampling
from rasterio.errors import RasterioError, RasterioIOError
from rasterio.windows import Window

from aeheight.grid import Grid
from aeheight.settings import ExportSettings
from aeheight.windows import Region, tile

_WINDOW = 1024
"""Edge of the windows that are held at once, pixels."""
_CACHE = 64_000_000
"""Bytes of blocks that GDAL keeps."""

Heights = NDArray[np.float32]
Read = Callable[[Region], Heights]
"""The pixels of a region of the file: (rows, columns), NaN where there is none."""


@dataclass(frozen=True, slots=True)
class About:
    """What a file says of its one band."""

    description: str
    """For people, such as `predicted height`."""
    unit: str
    """Such as `metre`; empty: the values have none."""
    crs: CRS
    """Of the file: compound where the values are heights of a known datum."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Further metadata of the file."""


@dataclass(frozen=True, slots=True)
class Moments:
    """What is known of the valid pixels of a file."""

    pixels: int = 0
    valid: int = 0
    minimum: float = np.inf
    maximum: float = -np.inf
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared deviations from the mean."""

    def add(self, values: Heights) -> "Moments":
        """With further pixels; merged after Chan, Golub & LeVeque (1983)."""
        known = values[np.isfinite(values)].astype(np.float64)
        grown = replace(self, pixels=self.pixels + values.size)
        if not known.size:
            return grown
        mean, count = float(known.mean()), self.valid + known.size
        apart = mean - self.mean
        squares = float(((known - mean) ** 2).sum()) + apart**2 * self.valid * known.size / count
        return replace(
            grown,
            valid=count,
            minimum=min(self.minimum, float(known.min())),
            maximum=max(self.maximum, float(known.max())),
            mean=self.mean + apart * known.size / count,
            squares=self.squares + squares,
        )

    @property
    def bounds(self) -> tuple[float, float, float]:
        """Minimum, maximum and mean."""
        return self.minimum, self.maximum, self.mean

    @property
    def statistics(self) -> dict[str, float]:
        """As STAC and GDAL name them; of at least one valid pixel."""
        return {
            "minimum": self.minimum,
            "maximum": self.maximum,
            "mean": self.mean,
            "stddev": float(np.sqrt(self.squares / self.valid)),
            "valid_percent": 100 * self.valid / self.pixels,
        }


def write_cog(
    path: Path, grid: Grid, read: Read, about: About, settings: ExportSettings
) -> Moments:
    """Write one band of float32 as a COG: blocks, overviews by average, NaN declared as nodata.

    Args:
        path: of the file to make, in a folder with room for three times its raw size.
        grid: all pixels of the file.
        read: gives them; asked for windows of 1024 px at most, row by row.
        about: what the file says of itself.
        settings: `block` and `compress`.

    Returns:
        The moments of its pixels; where none is valid, no file is made.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    plain = path.with_suffix(".plain.tif")
    windows = _windows(grid, settings)
    with _plain_errors(path):
        try:
            moments, sums = _write_plain(plain, grid, windows, read, about, settings, {})
            if moments.valid:
                rasterio.shutil.copy(plain, path, driver="COG", **_cog_options(settings))
                _prove(path, windows, sums)
        finally:
            plain.unlink(missing_ok=True)
    return moments


def write_geotiff(
    path: Path, grid: Grid, read: Read, about: About, settings: ExportSettings
) -> Moments:
    """Write one band of float32 as a tiled GeoTIFF without overviews; as `write_cog` otherwise."""
    windows, packed = _windows(grid, settings), {"compress": settings.compress, "predictor": 3}
    with _plain_errors(path):
        moments, sums = _write_plain(path, grid, windows, read, about, settings, packed)
        if moments.valid:
            _prove(path, windows, sums)
    if not moments.valid:
        path.unlink()
    return moments


def _windows(grid: Grid, settings: ExportSettings) -> list[Region]:
    return list(tile(grid.shape, -(-_WINDOW // settings.block) * settings.block))


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """GDAL's errors as Python's; then no file is left."""
    try:
        with rasterio.Env(GDAL_CACHEMAX=_CACHE, GDAL_NUM_THREADS="1"):
            yield
    except (RasterioError, CPLE_BaseError) as error:
        path.unlink(missing_ok=True)
        reason = error.__cause__ or error
        raise OSError(
            f"cannot write {path.name}: {reason}; is the disk of temporary files (TMPDIR) full?"
        ) from error


def _prove(path: Path, windows: Sequence[Region], sums: Sequence[int]) -> None:
    """Read all of a file back.

    Raises:
        RasterioError: it is cut off, or has other pixels than were written.
    """
    with rasterio.open(path) as found:
        levels = len(found.overviews(1))
        for window, wanted in zip(windows, sums, strict=True):
            if zlib.crc32(found.read(1, window=_place(window))) != wanted:
                raise RasterioIOError(f"the pixels of {window.name} are not those written")
    for level in range(levels):
        with rasterio.open(path, overview_level=level) as found:
            for window in tile(found.shape, _WINDOW):
                found.read(1, window=_place(window))


def _place(region: Region) -> Window:
    return Window(region.col, region.row, region.width, region.height)


def _cog_options(settings: ExportSettings) -> dict[str, Any]:
    return {
        "blocksize": settings.block,
        "compress": settings.compress,
        "predictor": "floating_point",
        "overview_resampling": "average",
        "overview_predictor": "floating_point",
        "bigtiff": "if_safer",
    }


def _write_plain(
    path: Path,
    grid: Grid,
    windows: Sequence[Region],
    read: Read,
    about: About,
    settings: ExportSettings,
    packed: Mapping[str, Any],
) -> tuple[Moments, list[int]]:
    """The file without overviews; its moments, and the CRC-32 of each window."""
    rows, cols = grid.shape
    moments, sums = Moments(), []
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=rows, width=cols, dtype="float32",
        crs=rasterio.CRS.from_wkt(about.crs.to_wkt()), transform=grid.transform, nodata=np.nan,
        tiled=True, blockxsize=settings.block, blockysize=settings.block, bigtiff="if_safer",
        **packed,
    ) as target:  # fmt: skip
        for window in windows:
            values = np.ascontiguousarray(read(window), dtype=np.float32)
            moments = moments.add(values)
            sums.append(zlib.crc32(values.data))
            target.write(values, 1, window=_place(window))
        target.update_tags(AREA_OR_POINT="Area", **about.tags)
        target.set_band_description(1, about.description)
        target.set_band_unit(1, about.unit)
        if moments.valid:
            told = {f"STATISTICS_{k.upper()}": repr(v) for k, v in moments.statistics.items()}
            target.update_tags(1, **told)
    return moments, sums


def overview(path: Path, shape: tuple[int, int]) -> Heights:
    """A file's band at another size, from its overviews, by average."""
    with rasterio.open(path) as source:
        values: Heights = source.read(1, out_shape=shape, resampling=Resampling.average)
    return values


def file_pieces(path: Path, size: int = 1 << 24) -> Iterator[bytes]:
    """A file of this machine from first to last byte, at most `size` at once."""
    with path.open("rb") as file:
        while piece := file.read(size):
            yield piece


def sha256(pieces: Iterator[bytes]) -> str:
    """SHA-256 (hexadecimal) of bytes that come in pieces."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()
