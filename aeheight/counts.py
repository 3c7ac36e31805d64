"""Sparse histograms over integer bins: no range to choose, and they add exactly."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from aeheight.errors import InputError
from aeheight.loops import FARTHEST


@dataclass(frozen=True, eq=False)
class Counts:
    """A sparse histogram over integer bins: no range to choose, and it adds exactly."""

    bins: NDArray[np.int64]
    """(k,) bins that hold something, ascending."""

    counts: NDArray[np.int64]
    """(k,) how many fell in each, all above 0."""

    @classmethod
    def of(cls, bins: NDArray[np.int64]) -> "Counts":
        """Count bin numbers of any shape, (n,) int64."""
        if bins.size and int(bins.max()) - int(bins.min()) <= 4 * bins.size + 100_000:
            low = bins.min()
            return cls.of_dense(np.bincount(bins - low), int(low))  # ten times faster than sorting
        found, counts = np.unique(bins, return_counts=True)
        return cls(found.astype(np.int64), counts.astype(np.int64))

    @classmethod
    def of_dense(cls, counts: NDArray[np.integer], low: int) -> "Counts":
        """Counts (k,) of the bins from `low` on, many of them 0."""
        filled = np.flatnonzero(counts)
        return cls(filled + low, counts[filled].astype(np.int64))

    @classmethod
    def summed(cls, bins: NDArray[np.int64], counts: NDArray[np.int64]) -> "Counts":
        """Add up the counts (n,) of equal bins (n,), given in any order."""
        order = np.argsort(bins, kind="stable")
        bins, counts = bins[order], counts[order]
        starts = np.flatnonzero(np.diff(bins, prepend=bins[:1] - 1))
        return cls(bins[starts], np.add.reduceat(counts, starts) if bins.size else counts)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts.summed(
            np.concatenate([self.bins, other.bins]), np.concatenate([self.counts, other.counts])
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Counts):
            return NotImplemented
        return np.array_equal(self.bins, other.bins) and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]

    def quantile(self, q: float) -> float:
        """Quantile q of all bin numbers by numpy's 'linear' definition; at least one is needed."""
        last = np.cumsum(self.counts)
        n = int(last[-1])
        position = q * (n - 1)
        below = math.floor(position)
        i, j = np.searchsorted(last, [below, min(below + 1, n - 1)], side="right")
        first, second = int(self.bins[i]), int(self.bins[j])
        return first + (second - first) * (position - below)

    def folded(self, middle: float) -> "Counts":
        """Twice the distance of each bin from ``middle``, a multiple of one half."""
        return Counts.summed(np.abs(2 * self.bins - round(2 * middle)), self.counts)


def numbered(classes: NDArray[np.int32]) -> tuple[Sequence[int], NDArray[np.int32]]:
    """Classes that are few, and each element's place among them.

    Args:
        classes: any shape; what is below 0 belongs to none.

    Returns:
        Those from 0 on that occur, ascending, and perhaps others that do not; the place of each
        element's, -1 for none.
    """
    most = int(classes.max(initial=-1))
    if most < _FEW:
        return range(most + 1), np.maximum(classes, -1)
    found, places = np.unique(np.maximum(classes, -1), return_inverse=True)
    none = int(found[0] < 0)
    return found[none:].tolist(), (places - none).astype(np.int32)


def check_labels(values: Mapping[str, NDArray[Any]], labels: NDArray[np.int32], count: int) -> None:
    """Whether pixels may be given to classes: the compiled loops write where a label says.

    Args:
        values: of pixels, by name; all of one shape.
        labels: the same shape, or several such along a first axis: -1 or a number of a class.
        count: of classes.

    Raises:
        InputError: shapes differ, or a label is no class.
    """
    shapes = {name: array.shape for name, array in values.items()} | {"labels": labels.shape}
    first, *others = (array.shape for array in values.values())
    if any(shape != first for shape in others) or labels.shape[-len(first) :] != first:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise InputError(f"shapes differ: {told}; give equal ones")
    if labels.size and not -1 <= int(labels.min()) <= int(labels.max()) < count:
        raise InputError(
            f"labels run from {labels.min()} to {labels.max()}; give -1 to {count - 1}"
        )


_FEW: Final = 1024
"""Classes that are not worth looking which of them occur."""

_PAIR: Final = 2**42
"""Second numbers that one first number can be paired with."""


def pair(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """One number for two, that `unpaired` takes apart; it sorts by the first, then the second.

    Args:
        first: (n,) from 0 to 2²⁰.
        second: (n,); what is beyond ±2⁴¹ is taken as that.
    """
    limit = _PAIR // 2 - 1
    return first * _PAIR + (_PAIR // 2 + np.clip(second, -limit, limit))


def unpaired(pairs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The two numbers of each `pair`."""
    return pairs // _PAIR, pairs % _PAIR - _PAIR // 2


def paired(
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    pair: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]] = pair,
) -> Counts:
    """How often each pair of numbers occurs.

    Args:
        first: (n,).
        second: (n,).
        pair: makes one number of two, which sorts by the first, then the second.
    """
    low = int(second.min(initial=0))
    span = int(second.max(initial=0)) - low + 1
    if span > 2**20 or np.abs(first).max(initial=0) > 2**40:
        return Counts.of(pair(first, second))
    close = Counts.of(first * span + (second - low))  # mostly dense, and so not sorted
    return Counts(pair(close.bins // span, close.bins % span + low), close.counts)


def bin_numbers(position: NDArray[np.float64]) -> NDArray[np.int64]:
    """Floor as int64; what is beyond ±2⁵³ bins shares the outermost ones."""
    return np.floor(np.clip(position, -FARTHEST, FARTHEST)).astype(np.int64)


def frame(axes: list[Counts], max_bins: int, trim: float) -> tuple[int, int, int]:
    """(first bin, factor, size) of at most max_bins groups of factor bins, for all axes.

    They hold all but the share ``trim`` of each tail of each axis.
    """
    axes = [axis for axis in axes if axis.bins.size]
    low = math.floor(min((axis.quantile(trim) for axis in axes), default=0))
    high = math.ceil(max((axis.quantile(1 - trim) for axis in axes), default=0))
    factor = -(-(high - low + 1) // max_bins)
    return low, factor, -(-(high - low + 1) // factor)
