"""One tile of an export: a COG for each layer, the STAC item that describes them, the receipt."""

import io
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from aeheight import __version__
from aeheight.blending import Mosaic
from aeheight.catalogue import File, Origin, tile_item
from aeheight.embeddings import ATTRIBUTION
from aeheight.export import About, Moments, file_pieces, overview, sha256, write_cog
from aeheight.grid import Grid
from aeheight.receipts import Ledger, Receipt
from aeheight.settings import ExportSettings, fingerprint
from aeheight.sources.datum import compound
from aeheight.steps.shown import DIFFERENCE, REFERENCE, Shown
from aeheight.store import Store
from aeheight.template import Layer, Shard
from aeheight.windows import Region

LEDGER, FOLDER = "export", "export"
"""Receipts and files, under the run's store."""
ONCE = Shard("catalogue", "once", None, Region(0, 0, 1, 1))
"""Stands for what an export has once: pictures, model and collection. It has a receipt too."""
PICTURE = 1600
"""Longest edge of a picture, pixels."""
_ITEM = "item"
"""What a receipt calls the STAC item among its files."""
_TOLD = (
    *("surface", "vertical_datum", "reference_surface", "reference_vertical_datum"),
    *("epoch", "license", "calibration"),
)
"""Attributes of a layer that its files repeat."""


def key_of(shard: Shard, layer: str) -> str:
    """Where a file of a tile lies under the export; `item` is its STAC item."""
    folder, region = f"{shard.group}/{shard.year}", shard.region.name
    return f"{folder}/{region}.json" if layer == _ITEM else f"{folder}/{layer}-{region}.tif"


def files_of(receipt: Receipt) -> dict[str, str]:
    """Every file of a tile under the export, with its SHA-256; none where it is all nodata."""
    shard = Shard.parse(receipt.shard)
    if shard.layer != "height":  # of a pyramid, an area, or what there is once
        return dict(receipt.further)
    if not receipt.valid:
        return {}
    found = {shard.layer: receipt.checksum, **receipt.further}
    return {key_of(shard, layer): digest for layer, digest in found.items()}


def receipt_of_files(
    shard: Shard,
    files: Mapping[str, str],
    settings: str,
    started: float,
    *,
    pixels: int = 0,
    valid: int = 0,
) -> Receipt:
    """The receipt of a piece of work that is files alone.

    Args:
        shard: what was made.
        files: SHA-256 of each, by its key in the export.
        settings: fingerprint of the settings.
        started: `time.monotonic()` before the first read.
        pixels: of the shard, where it has any.
        valid: those that are not nodata.
    """
    return Receipt(
        shard=shard.name,
        checksum=fingerprint(files),
        pixels=pixels,
        valid=valid,
        minimum=None,
        maximum=None,
        mean=None,
        settings=settings,
        seconds=round(time.monotonic() - started, 3),
        inputs=shard.inputs,
        further=files,
    )


def picture_key(key: str, shard: Shard) -> str:
    """Where a tile's part of the picture lies, beside its receipt."""
    return f"{key}/{shard.name}.npy"


def picture_cut(shape: tuple[int, int], region: Region) -> Region:
    """A region of a grid of this shape, in pixels of its picture."""
    every = max(ceil(max(shape) / PICTURE), 1)
    row, col, bottom, right = (
        round(edge / every) for edge in (region.row, region.col, region.bottom, region.right)
    )
    return Region(row, col, max(bottom - row, 1), max(right - col, 1))


def about_layer(origin: Origin, shard: Shard, layer: Layer, grid: Grid) -> About:
    """What the file of a layer says of itself."""
    told, is_reference = layer.attributes, layer.name == REFERENCE
    description = str(told.get("long_name", layer.name))
    datum = str(told.get("vertical_datum", "unknown"))
    rights = ["" if is_reference else ATTRIBUTION, str(told.get("attribution", ""))]
    whole = compound(grid.crs, datum) if layer.name in ("height", REFERENCE) else None
    tags = {
        "TIFFTAG_SOFTWARE": f"aeheight {__version__}",
        "TIFFTAG_IMAGEDESCRIPTION": f"{description}, {origin.collection}"
        + ("" if is_reference else f", {shard.year}"),
        "TIFFTAG_COPYRIGHT": "; ".join(filter(None, rights)) or "that of the reference",
        "LAYER": layer.name,
        **({} if is_reference else {"YEAR": str(shard.year)}),
        **({} if is_reference else {"CHECKPOINT": origin.checkpoint}),
        **{name.upper(): str(told[name]) for name in _TOLD if name in told},
    }
    unit = {"m": "metre", "1": ""}.get(str(told.get("units", "1")), "")
    return About(description, unit, whole or CRS.from_user_input(grid.crs), tags)


@dataclass(frozen=True, slots=True)
class Export:
    """Makes the files of one tile; travels to workers as these few words."""

    shown: Shown
    place: str
    """Where the files go."""
    ledger: str
    key: str
    settings: ExportSettings
    origin: Origin
    mosaics: tuple[Mosaic, ...]

    def __call__(self, shard: Shard) -> Receipt:
        """Read, write whole files, leave the receipt."""
        started = time.monotonic()
        files: dict[str, File] = {}
        further: dict[str, str] = {}
        with tempfile.TemporaryDirectory(prefix="aeheight-") as folder:
            first, *others = self._layers(shard.group)
            moments = self._put(shard, first, Path(folder), files)
            if moments.valid:
                for layer in others:
                    self._put(shard, layer, Path(folder), files)
                further = {name: file.sha256 for name, file in files.items() if name != first.name}
                further[_ITEM] = self._describe(shard, files)
        self._clear(shard, {first.name, *further} if moments.valid else set())
        low, high, mean = moments.bounds if moments.valid else (None, None, None)
        receipt = Receipt(
            shard=shard.name,
            checksum=files[first.name].sha256 if moments.valid else sha256(iter(())),
            pixels=moments.pixels,
            valid=moments.valid,
            minimum=low,
            maximum=high,
            mean=mean,
            settings=self.key,
            seconds=round(time.monotonic() - started, 3),
            inputs=shard.inputs,
            further=further,
        )
        Ledger(Store(self.ledger)).leave(receipt)
        return receipt

    def grid(self, group: str) -> Grid:
        """Of a zone, or of a mosaic."""
        mosaic = self._mosaic(group)
        return mosaic.grid if mosaic else self.shown.map.tree().template.grid(group)

    def _mosaic(self, group: str) -> Mosaic | None:
        return next((mosaic for mosaic in self.mosaics if mosaic.name == group), None)

    def _layers(self, group: str) -> list[Layer]:
        return self.shown.of_map() if self._mosaic(group) else self.shown.layers()

    def _clear(self, shard: Shard, made: set[str]) -> None:
        """Remove what an earlier map, or one with a reference, left of this tile."""
        known = {layer.name for layer in self.shown.of_map()} | {REFERENCE, DIFFERENCE, _ITEM}
        Store(self.place).remove_many([key_of(shard, name) for name in sorted(known - made)])

    def _put(self, shard: Shard, layer: Layer, folder: Path, files: dict[str, File]) -> Moments:
        """Make a layer's COG here, and put it into the store in one piece."""
        grid, path = self.grid(shard.group), folder / f"{layer.name}.tif"
        read = partial(self._read, shard, layer.name)
        about = about_layer(self.origin, shard, layer, grid)
        moments = write_cog(path, grid.part(shard.region), read, about, self.settings)
        if not moments.valid:
            return moments
        key = key_of(shard, layer.name)
        digest, size = sha256(file_pieces(path)), path.stat().st_size
        Store(self.place).write(key, path)
        told = layer.attributes
        files[layer.name] = File(
            Path(key).name, about.description, about.unit, size, digest, moments.statistics,
            {name: str(told[name]) for name in ("attribution", "license") if name in told},
        )  # fmt: skip
        if layer.name == shard.layer:
            self._keep_picture(shard, path, grid)
        path.unlink()
        return moments

    def _read(self, shard: Shard, layer: str, window: Region) -> NDArray[np.float32]:
        """Pixels of a window of the tile."""
        row, col = shard.region.row + window.row, shard.region.col + window.col
        region = Region(row, col, *window.shape)
        mosaic, year = self._mosaic(shard.group), shard.year
        if mosaic is None:
            return self.shown.read(shard.group, layer, year, region)
        return mosaic.read(region, lambda zone, part: self.shown.read(zone.name, layer, year, part))

    def _keep_picture(self, shard: Shard, path: Path, grid: Grid) -> None:
        """A small picture of the tile, from the COG's overviews."""
        data = io.BytesIO()
        np.save(data, overview(path, picture_cut(grid.shape, shard.region).shape))
        Store(self.ledger).write(picture_key(self.key, shard), data.getvalue())

    def _describe(self, shard: Shard, files: Mapping[str, File]) -> str:
        """Write the STAC item; its SHA-256."""
        assert shard.year is not None
        grid = self.grid(shard.group).part(shard.region)
        name = f"{self.origin.collection}-{shard.group}-{shard.year}-{shard.region.name}"
        item = tile_item(name, grid, shard.year, files, self.origin, "../..")
        Store(self.place).write(key_of(shard, _ITEM), item)
        return sha256(iter((item,)))


@dataclass(frozen=True, slots=True)
class Check:
    """Compares the files of one tile with its receipt; travels to workers as these few words."""

    place: str
    ledger: str
    key: str

    def __call__(self, shard: Shard) -> Receipt:
        """Read them again.

        Raises:
            OSError: one is missing, cannot be read, or has other bytes.
        """
        place, receipt = Store(self.place), Ledger(Store(self.ledger), self.key).receipt(shard.name)
        for key, expected in files_of(receipt).items():
            try:
                found = sha256(place.pieces(key))
            except FileNotFoundError as error:
                raise OSError(f"{key} is missing") from error
            if found != expected:
                raise OSError(f"{key}: SHA-256 {found}, not {expected}")
        return receipt
