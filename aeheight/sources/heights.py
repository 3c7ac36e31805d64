"""Height models on any region of a grid: a finer source is averaged, a coarser one interpolated.

Rasters go through rasterio's warper, STAC items through stackstac; both mask nodata, so that a
missing neighbour takes no part in a mean or an interpolation. Missing heights are NaN.
"""

import json
from dataclasses import dataclass
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

from aeheight.errors import InputError
from aeheight.grid import Grid, crs_name, reproject_bounds
from aeheight.settings import Bounds, HeightSettings, RegionSettings
from aeheight.sources.files import find_files, geometry_problem, opened
from aeheight.windows import Region

_LOWEST, _HIGHEST = -1000.0, 9000.0
"""Metres: no surface of the Earth lies outside; what does is a missing-value nobody declared."""


_TOLERANCE = 1e-6
"""Source pixels: an exact transform, so that a height does not depend on the cut (0 is refused)."""


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
    """The STAC item, for a source that is read by stackstac."""


@dataclass(frozen=True, slots=True)
class HeightSource:
    """Every raster of one height model that touches the grid."""

    rasters: tuple[Raster, ...]
    """In order of precedence: where two overlap, the first valid pixel counts."""
    asset: str
    """STAC: the asset's key."""


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
    return HeightSource(touching, wanted.asset)


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
        problem = geometry_problem(dataset)
        if dataset.count != 1:
            problem = f"it has {dataset.count} bands; a height model has one"
        if problem:
            raise InputError(f"{key}: {href}: {problem}")
        transform, (west, one, east, other) = dataset.transform, dataset.bounds
        declared = dataset.nodata if nodata is None else nodata
        return Raster(
            href,
            crs_name(dataset.crs),
            (west, min(one, other), east, max(one, other)),
            max(abs(transform.a), abs(transform.e)),
            None if declared is None or np.isnan(declared) else declared,
        )


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
            items = list(pystac.ItemCollection.from_dict(described))
            for item in items:
                if item.get_self_href() is None:
                    item.set_self_href(href)
            return items
        opened_object = pystac.read_file(href)
        if isinstance(opened_object, pystac.Item):
            return [opened_object]
        assert isinstance(opened_object, pystac.Catalog)
        return list(opened_object.get_items(recursive=True))
    except (OSError, ValueError, KeyError, AttributeError, pystac.STACError) as error:
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
    plain = item.to_dict(include_self_link=False, transform_hrefs=False)
    plain["assets"] = {wanted.asset: plain["assets"][wanted.asset]}
    plain["links"] = []
    if not (code and transform and shape):
        header = _header(asset.href, wanted.nodata, key)
        return Raster(
            header.href, header.crs, header.bounds, header.resolution, header.nodata, plain
        )
    dx, _, left, _, dy, top = transform[:6]
    bottom, right = top + dy * shape[0], left + dx * shape[1]
    bounds = (left, min(top, bottom), right, max(top, bottom))
    return Raster(asset.href, crs_name(code), bounds, max(abs(dx), abs(dy)), wanted.nodata, plain)


def read_heights(
    source: HeightSource, grid: Grid, region: Region, nodata: float | None
) -> NDArray[np.float32]:
    """Heights of a region: (rows, columns) float32 metres, NaN where there is none.

    Args:
        source: from `scan_heights`.
        grid: the whole grid.
        region: pixels of it.
        nodata: the missing-value of files that declare none.

    Raises:
        OSError: a file breaks off.
        InputError: a height that no ground on Earth has.
    """
    target = grid.part(region)
    out = np.full(region.shape, np.nan, dtype=np.float32)
    for raster in source.rasters:
        if touches(raster, target) and np.isnan(out).any():
            values = _read(raster, source.asset, grid, target, nodata)
            np.copyto(out, _plausible(values, raster), where=np.isnan(out))
    return out


def _plausible(values: NDArray[np.float32], raster: Raster) -> NDArray[np.float32]:
    strange = values[(values < _LOWEST) | (values > _HIGHEST)]
    if strange.size:
        raise InputError(
            f"{raster.href}: {strange.size} heights like {strange[0]:g} m lie outside "
            f"{_LOWEST:g} to {_HIGHEST:g} m; if that is a missing-value that the file does not "
            "declare, name it in `nodata`"
        )
    return values


def _read(
    raster: Raster, asset: str, grid: Grid, target: Grid, nodata: float | None
) -> NDArray[np.float32]:
    how = _resampling(raster, grid)
    # stackstac can be told neither a missing-value before it resamples, nor a CRS without a code.
    if raster.item is not None and nodata is None and target.crs.startswith("EPSG:"):
        return _stack(raster, asset, target, how)
    return _warp(raster, target, how)


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


def _warp(raster: Raster, target: Grid, how: Resampling) -> NDArray[np.float32]:
    with opened(raster.href) as dataset:
        declared = dataset.nodata if raster.nodata is None else raster.nodata
        values = _warped(dataset, target, how, declared)
        if declared is None and how is Resampling.average:
            # One missing-value among many heights gives a mean that looks like a height.
            for extreme in (Resampling.min, Resampling.max):
                _plausible(_warped(dataset, target, extreme, declared), raster)
        return values


def _warped(
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


def _stack(raster: Raster, asset: str, target: Grid, how: Resampling) -> NDArray[np.float32]:
    stack: xr.DataArray = stackstac.stack(
        [raster.item],
        assets=[asset],
        epsg=int(target.crs.removeprefix("EPSG:")),
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
        chunksize=max(target.shape),
        errors_as_nodata=(),
    )
    try:
        plane = stack.isel(time=0, band=0).compute(scheduler="synchronous")
    except RuntimeError as error:  # stackstac's word for a file that cannot be read
        raise OSError(f"{raster.href} breaks off while it is read: {error}") from error
    values: NDArray[np.float32] = plane.to_numpy()
    if values.shape != target.shape:
        raise AssertionError(f"stackstac gave {values.shape} for {target.shape}")
    return values
