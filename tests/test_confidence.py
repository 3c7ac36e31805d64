"""Blocks and their bootstrap: what pixels say when they are drawn block by block."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aeheight import blocks as module
from aeheight.blocks import Blocks, Gathered
from aeheight.confidence import METRICS, draw, interval, resampled
from aeheight.metrics import BIN, Stats
from aeheight.windows import Region, tile, whole


def world(seed, shape=(50, 70), scale=3.0):
    """Errors, heights, what is judged, and a term; errors go together over some pixels."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.normal(size=(10, 14)), np.ones((5, 5)))[: shape[0], : shape[1]]
    errors = scale * (coarse + rng.standard_t(3, shape))
    return errors, 3000 + 40 * rng.normal(size=shape), rng.random(shape) < 0.7


def summed(errors, reference, judged, cut=None, edge=8, order=None):
    """Blocks of the whole, from pieces of `cut` pixels in any order."""
    gathered = Gathered()
    pieces = list(tile(errors.shape, cut or max(errors.shape)))
    for k in order or range(len(pieces)):
        piece = pieces[k % len(pieces)]
        at = piece.slices
        part = Blocks.of(
            (0, piece, edge), errors[at], reference[at], judged[at], [errors[at][judged[at]] ** 3]
        )
        gathered.add(part)
    return gathered.total()


def same(one, other):
    np.testing.assert_array_equal(one.keys, other.keys)
    assert one.cells == other.cells
    assert one.scale == other.scale
    np.testing.assert_allclose(one.moments, other.moments, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(one.terms, other.terms, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 99), st.integers(3, 80), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_no_cut_and_no_order_shows_in_the_blocks(seed, cut, random):
    given_world = world(seed)
    order = list(range(len(list(tile(given_world[0].shape, cut)))))
    random.shuffle(order)
    same(summed(*given_world, cut=cut, order=order), summed(*given_world))


def test_blocks_are_those_of_numpy():
    errors, reference, judged = world(1)
    blocks = summed(errors, reference, judged, cut=13)
    for key, moments, term, place in zip(
        blocks.keys, blocks.moments, blocks.terms, range(len(blocks.keys)), strict=True
    ):
        at = Region(8 * key[1], 8 * key[2], 8, 8).intersect(whole(errors.shape)).slices
        d, r = errors[at][judged[at]], reference[at][judged[at]]
        wanted = d.size, d.sum(), (d**2).sum(), r.mean(), ((r - r.mean()) ** 2).sum()
        np.testing.assert_allclose(moments, wanted, rtol=1e-9)
        np.testing.assert_allclose(term, (d**3).sum(), rtol=1e-9)
        mine = blocks.owners == place
        histogram = Stats.of(d, np.zeros_like(d)).histogram
        np.testing.assert_array_equal(blocks.bins[mine], histogram.bins)
        np.testing.assert_array_equal(blocks.cells.counts[mine], histogram.counts)


def test_blocks_can_be_joined_and_stored():
    given_world = world(2)
    fine = summed(*given_world, cut=20)
    same(fine.joined(3), Blocks(**vars(summed(*given_world, edge=24)) | {"scale": 3}))
    same(Blocks.from_arrays(fine.arrays()), fine)


@pytest.mark.parametrize("cut", [9, 25, None])
def test_of_too_many_blocks_whole_ones_are_joined(monkeypatch, cut):
    monkeypatch.setattr(module, "MOST", 20)
    found = summed(*world(3), cut=cut, edge=4)
    monkeypatch.undo()
    assert found.scale == 4
    same(found, summed(*world(3), edge=4).joined(4))


def test_a_block_of_each_pixel_is_joined_at_once():
    """However small blocks are asked for, a shard leaves few enough to be counted apart."""
    shape = (256, 256)
    errors, reference = np.random.default_rng(0).normal(0, 5, (2, *shape))
    found = Blocks.of((0, whole(shape), 1), errors, reference, np.ones(shape, bool))
    assert (len(found.keys), found.scale) == (module.MOST, 4)
    wanted = summed(errors, reference, np.ones(shape, bool), edge=4)
    np.testing.assert_array_equal(found.moments, wanted.moments)
    assert found.cells == wanted.cells


def brute_force(errors, reference, judged, weights, edge):
    """Every metric of every draw, by numpy on arrays of its pixels."""
    ids = np.arange(errors.shape[0])[:, None] // edge * 1000 + np.arange(errors.shape[1]) // edge
    pixels = [(errors[ids == k], reference[ids == k], judged[ids == k]) for k in np.unique(ids)]
    pixels = [(d[j], r[j]) for d, r, j in pixels if j.any()]
    found = {name: [] for name in METRICS}
    for times in weights:
        drawn = [pixels[k] for k, count in enumerate(times) for _ in range(count)]
        d, r = (np.concatenate(values) for values in zip(*drawn, strict=True))
        found["rmse"].append(np.sqrt(np.mean(d**2)))
        found["mean"].append(d.mean())
        found["median"].append(np.median(d))
        found["nmad"].append(1.4826 * np.median(np.abs(d - np.median(d))))
        found["le90"].append(np.quantile(np.abs(d), 0.9))
        found["r2"].append(1 - np.sum(d**2) / np.sum((r - r.mean()) ** 2))
    return {name: np.array(values) for name, values in found.items()}


@given(st.integers(0, 99), st.integers(5, 40), st.sampled_from([6, 11, 30]))
@settings(max_examples=15, deadline=None)
def test_the_bootstrap_is_that_of_whole_arrays_with_the_same_draws(seed, cut, edge):
    given_world = world(seed)
    blocks = summed(*given_world, cut=cut, edge=edge)
    weights = draw(len(blocks.keys), 60, seed)
    found, width = resampled(blocks, weights)
    wanted = brute_force(*given_world, weights, edge)
    assert width == BIN
    for name in METRICS:
        bound = {"median": BIN / 2, "le90": BIN / 2, "nmad": 1.4826 * BIN}.get(name, 0)
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-9, atol=bound + 1e-9)
        low, high = interval(found[name])
        assert low == pytest.approx(np.quantile(wanted[name], 0.025), abs=bound + 1e-6)
        assert high == pytest.approx(np.quantile(wanted[name], 0.975), abs=bound + 1e-6)


def test_wide_errors_are_told_from_wider_bins_within_their_bound():
    given_world = world(5, scale=400.0)
    blocks = summed(*given_world, edge=10)
    weights = draw(len(blocks.keys), 20, 0)
    found, _ = resampled(blocks, weights)
    coarse, width = resampled_with(blocks, weights, 300)
    assert width > BIN
    np.testing.assert_allclose(coarse["le90"], found["le90"], atol=width / 2 + BIN)
    np.testing.assert_allclose(coarse["nmad"], found["nmad"], atol=1.4826 * width + BIN)


def resampled_with(blocks, weights, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aeheight.confidence._MOST_BINS", limit)
        return resampled(blocks, weights)


def test_draws_are_those_of_the_seed_and_take_as_many_blocks_as_there_are():
    one, again, other = draw(12, 500, 7), draw(12, 500, 7), draw(12, 500, 8)
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert (one.sum(axis=1) == 12).all()
    assert abs(one.mean() - 1) < 1e-12
    assert np.var(one) == pytest.approx(11 / 12, rel=0.1)  # of a multinomial


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Of the bias of errors that go together over whole blocks."""
    held, trials = 0, 150
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        errors = np.kron(rng.normal(size=(8, 8)), np.ones((10, 10))) + rng.normal(size=(80, 80))
        blocks = summed(errors, errors, np.ones(errors.shape, bool), edge=10)
        low, high = interval(resampled(blocks, draw(64, 200, seed))[0]["mean"])
        held += low <= 0 <= high
    assert 0.87 <= held / trials <= 0.99


def test_what_is_undefined_has_no_interval():
    flat = np.zeros((20, 20))
    blocks = summed(flat + 1, flat, np.ones(flat.shape, bool), edge=5)
    found, _ = resampled(blocks, draw(16, 100, 0))
    assert interval(found["r2"]) == (None, None)
    assert interval(found["rmse"]) == (1.0, 1.0)
