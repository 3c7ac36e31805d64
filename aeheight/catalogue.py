"""STAC 1.1: an item a tile, one for the model, the collection that holds them, one for a report.

Extensions: projection, raster, file (SHA-256 as multihash), processing, and MLM for the model.
Everything links by relative paths, so that a folder of exports can be moved or published as it is.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pystac
from pystac.extensions.file import FileExtension
from pystac.extensions.projection import ProjectionExtension
from pystac.extensions.raster import RasterBand, RasterExtension

from aeheight.conventions import crs_attributes
from aeheight.embeddings import ATTRIBUTION, BANDS
from aeheight.grid import Bounds, Grid, reproject_bounds, transformer

PROCESSING = "https://stac-extensions.github.io/processing/v1.2.0/schema.json"
MLM = "https://stac-extensions.github.io/mlm/v1.4.0/schema.json"
COLLECTION, MODEL = "collection.json", "model.json"
"""Under the export."""
_DEGREES = "EPSG:4326"
_KINDS = {
    "png": (pystac.MediaType.PNG, "overview"),
    "zarr": ("application/vnd.zarr; version=3", "data"),
}
"""Media type and role of what an export has once, by its suffix."""
_ALONG = 8
"""Points along each side of a tile's outline."""


@dataclass(frozen=True, slots=True)
class File:
    """A COG of a tile, as its item describes it."""

    href: str
    """Relative to the item."""
    title: str
    unit: str
    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal."""
    statistics: Mapping[str, float]
    """Of its valid pixels."""
    rights: Mapping[str, str] = field(default_factory=dict)
    """`attribution` and `license`, where they are not the map's."""


@dataclass(frozen=True, slots=True)
class Page:
    """A file of a report, as its item describes it."""

    href: str
    """Relative to the item."""
    title: str
    media: str
    """Media type."""
    roles: tuple[str, ...]
    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a map comes from: the same for all of its tiles."""

    collection: str
    """Its identifier: the region's name."""
    surface: str
    """`dsm` or `dtm`."""
    vertical_datum: str
    checkpoint: str
    """Digest of the model."""
    lineage: str
    """How the heights were made, for people."""
    software: Mapping[str, str]
    """Name and version."""

    @property
    def properties(self) -> dict[str, Any]:
        """Of an item and of the collection's summaries."""
        return {
            "processing:level": "L4",
            "processing:lineage": self.lineage,
            "processing:software": dict(self.software),
            "aeheight:surface": self.surface,
            "aeheight:vertical_datum": self.vertical_datum,
            "aeheight:checkpoint": self.checkpoint,
        }


def multihash(sha256: str) -> str:
    """A SHA-256 as the file extension has it: its code 0x12 and its length before it.

    >>> multihash("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")[:8]
    '1220e3b0'
    """
    return "1220" + sha256


def tile_item(
    name: str, grid: Grid, year: int, files: Mapping[str, File], origin: Origin, up: str
) -> bytes:
    """The item of a tile, as JSON.

    Args:
        name: its identifier.
        grid: the pixels of the tile.
        year: of the embeddings.
        files: by layer.
        origin: of the map.
        up: relative path from the item to the export's folder, such as `../..`.
    """
    bbox = reproject_bounds(grid.bounds, grid.crs, _DEGREES)
    item = pystac.Item(
        id=name,
        geometry=_outline(grid, bbox),
        bbox=list(bbox),
        datetime=None,
        start_datetime=datetime(year, 1, 1, tzinfo=UTC),
        end_datetime=datetime(year, 12, 31, 23, 59, 59, tzinfo=UTC),
        properties=origin.properties,
        stac_extensions=[PROCESSING],
        collection=origin.collection,
    )
    place = ProjectionExtension.ext(item, add_if_missing=True)
    crs = crs_attributes(grid.crs)
    place.apply(
        code=crs.get("proj:code"),
        wkt2=crs.get("proj:wkt2"),
        bbox=list(grid.bounds),
        shape=list(grid.shape),
        transform=list(grid.transform)[:6],
    )
    for layer, file in files.items():
        item.add_asset(layer, _asset(file, item, sum(grid.pixel_metres()) / 2))
    for rel in ("root", "parent", "collection"):
        item.add_link(_link(rel, f"{up}/{COLLECTION}", origin.collection))
    item.add_link(_link("derived_from", f"{up}/{MODEL}", "the model that made it"))
    return _json(item.to_dict(include_self_link=False, transform_hrefs=False))


def _asset(file: File, item: pystac.Item, metres: float) -> pystac.Asset:
    asset = pystac.Asset(
        file.href, file.title, media_type=pystac.MediaType.COG, roles=["data"],
        extra_fields=dict(file.rights),
    )  # fmt: skip
    asset.set_owner(item)
    FileExtension.ext(asset, add_if_missing=True).apply(
        size=file.size, checksum=multihash(file.sha256)
    )
    band: dict[str, Any] = {
        "data_type": "float32",
        "nodata": "nan",
        "sampling": "area",
        "spatial_resolution": metres,
        "statistics": dict(file.statistics),
    }
    if file.unit:
        band["unit"] = file.unit
    RasterExtension.ext(asset, add_if_missing=True).bands = [RasterBand(band)]
    return asset


def _outline(grid: Grid, bbox: Bounds) -> dict[str, Any]:
    """The tile's outline in degrees, counter-clockwise; cut at the 180th meridian."""
    west, south, east, north = bbox
    if west > east:
        parts = [(west, 180.0), (-180.0, east)]
        rings = [_ring([w, e, e, w], [south, south, north, north]) for w, e in parts]
        return {"type": "MultiPolygon", "coordinates": [[ring] for ring in rings]}
    left, bottom, right, top = grid.bounds
    along = np.linspace(0, 1, _ALONG, endpoint=False)
    x = np.concatenate([left + along * (right - left), np.full(_ALONG, right),
                        right - along * (right - left), np.full(_ALONG, left)])  # fmt: skip
    y = np.concatenate([np.full(_ALONG, bottom), bottom + along * (top - bottom),
                        np.full(_ALONG, top), top - along * (top - bottom)])  # fmt: skip
    lon, lat = transformer(grid.crs, _DEGREES).transform(x, y)
    return {"type": "Polygon", "coordinates": [_ring(lon, lat)]}


def _ring(lon: Sequence[float], lat: Sequence[float]) -> list[list[float]]:
    points = [[round(float(x), 9), round(float(y), 9)] for x, y in zip(lon, lat, strict=True)]
    return [*points, points[0]]


def model_item(origin: Origin, facts: Mapping[str, Any], file: File) -> bytes:
    """The item of the model, as JSON; it has no place, since a model may serve anywhere.

    Args:
        origin: of the map.
        facts: `architecture`, `pretrained`, `parameters`, `years` (of the embeddings trained on),
            `hyperparameters` and `torch` (its version).
        file: the checkpoint.
    """
    years = facts["years"]
    shape = [-1, BANDS, -1, -1]
    item = pystac.Item(
        id=f"{origin.collection}-model",
        geometry=None,
        bbox=None,
        datetime=None,
        start_datetime=datetime(min(years), 1, 1, tzinfo=UTC),
        end_datetime=datetime(max(years), 12, 31, 23, 59, 59, tzinfo=UTC),
        properties={
            "mlm:name": f"aeheight {facts['architecture']}",
            "mlm:architecture": facts["architecture"],
            "mlm:tasks": ["regression"],
            "mlm:framework": "pytorch",
            "mlm:framework_version": facts["torch"],
            "mlm:total_parameters": facts["parameters"],
            "mlm:pretrained": facts["pretrained"],
            "mlm:hyperparameters": dict(facts["hyperparameters"]),
            "mlm:input": [_array("AlphaEarth embedding", "input", shape)
                          | {"bands": [], "value_scaling": None, "resize_type": None,
                             "pre_processing_function": None}],
            "mlm:output": [_array("height", "result", [-1, 1, -1, -1])
                           | {"tasks": ["regression"], "classification:classes": [],
                              "post_processing_function": None}],
            "aeheight:surface": origin.surface,
            "aeheight:vertical_datum": origin.vertical_datum,
            "aeheight:checkpoint": origin.checkpoint,
        },
        stac_extensions=[MLM],
        collection=origin.collection,
    )  # fmt: skip
    asset = pystac.Asset(
        file.href,
        file.title,
        media_type="application/octet-stream; application=pytorch",
        roles=["mlm:model"],
        extra_fields={"mlm:artifact_type": "torch.save"},
    )
    item.add_asset("model", asset)
    FileExtension.ext(asset, add_if_missing=True).apply(
        size=file.size, checksum=multihash(file.sha256)
    )
    for rel in ("root", "parent", "collection"):
        item.add_link(_link(rel, COLLECTION, origin.collection))
    return _json(item.to_dict(include_self_link=False, transform_hrefs=False))


def report_item(
    grids: Sequence[Grid],
    year: int,
    figures: Mapping[str, Any],
    pages: Sequence[Page],
    origin: Origin,
) -> bytes:
    """The item of an accuracy report, as JSON: where and when, the figures, and the files.

    Args:
        grids: the region's zones.
        year: of the embeddings that the map was made from.
        figures: what goes under `aeheight:` in its properties.
        pages: the report's files; those with the role `overview` are linked too.
        origin: of the map; its `collection` is the region's name.
    """
    boxes = [reproject_bounds(grid.bounds, grid.crs, _DEGREES) for grid in grids]
    parts = [_outline(grid, box) for grid, box in zip(grids, boxes, strict=True)]
    rings = [ring for part in parts for ring in _polygons(part)]
    item = pystac.Item(
        id=f"{origin.collection}-report-{year}",
        geometry=parts[0] if len(parts) == 1 else {"type": "MultiPolygon", "coordinates": rings},
        bbox=list(_around(boxes) if len(boxes) > 1 else boxes[0]),
        datetime=None,
        start_datetime=datetime(year, 1, 1, tzinfo=UTC),
        end_datetime=datetime(year, 12, 31, 23, 59, 59, tzinfo=UTC),
        properties={
            "title": f"Accuracy of the heights of {origin.collection}",
            **origin.properties,
            **{f"aeheight:{name}": value for name, value in figures.items()},
        },
        stac_extensions=[PROCESSING],
    )
    for page in pages:
        asset = pystac.Asset(page.href, page.title, media_type=page.media, roles=list(page.roles))
        item.add_asset(page.href.rpartition("/")[2], asset)
        FileExtension.ext(asset, add_if_missing=True).apply(
            size=page.size, checksum=multihash(page.sha256)
        )
        if "overview" in page.roles:
            item.add_link(_link("alternate", page.href, page.title, page.media))
    return _json(item.to_dict(include_self_link=False, transform_hrefs=False))


def _polygons(outline: Mapping[str, Any]) -> list[Any]:
    """Coordinates of the polygons of a polygon or of several."""
    found: list[Any] = outline["coordinates"]
    return [found] if outline["type"] == "Polygon" else found


def _array(name: str, key: str, shape: Sequence[int]) -> dict[str, Any]:
    """A model's input or output: (batch, channel, height, width) float32."""
    order = ["batch", "channel", "height", "width"]
    return {"name": name, key: {"shape": list(shape), "dim_order": order, "data_type": "float32"}}


def collection(
    origin: Origin,
    note: str | None,
    bboxes: Sequence[Bounds],
    years: Sequence[int],
    items: Sequence[str],
    beside: Mapping[str, str],
) -> bytes:
    """The collection, as JSON.

    Args:
        origin: of the map.
        note: what a reader must know first.
        bboxes: of the groups, degrees.
        years: of the map.
        items: relative paths of the items.
        beside: relative path and title of PNGs and of Zarr stores.
    """
    spans = [[datetime(min(years), 1, 1, tzinfo=UTC),
              datetime(max(years), 12, 31, 23, 59, 59, tzinfo=UTC)]]  # fmt: skip
    whole = _around(bboxes)
    boxes = [list(whole), *map(list, bboxes)] if len(bboxes) > 1 else [list(whole)]
    found = pystac.Collection(
        id=origin.collection,
        title=f"Heights of {origin.collection}",
        description=(note + " " if note else "") + origin.lineage,
        extent=pystac.Extent(pystac.SpatialExtent(boxes), pystac.TemporalExtent(spans)),
        license="other",
        keywords=["elevation", origin.surface, "AlphaEarth", "height"],
        providers=[
            pystac.Provider(
                "Google and Google DeepMind", ATTRIBUTION, [pystac.ProviderRole.PRODUCER]
            )
        ],
        stac_extensions=[PROCESSING],
        summaries=pystac.Summaries({key: [value] for key, value in origin.properties.items()}),
    )
    found.add_link(_link("root", COLLECTION, origin.collection))
    for href in items:
        found.add_link(_link("item", href, None, "application/geo+json"))
    for href, title in beside.items():
        name, _, kind = href.removeprefix("./").rpartition(".")
        media, role = _KINDS[kind]
        asset = pystac.Asset(href, title, media_type=media, roles=[role])
        found.add_asset(name.replace("/", "-"), asset)
    return _json(found.to_dict(include_self_link=False, transform_hrefs=False))


def _around(bboxes: Sequence[Bounds]) -> Bounds:
    """One box around all; the whole turn where one of them crosses the 180th meridian."""
    wests, souths, easts, norths = zip(*bboxes, strict=True)
    if any(west > east for west, east in zip(wests, easts, strict=True)):
        return -180.0, min(souths), 180.0, max(norths)
    return min(wests), min(souths), max(easts), max(norths)


def _link(rel: str, href: str, title: str | None, media: str = "application/json") -> pystac.Link:
    return pystac.Link(rel, href, media_type=media, title=title)


def _json(found: Mapping[str, Any]) -> bytes:
    return json.dumps(found, indent=1, allow_nan=False).encode()
