"""Real files made at run time: AlphaEarth tiles, height rasters, region settings."""

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray

from aeheight.embeddings import BANDS, NODATA
from aeheight.grid import Grid
from aeheight.settings import HeightSettings, RegionSettings
from aeheight.sources.heights import HeightSource, read_heights, scan_heights
from aeheight.windows import whole

LEFT, TOP, STEP = 403200.0, 4279500.0, 10.0
CRS = "EPSG:32610"
DATA = Path(__file__).parents[2] / "shared" / "data"
"""Real data beside the project, where it is there."""


def random_codes(
    rng: np.random.Generator, rows: int, cols: int, holes: float = 0.1
) -> NDArray[Any]:
    """(64, rows, cols) codes with whole pixels of nodata."""
    codes = rng.integers(-127, 128, (BANDS, rows, cols)).astype(np.int8)
    codes[:, rng.random((rows, cols)) < holes] = NODATA
    return codes


def write_tif(
    path: Path,
    values: NDArray[Any],
    transform: Affine,
    crs: str | None = CRS,
    nodata: float | None = None,
    **options: Any,
) -> Path:
    """A GeoTIFF of (bands, rows, columns) or (rows, columns) as they are."""
    bands = values if values.ndim == 3 else values[None]
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = bands.shape
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=values.dtype,
        crs=crs, transform=transform, nodata=nodata, **options,
    ) as target:  # fmt: skip
        target.write(bands)
    return path


def write_tile(
    path: Path,
    codes: NDArray[Any],
    row: int = 0,
    col: int = 0,
    *,
    bottom_up: bool = True,
    nodata: float | None = NODATA,
    crs: str | None = CRS,
) -> Path:
    """A tile in the real layout (planar, blocks, ZSTD), its corner counted from (LEFT, TOP)."""
    left, top = LEFT + col * STEP, TOP - row * STEP
    if bottom_up:
        codes = codes[:, ::-1]
        transform = Affine(STEP, 0, left, 0, STEP, top - codes.shape[1] * STEP)
    else:
        transform = Affine(STEP, 0, left, 0, -STEP, top)
    return write_tif(
        path, codes, transform, crs, nodata,
        tiled=True, blockxsize=16, blockysize=16, interleave="band", compress="zstd", zstd_level=1,
    )  # fmt: skip


def write_heights(
    path: Path,
    heights: NDArray[Any],
    left: float = LEFT,
    top: float = TOP,
    step: float = STEP,
    nodata: float | None = -9999.0,
    crs: str | None = CRS,
) -> Path:
    """A north-up height raster; NaN is written as `nodata` where there is one."""
    if nodata is not None and heights.dtype.kind == "f":
        heights = np.where(np.isnan(heights), heights.dtype.type(nodata), heights)
    return write_tif(path, heights, Affine(step, 0, left, 0, -step, top), crs, nodata)


def grid_of(rows: int, cols: int, row: int = 0, col: int = 0) -> Grid:
    """Pixels of the lattice of (LEFT, TOP)."""
    return Grid(CRS, STEP, LEFT + col * STEP, TOP - row * STEP, (rows, cols))


def height_settings(href: Any, source: str = "raster", **more: Any) -> dict[str, Any]:
    """The `height` or `prior` of a region file."""
    href = [str(one) for one in href] if isinstance(href, list) else str(href)
    return {
        "source": source, "href": href, "surface": "dsm", "vertical_datum": "EPSG:5773", **more
    }  # fmt: skip


def region(tiles: Any, grid: Grid | None = None, year: Any = 2021, **more: Any) -> RegionSettings:
    """A region file's settings."""
    href = [str(one) for one in tiles] if isinstance(tiles, list) else str(tiles)
    bounds = grid and {"crs": grid.crs, "resolution": grid.resolution, "bounds": grid.bounds}
    embeddings = {"source": "cog", "href": href, "year": year}
    return RegionSettings.model_validate(
        {"name": "t", "store": "runs/t", "grid": bounds, "embeddings": embeddings} | more
    )


RNG = np.random.default_rng(5)
GRID = grid_of(30, 36)


def terrain(rows: int, cols: int, holes: float = 0.0) -> NDArray[np.float32]:
    """Rough heights from 50 to 400 m; NaN in holes."""
    values = RNG.uniform(50, 400, (rows, cols)).astype(np.float32)
    values[RNG.random((rows, cols)) < holes] = np.nan
    return values


def source_of(href: Any, grid: Grid = GRID, **more: Any) -> HeightSource:
    """The plan of a height model."""
    wanted = HeightSettings.model_validate(height_settings(href, **more))
    return scan_heights(region("unused.tiff"), wanted, [grid], "height")


def read(href: Any, grid: Grid = GRID, **more: Any) -> NDArray[Any]:
    """The heights of a whole grid."""
    return read_heights(source_of(href, grid, **more), grid, whole(grid.shape))


def block_mean(values: NDArray[Any], edge: int) -> NDArray[Any]:
    """Mean of the valid values of every block, NaN where there are none."""
    rows, cols = values.shape[0] // edge, values.shape[1] // edge
    blocks = values[: rows * edge, : cols * edge].reshape(rows, edge, cols, edge)
    count = np.isfinite(blocks).sum(axis=(1, 3))
    total = np.nansum(blocks, axis=(1, 3), dtype=np.float64)
    return np.where(count, total / np.maximum(count, 1), np.nan)
