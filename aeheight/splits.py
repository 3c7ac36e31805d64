"""Splits: blocks of ground with a buffer between their uses, never random patches.

Neighbouring pixels of a height map are nearly equal, and a test on them would only measure that.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from aeheight.settings import SplitSettings
from aeheight.windows import Region, Shape

UNUSED, TRAIN, VALIDATION, TEST = 0, 1, 2, 3
USES = {"train": TRAIN, "validation": VALIDATION, "test": TEST}

Area = float | NDArray[np.bool_]
"""A share of the blocks, or (rows, columns) of the ground that is meant."""


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

    With `folds`, the shuffled blocks are dealt out in as many runs of equal length, within one
    block, and run `fold` tests: over all folds every block tests once.

    Args:
        settings: block, buffer, seed, folds and fold.
        shape: of the whole grid.
        region: pixels to draw, inside the grid.
        test: share of all blocks, or a mask over `region` grown by the buffer; means nothing where
            there are folds.
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
    blocks = _board(settings, shape)
    number = blocks[0] * blocks[1]
    order = np.random.default_rng(settings.seed).permutation(number)
    first, tested = _tested(settings, number, test if isinstance(test, float | int) else 0)
    rank = np.empty(number, dtype=np.int64)
    rank[np.roll(order, -first)] = np.arange(number)
    rows = np.arange(seen.row, seen.bottom)
    cols = np.arange(seen.col, seen.right)
    inside = np.logical_and.outer((rows >= 0) & (rows < shape[0]), (cols >= 0) & (cols < shape[1]))
    block_rows = np.clip(rows // settings.block, 0, blocks[0] - 1)
    block_cols = np.clip(cols // settings.block, 0, blocks[1] - 1)
    ranks = rank.reshape(blocks)[np.ix_(block_rows, block_cols)]
    tests = ranks < tested
    if settings.folds is None and isinstance(test, np.ndarray):
        tests = test
    if isinstance(validation, float | int):
        validates = ranks >= number - round(validation * (number - tested))
    else:
        validates = validation
    return tests & inside, validates & ~tests & inside


def _board(settings: SplitSettings, shape: Shape) -> Shape:
    """Rows and columns of blocks; the last of each may be cut short."""
    return ceil(shape[0] / settings.block), ceil(shape[1] / settings.block)


def _tested(settings: SplitSettings, number: int, share: float) -> tuple[int, int]:
    """Which of the shuffled blocks test: the first of them, and how many."""
    if settings.folds is None:
        return 0, round(share * number)
    first = settings.fold * number // settings.folds
    end = (settings.fold + 1) * number // settings.folds
    return first, end - first


@dataclass(frozen=True, slots=True)
class Blocks:
    """How many blocks of one grid serve for what, before the buffer."""

    number: int
    """All of them."""
    test: int | None
    """None: test ground is an area, no number of blocks."""
    validation: int | None
    """The same."""

    @property
    def training(self) -> int | None:
        """What is left to train on; None where areas decide."""
        if self.test is None or self.validation is None:
            return None
        return self.number - self.test - self.validation


def count_blocks(settings: SplitSettings, shape: Shape) -> Blocks:
    """What the shares or folds of a split come to on a grid, from metadata alone."""
    rows, cols = _board(settings, shape)
    number, share = rows * cols, settings.test
    by_share = isinstance(share, float)
    _, tested = _tested(settings, number, share if isinstance(share, float) else 0.0)
    validated = settings.validation
    return Blocks(
        number,
        tested if by_share or settings.folds else None,
        round(validated * (number - tested)) if isinstance(validated, float) else None,
    )


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
