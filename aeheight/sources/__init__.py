"""Where pixels come from: AlphaEarth tiles, rasters and STAC items, onto any region of a grid.

Plan, then read: `scan` opens headers only and returns `Sources`, a plain value that is stored
beside the receipts and sent to nobody; a task loads it and reads the pixels of its own region.
"""

from dataclasses import dataclass

from pydantic import TypeAdapter

from aeheight.errors import InputError
from aeheight.grid import Grid
from aeheight.settings import RegionSettings
from aeheight.sources.heights import HeightSource, read_heights, scan_heights, touches
from aeheight.sources.tiles import EmbeddingTile, read_embeddings, region_grid, scan_tiles
from aeheight.windows import whole

__all__ = ["EmbeddingTile", "HeightSource", "Sources", "read_embeddings", "read_heights", "scan"]


@dataclass(frozen=True, slots=True)
class Sources:
    """Every file of a run, with what its header says."""

    tiles: tuple[EmbeddingTile, ...]
    """In order of precedence: where two overlap, the first valid pixel counts."""
    height: HeightSource | None
    prior: HeightSource | None

    def to_bytes(self) -> bytes:
        """JSON."""
        return TypeAdapter(Sources).dump_json(self, indent=1)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Sources":
        """The sources of `to_bytes`."""
        return TypeAdapter(cls).validate_json(data)


def scan(settings: RegionSettings) -> tuple[Grid, Sources]:
    """The grid of a region and the files that touch it, from headers alone.

    Raises:
        InputError: a file is missing or is not what the settings say; files that do not fit the
            grid or each other; nothing that touches the grid.
    """
    tiles = scan_tiles(settings)
    grid = region_grid(settings, tiles)
    touching = tuple(tile for tile in tiles if tile.touches(grid))
    if not touching:
        raise InputError(
            f"no tile touches the grid {list(grid.bounds)} ({grid.crs}); the first of the "
            f"{len(tiles)} covers {list(tiles[0].grid.bounds)} ({tiles[0].grid.crs}): "
            "mend grid.crs, grid.bounds or the href, or leave grid out"
        )
    # Every tile is looked at, so that one off the lattice is met now.
    placed = tuple(tile for tile in touching if tile.overlaps(grid))
    if not placed:
        raise InputError(f"no tile shares a pixel with the grid {list(grid.bounds)}")
    heights = {}
    for name, wanted in (("height", settings.height), ("prior", settings.prior)):
        heights[name] = scan_heights(settings, wanted, grid, name) if wanted else None
    _same_datum(settings)
    _share_ground(grid, placed, heights["height"])
    return grid, Sources(placed, heights["height"], heights["prior"])


def _share_ground(
    grid: Grid, tiles: tuple[EmbeddingTile, ...], height: HeightSource | None
) -> None:
    parts = [tile.placed(grid).intersect(whole(grid.shape)) for tile in tiles]
    if height and not any(
        touches(raster, grid.part(part)) for part in parts if part for raster in height.rasters
    ):
        raise InputError(
            f"tiles and height both touch the grid {list(grid.bounds)}, but nowhere the same "
            f"ground: {tiles[0].href} covers {list(tiles[0].grid.bounds)} ({grid.crs}), "
            f"{height.rasters[0].href} {list(height.rasters[0].bounds)} ({height.rasters[0].crs})"
        )


def _same_datum(settings: RegionSettings) -> None:
    height, prior = settings.height, settings.prior
    if height and prior and height.vertical_datum != prior.vertical_datum:
        raise InputError(
            f"height is in {height.vertical_datum}, prior in {prior.vertical_datum}; heights are "
            "not yet converted between datums: bring both to one and name it in both settings"
        )
