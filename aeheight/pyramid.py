"""A Zarr pyramid: every grid at its own resolution and at halves of it, as GeoZarr multiscales.

Groups are `ZONE/LEVEL`, level 0 the finest. A square of `tile` pixels of a level makes its own part
of the next levels, down to one chunk: at each of them that is one whole shard, so no two tasks ever
write one. From the last of these levels squares of the same size make the next ones, stage by
stage: the memory of a task does not depend on the area.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from aeheight.arrays import consolidate, create_coordinates, create_layer
from aeheight.conventions import coordinates, group_attributes, pyramid_attributes
from aeheight.grid import Grid
from aeheight.settings import fingerprint
from aeheight.shards import encode_shard
from aeheight.store import Store, plain_errors
from aeheight.template import Layer
from aeheight.windows import Region, tile

Heights = NDArray[np.float32]

_STRIP = 512
"""Rows that are averaged at once."""


@dataclass(frozen=True, slots=True)
class Pyramid:
    """All that is fixed before the first pixel is written."""

    grids: tuple[Grid, ...]
    """Of the zones, at full resolution."""
    layers: tuple[Layer, ...]
    """All float32, NaN where there is nothing."""
    years: tuple[int, ...]
    chunk: int
    """Edge of a chunk, pixels; no edge of the coarsest level is longer."""
    steps: int
    """Levels that a square of `tile` pixels makes below its own."""
    title: str

    @property
    def tile(self) -> int:
        """Edge of the squares that tasks work on, pixels of the level that they read."""
        return self.chunk << self.steps

    @property
    def version(self) -> str:
        """Fingerprint of all this."""
        layers = [[each.bare(), dict(each.attributes)] for each in self.layers]
        return fingerprint(asdict(self) | {"layers": layers})

    def levels(self, grid: Grid) -> list[Grid]:
        """A zone's grids, from its own to one of `chunk` pixels at most."""
        found = [grid]
        while max(found[-1].shape) > self.chunk:
            fine = found[-1]
            shape = ceil(fine.shape[0] / 2), ceil(fine.shape[1] / 2)
            found.append(Grid(fine.crs, fine.resolution * 2, fine.left, fine.top, shape))
        return found

    def stages(self, grid: Grid) -> list[range]:
        """The levels that each stage makes, one after the other.

        The first reads the map and makes level 0 too; each other reads the level above its first.
        """
        last, every = len(self.levels(grid)) - 1, self.steps
        later = [range(n + 1, min(n + every, last) + 1) for n in range(every, last, every)]
        return [range(min(every, last) + 1), *later]

    def squares(self, grid: Grid, stage: int, ground: Sequence[Region]) -> Iterator[Region]:
        """The squares of a stage that hold some ground, in pixels of the level that it reads.

        Args:
            grid: of a zone.
            stage: from 0.
            ground: the squares of stage 0 that hold any.
        """
        level = stage * self.steps
        edge = self.tile << level
        wanted = {(each.row // edge, each.col // edge) for each in ground}
        for square in tile(self.levels(grid)[level].shape, self.tile):
            if (square.row // self.tile, square.col // self.tile) in wanted:
                yield square

    def shard(self, level: int) -> int:
        """Edge of a level's shards, pixels."""
        return self.tile >> ((level - 1) % self.steps + 1 if level else 0)

    def metadata(self) -> dict[str, bytes]:
        """Every object but the pixels: groups, arrays and coordinates, consolidated; by key."""
        held: dict[str, Buffer] = {}
        store = MemoryStore(held)
        root = zarr.create_group(store, zarr_format=3, attributes={"title": self.title})
        for grid in self.grids:
            levels = self.levels(grid)
            zone = root.create_group(grid.name, attributes=pyramid_attributes(levels))
            for number, coarse in enumerate(levels):
                self._create_level(zone, number, coarse)
        consolidate(store)
        return {key: data.to_bytes() for key, data in sorted(held.items())}

    def _create_level(self, zone: "zarr.Group", number: int, grid: Grid) -> None:
        group = zone.create_group(str(number), attributes=group_attributes(grid))
        create_coordinates(group, coordinates(grid, self.years, ()))
        sizes = {"time": len(self.years), "y": grid.shape[0], "x": grid.shape[1]}
        for layer in self.layers:
            create_layer(group, layer, sizes, self.shard(number), self.chunk)

    def read(
        self, store: Store, zone: str, level: int, layer: Layer, year: int | None, region: Region
    ) -> Heights:
        """Pixels of a level that was written.

        Raises:
            OSError: a chunk is damaged or cannot be read.
        """
        opened: Any = store.zarr(read_only=True)
        path = f"{zone}/{level}/{layer.name}"
        try:
            with plain_errors(f"read {store.uri}/{path}"):
                array = zarr.open_array(opened, path=path, mode="r")
                time = (self.years.index(year),) if layer.timed and year is not None else ()
                values: Heights = np.asarray(array[(*time, *region.slices)], dtype=np.float32)
        except ValueError as error:
            raise OSError(f"{store.uri}/{path}: {region.name} is damaged: {error}") from error
        return values

    def write(
        self,
        store: Store,
        zone: str,
        levels: range,
        layer: Layer,
        year: int | None,
        square: Region,
        values: Heights,
    ) -> dict[str, str]:
        """Write a square's shards of some levels.

        Args:
            store: of the pyramid.
            zone: name of its group.
            levels: the levels to write; `values` is of the first, or of the one before it.
            layer: of which the pixels are.
            year: None for a layer without a time axis.
            square: place of `values`, in pixels of the level that was read.
            values: (rows, columns).

        Returns:
            SHA-256 of every object that was stored, by its key; all NaN stores none.

        Raises:
            OSError: the store cannot be written.
        """
        stored: dict[str, str] = {}
        time = [self.years.index(year)] if layer.timed and year is not None else []
        place = square.row // self.tile, square.col // self.tile
        for level in levels:
            if level:
                values = halved(values)
            key = "/".join([zone, str(level), layer.name, "c", *map(str, [*time, *place])])
            data = encode_shard(values, self.shard(level), self.chunk, np.nan)
            if data is None:
                store.remove_many([key])
                continue
            store.write(key, data)
            stored[key] = hashlib.sha256(data).hexdigest()
        return stored


def halved(values: Heights) -> Heights:
    """Means of the known among four pixels: (rows, columns) to half of each, rounded up.

    NaN where none of the four is known; past the edge of `values` nothing is.
    """
    rows, cols = values.shape
    out = np.empty((ceil(rows / 2), ceil(cols / 2)), np.float32)
    for top in range(0, rows, _STRIP):
        strip = values[top : top + _STRIP]
        rim = ((0, len(strip) % 2), (0, cols % 2))
        whole = np.pad(strip, rim, constant_values=np.nan).astype(np.float64)
        four = whole.reshape(-1, 2, out.shape[1], 2)
        known = np.isfinite(four)
        count = known.sum(axis=(1, 3))
        total = np.where(known, four, 0).sum(axis=(1, 3))
        means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        out[top // 2 : top // 2 + len(means)] = means
    return out
