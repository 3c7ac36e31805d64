"""The base: an evened linear term, and bumps that are exactly 0 where training has never been."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aeheight import kernel
from aeheight.embeddings import BANDS, NODATA, decode
from aeheight.kernel import BLOCK, SQUARED_REACH, Kernel, Pixels
from aeheight.ridge import Ridge, RidgeSums, lengths
from tests.checkpoints import codes_of, some_ridge

EVENED = Ridge(some_ridge().weights, 12.5, 7.25, 1000, evened=True)


def near(centre, n, spread, seed=0):
    """(64, n) codes about a centre."""
    noise = np.random.default_rng(seed).normal(0, spread, (BANDS, n))
    return np.clip(np.rint(centre[:, None] + noise), -127, 127).astype(np.int8)


def some_kernel(count=8, seed=0, ridge=EVENED):
    rng = np.random.default_rng(seed)
    centres = rng.integers(-40, 41, (count, BANDS), dtype=np.int8)
    return Kernel(ridge, centres, rng.normal(0, 50, count).astype(np.float32))


def bumps_by_the_formula(found, codes):
    """The oracle: sum_k w_k max(0, 1 - d_k^2 / R^2)^4 in float64, one pixel and bump at a time."""
    total = np.zeros(codes.shape[1])
    for i, q in enumerate(codes.T.astype(np.float64)):
        for centre, weight in zip(found.centres.astype(np.float64), found.weights, strict=True):
            total[i] += weight * max(0.0, 1 - ((q - centre) ** 2).sum() / SQUARED_REACH) ** 4
    return total


HILLS = np.random.default_rng(99).integers(-60, 61, (2, BANDS)).astype(float)
"""Two kinds of ground that have nothing in common."""


def curved(codes):
    """A height that no linear term can tell: on each kind of ground a hill over what is typical."""
    x, q = decode(codes).astype(np.float64), codes.T.astype(np.float64)
    hills = sum(400 * np.exp(-(((q - hill) / 150) ** 2).sum(axis=1)) for hill in HILLS)
    return (100 + 800 * x[0] + hills).astype(np.float32)


def two_kinds(n=1500, seed=0):
    """(64, 2 n) codes of two kinds of ground, more and less typical ones."""
    spread = np.random.default_rng(seed + 7).uniform(2, 30, n)
    return np.concatenate([near(hill, n, spread, seed + k) for k, hill in enumerate(HILLS)], axis=1)


# --- the evened linear term ----------------------------------------------------------------------


def test_lengths_are_those_of_the_embeddings():
    codes = codes_of(BANDS, 7, 9)
    codes[:, 0, 0] = 0
    expected = np.linalg.norm(decode(codes).astype(np.float64), axis=0)
    np.testing.assert_allclose(lengths(codes), np.maximum(expected, 1e-3), rtol=1e-12)


@pytest.mark.parametrize("cuts", [(), (1,), (120, 250), (0, 300)])
def test_the_evened_ridge_is_the_ridge_of_the_evened_embeddings_however_it_is_cut(cuts):
    codes = codes_of(BANDS, 300)
    heights = np.random.default_rng(1).normal(500, 200, 300).astype(np.float32)
    edges = [0, *cuts, 300]
    parts = [
        RidgeSums.of(codes[:, a:b], heights[a:b], evened=True) for a, b in itertools.pairwise(edges)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    ridge = total.solve(1e-2)
    x = decode(codes).astype(np.float64)
    x = (x / np.sqrt(np.linalg.norm(x, axis=0))).T
    mean_x, mean_y = x.mean(axis=0), heights.astype(np.float64).mean()
    penalty = np.sqrt(1e-2 * ((x - mean_x) ** 2).sum() / BANDS) * np.eye(BANDS)
    rows = np.vstack([x - mean_x, penalty])
    target = np.concatenate([heights - mean_y, np.zeros(BANDS)])
    weights = np.linalg.lstsq(rows, target, rcond=None)[0]
    assert ridge.evened
    np.testing.assert_allclose(ridge.weights, weights, rtol=1e-8, atol=1e-8)
    expected = x @ weights + mean_y - weights @ mean_x
    np.testing.assert_allclose(ridge.predict(codes), expected, rtol=1e-6)


def test_evening_changes_nothing_for_embeddings_as_they_are_delivered():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(BANDS, 400))
    x /= np.linalg.norm(x, axis=0)
    codes = np.rint(np.sign(x) * np.sqrt(np.abs(x)) * 127.5).astype(np.int8)
    heights = (1000 * x[0] + rng.normal(0, 5, 400)).astype(np.float32)
    plain, evened = (RidgeSums.of(codes, heights, evened=e).solve(1e-3) for e in (False, True))
    assert np.abs(plain.predict(codes) - evened.predict(codes)).max() < 2  # of 1000 m


# --- bumps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 8, 64])
def test_heights_are_the_linear_term_and_the_formula_of_the_bumps(count):
    found = some_kernel(count)
    codes = near(found.centres[0].astype(float), 40, 25)
    added = bumps_by_the_formula(found, codes)
    assert np.abs(added).max() > 5
    np.testing.assert_allclose(found.bent(codes), added, atol=1e-3)
    expected = EVENED.total(codes) + added
    np.testing.assert_allclose(found.predict(codes), expected, rtol=1e-6, atol=1e-3)


def test_beyond_their_reach_the_linear_term_stands_to_the_bit():
    found = some_kernel()
    codes = np.where(codes_of(BANDS, 500) < 0, -127, 127).astype(np.int8)
    distances = np.linalg.norm(
        codes.T[:, None].astype(float) - found.centres[None].astype(float), axis=-1
    )
    assert distances.min() ** 2 > SQUARED_REACH
    np.testing.assert_array_equal(found.predict(codes), EVENED.predict(codes))


@settings(max_examples=20, deadline=None)
@given(start=st.integers(0, 2999), n=st.integers(1, 3000), seed=st.integers(0, 9))
def test_a_pixel_has_the_same_bits_wherever_it_lies(start, n, seed):
    found = some_kernel(16)
    codes = near(found.centres[3].astype(float), 3000, 30, seed)
    assert codes.shape[1] > 2 * BLOCK
    whole = found.predict(codes)
    np.testing.assert_array_equal(found.predict(codes[:, start : start + n]), whole[start:][:n])
    np.testing.assert_array_equal(found.predict(codes[:, ::-1]), whole[::-1])


def test_no_embedding_no_height():
    found, codes = some_kernel(), codes_of(BANDS, 20, 30)
    missing = np.random.default_rng(3).random((20, 30)) < 0.3
    codes[:, missing] = NODATA
    np.testing.assert_array_equal(np.isnan(found.predict(codes)), missing)


# --- the fit -------------------------------------------------------------------------------------


def fitted(training, held_out):
    ridge = RidgeSums.of(training, curved(training), evened=True).solve(1e-3)
    pixels = [Pixels(codes, curved(codes)) for codes in (training, held_out)]
    return kernel.fit(ridge, *pixels)


def rmse(heights, codes):
    return float(np.sqrt(np.mean((heights - curved(codes)) ** 2)))


def test_bumps_tell_what_is_curved_on_ground_like_that_they_were_fitted_on():
    found = fitted(two_kinds(seed=0), two_kinds(n=400, seed=10))
    unseen = two_kinds(seed=20)
    assert rmse(found.predict(unseen), unseen) < 0.8 * rmse(found.ridge.predict(unseen), unseen)


def test_there_is_a_power_of_two_of_them_taken_from_the_training_pixels():
    training = two_kinds(n=150)
    found = fitted(training, two_kinds(n=100, seed=10))
    assert len(found.weights) == 256
    known = {column.tobytes() for column in np.ascontiguousarray(training.T)}
    assert all(centre.tobytes() in known for centre in found.centres)
    assert len({centre.tobytes() for centre in found.centres}) == 256


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), noise=st.floats(0, 200), n=st.integers(0, 300))
def test_bumps_never_make_the_held_out_ground_worse(seed, noise, n):
    rng = np.random.default_rng(seed)
    training, held_out = two_kinds(n=150, seed=seed), two_kinds(n=150, seed=seed + 1)[:, :n]
    ridge = RidgeSums.of(training, curved(training), evened=True).solve(1e-3)
    truth = (curved(held_out) + rng.normal(0, noise, n)).astype(np.float32)
    noisy = (curved(training) + rng.normal(0, noise, 300)).astype(np.float32)
    found = kernel.fit(ridge, Pixels(training, noisy), Pixels(held_out, truth))
    before, after = truth - ridge.total(held_out), truth - ridge.total(held_out)
    after = after - found.bent(held_out)
    assert after @ after <= before @ before * (1 + 1e-6) + 1e-6


def test_bumps_that_held_out_ground_contradicts_are_left_out():
    training, held_out = two_kinds(n=300), two_kinds(n=300, seed=10)
    ridge = RidgeSums.of(training, curved(training), evened=True).solve(1e-3)
    opposite = 2 * ridge.predict(held_out) - curved(held_out)
    found = kernel.fit(ridge, Pixels(training, curved(training)), Pixels(held_out, opposite))
    assert len(found.weights) == 0
    np.testing.assert_array_equal(found.predict(held_out), ridge.predict(held_out))


@pytest.mark.parametrize(("training", "held_out"), [(1000, 0), (63, 500), (0, 0)])
def test_too_little_ground_leaves_the_linear_term(training, held_out):
    codes, other = two_kinds(n=500), two_kinds(n=500, seed=10)
    found = kernel.fit(
        EVENED,
        Pixels(codes[:, :training], curved(codes)[:training]),
        Pixels(other[:, :held_out], curved(other)[:held_out]),
    )
    assert found.centres.shape == (0, BANDS)
    np.testing.assert_array_equal(found.predict(other), EVENED.predict(other))


def test_the_same_pixels_give_the_same_kernel():
    one, other = (fitted(two_kinds(n=200), two_kinds(n=200, seed=10)) for _ in range(2))
    np.testing.assert_array_equal(one.centres, other.centres)
    np.testing.assert_array_equal(one.weights, other.weights)
