"""Spread: half the width of the interval that holds nine in ten of the true heights, per pixel.

Two steps, on ground that the model was not fitted on:

1. Where errors are large: a Gaussian likelihood head on the embedding (Nix & Weigend 1994,
   doi:10.1109/ICNN.1994.374138). The log of an error's standard deviation is linear in the codes,
   with a ridge penalty chosen by cross-validation over blocks of ground.
2. How large they are: split conformal calibration of the scaled errors (Lei et al. 2018,
   doi:10.1080/01621459.2017.1307116). The scores of a block come from a head fitted without it, and
   the factor is the 0.9 quantile of all.

A block is one of the split's (`split.block`). Ground within one errs together; so does ground
across the edge of two, and there is no buffer between the folds: where errors go together as far as
a block is wide, the intervals are too narrow on ground farther away. The report tells that distance
beside `split.block`.

Validation ground alone is a handful of blocks, little for either: on Northern California at 900 m,
where a tenth of the ground validates, it sufficed for a spread in 16 of 20 trials, and those had a
5 % worse interval score. So a plain model, the ridge regression or the prior, is judged on all
training ground too, each block by a ridge that was fitted without it. That gives the head and the
factor. What the model itself makes of it is one number: the ratio of the two models' quantiles on
the same validation pixels, which is known better than either, since a network that corrects its
base errs mostly where that does.

Neighbouring pixels err together: pixels are not exchangeable, at best blocks are. With blocks as
the unit (Dunn et al. 2022, doi:10.1080/01621459.2022.2060112) the finite-sample correction asks for
the largest of all scores below ten blocks. Here every pixel counts the same, as it does in the
coverage of a map, and the 1 / n of split conformal takes for n as many independent pixels as would
tell the coverage as well as these blocks do (the design effect of Kish 1965).

Nothing here knows of ground unlike all that was seen. Two guards: the log is held between the 0.5
and 99.5 percentiles of the calibrating pixels, so that nothing extrapolates as an exponential, and
the spread grows with the square of the novelty where that is above 1. That is a rule, not a
calibration: ridges that leave out clusters of embeddings err as novelty to the power of 1.5 to 4.

Why it has the same bits on every device: head and codes are integers of 8 bits, so float32 adds
them up exactly, as in `novelty`. All else is one float64 operation at a time, and a look-up in
place of the exponential.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from aeheight.embeddings import BANDS, valid
from aeheight.novelty import BLOCK
from aeheight.ridge import RidgeSums

LEVEL: Final = 0.9
"""Share of the true heights that an interval of height ± spread is to hold."""

FARTHEST: Final = 4.0
"""Novelty from which on the spread grows no more."""

_GROWTH: Final = 2
_FOLDS: Final = 5
_FEWEST: Final = 100
"""Pixels, and two blocks for every fold: with less there is no spread."""
_PENALTIES: Final = (10.0, 1.0, 0.3, 0.1)
STEPS: Final = 1024
"""Entries of the look-up for one unit of the log: rounds a spread by 0.05 %."""
_SMALLEST: Final = 1e-3
"""Metres: errors are taken as no smaller."""
_ROUNDS: Final = 50
_ENOUGH: Final = 1e-5
"""Of the mean log-likelihood: less is no gain."""


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The log of the standard deviation of an error, linear in the codes."""

    weights: NDArray[np.int8]
    """(64,) for each band, in units of `scale`."""
    scale: float
    """Log of metres for one unit of weights times codes."""
    intercept: float
    """Log of metres."""

    def log(self, codes: NDArray[np.int8]) -> NDArray[np.float64]:
        """Codes (64, n) to (n,) log of metres."""
        weights, sums = self.weights.astype(np.float32), np.empty(codes.shape[1])
        for start in range(0, sums.size, BLOCK):
            part = slice(start, start + BLOCK)
            sums[part] = np.einsum("b,bn->n", weights, codes[:, part].astype(np.float32))
        return sums * self.scale + self.intercept


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """How far a model's heights may be off: nine in ten errors are no larger."""

    head: Head
    """Where they are large."""
    lowest: float
    """Log of metres: the head's value is taken as no less,"""
    highest: float
    """and no more."""
    factor: float
    """Half-width of the interval in standard deviations."""
    growth: int
    """Power of the novelty above 1 by which it is wider."""
    cells: int
    """Blocks of ground that it was calibrated on."""
    doubt: float
    """Standard error of the coverage on ground like that, for want of more blocks."""

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` takes, for JSON."""
        known = asdict(self)
        return known | {"head": known["head"] | {"weights": self.head.weights.tolist()}}

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> Self:
        """What `to_dict` made, to the last bit."""
        head = known["head"]
        weights = np.array(head["weights"], np.int8)
        return cls(**{**known, "head": Head(**{**head, "weights": weights})})

    @property
    def table(self) -> NDArray[np.float64]:
        """Metres for each step of the log from `lowest` on, `factor` included."""
        steps = math.ceil((self.highest - self.lowest) * STEPS) + 1
        table: NDArray[np.float64] = self.factor * np.exp(self.lowest + np.arange(steps) / STEPS)
        return table

    def half_width(
        self, codes: NDArray[np.int8], novelty: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Metres at codes (64, ...) with their novelty (...): shape (...), NaN without embedding.

        Another device gives the same bits by the same steps, one float64 operation at a time.
        """
        log = self.head.log(codes.reshape(BANDS, -1)).reshape(novelty.shape)
        place = np.rint((np.clip(log, self.lowest, self.highest) - self.lowest) * STEPS)
        width = self.table[place.astype(np.int64)]
        far = np.clip(novelty.astype(np.float64), 1.0, FARTHEST)
        for _ in range(self.growth):
            width = width * far
        return np.where(valid(codes), width, np.nan).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Errors:
    """What a model errs on pixels that it was not fitted on."""

    codes: NDArray[np.int8]
    """(64, n)."""
    metres: NDArray[np.float64]
    """(n,) predicted - reference."""
    cells: NDArray[np.int64]
    """(n,) which block of ground each lies in."""

    @classmethod
    def of_ridge(
        cls,
        codes: NDArray[np.int8],
        heights: NDArray[np.float32],
        cells: NDArray[np.int64],
        alpha: float,
        seed: int,
    ) -> Self:
        """Of ridge regressions, each fitted on the cells of the other folds.

        Args:
            codes: (64, n).
            heights: (n,) metres.
            cells: (n,).
            alpha: the penalty, as `RidgeSums.solve` takes it.
            seed: of the folds.

        Raises:
            InputError: the heights or the embeddings of the other folds are all the same.
        """
        folds, metres = _folds(cells, seed), np.empty(heights.shape)
        parts = [RidgeSums.of(codes[:, folds == k], heights[folds == k]) for k in range(_FOLDS)]
        none = RidgeSums.of(codes[:, :0], heights[:0])
        for k in range(_FOLDS):
            here = folds == k
            ridge = sum((p for i, p in enumerate(parts) if i != k), none).solve(alpha)
            metres[here] = ridge.predict(codes[:, here]).astype(np.float64) - heights[here]
        return cls(codes, metres, cells)

    def __add__(self, other: Self) -> Self:
        """Both, on ground that they do not share."""
        return replace(
            self,
            codes=np.concatenate([self.codes, other.codes], axis=1),
            metres=np.concatenate([self.metres, other.metres]),
            cells=np.concatenate([_numbered(self.cells), -1 - _numbered(other.cells)]),
        )


def enough(cells: NDArray[np.int64]) -> bool:
    """Whether a spread can be told from pixels in these cells (n,)."""
    return cells.size >= _FEWEST and np.unique(cells).size >= 2 * _FOLDS


def fit(
    plain: Errors, held_out: Errors, held_out_plain: NDArray[np.float64], seed: int
) -> Spread | None:
    """The spread of a model, calibrated.

    Args:
        plain: errors of a plain model on training ground, cross-fitted.
        held_out: errors of the model itself on validation ground.
        held_out_plain: (n,) metres, errors of the plain model on the same pixels.
        seed: of the folds.

    Returns:
        None where there is too little ground to tell.
    """
    ground = plain + replace(held_out, metres=held_out_plain)
    if not enough(ground.cells):
        return None
    head, logs = _fit_head(ground, seed)
    low, high = np.percentile(head.log(ground.codes), (0.5, 99.5))
    errors = np.maximum(np.abs(ground.metres), _SMALLEST)
    scores = errors / np.exp(np.clip(logs, low, high))
    factor, doubt = _calibrated(scores, ground.cells)
    return Spread(
        head,
        lowest=float(low),
        highest=float(high),
        factor=factor * _gain(head.log(held_out.codes).clip(low, high), held_out, held_out_plain),
        growth=_GROWTH,
        cells=np.unique(ground.cells).size,
        doubt=doubt,
    )


def _gain(logs: NDArray[np.float64], held_out: Errors, plain: NDArray[np.float64]) -> float:
    """The model's quantile of scaled errors for one of the plain model, on the same pixels."""
    if not logs.size:
        return 1.0
    own, other = (
        float(np.quantile(np.abs(errors) * np.exp(-logs), LEVEL))
        for errors in (held_out.metres, plain)
    )
    return max(own, _SMALLEST) / max(other, _SMALLEST)


def _calibrated(scores: NDArray[np.float64], cells: NDArray[np.int64]) -> tuple[float, float]:
    """The quantile of the scores, corrected for few cells, and the coverage's standard error."""
    within = scores <= np.quantile(scores, LEVEL, method="inverted_cdf")
    numbers = _numbered(cells)
    count = np.bincount(numbers)
    excess = np.bincount(numbers, within) - LEVEL * count
    variance = float(np.square(excess).sum()) / cells.size**2 * count.size / (count.size - 1)
    independent = min(LEVEL * (1 - LEVEL) / max(variance, 1e-12), cells.size)
    level = min(LEVEL * (1 + 1 / independent), 1.0)
    return float(np.quantile(scores, level, method="inverted_cdf")), math.sqrt(variance)


def _fit_head(ground: Errors, seed: int) -> tuple[Head, NDArray[np.float64]]:
    """The head, and (n,) what heads that were fitted without a pixel's fold say of it."""
    folds = _folds(ground.cells, seed)
    codes = ground.codes.astype(np.float64).T
    mean, unit = codes.mean(axis=0), max(float(codes.std(axis=0).mean()), 1.0)
    terms = np.column_stack([np.ones(len(codes)), (codes - mean) / unit])
    squares = np.square(np.maximum(np.abs(ground.metres), _SMALLEST))
    found = np.empty((len(_PENALTIES), len(codes)))
    for k in range(_FOLDS):
        here = folds == k
        for row, weights in zip(found, _path(terms[~here], squares[~here]), strict=True):
            row[here] = _log(terms[here], weights)
    held = np.clip(found, *np.percentile(found, (0.5, 99.5), axis=1)[..., None])
    best = int(np.argmin((held + squares * np.exp(-2 * held) / 2).mean(axis=1)))
    weights = _path(terms, squares, best + 1)[best]
    return _rounded(weights[0], weights[1:] / unit, mean), found[best]


def _rounded(intercept: float, weights: NDArray[np.float64], mean: NDArray[np.float64]) -> Head:
    """A head with weights of 8 bits: their rounding moves a log by about 1 % of its range."""
    scale = max(float(np.abs(weights).max()), 1e-9) / 127
    whole = np.rint(weights / scale).astype(np.int8)
    return Head(whole, scale, float(intercept - scale * (whole @ mean)))


def _path(
    terms: NDArray[np.float64], squares: NDArray[np.float64], count: int = len(_PENALTIES)
) -> list[NDArray[np.float64]]:
    """The likeliest weights (1 + 64,) for each penalty, the strongest first.

    Least of the mean of `log s + e² / 2 s²` plus half the penalty times the squared weights, by
    Fisher scoring: the expected Hessian does not depend on the weights.

    Args:
        terms: (n, 1 + 64), the first all ones.
        squares: (n,) squared errors, square metres.
        count: how many penalties.
    """
    weights = np.zeros(terms.shape[1])
    weights[0] = math.log(squares.mean()) / 2
    gram, found = 2 * np.einsum("ni,nj->ij", terms, terms) / len(terms), []
    for penalty in _PENALTIES[:count]:
        weights = _likeliest(terms, squares, weights, penalty, gram)
        found.append(weights)
    return found


def _likeliest(
    terms: NDArray[np.float64],
    squares: NDArray[np.float64],
    weights: NDArray[np.float64],
    penalty: float,
    gram: NDArray[np.float64],
) -> NDArray[np.float64]:
    penalties = np.full(weights.shape, penalty)
    penalties[0] = 0.0
    inverse = np.linalg.inv(gram + np.diag(penalties))

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        log = np.clip(_log(terms, weights), -20.0, 20.0)
        scaled = squares * np.exp(-2 * log)
        shrunk = penalties * weights
        value = float((log + scaled / 2).mean() + shrunk @ weights / 2)
        slope = np.einsum("ni,n->i", terms, 1 - scaled) / len(terms)
        return value, slope + shrunk

    value, slope = loss(weights)
    for _ in range(_ROUNDS):
        step, length = inverse @ slope, 1.0
        new, new_slope = loss(weights - step)
        while new > value and length > 1e-3:
            length /= 2
            new, new_slope = loss(weights - length * step)
        if new > value - _ENOUGH:
            break
        weights, value, slope = weights - length * step, new, new_slope
    return weights


def _log(terms: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) what a head of these weights says; without BLAS, as all of the fit is.

    BLAS would spread these small products over all cores, and takes seconds where those are busy;
    and its bits depend on the number of threads.
    """
    log: NDArray[np.float64] = np.einsum("ni,i->n", terms, weights)
    return log


def _folds(cells: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """(n,) fold of each pixel: whole cells, dealt at random."""
    numbers = _numbered(cells)
    count = int(numbers.max(initial=-1)) + 1
    folds: NDArray[np.int64] = np.random.default_rng(seed).permutation(count)[numbers] % _FOLDS
    return folds


def _numbered(cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same cells, numbered from 0."""
    return np.unique(cells, return_inverse=True)[1].astype(np.int64)
