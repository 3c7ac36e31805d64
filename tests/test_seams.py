"""Seams of networks whose errors at a window's edge are known beforehand, and of a real one."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aeheight.embeddings import BANDS, NODATA
from aeheight.errors import InputError
from aeheight.models import HeightModel
from aeheight.ridge import Ridge
from aeheight.seams import Seams, measure
from aeheight.settings import ModelSettings


def codes_of(shape, seed=0):
    """White noise in band 0, SD 50; the others are 0."""
    codes = np.zeros((BANDS, *shape), dtype=np.int8)
    codes[0] = np.clip(np.random.default_rng(seed).normal(0, 50, shape), -127, 127)
    return codes


def means(values, reach, axis):
    """Along an axis, within `reach` px, 0 past the edge; sums of whole numbers are exact."""
    pad = [(0, 0)] * values.ndim
    pad[axis] = (reach + 1, reach)
    sums = np.cumsum(np.pad(values, pad), axis=axis)
    size, last = values.shape[axis], 2 * reach + 1
    after = np.take(sums, range(last, last + size), axis)
    return (after - np.take(sums, range(size), axis)) / last


def blur(reach, level=0.0, seen=None):
    """Band 0 plus `level`, its means over rows and over columns within `reach` px, 0 past the edge.

    So ground further than `reach` px from a window's edge is exactly what it is in any window.
    """

    def heights(codes, prior):
        if seen is not None:
            seen.append(codes.shape)
        values = np.where(codes[:, 0] == NODATA, 0.0, codes[:, 0] + float(level))
        total = means(values, reach, 1) + means(values, reach, 2)
        total += 0 if prior is None else prior
        return np.where(codes[:, 0] == NODATA, np.nan, total).astype(np.float32)

    return heights


# --- known curves ------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [1, 16, 30, 64, 100])
def test_even_ground_has_the_curve_of_the_formula(reach):
    """At d px from the cut the mean lacks reach - d of its 2 * reach + 1 pixels of 100 m."""
    ground = np.zeros((BANDS, 384, 320), dtype=np.int8)
    seams = measure(blur(reach, level=100), [(ground, None)])
    assert seams.edge == 320
    assert seams.pixels == 4 * 384 * 320 // 2
    assert seams.halos == tuple(range(0, 129, 16))  # the left and right half are 160 px wide
    for k, halo in enumerate(seams.halos):
        lacking = 100 * np.maximum(reach - np.arange(halo, halo + 32), 0) / (2 * reach + 1)
        assert seams.largest[k] == pytest.approx(lacking[0], abs=1e-4)
        assert seams.step[k] == pytest.approx(math.sqrt(2) * lacking[0], abs=1e-4)
        assert seams.rms[k] == pytest.approx(np.sqrt(np.mean(lacking**2)), abs=1e-4)
    assert seams.halo(rmse=1.0) == math.ceil(reach / 16) * 16


@pytest.mark.parametrize("reach", [5, 16, 17, 48, 60])
def test_the_halo_is_the_reach_of_the_network(reach):
    ground = [(codes_of((256, 256), seed), None) for seed in range(2)]
    assert measure(blur(reach), ground).halo(1e-3) == math.ceil(reach / 16) * 16


def test_what_reaches_further_than_the_square_has_no_halo():
    seams = measure(blur(100), [(codes_of((192, 192)), None)])
    assert seams.halos == (0, 16, 32, 48, 64)
    assert seams.halo(1.0) is None
    assert seams.halo(1e6) == 0


def steps_between_windows(heights, codes, halo, seams=range(256, 769, 128)):
    """RMS over some columns where a window on the left and one on the right meet."""
    whole, steps = heights(codes[None], None)[0], []
    for seam in seams:
        left = heights(codes[None, :, :, : seam + halo], None)[0] - whole[:, : seam + halo]
        right = heights(codes[None, :, :, seam - halo :], None)[0] - whole[:, seam - halo :]
        inside = slice(halo, codes.shape[1] - halo)
        steps.append((right[:, halo] - left[:, seam - 1])[inside])
    return float(np.sqrt(np.mean(np.square(steps))))


@pytest.mark.parametrize("halo", [0, 32, 48])
def test_the_step_is_that_of_two_windows_that_meet(halo):
    """On noise the errors on both sides are independent, and the mean squares add up."""
    codes = codes_of((1024, 1024))
    seams = measure(blur(64), [(codes, None)])
    found = steps_between_windows(blur(64), codes, halo)
    assert seams.step[seams.halos.index(halo)] == pytest.approx(found, rel=0.1)


def test_errors_that_both_sides_share_make_no_step_but_count():
    even = np.zeros((BANDS, 1024, 1024), dtype=np.int8)
    assert steps_between_windows(blur(64, level=100), even, 32) == pytest.approx(0, abs=1e-4)
    assert measure(blur(64, level=100), [(even, None)]).step[2] > 10


# --- ground of all kinds -----------------------------------------------------------------------


def test_several_squares_count_by_their_pixels():
    """Even ground of a level has errors in proportion: the squares' mean squares are averaged."""

    def square(level):
        codes = np.zeros((BANDS, 128, 128), dtype=np.int8)
        codes[0] = level
        return codes, None

    one, other, both = (
        measure(blur(40), [square(level) for level in levels]) for levels in ([10], [70], [10, 70])
    )
    assert both.halos == one.halos
    np.testing.assert_allclose(np.square(both.rms) * 2, np.square(one.rms) + np.square(other.rms))
    np.testing.assert_allclose(
        np.square(both.step) * 2, np.square(one.step) + np.square(other.step)
    )
    assert both.largest == other.largest
    assert both.pixels == 2 * one.pixels


def test_squares_of_several_sizes_measure_what_each_can():
    small, large = (codes_of((64, 64)), None), (codes_of((256, 256)), None)
    seams = measure(blur(20), [small, large])
    assert seams.edge == 256
    alone = measure(blur(20), [large])
    assert seams.halos == alone.halos
    assert seams.step[0] != alone.step[0]
    assert seams.step[1:] == alone.step[1:]  # halves of 32 px tell of no halo
    assert measure(blur(20), [small]).halos == (0,)


def test_uneven_halves_tell_as_far_as_the_narrower_reaches():
    """96 px are cut at 32; the wider half does not make up for the other."""
    assert measure(blur(20), [(codes_of((96, 96)), None)]).halos == (0,)
    assert measure(blur(20), [(codes_of((160, 160)), None)]).halos == (0, 16, 32)


def test_missing_pixels_are_left_out():
    codes, gap = codes_of((256, 256)), np.random.default_rng(1).random((256, 256)) < 0.3
    codes[:, gap] = NODATA
    seams = measure(blur(20), [(codes, None)])
    assert seams.pixels == 2 * (~gap).sum()
    assert seams.halo(1e-3) == 32
    assert np.isfinite([*seams.rms, *seams.largest, *seams.step]).all()


def test_a_side_without_a_pixel_leaves_the_halo_out():
    codes = codes_of((256, 256))
    codes[:, :, 96:] = NODATA  # left of the cut at 128 the heights begin 32 px away, right nowhere
    nothing = measure(blur(20), [(codes, None)])
    assert (nothing.halos, nothing.rms, nothing.largest, nothing.step) == ((), (), (), ())
    assert nothing.pixels == 2 * 96 * 256
    assert nothing.halo(1.0) is None
    codes = codes_of((256, 256))
    codes[:, :, 60:150] = NODATA
    assert measure(blur(20), [(codes, None)]).halos == (80, 96)


def test_no_ground_has_no_seams():
    empty = np.full((BANDS, 64, 64), NODATA, dtype=np.int8)
    for squares in ([], [(empty, None)]):
        assert measure(blur(20), squares).halo(1.0) is None


def test_the_prior_is_cut_as_the_codes_are():
    prior = np.random.default_rng(2).normal(500, 100, (128, 128)).astype(np.float32)
    prior[:10] = np.nan
    codes = codes_of((128, 128))
    seams = measure(blur(20), [(codes, prior)])
    assert seams.pixels == 2 * 118 * 128
    assert seams.halo(1e-1) == 32


def test_a_square_costs_three_times_its_pixels():
    seen = []
    measure(blur(20, seen=seen), [(codes_of((160, 160)), None)])
    whole = (1, BANDS, 160, 160)
    assert seen == [whole] + [(1, BANDS, n, 160) for n in (64, 96)] + [
        (1, BANDS, 160, n) for n in (64, 96)
    ]


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (100, 128), (128, 100), (63, 63)])
def test_squares_that_cannot_be_halved_are_refused(shape):
    with pytest.raises(InputError, match=rf"{shape[0]}x{shape[1]} px: both edges must be mult"):
        measure(blur(1), [(codes_of(shape), None)])


# --- the halo that suffices --------------------------------------------------------------------

values = st.floats(0, 10)
curves = st.lists(st.tuples(values, values, values), max_size=8).map(
    lambda rows: (
        Seams(64, 9, tuple(range(0, 16 * len(rows), 16)), *zip(*rows, strict=True))
        if rows
        else Seams(0, 0, (), (), (), ())
    )
)


@given(curves, values, st.sampled_from([0.01, 0.5, 1.0]))
def test_the_halo_is_the_first_from_which_on_all_steps_are_small(seams, rmse, share):
    enough = [
        halo
        for k, halo in enumerate(seams.halos)
        if all(step <= share * rmse for step in seams.step[k:])
    ]
    assert seams.halo(rmse, share) == min(enough, default=None)


def test_one_percent_of_the_maps_error_is_what_counts():
    seams = Seams(256, 9, (0, 16, 32, 48), (0,) * 4, (0,) * 4, (1.0, 0.05, 0.2, 0.01))
    assert [seams.halo(rmse) for rmse in (100, 20, 19.9, 1, 0.9)] == [0, 16, 48, 48, None]
    assert seams.halo(math.nan) is None


@given(curves)
def test_seams_survive_json(seams):
    assert Seams.from_dict(json.loads(json.dumps(seams.to_dict()))) == seams


# --- a real network ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    """A U-Net++ with weights as they fall, and a last layer that is not zero."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    settings = ModelSettings(architecture="unetplusplus", encoder="resnet18")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HeightModel(settings, "none", Ridge(np.zeros(BANDS), 0.0, 0.0, 1), 1.0)
        with torch.no_grad():
            for parameter in model.network.segmentation_head.parameters():
                parameter.normal_()
    model.eval().to(memory_format=torch.channels_last)

    def heights(codes, prior):
        with torch.inference_mode():
            return model(torch.from_numpy(np.ascontiguousarray(codes)), prior).numpy()

    yield heights
    torch.set_num_threads(before)


def test_a_unets_errors_fall_with_the_halo(network):
    """Measured, and held against two windows that meet; the last bits are the CPU's own."""
    codes = np.random.default_rng(0).integers(-127, 128, (BANDS, 32, 32), dtype=np.int8)
    codes = codes.repeat(8, axis=1).repeat(8, axis=2)  # 256 px, even over 8 px
    seams = measure(network, [(codes, None)])
    spread = network(codes[None], None).std()
    assert seams.halos == tuple(range(0, 97, 16))
    assert seams.step[0] > 0.3 * spread
    assert seams.step[-1] < 0.1 * seams.step[0]
    assert all(a >= b for a, b in zip(seams.largest, seams.largest[1:], strict=False))
    for halo in (32, 64):
        met = steps_between_windows(network, codes, halo, seams=[128])
        assert 0.4 < met / seams.step[seams.halos.index(halo)] < 1.2
