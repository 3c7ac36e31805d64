"""What intervals hold: against numpy on whole arrays, however the ground was cut."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aeheight.errors import InputError
from aeheight.intervals import GLOSSARY, Intervals
from aeheight.metrics import Stats
from aeheight.report import Report, render
from tests.test_report import Page


def some(n=4000, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    spread = rng.uniform(2, 40, n).astype(np.float32)
    return (rng.normal(size=n) * spread * scale / 1.645).astype(np.float32), spread


def test_figures_are_numpys():
    difference, spread = some()
    found = Intervals.of(difference, spread).summary()
    error = np.abs(difference)
    assert found["coverage"] == np.mean(error <= spread)
    assert found["spread"] == pytest.approx(spread.mean(dtype=float), abs=5e-4)
    score = 2 * spread + 20 * np.maximum(error - spread, 0)
    assert found["score"] == pytest.approx(score.mean(dtype=float), abs=6e-3)
    right = np.quantile(error / spread, 0.9)
    assert found["factor"] == pytest.approx(right, abs=0.01)
    assert set(found) == set(GLOSSARY)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_the_factor_is_what_the_spread_lacks(scale):
    found = Intervals.of(*some(20_000, scale=scale)).summary()
    assert found["factor"] == pytest.approx(scale, rel=0.03)


def test_far_too_narrow_spreads_have_no_factor():
    found = Intervals.of(*some(scale=100.0)).summary()
    assert found["factor"] is None
    assert found["coverage"] < 0.05


def test_no_pixels_have_no_figures():
    nothing = np.empty(0, np.float32)
    assert set(Intervals.of(nothing, nothing).summary().values()) == {None}
    assert set(Intervals.zero().summary().values()) == {None}


def test_an_error_as_large_as_the_spread_is_held():
    spread = np.array([5, 5, 5], np.float32)
    found = Intervals.of(np.array([5, -5, 5.001], np.float32), spread).summary()
    assert found["coverage"] == pytest.approx(2 / 3)


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


def page(scale):
    """The report of a map whose spreads ought to be so many times what they are."""
    difference, spread = some(20_000, scale=scale)
    reference = np.linspace(0, 100, 20_000, dtype=np.float32)
    test = Stats.of(reference + difference, reference).summary()
    held = Intervals.of(difference, spread).summary()
    here = {"split": "test", "lo": 0.0, "hi": 5.0}
    metrics = {
        "model": {"test": test},
        "baselines": {},
        "by": {"slope": [here | test]},
        "intervals": {"model": {"test": held}, "by": {"slope": [here | held]}},
        "provenance": {},
    }
    return Page(render(Report(name="x", metrics=metrics)))


def test_the_report_tells_what_was_held():
    found = page(1.0)
    share = Intervals.of(*some(20_000)).summary()["coverage"]
    assert f"On test ground {100 * share:.1f} % are" in found.words
    (row,) = (row for row in found.rows if row[:2] == ["test", f"{100 * share:.1f} %"])
    assert row[-1] == "1.00"
    (by_slope,) = (row for row in found.rows if row[0] == "0 to 5°")
    assert by_slope[-2] == f"{100 * share:.1f} %"
    assert "too narrow" not in found.words
    assert "wider than they need" not in found.words


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (2.0, "Spreads are too narrow here: it would take 2 times as much"),
        (0.5, "Spreads are wider than they need to be here: 0.5 times as much would hold"),
        (100.0, "Spreads are too narrow here. This ground is unlike"),
    ],
)
def test_the_report_warns_of_spreads_that_are_wrong(scale, words):
    assert words in page(scale).words


def test_a_map_without_spread_has_no_such_section():
    reference = np.linspace(0, 100, 50, dtype=np.float32)
    test = Stats.of(reference + 1, reference).summary()
    metrics = {"model": {"test": test}, "baselines": {}, "by": {}, "provenance": {}}
    assert "How far to trust" not in Page(render(Report(name="x", metrics=metrics))).words


@pytest.mark.parametrize(
    ("spread", "label", "said"),
    [
        (np.inf, 0, "1 spreads are inf"),
        (0.0, 0, "1 spreads are 0.0"),
        (-3.0, 0, "1 spreads are -3.0"),
        (1.0, 2, "labels run from 0 to 2; give -1 to 1"),
        (1.0, -2, "labels run from -2 to 0"),
    ],
)
def test_what_cannot_be_counted_is_refused(spread, label, said):
    difference, spreads, labels = np.ones(3, np.float32), np.ones(3, np.float32), np.zeros(3, int)
    spreads[1], labels[2] = spread, label
    with pytest.raises(InputError, match=said):
        Intervals.by(difference, spreads, labels.astype(np.int32), 2)
