"""What is added to the heights of a map: a constant, a slope on the height, a smooth surface.

The same bits for a pixel, whatever else is asked for with it, so that a map may be cut anyhow.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]

_FINEST = 16
"""Parts of the ground's longer side: where points lie is told no finer."""


@dataclass(frozen=True, slots=True, eq=False)
class Surface:
    """A sum of cubic B-splines on a square board; it falls to 0 beyond the board.

    de Boor (1978), A Practical Guide to Splines; with a penalty on the coefficients, Eilers & Marx
    (1996), doi:10.1214/ss/1038425655.
    """

    left: float
    """x where the first cell begins, metres."""
    bottom: float
    """y where the first cell begins, metres."""
    spacing: float
    """Edge of a cell, metres."""
    coefficients: Floats
    """(rows + 3, columns + 3) metres, for so many cells from south to north and west to east."""

    def at(self, x: Floats, y: Floats) -> Floats:
        """Metres at places; x and y broadcast.

        Every value is made by the same sums in the same order, so its bits do not depend on what
        else is asked for.
        """
        padded = np.pad(self.coefficients, 4)
        rows, columns = (side - 8 for side in padded.shape)
        row, down = _cell((y - self.bottom) / self.spacing, rows)
        column, along = _cell((x - self.left) / self.spacing, columns)
        total = np.zeros(np.broadcast_shapes(x.shape, y.shape))
        for i, weight in enumerate(down):
            line = np.zeros_like(total)
            for j, share in enumerate(along):
                line += share * padded[row + i, column + j]
            total += weight * line
        return total

    def shares(self, x: Floats, y: Floats) -> Floats:
        """(coefficients, n) what each coefficient counts for at (n,) places."""
        rows, columns = self.coefficients.shape
        padded = np.zeros((rows + 8, columns + 8, len(x)))
        row, down = _cell((y - self.bottom) / self.spacing, rows)
        column, along = _cell((x - self.left) / self.spacing, columns)
        each = np.arange(len(x))
        for i, weight in enumerate(down):
            for j, share in enumerate(along):
                padded[row + i, column + j, each] = weight * share
        return padded[4:-4, 4:-4].reshape(-1, len(x))


def _cell(place: Floats, size: int) -> tuple[Numbers, list[Floats]]:
    """The first of the four padded coefficients that a place sees, and their weights."""
    cell = np.clip(np.floor(place), -4, size)
    return cell.astype(np.int64) + 4, _splines(place - cell)


def _splines(t: Floats) -> list[Floats]:
    """The four cubic B-splines that are not 0 at a share t of a cell."""
    u = 1 - t
    return [
        u * u * u / 6,
        (3 * t * t * t - 6 * t * t + 4) / 6,
        (3 * u * u * u - 6 * u * u + 4) / 6,
        t * t * t / 6,
    ]


def support(x: Floats, y: Floats, edge: float) -> Surface:
    """All of a correction within half an edge of a point, nothing from two edges on.

    A coefficient is seen up to sqrt(8) cells away, so those count that are as near as that and half
    an edge.

    Args:
        x: (n,) of the points, metres.
        y: (n,) the same.
        edge: how far a point speaks for the ground around it, metres.
    """
    side = max(np.ptp(x), np.ptp(y))
    spacing = max(edge, side / _FINEST) / 4
    near = (2 + np.sqrt(8)) * spacing
    rim = int(np.ceil(near / spacing))
    left, bottom = x.min() - rim * spacing, y.min() - rim * spacing
    row, column = (y - bottom) / spacing + 1, (x - left) / spacing + 1
    counts = np.zeros((int(row.max()) + rim + 2, int(column.max()) + rim + 2))
    for i in range(-rim, rim + 1):
        for j in range(-rim, rim + 1):
            down, along = np.rint(row).astype(int) + i, np.rint(column).astype(int) + j
            close = np.hypot(down - row, along - column) * spacing <= near
            counts[down[close], along[close]] = 1
    return Surface(float(left), float(bottom), float(spacing), counts)


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """What is added to the heights of a map."""

    constant: float
    """Metres."""
    slope: float
    """Metres for every metre that the map lies above `centre`."""
    centre: float
    """Mean of the map at the points, metres."""
    low: float
    """Lowest height of the map at a point, metres: the slope goes no further."""
    high: float
    """Highest height of the map at a point, metres."""
    surface: Surface | None
    """None: there is none."""
    support: Surface
    """How much of it counts, 0 to 1: all near points, nothing on ground that no point speaks of."""

    def at(self, x: Floats, y: Floats, predicted: Floats) -> Floats:
        """Metres to add to `predicted` (rows, columns or n); x and y broadcast to it."""
        height = np.clip(predicted, self.low, self.high)
        total = self.constant + self.slope * (height - self.centre)
        if self.surface is not None:
            total = total + self.surface.at(x, y)
        return total * self.support.at(x, y)

    def describe(self) -> dict[str, Any]:
        """The correction as JSON holds it, without a lost bit."""
        surfaces = {
            name: board and asdict(board) | {"coefficients": board.coefficients.tolist()}
            for name, board in (("surface", self.surface), ("support", self.support))
        }
        numbers = ("constant", "slope", "centre", "low", "high")
        return {name: getattr(self, name) for name in numbers} | surfaces

    @classmethod
    def described(cls, found: Mapping[str, Any]) -> "Correction":
        """The correction of `describe`."""
        surfaces = {
            name: board and Surface(**board | {"coefficients": np.array(board["coefficients"])})
            for name, board in found.items()
            if name in ("surface", "support")
        }
        return cls(**{**found, **surfaces})
