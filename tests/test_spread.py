"""The spread against known scatter: the head, the calibration, and what a map says of itself."""

import json
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aeheight.beside import Beside, layers_of
from aeheight.embeddings import BANDS, NODATA, encode, valid
from aeheight.grid import Grid
from aeheight.models import Checkpoint
from aeheight.novelty import Novelty, Sample
from aeheight.novelty import fit as fit_novelty
from aeheight.patches import Patch
from aeheight.ridge import RidgeSums
from aeheight.settings import CubeSettings, PredictSettings, SplitSettings
from aeheight.splits import TEST, TRAIN, VALIDATION, draw_split
from aeheight.spread import FARTHEST, Errors, Head, Spread, fit
from aeheight.steps.cover import template
from aeheight.template import Template
from aeheight.windows import whole
from tests.checkpoints import checkpoint_of, codes_of
from tests.runs import arrays
from tests.tifs import DATA


def walk(rng, n, cells):
    """Codes (64, n), cells, and a log of scatter that follows five of the bands."""
    codes = rng.integers(-60, 61, (BANDS, n)).astype(np.int8)
    weights = np.zeros(BANDS)
    weights[:5] = rng.normal(size=5) * 0.006
    return codes, rng.integers(cells, size=n), 1.5 + weights @ codes


def known_errors(seed=0, n=6000, cells=60, together=0.0):
    """Errors whose scatter is known; a share of each is the same for a whole cell."""
    rng = np.random.default_rng(seed)
    codes, numbers, log = walk(rng, n, cells)
    common = rng.normal(size=cells)[numbers]
    noise = np.sqrt(together) * common + np.sqrt(1 - together) * rng.normal(size=n)
    return Errors(codes, np.exp(log) * noise, numbers), log


NONE = Errors(np.empty((BANDS, 0), np.int8), np.empty(0), np.empty(0, np.int64))


def half(errors):
    """The first 5000 pixels, and the others."""
    first, rest = slice(5000), slice(5000, None)
    return (
        Errors(errors.codes[:, part], errors.metres[part], errors.cells[part])
        for part in (first, rest)
    )


def some_spread(seed=0, **changes):
    rng = np.random.default_rng(seed)
    head = Head(rng.integers(-127, 128, BANDS).astype(np.int8), 2e-5, 2.0)
    spread = Spread(head, 1.2, 2.9, 1.7, 2, 40, 0.01)
    return replace(spread, **changes)


def test_the_head_finds_where_errors_are_large():
    errors, log = known_errors()
    spread = fit(errors, NONE, np.empty(0), 0)
    assert spread is not None
    found = spread.head.log(errors.codes)
    assert np.corrcoef(found, log)[0, 1] > 0.97
    assert np.sqrt(np.mean((found - log) ** 2)) < 0.1
    assert spread.factor == pytest.approx(1.645, rel=0.04)  # that of a Gaussian


def test_intervals_hold_nine_in_ten_of_new_pixels():
    errors, _ = known_errors(n=15_000)
    calibrating, fresh = half(errors)
    spread = fit(calibrating, NONE, np.empty(0), 0)
    width = spread.half_width(fresh.codes, np.zeros(10_000, np.float32))
    assert np.mean(np.abs(fresh.metres) <= width) == pytest.approx(0.9, abs=0.015)


def test_errors_that_go_together_are_calibrated_on_average():
    held = []
    for seed in range(12):
        errors, _ = known_errors(seed, n=4000, cells=50, together=0.3)
        others, _ = known_errors(seed, n=4000, cells=50, together=0.3)
        common = np.random.default_rng(1000 + seed).normal(size=50)[others.cells]
        noise = np.random.default_rng(2000 + seed).normal(size=4000)
        _, _, log = walk(np.random.default_rng(seed), 4000, 50)
        truth = np.exp(log) * (np.sqrt(0.3) * common + np.sqrt(0.7) * noise)
        spread = fit(errors, NONE, np.empty(0), 0)
        width = spread.half_width(others.codes, np.zeros(4000, np.float32))
        held.append(np.mean(np.abs(truth) <= width))
    assert 0.88 < np.mean(held) < 0.92
    errors, _ = known_errors(0, n=4000, cells=50, together=0.0)
    assert fit(errors, NONE, np.empty(0), 0).doubt < spread.doubt  # and knows how little it knows


def test_a_model_that_errs_half_as_much_has_half_the_spread():
    errors, _ = known_errors(n=8000)
    plain, held_out = half(errors)
    novelty = np.zeros(held_out.metres.size, np.float32)
    whole_, halved = (
        fit(plain, replace(held_out, metres=held_out.metres * factor), held_out.metres, 0)
        for factor in (1.0, 0.5)
    )
    np.testing.assert_allclose(
        halved.half_width(held_out.codes, novelty) * 2,
        whole_.half_width(held_out.codes, novelty),
        rtol=1e-6,
    )


def test_a_model_without_errors_has_the_smallest_spread():
    errors, _ = known_errors(n=2000)
    spread = fit(replace(errors, metres=errors.metres * 0), NONE, np.empty(0), 0)
    width = spread.half_width(errors.codes, np.zeros(2000, np.float32))
    assert (width > 0).all()
    assert width.max() < 0.01


@pytest.mark.parametrize(("n", "cells"), [(50, 40), (5000, 8), (0, 1)])
def test_too_little_ground_tells_nothing(n, cells):
    errors, _ = known_errors(n=n, cells=cells)
    assert fit(errors, NONE, np.empty(0), 0) is None


def test_the_same_errors_give_the_same_spread():
    errors, _ = known_errors(n=2000)
    first, second = (fit(errors, NONE, np.empty(0), 3) for _ in range(2))
    assert first.to_dict() == second.to_dict()


def test_a_cell_is_judged_by_a_ridge_that_has_not_seen_it():
    """Moving a cell's heights moves its own errors by just that."""
    rng = np.random.default_rng(0)
    codes, cells = codes_of(BANDS, 3000, seed=1), rng.integers(30, size=3000)
    heights = rng.normal(100, 30, 3000).astype(np.float32)
    moved = heights + np.where(cells == 7, 1000, 0).astype(np.float32)
    before, after = (
        Errors.of_ridge(codes, values, cells, 1e-3, 0).metres for values in (heights, moved)
    )
    np.testing.assert_allclose((after - before)[cells == 7], -1000, atol=0.01)
    assert np.abs((after - before)[cells != 7]).max() > 1


def test_cross_fitted_errors_are_those_of_ridges_fitted_by_hand():
    rng = np.random.default_rng(0)
    codes, cells = codes_of(BANDS, 2000, seed=1), np.repeat(np.arange(5), 400)
    heights = rng.normal(100, 30, 2000).astype(np.float32)
    found = Errors.of_ridge(codes, heights, cells, 1e-3, 0)
    for cell in range(5):
        here = cells == cell
        ridge = RidgeSums.of(codes[:, ~here], heights[~here]).solve(1e-3)
        expected = ridge.predict(codes[:, here]) - heights[here]
        np.testing.assert_allclose(found.metres[here], expected, atol=1e-3)


def test_half_width_is_the_factor_times_the_exponential():
    spread, codes = some_spread(), codes_of(BANDS, 40, 50, seed=2)
    codes[:, 0, :10] = NODATA
    novelty = np.linspace(0, 3, 2000, dtype=np.float32).reshape(40, 50)
    log = exact_log(spread.head, codes)
    expected = 1.7 * np.exp(np.clip(log, 1.2, 2.9)) * np.clip(novelty, 1, FARTHEST) ** 2
    found = spread.half_width(codes, novelty)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(found), ~valid(codes))
    np.testing.assert_allclose(found[valid(codes)], expected[valid(codes)], rtol=6e-4)


def exact_log(head, codes):
    """The log of scatter in float64, without blocks."""
    products = np.tensordot(head.weights.astype(float), codes.astype(float), 1)
    return products * head.scale + head.intercept


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), cut=st.integers(1, 5999), far=st.floats(0, 10))
def test_a_pixels_spread_is_its_own_bounded_and_grows_with_novelty(seed, cut, far):
    spread, codes = some_spread(seed), codes_of(BANDS, 6000, seed=seed)
    novelty = np.full(6000, far, np.float32)
    found = spread.half_width(codes, novelty)
    parts = [
        spread.half_width(codes[:, part], novelty[part]) for part in (slice(cut), slice(cut, None))
    ]
    np.testing.assert_array_equal(found, np.concatenate(parts))
    assert (spread.half_width(codes, novelty + 1) >= found).all()
    assert found.min() >= 1.699 * np.exp(1.2)
    assert found.max() <= 1.701 * np.exp(2.9) * FARTHEST**2


@pytest.mark.parametrize("seed", range(4))
def test_torch_has_numpys_bits_whatever_the_batch(seed):
    known = Novelty(codes_of(20, BANDS, seed=seed), 400.0)
    codes = codes_of(3, BANDS, 70, 90, seed=seed + 1)
    codes[0, :, :5] = NODATA
    checkpoint = checkpoint_of(novelty=known, spread=some_spread(seed))
    layers = layers_of(checkpoint, novelty=True, spread=True)
    assert layers == ("height", "novelty", "spread")
    heights = torch.zeros(3, 70, 90)
    heights[1, 10:20] = torch.nan
    made = Beside(checkpoint, layers)(heights, torch.from_numpy(codes)).numpy()
    for sample, novelty, spread, height in zip(codes, made[1], made[2], heights, strict=True):
        expected = known.distance(sample)
        np.testing.assert_array_equal(novelty, expected)
        width = checkpoint.spread.half_width(sample, expected)
        np.testing.assert_array_equal(spread, np.where(height.isnan().numpy(), np.nan, width))
    alone = Beside(checkpoint, layers)(heights[2:], torch.from_numpy(codes[2:])).numpy()
    np.testing.assert_array_equal(alone, made[:, 2:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_has_numpys_bits():
    known, codes = Novelty(codes_of(20, BANDS, seed=1), 400.0), codes_of(2, BANDS, 70, 90, seed=2)
    checkpoint = checkpoint_of(novelty=known, spread=some_spread())
    beside = Beside(checkpoint, ("height", "novelty", "spread")).to("cuda")
    made = beside(torch.zeros(2, 70, 90, device="cuda"), torch.from_numpy(codes).cuda()).cpu()
    for sample, spread in zip(codes, made[2].numpy(), strict=True):
        expected = checkpoint.spread.half_width(sample, known.distance(sample))
        np.testing.assert_array_equal(spread, expected)


def test_only_what_is_asked_for_and_known_is_told():
    known = Novelty(codes_of(5, BANDS), 400.0)
    both = checkpoint_of(novelty=known, spread=some_spread())
    assert layers_of(both, novelty=True, spread=False) == ("height", "novelty")
    assert layers_of(both, novelty=False, spread=True) == ("height", "spread")
    assert layers_of(both, novelty=False, spread=False) == ("height",)
    old = checkpoint_of(novelty=known)
    assert layers_of(old, novelty=True, spread=True) == ("height", "novelty")
    assert layers_of(checkpoint_of(), novelty=True, spread=True) == ("height",)
    codes = codes_of(1, BANDS, 8, 8)
    alone, all_ = (
        Beside(both, layers)(torch.zeros(1, 8, 8), torch.from_numpy(codes))
        for layers in (("height", "spread"), ("height", "novelty", "spread"))
    )
    np.testing.assert_array_equal(alone[1], all_[2])


def test_checkpoints_keep_it_to_the_bit_and_older_ones_their_digest():
    spread = some_spread()
    assert Spread.from_dict(json.loads(json.dumps(spread.to_dict()))).to_dict() == spread.to_dict()
    checkpoint = checkpoint_of(novelty=Novelty(codes_of(5, BANDS), 400.0), spread=spread)
    again = Checkpoint.from_bytes(checkpoint.to_bytes())
    assert again.digest == checkpoint.digest
    codes, novelty = codes_of(BANDS, 500), np.linspace(0, 3, 500, dtype=np.float32)
    np.testing.assert_array_equal(
        again.spread.half_width(codes, novelty), spread.half_width(codes, novelty)
    )
    without = replace(checkpoint, spread=None)
    assert '"spread"' not in without._facts()
    assert without.digest != checkpoint.digest
    assert Checkpoint.from_bytes(without.to_bytes()).spread is None


def test_a_sample_keeps_facts_with_their_pixels():
    codes = codes_of(BANDS, 5000)
    codes[:, ::7] = NODATA
    marks = np.arange(5000)
    sample, plain = Sample(0, 300), Sample(0, 300)
    for part in (slice(1000), slice(1000, 5000)):
        sample.add(codes[:, part], marks[part], marks[part] * 2.0)
        plain.add(codes[:, part])
    kept, doubled = sample.facts
    np.testing.assert_array_equal(sample.codes, codes[:, kept])
    np.testing.assert_array_equal(doubled, kept * 2.0)
    np.testing.assert_array_equal(plain.codes, sample.codes)
    assert plain.facts == ()


def test_a_map_has_it_as_a_layer_unless_it_is_not_wanted():
    known = checkpoint_of(novelty=Novelty(codes_of(1, BANDS), 1.0), spread=some_spread())
    grid = Grid("EPSG:32631", 10.0, 400_000.0, 5_200_000.0, (64, 64))
    cube = Template((grid,), (), (2021,), CubeSettings(shard=64, chunk=32), "some cube")
    wanted, other = (
        template(cube, known, PredictSettings(shard=64, spread=told)).layers
        for told in (True, False)
    )
    assert [layer.name for layer in wanted] == ["height", "novelty", "spread"]
    assert [layer.name for layer in other] == ["height", "novelty"]
    assert wanted[2].attributes["units"] == "m"
    assert wanted[2].attributes["checkpoint"] == known.digest


def _class(row):
    return row["split"], row["lo"], row["hi"], row.get("class")


def test_a_run_tells_its_spread_and_whether_it_holds(small_run):
    cube, heights = arrays(small_run.cube), arrays(small_run.heights)
    height, spread = heights["height"][0], heights["spread"][0]
    np.testing.assert_array_equal(np.isnan(spread), np.isnan(height))
    checkpoint = Checkpoint.from_bytes((small_run.store / "model" / "best.ckpt").read_bytes())
    codes = cube["embedding"][0]
    expected = checkpoint.spread.half_width(codes, checkpoint.novelty.distance(codes))
    np.testing.assert_array_equal(spread, np.where(np.isnan(height), np.nan, expected))
    metrics = small_run.metrics()
    difference = np.abs(height - cube["height"])
    for split, use in {"train": TRAIN, "validation": VALIDATION, "test": TEST}.items():
        here = (cube["split"] == use) & np.isfinite(difference)
        told = metrics["intervals"]["model"][split]
        assert told["coverage"] == np.mean(difference[here] <= spread[here])
        assert told["spread"] == pytest.approx(spread[here].mean(), abs=1e-3)
    for name, rows in metrics["intervals"]["by"].items():
        counts = {_class(row): row["n"] for row in metrics["by"][name]}
        here = [row for row in rows if row["split"] == "test" and row["coverage"] is not None]
        held = sum(row["coverage"] * counts[_class(row)] for row in here)
        known = sum(counts[_class(row)] for row in here)
        if known:
            assert held / known == pytest.approx(told["coverage"], abs=0.05)
    page = (small_run.store / "report" / "index.html").read_text()
    assert "How far to trust a height" in page
    assert "map of the spread of the heights" in page


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="the real data is not beside the project")
def test_real_intervals_hold_nine_in_ten_on_ground_left_out():
    """Northern California at 900 m: the ridge on five folds of blocks."""
    folder = DATA / "norcal_900m"
    with rasterio.open(folder / "aef2021_900m_west.tif") as source:
        codes = source.read()
    with rasterio.open(folder / "srtm3_900m_west.tif") as source:
        height = source.read(1)
    known = valid(codes) & np.isfinite(height)
    split = SplitSettings(block=20, buffer=2, validation=0.1, folds=5)
    folds = [split.model_copy(update={"fold": fold}) for fold in range(5)]
    held = [coverage(codes, height, known, fold) for fold in folds]
    assert 0.87 < np.mean(held) < 0.93
    assert min(held) > 0.85  # a fold is some twenty blocks of test ground
    assert max(held) < 0.97


@pytest.mark.slow
def test_intervals_hold_on_smooth_ground():
    """Embeddings and errors that go together over some 50 px, in blocks of 128 px."""
    held = []
    for seed in range(3):
        codes, height = smooth_ground(seed, edge=768, scale=25)
        split = SplitSettings(block=128, buffer=16, seed=seed)
        held.append(coverage(codes, height, valid(codes), split))
    assert 0.83 < np.mean(held) < 0.95
    assert min(held) > 0.78


def smooth_ground(seed, edge, scale):
    """Codes (64, edge, edge) of smooth fields; heights that follow them and the place."""
    rng = np.random.default_rng(seed)
    waves = np.hypot(np.fft.fftfreq(edge)[:, None], np.fft.rfftfreq(edge))
    spectrum = np.fft.rfft2(rng.normal(size=(17, edge, edge)))
    fields = np.fft.irfft2(spectrum * np.exp(-((2 * np.pi * scale * waves) ** 2) / 2))
    fields /= fields.std(axis=(1, 2), keepdims=True)
    values = np.tensordot(rng.normal(size=(BANDS, 16)), fields[:16], 1)
    codes = encode(values / np.linalg.norm(values, axis=0))
    height = 100 + 20 * fields[0] + 10 * fields[16] + rng.normal(size=(edge, edge))
    return codes, height.astype(np.float32)


def coverage(codes, height, known, split):
    """Of a ridge regression's intervals on test ground, as training makes them."""
    use = draw_split(split, height.shape, whole(height.shape), split.test, split.validation)
    train, validation, test = (known & (use == ground) for ground in (TRAIN, VALIDATION, TEST))
    blocks = Patch(codes, height, None, use).blocks(split.block)
    trained, validated = Sample(0), Sample(0)
    trained.add(codes[:, train], height[train], blocks[train])
    validated.add(codes[:, validation], height[validation], blocks[validation])
    ridge = RidgeSums.of(codes[:, train], height[train]).solve(1e-3)
    plain = Errors.of_ridge(trained.codes, *trained.facts, 1e-3, 0)
    errors = ridge.predict(validated.codes) - validated.facts[0].astype(np.float64)
    held_out = Errors(validated.codes, errors, validated.facts[1])
    spread = fit(plain, held_out, errors, 0)
    novelty = fit_novelty(trained, validated, 0).distance(codes[:, test])
    width = spread.half_width(codes[:, test], novelty)
    return np.mean(np.abs(ridge.predict(codes[:, test]) - height[test]) <= width)
