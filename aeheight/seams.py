"""Seams: what the edge of a window costs, measured for the network that will draw the map.

Near its edge a window lacks the ground beyond, and a network's heights are wrong there; a halo is
cut away for that. How wide it must be depends on the weights, not on the architecture alone, so it
is measured: a square of ground goes through the network whole, and as two halves. What a half tells
otherwise than the whole, at some distance from the cut, is the error that a halo of that width
leaves.

Windows must start a multiple of 32 px from each other, or the network's own grids of 2 to 32 px
would differ. A halo need only be a multiple of 16 px: it moves all windows alike, and a window of a
core and two halos keeps its edge.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from aeheight.errors import InputError
from aeheight.windows import STRIDE

SPACING: Final = 16
"""Halos are measured in steps of this many pixels."""

SHARE: Final = 0.01
"""A seam is hidden where its step is at most this share of the map's own RMSE."""

Heights = Callable[[NDArray[np.int8], NDArray[np.float32] | None], NDArray[np.float32]]
"""(n, 64, h, w) codes and (n, h, w) prior or None to (n, h, w) float32 metres, NaN for no height.

In float32 throughout: half precision would round wholes and halves otherwise, by more than a seam.
"""

Square = tuple[NDArray[np.int8], NDArray[np.float32] | None]
"""Ground to measure on: (64, e, e) codes and (e, e) prior or None; e a multiple of 32 px."""


@dataclass(frozen=True, slots=True)
class Seams:
    """What each halo leaves of the error that windows' edges make, in one network's heights."""

    edge: int
    """Edge of the largest square that was measured on, pixels; 0: there was none."""
    pixels: int
    """Pixels of halves that were held against the whole square."""
    halos: tuple[int, ...]
    """Pixels cut from a window's edge, ascending multiples of 16."""
    rms: tuple[float, ...]
    """Metres, one a halo: RMS error of the outermost 32 px that are kept."""
    largest: tuple[float, ...]
    """Metres, one a halo: the largest error of all that is kept."""
    step: tuple[float, ...]
    """Metres, one a halo: RMS step where two windows meet, each cropped by the halo."""

    def halo(self, rmse: float, share: float = SHARE) -> int | None:
        """The narrowest halo whose seams nobody sees in a map with such an error.

        Args:
            rmse: of the map against its reference, metres.
            share: of `rmse` that the RMS step at a seam may have. At 1 % a seam adds to the error
                of the pixels beside it less than its ten-thousandth part, and a wider halo would
                only cost computation.

        Returns:
            The smallest halo from which on no measured one has a larger step; None where even the
            widest has: the squares were too small to tell.
        """
        found = None
        for halo, step in zip(reversed(self.halos), reversed(self.step), strict=True):
            if not step <= share * rmse:
                break
            found = halo
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Seams":
        """What `to_dict` gave, also after JSON."""
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in found.items()
        }
        return cls(**values)


def measure(heights: Heights, squares: Iterable[Square]) -> Seams:
    """Measure a network's seams on a few squares of ground.

    The cost is three times the squares' pixels in forward passes, of one square at most. A square
    of e px measures halos up to e/2 - 32 px. At a halo only what a crop would keep counts: pixels
    nearer than that to the ends of the cut are left out.

    The step is the root of the summed mean squares of the errors on both sides of a seam, the
    seams of both directions taken together. That is exact where the two are independent. A
    trained network answers missing ground on either side alike, so its errors have much of their
    sign in common, and true steps were 0.6 to 1.0 times this: it errs towards the wider halo.

    Args:
        heights: the network.
        squares: of any sizes; pixels without a height are left out, and so are halos for which
            none is left on some side.

    Raises:
        InputError: a square's edges are no multiples of 32 px, or below 64 px.
    """
    edge = 0
    sides: tuple[list[NDArray[np.float32]], ...] = ([], [], [], [])
    for codes, prior in squares:
        _check(codes.shape)
        edge = max(edge, min(codes.shape[1:]))
        for side, errors in zip(sides, _halves(heights, codes, prior), strict=True):
            side.append(errors)
    widest = max((len(errors) for side in sides for errors in side), default=0)
    curve = {halo: _left_by(halo, sides) for halo in range(0, widest, SPACING)}
    known = {halo: point for halo, point in curve.items() if not math.isnan(point[-1])}
    rms, largest, step = zip(*known.values(), strict=True) if known else ((), (), ())
    pixels = sum(int(np.isfinite(errors).sum()) for side in sides for errors in side)
    return Seams(edge, pixels, tuple(known), rms, largest, step)


def _check(shape: tuple[int, ...]) -> None:
    height, width = shape[-2:]
    if height % STRIDE or width % STRIDE or min(height, width) < 2 * STRIDE:
        raise InputError(
            f"seams cannot be measured on {height}x{width} px: both edges must be multiples of "
            f"{STRIDE} px, {2 * STRIDE} at least"
        )


def _halves(
    heights: Heights, codes: NDArray[np.int8], prior: NDArray[np.float32] | None
) -> Iterator[NDArray[np.float32]]:
    """The errors of the top, bottom, left and right half: (distance to the cut, along the cut)."""

    def run(at: tuple[slice, slice]) -> NDArray[np.float32]:
        given = None if prior is None else prior[None, *at]
        found: NDArray[np.float32] = heights(codes[None, :, *at], given)[0]
        return found

    everything = slice(None)
    whole = run((everything, everything))
    for axis in (0, 1):
        cut = whole.shape[axis] // 2 // STRIDE * STRIDE
        for part in (slice(cut), slice(cut, None)):
            at = (part, everything) if axis == 0 else (everything, part)
            errors: NDArray[np.float32] = np.moveaxis(run(at) - whole[at], axis, 0)
            yield errors[::-1] if part.start is None else errors


def _left_by(
    halo: int, sides: Sequence[Sequence[NDArray[np.float32]]]
) -> tuple[float, float, float]:
    """RMS, largest error and step that a halo leaves, metres; NaN where a side has no pixel."""
    kept = [
        [
            errors[halo:, halo : errors.shape[1] - halo]
            for errors in side
            if min(len(errors) - halo, errors.shape[1] - 2 * halo) >= STRIDE
        ]
        for side in sides
    ]
    strips = [_finite([errors[:STRIDE] for errors in side]) for side in kept]
    lines = [_finite([errors[0] for errors in side]) for side in kept]
    if not all(line.size for line in lines):
        return math.nan, math.nan, math.nan
    largest = max(float(np.abs(_finite(side)).max()) for side in kept)
    seams = len(lines) / 2  # two sides make one
    step = math.sqrt(sum(float(np.square(line).mean()) for line in lines) / seams)
    return float(np.sqrt(np.square(np.concatenate(strips)).mean())), largest, step


def _finite(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """All values that are numbers, in one row."""
    row: NDArray[np.float64] = np.concatenate([np.empty(0), *(part.ravel() for part in parts)])
    finite: NDArray[np.float64] = row[np.isfinite(row)]
    return finite
