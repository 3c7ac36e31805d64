"""Sources of every kind, written as their makers write them: exports, an index, a mosaic, items."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
import zarr
from affine import Affine
from numpy.typing import NDArray
from rasterio.windows import from_bounds

from aeheight.embeddings import BAND_NAMES, BANDS, NODATA
from aeheight.grid import Bounds, reproject_bounds

SIDES = ("west", "south", "east", "north")
APART = 10_000.0
"""Metres between the tiles that an index lists beside those that are there."""
MOSAIC_PIXEL = 8.983111749910169e-05
"""Degrees: the edge of a pixel of the global mosaic."""


def write_exports(source: Path, folder: Path, files: Sequence[Sequence[int]]) -> None:
    """The values of a tile as Earth Engine exports them: float64, NaN where there are none.

    Args:
        source: AlphaEarth codes, north-up.
        folder: Where the files go.
        files: The bands of each.
    """
    with rasterio.open(source) as exact:
        codes, profile = exact.read(), exact.profile
    unit = codes / 127.5
    values = np.where(codes == NODATA, np.nan, np.sign(unit) * unit**2)
    profile |= {"dtype": "float64", "nodata": None, "compress": "lzw", "interleave": "pixel"}
    for bands in files:
        name = "aef.tif" if len(bands) == BANDS else f"aef.{BAND_NAMES[bands[0]]}.tif"
        with rasterio.open(folder / name, "w", **profile | {"count": len(bands)}) as export:
            export.write(values[list(bands)])
            export.descriptions = [BAND_NAMES[band] for band in bands]


def write_index(path: Path, tiles: Path, folder: str, elsewhere: int) -> None:
    """An index (Parquet) of tiles, and of others north of them of which there is no file.

    Args:
        path: The index.
        tiles: Where the tiles are now, `{year}/{zone}/NAME.tiff` below it.
        folder: Where the index says that they are, from its own folder.
        elsewhere: How many times as many others it lists.
    """
    rows = []
    for tile in sorted(tiles.rglob("*.tiff")):
        name = f"{folder}/{tile.relative_to(tiles).as_posix()}"
        with rasterio.open(tile) as header:
            crs, (west, one, east, other) = header.crs.to_string(), header.bounds
        box = west, min(one, other), east, max(one, other)  # rasterio turns bottom-up ones over
        rows.append(_row(tile, name, crs, box))
        for number in range(1, elsewhere + 1):
            west, south, east, north = box
            moved = west, south + APART * number, east, north + APART * number
            rows.append(_row(tile, f"nowhere/{number}/{name}", crs, moved))
    pq.write_table(pa.Table.from_pylist(rows), path)


def _row(tile: Path, name: str, crs: str, box: Bounds) -> dict[str, Any]:
    degrees = reproject_bounds(box, crs, "EPSG:4326")
    return {
        "path": name,
        "year": int(tile.parent.parent.name),
        "crs": crs,
        "utm_zone": tile.parent.name,
        **{f"utm_{side}": edge for side, edge in zip(SIDES, box, strict=True)},
        **{f"wgs84_{side}": edge for side, edge in zip(SIDES, degrees, strict=True)},
    }


def write_mosaic(
    path: Path, codes: NDArray[np.int8], years: Sequence[int], corner: tuple[float, float]
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """A Zarr in degrees, as the global mosaic is one.

    Args:
        path: The Zarr group.
        codes: (years, 64, rows, columns), north-up.
        years: Of the first axis.
        corner: Longitude and latitude of the north-western corner.

    Returns:
        Latitudes (rows,) and longitudes (columns,) of the pixel centres.
    """
    x = corner[0] + (np.arange(codes.shape[3]) + 0.5) * MOSAIC_PIXEL
    y = corner[1] - (np.arange(codes.shape[2]) + 0.5) * MOSAIC_PIXEL
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.attrs["proj:code"] = "EPSG:4326"
    for name, values in (("time", np.asarray(years)), ("y", y), ("x", x)):
        group.create_array(name, data=values, dimension_names=[name])
    group.create_array(
        "embeddings",
        data=codes,
        shards=(1, BANDS, 128, 128),
        chunks=(1, BANDS, 64, 64),
        fill_value=NODATA,
        dimension_names=["time", "band", "y", "x"],
    )
    return y, x


def write_item(
    source: Path,
    folder: Path,
    ground: Bounds,
    heights: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
) -> str:
    """A copy of a STAC item whose file lies beside it, on the pixels that the item promises.

    Args:
        source: The item, of an asset `data` in degrees.
        folder: Where copy and file go.
        ground: Degrees. Only pixels in it (and about it) get a height: the file stays small.
        heights: Longitude and latitude to metres.

    Returns:
        The name of the copy.
    """
    item = json.loads(source.read_text(encoding="utf-8"))
    about, asset = item["properties"], item["assets"]["data"]
    transform, (rows, columns) = Affine(*about["proj:transform"][:6]), about["proj:shape"]
    west, south, east, north = ground
    near = from_bounds(west - 0.01, south - 0.01, east + 0.01, north + 0.01, transform)
    near = near.round_offsets().round_lengths()
    row, column = np.indices((near.height, near.width))
    lon = transform.c + (near.col_off + column + 0.5) * transform.a
    lat = transform.f + (near.row_off + row + 0.5) * transform.e
    with rasterio.open(
        folder / f"{item['id']}.tif",
        "w",
        driver="GTiff",
        count=1,
        height=rows,
        width=columns,
        dtype="float32",
        crs=f"EPSG:{about['proj:epsg']}",
        transform=transform,
        nodata=asset["raster:bands"][0].get("nodata"),
        sparse_ok=True,
        tiled=True,
        compress="deflate",
    ) as file:
        file.write(heights(lon, lat).astype(np.float32), 1, window=near)
    asset["href"] = f"./{item['id']}.tif"
    name = f"{item['id']}.json"
    (folder / name).write_text(json.dumps(item | {"links": []}, indent=1))
    return name
