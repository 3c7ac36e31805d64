"""From tiles to grids: one group a UTM zone, each on its native lattice, and the shards to make.

Every zone's grid reaches `cube.halo` pixels past its edge where another zone goes on, so that
predictions can meet there. A shard is made where it touches the area of interest, its zone (grown
by the halo), and at least one tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeheight.errors import InputError
from aeheight.grid import Grid, near_own, reproject_bounds, utm_zone
from aeheight.settings import Bounds, RegionSettings
from aeheight.sources.areas import boxes, clipped, squares_inside
from aeheight.sources.tile import EmbeddingTile
from aeheight.windows import Region, Runs, runs_of, whole

_MARGIN = 1.0
"""Degrees past a zone's edge in which its halo surely lies."""
_FAR = 10.0
"""Degrees from its central meridian up to which a zone's coordinates are used."""


@dataclass(frozen=True, slots=True)
class Plot:
    """One group of the cube, before its heights are known."""

    grid: Grid
    runs: Runs | None
    """The shards to make; None: all."""
    tiles: tuple[EmbeddingTile, ...]
    """That touch the grid; its own zone's first."""


def search_boxes(settings: RegionSettings, shapes: Sequence[Any] | None) -> list[Bounds] | None:
    """Where tiles are to be looked for, in degrees; None: everywhere."""
    if settings.grid:
        bounds = reproject_bounds(settings.grid.bounds, settings.grid.crs, "EPSG:4326")
        west, south, east, north = bounds
        sides = [(west, east)] if west < east else [(west, 180.0), (-180.0, east)]
        return [(w, south, e, north) for w, e in sides]
    if shapes is None:
        return None
    edge = 0.1  # degrees: more than any halo
    return [
        (max(w - edge, -180), max(s - edge, -90), min(e + edge, 180), min(n + edge, 90))
        for w, s, e, n in boxes(shapes)
    ]


def lay_out(
    settings: RegionSettings, tiles: Sequence[EmbeddingTile], shapes: Sequence[Any] | None
) -> list[Plot]:
    """The groups of a region.

    Args:
        settings: `grid` and `cube`.
        tiles: of all zones.
        shapes: the area of interest, polygons in degrees; None: wherever tiles are.

    Raises:
        InputError: tiles that fit no common lattice, or nothing that touches the region.
    """
    if settings.grid:
        wanted = settings.grid
        grids = [Grid.from_bounds(wanted.crs, wanted.resolution, wanted.bounds)]
    else:
        grids = _zone_grids(settings, tiles, shapes)
    plots = [_plot(settings, grids, grid, tiles, shapes) for grid in grids]
    made = [plot for plot in plots if plot.runs != ()]
    if not made:
        raise InputError(_nothing(settings, grids, tiles))
    return made


def _nothing(
    settings: RegionSettings, grids: Sequence[Grid], tiles: Sequence[EmbeddingTile]
) -> str:
    first = tiles[0]
    where = f"the first of the {len(tiles)} covers {list(first.grid.bounds)} ({first.grid.crs})"
    if settings.grid:
        grid = grids[0]
        return (
            f"no tile touches the grid {list(grid.bounds)} ({grid.crs})"
            + (f" within aoi {settings.aoi!r}" if settings.aoi else "")
            + f"; {where}: mend grid.crs, grid.bounds or the href, or leave grid out"
        )
    return (
        f"aoi {settings.aoi!r} misses the tiles: {where}; it is in degrees: west, south, east, "
        "north"
    )


def _plot(
    settings: RegionSettings,
    grids: Sequence[Grid],
    grid: Grid,
    tiles: Sequence[EmbeddingTile],
    shapes: Sequence[Any] | None,
) -> Plot:
    edge = settings.cube.shard
    touching = [tile for tile in _in_order(settings, grid, tiles) if _touches(tile, grid)]
    chosen = _wanted(settings, grids, grid, shapes) & _tiled(touching, grid, edge)
    runs = None if chosen.all() else runs_of(chosen)
    return Plot(grid, runs, tuple(touching))


def _in_order(
    settings: RegionSettings, grid: Grid, tiles: Sequence[EmbeddingTile]
) -> list[EmbeddingTile]:
    """A zone's own tiles, then those of its neighbours."""
    own = [tile for tile in tiles if tile.grid.crs == grid.crs]
    if settings.grid:
        # One grid was asked for: a tile of another CRS on it is a mistake, not a neighbour.
        for tile in tiles:
            if tile.grid.crs != grid.crs and _touches(tile, grid):
                tile.placed(grid)
        return own
    return own + [tile for tile in tiles if tile.grid.crs != grid.crs]


def _touches(tile: EmbeddingTile, grid: Grid) -> bool:
    place = tile.reaches(grid)
    return place is not None and place.intersect(whole(grid.shape)) is not None


def _wanted(
    settings: RegionSettings, grids: Sequence[Grid], grid: Grid, shapes: Sequence[Any] | None
) -> NDArray[np.bool_]:
    """(rows, columns) of shards that lie in the area of interest and near the zone."""
    edge = settings.cube.shard
    wanted = near_own(grids, grid, edge, settings.cube.halo)
    if shapes is not None:
        wanted &= squares_inside(shapes, grid, edge)
    return wanted


def _tiled(tiles: Sequence[EmbeddingTile], grid: Grid, edge: int) -> NDArray[np.bool_]:
    """(rows, columns) of shards that some tile may touch."""
    board = np.zeros([-(-size // edge) for size in grid.shape], dtype=bool)
    for tile in tiles:
        place = tile.reaches(grid)
        shared = place and place.intersect(whole(grid.shape))
        if shared:
            board[
                shared.row // edge : (shared.bottom - 1) // edge + 1,
                shared.col // edge : (shared.right - 1) // edge + 1,
            ] = True
    return board


def _zone_grids(
    settings: RegionSettings, tiles: Sequence[EmbeddingTile], shapes: Sequence[Any] | None
) -> list[Grid]:
    """The grids that the tiles fix: those with ground of their own in the area of interest."""
    by_crs: dict[str, list[EmbeddingTile]] = {}
    for tile in tiles:
        by_crs.setdefault(tile.grid.crs, []).append(tile)
    _refuse_mixture(tiles, by_crs)
    lattices = [by_crs[crs][0].grid for crs in sorted(by_crs)]
    drafts = [_draft(settings, lattices, by_crs[grid.crs], tiles, shapes) for grid in lattices]
    grids = [grid for grid in drafts if grid]
    edge = settings.cube.shard
    own = [
        grid
        for grid in grids
        if (
            near_own(grids, grid, edge, 0)
            & (True if shapes is None else squares_inside(shapes, grid, edge))
            & _tiled([t for t in tiles if _touches(t, grid)], grid, edge)
        ).any()
    ]
    return [_trimmed(settings, own, grid, tiles, shapes) for grid in own]


def _refuse_mixture(tiles: Sequence[EmbeddingTile], by_crs: dict[str, list[EmbeddingTile]]) -> None:
    first = tiles[0]
    for tile in tiles:
        if abs(tile.grid.resolution / first.grid.resolution - 1) > 1e-6:
            raise InputError(
                f"the tiles lie in several resolutions: {first.href} has pixels of "
                f"{first.grid.resolution}, {tile.href} of {tile.grid.resolution}; name those of one"
            )
    strange = [crs for crs in sorted(by_crs) if utm_zone(crs) is None]
    if len(by_crs) > 1 and strange:
        named = [f"{by_crs[crs][0].href} in {crs}" for crs in sorted(by_crs)]
        raise InputError(
            f"the tiles lie in several CRS that are not all UTM zones: {'; '.join(named[:4])}; "
            "name the tiles of one, or of UTM zones only"
        )


def _draft(
    settings: RegionSettings,
    lattices: Sequence[Grid],
    own: Sequence[EmbeddingTile],
    tiles: Sequence[EmbeddingTile],
    shapes: Sequence[Any] | None,
) -> Grid | None:
    """The box of all that may belong to a zone, on the lattice of its own tiles; None: nothing."""
    first = own[0].grid
    own_places = [tile.placed(first) for tile in own]
    if shapes is None:
        near = [tile for tile in tiles if _is_neighbour(tile.grid.crs, first.crs)]
        cover = _hull([*own_places, *filter(None, (tile.reaches(first) for tile in near))])
        return first.part(_snapped(settings, cover, own) if near else cover)
    areas = [_pixels(first, area) for area in _within_zone(first.crs, len(lattices) > 1, shapes)]
    if not areas:
        return None
    return first.part(_snapped(settings, _hull(areas), own))


def _is_neighbour(crs: str, other: str) -> bool:
    one, two = utm_zone(crs), utm_zone(other)
    if one is None or two is None:
        return False
    return crs != other and (one.number - two.number) % 60 in (0, 1, 59)


def _within_zone(crs: str, several: bool, shapes: Sequence[Any]) -> list[Bounds]:
    """Boxes of the area of interest, cut to where a zone's coordinates are used."""
    zone = utm_zone(crs)
    if zone is None:
        return boxes(shapes)
    reach = 3 + _MARGIN if several else _FAR
    cut = [clipped(box, zone.meridian - reach, zone.meridian + reach) for box in boxes(shapes)]
    return [box for box in cut if box]


def _pixels(lattice: Grid, degrees: Bounds) -> Region:
    west, south, east, north = reproject_bounds(degrees, "EPSG:4326", lattice.crs)
    (top, left), (bottom, right) = lattice.offset(west, north), lattice.offset(east, south)
    row, col = floor(top), floor(left)
    return Region(row, col, max(ceil(bottom) - row, 1), max(ceil(right) - col, 1))


def _hull(regions: Sequence[Region]) -> Region:
    top, left = min(r.row for r in regions), min(r.col for r in regions)
    bottom, right = max(r.bottom for r in regions), max(r.right for r in regions)
    return Region(top, left, bottom - top, right - left)


def _snapped(settings: RegionSettings, cover: Region, own: Sequence[EmbeddingTile]) -> Region:
    """Grown outward to the edges of the first tile's blocks: so no block is read by two tasks.

    What fits into one shard stays as it is: there is one task.
    """
    blocks = {tile.block for tile in own}
    if max(cover.shape) <= settings.cube.shard or len(blocks) > 1:
        return cover
    block = blocks.pop()
    row, col = cover.row // block * block, cover.col // block * block
    height = -(-(cover.bottom - row) // block) * block
    return Region(row, col, height, -(-(cover.right - col) // block) * block)


def _trimmed(
    settings: RegionSettings,
    grids: Sequence[Grid],
    grid: Grid,
    tiles: Sequence[EmbeddingTile],
    shapes: Sequence[Any] | None,
) -> Grid:
    """Without the rows and columns of shards at its rim that lie beyond its zone's halo.

    Which tiles there are today moves the rim only where no area of interest fixes it.
    """
    edge = settings.cube.shard
    wanted = _wanted(settings, grids, grid, shapes)
    if shapes is None:
        wanted &= _tiled([tile for tile in tiles if _touches(tile, grid)], grid, edge)
    rows, cols = np.flatnonzero(wanted.any(axis=1)), np.flatnonzero(wanted.any(axis=0))
    row, col = int(rows[0]) * edge, int(cols[0]) * edge
    bottom = min((int(rows[-1]) + 1) * edge, grid.shape[0])
    right = min((int(cols[-1]) + 1) * edge, grid.shape[1])
    return grid.part(Region(row, col, bottom - row, right - col))
