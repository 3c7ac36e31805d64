"""The demo world's files, in the formats that real data has.

AlphaEarth tiles (int8, planar, ZSTD, bottom-up), a DSM as COGs with a STAC catalogue, and a
coarse DEM in degrees like Copernicus GLO-30.
"""

from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import rasterio
import rasterio.shutil
from affine import Affine
from numpy.typing import NDArray
from pyproj import Transformer
from pystac.extensions.projection import ProjectionExtension
from rasterio.enums import Resampling
from rasterio.io import MemoryFile
from rasterio.warp import transform_bounds

from aeheight.embeddings import BANDS, NODATA

TILE_STEM = "xdemo7k2w9r4hq0zb"
TILE_PIXEL = 10.0
TILE_BLOCK = 256
DSM_PIXEL = 5.0
DSM_NODATA = -9999.0
DSM_COLLECTION = "demo-dsm"
DSM_DATE = datetime(2021, 6, 15, tzinfo=UTC)
ARC_SECOND = 1 / 3600

Corner = tuple[float, float]
"""West and north edge, metres."""


def write_tiles(
    folder: Path, codes: NDArray[np.int8], corner: Corner, crs: str, year: int
) -> list[Path]:
    """Write embeddings as AlphaEarth tiles, `{year}/{zone}/STEM-ROW-COLUMN.tiff`.

    As the real ones, they are planar, bottom-up (row 0 is the southernmost) and carry overviews.
    GDAL 3.10's COG driver can do neither planar nor bottom-up, so the order of a COG comes from
    copying a dataset that has overviews already.

    Args:
        folder: Where the years lie.
        codes: (64, rows, columns), north up.
        corner: North-west corner of `codes`, metres.
        crs: A UTM zone, EPSG:326xx or EPSG:327xx.
        year: The year in the path.

    Returns:
        The files.
    """
    zone = f"{crs[-2:]}{'N' if crs.startswith('EPSG:326') else 'S'}"
    target = folder / str(year) / zone
    target.mkdir(parents=True)
    paths = []
    rows, columns = codes.shape[1:]
    # Shares that put no edge on a multiple of the block or of a shard.
    for top, bottom in pairwise((0, _cut(rows, 0.58), rows)):
        for left, right in pairwise((0, _cut(columns, 0.43), columns)):
            west, south = corner[0] + left * TILE_PIXEL, corner[1] - bottom * TILE_PIXEL
            transform = Affine(TILE_PIXEL, 0, west, 0, TILE_PIXEL, south)
            path = target / f"{TILE_STEM}-{top:010d}-{left:010d}.tiff"
            _write_tile(path, codes[:, top:bottom, left:right][:, ::-1], crs, transform)
            paths.append(path)
    return paths


def _cut(length: int, share: float) -> int:
    cut = round(length * share)
    return cut if cut % TILE_BLOCK else cut + 7


def _write_tile(path: Path, codes: NDArray[np.int8], crs: str, transform: Affine) -> None:
    shape = {"count": BANDS, "height": codes.shape[1], "width": codes.shape[2], "dtype": "int8"}
    layout = {
        "driver": "GTiff",
        "tiled": True,
        "blockxsize": TILE_BLOCK,
        "blockysize": TILE_BLOCK,
        "interleave": "band",
    }
    with MemoryFile() as memory:
        with memory.open(**shape, **layout, crs=crs, transform=transform, nodata=NODATA) as draft:
            draft.write(codes)
            draft.build_overviews([2, 4, 8], Resampling.nearest)
        with memory.open() as draft:
            options = layout | {"compress": "zstd", "zstd_level": 1, "num_threads": 2}
            rasterio.shutil.copy(draft, path, copy_src_overviews=True, **options)


def write_dsm(folder: Path, heights: NDArray[np.float32], corner: Corner, crs: str) -> Path:
    """Write a DSM as four COGs with a static STAC catalogue of relative links.

    Args:
        folder: Where catalog.json goes.
        heights: (rows, columns) of 5 m, metres; NaN is a void.
        corner: North-west corner, metres.
        crs: EPSG:code.

    Returns:
        The catalogue.
    """
    catalog = pystac.Catalog("demo-world", "The made-up world of the aeheight demo.")
    items = []
    rows, columns = heights.shape
    for top, bottom in pairwise((0, _cut(rows, 0.47), rows)):
        for left, right in pairwise((0, _cut(columns, 0.55), columns)):
            west, north = corner[0] + left * DSM_PIXEL, corner[1] - top * DSM_PIXEL
            transform = Affine(DSM_PIXEL, 0, west, 0, -DSM_PIXEL, north)
            name = f"dsm-{top:05d}-{left:05d}"
            part = heights[top:bottom, left:right]
            path = folder / DSM_COLLECTION / name / f"{name}.tif"
            _write_cog(path, part, crs, transform, DSM_NODATA)
            items.append(_dsm_item(name, path, crs, part.shape, transform))
    collection = pystac.Collection(
        DSM_COLLECTION,
        "Surface heights (terrain, trees, buildings), 5 m.",
        pystac.Extent.from_items(items),
    )
    catalog.add_child(collection)
    collection.add_items(items)
    catalog.normalize_hrefs(str(folder))
    for item in items:
        item.make_asset_hrefs_relative()
    catalog.save(pystac.CatalogType.SELF_CONTAINED)
    return folder / "catalog.json"


def _write_cog(
    path: Path, values: NDArray[np.float32], crs: str, transform: Affine, nodata: float | None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = values.shape
    filled = values if nodata is None else np.where(np.isnan(values), np.float32(nodata), values)
    with rasterio.open(
        path,
        "w",
        driver="COG",
        count=1,
        height=rows,
        width=columns,
        dtype="float32",
        crs=crs,
        transform=transform,
        nodata=nodata,
        blocksize=256,
        compress="deflate",
        level=1,
        predictor="yes",
        overview_resampling="average",
    ) as target:
        target.write(filled, 1)


def _dsm_item(
    name: str, path: Path, crs: str, shape: tuple[int, ...], transform: Affine
) -> pystac.Item:
    west, north = transform.c, transform.f
    box = [west, north + shape[0] * transform.e, west + shape[1] * transform.a, north]
    degrees = transform_bounds(crs, "EPSG:4326", *box)
    item = pystac.Item(name, _rectangle(degrees), list(degrees), DSM_DATE, {"gsd": DSM_PIXEL})
    projection = ProjectionExtension.ext(item, add_if_missing=True)
    projection.apply(code=crs, bbox=box, shape=list(shape), transform=list(transform)[:6])
    asset = pystac.Asset(str(path), media_type=pystac.MediaType.COG, roles=["data"])
    item.add_asset("data", asset)
    return item


def _rectangle(bounds: tuple[float, float, float, float]) -> dict[str, Any]:
    west, south, east, north = bounds
    ring = [(west, south), (east, south), (east, north), (west, north), (west, south)]
    return {"type": "Polygon", "coordinates": [ring]}


def write_prior(
    path: Path,
    heights: NDArray[np.float32],
    corner: Corner,
    crs: str,
    rng: np.random.Generator,
) -> Path:
    """Write a coarse DEM on pixels of one arc-second, like Copernicus GLO-30.

    It has the sampled heights, noise of SD 2.5 m that spans some pixels, and white noise of 1 m.

    Args:
        path: The GeoTIFF to write.
        heights: (rows, columns) of 10 m, metres, already smoothed to the coarse pixel.
        corner: North-west corner of `heights`, metres.
        crs: Its EPSG:code.
        rng: What the noise is drawn from.

    Returns:
        `path`.
    """
    rows, columns = heights.shape
    box = corner[0], corner[1] - rows * TILE_PIXEL, corner[0] + columns * TILE_PIXEL, corner[1]
    west, south, east, north = transform_bounds(crs, "EPSG:4326", *box)
    left, top = np.floor(west * 3600) - 5, np.ceil(north * 3600) + 5
    width, height = int(np.ceil(east * 3600) + 5 - left), int(top - np.floor(south * 3600) + 5)
    lon = (left + np.arange(width) + 0.5) * ARC_SECOND
    lat = (top - np.arange(height) - 0.5) * ARC_SECOND
    x, y = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(*np.meshgrid(lon, lat))
    sampled = bilinear(heights, (corner[1] - y) / TILE_PIXEL, (x - corner[0]) / TILE_PIXEL)
    coarse = rng.normal(size=(height // 4 + 2, width // 4 + 2))
    spread = bilinear(coarse, np.arange(height)[:, None] / 4 + 1, np.arange(width) / 4 + 1)
    noisy = sampled + 2.5 * spread / spread.std() + rng.normal(size=sampled.shape)
    transform = Affine(ARC_SECOND, 0, left * ARC_SECOND, 0, -ARC_SECOND, top * ARC_SECOND)
    _write_cog(path, noisy.astype(np.float32), "EPSG:4326", transform, None)
    return path


def bilinear(
    field: NDArray[np.floating], rows: NDArray[np.floating], columns: NDArray[np.floating]
) -> NDArray[np.floating]:
    """Sample at pixel coordinates (0.5 is the first centre); the rim is repeated outwards."""
    height, width = field.shape
    row, column = np.clip(rows - 0.5, 0, height - 1), np.clip(columns - 0.5, 0, width - 1)
    i = np.minimum(row.astype(int), height - 2)
    j = np.minimum(column.astype(int), width - 2)
    a, b = row - i, column - j
    upper = (1 - b) * field[i, j] + b * field[i, j + 1]
    lower = (1 - b) * field[i + 1, j] + b * field[i + 1, j + 1]
    return np.asarray((1 - a) * upper + a * lower)
