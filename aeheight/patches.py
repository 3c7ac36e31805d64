"""Blocks of ground, splits, and the patches that training draws straight from the cube.

A split is blocks of ground with a buffer between their uses, never random patches: neighbouring
pixels of a height map are nearly equal, and a test on them would only measure that.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeheight.cube import Tree
from aeheight.embeddings import valid
from aeheight.settings import SplitSettings
from aeheight.windows import STRIDE, Region, Shape, tile

UNUSED, TRAIN, VALIDATION, TEST = 0, 1, 2, 3
USES = {"train": TRAIN, "validation": VALIDATION, "test": TEST}

FEWEST = 128
"""Patches an epoch on small ground: with fewer, an epoch is too short a step to judge by."""

CACHE_BYTES = 2**31
"""Decoded chunks that training keeps in memory."""

Area = float | NDArray[np.bool_]
"""A share of the blocks, or (rows, columns) of the ground that is meant."""


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

    def usable(self, use: int) -> NDArray[np.bool_]:
        """(p, p) pixels of one use that have both an embedding and a reference."""
        usable: NDArray[np.bool_] = (self.use == use) & valid(self.codes) & ~np.isnan(self.height)
        return usable


def draw_split(
    settings: SplitSettings,
    shape: Shape,
    region: Region,
    test: Area,
    validation: Area,
    foreign: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """The use of every pixel of a region; the same pixel, the same use, whatever the region.

    Blocks of the grid are shuffled by the seed; test ground is chosen first, validation ground
    from the rest, the remainder trains. Training ground within `buffer` pixels (Chebyshev) of other
    ground, and validation ground as near to test ground, is unused.

    Args:
        settings: block, buffer and seed.
        shape: of the whole grid.
        region: pixels to draw, inside the grid.
        test: share of all blocks, or a mask over `region` grown by the buffer.
        validation: share of the blocks that do not test, or such a mask.
        foreign: such a mask of ground that another grid counts: unused here, and kept away from as
            if it tested, since it may.

    Returns:
        (rows, columns) 0 unused, 1 train, 2 validation, 3 test.
    """
    seen = region.expand(settings.buffer)
    tests, validates = _by_block(settings, shape, seen, test, validation)
    if foreign is None:
        foreign = np.zeros(seen.shape, dtype=bool)
    tests, validates = tests & ~foreign, validates & ~foreign
    near_test = _dilate(tests | foreign, settings.buffer)
    near_other = _dilate(tests | validates | foreign, settings.buffer)
    core = (
        slice(settings.buffer, settings.buffer + region.height),
        slice(settings.buffer, settings.buffer + region.width),
    )
    use = np.full(region.shape, TRAIN, dtype=np.uint8)
    use[near_other[core]] = UNUSED
    use[validates[core] & ~near_test[core]] = VALIDATION
    use[tests[core]] = TEST
    return use


def _by_block(
    settings: SplitSettings, shape: Shape, seen: Region, test: Area, validation: Area
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(rows, columns) of `seen`: what tests, what validates, before the buffer."""
    blocks = (ceil(shape[0] / settings.block), ceil(shape[1] / settings.block))
    order = np.random.default_rng(settings.seed).permutation(blocks[0] * blocks[1])
    rank = np.empty(order.size, dtype=np.int64)
    rank[order] = np.arange(order.size)
    rows = np.arange(seen.row, seen.bottom)
    cols = np.arange(seen.col, seen.right)
    inside = np.logical_and.outer((rows >= 0) & (rows < shape[0]), (cols >= 0) & (cols < shape[1]))
    block_rows = np.clip(rows // settings.block, 0, blocks[0] - 1)
    block_cols = np.clip(cols // settings.block, 0, blocks[1] - 1)
    ranks = rank.reshape(blocks)[np.ix_(block_rows, block_cols)]
    tested = 0
    if isinstance(test, float | int):
        tested = round(test * order.size)
        tests = ranks < tested
    else:
        tests = test
    if isinstance(validation, float | int):
        validates = ranks >= order.size - round(validation * (order.size - tested))
    else:
        validates = validation
    return tests & inside, validates & ~tests & inside


def _dilate(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """True within `radius` pixels, along rows or columns, of a true pixel (a square)."""
    for axis in (0, 1):
        sums = np.cumsum(mask, axis=axis, dtype=np.int32)
        size = mask.shape[axis]
        last = np.minimum(np.arange(size) + radius, size - 1)
        first = np.arange(size) - radius - 1
        before = np.take(sums, np.maximum(first, 0), axis=axis)
        outside = np.expand_dims(first < 0, 1 - axis)
        mask = np.take(sums, last, axis=axis) > np.where(outside, 0, before)
    return mask


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a patch lies."""

    group: str
    year: int
    region: Region


def _in_order(spot: Spot) -> tuple[str, int, Region]:
    return spot.group, spot.year, spot.region


_Reader = Callable[[str, str, int | None, Region], NDArray[Any]]


@dataclass(slots=True)
class Patches:
    """Training's view of a cube: what to sweep, where to look each epoch, what lies there."""

    tree: Tree
    edge: int
    """Edge of a patch in pixels."""
    seed: int
    per_epoch: int | None = None
    """Patches an epoch; None: as many as cover the training ground once, 128 at least."""
    cache_bytes: int = CACHE_BYTES
    """Decoded chunks that are kept in memory."""
    _train: dict[Spot, int] = field(default_factory=dict)
    _validation: dict[Spot, int] = field(default_factory=dict)
    _chunks: "OrderedDict[tuple[Any, ...], NDArray[Any]]" = field(default_factory=OrderedDict)
    _held: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def sweep(self) -> Iterator[Patch]:
        """Every shard that holds training ground, once; counts the usable ground on the way."""
        self._train.clear()
        self._validation.clear()
        for shard in self.tree.template.shards("embedding"):
            assert shard.year is not None
            spot = Spot(shard.group, shard.year, shard.region)
            patch = self._read(spot, self.tree.read)
            self._count(spot, patch)
            if (patch.use == TRAIN).any():
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
                    key = Spot(spot.group, spot.year, cell)
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
        is as large as a patch. The same seed and number give the same spots.
        """
        cells = sorted(self._train, key=_in_order)
        counts = np.array([self._train[cell] for cell in cells], dtype=np.float64)
        wanted = self.per_epoch or max(ceil(counts.sum() / self.edge**2), FEWEST)
        rng = np.random.default_rng([self.seed, number])
        chosen = rng.choice(len(cells), size=wanted, p=counts / counts.sum())
        moves = rng.integers(-(self.edge // 2), self.edge // 2, size=(wanted, 2), endpoint=True)
        return [self._moved(cells[i], *move) for i, move in zip(chosen, moves, strict=True)]

    def _moved(self, cell: Spot, down: int, right: int) -> Spot:
        rows, cols = self.tree.template.grid(cell.group).shape
        row = min(max(cell.region.row + int(down), 0), max(rows - self.edge, 0))
        col = min(max(cell.region.col + int(right), 0), max(cols - self.edge, 0))
        return Spot(cell.group, cell.year, Region(row, col, self.edge, self.edge))

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
        rows, cols = self.tree.template.grid(cell.group).shape
        edge = min(edge, rows, cols) // STRIDE * STRIDE
        if edge < 2 * STRIDE:
            return None
        row = min(cell.region.row // edge * edge, rows - edge)
        col = min(cell.region.col // edge * edge, cols - edge)
        return Spot(cell.group, cell.year, Region(row, col, edge, edge))

    def read(self, spot: Spot) -> Patch:
        """The patch of a spot; blocks of the cube that were read lately are kept in memory."""
        return self._read(spot, self._cached)

    def _read(self, spot: Spot, reader: _Reader) -> Patch:
        has_prior = any(layer.name == "prior" for layer in self.tree.template.layers)
        return Patch(
            codes=reader(spot.group, "embedding", spot.year, spot.region),
            height=reader(spot.group, "height", None, spot.region),
            prior=reader(spot.group, "prior", None, spot.region) if has_prior else None,
            use=reader(spot.group, "split", None, spot.region),
        )

    def _cached(self, group: str, layer: str, year: int | None, region: Region) -> NDArray[Any]:
        """As `Tree.read`, by whole chunks, of which the latest `cache_bytes` stay decoded."""
        spec, edge = self.tree.template.layer(layer), self.tree.template.cut.chunk
        out = np.full((len(spec.bands),) * bool(spec.bands) + region.shape, spec.nodata, spec.dtype)
        for row in range(region.row // edge * edge, region.bottom, edge):
            for col in range(region.col // edge * edge, region.right, edge):
                chunk = Region(row, col, edge, edge)
                shared = chunk.intersect(region)
                assert shared is not None
                values = self._chunk(group, layer, year, chunk)
                out[(..., *shared.within(region).slices)] = values[
                    (..., *shared.within(chunk).slices)
                ]
        return out

    def _chunk(self, group: str, layer: str, year: int | None, chunk: Region) -> NDArray[Any]:
        key = (group, layer, year, chunk)
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
                return self._chunks[key]
        values = self.tree.read(group, layer, year, chunk)
        with self._lock:
            if key not in self._chunks:
                self._chunks[key] = values
                self._held += values.nbytes
            while self._held > self.cache_bytes and len(self._chunks) > 1:
                self._held -= self._chunks.popitem(last=False)[1].nbytes
        return values
