"""What ground is divided by: relief, distances and classes, against answers known beforehand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aeheight.counts import numbered
from aeheight.criteria import DISTANCES, REACH, Criterion, apart
from aeheight.relief import SECTORS, facing, gradient, roughness, steepness


@pytest.mark.parametrize("number", range(8))
def test_a_slope_faces_where_it_falls(number):
    towards = math.radians(45 * number + 10)
    y, x = np.mgrid[:6, :7]
    east, north = 10.0 * x, -20.0 * y
    plane = (500 - 0.3 * (math.sin(towards) * east + math.cos(towards) * north)).astype(np.float32)
    assert (facing(*gradient(plane, 20.0, 10.0)) == number).all()
    assert SECTORS[number][0] in "nesw"


def test_flat_and_unknown_ground_faces_nowhere():
    gentle = 0.02 * np.mgrid[:5, :5][1].astype(np.float32)
    assert (facing(*gradient(gentle, 1.0, 1.0)) == SECTORS.index("flat")).all()
    gentle[0, 0] = np.nan
    assert np.argwhere(facing(*gradient(gentle, 1.0, 1.0)) == -1).tolist() == [[0, 0]]


def test_gradient_points_east_and_north():
    rows, cols = np.mgrid[:5, :6]
    east, north = gradient((3.0 * cols - 4.0 * rows).astype(np.float32), 2.0, 1.0)
    np.testing.assert_allclose(east, 3.0)
    np.testing.assert_allclose(north, 2.0)
    for row, col in np.ndindex(3, 3):
        holed = np.zeros((3, 3), np.float32)
        holed[row, col] = np.nan
        east, north = gradient(holed, 1.0, 1.0)
        assert np.isnan(east) == np.isnan(north) == ((row, col) != (1, 1))


def test_roughness_is_the_range_of_nine():
    z = np.random.default_rng(3).normal(size=(9, 12)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(z, (3, 3))
    np.testing.assert_array_equal(roughness(z), np.ptp(windows, axis=(2, 3)))
    z[4, 4] = np.nan
    assert np.isnan(roughness(z)).sum() == 9


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.floats(0, 0.01))
@settings(max_examples=40, deadline=None)
def test_distance_to_training_ground_is_that_of_every_pixel_to_every_other(seed, rows, cols, share):
    trains = np.random.default_rng(seed).random((rows + 2 * REACH, cols + 2 * REACH)) < share
    found = apart(trains)
    where = np.argwhere(trains)
    for row, col in np.ndindex(rows, cols):
        away = np.abs(where - (row + REACH, col + REACH)).max(axis=1).min(initial=10**6)
        low = max(edge for edge in DISTANCES if edge <= away)
        assert found[row, col] == low


@given(st.lists(st.integers(-2, 70_000), max_size=60) | st.lists(st.integers(-2, 9)))
def test_classes_are_numbered_by_what_occurs(values):
    found, places = numbered(np.array(values, np.int32))
    assert [found[place] if place >= 0 else None for place in places.tolist()] == [
        value if value >= 0 else None for value in values
    ]
    assert len(found) <= 1024
    assert list(found) == sorted(set(found))


def test_classes_are_half_open_and_the_last_may_have_no_end():
    criterion = Criterion((0.0, 2.0, math.inf))
    values = np.array([-1, 0, 1.99, 2, 1e9, np.nan], np.float32)
    assert criterion.classed(values).tolist() == [-1, 0, 0, 1, 1, -1]
    assert criterion.label(1) == {"lo": 2.0, "hi": None}
    assert Criterion((-math.inf, 1.0)).label(0) == {"lo": None, "hi": 1.0}
    assert Criterion((0.0, 1.0)).classed(np.array([1.0, 0.5])).tolist() == [-1, 0]


def test_named_classes_keep_their_numbers():
    criterion = Criterion(names={3: "forest"})
    assert criterion.classed(np.array([-1, 3, 40])).tolist() == [-1, 3, 40]
    assert criterion.label(3) == {"lo": None, "hi": None, "class": "forest"}
    assert criterion.label(40)["class"] == "class 40"
    assert criterion.recorded() == {"3": "forest"}


def told(z):
    """Slope, roughness and aspect."""
    rise = gradient(z, 10, 10)
    return steepness(*rise), roughness(z), facing(*rise)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_no_edge_of_a_piece_shows(seed, rows, cols):
    """Relief and distances of pieces, each with its margin, are those of the whole."""
    rng = np.random.default_rng(seed)
    size = (rng.integers(20, 60), rng.integers(20, 60))
    z = (rng.normal(size=(size[0] + 2, size[1] + 2)) * 30).astype(np.float32)
    z[rng.random(z.shape) < 0.02] = np.nan
    trains = rng.random((size[0] + 2 * REACH, size[1] + 2 * REACH)) < 0.002
    whole = (*told(z), apart(trains))
    for row in np.array_split(np.arange(size[0]), rows):
        for col in np.array_split(np.arange(size[1]), cols):
            place = np.ix_(row, col)
            near = z[row[0] : row[-1] + 3, col[0] : col[-1] + 3]
            far = trains[row[0] : row[-1] + 1 + 2 * REACH, col[0] : col[-1] + 1 + 2 * REACH]
            part = (*told(near), apart(far))
            for one, all_of_it in zip(part, whole, strict=True):
                np.testing.assert_array_equal(one, all_of_it[place])
