"""One region of a map against the whole map, made the plain way: the same to the last bit."""

import tracemalloc
from concurrent.futures import Future
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from aeheight.embeddings import BANDS, NODATA, valid
from aeheight.inference import predict_region
from aeheight.models import Checkpoint, Provenance, build
from aeheight.predictor import Predictor
from aeheight.ridge import Ridge
from aeheight.settings import ModelSettings
from aeheight.windows import Lattice, Region, tile, whole

PROVENANCE = Provenance(
    cube="a1b2",
    split="c3d4",
    surface="dsm",
    vertical_datum="EPSG:5773",
    years=(2021,),
    embedding_version="AlphaEarth Foundations v1",
    code_version="0.1.0",
)


@pytest.fixture(autouse=True, scope="module")
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class World:
    """Codes and a prior of a whole grid, read as a cube is: nodata past the edge."""

    def __init__(self, shape, missing=0.0, seed=0):
        rng = np.random.default_rng(seed)
        self.shape = shape
        self.codes = rng.integers(-127, 128, (BANDS, *shape), dtype=np.int8)
        self.codes[:, rng.random(shape) < missing] = NODATA
        self.prior = rng.normal(300, 50, shape).astype(np.float32)
        self.reads = []

    def read_codes(self, region):
        return self._read(self.codes, NODATA, region)

    def read_prior(self, region):
        return self._read(self.prior, np.nan, region)

    def _read(self, array, nodata, region):
        self.reads.append(region)
        out = np.full((*array.shape[:-2], *region.shape), nodata, dtype=array.dtype)
        inside = region.intersect(whole(self.shape))
        if inside is not None:
            out[(..., *inside.within(region).slices)] = array[(..., *inside.slices)]
        return out


def toy(codes, prior=None):
    """A mean over the neighbours in the window, and a slope across it: every seam shows."""
    there = codes[:, 0] != NODATA
    near = sliding_window_view(
        np.pad(np.where(there, codes[:, 1], 0).astype(np.int64), ((0, 0), (2, 2), (2, 2))),
        (5, 5),
        axis=(1, 2),
    ).sum(axis=(3, 4))
    heights = near / 7 + 0.3 * np.arange(codes.shape[2])[:, None]
    if prior is not None:
        heights = heights + prior
    return np.where(there, heights, np.nan).astype(np.float32)


def whole_map(model, lattice, world, *, prior=False):
    """The oracle: every window of the grid alone, in order, summed over whole arrays."""
    pad = whole(lattice.shape).expand(lattice.window)
    total, weight = np.zeros(pad.shape), np.zeros(pad.shape)
    for window in lattice.windows(whole(lattice.shape)):
        given = world.read_prior(window)[None] if prior else None
        heights = model(world.read_codes(window)[None], given)[0].astype(np.float64)
        kept = lattice.kept(window)
        target = kept.within(pad).slices
        total[target] += lattice.taper() * heights[kept.within(window).slices]
        weight[target] += lattice.taper()
    core = whole(lattice.shape).within(pad).slices
    return (total[core] / weight[core]).astype(np.float32)


def deferred(model):
    """As a predictor gives it: one layer, the middle of every window, later."""

    def submit(codes, prior, halo):
        middle = slice(halo, codes.shape[-1] - halo)
        coming = Future()
        coming.set_result(model(codes, prior)[None, :, middle, middle])
        return coming

    return getattr(model, "submit", submit)


def predict(model, lattice, region, world, batch=3, *, prior=False):
    reader = world.read_prior if prior else None
    return predict_region(deferred(model), lattice, region, batch, world.read_codes, reader)[0]


def pieced_together(parts, shape, predicted):
    out = np.zeros(shape, dtype=np.float32)
    for part in parts:
        out[part.slices] = predicted(part)
    return out


def assert_same_bits(one, other):
    assert one.dtype == other.dtype == np.float32
    np.testing.assert_array_equal(one, other)
    assert one.tobytes() == other.tobytes()


@st.composite
def cases(draw):
    """A lattice, and a grid cut by any straight lines."""
    shape = draw(st.tuples(st.integers(1, 30), st.integers(1, 30)))
    blend, halo = 2 * draw(st.integers(0, 3)), draw(st.integers(0, 4))
    stride = draw(st.integers(max(blend, 2), 12))
    lattice = Lattice(shape, stride + blend + 2 * halo, halo, blend)
    cuts = [
        [0, *sorted(draw(st.sets(st.integers(1, size - 1), max_size=3))), size]
        if size > 1
        else [0, 1]
        for size in shape
    ]
    parts = [
        Region(top, left, bottom - top, right - left)
        for top, bottom in pairwise(cuts[0])
        for left, right in pairwise(cuts[1])
    ]
    missing = draw(st.sampled_from([0.0, 0.3, 0.95, 1.0]))
    return lattice, parts, World(shape, missing, draw(st.integers(0, 99)))


# --- any cut -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(case=cases(), batch=st.integers(1, 4), prior=st.booleans())
def test_any_cut_gives_the_whole_map_bit_for_bit(case, batch, prior):
    lattice, parts, world = case
    expected = whole_map(toy, lattice, world, prior=prior)
    pieced = pieced_together(
        parts, lattice.shape, lambda part: predict(toy, lattice, part, world, batch, prior=prior)
    )
    assert_same_bits(pieced, expected)
    np.testing.assert_array_equal(np.isnan(pieced), ~valid(world.codes))


@settings(deadline=None)
@given(case=cases(), data=st.data())
def test_any_region_is_a_part_of_the_whole_map(case, data):
    lattice, _, world = case
    rows, cols = lattice.shape
    row, col = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    region = Region(
        row, col, data.draw(st.integers(1, rows - row)), data.draw(st.integers(1, cols - col))
    )
    expected = whole_map(toy, lattice, world)[region.slices]
    assert_same_bits(predict(toy, lattice, region, world), np.ascontiguousarray(expected))


def test_the_toy_shows_seams():
    """Else the tests above would prove nothing: shifted windows give another map."""
    world = World((30, 30))
    maps = [
        predict(toy, Lattice((30, 30), window, 2, 2), whole((30, 30)), world) for window in (14, 16)
    ]
    assert (maps[0] != maps[1]).mean() > 0.5


def test_a_plain_crop_is_each_windows_own_middle():
    world, lattice = World((20, 20)), Lattice((20, 20), window=14, halo=2)
    found = predict(toy, lattice, whole((20, 20)), world)
    for window in lattice.windows(whole((20, 20))):
        kept = lattice.kept(window).intersect(whole((20, 20)))
        alone = toy(world.read_codes(window)[None])[0]
        np.testing.assert_array_equal(found[kept.slices], alone[kept.within(window).slices])


def test_a_blend_of_equal_heights_is_that_height():
    """Weights that add up to something else would show."""
    world, lattice = World((40, 40)), Lattice((40, 40), window=24, halo=2, blend=8)
    found = predict(lambda codes, _: np.full_like(codes[:, 0], 0.1, np.float32), lattice,
                    whole((40, 40)), world)  # fmt: skip
    assert (found == np.float32(0.1)).all()


def test_layers_keep_apart_whatever_the_cut():
    """A second layer, told pixel by pixel, comes out of any window as it went in."""
    world, lattice = World((40, 50), missing=0.2), Lattice((40, 50), window=24, halo=2, blend=4)

    def two(codes, prior, halo):
        middle = slice(halo, codes.shape[-1] - halo)
        second = np.where(codes[:, 0] == NODATA, np.nan, codes[:, 5]).astype(np.float32)
        coming = Future()
        coming.set_result(np.stack([toy(codes), second])[:, :, middle, middle])
        return coming

    def layers(part):
        return predict_region(two, lattice, part, 3, world.read_codes, layers=2)

    whole_layers = layers(whole(lattice.shape))
    expected = np.where(valid(world.codes), world.codes[5], np.nan).astype(np.float32)
    np.testing.assert_array_equal(whole_layers[1], expected)
    assert_same_bits(whole_layers[0], predict(toy, lattice, whole(lattice.shape), world))
    for part in tile(lattice.shape, 16):
        np.testing.assert_array_equal(layers(part), whole_layers[(slice(None), *part.slices)])


def test_the_next_batch_is_filled_while_the_model_works():
    """Two batches are under way at most, and each is taken before a third begins."""
    world, lattice = World((64, 64)), Lattice((64, 64), window=16, halo=0)
    under_way, most = [0], [0]

    class Slow:
        def __init__(self, values):
            self.values = values

        def result(self):
            under_way[0] -= 1
            return self.values

    def model(codes, prior, halo):
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        return Slow(toy(codes)[None])

    predict_region(model, lattice, whole((64, 64)), 2, world.read_codes)
    assert (most[0], under_way[0]) == (2, 0)


# --- what is missing ---------------------------------------------------------------------------


def counted(model, calls):
    def run(codes, prior):
        calls.append((codes.copy(), None if prior is None else prior.copy()))
        return model(codes, prior)

    return run


def test_a_window_that_is_skipped_changes_nothing():
    shape, lattice = (40, 40), Lattice((40, 40), window=16, halo=2, blend=4)
    world, calls = World(shape), []
    world.codes[:, :, 13:] = NODATA  # the window at 12 sees what is there, and keeps none
    found = predict(counted(toy, calls), lattice, whole(shape), world, batch=1)
    windows = lattice.windows(whole(shape))
    assert len(calls) == sum(lattice.kept(window).col < 13 for window in windows)
    assert 0 < len(calls) < len(windows) / 2
    assert_same_bits(found, whole_map(toy, lattice, world))


def test_where_nothing_is_there_the_model_does_not_run():
    world, calls = World((20, 20), missing=1.0), []
    found = predict(counted(toy, calls), Lattice((20, 20), 14, 2), whole((20, 20)), world)
    assert np.isnan(found).all()
    assert calls == []


def test_what_the_model_leaves_out_stays_out():
    world = World((20, 20))
    world.prior[3:9, 5:11] = np.nan
    lattice = Lattice((20, 20), window=14, halo=1, blend=4)
    found = predict(toy, lattice, whole((20, 20)), world, prior=True)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(world.prior))


# --- batches and reads -------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 4, 7, 20])
@pytest.mark.parametrize("prior", [False, True])
def test_every_batch_is_full(batch, prior):
    shape, lattice = (30, 30), Lattice((30, 30), window=16, halo=2)
    world, calls = World(shape), []
    predict(counted(toy, calls), lattice, whole(shape), world, batch, prior=prior)
    windows = lattice.windows(whole(shape))
    assert len(windows) == 9
    assert len(calls) == -(-9 // batch)
    for codes, priors in calls:
        assert (codes.shape, codes.dtype) == ((batch, BANDS, 16, 16), np.int8)
        assert (priors is not None) == prior
        if priors is not None:
            assert (priors.shape, priors.dtype) == ((batch, 16, 16), np.float32)
    together = np.concatenate([codes for codes, _ in calls])
    for window, codes in zip(windows, together, strict=False):
        np.testing.assert_array_equal(codes, world.read_codes(window))
    assert (together[9:] == NODATA).all()
    if prior:
        assert np.isnan(np.concatenate([priors for _, priors in calls])[9:]).all()


def test_a_region_is_read_once_and_no_further_than_its_windows():
    world, lattice = World((64, 64)), Lattice((64, 64), window=16, halo=2, blend=4)
    region = Region(16, 24, 16, 8)
    predict(toy, lattice, region, world, prior=True)
    windows = lattice.windows(region)
    assert len(world.reads) == 2
    for read in world.reads:
        assert (read.row, read.col) == (windows[0].row, windows[0].col)
        assert (read.bottom, read.right) == (windows[-1].bottom, windows[-1].right)


def peak_bytes(edge, batch):
    """The most memory that a region of 128 px in a grid of `edge` takes at once."""
    lattice = Lattice((edge, edge), window=64, halo=8)
    region = Region(edge // 2 // 48 * 48, edge // 2 // 48 * 48, 128, 128)
    tracemalloc.start()
    predict_region(
        deferred(lambda codes, _: codes[:, 0].astype(np.float32)),
        lattice,
        region,
        batch,
        lambda seen: np.zeros((BANDS, *seen.shape), dtype=np.int8),
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("batch", [1, 4])
def test_memory_is_bounded_by_the_region_whatever_the_grid(batch):
    hull = (64 + 2 * 48) ** 2 * BANDS
    windows = 2 * batch * 64**2 * (BANDS + 8)  # one batch is freed after the next is made
    sums = 128**2 * (8 + 8 + 4)
    peaks = [peak_bytes(edge, batch) for edge in (480, 1_000_000)]
    assert max(peaks) < hull + windows + sums + 200_000
    assert peaks[1] < 1.05 * peaks[0]


# --- the network -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network_weights():
    """A U-Net++ whose last layer is not zero: its corrections are tens of metres."""
    model = ModelSettings(architecture="unetplusplus", encoder="resnet18")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(model)
        with torch.no_grad():
            for parameter in network.segmentation_head.parameters():
                parameter.normal_()
    return model, {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(("blend", "base"), [(0, "ridge"), (16, "prior")])
def test_many_shards_give_the_map_of_one_bit_for_bit(network_weights, blend, base):
    model, weights = network_weights
    rng = np.random.default_rng(1)
    ridge = Ridge(rng.normal(size=BANDS), 12.5, 7.25, 1000)
    predictor = Predictor(Checkpoint(model, base, ridge, 4.0, weights, PROVENANCE, ()))
    lattice = Lattice((70, 90), window=64, halo=16 - blend // 2, blend=blend)
    world = World(lattice.shape, missing=0.1, seed=2)
    world.codes[:, 10:60, :40] = NODATA
    world.prior[rng.random(lattice.shape) < 0.05] = np.nan

    def heights(part):
        return predict(predictor, lattice, part, world, 2, prior=base == "prior")

    one = heights(whole(lattice.shape))
    missing = ~valid(world.codes) | (np.isnan(world.prior) if base == "prior" else False)
    np.testing.assert_array_equal(np.isnan(one), missing)
    corrected = one - (world.prior if base == "prior" else ridge.predict(world.codes))
    assert np.nanstd(corrected) > 0.1
    for edge in (32, 48):
        shards = tile(lattice.shape, edge)
        assert_same_bits(pieced_together(shards, lattice.shape, heights), one)
