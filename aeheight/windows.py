"""Integer geometry: the region that names a piece of work, the lattice of windows, the taper.

Nothing here knows of coordinates, files or arrays. One `Region` is the task, the log line, the
receipt's name and the test parameter; one `Lattice`, laid over the whole grid, decides where the
network's windows start, so that a result cannot depend on how the area was cut.

>>> shard = Region(row=256, col=0, height=256, width=200)
>>> shard.name
'r0000256-c0000000-256x200'
>>> Region.parse(shard.name) == shard
True
>>> lattice = Lattice(shape=(512, 200), window=256, halo=64)
>>> [window.name for window in lattice.windows(shard)]
['r0000192-c-000064-256x256', 'r0000192-c0000064-256x256', 'r0000320-c-000064-256x256', \
'r0000320-c0000064-256x256']
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Final

import numpy as np
from numpy.typing import NDArray

from aeheight.errors import InputError

Shape = tuple[int, int]

STRIDE: Final = 32
"""Pixels between the coarsest cells of a network: edges of what it sees, and distances between its
windows, are multiples of it, or the same ground would give other heights."""

Runs = tuple[tuple[int, int, int], ...]
"""Squares of a board, row by row: (row, first column, column after the last)."""

_NAME = re.compile(r"r(-?\d+)-c(-?\d+)-(\d+)x(\d+)")


@dataclass(frozen=True, order=True, slots=True)
class Region:
    """A rectangle of whole pixels of one grid; it may reach past the grid's edge."""

    row: int
    """First row (0 is the northern edge of the grid)."""
    col: int
    """First column (0 is the western edge of the grid)."""
    height: int
    """Number of rows, above 0."""
    width: int
    """Number of columns, above 0."""

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"a region needs at least one pixel, got {self.height}x{self.width}")

    @property
    def name(self) -> str:
        """A name that sorts by row, then column, and parses back."""
        return f"r{self.row:07d}-c{self.col:07d}-{self.height}x{self.width}"

    @classmethod
    def parse(cls, name: str) -> "Region":
        """The region of a `name`.

        Raises:
            ValueError: `name` was not made by `Region.name`.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is no region's name (like r0000256-c0000000-256x200)")
        return cls(*map(int, match.groups()))

    @property
    def shape(self) -> Shape:
        """Rows and columns."""
        return self.height, self.width

    @property
    def size(self) -> int:
        """Number of pixels."""
        return self.height * self.width

    @property
    def bottom(self) -> int:
        """The row after the last."""
        return self.row + self.height

    @property
    def right(self) -> int:
        """The column after the last."""
        return self.col + self.width

    @property
    def slices(self) -> tuple[slice, slice]:
        """Row and column slices into an array of the whole grid (for a region inside it)."""
        return slice(self.row, self.bottom), slice(self.col, self.right)

    def expand(self, margin: int) -> "Region":
        """The region grown by `margin` pixels on every side."""
        return Region(
            self.row - margin, self.col - margin, self.height + 2 * margin, self.width + 2 * margin
        )

    def intersect(self, other: "Region") -> "Region | None":
        """What both regions share, or None."""
        row, col = max(self.row, other.row), max(self.col, other.col)
        height = min(self.bottom, other.bottom) - row
        width = min(self.right, other.right) - col
        return Region(row, col, height, width) if height > 0 and width > 0 else None

    def within(self, other: "Region") -> "Region":
        """The same pixels counted from the corner of `other`."""
        return Region(self.row - other.row, self.col - other.col, self.height, self.width)


def whole(shape: Shape) -> Region:
    """The region that is the whole grid."""
    return Region(0, 0, *shape)


def tile(shape: Shape, edge: int, runs: Runs | None = None) -> Iterator[Region]:
    """Cut a grid into squares of `edge` pixels, row by row; the last ones are clipped to it.

    Args:
        shape: of the grid.
        edge: in pixels.
        runs: only these squares; None: all.
    """
    board = ceil(shape[0] / edge), ceil(shape[1] / edge)
    for line, first, last in runs if runs is not None else every_run(board):
        for col in range(first * edge, last * edge, edge):
            row = line * edge
            yield Region(row, col, min(edge, shape[0] - row), min(edge, shape[1] - col))


def every_run(board: Shape) -> Runs:
    """The runs of a whole board."""
    return tuple((line, 0, board[1]) for line in range(board[0]))


def runs_of(chosen: NDArray[np.bool_]) -> Runs:
    """The runs of (rows, columns) chosen squares.

    >>> runs_of(np.array([[True, True, False, True], [False, False, False, False]]))
    ((0, 0, 2), (0, 3, 4))
    """
    steps = np.diff(np.pad(chosen.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    starts, ends = np.argwhere(steps == 1), np.argwhere(steps == -1)
    return tuple(
        (int(line), int(first), int(last))
        for (line, first), (_, last) in zip(starts, ends, strict=True)
    )


def recut(runs: Runs, edge: int, new: int, shape: Shape) -> Runs:
    """The runs of squares of another size: those that hold any ground of the chosen ones.

    Args:
        runs: of squares of `edge` pixels.
        edge: pixels.
        new: edge of the other squares, pixels.
        shape: of the grid.

    >>> recut(((0, 0, 1), (1, 2, 5), (4, 3, 4)), 256, 512, (1280, 1280))
    ((0, 0, 3), (2, 1, 2))
    >>> recut(((0, 1, 2),), 512, 256, (300, 1024))
    ((0, 2, 4), (1, 2, 4))
    """
    chosen: dict[int, set[int]] = {}
    for line, first, last in runs:
        bottom, right = min((line + 1) * edge, shape[0]), min(last * edge, shape[1])
        columns = range(first * edge // new, ceil(right / new))
        for row in range(line * edge // new, ceil(bottom / new)):
            chosen.setdefault(row, set()).update(columns)
    return tuple(
        (line, first, last + 1)
        for line, found in sorted(chosen.items())
        for first, last in _stretches(sorted(found))
    )


def _stretches(numbers: Sequence[int]) -> Iterator[Shape]:
    """First and last of every stretch of consecutive numbers."""
    breaks = [k for k in range(1, len(numbers)) if numbers[k] != numbers[k - 1] + 1]
    for start, stop in pairwise([0, *breaks, len(numbers)]):
        yield numbers[start], numbers[stop - 1]


@dataclass(frozen=True, slots=True)
class Lattice:
    """The one set of overlapping windows that covers a grid.

    Along each axis window `k` keeps the pixels `[k * stride - blend/2, (k + 1) * stride + blend/2)`
    and sees `halo` more on both sides. With `blend` 0 every pixel is kept from exactly one window
    (a plain crop of the halo); otherwise neighbours share `blend` pixels, weighted by a linear
    taper. The first and last windows reach past the grid.
    """

    shape: Shape
    """Rows and columns of the whole grid."""
    window: int
    """Edge of the square that the network sees, in pixels."""
    halo: int
    """Pixels cut from every side of a window's result."""
    blend: int = 0
    """Pixels that neighbouring kept squares share, even; 0: none."""

    def __post_init__(self) -> None:
        if self.halo < 0 or self.blend < 0 or self.blend % 2:
            raise InputError(
                f"halo {self.halo} and blend {self.blend} must be 0 or more, and blend even"
            )
        if self.stride < max(self.blend, 1):
            raise InputError(
                f"window {self.window} leaves no core: window - 2*halo - blend = {self.stride} px "
                f"must be above 0 and at least blend ({self.blend}); widen the window or cut "
                f"halo {self.halo}"
            )

    @property
    def stride(self) -> int:
        """Distance from one window to the next, in pixels."""
        return self.window - 2 * self.halo - self.blend

    @property
    def margin(self) -> int:
        """How far a window starts before its stride cell: halo and half the blend."""
        return self.halo + self.blend // 2

    def windows(self, region: Region) -> list[Region]:
        """Every window whose kept pixels touch `region`, row by row."""
        return [
            Region(
                row * self.stride - self.margin,
                col * self.stride - self.margin,
                self.window,
                self.window,
            )
            for row in self._indices(region.row, region.bottom, self.shape[0])
            for col in self._indices(region.col, region.right, self.shape[1])
        ]

    def count(self, region: Region) -> int:
        """Number of windows that `windows(region)` lists, without making them."""
        rows = self._indices(region.row, region.bottom, self.shape[0])
        return len(rows) * len(self._indices(region.col, region.right, self.shape[1]))

    def hull(self, region: Region) -> Region:
        """The smallest region that holds all `windows(region)`: what a task must read."""
        rows = self._indices(region.row, region.bottom, self.shape[0])
        cols = self._indices(region.col, region.right, self.shape[1])
        return Region(
            rows[0] * self.stride - self.margin,
            cols[0] * self.stride - self.margin,
            (len(rows) - 1) * self.stride + self.window,
            (len(cols) - 1) * self.stride + self.window,
        )

    def _indices(self, start: int, stop: int, size: int) -> range:
        half = self.blend // 2
        first = max((start - half) // self.stride, 0)
        last = min((stop - 1 + half) // self.stride, ceil(size / self.stride) - 1)
        return range(first, last + 1)

    def kept(self, window: Region) -> Region:
        """The pixels that are kept of a window's result."""
        return window.expand(-self.halo)

    def taper(self) -> NDArray[np.float64]:
        """Weights of the kept square, shape (stride + blend,) * 2, 1 in the middle.

        Linear over the shared pixels, so that the weights of neighbours add up to 1.
        """
        edge = np.ones(self.stride + self.blend)
        if self.blend:
            ramp = (np.arange(self.blend) + 0.5) / self.blend
            edge[: self.blend] = ramp
            edge[-self.blend :] = ramp[::-1]
        return np.outer(edge, edge)
