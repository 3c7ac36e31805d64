"""Novelty against distances in whole numbers, and the same bits whoever computes it."""

import tracemalloc

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aeheight import novelty
from aeheight.embeddings import BANDS, NODATA
from aeheight.errors import InputError
from aeheight.novelty import Novelty, Sample, fit
from tests.tifs import DATA, random_codes

NORCAL = DATA / "norcal_900m"
SEEDS = st.integers(0, 2**32 - 1)
PATIENT = settings(deadline=None)


def codes_of(seed, *shape, low=-128):
    return np.random.default_rng(seed).integers(low, 128, (BANDS, *shape)).astype(np.int8)


def made_of(seed, k=5, reach=171.25):
    return Novelty(codes_of(seed, k).T.copy(), reach)


def sample_of(codes, seed=0, **more):
    sample = Sample(seed, **more)
    sample.add(codes)
    return sample


def squares_of(codes, prototypes):
    """(n,) squared distances in whole numbers, pixel by pixel."""
    apart = codes.T[:, None].astype(np.int64) - prototypes[None].astype(np.int64)
    return (apart**2).sum(axis=2).min(axis=1)


def expected(made, codes):
    values = np.sqrt(squares_of(codes, made.prototypes).astype(np.float64)) / made.reach
    return np.where(codes[0] == NODATA, np.nan, values).astype(np.float32)


def in_torch(made, codes, block=novelty.BLOCK, device="cpu"):
    """What `distance` says, as a model on a device does it: (n, 64, h, w) to (n, h, w)."""
    weights = torch.from_numpy(made.weights).to(device)
    offsets = torch.from_numpy(made.offsets).to(device)
    batch = torch.from_numpy(codes).to(device)
    squares = torch.empty_like(batch[:, 0], dtype=torch.float64).flatten(1)
    for pixels, row in zip(batch.flatten(2), squares, strict=True):
        for part, out in zip(pixels.split(block, 1), row.split(block), strict=True):
            q = part.float()
            nearest = torch.addmm(offsets, weights, q, beta=-1).amax(0)
            out.copy_(q.square().sum(0) - nearest)
    values = (squares.sqrt() / made.reach).view(batch[:, 0].shape)
    return torch.where(batch[:, 0] != NODATA, values, torch.nan).float().cpu().numpy()


@PATIENT
@given(SEEDS, st.integers(1, 40), st.integers(1, 9), st.floats(1, 400))
def test_distances_are_exact_for_any_codes(seed, n, k, reach):
    made, codes = made_of(seed, k, reach), codes_of(seed + 1, n)
    np.testing.assert_array_equal(made.distance(codes), expected(made, codes))


def extremes():
    """The longest vectors that bytes can hold, with every pattern of signs that could add up."""
    rng = np.random.default_rng(3)
    longest = np.full((BANDS, 1), -128), np.full((BANDS, 1), 127)
    signs = np.where(rng.random((BANDS, 50)) < 0.5, -128, 127)
    halves = np.where(np.arange(BANDS)[:, None] < [[16, 32, 48]], -128, 127)
    return np.concatenate([*longest, signs, halves, -1 - halves], axis=1).astype(np.int8)


def test_no_sum_of_the_longest_vectors_is_rounded():
    codes = extremes()
    made = Novelty(codes.T.copy(), 1.0)
    q, b = codes.T[:, None].astype(np.int64), codes.T[None].astype(np.int64)
    terms = np.concatenate([2 * q * b, -b * b + 0 * q, -q * q + 0 * b], axis=2)
    for part in (terms.clip(min=0), terms.clip(max=0)):  # the worst order of any sum
        assert abs(part.sum(axis=2)).max() <= 2**22
    scores = made.weights @ codes.astype(np.float32) - made.offsets
    np.testing.assert_array_equal(scores, terms[..., : 2 * BANDS].sum(axis=2).T)
    shuffled = np.random.default_rng(4).permutation(BANDS)
    again = made.weights[:, shuffled] @ codes[shuffled].astype(np.float32) - made.offsets
    np.testing.assert_array_equal(scores, again)


def test_factors_survive_the_short_formats_of_fast_devices():
    made = Novelty(extremes().T.copy(), 1.0)
    for values in (torch.from_numpy(made.weights), torch.arange(-128, 128).float()):
        assert torch.equal(values.bfloat16().float(), values)  # so TF32, which is longer, too
        assert torch.equal(values.half().float(), values)


@settings(PATIENT, max_examples=60)
@given(SEEDS, st.tuples(*[st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)]), st.data())
def test_torch_gives_the_same_bits_for_any_cut_and_order(seed, shape, data):
    n, rows, cols = shape
    made = made_of(seed, data.draw(st.integers(1, 40), label="k"))
    batch = np.stack([random_codes(np.random.default_rng((seed, i)), rows, cols) for i in range(n)])
    whole = made.distance(batch.swapaxes(0, 1))
    assert whole.shape == shape
    block = data.draw(st.integers(1, rows * cols + 1), label="block")
    np.testing.assert_array_equal(in_torch(made, batch, block), whole)
    order = np.random.default_rng(seed).permutation(n)
    np.testing.assert_array_equal(in_torch(made, batch[order], block), whole[order])
    cut = data.draw(st.integers(0, rows), label="cut")
    np.testing.assert_array_equal(made.distance(batch[0][:, cut:]), whole[0, cut:])
    shuffled = np.random.default_rng(seed).permutation(len(made.prototypes))
    other = Novelty(made.prototypes[shuffled], made.reach)
    np.testing.assert_array_equal(other.distance(batch[0]), whole[0])


def test_blocks_and_threads_change_nothing(monkeypatch):
    made, codes = made_of(1, 128), codes_of(2, 90, 100)
    whole = made.distance(codes)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            np.testing.assert_array_equal(in_torch(made, codes[None], 999)[0], whole)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(novelty, "BLOCK", 777)
    np.testing.assert_array_equal(made.distance(codes), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tf32", [False, True])
def test_a_gpu_gives_the_same_bits(tf32):
    made, codes = made_of(1, 128), np.concatenate([codes_of(2, 300, 400)[None]] * 2)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        found = in_torch(made, codes, 50_000, "cuda")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    np.testing.assert_array_equal(found[0], made.distance(codes[0]))
    np.testing.assert_array_equal(found[1], found[0])


def test_known_distances():
    made = Novelty(np.array([[0] * BANDS, [100] * BANDS], np.int8), 40.0)
    pixels = np.zeros((BANDS, 5), np.int8)
    pixels[:2, 1] = 3, 4  # 5 steps from the first
    pixels[:, 2] = 95  # 5 steps in each band from the second
    pixels[:, 3] = 127
    pixels[:, 4] = NODATA
    known = np.array([0, 0.125, 1, 27 * 8 / 40, np.nan], np.float32)
    np.testing.assert_array_equal(made.distance(pixels), known)


@PATIENT
@given(SEEDS)
def test_novelty_changes_no_faster_than_the_embedding(seed):
    made, codes = made_of(seed, 6, 50.0), codes_of(seed + 1, 30, low=-127)
    values = made.distance(codes).astype(np.float64)
    apart = np.sqrt(((codes[:, :, None].astype(int) - codes[:, None]) ** 2).sum(axis=0)) / 50
    assert (abs(values[:, None] - values) <= apart + 1e-5).all()


def test_novelty_grows_on_the_way_out():
    way = np.zeros((BANDS, 128), np.int8)
    way[7] = np.arange(128)
    made = Novelty(way[:, :1].T.copy(), 2.0)
    np.testing.assert_array_equal(made.distance(way), np.arange(128) / np.float32(2))


def test_pixels_without_an_embedding_are_nan_and_disturb_nobody():
    codes = codes_of(5, 20, 30, low=-127)
    made = made_of(6)
    whole = made.distance(codes)
    holes = np.random.default_rng(7).random((20, 30)) < 0.4
    codes[:, holes] = NODATA
    found = made.distance(codes)
    assert np.isnan(found[holes]).all()
    np.testing.assert_array_equal(found[~holes], whole[~holes])
    assert found.dtype == np.float32


def test_ground_of_no_pixels():
    assert made_of(1).distance(codes_of(1, 0, 7)).shape == (0, 7)


def test_memory_does_not_grow_with_the_prototypes():
    made, codes = made_of(1, 500), codes_of(2, 1 << 18)
    tracemalloc.start()
    try:
        made.distance(codes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30 * codes.shape[1] + 3 * novelty.BLOCK * 4 * 500  # all at once: 2000 a pixel


def blobs(seed, centres, each, spread):
    """(64, n) pixels around centres, in a mixed order, and which belongs to which."""
    rng = np.random.default_rng(seed)
    around = rng.permutation(np.repeat(np.arange(len(centres)), each))
    codes = centres[around].T + rng.integers(-spread, spread + 1, (BANDS, around.size))
    return codes.astype(np.int8), around


def test_prototypes_are_the_means_of_heaps_far_apart():
    centres = np.random.default_rng(1).integers(-100, 100, (6, BANDS))
    codes, around = blobs(2, centres, 300, 5)
    made = fit(sample_of(codes), sample_of(codes[:, :100]), seed=3, k=6)
    means = np.stack([np.rint(codes[:, around == i].mean(axis=1)) for i in range(6)])
    np.testing.assert_array_equal(made.prototypes, np.unique(means.astype(np.int8), axis=0))


@settings(PATIENT, max_examples=30)
@given(SEEDS, st.integers(1, 30), st.integers(1, 300))
def test_one_percent_of_validation_lies_above_one(seed, k, n):
    codes = codes_of(seed, 200) // 4
    validation = sample_of(codes_of(seed + 1, n, low=-120) // 3)
    made = fit(sample_of(codes), validation, seed, k)
    above = made.distance(validation.codes) > 1
    assert above.sum() <= n / 100
    closer = Novelty(made.prototypes, made.reach * (1 - 1e-6))
    assert (closer.distance(validation.codes) > 1).sum() > n / 100  # not a step further than needed


@PATIENT
@given(SEEDS, st.integers(1, 12))
def test_few_distinct_pixels_are_their_own_prototypes(seed, distinct):
    few = codes_of(seed, distinct, low=-127)
    codes = np.concatenate([few, few[:, ::-1], few], axis=1)
    made = fit(sample_of(codes), sample_of(few), seed, k=12)
    np.testing.assert_array_equal(made.prototypes, np.unique(few.T, axis=0))
    assert not made.distance(codes).any()
    assert made.reach == 1  # nothing to tell the scale from, and nothing is divided by 0
    assert np.isfinite(made.distance(codes_of(seed + 1, 50, low=-127))).all()


def test_more_prototypes_lie_closer():
    codes, held_out = codes_of(1, 3000) // 8, codes_of(2, 1000) // 8
    reaches = [fit(sample_of(codes), sample_of(held_out), 0, k).reach for k in (1, 8, 64, 512)]
    assert reaches == sorted(reaches, reverse=True)


def test_prototypes_do_not_depend_on_blocks(monkeypatch):
    training, validation = sample_of(codes_of(1, 5000, low=-127)), sample_of(codes_of(2, 900))
    made = fit(training, validation, seed=5, k=40)
    monkeypatch.setattr(novelty, "BLOCK", 333)
    again = fit(training, validation, seed=5, k=40)
    np.testing.assert_array_equal(made.prototypes, again.prototypes)
    assert (made.reach, made.prototypes.dtype, made.prototypes.shape) == (
        again.reach, np.int8, (40, BANDS),
    )  # fmt: skip
    other = fit(training, validation, seed=6, k=40)
    assert not np.array_equal(made.prototypes, other.prototypes)


def test_without_validation_training_sets_the_scale():
    training = sample_of(codes_of(1, 1000, low=-127))
    made = fit(training, Sample(0), seed=0, k=10)
    assert (made.distance(training.codes) > 1).mean() == pytest.approx(0.01)


def test_without_training_there_is_an_error():
    nothing = codes_of(1, 9)
    nothing[:] = NODATA
    with pytest.raises(InputError, match=r"no training pixels.*`split`"):
        fit(sample_of(nothing), sample_of(codes_of(2, 9)), seed=0)


@settings(PATIENT, max_examples=50)
@given(SEEDS, st.lists(st.integers(0, 60), max_size=12), st.integers(1, 80))
def test_a_sample_does_not_depend_on_the_pieces(seed, pieces, size):
    rng = np.random.default_rng(seed)
    parts = [random_codes(rng, 1, n)[:, 0] for n in pieces]
    sample = Sample(seed, size)
    for part in parts:
        sample.add(part)
    stream = np.concatenate([np.empty((BANDS, 0), np.int8), *parts], axis=1)
    np.testing.assert_array_equal(sample.codes, sample_of(stream, seed, size=size).codes)
    there = stream[:, stream[0] != NODATA]
    assert sample.codes.shape[1] == min(size, there.shape[1])
    if there.shape[1] <= size:
        np.testing.assert_array_equal(sample.codes, there)


def test_every_pixel_has_the_same_chance():
    number = np.arange(10_000)
    codes = np.zeros((BANDS, number.size), np.int8)
    codes[0], codes[1] = number // 100, number % 100
    sample = Sample(11, 2000)
    for start in range(0, number.size, 64):
        sample.add(codes[:, start : start + 64])
    kept = sample.codes[0].astype(int) * 100 + sample.codes[1]
    assert (np.diff(kept) > 0).all()  # in the order in which they came, none twice
    counts = np.bincount(kept // 1000, minlength=10)
    assert abs(counts - 200).max() < 4 * np.sqrt(200 * 0.8)


@pytest.mark.skipif(not NORCAL.is_dir(), reason="needs the real data of ../shared/data")
def test_real_mountains_are_new_to_a_model_of_the_lowlands():
    with rasterio.open(NORCAL / "aef2021_900m_west.tif") as source:
        codes = source.read().astype(np.int8)
    with rasterio.open(NORCAL / "srtm3_900m_west.tif") as source:
        heights = source.read(1).astype(np.float64)
    blocks = np.random.default_rng(1).random((9, 12)) < 0.7
    trained = np.kron(blocks, np.ones((20, 20), bool))[: codes.shape[1], : codes.shape[2]]
    low, high = (heights > 0) & (heights < 300), heights > 1500
    training, validation = sample_of(codes[:, low & trained]), sample_of(codes[:, low & ~trained])
    made = fit(training, validation, seed=0)
    found = made.distance(codes)
    there = codes[0] != NODATA
    np.testing.assert_array_equal(np.isfinite(found), there)
    assert (found[high & there] > 1).mean() > 0.99
    assert (found[low & ~trained & there] > 1).mean() <= 0.01
    assert np.median(found[low & trained & there]) < np.median(found[low & ~trained & there])
