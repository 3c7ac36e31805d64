"""What intervals hold: against numpy on whole arrays, however the ground was cut."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aeheight.intervals import GLOSSARY, Intervals


def some(n=4000, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    spread = rng.uniform(2, 40, n).astype(np.float32)
    return (rng.normal(size=n) * spread * scale / 1.645).astype(np.float32), spread


def test_figures_are_numpys():
    difference, spread = some()
    found = Intervals.of(difference, spread).summary()
    error = np.abs(difference)
    assert found["interval_coverage"] == np.mean(error <= spread)
    assert found["spread"] == pytest.approx(spread.mean(dtype=float), abs=5e-4)
    score = 2 * spread + 20 * np.maximum(error - spread, 0)
    assert found["interval_score"] == pytest.approx(score.mean(dtype=float), abs=6e-3)
    right = np.quantile(error / spread, 0.9)
    assert found["interval_factor"] == pytest.approx(right, abs=0.01)
    assert set(found) == set(GLOSSARY)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_the_factor_is_what_the_spread_lacks(scale):
    found = Intervals.of(*some(20_000, scale=scale)).summary()
    assert found["interval_factor"] == pytest.approx(scale, rel=0.03)


def test_far_too_narrow_spreads_have_no_factor():
    found = Intervals.of(*some(scale=100.0)).summary()
    assert found["interval_factor"] is None
    assert found["interval_coverage"] < 0.05


def test_no_pixels_have_no_figures():
    nothing = np.empty(0, np.float32)
    assert set(Intervals.of(nothing, nothing).summary().values()) == {None}
    assert set(Intervals.zero().summary().values()) == {None}


def test_an_error_as_large_as_the_spread_is_held():
    spread = np.array([5, 5, 5], np.float32)
    found = Intervals.of(np.array([5, -5, 5.001], np.float32), spread).summary()
    assert found["interval_coverage"] == pytest.approx(2 / 3)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 500), max_size=4))
def test_sums_are_the_same_however_ground_is_cut_and_merged(seed, cuts):
    difference, spread = some(500, seed)
    edges = [0, *sorted(cuts), 500]
    parts = [Intervals.of(difference[a:b], spread[a:b]) for a, b in pairwise(edges)]
    merged = Intervals.zero()
    for part in reversed(parts):
        merged += part
    np.testing.assert_array_equal(merged.sums, Intervals.of(difference, spread).sums)
