"""Shift between grounds, against sorted heights, closed forms and sums made in parts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aeheight.metrics import Scatter
from aeheight.shift import Heights, overlap, shift, wasserstein
from aeheight.splits import USES
from tests.runs import arrays

RNG = np.random.default_rng(3)
heights = st.lists(st.floats(-500, 9000, width=32), min_size=1, max_size=60).map(np.array)
metres = st.lists(st.integers(-500, 8999), min_size=1, max_size=60).map(np.array)


def sorted_distance(first, second):
    """Wasserstein-1 from the quantile functions, on a grid that both numbers of pixels divide."""
    size = np.lcm(len(first), len(second))
    one, two = (np.repeat(np.sort(each), size // len(each)) for each in (first, second))
    return np.abs(one - two).mean()


@given(first=metres, second=metres)
def test_the_distance_of_whole_metres_is_that_of_sorted_heights(first, second):
    found = wasserstein(Heights.of(first.astype(float)), Heights.of(second.astype(float)))
    assert found == pytest.approx(sorted_distance(first, second), abs=1e-9)


@given(first=heights, second=heights)
def test_bins_cost_at_most_a_metre(first, second):
    found = wasserstein(Heights.of(first), Heights.of(second))
    assert abs(found - sorted_distance(first, second)) <= 1


@given(st.lists(heights, min_size=1, max_size=5))
def test_sums_of_parts_are_those_of_the_whole(parts):
    total = sum((Heights.of(part) for part in parts), start=Heights.of(np.empty(0)))
    assert total == Heights.of(np.concatenate(parts))
    backwards = sum((Heights.of(part) for part in parts[::-1]), start=Heights.of(np.empty(0)))
    assert backwards == total


@given(first=heights, second=heights)
def test_distance_and_overlap_know_no_direction_and_keep_their_bounds(first, second):
    one, two = Heights.of(first), Heights.of(second)
    assert wasserstein(one, two) == pytest.approx(wasserstein(two, one))
    assert overlap(one, two) == pytest.approx(overlap(two, one))
    assert 0 <= overlap(one, two) <= 1 + 1e-12
    assert wasserstein(one, one) == 0
    assert overlap(one, one) == pytest.approx(1)


def test_a_normal_distribution_moved_by_its_own_spread():
    """Two normal distributions whose means lie 2 SD apart overlap by 2 Φ(-1) = 0.3173."""
    one, two = (Heights.of(RNG.normal(mean, 100, 200_000)) for mean in (500, 700))
    assert wasserstein(one, two) == pytest.approx(200, abs=1.5)
    assert overlap(one, two) == pytest.approx(0.3173, abs=0.01)


def test_samples_of_one_distribution_overlap_but_for_chance():
    for size, least in ((100, 0.8), (10_000, 0.95), (1_000_000, 0.99)):
        one, two = (Heights.of(RNG.gamma(2, 150, size)) for _ in range(2))
        assert overlap(one, two) > least


def test_one_wild_height_does_not_hide_a_shift():
    one = Heights.of(np.append(RNG.uniform(0, 100, 20_000), 8999.0))
    two = Heights.of(RNG.uniform(50, 150, 20_000))
    assert overlap(one, two) == pytest.approx(0.5, abs=0.02)


def test_heights_apart_do_not_overlap():
    one, two = (Heights.of(RNG.uniform(low, low + 50, 5_000)) for low in (0, 1000))
    assert overlap(one, two) == 0
    assert wasserstein(one, two) == pytest.approx(1000, abs=1.5)


def test_the_summary_is_that_of_numpy_on_the_heights():
    values = RNG.gamma(2, 150, 50_000)
    found = Heights.of(np.append(values, np.nan)).summary()
    wanted = {"mean": values.mean(), "std": values.std()}
    wanted |= {f"p{q}": np.quantile(values, q / 100) for q in (5, 50, 95)}
    assert found.pop("n") == values.size
    assert found == pytest.approx(wanted, abs=0.51)


def test_heights_judged_are_the_references_of_a_scatter():
    reference = RNG.uniform(-50, 400, (40, 50))
    predicted = reference + RNG.normal(0, 300, reference.shape)
    there = RNG.random(reference.shape) < 0.7
    scatter = Scatter.of(predicted, reference, predicted_valid=there)
    assert Heights.judged(scatter) == Heights.of(reference[there])


def test_rows_say_how_far_each_ground_is_from_the_training_ground():
    train, test = RNG.uniform(0, 1000, 20_000), RNG.uniform(500, 1500, 20_000)
    rows = shift({"train": Heights.of(train), "test": Heights.of(test)}, Heights.of(train))
    assert rows["train"]["wasserstein_m"] == 0
    assert rows["train"]["overlap"] == pytest.approx(1)
    assert rows["train"]["outside"] == pytest.approx(0.02, abs=0.003)
    assert rows["test"]["wasserstein_m"] == pytest.approx(500, abs=10)
    assert rows["test"]["overlap"] == pytest.approx(0.5, abs=0.02)
    assert rows["test"]["outside"] == pytest.approx(0.51, abs=0.015)
    assert rows["test"]["n"] == 20_000


def test_what_cannot_be_compared_is_none():
    ground, nothing = Heights.of(np.array([1.0])), Heights.of(np.array([np.nan]))
    assert nothing.summary() == {"n": 0} | dict.fromkeys(("mean", "std", "p5", "p50", "p95"))
    for one, two in ((ground, nothing), (nothing, ground), (nothing, nothing)):
        assert wasserstein(one, two) is overlap(one, two) is None
    for trained in (None, nothing):
        row = shift({"test": ground}, trained)["test"]
        assert row["n"] == 1
        assert row["wasserstein_m"] is row["overlap"] is row["outside"] is None
    assert shift({"test": nothing}, ground)["test"]["outside"] is None


def test_a_run_tells_the_shift_of_its_splits(small_run):
    cube = arrays(small_run.cube)
    predicted = ~np.isnan(arrays(small_run.heights)["height"][0])
    grounds = {
        name: Heights.of(cube["height"][predicted & (cube["split"] == use)])
        for name, use in USES.items()
    }
    found = small_run.metrics()["shift"]
    assert found == shift(grounds, grounds["train"])
    assert found["test"]["wasserstein_m"] > 0
    page = (small_run.store / "report" / "index.html").read_text()
    assert f"{found['test']['wasserstein_m']:.3g} m on average" in page
