"""A map's bias, from sparse reference heights: a smooth correction that has to prove itself.

What is added to a height is a constant, a slope on the height itself (maps regress to the mean),
and a smooth surface, each only where cross-validation over blocks of ground asks for it. Points err
too, some grossly: fits are weighted and robust, and judged on points that they have not seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aeheight.correction import Correction, Floats, Numbers, Surface, support
from aeheight.errors import InputError
from aeheight.fitting import Fits, Samples, line, median_nmad

FEWEST_POINTS, FEWEST_BLOCKS = 30, 10
"""Below these no standard error is worth its name."""
LEAST_COVERAGE = 0.25
"""Of the map: points that are near less of it lie in one place."""
_LEAST_GROSS = 0.01
"""Metres: nor is one an outlier that is no further off than this."""
_MOST_BLOCKS = 50
"""Along the longer side of the points' ground."""
_FOLDS = 5
_DRAWS = 500
"""Of the bootstrap over blocks."""
_SEED = 0
_GROSS = 6.0
"""A point so many NMAD off what others of its height say is no height of this ground."""
_PARTS = (1, 2, 4, 8)
"""Into how many spacings of the surface the ground's longer side is cut."""
_RATIOS = (0.3, 1.0, 3.0)
"""Standard deviation of the surface's coefficients, in standard deviations of the noise."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a correction may consist of."""

    terms: int
    """0 nothing, 1 a constant, 2 a slope on the height too."""
    spacing: float | None = None
    """Of the surface, metres; None: there is none."""
    ratio: float = 0.0
    """How far the surface's coefficients may go, in standard deviations of the noise."""

    def __str__(self) -> str:
        names = ("nothing", "constant", "constant and slope on height")
        surface = f", surface of {self.spacing:.0f} m x {self.ratio:g}" if self.spacing else ""
        return names[self.terms] + surface


@dataclass(frozen=True, slots=True)
class Figures:
    """How far a map is off, d = predicted - reference; metres."""

    n: int
    rmse: float
    """A point counts by the share of the map's own error in all of its variance: 1 where its sigma
    is 0."""
    median: float
    nmad: float

    @classmethod
    def of(cls, difference: Floats, weight: Floats) -> "Figures":
        """Of (n,) differences."""
        median, nmad = median_nmad(difference)
        return cls(len(difference), _rmse(difference, weight), median, nmad)


@dataclass(frozen=True, slots=True)
class Trial:
    """How a correction did on points that it had not seen."""

    form: Form
    """That was chosen with all points."""
    before: Figures
    after: Figures
    """Cross-validated: for every fold, form and coefficients come from the other folds alone."""
    gain_rmse: float
    """RMSE before - after, metres."""
    gain_rmse_error: float
    """Its standard error, by a bootstrap over blocks, metres."""
    gain_nmad: float
    gain_nmad_error: float
    blocks: int
    """Blocks of ground that hold points; they are dealt to the folds whole."""
    block_metres: float
    folds: int
    outliers: int
    """Points over 6 NMAD off what others of their height say; left out before and after."""
    outlier_metres: float
    """How far off that is."""
    coverage: float
    """Share of the map that lies within a block's edge of a point."""
    within_before: float | None
    """Share of the points no further off than they may be; None: nobody said."""
    within_after: float | None
    """The same after the correction, cross-validated."""
    rmse_by_form: Mapping[str, float]
    """Cross-validated, metres, from the simplest form on; what the form was chosen by."""


def calibrate(
    samples: Samples, x: Floats, y: Floats, allowed: Floats | None = None
) -> tuple[Correction, Trial]:
    """The correction of a map that its reference points can prove.

    The form is the simplest whose cross-validated squared error is within one standard error of the
    best (Breiman et al. 1984). Blocks are as large as the map's ground is far from points, so that
    what is held out is as far from the rest as the map is (Milà et al. 2022,
    doi:10.1111/2041-210X.13851). The choice itself is cross-validated too. Ground far
    from all points stays as it is: what holds for one half of a map can be wrong for the other.

    Args:
        samples: the map at the points.
        x: (m,) places spread over the map, metres.
        y: (m,) the same.
        allowed: (n,) how far off each point may be, metres, NaN where nobody says: for
            `Trial.within_before` and `within_after`, and nothing else.

    Raises:
        InputError: too few points, all in one place, or no gain above two standard errors;
            with the figures.
    """
    _need_points(len(samples))
    residual, own = line(samples)
    limit = max(_GROSS * median_nmad(residual)[1], _LEAST_GROSS)
    good = np.abs(residual) <= limit
    kept = samples.where(good)
    _need_points(len(kept))
    edge, coverage = _block_edge(kept, x, y)
    block = _blocks(kept, edge)
    bench = _Bench(kept, own, block, _forms(kept, edge))
    form, scores = bench.choose(frozenset())
    left = np.empty(len(kept))
    for fold in range(_FOLDS):
        held = bench.fold == fold
        left[held] = bench.left(bench.choose(frozenset({fold}))[0], frozenset({fold}), fold)
    before, after = -kept.wanted, -left
    limits = None if allowed is None else allowed[good]
    gains = _gains(before, after, bench.weight, block)
    trial = Trial(
        form, Figures.of(before, bench.weight), Figures.of(after, bench.weight), *gains,
        int(block.max()) + 1, edge, _FOLDS, int((~good).sum()), limit, coverage,
        _within(before, limits), _within(after, limits), scores,
    )  # fmt: skip
    _need_gain(trial)
    return bench.correction(form, support(kept.x, kept.y, edge)), trial


def _within(difference: Floats, allowed: Floats | None) -> float | None:
    """The share of differences that are allowed."""
    if allowed is None or np.isnan(allowed).all():
        return None
    known = ~np.isnan(allowed)
    return float(np.mean(np.abs(difference[known]) <= allowed[known]))


def _need_points(count: int) -> None:
    if count < FEWEST_POINTS:
        raise InputError(
            f"{count} points are of use, and at least {FEWEST_POINTS} are needed, spread over the "
            "map"
        )


def _need_gain(trial: Trial) -> None:
    """Refuse a correction that does not help.

    The RMSE must gain more than two of its standard errors. A constant leaves the NMAD as it is, so
    that must only not become worse, beyond chance (two standard errors), by half of what the RMSE
    gains.
    """
    helps = trial.form.terms and trial.gain_rmse > 2 * trial.gain_rmse_error
    if helps and -trial.gain_nmad <= max(2 * trial.gain_nmad_error, trial.gain_rmse / 2):
        return
    before, after = trial.before, trial.after
    raise InputError(
        f"no correction is proven to help: on {before.n} points that it has not seen (in "
        f"{trial.blocks} blocks of {trial.block_metres:.0f} m), the best takes RMSE from "
        f"{before.rmse:.3f} to {after.rmse:.3f} m, a gain of {trial.gain_rmse:.3f} ± "
        f"{trial.gain_rmse_error:.3f} m, and NMAD from {before.nmad:.3f} to {after.nmad:.3f} m, "
        f"{trial.gain_nmad:.3f} ± {trial.gain_nmad_error:.3f} m (median {before.median:.3f} to "
        f"{after.median:.3f} m; chosen: {trial.form}); keep the map as it is, or bring more points"
    )


def _rmse(difference: Floats, weight: Floats) -> float:
    return float(np.sqrt(np.average(difference**2, weights=weight)))


def _block_edge(samples: Samples, x: Floats, y: Floats) -> tuple[float, float]:
    """Edge of the blocks in metres, and the share of the map that is as near to a point.

    Raises:
        InputError: the points lie in one place.
    """
    gaps = np.array(
        [np.hypot(samples.x - a, samples.y - b).min() for a, b in zip(x, y, strict=True)]
    )
    side = samples.side
    edge = float(np.clip(2 * np.quantile(gaps, 0.9), side / _MOST_BLOCKS, side / 6))
    coverage = float(np.mean(gaps <= edge))
    if coverage < LEAST_COVERAGE or not side:
        raise InputError(
            f"the points lie in one place: {side:.0f} m across, and only {100 * coverage:.0f} % of "
            f"the map lies within {edge:.0f} m of one (at least {100 * LEAST_COVERAGE:.0f} % are "
            "needed); bring points from all over the map, or cut the region (aoi) to where they are"
        )
    return edge, coverage


def _blocks(samples: Samples, edge: float) -> Numbers:
    """(n,) number of each sample's block, from 0, in random order of the blocks.

    Raises:
        InputError: too few blocks hold points.
    """
    places = np.stack([np.floor(axis / edge) for axis in (samples.x, samples.y)], axis=1)
    found, block = np.unique(places, axis=0, return_inverse=True)
    if len(found) < FEWEST_BLOCKS:
        raise InputError(
            f"the points lie in {len(found)} blocks of {edge:.0f} m, at least {FEWEST_BLOCKS} are "
            "needed: bring points from more places"
        )
    order = np.random.default_rng(_SEED).permutation(len(found))
    return np.asarray(order[block.ravel()], dtype=np.int64)


def _forms(samples: Samples, edge: float) -> list[Form]:
    """What a correction may be, from the simplest on; blocks show no surface finer than they are.

    A surface without the slope is none of them: heights and places go together in real land.
    """
    side = samples.side
    spacings = [side / parts for parts in _PARTS if side / parts >= edge]
    surfaces = [Form(2, spacing, ratio) for spacing in spacings for ratio in _RATIOS]
    return [Form(0), Form(1), Form(2), *surfaces]


class _Bench:
    """Fits every form on every part of the samples that cross-validation asks for, each once."""

    def __init__(self, samples: Samples, own: float, block: Numbers, forms: Sequence[Form]) -> None:
        self._samples, self._block, self._forms = samples, block, forms
        self.fold = block % _FOLDS
        spacings = dict.fromkeys(form.spacing for form in forms)
        self._fits = {spacing: Fits(samples, self.fold, own, spacing) for spacing in spacings}
        self.weight = self._fits[None].weight
        self._left: dict[tuple[Form, frozenset[int]], Floats] = {}

    def choose(self, without: frozenset[int]) -> tuple[Form, dict[str, float]]:
        """The form for all samples but some folds, and the cross-validated RMSE of every form."""
        folds = [fold for fold in range(_FOLDS) if fold not in without]
        order = np.concatenate([np.flatnonzero(self.fold == fold) for fold in folds])
        weight = self.weight[order] / self.weight[order].mean()
        squares = {
            form: weight * np.concatenate([self.left(form, without | {f}, f) for f in folds]) ** 2
            for form in self._forms
        }
        best = min(squares.values(), key=np.mean)
        chosen = next(
            form for form, loss in squares.items() if _as_good(loss - best, self._block[order])
        )
        return chosen, {str(form): float(np.sqrt(loss.mean())) for form, loss in squares.items()}

    def left(self, form: Form, without: frozenset[int], fold: int) -> Floats:
        """What is still wanted at the points of a fold, after a fit without some folds."""
        if (form, without) not in self._left:
            rest: Floats = self._samples.wanted
            if form.terms:
                rest = rest - self._fits[form.spacing].added(form.terms, form.ratio, without)
            self._left[form, without] = rest
        return np.asarray(self._left[form, without][self.fold == fold])

    def correction(self, form: Form, counts: Surface) -> Correction:
        """Fitted on all samples."""
        fits, predicted = self._fits[form.spacing], self._samples.predicted
        constant, slope, surface = fits.whole(form.terms, form.ratio)
        ends = float(predicted.min()), float(predicted.max())
        return Correction(constant, slope, fits.centre, *ends, surface, counts)


def _as_good(worse: Floats, block: Numbers) -> bool:
    """Whether a mean excess of loss is within its standard error, blocks taken as independent."""
    mean = float(worse.mean())
    sums = np.bincount(block, worse - mean)
    return mean <= float(np.sqrt((sums**2).sum())) / len(worse)


def _gains(
    before: Floats, after: Floats, weight: Floats, block: Numbers
) -> tuple[float, float, float, float]:
    """What RMSE and NMAD lose, each with its standard error by a bootstrap over blocks; metres."""
    order = np.argsort(block, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(block))[:-1])
    rng = np.random.default_rng(_SEED)

    def gains(chosen: Numbers) -> tuple[float, float]:
        one, other = before[chosen], after[chosen]
        rmse = _rmse(one, weight[chosen]) - _rmse(other, weight[chosen])
        return rmse, median_nmad(one)[1] - median_nmad(other)[1]

    draws = [
        gains(np.concatenate([members[k] for k in rng.integers(0, len(members), len(members))]))
        for _ in range(_DRAWS)
    ]
    (rmse, nmad), errors = gains(order), np.std(draws, axis=0)
    return rmse, float(errors[0]), nmad, float(errors[1])
