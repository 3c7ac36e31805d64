"""One tile of embeddings, as headers or an index describe it: where it lies, and in which files."""

from dataclasses import dataclass, field
from math import ceil, floor
from typing import Literal

from aeheight.errors import InputError
from aeheight.grid import Grid, reproject_bounds
from aeheight.settings import AccessSettings
from aeheight.windows import Region


@dataclass(frozen=True, slots=True)
class TileFile:
    """One file of a tile."""

    href: str
    bands: tuple[int, ...] = ()
    """The embedding band (0 to 63) that each of its bands holds, in order; empty: all 64."""
    zero_is_missing: bool = False
    """A float export that declares 0: a pixel is missing where all its bands are 0."""


@dataclass(frozen=True, slots=True)
class EmbeddingTile:
    """All 64 bands of some ground in one year, as headers or an index describe them."""

    files: tuple[TileFile, ...]
    """One file, or several that hold some of the bands each."""
    grid: Grid
    """Its pixels, north-up, whichever way up the files are."""
    year: int
    kind: Literal["raster", "zarr"] = "raster"
    block: int = 1
    """Edge of the squares it is stored in, counted from its corners, in pixels; 1: unknown."""

    @property
    def href(self) -> str:
        """The (first) file."""
        return self.files[0].href

    def placed(self, grid: Grid) -> Region:
        """The tile as a region of `grid` (which it may reach past).

        Raises:
            InputError: the tile is in another CRS or on another pixel lattice.
        """
        row, col = grid.offset(self.grid.left, self.grid.top)
        same = (
            self.grid.crs == grid.crs
            and abs(self.grid.resolution / grid.resolution - 1) < 1e-6
            and abs(row - round(row)) < 1e-3
            and abs(col - round(col)) < 1e-3
        )
        if not same:
            raise InputError(
                f"{self.href} ({self.grid.crs}, {self.grid.resolution} units a pixel, corner "
                f"{self.grid.left}, {self.grid.top}) is not on the grid's lattice ({grid.crs}, "
                f"{grid.resolution}, {grid.left}, {grid.top}); embeddings are never resampled: "
                "leave grid out, or give it the tiles' CRS, resolution and pixel edges"
            )
        return Region(round(row), round(col), *self.grid.shape)

    def reaches(self, grid: Grid) -> Region | None:
        """The pixels of `grid`'s lattice that the tile may touch, exact in its own CRS.

        None where it cannot be shown in the grid's CRS.
        """
        if self.grid.crs == grid.crs:
            return self.placed(grid)
        try:
            west, south, east, north = reproject_bounds(self.grid.bounds, self.grid.crs, grid.crs)
        except InputError:
            return None
        if not west < east:
            return None
        (top, left), (bottom, right) = grid.offset(west, north), grid.offset(east, south)
        row, col = floor(top) - 1, floor(left) - 1
        return Region(row, col, ceil(bottom) + 1 - row, ceil(right) + 1 - col)


@dataclass(frozen=True, slots=True)
class EmbeddingSource:
    """The tiles of one grid."""

    tiles: tuple[EmbeddingTile, ...]
    """In order of precedence: where two overlap, the first valid pixel counts; those of the grid's
    own zone come first."""
    access: AccessSettings = field(default_factory=AccessSettings)
