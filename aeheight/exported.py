"""What an export holds: its layers, years and files, as its STAC collection and items tell.

Any asset of an item with a place is a layer, so that layers of later versions are met too.
"""

import json
import posixpath
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyproj import CRS
from pyproj.exceptions import CRSError

from aeheight.catalogue import COLLECTION
from aeheight.errors import InputError, NotYetError
from aeheight.grid import Bounds
from aeheight.store import Store

_ORDER = ("reference", "height", "difference", "spread", "novelty")
"""Of the layers that are known; others follow."""
_DEGREE = 111_195.0
"""Metres of a degree of latitude, in the mean."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One COG."""

    path: Path
    bounds: Bounds
    """West, south, east, north in degrees; west > east across the 180th meridian."""

    def touches(self, area: Bounds) -> bool:
        """Whether it may have pixels within an area (degrees, west < east)."""
        west, south, east, north = self.bounds
        east += 360 * (east < west)
        beside = any(west + t <= area[2] and area[0] <= east + t for t in (-360, 0, 360))
        return beside and south <= area[3] and area[1] <= north


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the map, of all zones and years."""

    name: str
    """Such as `height`."""
    title: str
    """What its values are, for people."""
    unit: str
    """`m`, or empty."""
    tiles: Mapping[int, tuple[Tile, ...]]
    """By year."""

    @property
    def every(self) -> list[Tile]:
        """Its tiles of all years."""
        return [tile for tiles in self.tiles.values() for tile in tiles]

    @property
    def files(self) -> list[Path]:
        """All of them."""
        return [tile.path for tile in self.every]


@dataclass(frozen=True, slots=True)
class Exported:
    """An export, as far as a map of it needs."""

    name: str
    """The region's."""
    description: str
    attribution: tuple[str, ...]
    """Of the map, and of what it is compared with."""
    surface: str
    """`dsm` or `dtm`."""
    vertical_datum: str
    """With its name, such as `EGM96 height (EPSG:5773)`."""
    years: tuple[int, ...]
    bounds: Bounds
    """Around all tiles, degrees; east is above 180 where it lies across that meridian."""
    pixel: float
    """Edge of the finest pixels, metres."""
    layers: tuple[Layer, ...]
    """In the order to show them; never empty."""


def stamp(place: Store) -> tuple[int, int] | None:
    """Changes with every export; None while there is none, or one is being made."""
    try:
        found = (Path(place.uri) / COLLECTION).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def read_export(place: Store) -> Exported:
    """Read the catalogue of an export, but for the mosaic, which shows the same ground again.

    Args:
        place: the export's folder.

    Raises:
        NotYetError: there is no finished export.
        InputError: the store is not on this machine, or the catalogue is damaged.
    """
    if not place.is_local:
        raise InputError(
            f"view reads files of this machine; copy {place.uri} to FOLDER/export here, then "
            "name that: --set store=FOLDER"
        )
    if stamp(place) is None:
        raise NotYetError(f"there is no finished export at {place.uri}; run aeheight export")
    try:
        return _exported(place)
    except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise InputError(
            f"the catalogue at {place.uri} is damaged ({error!r}); run aeheight export --overwrite"
        ) from error
    except FileNotFoundError as error:
        raise InputError(f"{error}; run aeheight verify --repair") from error


def _exported(place: Store) -> Exported:
    about = place.read_json(COLLECTION)
    hrefs = [_inside("", link["href"]) for link in about["links"] if link["rel"] == "item"]
    items = {key: place.read_json(key) for key in hrefs if not key.startswith("mosaic-")}
    items = {key: item for key, item in items.items() if item.get("bbox")}
    layers = _layers(Path(place.uri), items)
    if not layers:
        raise InputError(f"the export at {place.uri} has no tile: no pixel of the map has a height")
    said = next(iter(items.values()))["properties"]
    return Exported(
        name=about["id"],
        description=about["description"],
        attribution=_attribution(about, items),
        surface=said["aeheight:surface"],
        vertical_datum=_named(said["aeheight:vertical_datum"]),
        years=tuple(sorted({year for layer in layers for year in layer.tiles})),
        bounds=_around([tile.bounds for layer in layers for tile in layer.every]),
        pixel=min(map(_pixel, items.values())),
        layers=layers,
    )


def _pixel(item: Mapping[str, Any]) -> float:
    """Height of a tile's pixels, metres."""
    _, south, _, north = item["bbox"]
    return float((north - south) * _DEGREE / item["properties"]["proj:shape"][0])


def _attribution(
    about: Mapping[str, Any], items: Mapping[str, Mapping[str, Any]]
) -> tuple[str, ...]:
    """Each text once, in order."""
    assets = [asset for item in items.values() for asset in item["assets"].values()]
    rights = (" ".join(a[k] for k in ("attribution", "license") if a.get(k)) for a in assets)
    texts = [*(provider["description"] for provider in about["providers"]), *rights]
    return tuple(dict.fromkeys(filter(None, texts)))


def _named(datum: str) -> str:
    with suppress(CRSError):
        return f"{CRS.from_user_input(datum).name} ({datum})"
    return datum


def _layers(folder: Path, items: Mapping[str, Mapping[str, Any]]) -> tuple[Layer, ...]:
    tiles: dict[str, dict[int, list[Tile]]] = {}
    assets: dict[str, Mapping[str, Any]] = {}
    for key, item in sorted(items.items()):
        year = int(item["properties"]["start_datetime"][:4])
        west, south, east, north = item["bbox"]
        for name, asset in item["assets"].items():
            path = folder / _inside(posixpath.dirname(key), asset["href"])
            tile = Tile(path, (west, south, east, north))
            tiles.setdefault(name, {}).setdefault(year, []).append(tile)
            assets.setdefault(name, asset)
    rank = {name: number for number, name in enumerate(_ORDER)}
    return tuple(
        Layer(
            name,
            assets[name].get("title", name),
            {"metre": "m"}.get(unit := assets[name]["raster:bands"][0].get("unit", ""), unit),
            {year: tuple(tiles[name][year]) for year in sorted(tiles[name])},
        )
        for name in sorted(tiles, key=lambda name: (rank.get(name, len(rank)), name))
    )


def _inside(folder: str, href: str) -> str:
    """Where a link of a file in a folder leads, from the export's own folder.

    GDAL would open more than files: whoever made a catalogue must not choose what is read here.

    Raises:
        InputError: it leads out of the export.
    """
    path = posixpath.normpath(posixpath.join(folder, href))
    if "://" in href or path.startswith(("/", "..")):
        raise InputError(
            f"the catalogue names {href!r}, which lies outside of the export; view shows only "
            "files under its folder: run aeheight export --overwrite"
        )
    return path


def _around(boxes: list[Bounds]) -> Bounds:
    """One box around all; those across the 180th meridian are joined there."""
    crossing = any(west > east for west, _, east, _ in boxes)
    turn = 360 if crossing else 0
    wests = [west + turn * (west < 0) for west, _, _, _ in boxes]
    easts = [east + turn * (east < 0) for _, _, east, _ in boxes]
    souths, norths = [box[1] for box in boxes], [box[3] for box in boxes]
    return min(wests), min(souths), max(easts), max(norths)
