"""Loops over pixels, compiled: what numpy would need many passes and copies for.

Every sum is taken in the order of the pixels, by one thread, without reassociation: the same bits
on every machine. The first call of a process loads the loops from a cache (0.2 s), which the first
call of all fills (a second or two).
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

_Loop = TypeVar("_Loop", bound=Callable[..., Any])

FARTHEST = 2.0**53
"""What is beyond so many bins from 0 shares the outermost ones: further, not all are numbers."""


def _compiled(loop: _Loop) -> _Loop:
    """Compile when first called; cached where some folder can be written, else made anew.

    Threads run side by side in these loops. Without `fastmath`, arithmetic is as it is written.
    """
    try:
        return cast(_Loop, numba.njit(cache=True, nogil=True)(loop))
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return cast(_Loop, numba.njit(nogil=True)(loop))


@_compiled
def _means(
    predicted: NDArray[Any], reference: NDArray[Any], labels: NDArray[np.int32], count: int
) -> tuple[int, NDArray[np.int64], NDArray[np.float64]]:
    """As `moments`, without the sums of squares, for which means must be known first."""
    pixels, wrong = np.zeros((count, 2), np.int64), 0
    sums, origin = np.zeros((count, 10)), np.zeros((count, 3))
    sums[:, 8], sums[:, 9] = np.inf, -np.inf
    kinds, n = labels.shape
    for i in range(n):
        r, p = np.float64(reference[i]), np.float64(predicted[i])
        d, judged = p - r, False
        there = math.isfinite(d)
        for k in range(kinds):
            c = labels[k, i]
            if c < 0:
                continue
            judged = True
            pixels[c, 0] += 1
            if there:
                if pixels[c, 1] == 0:  # a constant, taken from itself, has a spread of exactly 0
                    origin[c, 0], origin[c, 1], origin[c, 2] = r, p, d
                pixels[c, 1] += 1
                sums[c, 0] += r - origin[c, 0]
                sums[c, 1] += p - origin[c, 1]
                sums[c, 2] += d - origin[c, 2]
                sums[c, 7] += abs(d)
                sums[c, 8] = min(sums[c, 8], d)
                sums[c, 9] = max(sums[c, 9], d)
        wrong += judged and not there and (math.isinf(p) or not math.isfinite(r))
    for c in range(count):
        for k in range(3):
            sums[c, k] = origin[c, k] + sums[c, k] / max(pixels[c, 1], 1)
    return wrong, pixels, sums


@_compiled
def moments(
    predicted: NDArray[Any],
    reference: NDArray[Any],
    labels: NDArray[np.int32],
    count: int,
) -> tuple[int, NDArray[np.int64], NDArray[np.float64]]:
    """Moments of predicted p, reference r and d = p - r in each class.

    Args:
        predicted: (n,) metres; NaN where there is none.
        reference: (n,) metres.
        labels: (k, n) classes of each pixel, from 0; -1 where it does not count.
        count: of classes.

    Returns:
        how many pixels with a label have an infinite prediction, or no finite reference: the sums
        are of no use if there are any;
        (count, 2) pixels with a reference, and with a prediction too;
        (count, 10) means of r, p and d; sums of (r - mean)², (p - mean)², (d - mean)² and
        (r - mean)(p - mean); sum of abs(d); least and largest d.
    """
    wrong, pixels, sums = _means(predicted, reference, labels, count)
    kinds, n = labels.shape
    for i in range(n):
        r, p = np.float64(reference[i]), np.float64(predicted[i])
        d = p - r
        if math.isnan(d):
            continue
        for k in range(kinds):
            c = labels[k, i]
            if c < 0:
                continue
            from_r, from_p, from_d = r - sums[c, 0], p - sums[c, 1], d - sums[c, 2]
            sums[c, 3] += from_r * from_r
            sums[c, 4] += from_p * from_p
            sums[c, 5] += from_d * from_d
            sums[c, 6] += from_r * from_p
    return wrong, pixels, sums


@_compiled
def histogram(
    predicted: NDArray[Any],
    reference: NDArray[Any],
    labels: NDArray[np.int32],
    dense: NDArray[np.int32],
    low: int,
    width: float,
) -> int:
    """Count d = predicted - reference by class and bin: bin k holds what rounds to k * width.

    Args:
        predicted: (n,) metres; NaN where there is none.
        reference: (n,) metres.
        labels: (k, n) rows of each pixel, -1 where it does not count.
        dense: (classes, bins) counts that are added to.
        low: the first of its bins.
        width: of a bin, metres.

    Returns:
        How many pixels lie outside.
    """
    kinds, n = labels.shape
    outside = 0
    for i in range(n):
        d = np.float64(predicted[i]) - np.float64(reference[i])
        if math.isnan(d):
            continue
        place = np.floor(min(max(d / width + 0.5, -FARTHEST), FARTHEST)) - low
        if not 0 <= place < dense.shape[1]:
            outside += 1
            continue
        column = int(place)
        for k in range(kinds):
            if labels[k, i] >= 0:
                dense[labels[k, i], column] += 1
    return outside


@_compiled
def within(
    errors: NDArray[Any],
    spread: NDArray[Any],
    labels: NDArray[np.int32],
    count: int,
    parts: int,
    largest: int,
) -> NDArray[np.int64]:
    """What spreads hold in each class, in whole numbers.

    Args:
        errors: (n,) d, metres; finite where there are a spread and a label.
        spread: (n,) metres above 0; NaN where there is none.
        labels: (k, n) classes of each pixel, -1 where it does not count.
        count: of classes.
        parts: bins of abs(d) / spread for each whole one.
        largest: from here on it is counted as one.

    Returns:
        (count, 4 + parts * largest + 1) pixels, those with abs(d) <= spread, the sums of spreads
        and of what lies outside in millimetres (each rounded), then the histogram.
    """
    kinds, n = labels.shape
    sums = np.zeros((count, 5 + parts * largest), np.int64)
    for i in range(n):
        half, error = np.float64(spread[i]), abs(np.float64(errors[i]))
        if math.isnan(half) or math.isnan(error):
            continue
        inside = error <= half
        width = np.int64(np.rint(half * 1000))
        outside = np.int64(np.rint(max(error - half, 0.0) * 1000))
        column = 4 + int(min(error / half * parts, parts * largest))
        for k in range(kinds):
            c = labels[k, i]
            if c < 0:
                continue
            sums[c, 0] += 1
            sums[c, 1] += inside
            sums[c, 2] += width
            sums[c, 3] += outside
            sums[c, column] += 1
    return sums


@_compiled
def steps(values: NDArray[np.float32], there: NDArray[np.bool_], lag: int) -> tuple[int, float]:
    """Pairs of rows `lag` apart where both are there, and the sum of their squared differences.

    Args:
        values: (rows, columns), finite everywhere.
        there: (rows, columns) those that count.
        lag: rows.
    """
    rows, cols = values.shape
    pairs = np.zeros(cols, np.int64)
    squares = np.zeros(cols)
    for i in range(rows - lag):
        for j in range(cols):  # columns add up apart: the processor takes several at once
            both = there[i, j] & there[i + lag, j]
            step = np.float64(values[i + lag, j] - values[i, j])
            pairs[j] += both
            squares[j] += step * step * both
    return pairs.sum(), squares.sum()


@_compiled
def places(values: NDArray[Any], edges: NDArray[np.float64]) -> NDArray[np.int32]:
    """Number of the class from edge k to below edge k + 1; -1 for NaN and outside of all.

    Args:
        values: (n,).
        edges: (classes + 1,) ascending.
    """
    found = np.empty(values.size, np.int32)
    for i in range(values.size):
        value, k = np.float64(values[i]), -1
        for edge in edges:
            k += value >= edge
        found[i] = -1 if k == edges.size - 1 else k
    return found


@_compiled
def facing(east: NDArray[np.float64], north: NDArray[np.float64], flat: float) -> NDArray[np.int64]:
    """Where slopes fall to: 0 north, 1 north-east, and so on to 7; 8 where they are flat.

    Args:
        east: (rows, columns) rise to the east, metres a metre.
        north: likewise.
        flat: least rise that is not flat, metres a metre.

    Returns:
        (rows, columns), -1 where the rise is NaN.
    """
    found = np.full(east.shape, -1, np.int64)
    narrow = math.sqrt(2) - 1  # the tangent of half a sector, 22.5 degrees
    for row in range(east.shape[0]):
        for col in range(east.shape[1]):
            x, y = -east[row, col], -north[row, col]
            if math.isnan(x) or math.isnan(y):
                continue
            if x * x + y * y < flat * flat:
                found[row, col] = 8
            elif abs(x) <= narrow * abs(y):
                found[row, col] = 0 if y > 0 else 4
            elif abs(y) <= narrow * abs(x):
                found[row, col] = 2 if x > 0 else 6
            elif x > 0:
                found[row, col] = 1 if y > 0 else 3
            else:
                found[row, col] = 7 if y > 0 else 5
    return found


@_compiled
def looked_up(
    codes: NDArray[np.int8], tables: NDArray[np.float64], start: float
) -> NDArray[np.float64]:
    """(n,) `start` and what each band's code stands for, added in the order of the bands.

    Args:
        codes: (bands, n).
        tables: (bands, 256) by code; negative ones count from the end.
        start: what to begin with.
    """
    bands, n = codes.shape
    total = np.full(n, start)
    for first in range(0, n, 4096):  # as much as stays in the nearest cache
        for band in range(bands):
            table = tables[band]
            for i in range(first, min(first + 4096, n)):
                total[i] += table[codes[band, i] & 255]
    return total


@_compiled
def bumps(
    products: NDArray[np.float32],
    rooms: NDArray[np.float32],
    lengths: NDArray[np.float32],
    steps: NDArray[np.float32],
) -> NDArray[np.float32]:
    """(n,) sum over k of max(0, products[k] + rooms[k] - lengths)⁴ * steps[k].

    The second half of the terms is added to the first, and so on: in the order of
    `regression.Regression`.

    Args:
        products: (m, n), overwritten; m a power of 2.
        rooms: (m,).
        lengths: (n,).
        steps: (m,).
    """
    m, n = products.shape
    for k in range(m):
        for i in range(n):
            room = max(rooms[k] + products[k, i] - lengths[i], np.float32(0))
            room *= room
            room *= room
            products[k, i] = room * steps[k]
    half = m // 2
    while half:
        for k in range(half):
            for i in range(n):
                products[k, i] += products[k + half, i]
        half //= 2
    total: NDArray[np.float32] = products[0].copy()
    return total
