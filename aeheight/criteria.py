"""What the report divides ground by: classes between edges, or classes with names."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from aeheight import loops

SLOPES: Final = (0.0, 2.0, 5.0, 10.0, 20.0, 30.0, 45.0, 90.0)
"""Class edges of the slope, degrees."""

ROUGHNESSES: Final = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, math.inf)
"""Class edges of the roughness, metres."""

NOVELTIES: Final = (0.0, 0.5, 1.0, 2.0, math.inf)
"""Class edges of the novelty; 1 is where 99 % of the validation ground lies below."""

DISTANCES: Final = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, math.inf)
"""Class edges of the distance to training ground, pixels; each double the last, see `apart`."""

REACH: Final = 64
"""Pixels about a piece of ground in which training ground is looked for."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """One table of the report: its classes, by number."""

    edges: tuple[float, ...] = ()
    """Class k is from edge k to below edge k + 1; empty: classes have names."""
    names: Mapping[int, str] = field(default_factory=dict)
    """Of class k, where it has one other than `class k`."""

    def classed(self, values: NDArray[Any]) -> NDArray[np.int32]:
        """Numbers of classes, -1 where a value is in none.

        Args:
            values: any shape; measures where there are edges, NaN where one is missing; else
                numbers of classes below 2³¹, negative where one is missing.
        """
        if not self.edges:
            numbers: NDArray[np.int32] = np.maximum(values, -1).astype(np.int32)
            return numbers
        flat = np.ascontiguousarray(values).reshape(-1)
        return loops.places(flat, np.array(self.edges)).reshape(values.shape)

    def label(self, number: int) -> dict[str, Any]:
        """What a row of metrics.json says of a class: `lo` and `hi`, or else `class`."""
        if not self.edges:
            name = self.names.get(number, f"class {number}")
            return {"lo": None, "hi": None, "class": name}
        low, high = self.edges[number : number + 2]
        return {"lo": _finite(low), "hi": _finite(high)}

    def recorded(self) -> Any:
        """What tells these classes from others, as JSON can hold it."""
        if self.edges:
            return [edge for edge in self.edges if math.isfinite(edge)]
        return {str(number): name for number, name in self.names.items()}


def _finite(edge: float) -> float | None:
    """JSON has no infinity."""
    return edge if math.isfinite(edge) else None


def apart(trains: NDArray[np.bool_]) -> NDArray[np.float32]:
    """How far pixels lie from training ground, as the lower edge of their class of `DISTANCES`.

    A distance is the larger of rows and columns apart (Chebyshev), as a split's buffer is.

    Args:
        trains: (rows + 2 * REACH, columns + 2 * REACH) pixels that train.

    Returns:
        (rows, columns) 0 on training ground, 1, 2, 4 and so on; 64 for that and all beyond.
    """
    near = trains
    found = np.where(near, DISTANCES[0], DISTANCES[1]).astype(np.float32)
    for step in map(int, DISTANCES[1:-2]):  # what is nearer than `step` becomes nearer than double
        near = _shifted(_shifted(near, step).T, step).T
        found[~near] = 2 * step
    return found[REACH:-REACH, REACH:-REACH]


def _shifted(mask: NDArray[np.bool_], step: int) -> NDArray[np.bool_]:
    """True where a pixel, or the one `step` rows before or after it, is."""
    out = mask.copy()
    out[step:] |= mask[:-step]
    out[:-step] |= mask[step:]
    return out
