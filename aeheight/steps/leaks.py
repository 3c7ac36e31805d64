"""Ground that is judged in this run and taught by another: a test of it would be flattered."""

import numpy as np
from numpy.typing import NDArray

from aeheight.cube import Tree
from aeheight.grid import Bounds, Grid, reproject_bounds, transformer
from aeheight.settings import RegionSettings
from aeheight.splits import TEST, TRAIN, UNUSED, VALIDATION
from aeheight.steps.split import draw
from aeheight.template import Shard
from aeheight.windows import Region, tile

_DEGREES = "EPSG:4326"
_SQUARE = 512
"""Pixels: what is looked up at once, so that memory does not grow with the shard."""


def leaks(settings: RegionSettings, own: Tree, other: Tree) -> int:
    """How many pixels of this run's cube are judged here and taught by another cube.

    That is what tests here and trains or validates there, or validates here and trains there, with
    a reference height in both. A pixel is looked up by its centre in the other's grids: exactly
    where both have one lattice, else it is the pixel there that the centre lies in.

    Args:
        settings: of this run; its split need not be recorded yet.
        own: this run's cube.
        other: another run's cube, with its split.
    """
    total = 0
    boxes = [(grid, _box(grid)) for grid in other.template.grids]
    for shard in own.template.shards("split"):
        here = _box(own.template.grid(shard.group).part(shard.region))
        if facing := [grid for grid, box in boxes if _meet(here, box)]:
            total += _in_shard(settings, own, shard, other, facing)
    return total


def _box(grid: Grid) -> Bounds:
    return reproject_bounds(grid.bounds, grid.crs, _DEGREES)


def _meet(one: Bounds, other: Bounds) -> bool:
    """Whether two boxes in degrees share ground; west may be above east."""
    if one[1] > other[3] or other[1] > one[3]:
        return False
    return any(
        (b[0] - a[0]) % 360 <= a[2] - a[0] + 360 * (a[2] < a[0])
        for a, b in ((one, other), (other, one))
    )


def _in_shard(
    settings: RegionSettings, own: Tree, shard: Shard, other: Tree, facing: list[Grid]
) -> int:
    """The number in one shard, given the grids of the other cube that reach it."""
    use = draw(settings, own.template, shard)
    use[np.isnan(own.read(shard.group, "height", None, shard.region))] = UNUSED
    ground, total = own.template.grid(shard.group).part(shard.region), 0
    for square in tile(shard.region.shape, _SQUARE):
        here = use[square.slices]
        if not np.isin(here, (TEST, VALIDATION)).any():
            continue
        found = np.zeros(here.shape, dtype=bool)
        for grid in facing:
            there = _use_there(ground.part(square), other, grid)
            trains, validates = there == TRAIN, there == VALIDATION
            found |= (here == TEST) & (trains | validates) | (here == VALIDATION) & trains
        total += int(found.sum())
    return total


def _use_there(ground: Grid, other: Tree, grid: Grid) -> NDArray[np.uint8]:
    """(rows, columns) what another cube uses some ground for; UNUSED where it has no reference."""
    x, y = transformer(ground.crs, grid.crs).transform(*np.meshgrid(ground.x(), ground.y()))
    if grid.is_geographic:
        x = grid.left + (x - grid.left) % 360
    row = np.floor((grid.top - y) / grid.resolution)
    col = np.floor((x - grid.left) / grid.resolution)
    inside = (row >= 0) & (row < grid.shape[0]) & (col >= 0) & (col < grid.shape[1])
    out = np.full(ground.shape, UNUSED, dtype=np.uint8)
    if inside.any():
        rows, cols = row[inside].astype(np.int64), col[inside].astype(np.int64)
        top, left = int(rows.min()), int(cols.min())
        seen = Region(top, left, int(rows.max()) + 1 - top, int(cols.max()) + 1 - left)
        use = other.read(grid.name, "split", None, seen)
        use[np.isnan(other.read(grid.name, "height", None, seen))] = UNUSED
        out[inside] = use[rows - top, cols - left]
    return out
