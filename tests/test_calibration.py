"""A correction of known bias: what is recovered, what is refused, and that bits do not move."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aeheight.calibration import FEWEST_POINTS, calibrate
from aeheight.correction import Correction, Surface, support
from aeheight.errors import InputError
from aeheight.fitting import Fits, Samples, inverted, line

SIDE = 100_000.0
NOISE = 5.0


def bias_of(constant=0.0, slope=0.0, tilt=0.0, bump=0.0):
    """A function of x, y and the predicted height that a map lacks, metres."""

    def bias(x, y, predicted):
        wave = np.sin(2 * np.pi * x / SIDE) * np.sin(2 * np.pi * y / SIDE)
        return constant + slope * (predicted - 300) + tilt * (2 * x / SIDE - 1) + bump * wave

    return bias


def ground(seed, count):
    """Places and predicted heights all over a square."""
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(0, SIDE, (2, count))
    return x, y, rng.gamma(2, 150, count)


def samples(bias, seed=0, count=300, outliers=0.05, sigma=0.0):
    """What points of known bias tell, with noise and gross outliers."""
    rng = np.random.default_rng(seed + 1000)
    x, y, predicted = ground(seed, count)
    sigmas = np.broadcast_to(sigma, count).astype(float)
    wanted = bias(x, y, predicted) + np.hypot(NOISE, sigmas) * rng.standard_normal(count)
    gross = rng.random(count) < outliers
    wanted[gross] += rng.choice([-1, 1], gross.sum()) * rng.uniform(50, 500, gross.sum())
    return Samples(x, y, predicted, wanted, sigmas)


def left_of(correction, bias, seed=9):
    """RMS of what is left of a bias on ground without points, metres."""
    x, y, predicted = ground(seed, 2000)
    rest = bias(x, y, predicted) - correction.at(x, y, predicted)
    return float(np.sqrt(np.mean(rest**2)))


# What is recovered.


@pytest.mark.parametrize(
    ("bias", "count", "terms", "bound"),
    [
        (bias_of(constant=3), 300, 1, 0.7),
        (bias_of(slope=0.05), 300, 2, 1.5),
        (bias_of(constant=-4, slope=0.1), 1000, 2, 1.0),
        (bias_of(tilt=6), 1000, 2, 1.0),
        (bias_of(constant=3, slope=0.05, tilt=4, bump=5), 1500, 2, 1.5),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_known_bias_is_recovered(bias, count, terms, bound, seed):
    """With noise of 5 m and 5 % outliers of up to 500 m."""
    correction, trial = calibrate(samples(bias, seed, count), *ground(7, 500)[:2])
    assert trial.form.terms == terms
    assert left_of(correction, bias) < bound
    assert trial.gain_rmse > trial.gain_rmse_error
    assert trial.after.rmse == pytest.approx(NOISE, rel=0.15)
    assert 0.02 * count < trial.outliers < 0.08 * count


def test_figures_before_are_those_of_the_points():
    """With the opposite sign: d = predicted - reference."""
    given = samples(bias_of(constant=3), outliers=0)
    _, trial = calibrate(given, *ground(7, 500)[:2])
    d = -given.wanted
    assert trial.before.n == 300
    assert trial.before.rmse == pytest.approx(np.sqrt(np.mean(d**2)))
    assert trial.before.median == pytest.approx(np.median(d))
    assert trial.before.nmad == pytest.approx(1.4826 * np.median(np.abs(d - np.median(d))))


def test_points_within_what_is_allowed_are_told_before_and_after():
    """Of errors with an SD of 5 m, 68 % lie within 5 m once the bias is gone."""
    given, area = samples(bias_of(constant=12), count=1000, outliers=0), ground(7, 500)[:2]
    allowed = np.where(np.arange(1000) < 900, NOISE, np.nan)
    (_, trial), (_, plain) = (calibrate(given, *area, *more) for more in ((allowed,), ()))
    assert trial.within_before == np.mean(np.abs(given.wanted[:900]) <= NOISE) < 0.2
    assert trial.within_after == pytest.approx(0.683, abs=0.04)
    assert (plain.within_before, plain.within_after) == (None, None)
    assert plain == replace(trial, within_before=None, within_after=None)
    nobody = calibrate(given, *area, np.full(1000, np.nan))[1]
    assert nobody == plain


def test_what_is_promised_is_what_unseen_points_show():
    bias = bias_of(constant=3, slope=0.05, bump=8)
    correction, trial = calibrate(samples(bias, 0, 800), *ground(7, 500)[:2])
    fresh = samples(bias, 1, 5000, outliers=0)
    rest = fresh.wanted - correction.at(fresh.x, fresh.y, fresh.predicted)
    assert np.sqrt(np.mean(rest**2)) == pytest.approx(trial.after.rmse, rel=0.1)


def test_points_count_by_their_sigma():
    """Three of four points are worth little, and say so: what is left halves, or better."""
    bias, sigma = bias_of(constant=3, slope=0.03), np.tile([0.0, 40.0, 40.0, 40.0], 200)
    lefts = []
    for seed in range(8):
        told = samples(bias, seed, 800, 0, sigma)
        untold = Samples(told.x, told.y, told.predicted, told.wanted, np.zeros(800))
        truth = bias(told.x, told.y, told.predicted)
        for points in (told, untold):
            added = Fits(points, np.zeros(800, int), line(points)[1]).added(2)
            lefts.append(np.sqrt(np.mean((added - truth) ** 2)))
    assert np.mean(lefts[::2]) < 0.75
    assert np.mean(lefts[::2]) < 0.5 * np.mean(lefts[1::2])


def test_a_correction_goes_no_further_than_its_points():
    bias = bias_of(slope=0.1)
    given = samples(bias, 0, 1000, 0)
    correction, _ = calibrate(given, *ground(7, 500)[:2])
    middle = np.array([SIDE / 2])
    highest, low = given.predicted.max(), given.predicted.min()
    for beyond, end in ((highest + 3000, highest), (low - 300, low)):
        at = [correction.at(middle, middle, np.array([value])) for value in (beyond, end)]
        assert at[0] == at[1]
    far = np.array([4 * SIDE])
    assert correction.at(far, middle, np.array([300.0])) == 0


# What is refused.


def test_a_map_without_bias_is_left_alone():
    refused = 0
    for seed in range(8):
        with pytest.raises(InputError, match="no correction is proven to help"):
            calibrate(samples(bias_of(), seed, 120), *ground(7, 500)[:2])
        refused += 1
    assert refused == 8


def test_a_refusal_has_figures():
    with pytest.raises(InputError) as refusal:
        calibrate(samples(bias_of()), *ground(7, 500)[:2])
    for word in ("RMSE from 4.", "NMAD from ", " ± ", "blocks of", "keep the map"):
        assert word in str(refusal.value)


def test_too_few_points():
    with pytest.raises(InputError, match=f"29 points .* at least {FEWEST_POINTS} are needed"):
        calibrate(samples(bias_of(constant=50), count=29, outliers=0), *ground(7, 500)[:2])


def test_points_in_one_place():
    given = samples(bias_of(constant=50))
    near = Samples(given.x / 20, given.y / 20, given.predicted, given.wanted, given.sigma)
    with pytest.raises(InputError, match=r"in one place: 4\d\d\d m across, and only \d % of"):
        calibrate(near, *ground(7, 500)[:2])


def test_points_in_few_clusters():
    given = samples(bias_of(constant=50))
    x, y = (
        np.round(2 * axis / SIDE) * SIDE / 2 + 3000 + axis / 1000 for axis in (given.x, given.y)
    )
    clusters = Samples(x, y, given.predicted, given.wanted, given.sigma)
    with pytest.raises(InputError, match="lie in 9 blocks"):
        calibrate(clusters, *ground(7, 500)[:2])


def test_points_of_one_half_leave_the_other_as_it_is():
    bias = bias_of(constant=20)
    x, y = (axis.copy() for axis in ground(3, 600)[:2])
    given = samples(bias, 3, 600, 0)
    east = given.where(given.x > SIDE / 2)
    correction, trial = calibrate(east, x, y)
    assert 0.5 < trial.coverage < 0.8
    height = np.full(2, 300.0)
    west, edge = correction.at(np.array([0.1 * SIDE, 0.6 * SIDE]), np.full(2, SIDE / 2), height)
    assert west == 0
    assert edge == pytest.approx(20, abs=1)


# Surfaces.


def surface(rows, columns, seed=0):
    values = np.random.default_rng(seed).normal(size=(rows + 3, columns + 3))
    return Surface(1000.0, -500.0, 250.0, values)


def test_a_surface_holds_a_plane_exactly():
    """Cubic B-splines reproduce any plane from its values where each is highest."""
    board = surface(4, 6)
    rows, columns = np.indices(board.coefficients.shape)
    x, y = board.left + (columns - 1) * 250.0, board.bottom + (rows - 1) * 250.0
    plane = Surface(board.left, board.bottom, 250.0, 3 + 0.01 * x - 0.02 * y)
    rng = np.random.default_rng(1)
    x, y = rng.uniform(1000, 1000 + 6 * 250, 99), rng.uniform(-500, -500 + 4 * 250, 99)
    np.testing.assert_allclose(plane.at(x, y), 3 + 0.01 * x - 0.02 * y, atol=1e-9)


def test_a_surface_is_smooth_and_falls_to_nothing():
    board = surface(4, 6)
    x = np.linspace(-1000, 5000, 60_001)
    values = board.at(x, np.zeros(1))
    slopes = np.diff(values) / np.diff(x)
    assert np.abs(np.diff(slopes)).max() < 1e-5  # no kink, at the board's edge or elsewhere
    outside = (x < board.left - 3 * 250) | (x > board.left + 9 * 250)
    assert (values[outside] == 0).all()
    assert (values[~outside] != 0).mean() > 0.99


def test_shares_are_what_each_coefficient_counts_for():
    board, rng = surface(3, 5), np.random.default_rng(2)
    x, y = rng.uniform(1000, 2250, 50), rng.uniform(-500, 250, 50)
    shares = board.shares(x, y)
    assert shares.shape == (48, 50)
    np.testing.assert_allclose(shares.sum(axis=0), 1)
    np.testing.assert_allclose(board.coefficients.ravel() @ shares, board.at(x, y), atol=1e-12)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 30), st.integers(1, 30))
@settings(deadline=None, max_examples=40)
def test_a_part_has_the_bits_of_the_whole(row, column, rows, columns):
    board = surface(4, 6)
    x, y = np.linspace(0, 4000, 41)[None, :], np.linspace(900, -900, 37)[:, None]
    height = np.random.default_rng(0).uniform(0, 500, (37, 41))
    whole = Correction(1.5, 0.3, 200.0, 20.0, 400.0, board, surface(4, 6, 1))
    part = np.s_[row : row + rows, column : column + columns]
    expected = whole.at(x, y, height)[part]
    found = whole.at(x[:, part[1]], y[part[0]], height[part])
    np.testing.assert_array_equal(found, expected)
    every = np.broadcast_to(x, height.shape)[part], np.broadcast_to(y, height.shape)[part]
    np.testing.assert_array_equal(whole.at(*every, height[part]), expected)


def test_support_is_whole_near_points_and_nothing_far_from_them():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, SIDE, (2, 40))
    edge = SIDE / 10
    counts = support(x, y, edge)
    at = rng.uniform(-SIDE, 2 * SIDE, (2, 3000))
    gap = np.hypot(at[0][:, None] - x, at[1][:, None] - y).min(axis=1)
    values = counts.at(*at)
    assert values.min() >= 0
    np.testing.assert_allclose(values[gap < edge / 2], 1)
    assert (values[gap > 2 * edge] == 0).all()
    assert (gap < edge / 2).sum() > 50


def test_json_loses_no_bit():
    correction, _ = calibrate(samples(bias_of(tilt=6), 0, 1000), *ground(7, 500)[:2])
    assert correction.surface is not None
    again = Correction.described(json.loads(json.dumps(correction.describe())))
    x, y, height = ground(5, 500)
    np.testing.assert_array_equal(again.at(x, y, height), correction.at(x, y, height))


def test_the_same_points_give_the_same_correction():
    found = [calibrate(samples(bias_of(tilt=6)), *ground(7, 500)[:2]) for _ in range(2)]
    assert found[0][0].describe() == found[1][0].describe()
    assert found[0][1] == found[1][1]


# Fits.


@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_an_inverse_is_that_of_lapack(size, seed):
    part = np.random.default_rng(seed).normal(size=(size + 5, size))
    matrix = part.T @ part + 0.1 * np.eye(size)
    np.testing.assert_allclose(inverted(matrix), np.linalg.inv(matrix), rtol=1e-7, atol=1e-9)


def test_a_fit_without_a_fold_is_that_of_the_others_alone():
    given, fold = samples(bias_of(slope=0.05), 0, 200), np.arange(200) % 5
    together = Fits(given, fold, NOISE**2).added(2, without=frozenset({1, 3}))
    kept = ~np.isin(fold, [1, 3])
    alone = Fits(given.where(kept), np.zeros(kept.sum(), int), NOISE**2).added(2)
    np.testing.assert_allclose(together[kept], alone, rtol=1e-6)


def test_a_fit_minimises_hubers_loss():
    """The sum of clipped residuals, weighted, is 0 along every term."""
    given = samples(bias_of(slope=0.05), 0, 400, 0.1, np.tile([0.0, 8.0], 200))
    variance = given.sigma**2 + NOISE**2
    fitted = Fits(given, np.zeros(400, int), NOISE**2).added(2)
    limit = 1.345 * np.sqrt(variance)
    clipped = np.clip(given.wanted - fitted, -limit, limit) / variance
    terms = np.stack([np.ones(400), given.predicted - given.predicted.mean()])
    assert (np.abs(terms @ clipped) < 1e-3 * np.abs(terms * clipped).sum(axis=1)).all()
