"""STAC: items from files, static catalogues and APIs, and their pixels through stackstac."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pystac
import pystac_client
import stackstac
import xarray as xr
from numpy.typing import NDArray
from pystac import Item
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from rasterio.windows import Window

from aeheight.errors import InputError
from aeheight.grid import Bounds
from aeheight.settings import HeightSettings, RegionSettings
from aeheight.sources.rasters import Raster, Readers, horizontal, unit_problem
from aeheight.windows import Region

__all__ = ["Item", "find_items", "item_raster", "read_item", "search_boxes"]

_NO_STAC = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    pystac.STACError,
    pystac.STACTypeError,
    APIError,
)
"""What is raised for text that is no STAC, and by an API that does not answer."""

_PATIENCE = 60.0
"""Seconds that an API has for an answer."""


def find_items(
    settings: RegionSettings, wanted: HeightSettings, boxes: Sequence[Bounds], key: str
) -> list[Item]:
    """Every item that `href` and `collection` name.

    Args:
        settings: resolves relative hrefs.
        wanted: the height model.
        boxes: west, south, east, north in degrees, of the ground to search an API for.
        key: the setting, for messages.

    Returns:
        In order of precedence: as a file or catalogue lists them; of an API the newest first.

    Raises:
        InputError: no STAC, or none of its items.
    """
    hrefs = [wanted.href] if isinstance(wanted.href, str) else wanted.href
    found: dict[tuple[str | None, str], Item] = {}
    for href in hrefs:
        for item in _named_items(settings.resolve(href), wanted.collection, boxes, key):
            found.setdefault((item.get_self_href(), item.id), item)
    if not found:
        of = f" of collection {wanted.collection!r}" if wanted.collection else ""
        raise InputError(
            f"{key}.href: {wanted.href!r} holds no STAC item{of}, or none on the region's ground"
        )
    return list(found.values())


def _named_items(
    href: str, collection: str | None, boxes: Sequence[Bounds], key: str
) -> list[Item]:
    try:
        described = json.loads(pystac.StacIO.default().read_text(href))
        links = {link["rel"]: link["href"] for link in described.get("links", ())}
        if "conformsTo" in described:
            return _searched(href, collection, boxes, key)
        if described.get("type") == "Collection" and {"items", "root"} <= set(links):
            return _searched(links["root"], collection or described["id"], boxes, key)
        items = _static(href, described)
    except InputError:
        raise
    except _NO_STAC as error:
        raise InputError(
            f"{key}.href: {href} cannot be read as STAC ({error}); give a catalogue, collection, "
            "item, item collection or the root of a STAC API, or use source: raster"
        ) from error
    return [item for item in items if collection in (None, item.collection_id)]


def _static(href: str, described: dict[str, Any]) -> list[Item]:
    if described.get("type") == "FeatureCollection":
        items = [Item.from_dict(feature) for feature in described["features"]]
        for item in items:
            if item.get_self_href() is None:
                item.set_self_href(href)
        return items
    known = pystac.read_file(href)
    if isinstance(known, Item):
        return [known]
    assert isinstance(known, pystac.Catalog)
    return list(known.get_items(recursive=True))


def _searched(root: str, collection: str | None, boxes: Sequence[Bounds], key: str) -> list[Item]:
    reach = StacApiIO(timeout=_PATIENCE, max_retries=5)
    client = pystac_client.Client.open(root, stac_io=reach)
    if collection is None:
        some = sorted(each.id for each, _ in zip(client.get_collections(), range(50), strict=False))
        raise InputError(
            f"{key}: {root} is a STAC API; name the collection to search in {key}.collection, "
            f"such as {some}"
        )
    found: dict[str, Item] = {}
    for box in boxes:
        for item in client.search(collections=[collection], bbox=box).items():
            found[item.id] = item
    # An API may answer in any order; heights must not depend on it.
    return sorted(sorted(found.values(), key=lambda item: item.id), key=_when, reverse=True)


def _when(item: Item) -> str:
    return item.datetime.isoformat() if item.datetime else ""


def item_raster(item: Item, wanted: HeightSettings, key: str) -> tuple[Raster, str | None]:
    """The asset of an item as the item has it.

    Args:
        item: with the projection extension (`proj:code` or `proj:epsg`), or without.
        wanted: the height model, which names the asset.
        key: the setting, for messages.

    Returns:
        The raster, and the field that the item lacks: then only `href` and `item` are known, and
        the file's own header has the rest.

    Raises:
        InputError: no such asset; heights in feet; rotated pixels.
    """
    if wanted.asset not in item.assets:
        raise InputError(
            f"{key}: STAC item {item.id} has no asset {wanted.asset!r}; it has "
            f"{sorted(item.assets)}: name one in {key}.asset"
        )
    if item.get_self_href():
        item.make_asset_hrefs_absolute()
    asset = item.assets[wanted.asset]
    about = item.properties | asset.extra_fields
    band = (about.get("raster:bands") or about.get("bands") or [{}])[0]
    if problem := unit_problem(band.get("unit")):
        raise InputError(f"{key}: asset {wanted.asset!r} of STAC item {item.id}: {problem}")
    nodata = wanted.nodata
    if nodata is None and isinstance(band.get("nodata"), int | float):
        nodata = float(band["nodata"])
    plain = _plain(item, wanted.asset)
    code = about.get("proj:code") or (about.get("proj:epsg") and f"EPSG:{about['proj:epsg']}")
    transform, shape = about.get("proj:transform"), about.get("proj:shape")
    lacks = _lacking(code, transform, shape)
    if lacks or transform is None or shape is None:
        nothing = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
        return Raster(asset.href, "", nothing, (1, 1), nodata, plain), lacks
    dx, turned, left, skewed, dy, top = (float(number) for number in transform[:6])
    if turned or skewed:
        raise InputError(f"{key}: STAC item {item.id} has rotated pixels ({transform})")
    edges = (dx, 0.0, left, 0.0, dy, top)
    rows, cols = (int(size) for size in shape)
    return Raster(asset.href, horizontal(code), edges, (rows, cols), nodata, plain), None


def _lacking(code: Any, transform: Any, shape: Any) -> str | None:
    """The first projection field that is absent or too short."""
    if not code:
        return "proj:code (or proj:epsg)"
    if not transform or len(transform) < 6:
        return "proj:transform"
    return None if shape and len(shape) == 2 else "proj:shape"


def _plain(item: Item, asset: str) -> dict[str, Any]:
    described = item.to_dict(include_self_link=False, transform_hrefs=False)
    return {
        "id": item.id,
        "properties": {"datetime": described["properties"]["datetime"]},
        "assets": {asset: {"href": item.assets[asset].href}},
    }


def search_boxes(areas: Iterable[Bounds]) -> Iterator[Bounds]:
    """Bounds in degrees as boxes that an API takes: those across the 180th meridian are two."""
    for west, south, east, north in areas:
        if west <= east:
            yield west, south, east, north
        else:
            yield west, south, 180.0, north
            yield -180.0, south, east, north


def read_item(raster: Raster, part: Region, readers: Readers) -> NDArray[np.float32]:
    """Heights of a part of an item's asset, through stackstac, on the asset's own lattice.

    Args:
        raster: with an item, in a CRS with an EPSG code.
        part: pixels of it, counted from its north-western corner.
        readers: see `rasters.Readers.read` for errors.
    """
    assert raster.item is not None
    (dx, dy), (left, _, _, top) = raster.resolution, raster.bounds
    west, north = left + part.col * dx, top - part.row * dy
    bounds = west, north - part.height * dy, west + part.width * dx, north
    epsg = int(raster.crs.removeprefix("EPSG:"))
    place = {"proj:epsg": epsg, "proj:bbox": list(bounds)}
    # Without epsg, resolution and bounds stackstac guesses a grid of its own, silently.
    stack: xr.DataArray = stackstac.stack(
        [raster.item | {"properties": raster.item["properties"] | place}],
        assets=list(raster.item["assets"]),
        epsg=epsg,
        resolution=(dx, dy),
        bounds=bounds,
        snap_bounds=False,
        xy_coords="center",
        dtype=np.dtype("float32"),
        fill_value=np.float32(np.nan),
        rescale=False,
        sortby_date=False,
        properties=False,
        band_coords=False,
        chunksize=max(part.shape),
        reader=partial(_Reader, raster, part, readers),
    )
    values: NDArray[np.float32] = (
        stack.isel(time=0, band=0).compute(scheduler="synchronous").to_numpy()
    )
    if values.shape != part.shape:
        raise AssertionError(f"stackstac gave {values.shape} for {part.shape}")
    return values


class _Reader:
    """How stackstac reads an asset: by whole pixels, as any raster.

    Its own reader takes positions from a warp that is up to an eighth of a pixel off, knows no
    missing-value that the file does not declare, opens the file once more for every window, and
    takes one that is gone (404) for one without a height.
    """

    def __init__(self, raster: Raster, part: Region, readers: Readers, **_plan: Any) -> None:
        self._raster, self._part, self._readers = raster, part, readers

    def read(self, window: Window) -> NDArray[np.float32]:
        """A chunk; `window` counts from the stack's corner."""
        row, col = self._part.row + int(window.row_off), self._part.col + int(window.col_off)
        return self._readers.read(
            self._raster, Region(row, col, int(window.height), int(window.width))
        )
