"""Plain GeoTIFFs of a small area of a map: one a layer, year and zone, without overviews."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeheight.catalogue import Origin
from aeheight.errors import InputError
from aeheight.export import file_pieces, sha256, write_geotiff
from aeheight.grid import Grid, reproject_bounds
from aeheight.receipts import Ledger, Receipt
from aeheight.settings import ExportSettings, RegionSettings, fingerprint
from aeheight.sources.areas import boxes, outside, pixels_of, shapes_of
from aeheight.steps.shown import Shown
from aeheight.steps.tiles import about_layer, receipt_of_files
from aeheight.store import Store
from aeheight.template import Shard
from aeheight.windows import Region

LEDGER, FOLDER = "area", "export/area"
"""Receipts and files, under the run's store."""
_KEY = "export.area"
_LARGEST = 16_384
"""Longest edge of a file, pixels."""


@dataclass(frozen=True, slots=True)
class Area:
    """Polygons in degrees that a user named."""

    shapes: tuple[Any, ...]
    """GeoJSON."""
    whole: bool
    """They are bounds: pixels beside them belong to the file too."""

    @classmethod
    def of(cls, settings: RegionSettings) -> "Area":
        """That of `export.area`.

        Raises:
            InputError: it is no area in degrees, or no GeoJSON file.
        """
        wanted = settings.export.area
        assert wanted is not None
        return cls(tuple(shapes_of(settings, wanted, _KEY)), not isinstance(wanted, str))

    def regions(
        self, grids: Sequence[Grid], holds: Callable[[str, Region], bool]
    ) -> list[tuple[str, Region]]:
        """The area's pixels of every zone.

        Args:
            grids: of the zones.
            holds: whether a region of a zone may hold heights.

        Raises:
            InputError: it has none, or more than a plain file should hold.
        """
        pixels = [(grid, pixels_of(self.shapes, grid, _KEY)) for grid in grids]
        found = [(g.name, part) for g, part in pixels if part is not None and holds(g.name, part)]
        if not found:
            ground = [reproject_bounds(grid.bounds, grid.crs, "EPSG:4326") for grid in grids]
            raise InputError(
                f"{_KEY} {_degrees(boxes(self.shapes))} misses the region, which lies in "
                f"{_degrees(ground)} (west, south, east, north in degrees); name an area inside"
            )
        for _, region in found:
            if max(region.shape) > _LARGEST:
                raise InputError(
                    f"{_KEY} has {region.height} x {region.width} px, and is for small areas, up "
                    f"to {_LARGEST} px an edge; leave it out and use the COGs of the whole map"
                )
        return found


def outdated(ledger: Ledger, shows: Callable[[Shard], str]) -> list[str]:
    """The files of any area that show what is no longer so, by the names of their receipts.

    Args:
        ledger: of all areas.
        shows: as for `Clip.shard`.
    """
    return [
        shard.name for shard in ledger.finished() if shard.inputs.partition("-")[2] != shows(shard)
    ]


def _degrees(bounds: Sequence[Sequence[float]]) -> str:
    return " and ".join(str([round(float(edge), 4) for edge in each]) for each in bounds)


@dataclass(frozen=True, slots=True)
class Clip:
    """Makes the files of the area in one zone and year; travels to workers as these few words."""

    shown: Shown
    area: Area
    place: str
    """Where the files go."""
    ledger: str
    key: str
    settings: ExportSettings
    origin: Origin

    def shard(self, piece: Shard, shows: str) -> Shard:
        """A piece of work, with what it is made from.

        Args:
            piece: without.
            shows: fingerprint of all that its pixels show, whatever the area.
        """
        options = self.settings.model_dump(mode="json", include={"block", "compress", "map"})
        described = fingerprint([self.area.shapes, self.area.whole, options])
        return replace(piece, inputs=f"{described}-{shows}")

    def __call__(self, shard: Shard) -> Receipt:
        """Read, write whole files, leave the receipt."""
        started = time.monotonic()
        further: dict[str, str] = {}
        valid = 0
        place = Store(self.place)
        grid = self.shown.map.tree().template.grid(shard.group)
        read = partial(self._read, shard, grid)
        for layer in self.shown.layers():
            key = f"{shard.group}/{shard.year}/{layer.name}-{shard.region.name}.tif"
            about = about_layer(self.origin, shard, layer, grid)
            with tempfile.TemporaryDirectory(prefix="aeheight-") as folder:
                path = Path(folder) / f"{layer.name}.tif"
                moments = write_geotiff(
                    path, grid.part(shard.region), partial(read, layer.name), about, self.settings
                )
                if not moments.valid:
                    place.remove_many([key])
                    continue
                further[key] = sha256(file_pieces(path))
                place.write(key, path)
            valid = max(valid, moments.valid)
        receipt = receipt_of_files(
            shard, further, self.key, started, pixels=shard.region.size, valid=valid
        )
        Ledger(Store(self.ledger)).leave(receipt)
        return receipt

    def _read(self, shard: Shard, grid: Grid, layer: str, window: Region) -> NDArray[np.float32]:
        row, col = shard.region.row + window.row, shard.region.col + window.col
        region = Region(row, col, *window.shape)
        values = self.shown.read(shard.group, layer, shard.year, region)
        if not self.area.whole:
            values[outside(self.area.shapes, grid.part(region), _KEY)] = np.nan
        return values
