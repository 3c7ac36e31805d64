"""Seams: a step put in is found, ground without one shows none, and no cut shows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aeheight.crossings import MARGIN, STRETCH, Crossings
from aeheight.windows import tile, whole


def rough(seed, shape=(256, 320)):
    """Errors that go together over a dozen pixels."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(shape[0] + 11, shape[1] + 11))
    windows = np.lib.stride_tricks.sliding_window_view(noise, (12, 12))
    return windows.mean(axis=(2, 3)) * 12 + 0.3 * rng.normal(size=shape)


def of(errors, every, cut=None):
    framed = np.pad(errors, MARGIN, constant_values=np.nan)
    total = Crossings.zero()
    for piece in tile(errors.shape, cut) if cut else [whole(errors.shape)]:
        rows = slice(piece.row, piece.bottom + 2 * MARGIN)
        cols = slice(piece.col, piece.right + 2 * MARGIN)
        total += Crossings.of(framed[rows, cols], piece, every)
    return total


def by_numpy(errors, every):
    """Mean steps across and beside all lines, from the whole array."""
    across, beside = [], []
    for e in (errors, errors.T):
        for line in range(every, len(e), every):
            if line < 2 or line + 1 >= len(e):
                continue
            a, b, c, d = e[line - 2 : line + 2]
            known = np.isfinite(a + b + c + d)
            across.append(np.abs(c - b)[known])
            beside.append((np.abs(b - a) + np.abs(d - c))[known] / 2)
    across, beside = np.concatenate(across), np.concatenate(beside)
    return across.mean(), beside.mean(), across.size


@given(st.integers(0, 99), st.sampled_from([5, 32, 64, 100]), st.sampled_from([7, 40, 64, 128]))
@settings(max_examples=30, deadline=None)
def test_steps_are_those_of_numpy_whatever_the_cut(seed, every, cut):
    errors = rough(seed, (130, 150))
    errors[np.random.default_rng(seed).random(errors.shape) < 0.05] = np.nan
    found = of(errors, every, cut).summary()
    across, beside, pairs = by_numpy(errors, every)
    assert found["pairs"] == pairs
    assert found["across_m"] == pytest.approx(across, rel=1e-9)
    assert found["beside_m"] == pytest.approx(beside, rel=1e-9)
    assert found["ratio"] == pytest.approx(across / beside, rel=1e-9)
    if cut % STRETCH == 0:  # and the uncertainty too
        np.testing.assert_allclose(of(errors, every, cut).sums, of(errors, every).sums, rtol=1e-9)


def test_a_step_that_was_put_in_is_found():
    errors = rough(1)
    rows, cols = np.indices(errors.shape) // 64
    errors += 1.5 * ((rows + cols) % 2)
    found = of(errors, 64).summary()
    assert found["lo"] > 1.1


def test_without_a_seam_the_interval_holds_one():
    held = sum(
        row["lo"] <= 1 <= row["hi"] for row in (of(rough(seed), 64).summary() for seed in range(80))
    )
    assert 0.85 * 80 <= held <= 79


def test_ground_without_lines_or_steps_says_so():
    assert of(rough(1, (40, 50)), 64).summary() is None
    assert of(np.full((200, 200), np.nan), 64).summary() is None
    assert of(np.zeros((200, 200)), 64).summary()["ratio"] is None
