"""Geometry against sets of pixels: what a region holds, what a lattice covers, what it weighs."""

import doctest
import importlib
import pkgutil
from itertools import pairwise, product
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aeheight
from aeheight.errors import InputError
from aeheight.windows import Lattice, Region, tile, whole

ANY = settings(deadline=None)

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(aeheight.__path__, "aeheight.")
    if not module.name.endswith("__main__")
)

regions = st.builds(
    Region, st.integers(-20, 20), st.integers(-20, 20), st.integers(1, 12), st.integers(1, 12)
)
shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@st.composite
def lattices(draw, least_blend=0, most_blend=8):
    blends = st.integers(least_blend // 2, most_blend // 2)
    blend, halo = 2 * draw(blends), draw(st.integers(0, 5))
    stride = draw(st.integers(max(blend, 1), 15))
    return Lattice(draw(shapes), stride + blend + 2 * halo, halo, blend)


@st.composite
def lattices_and_parts(draw, most_blend=8):
    lattice = draw(lattices(most_blend=most_blend))
    rows, cols = lattice.shape
    row, col = draw(st.integers(0, rows - 1)), draw(st.integers(0, cols - 1))
    part = Region(row, col, draw(st.integers(1, rows - row)), draw(st.integers(1, cols - col)))
    return lattice, part


def pixels(region):
    return set(product(range(region.row, region.bottom), range(region.col, region.right)))


def kept_weights(lattice, windows):
    """The sum of the windows' weights at every pixel of the grid, the slow and plain way."""
    pad = lattice.window
    total = np.zeros((lattice.shape[0] + 2 * pad, lattice.shape[1] + 2 * pad))
    for window in windows:
        kept = lattice.kept(window)
        rows = slice(kept.row + pad, kept.bottom + pad)
        total[rows, kept.col + pad : kept.right + pad] += lattice.taper()
    return total[pad:-pad, pad:-pad]


# --- regions -----------------------------------------------------------------------------------


@ANY
@given(
    st.builds(
        Region,
        *[st.integers(-(10**9), 10**9)] * 2,
        *[st.integers(1, 10**9)] * 2,
    )
)
def test_a_name_parses_back(region):
    assert Region.parse(region.name) == region


def test_names_are_known():
    assert Region(256, 0, 256, 200).name == "r0000256-c0000000-256x200"
    assert Region(-64, 12_345_678, 1, 2).name == "r-000064-c12345678-1x2"


@pytest.mark.parametrize(
    "name",
    ["", "r1", "r0000256-c0000000-256", "r0-c0-0x5", "r0-c0-5x-5", " r0-c0-5x5", "r0-c0-5x5/", "α"],
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match="region"):
        Region.parse(name)


@ANY
@given(st.lists(st.builds(Region, *[st.integers(0, 9_999_999)] * 2, st.just(8), st.just(8))))
def test_names_sort_as_regions_do(found):
    assert [r.name for r in sorted(found)] == sorted(r.name for r in found)


@ANY
@given(regions, regions)
def test_intersect_is_the_shared_pixels(one, other):
    shared = one.intersect(other)
    assert (pixels(shared) if shared else set()) == pixels(one) & pixels(other)
    assert shared == other.intersect(one)
    assert one.intersect(one) == one


@ANY
@given(regions, st.integers(0, 5))
def test_expand_is_every_pixel_within_the_margin(region, margin):
    steps = list(product(range(-margin, margin + 1), repeat=2))
    near = {(row + down, col + right) for row, col in pixels(region) for down, right in steps}
    assert pixels(region.expand(margin)) == near
    assert region.expand(margin).expand(-margin) == region


@ANY
@given(regions, regions)
def test_within_counts_from_the_corner_of_the_other(region, other):
    moved = {(row - other.row, col - other.col) for row, col in pixels(region)}
    assert pixels(region.within(other)) == moved
    assert region.within(region) == whole(region.shape)


@ANY
@given(regions)
def test_a_region_measures_its_pixels(region):
    assert region.size == len(pixels(region)) == region.shape[0] * region.shape[1]
    assert max(pixels(region)) == (region.bottom - 1, region.right - 1)
    inside = whole((60, 60)).intersect(region)
    if inside is not None:
        array = np.zeros((60, 60), dtype=bool)
        array[inside.slices] = True
        assert set(zip(*np.nonzero(array), strict=True)) == pixels(inside)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (-1, 5)])
def test_an_empty_region_is_refused(shape):
    with pytest.raises(ValueError, match=f"at least one pixel, got {shape[0]}x{shape[1]}"):
        Region(0, 0, *shape)


def test_a_region_cannot_be_changed():
    with pytest.raises(AttributeError):
        Region(0, 0, 1, 1).row = 3


@ANY
@given(shapes, st.integers(1, 50))
def test_tiles_cover_every_pixel_once_and_start_on_the_edge(shape, edge):
    tiles = list(tile(shape, edge))
    covered = [pixel for part in tiles for pixel in pixels(part)]
    assert len(covered) == len(set(covered)) == shape[0] * shape[1]
    assert set(covered) == pixels(whole(shape))
    assert all(part.row % edge == part.col % edge == 0 for part in tiles)
    assert all(max(part.shape) <= edge for part in tiles)
    assert tiles == sorted(tiles)


# --- lattice -----------------------------------------------------------------------------------


def test_windows_of_a_small_grid_are_known():
    """One for each begun stride: none starts at 96 - 16, though it would keep rows from 88."""
    lattice = Lattice((96, 97), window=64, halo=8, blend=16)
    assert (lattice.stride, lattice.margin) == (32, 16)
    rows, cols = [-16, 16, 48], [-16, 16, 48, 80]
    assert lattice.windows(whole((96, 97))) == [
        Region(row, col, 64, 64) for row in rows for col in cols
    ]
    assert lattice.kept(Region(16, -16, 64, 64)) == Region(24, -8, 48, 48)


@ANY
@given(lattices_and_parts())
def test_the_windows_of_a_region_are_those_of_the_grid_that_keep_some_of_it(case):
    lattice, part = case
    everywhere = lattice.windows(whole(lattice.shape))
    wanted = [w for w in everywhere if lattice.kept(w).intersect(part)]
    assert lattice.windows(part) == wanted
    assert lattice.count(part) == len(wanted)
    assert len(set(everywhere)) == len(everywhere)
    assert sorted(everywhere) == everywhere


@ANY
@given(lattices_and_parts())
def test_every_pixel_is_kept(case):
    lattice, part = case
    assert kept_weights(lattice, lattice.windows(part))[part.slices].min() > 0


@ANY
@given(lattices_and_parts(most_blend=0))
def test_without_blending_every_pixel_is_kept_once(case):
    lattice, part = case
    assert (kept_weights(lattice, lattice.windows(part))[part.slices] == 1).all()


@ANY
@given(lattices(least_blend=2))
def test_weights_of_neighbours_add_up_to_one(lattice):
    """But along the lattice's own rim, where a window has no neighbour to share with."""
    half = lattice.blend // 2
    ends = [ceil(size / lattice.stride) * lattice.stride - half for size in lattice.shape]
    weights = kept_weights(lattice, lattice.windows(whole(lattice.shape)))
    inner = weights[half : ends[0], half : ends[1]]
    np.testing.assert_allclose(inner, 1, rtol=0, atol=1e-15)
    assert weights.max() <= 1 + 1e-15


@ANY
@given(lattices())
def test_the_taper_is_symmetric_and_flat_in_the_middle(lattice):
    taper, edge = lattice.taper(), lattice.stride + lattice.blend
    assert taper.shape == (edge, edge)
    assert taper.dtype == np.float64
    assert taper.min() > 0
    np.testing.assert_array_equal(taper, taper.T)
    np.testing.assert_array_equal(taper, taper[::-1, ::-1])
    flat = slice(lattice.blend, edge - lattice.blend)
    assert (taper[flat, flat] == 1).all()


def test_the_taper_is_linear():
    taper = Lattice((9, 9), window=16, halo=2, blend=4).taper()
    ramp = [0.125, 0.375, 0.625, 0.875]
    np.testing.assert_array_equal(taper[5], [*ramp, 1, 1, 1, 1, *ramp[::-1]])
    np.testing.assert_array_equal(taper[1], 0.375 * taper[5])


@ANY
@given(lattices())
def test_origins_differ_by_the_stride(lattice):
    """So that windows stay aligned to the network's own stride, whatever the grid."""
    rows = sorted({w.row for w in lattice.windows(whole(lattice.shape))})
    assert rows[0] == -lattice.margin
    assert {after - before for before, after in pairwise(rows)} <= {lattice.stride}


@pytest.mark.parametrize(
    ("window", "halo", "blend", "message"),
    [
        (64, -1, 0, "halo -1 and blend 0 must be 0 or more"),
        (64, 8, -2, "halo 8 and blend -2 must be 0 or more"),
        (64, 8, 3, "blend 3 must be 0 or more, and blend even"),
        (64, 32, 0, r"window 64 leaves no core: .* = 0 px .*; widen the window or cut halo 32"),
        (64, 40, 0, "= -16 px"),
        (64, 8, 26, r"= 22 px must be above 0 and at least blend \(26\)"),
    ],
)
def test_a_lattice_that_cannot_be_is_bad_input(window, halo, blend, message):
    with pytest.raises(InputError, match=message):
        Lattice((100, 100), window, halo, blend)


def test_the_least_core_is_enough():
    assert Lattice((100, 100), window=17, halo=8).stride == 1
    assert Lattice((100, 100), window=32, halo=8, blend=8).stride == 8


# --- the examples in the docstrings ------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_there_are_examples():
    assert doctest.testmod(importlib.import_module("aeheight.windows")).attempted >= 5
