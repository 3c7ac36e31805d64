"""The patches that training draws straight from cubes."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import ceil, isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeheight.cube import Tree
from aeheight.embeddings import BANDS, valid
from aeheight.pool import Pool, shuffled, stretch
from aeheight.splits import TRAIN, VALIDATION
from aeheight.windows import STRIDE, Region, Shape, tile

FEWEST = 128
"""Patches an epoch on small ground: with fewer, an epoch is too short a step to judge by."""

CACHE_BYTES = 2**31
"""Decoded ground that training keeps in memory."""

PIXEL_BYTES = BANDS + 4 + 4 + 1
"""Of a decoded pixel: codes, height, prior, use."""

_BLOCK = 1024
"""Pixels along a block of ground that is read and held as a whole, where there is room for many."""
_CHUNKS = 2
"""Along a block at least: blocks of one chunk would begin at the same places in every epoch."""
_BLOCKS = 16
"""As many must have room, or they are made smaller: patches of few blocks are too alike."""


@dataclass(frozen=True, slots=True)
class Patch:
    """A piece of ground as training sees it; p rows and columns (or any rectangle)."""

    codes: NDArray[np.int8]
    """(64, p, p) AlphaEarth codes, -128 where there is none."""
    height: NDArray[np.float32]
    """(p, p) reference in metres, NaN where there is none."""
    prior: NDArray[np.float32] | None
    """(p, p) prior in metres, NaN where there is none; None in a region without a prior."""
    use: NDArray[np.uint8]
    """(p, p) 0 unused, 1 train, 2 validation, 3 test."""
    place: tuple[int, int, int] = (0, 0, 0)
    """Which grid it lies on, whatever the year, and row and column there of its first pixel."""

    def blocks(self, edge: int) -> NDArray[np.int64]:
        """(p, p) the block of ground, of `edge` pixels from the grid's corner, of each pixel."""
        grid, row, col = self.place
        height, width = self.use.shape
        rows, cols = ((start + np.arange(n)) // edge for start, n in ((row, height), (col, width)))
        numbers: NDArray[np.int64] = (grid << 48) + (rows[:, None] << 24) + cols
        return numbers

    def core(self, margin: int) -> "Patch":
        """The patch without so many pixels on every side."""
        if not margin:
            return self
        grid, row, col = self.place
        inner = (..., slice(margin, -margin), slice(margin, -margin))
        return Patch(
            self.codes[inner],
            self.height[inner],
            None if self.prior is None else self.prior[inner],
            self.use[inner],
            (grid, row + margin, col + margin),
        )

    def usable(self, use: int) -> NDArray[np.bool_]:
        """(p, p) pixels of one use that have both an embedding and a reference."""
        usable: NDArray[np.bool_] = (self.use == use) & valid(self.codes) & ~np.isnan(self.height)
        return usable

    @property
    def nbytes(self) -> int:
        """Of all its arrays."""
        prior = 0 if self.prior is None else self.prior.nbytes
        return self.codes.nbytes + self.height.nbytes + prior + self.use.nbytes


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a patch lies."""

    group: str
    year: int
    region: Region
    cube: int = 0
    """Which of the cubes."""
    block: Region | None = None
    """The ground that is read and held as a whole for it; None: the chunks that it touches."""


def _in_order(spot: Spot) -> tuple[int, str, int, Region]:
    return spot.cube, spot.group, spot.year, spot.region


@dataclass(slots=True)
class Patches:
    """Training's view of cubes: what to sweep, where to look each epoch, what lies there."""

    tree: Tree
    edge: int
    """Edge of a patch in pixels."""
    seed: int
    per_epoch: int | None = None
    """Patches an epoch; None: as many as cover the training ground once, 128 at least."""
    cache_bytes: int = CACHE_BYTES
    """Decoded ground that is kept in memory. Where all training ground fits, spots come in a wholly
    random order; else block by block."""
    block: int = 256
    """Edge of a block of the split, pixels: the errors within one go together."""
    also: Sequence[Tree] = ()
    """Further cubes that are drawn from alike."""
    pool: Pool[Spot, Patch] = field(init=False)
    """What is held."""
    _train: dict[Spot, int] = field(default_factory=dict)
    _validation: dict[Spot, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pool = Pool(self._load, self.cache_bytes)

    @property
    def trees(self) -> tuple[Tree, ...]:
        """All cubes."""
        return (self.tree, *self.also)

    @property
    def has_prior(self) -> bool:
        """Whether patches have a prior: where every cube has one."""
        return all("prior" in {x.name for x in tree.template.layers} for tree in self.trees)

    def sweep(self) -> Iterator[Patch]:
        """Every shard that trains or validates, once; counts the usable ground on the way."""
        self._train.clear()
        self._validation.clear()
        for cube, tree in enumerate(self.trees):
            for shard in tree.template.shards("embedding"):
                assert shard.year is not None
                spot = Spot(shard.group, shard.year, shard.region, cube)
                use = tree.read(spot.group, "split", None, spot.region)
                if np.isin(use, (TRAIN, VALIDATION)).any():
                    patch = self._load(spot)
                    self._count(spot, patch)
                    yield patch

    def _count(self, spot: Spot, patch: Patch) -> None:
        """Count usable pixels by cells, squares of the patch's size on the grid's corner."""
        for use, counts in ((TRAIN, self._train), (VALIDATION, self._validation)):
            usable = patch.usable(use)
            for cell in self._cells(spot.region):
                shared = cell.intersect(spot.region)
                assert shared is not None
                number = int(usable[shared.within(spot.region).slices].sum())
                if number:
                    key = replace(spot, region=cell)
                    counts[key] = counts.get(key, 0) + number

    def _cells(self, region: Region) -> Iterator[Region]:
        top, left = region.row // self.edge, region.col // self.edge
        corner = Region(
            top * self.edge,
            left * self.edge,
            region.bottom - top * self.edge,
            region.right - left * self.edge,
        )
        for cell in tile(corner.shape, self.edge):
            yield Region(corner.row + cell.row, corner.col + cell.col, self.edge, self.edge)

    def epoch(self, number: int) -> Sequence[Spot]:
        """Spots of one epoch: ground is drawn in proportion to its usable training pixels.

        A spot is a cell moved by up to half a patch each way, kept inside the grid where the grid
        is as large as a patch, and inside its block where not all ground can be held. The same seed
        and number give the same spots.
        """
        cells = sorted(self._train, key=_in_order)
        counts = np.array([self._train[cell] for cell in cells], dtype=np.float64)
        wanted = self.per_epoch or max(ceil(counts.sum() / self.edge**2), FEWEST)
        rng = np.random.default_rng([self.seed, number])
        chosen = rng.choice(len(cells), size=wanted, p=counts / counts.sum())
        moves = rng.integers(-(self.edge // 2), self.edge // 2, size=(wanted, 2), endpoint=True)
        spots = [self._moved(cells[i], *move) for i, move in zip(chosen, moves, strict=True)]
        if self.ground_bytes() <= self.cache_bytes:
            self.pool.expect({})
            return spots
        return self._by_blocks(spots, rng)

    def _moved(self, cell: Spot, down: int, right: int) -> Spot:
        rows, cols = self._shape(cell)
        row = min(max(cell.region.row + int(down), 0), max(rows - self.edge, 0))
        col = min(max(cell.region.col + int(right), 0), max(cols - self.edge, 0))
        return replace(cell, region=Region(row, col, self.edge, self.edge))

    def _shape(self, spot: Spot) -> Shape:
        return self.trees[spot.cube].template.grid(spot.group).shape

    def ground_bytes(self) -> int:
        """Of all chunks that hold training ground, decoded; known after a sweep."""
        chunks = {unit for cell in self._train for unit in self._units(cell)}
        return sum(PIXEL_BYTES * unit.region.size for unit in chunks)

    def _by_blocks(self, spots: Sequence[Spot], rng: np.random.Generator) -> Sequence[Spot]:
        """Spots moved into blocks that are cut anew each epoch, and ordered by them."""
        shift = rng.random(2)
        spots = [self._in_block(spot, *shift) for spot in spots]
        needed: dict[Spot, Region] = {}
        for spot in spots:
            key = _block_of(spot)
            needed[key] = _around(spot.region, needed.get(key))
        read = {key: self._in_chunks(key.cube, region) for key, region in needed.items()}
        spots = [replace(spot, block=read[_block_of(spot)]) for spot in spots]
        blocks = [_block_of(spot) for spot in spots]
        order = shuffled(blocks, _bytes_of, self.cache_bytes, rng)
        self.pool.expect(Counter(blocks))
        return [spots[i] for i in order]

    def _in_block(self, spot: Spot, down: float, right: float) -> Spot:
        """A spot moved into the block of its middle; `down` and `right` say where blocks begin."""
        chunk = self.trees[spot.cube].template.cut.chunk
        room = isqrt(self.cache_bytes // (_BLOCKS * PIXEL_BYTES))
        edge = max(min(_BLOCK, room) // chunk, ceil(self.edge / chunk), _CHUNKS) * chunk

        def along(at: int, size: int, share: float) -> tuple[int, int, int]:
            """Where the patch begins, and where its block begins and ends."""
            middle, least = min(at + self.edge // 2, size - 1), min(self.edge, size)
            start, stop = stretch(middle, size, edge, int(share * edge / chunk) * chunk, least)
            return max(min(at, stop - self.edge), start), start, stop

        rows, cols = self._shape(spot)
        row, top, bottom = along(spot.region.row, rows, down)
        col, left, end = along(spot.region.col, cols, right)
        return replace(
            spot,
            region=Region(row, col, self.edge, self.edge),
            block=Region(top, left, bottom - top, end - left),
        )

    def _in_chunks(self, cube: int, region: Region) -> Region:
        """The chunks that a region touches, as a region."""
        chunk = self.trees[cube].template.cut.chunk
        top, left = region.row // chunk * chunk, region.col // chunk * chunk
        bottom, right = (ceil(end / chunk) * chunk for end in (region.bottom, region.right))
        return Region(top, left, bottom - top, right - left)

    def validation(self) -> Sequence[Spot]:
        """Fixed spots, without overlap, that cover every usable validation pixel."""
        return sorted(self._validation, key=_in_order)

    def squares(self, edge: int, count: int) -> Sequence[Spot]:
        """Up to `count` squares of ground, to see how the network behaves away from patches.

        They lie where the last `sweep` found ground that trains or validates, at least half as much
        as in the square with most of it: embeddings are not far. They overlap by less than half,
        and only at the far edges of a grid. Equal sweeps give equal squares.

        Args:
            edge: pixels; reduced to a multiple of 32, and where a grid is smaller.
            count: of all groups and years together, evenly out of all that qualify.

        Returns:
            Their spots; empty where no grid holds a square of 64 px.
        """
        counts: Counter[Spot] = Counter()
        for cells in (self._train, self._validation):
            for cell, number in cells.items():
                if square := self._square(cell, edge):
                    counts[square] += number
        enough = max(counts.values(), default=0) / 2
        found = sorted((s for s in counts if counts[s] >= enough), key=_in_order)
        picked = min(count, len(found))
        return [found[(2 * k + 1) * len(found) // (2 * picked)] for k in range(picked)]

    def _square(self, cell: Spot, edge: int) -> Spot | None:
        """The square, of those that tile its grid, in which the corner of a cell lies."""
        rows, cols = self._shape(cell)
        edge = min(edge, rows, cols) // STRIDE * STRIDE
        if edge < 2 * STRIDE:
            return None
        row = min(cell.region.row // edge * edge, rows - edge)
        col = min(cell.region.col // edge * edge, cols - edge)
        return replace(cell, region=Region(row, col, edge, edge))

    def read(self, spot: Spot, margin: int = 0) -> Patch:
        """The patch of a spot; ground that was read lately is kept in memory.

        Args:
            spot: where.
            margin: pixels of the ground around it that come with it, on every side.
        """
        if margin:
            spot = replace(spot, region=spot.region.expand(margin), block=None)
        units = [_block_of(spot)] if spot.block else self._units(spot)
        found = _cut(spot.region, [(unit.region, self.pool.get(unit)) for unit in units])
        return replace(found, place=self._place(spot))

    def _place(self, spot: Spot) -> tuple[int, int, int]:
        names = [
            (i, grid.name) for i, tree in enumerate(self.trees) for grid in tree.template.grids
        ]
        return names.index((spot.cube, spot.group)), spot.region.row, spot.region.col

    def _units(self, spot: Spot) -> list[Spot]:
        """The chunks that a spot touches."""
        edge, region = self.trees[spot.cube].template.cut.chunk, spot.region
        rows = range(region.row // edge * edge, region.bottom, edge)
        cols = range(region.col // edge * edge, region.right, edge)
        return [
            replace(spot, region=Region(row, col, edge, edge), block=None)
            for row, col in product(rows, cols)
        ]

    def _load(self, spot: Spot) -> Patch:
        def read(layer: str, year: int | None = None) -> NDArray[Any]:
            return self.trees[spot.cube].read(spot.group, layer, year, spot.region)

        return Patch(
            codes=read("embedding", spot.year),
            height=read("height"),
            prior=read("prior") if self.has_prior else None,
            use=read("split"),
            place=self._place(spot),
        )


def _block_of(spot: Spot) -> Spot:
    assert spot.block is not None
    return replace(spot, region=spot.block, block=None)


def _bytes_of(spot: Spot) -> int:
    return spot.region.size * PIXEL_BYTES


def _around(region: Region, other: Region | None) -> Region:
    """The smallest region that holds both."""
    if other is None:
        return region
    row, col = min(region.row, other.row), min(region.col, other.col)
    bottom, right = max(region.bottom, other.bottom), max(region.right, other.right)
    return Region(row, col, bottom - row, right - col)


def _cut(region: Region, units: Sequence[tuple[Region, Patch]]) -> Patch:
    """The patch of a region out of the pieces of ground that it touches."""

    def joined(take: Callable[[Patch], NDArray[Any]]) -> NDArray[Any]:
        first = take(units[0][1])
        out = np.empty((*first.shape[:-2], *region.shape), first.dtype)
        for square, patch in units:
            shared = square.intersect(region)
            assert shared is not None
            out[(..., *shared.within(region).slices)] = take(patch)[
                (..., *shared.within(square).slices)
            ]
        return out

    return Patch(
        codes=joined(lambda patch: patch.codes),
        height=joined(lambda patch: patch.height),
        prior=None if units[0][1].prior is None else joined(_prior),
        use=joined(lambda patch: patch.use),
    )


def _prior(patch: Patch) -> NDArray[np.float32]:
    assert patch.prior is not None
    return patch.prior
