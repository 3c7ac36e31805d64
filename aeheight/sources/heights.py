"""Height models on any region of a grid: a finer source is averaged, a coarser one interpolated.

Rasters go through rasterio's warper, STAC items through stackstac; both mask nodata, so that a
missing neighbour takes no part in a mean or an interpolation. Missing heights are NaN.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import stackstac
import xarray as xr
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from aeheight.errors import InputError
from aeheight.grid import Grid, crs_name, reproject_bounds
from aeheight.settings import Bounds, HeightSettings, RegionSettings
from aeheight.sources.files import find_files, geometry_problem, opened
from aeheight.windows import Region, tile

_LOWEST, _HIGHEST = -1000.0, 9000.0
"""Metres: no surface of the Earth lies outside; what does is a missing-value nobody declared."""


_TOLERANCE = 1e-6
"""Source pixels: an exact transform (0 is refused)."""

_CELL = 256
"""Pixels: heights are warped on whole squares of the grid, so that they do not depend on the cut.

GDAL takes the scale from a target's shape, and is wrong by metres on one of a few pixels.
"""


_NO_STAC = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    pystac.STACError,
    pystac.STACTypeError,
)
"""What pystac raises for text that is no STAC."""


@dataclass(frozen=True, slots=True)
class Raster:
    """One single-band raster, or the asset of one STAC item."""

    href: str
    crs: str
    bounds: Bounds
    """In its own CRS."""
    resolution: float
    """Edge of a pixel in units of its own CRS (the larger one)."""
    nodata: float | None
    """What a missing pixel holds; None: NaN."""
    item: dict[str, Any] | None = None
    """What stackstac needs of a STAC item: `id`, `properties.datetime` and the one asset."""


@dataclass(frozen=True, slots=True)
class HeightSource:
    """Every raster of one height model that touches the grid."""

    rasters: tuple[Raster, ...]
    """In order of precedence: where two overlap, the first valid pixel counts."""


def scan_heights(
    settings: RegionSettings, wanted: HeightSettings, grid: Grid, key: str
) -> HeightSource:
    """The rasters of a height model that touch the grid, from headers alone.

    Raises:
        InputError: see `sources.scan`.
    """
    scan = _scan_stac if wanted.source == "stac" else _scan_rasters
    rasters = scan(settings, wanted, key)
    touching = tuple(raster for raster in rasters if touches(raster, grid))
    if not touching:
        raise InputError(
            f"{key}: none of its {len(rasters)} rasters touches the grid {list(grid.bounds)} "
            f"({grid.crs}); the first covers {list(rasters[0].bounds)} ({rasters[0].crs}): "
            "embeddings and heights must share ground"
        )
    return HeightSource(touching)


def touches(raster: Raster, grid: Grid) -> bool:
    """Whether the bounds meet, in the raster's CRS: the raster may be the whole world's."""
    try:
        west, south, east, north = reproject_bounds(grid.bounds, grid.crs, raster.crs)
    except InputError:
        return False
    w, s, e, n = raster.bounds
    across = [(west, east)] if west <= east else [(west, 180.0), (-180.0, east)]
    return south < n and s < north and any(left < e and w < right for left, right in across)


def _scan_rasters(settings: RegionSettings, wanted: HeightSettings, key: str) -> list[Raster]:
    return [_header(href, wanted.nodata, key) for href in find_files(settings, wanted.href, key)]


def _header(href: str, nodata: float | None, key: str) -> Raster:
    with opened(href) as dataset:
        if problem := _problem(dataset):
            raise InputError(f"{key}: {href}: {problem}")
        transform, (west, one, east, other) = dataset.transform, dataset.bounds
        declared = dataset.nodata if dataset.nodata is not None else nodata
        if nodata is not None and declared != nodata:
            raise InputError(
                f"{key}: {href} declares {declared:g} as its missing-value, `nodata` says "
                f"{nodata:g}; leave `nodata` out, or mend the file (gdal_edit.py -a_nodata)"
            )
        return Raster(
            href,
            crs_name(dataset.crs),
            (west, min(one, other), east, max(one, other)),
            max(abs(transform.a), abs(transform.e)),
            None if declared is None or np.isnan(declared) else declared,
        )


def _problem(dataset: Any) -> str | None:
    if dataset.count != 1:
        return f"it has {dataset.count} bands; a height model has one"
    scale, offset = dataset.scales[0], dataset.offsets[0]
    if (scale, offset) != (1, 0):
        return (
            f"its values are to be scaled ({scale:g}) and shifted ({offset:g}); write plain "
            "metres first, for example with gdal_translate -unscale -ot Float32"
        )
    return geometry_problem(dataset)


def _scan_stac(settings: RegionSettings, wanted: HeightSettings, key: str) -> list[Raster]:
    hrefs = [wanted.href] if isinstance(wanted.href, str) else wanted.href
    items = [item for href in hrefs for item in _items(settings.resolve(href), key)]
    if not items:
        raise InputError(f"{key}.href: {wanted.href!r} holds no STAC item")
    rasters = []
    for item in items:
        if wanted.asset not in item.assets:
            raise InputError(
                f"{key}: STAC item {item.id} has no asset {wanted.asset!r}; it has "
                f"{sorted(item.assets)}: name one in {key}.asset"
            )
        item.make_asset_hrefs_absolute()
        rasters.append(_item_raster(item, wanted, key))
    return rasters


def _items(href: str, key: str) -> list[pystac.Item]:
    try:
        text = pystac.StacIO.default().read_text(href)
        described = json.loads(text)
        if described.get("type") == "FeatureCollection":
            items = [pystac.Item.from_dict(feature) for feature in described["features"]]
            for item in items:
                if item.get_self_href() is None:
                    item.set_self_href(href)
            return items
        opened_object = pystac.read_file(href)
        if isinstance(opened_object, pystac.Item):
            return [opened_object]
        assert isinstance(opened_object, pystac.Catalog)
        return list(opened_object.get_items(recursive=True))
    except _NO_STAC as error:
        raise InputError(
            f"{key}.href: {href} cannot be read as STAC ({error}); give a catalogue, collection, "
            "item or item collection, or use source: raster"
        ) from error


def _item_raster(item: pystac.Item, wanted: HeightSettings, key: str) -> Raster:
    """From the item alone where it has the projection extension, else from the file's header."""
    asset = item.assets[wanted.asset]
    if "://" not in asset.href and not Path(asset.href).exists():
        raise InputError(
            f"{key}: asset {wanted.asset!r} of STAC item {item.id} is missing at {asset.href}"
        )
    about = item.properties | asset.extra_fields
    code = about.get("proj:code") or (about.get("proj:epsg") and f"EPSG:{about['proj:epsg']}")
    transform, shape = about.get("proj:transform"), about.get("proj:shape")
    when = item.to_dict(include_self_link=False, transform_hrefs=False)["properties"]["datetime"]
    plain = {
        "id": item.id,
        "properties": {"datetime": when},
        "assets": {wanted.asset: {"href": asset.href}},
    }
    if not (code and transform and shape):
        header = _header(asset.href, wanted.nodata, key)
        return Raster(
            header.href, header.crs, header.bounds, header.resolution, header.nodata, plain
        )
    dx, _, left, _, dy, top = transform[:6]
    bottom, right = top + dy * shape[0], left + dx * shape[1]
    bounds = (left, min(top, bottom), right, max(top, bottom))
    return Raster(asset.href, crs_name(code), bounds, max(abs(dx), abs(dy)), wanted.nodata, plain)


def read_heights(source: HeightSource, grid: Grid, region: Region) -> NDArray[np.float32]:
    """Heights of a region: (rows, columns) float32 metres, NaN where there is none.

    Args:
        source: from `scan_heights`.
        grid: the whole grid.
        region: pixels of it.

    Raises:
        OSError: a file breaks off.
        InputError: a height that no ground on Earth has.
    """
    out = np.full(region.shape, np.nan, dtype=np.float32)
    cover = _cover(region)
    for raster in source.rasters:
        if touches(raster, grid.part(region)) and np.isnan(out).any():
            how = _resampling(raster, grid)
            # stackstac knows a CRS by its EPSG code only.
            by_stac = raster.item is not None and grid.crs.startswith("EPSG:")
            values = (_stack if by_stac else _warp)(raster, grid, cover, how)
            values = _plausible(values[region.within(cover).slices], raster.href)
            np.copyto(out, values, where=np.isnan(out))
    return out


def _cover(region: Region) -> Region:
    """The whole cells that hold a region."""
    row, col = region.row // _CELL * _CELL, region.col // _CELL * _CELL
    height, width = region.bottom - row, region.right - col
    return Region(row, col, -(-height // _CELL) * _CELL, -(-width // _CELL) * _CELL)


def _plausible(values: NDArray[np.float32], href: str) -> NDArray[np.float32]:
    strange = values[(values < _LOWEST) | (values > _HIGHEST)]
    if strange.size:
        raise InputError(
            f"{href}: {strange.size} heights like {strange[0]:g} m lie outside "
            f"{_LOWEST:g} to {_HIGHEST:g} m; if that is a missing-value that the file does not "
            "declare, name it in `nodata`"
        )
    return values


def _resampling(raster: Raster, grid: Grid) -> Resampling:
    """Average a finer source, interpolate a coarser one; the same lattice is copied.

    Asked of the whole grid, so that it does not depend on the cut.
    """
    west, south, east, north = grid.bounds
    x, y, step = (west + east) / 2, (south + north) / 2, grid.resolution
    xs, ys = Transformer.from_crs(grid.crs, raster.crs, always_xy=True).transform(
        [x, x + step, x], [y, y, y + step]
    )
    pixel = min(np.hypot(xs[1] - xs[0], ys[1] - ys[0]), np.hypot(xs[2] - xs[0], ys[2] - ys[0]))
    ratio = raster.resolution / pixel
    if ratio < 0.999:
        return Resampling.average
    row, col = grid.offset(raster.bounds[0], raster.bounds[3])
    aligned = abs(row - round(row)) < 1e-6 and abs(col - round(col)) < 1e-6
    if raster.crs == grid.crs and ratio < 1.001 and aligned:
        return Resampling.nearest
    return Resampling.bilinear


def _warp(raster: Raster, grid: Grid, cover: Region, how: Resampling) -> NDArray[np.float32]:
    """Whole cells of a grid, each warped on its own."""
    out = np.empty(cover.shape, dtype=np.float32)
    with opened(raster.href) as dataset:
        if problem := _problem(dataset):
            raise InputError(f"{raster.href}: {problem}")
        missing = dataset.nodata if dataset.nodata is not None else raster.nodata
        for cell in tile(cover.shape, _CELL):
            place = Region(cover.row + cell.row, cover.col + cell.col, *cell.shape)
            target = grid.part(place)
            out[cell.slices] = _warp_cell(dataset, target, how, missing)
            if missing is None and how is Resampling.average:
                # One missing-value among many heights gives a mean that looks like a height.
                for extreme in (Resampling.min, Resampling.max):
                    _plausible(_warp_cell(dataset, target, extreme, missing), raster.href)
    return out


def _warp_cell(
    dataset: Any, target: Grid, how: Resampling, missing: float | None
) -> NDArray[np.float32]:
    with WarpedVRT(
        dataset,
        crs=target.crs,
        transform=target.transform,
        height=target.shape[0],
        width=target.shape[1],
        src_nodata=np.nan if missing is None else missing,
        nodata=np.nan,
        dtype="float32",
        resampling=how,
        tolerance=_TOLERANCE,
    ) as warped:
        values: NDArray[np.float32] = warped.read(1)
        return values


def _stack(raster: Raster, grid: Grid, cover: Region, how: Resampling) -> NDArray[np.float32]:
    """The same by stackstac: a chunk is a cell."""
    assert raster.item is not None
    target, epsg = grid.part(cover), int(grid.crs.removeprefix("EPSG:"))
    # What does not touch is left out already: stackstac need not guess where the asset lies.
    place = {"proj:epsg": epsg, "proj:bbox": list(target.bounds)}
    stack: xr.DataArray = stackstac.stack(
        [raster.item | {"properties": raster.item["properties"] | place}],
        assets=list(raster.item["assets"]),
        epsg=epsg,
        resolution=target.resolution,
        bounds=target.bounds,
        snap_bounds=False,
        xy_coords="center",
        resampling=how,
        dtype=np.dtype("float32"),
        fill_value=np.float32(np.nan),
        rescale=False,
        sortby_date=False,
        properties=False,
        band_coords=False,
        chunksize=_CELL,
        reader=partial(_Reader, raster, grid, cover, how),
    )
    values: NDArray[np.float32] = (
        stack.isel(time=0, band=0).compute(scheduler="synchronous").to_numpy()
    )
    if values.shape != cover.shape:
        raise AssertionError(f"stackstac gave {values.shape} for {cover.shape}")
    return values


class _Reader:
    """How stackstac reads an asset: by the same warp as any raster.

    Its own reader is up to an eighth of a source pixel off, resamples before a missing-value can be
    named, and takes a file that is gone (404) for one without a height.
    """

    def __init__(
        self, raster: Raster, grid: Grid, cover: Region, how: Resampling, **_plan: Any
    ) -> None:
        self._asset = raster, grid
        self._cover, self._how = cover, how

    def read(self, window: Window) -> NDArray[np.float32]:
        """A chunk; `window` counts from the stack's corner."""
        row, col = self._cover.row + int(window.row_off), self._cover.col + int(window.col_off)
        cell = Region(row, col, int(window.height), int(window.width))
        return _warp(*self._asset, cell, self._how)
