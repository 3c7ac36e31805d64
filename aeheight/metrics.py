"""Accuracy as functions of sums that merge: :class:`Stats` adds up, ``summary`` runs once, last.

Each shard leaves its sums, never its metrics: the mean of many NMADs is not the NMAD of the whole.
Moments merge by Chan's formula in float64, histograms add as integers, so they are the same
in every order.

Sources:
    Chan, Golub & LeVeque (1983), Algorithms for computing the sample variance,
    doi:10.1080/00031305.1983.10483115.
    Höhle & Höhle (2009), Accuracy assessment of digital elevation models by means of robust
    statistical methods, doi:10.1016/j.isprsjprs.2009.02.003.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aeheight import loops
from aeheight.counts import Counts, bin_numbers, check_labels, frame, paired
from aeheight.errors import InputError

Summary = dict[str, int | float | None]

BIN: Final = 0.01
"""Width of a bin of the differences, metres; bin k holds what rounds to k * BIN."""

_DENSE: Final = 2**22
"""Bins of all classes of a piece of ground that are counted densely: 17 MB."""

CELL: Final = 1.0
"""Side of a cell of the scatter, metres; cell (i, j) starts at (i * CELL, j * CELL)."""

GLOSSARY: Final[dict[str, str]] = {
    "n": "Pixels that have both a reference and a prediction.",
    "coverage": "Predicted share of the pixels that have a reference: n / n_reference.",
    "mean": "Bias: the mean of d = predicted − reference, Σd / n; above 0 the map is too high.",
    "median": "Median of d: the bias that outliers cannot move (Höhle & Höhle 2009).",
    "std": "Standard deviation of d about its mean: √(Σ(d − mean)² / n), ddof 0.",
    "nmad": "Normalised median absolute deviation: 1.4826 · median|d − median(d)|. It equals std "
    "for normal errors and ignores outliers (Höhle & Höhle 2009).",
    "mae": "Mean absolute error: Σ|d| / n (Willmott & Matsuura 2005).",
    "rmse": "Root mean square error: √(Σd² / n); large errors and the bias count in full "
    "(ASPRS 2014).",
    "r2": "Coefficient of determination: 1 − Σd² / Σ(reference − mean reference)²; 0 is as good as "
    "the mean of this ground. It grows with the relief: never compare it between areas "
    "(Nash & Sutcliffe 1970).",
    "pearson": "Pearson correlation of reference and prediction; blind to bias and to scale "
    "(Pearson 1896).",
    "le68": "Linear error 68: the 68 % quantile of |d| (Höhle & Höhle 2009).",
    "le90": "Linear error 90: the 90 % quantile of |d|, P90(|d|); neither 1.645 · σ "
    "nor P95 − P5, which others also call LE90.",
    "le95": "Linear error 95: the 95 % quantile of |d| (Höhle & Höhle 2009).",
    "p5": "The 5 % quantile of d.",
    "p95": "The 95 % quantile of d.",
    "min": "The smallest d: where the map is too low by most.",
    "max": "The largest d: where the map is too high by most.",
}
"""What each metric of a summary means, in the order in which a summary lists them."""


@dataclass(frozen=True)
class Stats:
    """The sums behind every metric of d = predicted - reference; ``+`` merges two of them.

    ``+`` is commutative and associative: exactly so for counts, histogram and extremes, up to
    float64 rounding for moments.
    """

    n_reference: int
    """Pixels that have a reference."""

    n: int
    """Those of them that have a prediction too."""

    mean_reference: float
    """Mean of the reference over the n pixels, metres."""

    mean_predicted: float
    """Mean of the prediction, metres."""

    mean_difference: float
    """Mean of d, metres."""

    m2_reference: float
    """Σ(reference - mean)², m²."""

    m2_predicted: float
    """Σ(predicted - mean)², m²."""

    m2_difference: float
    """Σ(d - mean)², m²."""

    comoment: float
    """Σ(reference - mean)(predicted - mean), m²."""

    sum_absolute: float
    """Σ|d|, metres."""

    minimum: float
    """Smallest d, metres; +inf where n is 0."""

    maximum: float
    """Largest d, metres; -inf where n is 0."""

    histogram: Counts
    """Histogram of d; bin k is centred on k * BIN metres."""

    @classmethod
    def zero(cls) -> "Stats":
        """Nothing measured: what ``+`` leaves unchanged."""
        nothing = Counts.of(np.empty(0, np.int64))
        return cls(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, math.inf, -math.inf, nothing)

    @classmethod
    def of(
        cls,
        predicted: ArrayLike,
        reference: ArrayLike,
        *,
        reference_valid: ArrayLike | None = None,
        predicted_valid: ArrayLike | None = None,
    ) -> "Stats":
        """Sum up one piece of ground.

        Args:
            predicted: heights in metres, any shape.
            reference: heights in metres, the same shape.
            reference_valid: bool, the same shape: pixels to judge that have a reference; None
                for all.
            predicted_valid: bool, the same shape: pixels that have a prediction; None for all.

        Raises:
            InputError: shapes differ, a mask is not bool, or a pixel declared valid is NaN or
                infinite.
        """
        with_p, with_r = _masks(predicted, reference, reference_valid, predicted_valid)
        labels = np.where(with_r, 0, -1).astype(np.int32)
        return cls._by(_known(predicted, with_p), np.asarray(reference), labels, 1)[0]

    @classmethod
    def by(
        cls,
        predicted: NDArray[np.floating],
        reference: NDArray[np.floating],
        labels: NDArray[np.int32],
        count: int,
    ) -> list["Stats"]:
        """Sum up one piece of ground by classes, in one pass.

        Args:
            predicted: heights in metres, any shape; NaN is declared to be no prediction.
            reference: heights in metres, the same shape.
            labels: the same shape, or several such along a first axis: number of the class of each
                pixel that has a reference and is judged, -1 for the others.
            count: of classes, of all axes together.

        Raises:
            InputError: shapes differ, a label is no class, or a pixel with a label has an infinite
                prediction or no finite reference.
        """
        check_labels({"predicted": predicted, "reference": reference}, labels, count)
        return cls._by(predicted, reference, labels, count)

    @classmethod
    def _by(
        cls,
        predicted: NDArray[np.floating],
        reference: NDArray[Any],
        labels: NDArray[np.int32],
        count: int,
    ) -> list["Stats"]:
        p, r = (np.ascontiguousarray(values).reshape(-1) for values in (predicted, reference))
        c = np.ascontiguousarray(labels).reshape(labels.size // max(p.size, 1), p.size)
        wrong, pixels, sums = loops.moments(p, r, c, count)
        if wrong:
            raise InputError(
                f"{wrong} of {pixels[:, 0].sum()} pixels to be judged have an infinite prediction, "
                "or a reference that is NaN or infinite; declare what is missing"
            )
        histograms = _histograms(p, r, c, pixels[:, 1], sums)
        tables = pixels.tolist(), sums.tolist(), histograms  # in the order of the fields
        return [cls(*(*own, *moments, found)) for own, moments, found in zip(*tables, strict=True)]

    def __add__(self, other: "Stats") -> "Stats":
        n_reference = self.n_reference + other.n_reference
        if self.n == 0 or other.n == 0:
            return replace(other if self.n == 0 else self, n_reference=n_reference)
        n = self.n + other.n
        share = other.n / n
        step_r = other.mean_reference - self.mean_reference
        step_p = other.mean_predicted - self.mean_predicted
        step_d = other.mean_difference - self.mean_difference
        weight = self.n * share
        return Stats(
            n_reference=n_reference,
            n=n,
            mean_reference=self.mean_reference + step_r * share,
            mean_predicted=self.mean_predicted + step_p * share,
            mean_difference=self.mean_difference + step_d * share,
            m2_reference=self.m2_reference + other.m2_reference + step_r * step_r * weight,
            m2_predicted=self.m2_predicted + other.m2_predicted + step_p * step_p * weight,
            m2_difference=self.m2_difference + other.m2_difference + step_d * step_d * weight,
            comoment=self.comoment + other.comoment + step_r * step_p * weight,
            sum_absolute=self.sum_absolute + other.sum_absolute,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            histogram=self.histogram + other.histogram,
        )

    def summary(self) -> Summary:
        """The metrics, as :data:`GLOSSARY` defines them; metres, None where undefined.

        Against numpy on the whole arrays, n, coverage, mean, std, mae, rmse, r2, pearson, min and
        max differ by float64 rounding alone; median, le68, le90, le95, p5 and p95 by at most
        BIN / 2 = 0.005 m; nmad by at most 1.4826 * BIN = 0.0149 m.
        """
        coverage = self.n / self.n_reference if self.n_reference else None
        if self.n == 0:
            return dict.fromkeys(GLOSSARY) | {"n": 0, "coverage": coverage}
        squares = self.m2_difference + self.n * self.mean_difference**2
        spread = math.sqrt(self.m2_reference) * math.sqrt(self.m2_predicted)
        deviations = self.histogram.folded(self.histogram.quantile(0.5))
        return {
            "n": self.n,
            "coverage": coverage,
            "mean": self.mean_difference,
            "median": self.quantile(0.5),
            "std": math.sqrt(self.m2_difference / self.n),
            "nmad": 1.4826 * deviations.quantile(0.5) * BIN / 2,
            "mae": self.sum_absolute / self.n,
            "rmse": math.sqrt(squares / self.n),
            "r2": 1 - squares / self.m2_reference if self.m2_reference > 0 else None,
            "pearson": min(1.0, max(-1.0, self.comoment / spread)) if spread > 0 else None,
            "le68": self.linear_error(0.68),
            "le90": self.linear_error(0.90),
            "le95": self.linear_error(0.95),
            "p5": self.quantile(0.05),
            "p95": self.quantile(0.95),
            "min": self.minimum,
            "max": self.maximum,
        }

    def quantile(self, q: float) -> float:
        """Quantile q of d, metres: numpy's 'linear' definition, at most BIN / 2 off."""
        return min(max(self.histogram.quantile(q) * BIN, self.minimum), self.maximum)

    def linear_error(self, q: float) -> float:
        """Quantile q of abs(d), metres: numpy's 'linear' definition, at most BIN / 2 off."""
        least, most = max(0.0, self.minimum, -self.maximum), max(-self.minimum, self.maximum)
        return min(max(self.histogram.folded(0).quantile(q) * BIN / 2, least), most)

    def errors(
        self, max_bins: int = 120, trim: float = 0.001
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The histogram of d for display: (edges (k + 1,) metres, counts (k,)), k <= max_bins.

        Bins are joined evenly; of each tail, at most the share ``trim`` is left out.
        """
        start, factor, size = frame([self.histogram], max_bins, trim)
        place = (self.histogram.bins - start) // factor
        inside = (place >= 0) & (place < size)
        dense = np.zeros(size, np.int64)
        np.add.at(dense, place[inside], self.histogram.counts[inside])
        return (start - 0.5 + np.arange(size + 1.0) * factor) * BIN, dense


def comparable(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two predictors were judged on the same pixels: their numbers differ by 1 % at most.

    Baselines are judged on the model's pixels, so that they differ by the gaps of a baseline only.

    Args:
        one: a summary.
        other: likewise.
    """
    return abs(int(one["n"]) - int(other["n"])) <= 0.01 * int(one["n"])


@dataclass(frozen=True)
class Scatter:
    """How many pixels have this reference and that prediction: a 2-D histogram that adds."""

    cells: Counts
    """Cells of CELL metres; reference cell * 2³² + predicted cell is the bin."""

    @classmethod
    def zero(cls) -> "Scatter":
        """No pixels."""
        return cls(Counts.of(np.empty(0, np.int64)))

    @classmethod
    def of(
        cls,
        predicted: ArrayLike,
        reference: ArrayLike,
        *,
        reference_valid: ArrayLike | None = None,
        predicted_valid: ArrayLike | None = None,
    ) -> "Scatter":
        """Count the pixels that have both; arguments and errors as in :meth:`Stats.of`."""
        with_p, with_r = _masks(predicted, reference, reference_valid, predicted_valid)
        both = with_p & with_r
        p, r = (np.asarray(v)[both].astype(np.float64) for v in (predicted, reference))
        limit = 2.0**30  # keeps a cell within its 32 bits, a million kilometres from zero
        columns = bin_numbers(np.clip(p / CELL, -limit, limit))
        rows = bin_numbers(np.clip(r / CELL, -limit, limit))
        # Most lie near the diagonal: counted from there, few bins are empty.
        return cls(paired(rows, columns - rows, lambda rows, off: (rows << 32) + rows + off))

    def __add__(self, other: "Scatter") -> "Scatter":
        return Scatter(self.cells + other.cells)

    @property
    def n(self) -> int:
        """Pixels counted."""
        return int(self.cells.counts.sum())

    def dense(
        self, max_bins: int = 200, trim: float = 0.0
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """For display: (edges (k + 1,) metres, counts (k, k)), k <= max_bins.

        Both axes share the edges; counts[i, j] has reference bin i and predicted bin j. Cells are
        joined evenly until they fit. Of each tail of each axis, at most the share ``trim`` is
        left out, so that one wild value does not blur the rest; 0 keeps every pixel.
        """
        rows = (self.cells.bins + 2**31) >> 32
        columns = self.cells.bins - (rows << 32)
        counts = self.cells.counts
        axes = [Counts.summed(axis, counts) for axis in (rows, columns)]
        start, factor, size = frame(axes, max_bins, trim)
        i, j = (rows - start) // factor, (columns - start) // factor
        inside = (i >= 0) & (i < size) & (j >= 0) & (j < size)
        table = np.zeros((size, size), np.int64)
        np.add.at(table, (i[inside], j[inside]), counts[inside])
        return (start + np.arange(size + 1.0) * factor) * CELL, table


def _histograms(
    predicted: NDArray[np.floating],
    reference: NDArray[Any],
    labels: NDArray[np.int32],
    pixels: NDArray[np.int64],
    sums: NDArray[np.float64],
) -> list[Counts]:
    """The histogram of d of each class: counted densely about the mean, sorted far from it."""
    count, n = len(pixels), int(pixels.sum())
    if n == 0:
        return [Counts.of(np.empty(0, np.int64))] * count
    least, most = sums[:, 8].min(), sums[:, 9].max()
    first, last, middle = bin_numbers(
        np.array([least, most, float(pixels @ sums[:, 2]) / n]) / BIN + 0.5
    ).tolist()
    width = min(last - first + 1, max(_DENSE // count, 256))
    low = min(max(middle - width // 2, first), last + 1 - width)
    dense = np.zeros((count, width), np.int32)
    outside = loops.histogram(predicted, reference, labels, dense, low, BIN)
    found = [Counts.of_dense(row, low) for row in dense]
    if outside:
        d = predicted.astype(np.float64) - reference
        bins = bin_numbers(np.where(np.isnan(d), 0.0, d) / BIN + 0.5)
        far = ~np.isnan(d) & ((bins < low) | (bins >= low + width))
        bins, owners = bins[far], labels[:, far]
        for number in np.unique(owners[owners >= 0]).tolist():
            held = np.broadcast_to(bins, owners.shape)[owners == number]
            found[number] = found[number] + Counts.of(held)
    return found


def _known(predicted: ArrayLike, there: NDArray[np.bool_]) -> NDArray[np.floating]:
    """With NaN where there is no prediction."""
    values = np.asarray(predicted)
    if not np.issubdtype(values.dtype, np.floating):
        values = values.astype(np.float64)
    return values if there.all() else np.where(there, values, values.dtype.type(np.nan))


def _masks(
    predicted: ArrayLike,
    reference: ArrayLike,
    reference_valid: ArrayLike | None,
    predicted_valid: ArrayLike | None,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where there are a prediction and a reference."""
    p, r = np.asarray(predicted), np.asarray(reference)
    if p.shape != r.shape:
        raise InputError(f"predicted has shape {p.shape} and reference {r.shape}; give equal ones")
    return _mask(predicted_valid, p, "predicted"), _mask(reference_valid, r, "reference")


def _mask(valid: ArrayLike | None, values: NDArray[np.generic], name: str) -> NDArray[np.bool_]:
    mask = np.ones(values.shape, np.bool_) if valid is None else np.asarray(valid)
    if mask.dtype != np.bool_ or mask.shape != values.shape:
        raise InputError(
            f"{name}_valid is {mask.dtype} of shape {mask.shape}; "
            f"give bool of shape {values.shape}, the shape of {name}"
        )
    bad = int(np.count_nonzero(mask & ~np.isfinite(values)))
    if bad:
        raise InputError(
            f"{bad} of {np.count_nonzero(mask)} {name} pixels declared valid are NaN or infinite; "
            f"declare what is missing in {name}_valid"
        )
    return mask
