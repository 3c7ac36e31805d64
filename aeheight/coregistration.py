"""How far a map lies beside its reference: a shift in x, y and z, from sums that add up.

A map that is shifted by (dx, dy, dz) errs by d = -dx · ∂h/∂x - dy · ∂h/∂y + dz where h is the
reference: on a slope that faces the shift it is too high. Nuth & Kääb (2011) fit the same relation
over aspects, d / tan(slope) = a · cos(b - aspect) + c, and iterate. One pass over the data allows
one step: least squares over all slopes above STEEP, from 3 x 3 normal equations, tells dx and dy;
dz is then the mean of what they leave on all ground, as in Nuth & Kääb. For shifts of less than
about a pixel, the rest is small. The standard errors take blocks of ground, not pixels, as
independent (Liang & Zeger 1986).

Sources:
    Nuth & Kääb (2011), Co-registration and bias corrections of satellite elevation data sets,
    doi:10.5194/tc-5-271-2011.
    Liang & Zeger (1986), Longitudinal data analysis using generalized linear models,
    doi:10.1093/biomet/73.1.13, for standard errors over blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from aeheight.blocks import Blocks
from aeheight.counts import Counts, bin_numbers, paired, unpaired
from aeheight.metrics import BIN

STEEP: Final = 3.0
"""Degrees: gentler slopes do not tell where a map lies, but are judged with it."""

LEAST_SHARE: Final = 0.01
"""Share of the pixels that must be steeper than that."""

WORST_CONDITION: Final = 100.0
"""Of the scaled normal equations: from here on slopes face too few ways."""

_SUMS: Final = 10
_SECTORS: Final = 16
_GRADES: Final = np.tan(np.radians([0, 3, 6, 10, 15, 20, 25, 30, 35, 40, 50]))
"""Lower edges of the classes of slope, metres a metre."""
_CLASSES: Final = _SECTORS * len(_GRADES)


def terms(
    gradient: tuple[NDArray[np.float64], NDArray[np.float64]], errors: NDArray[np.floating]
) -> Iterator[NDArray[np.float64]]:
    """What is summed up in each block: normal equations of the steep pixels, then of all.

    Args:
        gradient: rise of the reference to the east and to the north, metres a metre.
        errors: d, metres; all of one shape.

    Yields:
        20 arrays of that shape, one at a time, 0 where the gradient or the error is unknown.
    """
    known = ~np.isnan(gradient[0]) & ~np.isnan(errors)
    east, north, d = (np.where(known, v, 0.0) for v in (*gradient, errors))
    steep = np.hypot(east, north) > np.tan(np.radians(STEEP))
    x, y, one = -east, -north, known.astype(np.float64)
    every = ((x, x), (x, y), (x, one), (y, y), (y, one), (one, one),
             (x, d), (y, d), (one, d), (d, d))  # fmt: skip
    for weight in (steep, one):
        for first, second in every:
            yield first * second * weight


@dataclass(frozen=True, eq=False)
class Facets:
    """Errors by where slopes face and how steep they are; ``+`` merges two of them."""

    cells: Counts
    """Pixels by class and d: the class `paired` with the bin of BIN metres."""

    gradients: NDArray[np.float64]
    """(classes, 3) sums of -∂h/∂x, of -∂h/∂y, and pixels."""

    @classmethod
    def zero(cls) -> Self:
        """Nothing: what ``+`` leaves unchanged."""
        return cls(Counts.of(np.empty(0, np.int64)), np.zeros((_CLASSES, 3)))

    @classmethod
    def of(
        cls,
        gradient: tuple[NDArray[np.float64], NDArray[np.float64]],
        errors: NDArray[np.floating],
        judged: NDArray[np.bool_],
    ) -> Self:
        """Sum up pixels that count, as far as their gradient is known; see `terms`."""
        kept = judged & ~np.isnan(gradient[0])
        east, north = gradient[0][kept], gradient[1][kept]
        d = errors[kept].astype(np.float64)
        turn = np.arctan2(north, east) / (2 * np.pi) % 1.0
        sector = np.minimum(turn * _SECTORS, _SECTORS - 1).astype(np.int64)
        grade = np.searchsorted(_GRADES, np.hypot(east, north), side="right") - 1
        place = sector * len(_GRADES) + grade
        sums = [
            np.bincount(place, values, minlength=_CLASSES)
            for values in (-east, -north, np.ones(d.shape))
        ]
        return cls(paired(place, bin_numbers(d / BIN + 0.5)), np.stack(sums, axis=1))

    def __add__(self, other: Self) -> Self:
        return type(self)(self.cells + other.cells, self.gradients + other.gradients)

    def nmad(self, shift: NDArray[np.float64]) -> float:
        """NMAD of d, metres, after a shift is taken from it: by the mean gradient of each class."""
        count = np.maximum(self.gradients[:, 2], 1)
        gain = (self.gradients[:, :2] @ shift[:2]) / count + shift[2]
        place, bins = unpaired(self.cells.bins)
        moved = Counts.summed(bins - np.rint(gain[place] / BIN).astype(np.int64), self.cells.counts)
        return 1.4826 * moved.folded(moved.quantile(0.5)).quantile(0.5) * BIN / 2


def coregister(blocks: Blocks, facets: Facets) -> dict[str, Any]:
    """The shift of a map beside its reference, and what is left of its errors without it.

    Args:
        blocks: with `terms` summed.
        facets: of the same pixels.

    Returns:
        `n` pixels whose gradient is known and the share of them that is `steep`; `refused`, why
        there is no shift, or None; else `dx_m`, `dy_m`, `dz_m`, how far the map lies east, north
        and above, and their standard errors `dx_se_m`, `dy_se_m`, `dz_se_m` (None for one block);
        `raw` and `coregistered`: `mean`, `rmse` and `nmad` of d, metres, on all those pixels.
        `rmse` and `mean` are exact (0 after the shift), `nmad` to a few centimetres for a shift of
        a metre.
    """
    steep, every = blocks.terms[:, :_SUMS], blocks.terms[:, _SUMS:]
    n, steep_n = int(every[:, 5].sum()), int(steep[:, 5].sum())
    told = {"n": n, "steep": steep_n / n if n else None, "refused": None}
    matrix, right = _normal(steep.sum(axis=0))
    if reason := _too_flat(n, steep_n, matrix):
        return told | {"refused": reason}
    shift: NDArray[np.float64] = np.linalg.solve(matrix, right).astype(np.float64)
    errors = _standard_errors(steep, matrix, shift)[:2]
    shift[2] += _mean_left(every.sum(axis=0), shift)
    errors.append(_error_of_mean(every, shift))
    for name, value, error in zip(("dx", "dy", "dz"), shift, errors, strict=True):
        told |= {f"{name}_m": float(value), f"{name}_se_m": error}
    return told | {
        "raw": _left(every.sum(axis=0), np.zeros(3), facets),
        "coregistered": _left(every.sum(axis=0), shift, facets),
    }


def _normal(sums: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(..., 10) sums to (..., 3, 3) matrices and (..., 3) right sides."""
    order = [0, 1, 2, 1, 3, 4, 2, 4, 5]
    return sums[..., order].reshape(*sums.shape[:-1], 3, 3), sums[..., 6:9]


def _too_flat(n: int, steep: int, matrix: NDArray[np.float64]) -> str | None:
    if steep < max(LEAST_SHARE * n, 3):
        share = f"{100 * steep / n:.2g} % of the ground is" if n else "no ground is known to be"
        return (
            f"too flat: {share} steeper than {STEEP:g}°, and {100 * LEAST_SHARE:g} % is needed to "
            "tell where the map lies"
        )
    sizes = np.sqrt(np.diag(matrix))
    if not (sizes > 0).all():
        return "its slopes do not face enough ways to tell where the map lies"
    condition = float(np.linalg.cond(matrix / np.outer(sizes, sizes)))
    if condition > WORST_CONDITION:
        return (
            "its slopes do not face enough ways to tell where the map lies (condition "
            f"{condition:.3g}, at most {WORST_CONDITION:g})"
        )
    return None


def _standard_errors(
    steep: NDArray[np.float64], matrix: NDArray[np.float64], shift: NDArray[np.float64]
) -> list[float | None]:
    blocks = int((steep[:, 5] > 0).sum())
    if blocks < 2:
        return [None, None, None]
    matrices, rights = _normal(steep)
    scores = rights - matrices @ shift
    inverse = np.linalg.inv(matrix)
    variance = inverse @ (scores.T @ scores) @ inverse * blocks / (blocks - 1)
    return [float(error) for error in np.sqrt(np.diag(variance))]


def _mean_left(sums: NDArray[np.float64], shift: NDArray[np.float64]) -> float:
    """Mean of d less what a shift makes of it."""
    matrix, _ = _normal(sums)
    return float((sums[8] - matrix[2] @ shift) / sums[5])


def _error_of_mean(every: NDArray[np.float64], shift: NDArray[np.float64]) -> float | None:
    """Standard error of dz for given dx and dy, from the sums of each block."""
    blocks = int((every[:, 5] > 0).sum())
    if blocks < 2:
        return None
    left = every[:, 8] - _normal(every)[0][:, 2] @ shift
    return float(np.sqrt(np.sum(left**2) * blocks / (blocks - 1)) / every[:, 5].sum())


def _left(
    sums: NDArray[np.float64], shift: NDArray[np.float64], facets: Facets
) -> dict[str, float]:
    """Metrics of d less what a shift makes of it, from the normal equations."""
    matrix, right = _normal(sums)
    n = sums[5]
    squares = sums[9] - 2 * shift @ right + shift @ matrix @ shift
    return {
        "mean": _mean_left(sums, shift),
        "rmse": float(np.sqrt(max(squares, 0.0) / n)),
        "nmad": facets.nmad(shift),
    }
