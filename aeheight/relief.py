"""Slope, aspect and roughness of a height model, from each pixel and its eight neighbours.

What is computed of a piece of ground needs one pixel more on every side, so that no edge of a
piece shows.

Sources:
    Horn (1981), Hill shading and the reflectance map, doi:10.1109/PROC.1981.11918.
    Wilson et al. (2007), Multiscale terrain analysis, doi:10.1080/01490410701295962.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from aeheight import loops

SECTORS: Final = ("north", "north-east", "east", "south-east", "south", "south-west", "west",
                  "north-west", "flat")  # fmt: skip
"""Where a slope faces, downhill."""

FLAT: Final = 2.0
"""Degrees: of flatter ground the aspect is noise."""


def gradient(
    height: NDArray[np.float32], dy: float, dx: float | NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rise towards the east and towards the north, metres a metre, by Horn's 3 x 3 differences.

    Args:
        height: (rows + 2, columns + 2) metres, one pixel wider on every side than the result.
        dy: height of a pixel in metres.
        dx: width of a pixel in metres; (rows, 1) where rows differ.

    Returns:
        Two of (rows, columns), NaN where a neighbour is missing.
    """
    z = height.astype(np.float64)
    across = z[:-2] + 2 * z[1:-1] + z[2:]
    down = z[:, :-2] + 2 * z[:, 1:-1] + z[:, 2:]
    east = (across[:, 2:] - across[:, :-2]) / (8 * dx)
    north = (down[:-2] - down[2:]) / (8 * dy)
    unknown = np.isnan(east) | np.isnan(north)
    east[unknown] = north[unknown] = np.nan
    return east, north


def steepness(east: NDArray[np.float64], north: NDArray[np.float64]) -> NDArray[np.float32]:
    """Slope in degrees of a `gradient`."""
    rise: NDArray[np.float32] = np.sqrt(east * east + north * north).astype(np.float32)
    return np.degrees(np.arctan(rise))


def facing(east: NDArray[np.float64], north: NDArray[np.float64]) -> NDArray[np.int64]:
    """The number among `SECTORS` where each slope of a `gradient` faces; -1 where it is NaN."""
    numbers: NDArray[np.int64] = loops.facing(east, north, np.tan(np.radians(FLAT)))
    return numbers


def roughness(height: NDArray[np.float32]) -> NDArray[np.float32]:
    """The highest less the lowest of nine pixels, metres (Wilson et al. 2007).

    Args:
        height: (rows + 2, columns + 2) metres.

    Returns:
        (rows, columns), NaN where a neighbour is missing.
    """
    high, low = height, height
    for _ in range(2):  # along columns, then along rows
        high = np.maximum(np.maximum(high[:-2], high[1:-1]), high[2:]).T
        low = np.minimum(np.minimum(low[:-2], low[1:-1]), low[2:]).T
    found: NDArray[np.float32] = high - low
    return found
