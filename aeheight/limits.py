"""Limits of colour scales: the same values look the same on every map of a run."""

import math
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

_LEAST: Final = 1e-3
"""The narrowest scale."""


def value_limits(arrays: Iterable[NDArray[np.float32]]) -> tuple[float, float]:
    """The 1 % and 99 % quantiles of all finite values; 0 and 1 where there are none."""
    known = _known(arrays)
    if not known.size:
        return 0.0, 1.0
    low, high = np.quantile(known, [0.01, 0.99])
    return float(low), max(float(high), float(low) + _LEAST)


def robust(sizes: Iterable[NDArray[np.float32]]) -> float:
    """The 98 % quantile of sizes, rounded up to two digits; 1 where all are 0."""
    known = _known(sizes)
    most = float(np.quantile(known, 0.98)) if known.size else 0.0
    if most <= 0:
        return 1.0
    digit = 10.0 ** (math.floor(math.log10(most)) - 1)
    return math.ceil(most / digit) * digit


def error_limits(arrays: Iterable[NDArray[np.float32]]) -> tuple[float, float]:
    """Of differences: as far below 0 as above."""
    most = robust(np.abs(array) for array in arrays)
    return -most, most


def novelty_limits(arrays: Iterable[NDArray[np.float32]]) -> tuple[float, float]:
    """Of novelty: 1, where the unknown begins, lies within."""
    low, high = value_limits(arrays)
    return min(low, 0.9), max(high, 1.1)


def _known(arrays: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    """All finite values, flat."""
    return np.concatenate([a[np.isfinite(a)] for a in arrays] or [np.empty(0, np.float32)])
