"""Pyramids of an export: every zone as Zarr groups of ever coarser levels, one square a task."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aeheight.catalogue import Origin
from aeheight.export import sha256
from aeheight.grid import Grid
from aeheight.pyramid import Pyramid
from aeheight.receipts import Ledger, Receipt
from aeheight.settings import ExportSettings, fingerprint
from aeheight.steps.shown import Shown
from aeheight.steps.tiles import receipt_of_files
from aeheight.store import Store
from aeheight.template import Layer, Shard
from aeheight.windows import Region, tile

PYRAMIDS = "pyramids.zarr"
"""Under the export."""
_GROUP, _LEVEL = "pyramids-", "level"
_LARGEST = 4096
"""Pixels: no square is larger, whatever the tiles of the COGs."""
_PIXEL_BYTES = 16
"""What a task takes at most, over the pixels of its square; measured: 14."""

Inputs = Callable[[str, int | None, Region], list[str]]
"""What a region of a zone is made from, in a year (None: what has no year)."""


def pyramid_of(shown: Shown, settings: ExportSettings, origin: Origin) -> Pyramid:
    """The pyramid of a map: chunks as large as a COG's blocks, squares no larger than its tiles."""
    template, steps = shown.map.tree().template, 1
    while settings.block << (steps + 1) <= min(settings.tile, _LARGEST):
        steps += 1
    title = f"Heights of {origin.collection}. {origin.lineage}"
    layers = tuple(shown.layers())
    return Pyramid(template.grids, layers, template.years, settings.block, steps, title)


def metadata_of(pyramid: Pyramid) -> Shard:
    """The piece of work that is a pyramid's metadata; made first, and by the driver."""
    return Shard(f"{_GROUP}metadata", "once", None, Region(0, 0, 1, 1), pyramid.version)


def write_metadata(pyramid: Pyramid, place: Store, ledger: Ledger) -> None:
    """Write a pyramid's metadata and leave its receipt.

    Args:
        pyramid: what is made.
        place: the export's folder.
        ledger: of the export.
    """
    started, store, files = time.monotonic(), place.child(PYRAMIDS), {}
    for key, data in pyramid.metadata().items():
        store.write(key, data)
        files[f"{PYRAMIDS}/{key}"] = sha256(iter((data,)))
    ledger.leave(receipt_of_files(metadata_of(pyramid), files, ledger.key, started))


def task_bytes(pyramid: Pyramid) -> int:
    """What one task takes at most."""
    return _PIXEL_BYTES * pyramid.tile**2


def stages(
    pyramid: Pyramid, holds: Callable[[str, Region], bool], inputs: Inputs
) -> list[list[Shard]]:
    """The squares of every stage, each stage to be done before the next.

    Args:
        pyramid: what is made.
        holds: whether a region of a zone may hold heights.
        inputs: fingerprints of what it is made from.
    """
    found: list[list[Shard]] = []
    for grid in pyramid.grids:
        ground = [r for r in tile(grid.shape, pyramid.tile) if holds(grid.name, r)]
        for stage in range(len(pyramid.stages(grid))):
            found += [[]] * (stage == len(found))
            found[stage] = [*found[stage], *_squares(pyramid, grid, stage, ground, inputs)]
    return found


def _squares(
    pyramid: Pyramid, grid: Grid, stage: int, ground: Sequence[Region], inputs: Inputs
) -> Iterator[Shard]:
    level = stage * pyramid.steps
    for year in (*pyramid.years, *([None] if _still(pyramid.layers, None) else [])):
        for square in pyramid.squares(grid, stage, ground):
            below = Region(*(part << level for part in (square.row, square.col, *square.shape)))
            made_from = fingerprint([pyramid.version, inputs(grid.name, year, below)])
            yield Shard(f"{_GROUP}{grid.name}", f"{_LEVEL}{level}", year, square, made_from)


def _still(layers: Sequence[Layer], year: int | None) -> list[Layer]:
    """The layers that have a plane for a year; for None those without years."""
    return [layer for layer in layers if layer.timed == (year is not None)]


def in_pyramids(name: str) -> bool:
    """Whether a piece of work is a pyramid's, by its name or its group's."""
    return name.startswith(_GROUP)


@dataclass(frozen=True, slots=True)
class Halve:
    """Makes the shards of one square; travels to workers as these few words."""

    shown: Shown
    pyramid: Pyramid
    place: str
    """The export's folder."""
    ledger: str
    key: str

    def __call__(self, shard: Shard) -> Receipt:
        """Read a level (or the map), write whole shards of the next, leave the receipt."""
        started = time.monotonic()
        zone, level = shard.group.removeprefix(_GROUP), int(shard.layer.removeprefix(_LEVEL))
        levels = self.pyramid.stages(self._grid(zone))[level // self.pyramid.steps]
        store, valid = Store(self.place).child(PYRAMIDS), 0
        further: dict[str, str] = {}
        for layer in _still(self.pyramid.layers, shard.year):
            values = self._read(store, zone, level, layer, shard)
            valid = max(valid, int(np.isfinite(values).sum()))
            stored = self.pyramid.write(
                store, zone, levels, layer, shard.year, shard.region, values
            )
            further |= {f"{PYRAMIDS}/{key}": digest for key, digest in stored.items()}
        receipt = receipt_of_files(
            shard, further, self.key, started, pixels=shard.region.size, valid=valid
        )
        Ledger(Store(self.ledger)).leave(receipt)
        return receipt

    def _read(
        self, store: Store, zone: str, level: int, layer: Layer, shard: Shard
    ) -> NDArray[np.float32]:
        if level == 0:
            return self.shown.read(zone, layer.name, shard.year, shard.region)
        return self.pyramid.read(store, zone, level, layer, shard.year, shard.region)

    def _grid(self, zone: str) -> Grid:
        return next(grid for grid in self.pyramid.grids if grid.name == zone)
