"""What a cube must hold, found without aeheight: by rasterio, PROJ, xarray and numpy."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import xarray as xr
from numpy.typing import NDArray
from pyproj import Transformer

from aeheight.embeddings import NODATA
from pipelines.world import World
from pipelines.world_files import bilinear
from pipelines.world_zones import MEETING, METRES_PER_DEGREE

ZONES = {"utm31n": ("EPSG:32631", "31N"), "utm32n": ("EPSG:32632", "32N")}
HALO = 1250.0
"""Metres past its zone's edge up to which a group must be filled (of 128 px of 10 m)."""


@dataclass(frozen=True)
class Finding:
    """A statement about a cube."""

    text: str
    """What was compared, and how far it is off."""
    holds: bool


@dataclass(frozen=True)
class Allowed:
    """How far heights may be off."""

    largest: float
    """Metres."""
    rms: float
    """Metres."""
    odd: int = 0
    """Pixels on the rim of a void that may be known here and not there."""


def equal(what: str, found: NDArray[np.int8], expected: NDArray[np.int8]) -> Finding:
    """Whether codes are the same, bit for bit; nodata too."""
    differ, known = int((found != expected).sum()), float((expected != NODATA).mean())
    text = f"{what}: {expected.size:,} codes, {100 * known:.1f} % valid, "
    text += f"{differ:,} differ" if differ else "bit for bit"
    return Finding(text, differ == 0 and known > 0)


def near(what: str, found: NDArray[Any], expected: NDArray[Any], allowed: Allowed) -> Finding:
    """Whether heights are known at the same pixels and differ by no more than some metres."""
    off, known = np.abs(found - expected), ~np.isnan(expected)
    odd = int((np.isnan(found) == known).sum())
    largest, rms = float(np.nanmax(off)), float(np.sqrt(np.nanmean(off**2)))
    text = (
        f"{what}: {int(known.sum()):,} pixels, off by {largest:.4f} m at most (of "
        f"{allowed.largest:g}), {rms:.4f} m RMS (of {allowed.rms:g})"
    )
    text += f", {odd} known in one only (of {allowed.odd})" if odd or allowed.odd else ""
    holds = largest <= allowed.largest and rms <= allowed.rms and odd <= allowed.odd
    return Finding(text, holds and bool(known.any()))


def pixels(values: NDArray[Any], y: NDArray[Any], x: NDArray[Any]) -> xr.DataArray:
    """(..., rows, columns) with its pixel centres."""
    dims = ["band", "y", "x"][-values.ndim :]
    return xr.DataArray(values, dims=dims, coords={"y": y, "x": x})


def raster(path: Path) -> xr.DataArray:
    """A file as rasterio reads it: a bottom-up one has y that rises."""
    with rasterio.open(path) as source:
        move, values = source.transform, source.read(masked=source.dtypes[0] == "float32")
        x = move.c + move.a * (np.arange(source.width) + 0.5)
        y = move.f + move.e * (np.arange(source.height) + 0.5)
    if values.dtype.kind == "f":
        return pixels(values.filled(np.nan)[0], y, x)
    return pixels(values, y, x)


def together(paths: Iterable[Path]) -> xr.DataArray:
    """Files that lie side by side, as one; north-up."""
    found = xr.combine_by_coords([raster(path) for path in paths])
    assert isinstance(found, xr.DataArray)
    return found.sortby("y", ascending=False)


def put(source: xr.DataArray, like: xr.DataArray) -> xr.DataArray:
    """Codes at the pixel centres of another array, nodata where they have none."""
    step = abs(float(like.x[1] - like.x[0]))
    return source.reindex(
        y=like.y, x=like.x, method="nearest", tolerance=step / 100, fill_value=NODATA
    )


def centres(
    group: xr.Dataset | xr.DataArray, source: str, target: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """X and y of pixel centres in another CRS, (rows, columns) each."""
    move = Transformer.from_crs(source, target, always_xy=True)
    x, y = move.transform(*np.meshgrid(group.x.to_numpy(), group.y.to_numpy()))
    return np.asarray(x), np.asarray(y)


def same_codes(source: Path, cube: xr.DataTree) -> Iterator[Finding]:
    """A cube of one group is what one file holds."""
    (group,) = cube.children.values()
    found = group.ds["embedding"].isel(time=0)
    expected = put(raster(source), found)
    yield equal(f"{group.name}, against the file", found.to_numpy(), expected.to_numpy())


def same_zones(world: World, cube: xr.DataTree) -> Iterator[Finding]:
    """Both groups hold their own tiles, and where these have none the other zone's pixels."""
    tiles = {
        name: together(world.embeddings.glob(f"2021/{zone}/*.tiff"))
        for name, (_, zone) in ZONES.items()
    }
    for name, other in (("utm31n", "utm32n"), ("utm32n", "utm31n")):
        crs = ZONES[name][0]
        found = cube[name].ds["embedding"].isel(time=0).load()
        own = put(tiles[name], found).to_numpy()
        across = _nearest(tiles[other], *centres(found, crs, ZONES[other][0]))
        expected = np.where(own == NODATA, across, own)
        past = _metres_past_its_edge(found, crs)
        for where, ground in (("zone", past < 0), ("halo", (past >= 0) & (past < HALO))):
            codes = found.to_numpy()[:, ground]
            yield equal(f"{name}, in its {where}", codes, expected[:, ground])


def _metres_past_its_edge(group: xr.DataArray, crs: str) -> NDArray[np.float64]:
    """How far pixels lie in the other zone; below 0 in their own."""
    lon, lat = centres(group, crs, "EPSG:4326")
    east = (lon - MEETING) * METRES_PER_DEGREE * np.cos(np.radians(lat))
    return east if crs == ZONES["utm31n"][0] else -east


def _nearest(source: xr.DataArray, x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.int8]:
    """Codes of the pixels that hold some places, (64, rows, columns); nodata outside."""
    there = {axis: xr.DataArray(at, dims=["y", "x"]) for axis, at in (("x", x), ("y", y))}
    found = source.sel(there, method="nearest")
    held = (abs(found.x - there["x"]) <= 5) & (abs(found.y - there["y"]) <= 5)
    codes: NDArray[np.int8] = found.where(held, NODATA).to_numpy()
    return codes


def same_heights(world: World, cube: xr.DataTree) -> Iterator[Finding]:
    """In both groups: the DSM's mean over a pixel, and the prior between its pixels.

    The mean is that of 16 x 16 places: exact in the zone of the DSM, whose pixels are quarters of
    the cube's. Every eighth pixel is looked at.
    """
    dsm, prior = together(world.height.parent.rglob("*.tif")), raster(world.prior)
    for name, (crs, _) in ZONES.items():
        group = cube[name].ds.isel(y=slice(4, None, 8), x=slice(4, None, 8))
        exact = Allowed(0.001, 0.001)
        allowed = exact if crs == world.crs else Allowed(1, 0.1, odd=4)
        mean = _mean_within(dsm, world.crs, group, crs)
        yield near(f"{name}, height", group["height"].to_numpy(), mean, allowed)
        between = _between(prior, *centres(group, crs, "EPSG:4326"))
        yield near(f"{name}, prior", group["prior"].to_numpy(), between, exact)


def _between(prior: xr.DataArray, lon: NDArray[Any], lat: NDArray[Any]) -> NDArray[Any]:
    """Bilinear between pixel centres; NaN outside."""
    step, (rows, columns) = float(prior.x[1] - prior.x[0]), prior.shape
    row = (float(prior.y[0]) - lat) / step + 0.5
    column = (lon - float(prior.x[0])) / step + 0.5
    inside = (row > 0) & (row < rows) & (column > 0) & (column < columns)
    return np.where(inside, bilinear(prior.to_numpy(), row, column), np.nan)


def _mean_within(dsm: xr.DataArray, source: str, group: xr.Dataset, crs: str) -> NDArray[Any]:
    """The mean of what lies under 16 x 16 places of every pixel of 10 m."""
    places = [(n - 7.5) / 16 * 10 for n in range(16)]
    x = (group.x.to_numpy()[:, None] + places).ravel()
    y = (group.y.to_numpy()[:, None] - places).ravel()
    fine = xr.Dataset(coords={"y": y, "x": x})
    east, north = centres(fine, crs, source)
    row = np.floor((float(dsm.y[0]) - north) / 5 + 0.5).astype(int)
    column = np.floor((east - float(dsm.x[0])) / 5 + 0.5).astype(int)
    rows, columns = dsm.shape
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    under = np.full(row.shape, np.nan)
    under[inside] = dsm.to_numpy()[row[inside], column[inside]]
    parts = under.reshape(group.sizes["y"], 16, group.sizes["x"], 16)
    known = (~np.isnan(parts)).sum(axis=(1, 3))
    mean = np.nansum(parts, axis=(1, 3)) / np.maximum(known, 1)
    return np.where(known > 0, mean, np.nan)
