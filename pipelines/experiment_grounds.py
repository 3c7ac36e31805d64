"""Ground for experiments: whole regions as arrays, cut into what trains and what tests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from aeheight.cli import main as aeheight
from aeheight.cube import open_tree
from aeheight.embeddings import NODATA
from aeheight.errors import InputError
from aeheight.patches import Patch
from aeheight.settings import SplitSettings
from aeheight.splits import TRAIN, UNUSED, VALIDATION, draw_split
from aeheight.store import Store
from aeheight.windows import STRIDE, Region
from pipelines.demo import WORLD
from pipelines.world import make_world

REGIONS: Final = Path(__file__).parent / "regions"
STORES: Final = Path("runs/experiments")
SIDES: Final = ("west-east", "east-west", "north-south", "south-north")
FOLDS: Final = 5
GROUNDS: Final = {
    "norcal": (*(f"norcal-{side}" for side in SIDES), *(f"norcal-fold{i}" for i in range(FOLDS))),
    "prior": (*(f"prior-{side}" for side in SIDES), *(f"prior-fold{i}" for i in range(FOLDS))),
    "demo": tuple(f"demo-{side}" for side in SIDES[:2]),
}
"""What `--ground` may name as a whole: `norcal-west-east` trains in the west, tests in the east;
`prior` is norcal with a coarse prior that was made of its own heights."""

_COARSE: Final = 8
_NOISE: Final = 10.0
_VALIDATION: Final = 0.2


@dataclass(frozen=True)
class Arrays:
    """A `training.Ground` over whole arrays; a spot is (row, column)."""

    codes: NDArray[np.int8]
    """(64, h, w), h and w multiples of 32 px."""
    height: NDArray[np.float32]
    """(h, w) metres, NaN where there is none."""
    prior: NDArray[np.float32] | None
    """The same."""
    use: NDArray[np.uint8]
    """(h, w) 0 unused, 1 train, 2 validation, 3 test."""
    edge: int = 64
    """Of a patch, pixels."""
    per_epoch: int = 48
    """Patches."""
    seed: int = 0

    block: int = 20
    """Edge of a block of the split, pixels."""

    def cut(self, row: int, col: int, height: int, width: int) -> Patch:
        """The ground below and right of a pixel."""
        part = (..., slice(row, row + height), slice(col, col + width))
        prior = None if self.prior is None else self.prior[part]
        return Patch(self.codes[part], self.height[part], prior, self.use[part], (0, row, col))

    def read(self, spot: tuple[int, int], margin: int = 0) -> Patch:
        """The patch of a spot."""
        edge = self.edge + 2 * margin
        if not margin:
            return self.cut(*spot, edge, edge)
        within = self._padded(margin).cut(*spot, edge, edge)
        return replace(within, place=(0, spot[0] - margin, spot[1] - margin))

    def _padded(self, margin: int) -> "Arrays":
        """With nothing around it."""
        wide = (margin, margin)
        return replace(
            self,
            codes=np.pad(self.codes, [(0, 0), wide, wide], constant_values=NODATA),
            height=np.pad(self.height, wide, constant_values=np.nan),
            prior=None if self.prior is None else np.pad(self.prior, wide, constant_values=np.nan),
            use=np.pad(self.use, wide, constant_values=UNUSED),
        )

    def sweep(self) -> Iterator[Patch]:
        """All of it."""
        yield self.cut(0, 0, *self.height.shape)

    def epoch(self, number: int) -> Sequence[tuple[int, int]]:
        """Spots in proportion to the training pixels in their patches."""
        return self.drawn(self.cut(0, 0, *self.height.shape).usable(TRAIN).astype(float), number)

    def drawn(self, weight: NDArray[np.float64], number: int) -> Sequence[tuple[int, int]]:
        """Spots of epoch `number`, in proportion to the weight (h, w) of the pixels in a patch."""
        sums = np.pad(weight, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
        e = self.edge
        inside = np.maximum(sums[e:, e:] - sums[:-e, e:] - sums[e:, :-e] + sums[:-e, :-e], 0)
        rng = np.random.default_rng([self.seed, number])
        chosen = rng.choice(inside.size, self.per_epoch, p=inside.ravel() / inside.sum())
        rows, cols = np.unravel_index(chosen, inside.shape)
        return list(zip(rows.tolist(), cols.tolist(), strict=True))

    def validation(self) -> Sequence[tuple[int, int]]:
        """Tiles that have validation ground; the last ones are moved up, over unused ground."""
        rows, cols = self.height.shape
        whole = rows // self.edge * self.edge, cols // self.edge * self.edge
        if whole != (rows, cols):
            raise InputError(f"ground of {rows} x {cols} px is no whole number of {self.edge} px")
        spots = [(r, c) for r in range(0, rows, self.edge) for c in range(0, cols, self.edge)]
        return [spot for spot in spots if (self.read(spot).use == VALIDATION).any()]

    def squares(self, edge: int, count: int) -> Sequence[tuple[int, int]]:
        """None: seams do not matter here."""
        return []


def load(name: str, seed: int, edge: int = 64, validation_block: int | None = None) -> Arrays:
    """The ground of a name in `GROUNDS`, its blocks drawn by a seed.

    Args:
        name: such as `norcal-west-east`.
        seed: of the blocks that validate, and of the folds.
        edge: of a patch; the arrays are padded with nodata to a multiple of it.
        validation_block: edge of a block that validates, pixels; None: the region's own.

    Raises:
        InputError: no such ground, or its data is missing.
    """
    if name not in [each for names in GROUNDS.values() for each in names]:
        raise InputError(
            f"no ground {name!r}; there are {', '.join(GROUNDS)} and their parts, "
            f"such as {GROUNDS['norcal'][0]}"
        )
    kind, _, where = name.partition("-")
    codes, height, prior = _region("demo" if kind == "demo" else "norcal")
    block, buffer = (32, 4) if kind == "demo" else (20, 2)
    prior = coarse(height, np.random.default_rng(7)) if kind == "prior" else None
    use = _split(height.shape, where, seed, block, buffer, validation_block or block)
    pads = [(0, -size % max(edge, STRIDE)) for size in height.shape]
    return Arrays(
        codes=np.pad(codes, [(0, 0), *pads], constant_values=NODATA),
        height=np.pad(height, pads, constant_values=np.nan),
        prior=None if prior is None else np.pad(prior, pads, constant_values=np.nan),
        use=np.pad(use, pads, constant_values=UNUSED),
        edge=edge,
        seed=seed,
        block=block,
    )


@lru_cache(1)
def _region(
    name: str,
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32] | None]:
    """Codes (64, h, w), heights and prior (h, w) of a region, ingested once."""
    if name == "demo":
        make_world(WORLD)
    store = STORES / name
    region = str(REGIONS / f"{name}.yaml")
    if code := aeheight(["ingest", region, "--workers", "1", "--set", f"store={store}"]):
        raise InputError(f"{name} was not ingested (exit code {code})")
    tree = open_tree(Store.at(store).child("cube.zarr"))
    (grid,), (year,) = tree.template.grids, tree.template.years
    whole = Region(0, 0, *grid.shape)
    has_prior = any(layer.name == "prior" for layer in tree.template.layers)
    return (
        tree.read(grid.name, "embedding", year, whole),
        tree.read(grid.name, "height", None, whole),
        tree.read(grid.name, "prior", None, whole) if has_prior else None,
    )


def _split(
    shape: tuple[int, ...], where: str, seed: int, block: int, buffer: int, validation_block: int
) -> NDArray[np.uint8]:
    tests = np.pad(_tests((shape[0], shape[1]), where, seed, block), buffer)
    settings = SplitSettings(block=validation_block, buffer=buffer, seed=seed)
    whole = Region(0, 0, shape[0], shape[1])
    return draw_split(settings, (shape[0], shape[1]), whole, tests, _VALIDATION)


def _tests(shape: tuple[int, int], where: str, seed: int, block: int) -> NDArray[np.bool_]:
    """(h, w) the ground that tests: the second side that is named, or a fold of the blocks."""
    if where in SIDES:
        rows, cols = np.indices(shape)
        first = cols < shape[1] // 2 if where in SIDES[:2] else rows < shape[0] // 2
        return ~first if where in ("west-east", "north-south") else first
    blocks = ceil(shape[0] / block), ceil(shape[1] / block)
    dealt = np.random.default_rng([seed, FOLDS]).permutation(blocks[0] * blocks[1]) % FOLDS
    mine = (dealt == int(where.removeprefix("fold"))).reshape(blocks)
    return np.kron(mine, np.ones((block, block), bool))[: shape[0], : shape[1]]


def coarse(height: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """A prior (h, w) in metres, made of the heights themselves.

    Means of 8 x 8 px with noise of 10 m, interpolated, and as much noise in every pixel; what is
    missing counts as the sea.
    """
    there = np.isfinite(height)
    means = _cells(np.where(there, height, 0)) / np.maximum(_cells(there), 1)
    means += rng.normal(0, _NOISE, means.shape)
    means = np.apply_along_axis(_between, 0, means, height.shape[0])
    means = np.apply_along_axis(_between, 1, means, height.shape[1])
    return (means + rng.normal(0, _NOISE, height.shape)).astype(np.float32)


def _cells(values: NDArray[Any]) -> NDArray[np.float64]:
    """Sums over cells of 8 x 8 px; past the edge there is nothing."""
    padded = np.pad(values.astype(np.float64), [(0, -size % _COARSE) for size in values.shape])
    rows, cols = (size // _COARSE for size in padded.shape)
    sums: NDArray[np.float64] = padded.reshape(rows, _COARSE, cols, _COARSE).sum((1, 3))
    return sums


def _between(cells: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    centres = (np.arange(len(cells)) + 0.5) * _COARSE - 0.5
    return np.interp(np.arange(size), centres, cells)


def with_patches(ground: Arrays, per_epoch: int) -> Arrays:
    """The same ground, with so many patches an epoch."""
    return replace(ground, per_epoch=per_epoch)
