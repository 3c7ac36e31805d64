"""The split against plain loops over pixels; its folds; and what is refused before training."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aeheight.cube import create
from aeheight.embeddings import BAND_NAMES, BANDS, NODATA
from aeheight.errors import InputError
from aeheight.settings import CubeSettings, SplitSettings
from aeheight.splits import TEST, TRAIN, UNUSED, VALIDATION, count_blocks, draw_split
from aeheight.steps.run import Run
from aeheight.steps.split import check_split, need_ground, record_split, split_settings
from aeheight.template import Layer, Template
from aeheight.windows import Region, whole
from tests.tifs import grid_of, height_settings, region

ANY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


# --- the split ---------------------------------------------------------------------------------


def window_of(mask, region):
    """The part of a whole grid's mask that lies in a region; False past the edge."""
    if not isinstance(mask, np.ndarray):
        return mask
    out = np.zeros(region.shape, dtype=bool)
    inside = region.intersect(whole(mask.shape))
    if inside is not None:
        out[inside.within(region).slices] = mask[inside.slices]
    return out


def split(wanted, shape, region=None, test=None, validation=None):
    """`draw_split` with shares from the settings, or with masks of the whole grid."""
    region = region or whole(shape)
    test, validation = (
        window_of(default if given is None else given, region.expand(wanted.buffer))
        for given, default in ((test, wanted.test), (validation, wanted.validation))
    )
    return draw_split(wanted, shape, region, test, validation)


def within(mask, radius):
    """Pixels within `radius` (Chebyshev) of a true one, by one shift after the other."""
    rows, cols = mask.shape
    padded = np.pad(mask, radius)
    near = np.zeros_like(mask)
    for down, right in product(range(2 * radius + 1), repeat=2):
        near |= padded[down : down + rows, right : right + cols]
    return near


@st.composite
def splits(draw):
    """Settings, a grid's shape, and test and validation ground as shares, folds or masks."""
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    if draw(st.booleans()):
        number = draw(st.integers(2, 6))
        tests = {"folds": number, "fold": draw(st.integers(0, number - 1))}
    else:
        tests = {"test": draw(st.floats(0, 1))}
    wanted = SplitSettings(
        block=draw(st.integers(1, 12)),
        buffer=draw(st.integers(0, 6)),
        validation=draw(st.floats(0, 1)),
        seed=draw(st.integers(0, 9)),
        **tests,
    )
    rng = np.random.default_rng(wanted.seed)
    masks = [rng.random(shape) < 0.02 if draw(st.booleans()) else None for _ in range(2)]
    return wanted, shape, *masks


@ANY
@given(case=splits(), data=st.data())
def test_a_pixel_has_the_same_use_in_any_cut(case, data):
    wanted, shape, test, validation = case
    everything = split(wanted, shape, None, test, validation)
    cuts = [
        [0, *sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=2))), size]
        if size > 1
        else [0, 1]
        for size in shape
    ]
    for (top, bottom), (left, right) in product(pairwise(cuts[0]), pairwise(cuts[1])):
        part = Region(top, left, bottom - top, right - left)
        use = split(wanted, shape, part, test, validation)
        assert use.dtype == np.uint8
        np.testing.assert_array_equal(use, everything[part.slices])


@ANY
@given(splits())
def test_the_buffer_is_exactly_what_lies_near_other_ground(case):
    wanted, shape, test, validation = case
    raw = split(wanted.model_copy(update={"buffer": 0}), shape, None, test, validation)
    assert UNUSED not in raw
    tests, validates = raw == TEST, raw == VALIDATION
    expected = np.where(within(tests | validates, wanted.buffer), UNUSED, TRAIN)
    expected[validates & ~within(tests, wanted.buffer)] = VALIDATION
    expected[tests] = TEST
    use = split(wanted, shape, None, test, validation)
    np.testing.assert_array_equal(use, expected)
    assert not (within(use >= VALIDATION, wanted.buffer) & (use == TRAIN)).any()
    assert not (within(use == TEST, wanted.buffer) & (use == VALIDATION)).any()


@ANY
@given(
    blocks=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    test=st.floats(0, 1),
    validation=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_shares_are_shares_of_whole_blocks(blocks, test, validation, seed):
    wanted = SplitSettings(block=5, buffer=0, test=test, validation=validation, seed=seed)
    use = split(wanted, (blocks[0] * 5, blocks[1] * 5))
    of_block = use.reshape(blocks[0], 5, blocks[1], 5).transpose(0, 2, 1, 3).reshape(-1, 25)
    assert (of_block == of_block[:, :1]).all()
    tested = round(test * len(of_block))
    validated = round(validation * (len(of_block) - tested))
    counts = np.bincount(of_block[:, 0], minlength=4).tolist()
    assert counts == [0, len(of_block) - tested - validated, validated, tested]


def test_shares_of_ragged_ground_are_about_right():
    use = split(SplitSettings(block=20, buffer=0, test=0.2, validation=0.1), (1690, 2370))
    shares = np.bincount(use.ravel(), minlength=4) / use.size
    np.testing.assert_allclose(shares, [0, 0.72, 0.08, 0.2], atol=0.01)


def test_a_mask_is_taken_as_it_is_and_validation_is_a_share_of_the_rest():
    shape, wanted = (400, 400), SplitSettings(block=10, buffer=3, test=0.5, validation=0.25)
    east = np.zeros(shape, dtype=bool)
    east[:, 250:] = True
    use = split(wanted, shape, test=east)
    np.testing.assert_array_equal(use == TEST, east)
    raw = split(wanted.model_copy(update={"buffer": 0}), shape, test=east)
    assert (raw[:, :250] == VALIDATION).mean() == pytest.approx(0.25, abs=0.03)
    both = split(wanted, shape, test=east, validation=np.ones(shape, dtype=bool))
    np.testing.assert_array_equal(both[:, :247], VALIDATION)
    np.testing.assert_array_equal(both[:, 247:250], UNUSED)
    np.testing.assert_array_equal(both[:, 250:], TEST)


def test_ground_past_the_edge_has_no_use():
    """Bounds and polygons may reach past the grid; what lies there needs no buffer."""
    wanted, region = SplitSettings(block=5, buffer=3, test=0.5, validation=0.5), whole((20, 30))
    past = np.ones((26, 36), dtype=bool)
    past[3:-3, 3:-3] = False
    for test, validation in ((past, 0), (0, past), (past, past)):
        assert (draw_split(wanted, region.shape, region, test, validation) == TRAIN).all()


@pytest.mark.parametrize(
    ("test", "validation", "use"),
    [(1.0, 0.1, TEST), (1, 1, TEST), (0.0, 1.0, VALIDATION), (0, 0, TRAIN)],
)
def test_all_ground_can_have_one_use(test, validation, use):
    wanted = SplitSettings(block=7, buffer=5, test=test, validation=validation)
    assert (split(wanted, (50, 60)) == use).all()


def test_the_seed_decides_and_a_larger_share_keeps_the_smaller_ones_ground():
    shape = (100, 100)
    small, large, other = (
        split(SplitSettings(block=10, buffer=0, test=test, seed=seed), shape)
        for test, seed in ((0.2, 0), (0.4, 0), (0.2, 1))
    )
    again = split(SplitSettings(block=10, buffer=0, test=0.2, seed=0), shape)
    np.testing.assert_array_equal(again, small)
    assert (small != other).any()
    assert (large[small == TEST] == TEST).all()


def test_a_split_is_known():
    """A model's test ground must not become another's training ground with the next version."""
    use = split(SplitSettings(block=1, buffer=0, test=0.25, validation=0.2, seed=0), (4, 6))
    assert ["".join(map(str, row)) for row in use] == ["123131", "111233", "112211", "311311"]


# --- folds -------------------------------------------------------------------------------------


@ANY
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    block=st.integers(1, 12),
    folds=st.integers(2, 9),
    validation=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_every_block_tests_exactly_once_over_all_folds(shape, block, folds, validation, seed):
    tested, counts = np.zeros(shape, dtype=int), []
    for fold in range(folds):
        wanted = SplitSettings(
            block=block, buffer=0, validation=validation, seed=seed, folds=folds, fold=fold
        )
        use, blocks = split(wanted, shape), count_blocks(wanted, shape)
        tested += use == TEST
        corners = use[::block, ::block]  # one pixel a block
        assert blocks.test == (corners == TEST).sum()
        assert blocks.validation == (corners == VALIDATION).sum()
        assert blocks.training == (corners == TRAIN).sum()
        counts.append(blocks.test)
    assert (tested == 1).all()
    assert max(counts) - min(counts) <= 1


@ANY
@given(splits())
def test_blocks_are_counted_from_metadata_as_they_are_drawn(case):
    wanted, shape, *_ = case
    corners = split(wanted.model_copy(update={"buffer": 0}), shape)[
        :: wanted.block, :: wanted.block
    ]
    found = count_blocks(wanted, shape)
    counts = np.bincount(corners.ravel(), minlength=4).tolist()
    assert [0, found.training, found.validation, found.test] == counts
    assert found.number == corners.size


def test_the_first_of_five_folds_is_a_fifth():
    shape, block = (100, 100), 10
    first = split(SplitSettings(block=block, folds=5, fold=0), shape)
    np.testing.assert_array_equal(first, split(SplitSettings(block=block, test=0.2), shape))


def test_folds_take_the_place_of_a_mask():
    wanted = SplitSettings(block=5, buffer=2, folds=4, fold=3)
    plain = split(wanted, (30, 30))
    np.testing.assert_array_equal(split(wanted, (30, 30), test=np.ones((30, 30), bool)), plain)


def test_a_split_into_folds_is_known():
    use = split(SplitSettings(block=1, buffer=0, validation=0.2, folds=4, fold=2), (4, 6))
    assert ["".join(map(str, row)) for row in use] == ["311211", "132111", "331131", "132112"]


def test_settings_of_a_split_without_folds_are_those_of_before():
    """A store from before there were folds is still known."""
    old = {"block", "buffer", "test", "validation", "seed"}
    assert set(split_settings(settings_of())) == old
    assert set(split_settings(settings_of(folds=3))) == old - {"test"} | {"folds", "fold"}


# --- bad input ---------------------------------------------------------------------------------

GRID = grid_of(40, 60)


def settings_of(**wanted):
    """A region's settings with this split."""
    return region("unused.tiff", GRID, height=height_settings("unused.tif"), split=wanted)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"test": 0.01}, ("split.test", "0.01 of 6 blocks", "split.block (20 px) smaller")),
        ({"validation": 0.01}, ("split.validation", "of the 5 blocks that do not test")),
        ({"folds": 7}, ("split.folds", "6 blocks", "7 folds", "fewer")),
        ({"test": [0, 0, 1, 1]}, ("split.test", "holds no ground", "EPSG:32610")),
        ({"test": 0.5, "validation": 1.0}, ("of 6 blocks 3 test and 3 validate", "lower")),
        ({"folds": 2, "validation": 1.0}, ("of 6 blocks 3 test and 3 validate",)),
        ({"test": 1.0}, ("of 6 blocks 6 test and 0 validate", "none to train on")),
    ],
)
def test_a_use_without_a_block_is_refused_from_metadata(wanted, words):
    with pytest.raises(InputError) as refused:
        check_split(settings_of(block=20, buffer=2, **wanted), [GRID], trains=True)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    "wanted", [{"test": 1.0}, {"test": 0.0}, {"folds": 6, "fold": 5, "validation": 0.2}]
)
def test_ground_that_need_not_train_may_all_test(wanted):
    check_split(settings_of(block=20, **wanted), [GRID])


def test_one_of_several_grids_with_blocks_is_enough():
    small = grid_of(10, 10, row=1000)
    check_split(settings_of(block=20, folds=6, validation=0.2), [small, GRID], trains=True)
    with pytest.raises(InputError, match="1 blocks cannot be dealt to 6 folds"):
        check_split(settings_of(block=20, folds=6, validation=0.2), [small], trains=True)


def ground(folder, height, codes, **wanted):
    """A run with a cube of these heights and codes, its split recorded."""
    asked = settings_of(**{"block": 20, "buffer": 2} | wanted)
    run = Run(asked.model_copy(update={"store": str(folder)}))
    layers = (
        Layer("embedding", "int8", NODATA, timed=True, bands=BAND_NAMES),
        Layer("height", "float32", np.nan),
        Layer("split", "uint8", UNUSED),
    )
    cut = CubeSettings(shard=32, chunk=16)
    tree = create(run.cube, Template((GRID,), layers, (2021,), cut, "cube of a test"))
    for name, values in (("embedding", codes), ("height", height)):
        for shard in tree.template.shards(name):
            tree.write(shard, np.ascontiguousarray(values[(..., *shard.region.slices)]))
    record_split(run)
    return run


def flat(height=100.0, code=1):
    """Heights and codes everywhere."""
    heights = np.full(GRID.shape, height, np.float32)
    return heights, np.full((BANDS, *GRID.shape), code, np.int8)


def test_ground_with_a_pixel_of_every_use_is_enough(tmp_path):
    heights, codes = flat()
    use = draw_split(SplitSettings(block=20, buffer=2), GRID.shape, whole(GRID.shape), 0.4, 0.3)
    sparse = np.full_like(heights, np.nan)
    for wanted in (TRAIN, VALIDATION, TEST):
        row, col = np.argwhere(use == wanted)[-1]
        sparse[row, col] = heights[row, col]
    need_ground(ground(tmp_path, sparse, codes, test=0.4, validation=0.3))


@pytest.mark.parametrize("use", ["train", "validation", "test"])
@pytest.mark.parametrize("lack", ["height", "embedding"])
def test_a_use_without_a_usable_pixel_is_refused(use, lack, tmp_path):
    heights, codes = flat()
    wanted = SplitSettings(block=20, buffer=2)
    drawn = draw_split(wanted, GRID.shape, whole(GRID.shape), 0.4, 0.3)
    there = drawn == {"train": TRAIN, "validation": VALIDATION, "test": TEST}[use]
    if lack == "height":
        heights[there] = np.nan
    else:
        codes[:, there] = NODATA
    run = ground(tmp_path, heights, codes, test=0.4, validation=0.3)
    with pytest.raises(InputError) as refused:
        need_ground(run)
    lacked = "a reference height;" if lack == "height" else "an embedding and a reference height;"
    for word in (f"none of the {there.sum()} pixels of {use} ground has {lacked}", "split.seed"):
        assert word in str(refused.value)


def test_a_buffer_that_takes_all_training_ground_is_named(tmp_path):
    run = ground(tmp_path, *flat(), test=0.4, validation=0.3, buffer=40)
    with pytest.raises(InputError, match="no pixel is left for train ground: the buffer of 40 px"):
        need_ground(run)


def test_ground_of_other_stores_may_be_all_that_trains(tmp_path):
    run = ground(tmp_path, *flat(), test=1.0, validation=0.0)
    with pytest.raises(InputError, match="none to train on"):
        need_ground(run)
    more = run.settings.model_copy(update={"also": ("elsewhere",)})
    need_ground(Run(more))


def test_another_fold_is_refused_and_needs_no_other_cube(tmp_path):
    run = ground(tmp_path, *flat(), folds=3, validation=0.3)
    cube = run.open_cube()
    drawn = cube.read(GRID.name, "split", None, whole(GRID.shape))
    wanted = run.settings.split.model_copy(update={"fold": 1})
    other = Run(run.settings.model_copy(update={"split": wanted}))
    with pytest.raises(InputError, match=r"split\.fold: 0 -> 1"):
        record_split(other)
    other.ledger("split").discard()  # what train --overwrite does
    record_split(other)
    again = other.open_cube()
    assert again.identity == cube.identity
    assert (again.read(GRID.name, "split", None, whole(GRID.shape)) != drawn).any()
