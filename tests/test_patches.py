"""The patches against the arrays of a small cube."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aeheight.cube import Tree, create
from aeheight.embeddings import BAND_NAMES, BANDS, NODATA, valid
from aeheight.grid import Grid
from aeheight.patches import PIXEL_BYTES, Patch, Patches, Spot
from aeheight.settings import CubeSettings, SplitSettings
from aeheight.splits import TEST, TRAIN, UNUSED, VALIDATION, draw_split
from aeheight.store import Store
from aeheight.template import Layer, Template
from aeheight.windows import Region, whole

ANY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


# --- a cube to draw from -----------------------------------------------------------------------

GRIDS = (
    Grid("EPSG:32610", 10, 400_000, 4_000_000, (50, 70)),
    Grid("EPSG:32611", 10, 300_000, 4_000_000, (33, 20)),
)
YEARS = (2020, 2021)
EMBEDDING = Layer("embedding", "int8", NODATA, timed=True, bands=BAND_NAMES)
HEIGHT, PRIOR = (Layer(name, "float32", np.nan) for name in ("height", "prior"))
SPLIT = Layer("split", "uint8", UNUSED)


@dataclass(frozen=True)
class World:
    """A cube and the arrays that it was made of."""

    tree: Tree
    arrays: dict

    def usable(self, group, year, use):
        codes, height = self.arrays[group, "embedding", year], self.arrays[group, "height", None]
        there = (codes[0] != NODATA) & ~np.isnan(height)
        return there & (self.arrays[group, "split", None] == use)

    def total(self, use):
        return sum(self.usable(g.name, year, use).sum() for g, year in product(GRIDS, YEARS))


def arrays_of(grid, rng):
    """Each year has its own gaps; the first shard holds no training ground."""
    codes = {}
    for year in YEARS:
        codes[year] = rng.integers(-127, 128, (BANDS, *grid.shape), dtype=np.int8)
        codes[year][:, rng.random(grid.shape) < 0.2] = NODATA
    heights = rng.normal(100, 20, (2, *grid.shape)).astype(np.float32)
    heights[rng.random(heights.shape) < 0.1] = np.nan
    wanted = SplitSettings(block=8, buffer=1, seed=0)
    use = draw_split(wanted, grid.shape, whole(grid.shape), 0.2, 0.2)
    use[:32, :32] = np.where(use[:32, :32] == TRAIN, UNUSED, use[:32, :32])
    return {
        **{(grid.name, "embedding", year): codes[year] for year in YEARS},
        (grid.name, "height", None): heights[0],
        (grid.name, "prior", None): heights[1],
        (grid.name, "split", None): use,
    }


def make_world(place, *layers):
    cut = CubeSettings(shard=32, chunk=16)
    tree = create(Store.at(place), Template(GRIDS, layers, YEARS, cut, "cube of a test"))
    rng = np.random.default_rng(0)
    arrays = {}
    for grid in GRIDS:
        arrays |= arrays_of(grid, rng)
    for layer in layers:
        for shard in tree.template.shards(layer.name):
            values = arrays[shard.group, shard.layer, shard.year]
            tree.write(shard, np.ascontiguousarray(values[(..., *shard.region.slices)]))
    return World(tree, arrays)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(
        tmp_path_factory.mktemp("cube") / "cube.zarr", EMBEDDING, HEIGHT, PRIOR, SPLIT
    )


def swept(world, edge, seed=0, **more):
    patches = Patches(world.tree, edge, seed, **more)
    for _ in patches.sweep():
        pass
    return patches


def assert_same_patch(patch, other):
    for name in ("codes", "height", "prior", "use"):
        one, two = getattr(patch, name), getattr(other, name)
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


def plain_patch(tree, spot):
    return Patch(
        *(
            tree.read(spot.group, layer, spot.year if layer == "embedding" else None, spot.region)
            for layer in ("embedding", "height", "prior", "split")
        )
    )


def test_usable_is_what_has_the_use_an_embedding_and_a_height():
    codes = np.zeros((BANDS, 1, 4), dtype=np.int8)
    codes[:, 0, 1] = NODATA
    height = np.array([[1, 1, np.nan, 1]], dtype=np.float32)
    use = np.array([[TRAIN, TRAIN, TRAIN, TEST]], dtype=np.uint8)
    patch = Patch(codes, height, None, use)
    assert patch.usable(TRAIN).tolist() == [[True, False, False, False]]
    assert patch.usable(TEST).tolist() == [[False, False, False, True]]
    assert not patch.usable(VALIDATION).any()


# --- sweep -------------------------------------------------------------------------------------


def test_a_sweep_sees_every_pixel_that_trains_or_validates_once(world):
    seen = [*Patches(world.tree, 24, 0).sweep()]
    shards = [
        shard
        for shard in world.tree.template.shards("embedding")
        if np.isin(
            world.arrays[shard.group, "split", None][shard.region.slices], (TRAIN, VALIDATION)
        ).any()
    ]
    assert len(shards) > 0
    for patch, shard in zip(seen, shards, strict=True):
        assert_same_patch(
            patch, plain_patch(world.tree, Spot(shard.group, shard.year, shard.region))
        )
    for use in (TRAIN, VALIDATION):
        assert sum(patch.usable(use).sum() for patch in seen) == world.total(use)


def test_a_sweep_passes_over_ground_that_neither_trains_nor_validates(tmp_path):
    patches = open_ground(
        tmp_path / "cube.zarr",
        (64, 192),
        [(Region(0, 0, 64, 64), TEST), (Region(0, 64, 64, 64), 2)],
    )
    assert [patch.usable(VALIDATION).all() for patch in patches.sweep()] == [True]


@pytest.mark.parametrize("edge", [2, 3])
def test_an_epoch_covers_the_training_ground_once(world, edge):
    """Cells of 3 px do not divide shards: one that two shards share is counted in both."""
    assert len(swept(world, edge).epoch(1)) == -(-world.total(TRAIN) // edge**2)


def test_an_epoch_on_small_ground_has_128_patches(world):
    assert len(swept(world, 24).epoch(1)) == 128


def test_sweeping_again_counts_anew(world):
    patches = swept(world, 5)
    before = (patches.epoch(1), patches.validation())
    assert len([*patches.sweep()]) > 0
    assert (patches.epoch(1), patches.validation()) == before


def test_a_cube_without_a_prior_has_patches_without_one(tmp_path):
    world = make_world(tmp_path / "cube.zarr", EMBEDDING, HEIGHT, SPLIT)
    patches = Patches(world.tree, 16, 0)
    assert {patch.prior for patch in patches.sweep()} == {None}
    assert patches.read(patches.epoch(1)[0]).prior is None


# --- epochs ------------------------------------------------------------------------------------


def test_an_epoch_is_decided_by_seed_and_number(world):
    one = swept(world, 24, per_epoch=50)
    assert one.epoch(3) == one.epoch(3) == swept(world, 24, per_epoch=50).epoch(3)
    assert one.epoch(3) != one.epoch(4)
    assert one.epoch(3) != swept(world, 24, seed=1, per_epoch=50).epoch(3)
    assert len(one.epoch(3)) == 50


@pytest.mark.parametrize("edge", [1, 16, 24, 40])
def test_spots_lie_inside_the_grid_where_it_is_large_enough(world, edge):
    spots = swept(world, edge, per_epoch=500).epoch(1)
    assert {spot.group for spot in spots} == {"utm10n", "utm11n"}
    assert {spot.year for spot in spots} == set(YEARS)
    for spot in spots:
        region = spot.region
        assert region.shape == (edge, edge)
        for start, size in zip((region.row, region.col), world.tree.template.grid(spot.group).shape,
                               strict=True):  # fmt: skip
            assert start == 0 if size <= edge else 0 <= start <= size - edge


def test_spots_are_drawn_where_training_ground_is(world):
    """Each lies within half a patch of usable ground, and groups and years have their share."""
    edge, number = 8, 20_000
    spots = swept(world, edge, per_epoch=number).epoch(1)
    for group, year in product(("utm10n", "utm11n"), YEARS):
        usable = world.usable(group, year, TRAIN)
        found = {spot.region for spot in spots if (spot.group, spot.year) == (group, year)}
        for region in found:
            near = region.expand(edge // 2).intersect(whole(usable.shape))
            assert usable[near.slices].any()
        drawn = sum((spot.group, spot.year) == (group, year) for spot in spots)
        assert drawn / number == pytest.approx(usable.sum() / world.total(TRAIN), abs=0.015)


def test_every_training_pixel_is_seen_sooner_or_later(world):
    spots = swept(world, 8, per_epoch=5_000).epoch(1)
    for group, year in product(("utm10n", "utm11n"), YEARS):
        usable = world.usable(group, year, TRAIN)
        seen = np.zeros_like(usable)
        for spot in spots:
            if (spot.group, spot.year) == (group, year):
                seen[spot.region.intersect(whole(usable.shape)).slices] = True
        assert (usable & ~seen).sum() == 0


# --- validation --------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", [1, 7, 16, 24, 40])
def test_validation_covers_every_usable_pixel_once(world, edge):
    patches = swept(world, edge)
    spots = patches.validation()
    assert spots == swept(world, edge, seed=1).validation()
    for group, year in product(("utm10n", "utm11n"), YEARS):
        usable = world.usable(group, year, VALIDATION)
        seen = np.zeros(usable.shape, dtype=int)
        for spot in spots:
            if (spot.group, spot.year) == (group, year):
                assert spot.region.shape == (edge, edge)
                inside = spot.region.intersect(whole(usable.shape))
                seen[inside.slices] += 1
                assert usable[inside.slices].any()
        assert seen.max() == 1
        assert (seen[usable] == 1).all()


def test_validation_patches_hold_all_validation_pixels(world):
    patches = swept(world, 24)
    total = sum(patches.read(spot).usable(VALIDATION).sum() for spot in patches.validation())
    assert total == world.total(VALIDATION)


# --- squares -----------------------------------------------------------------------------------


def open_ground(place, shape, grounds, years=(2021,)):
    """Swept patches of 16 px: ground of some use in some regions, embeddings and heights all over.

    The second grid is too small for a square.
    """
    grids = (Grid("EPSG:32610", 10, 400_000, 4_000_000, shape), GRIDS[1])
    template = Template(grids, (EMBEDDING, HEIGHT, SPLIT), years, CubeSettings(shard=64, chunk=64),
                        "cube of a test")  # fmt: skip
    tree, use = create(Store.at(place), template), np.zeros(shape, dtype=np.uint8)
    for region, which in grounds:
        use[region.slices] = which
    for shard in (s for name in ("embedding", "height", "split") for s in template.shards(name)):
        if shard.layer == "split":
            values = use[shard.region.slices] if shard.group == "utm10n" else None
        else:
            bands = (BANDS,) if shard.layer == "embedding" else ()
            values = np.ones((*bands, *shard.region.shape), template.layer(shard.layer).dtype)
        if values is not None:
            tree.write(shard, np.ascontiguousarray(values))
    patches = Patches(tree, 16, 0)
    for _ in patches.sweep():
        pass
    return patches


def corners(spots):
    return [(spot.region.row, spot.region.col) for spot in spots]


def test_squares_tile_the_ground_that_trains_or_validates(tmp_path):
    """200 x 330 px in squares of 64: the last of a row and of a column end with the grid."""
    grounds = [
        (Region(0, 0, 200, 330), TEST),
        (Region(0, 0, 64, 64), TRAIN),
        (Region(64, 128, 64, 64), VALIDATION),
        (Region(128, 192, 40, 64), TRAIN),
        (Region(0, 256, 20, 64), TRAIN),  # less than half as much as the first two
        (Region(180, 300, 20, 30), TRAIN),
    ]
    patches = open_ground(tmp_path / "cube.zarr", (200, 330), grounds)
    found = patches.squares(64, 10)
    assert corners(found) == [(0, 0), (64, 128), (128, 192)]
    assert {spot.region.shape for spot in found} == {(64, 64)}
    assert {(spot.group, spot.year) for spot in found} == {("utm10n", 2021)}
    assert patches.squares(64, 10) == patches.squares(95, 10) == found
    assert [corners(patches.squares(64, n)) for n in (0, 1, 2)] == [
        [], [(64, 128)], [(0, 0), (128, 192)],
    ]  # fmt: skip
    assert patches.read(found[1]).codes.shape == (BANDS, 64, 64)
    assert (patches.read(found[1]).use == VALIDATION).all()


def test_squares_end_with_the_grid_and_are_no_larger(tmp_path):
    patches = open_ground(
        tmp_path / "cube.zarr", (169, 237), [(Region(0, 0, 169, 237), TRAIN)], (2020, 2021)
    )
    # The last 73 rows are half a square's worth of new ground, the last 45 columns are not.
    expected = [(0, 0), (0, 96), (73, 0), (73, 96)]
    assert corners(patches.squares(96, 99)) == expected * 2
    assert [spot.year for spot in patches.squares(96, 99)] == [2020] * 4 + [2021] * 4
    assert [spot.year for spot in patches.squares(96, 4)] == [2020, 2020, 2021, 2021]
    assert corners(patches.squares(1024, 99)) == [(0, 0)] * 2
    assert {spot.region.shape for spot in patches.squares(1024, 99)} == {(160, 160)}


def test_ground_without_room_for_a_square_has_none(world):
    assert swept(world, 16).squares(1024, 4) == []
    assert Patches(world.tree, 16, 0).squares(1024, 4) == []


# --- reads -------------------------------------------------------------------------------------

spots = st.builds(
    Spot,
    st.sampled_from(["utm10n", "utm11n"]),
    st.sampled_from(YEARS),
    st.builds(
        Region,
        st.integers(-30, 60),
        st.integers(-30, 80),
        st.integers(1, 40),
        st.integers(1, 40),
    ),
)
CHUNK = BANDS * 16 * 16
ONE_CHUNK = PIXEL_BYTES * 16 * 16


@settings(deadline=None, max_examples=30)
@given(wanted=st.lists(spots, min_size=1, max_size=4), cache=st.sampled_from([0, 3, 1000]))
def test_a_read_is_what_the_cube_holds_whatever_is_cached(world, wanted, cache):
    patches = Patches(world.tree, 16, 0, cache_bytes=cache * CHUNK)
    for spot in [*wanted, *wanted[::-1]]:
        assert_same_patch(patches.read(spot), plain_patch(world.tree, spot))
        assert patches.pool.bytes <= max(patches.cache_bytes, ONE_CHUNK)


@dataclass
class Counting:
    """A tree that keeps count of what is read from it."""

    tree: Tree
    regions: list = field(default_factory=list)

    @property
    def template(self):
        return self.tree.template

    def read(self, group, layer, year, region):
        self.regions.append((group, layer, year, region))
        return self.tree.read(group, layer, year, region)


def test_a_chunk_is_read_once_while_it_is_kept(world):
    tree = Counting(world.tree)
    patches = Patches(tree, 16, 0)
    for row, col in product(range(0, 32, 4), repeat=2):
        patches.read(Spot("utm10n", 2020, Region(row, col, 8, 8)))
    chunks = [Region(row, col, 16, 16) for row, col in product((0, 16, 32), repeat=2)]
    assert len(tree.regions) == len(set(tree.regions)) == 4 * len(chunks)
    assert {region for *_, region in tree.regions} == set(chunks)


def test_the_chunk_used_longest_ago_makes_room(world):
    tree = Counting(world.tree)
    patches = Patches(tree, 16, 0, cache_bytes=2 * ONE_CHUNK)
    a, b, c = (Spot("utm10n", 2020, Region(0, col, 16, 16)) for col in (0, 16, 32))

    def reads(spot):
        before = len(tree.regions)
        patches.read(spot)
        return len(tree.regions) - before

    assert [reads(spot) for spot in (a, b, a, c, a, b)] == [4, 4, 0, 4, 0, 4]


def test_what_a_reader_does_to_a_patch_stays_there(world):
    patches, spot = Patches(world.tree, 16, 0), Spot("utm10n", 2020, Region(0, 0, 16, 16))
    patches.read(spot).codes[:] = 5
    patches.read(spot).use[:] = TEST
    assert_same_patch(patches.read(spot), plain_patch(world.tree, spot))


def test_threads_may_read_at_once(world):
    patches = swept(world, 24, per_epoch=20, cache_bytes=8 * CHUNK)
    spots = patches.epoch(1)
    with ThreadPoolExecutor(4) as pool:
        for spot, patch in zip(spots, pool.map(patches.read, spots), strict=True):
            assert_same_patch(patch, plain_patch(world.tree, spot))
    assert patches.pool.bytes <= patches.cache_bytes


def test_a_patch_past_the_edge_is_nodata_there(world):
    patch = Patches(world.tree, 40, 0).read(Spot("utm11n", 2021, Region(0, 0, 40, 40)))
    assert not valid(patch.codes)[33:].any()
    assert not valid(patch.codes)[:, 20:].any()
    assert valid(patch.codes)[:33, :20].any()
    assert np.isnan(patch.height[33:]).all()
    assert (patch.use[:, 20:] == UNUSED).all()


# --- ground that is larger than the memory -----------------------------------------------------

LARGE = (320, 256)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A cube of 80 chunks of 32 px, all of it ground that trains; every height is its place."""
    grid = Grid("EPSG:32610", 10, 400_000, 4_000_000, LARGE)
    template = Template((grid,), (EMBEDDING, HEIGHT, SPLIT), (2021,),
                        CubeSettings(shard=64, chunk=32), "cube of a test")  # fmt: skip
    tree = create(Store.at(tmp_path_factory.mktemp("large") / "cube.zarr"), template)
    place = np.arange(LARGE[0] * LARGE[1], dtype=np.float32).reshape(LARGE)
    codes = np.random.default_rng(0).integers(-127, 128, (BANDS, *LARGE), dtype=np.int8)
    whole_layers = {"embedding": codes, "height": place, "split": np.full(LARGE, TRAIN, np.uint8)}
    for name, values in whole_layers.items():
        for shard in template.shards(name):
            tree.write(shard, np.ascontiguousarray(values[(..., *shard.region.slices)]))
    return tree


def limited(tree, share, **more):
    patches = Patches(tree, 16, 0, cache_bytes=int(share * 80 * 32**2 * PIXEL_BYTES), **more)
    for _ in patches.sweep():
        pass
    return patches


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_each_byte_is_decoded_once_an_epoch_however_small_the_memory(large, share):
    patches = limited(large, share)
    assert patches.ground_bytes() == 80 * 32**2 * PIXEL_BYTES
    for number in (1, 2):
        before, tree_reads = patches.pool.loaded, Counting(large)
        patches.tree = tree_reads
        for spot in patches.epoch(number):
            patch = patches.read(spot)
            assert patch.codes.shape == (BANDS, 16, 16)
            assert patch.height[0, 0] == spot.region.row * LARGE[1] + spot.region.col
            assert patches.pool.bytes <= patches.cache_bytes
        patches.tree = large
        regions = [region for _, layer, _, region in tree_reads.regions if layer == "embedding"]
        drawn = np.zeros(LARGE, int)
        for region in regions:
            drawn[region.intersect(whole(LARGE)).slices] += 1
        assert drawn.max() == 1
        decoded = (patches.pool.loaded - before) / patches.ground_bytes()
        assert 0.8 < decoded <= 1  # the prior, which this cube lacks, counts as 4 bytes of 73
        assert patches.pool.bytes == 0  # nothing is kept that is over


def test_an_order_by_blocks_is_decided_by_seed_and_number_and_mixes_blocks(large):
    patches = limited(large, 0.3)
    first = patches.epoch(1)
    assert first == patches.epoch(1) == limited(large, 0.3).epoch(1)
    assert first != patches.epoch(2)
    cuts = {frozenset(spot.block for spot in patches.epoch(number)) for number in range(1, 9)}
    assert len(cuts) > 1  # blocks are cut elsewhere from epoch to epoch
    in_batches = [len({spot.block for spot in first[i : i + 16]}) for i in range(0, 300, 16)]
    assert np.mean(in_batches) > 3
    runs = sum(a.block == b.block for a, b in pairwise(first)) / len(first)
    assert runs < 0.5


def test_blocks_draw_all_ground_alike(large):
    """Over many epochs, each pixel away from the grid's edge is drawn about as often."""
    patches = limited(large, 0.3, per_epoch=2_000)
    counts = np.zeros(LARGE)
    for number in range(1, 31):
        for spot in patches.epoch(number):
            counts[spot.region.slices] += 1
    inside = counts[16:-16, 16:-16]
    assert inside.std() / inside.mean() < 0.25
    assert inside.min() > 0.4 * inside.mean()


def test_ground_that_fits_is_drawn_in_any_order(large):
    roomy, tight = limited(large, 1.0), limited(large, 0.99)
    assert {spot.block for spot in roomy.epoch(1)} == {None}
    assert None not in {spot.block for spot in tight.epoch(1)}
    for spot in roomy.epoch(1) + roomy.epoch(2):
        roomy.read(spot)
    assert roomy.pool.loaded <= roomy.ground_bytes()


# --- several cubes -----------------------------------------------------------------------------


def test_cubes_are_drawn_from_in_proportion_to_their_ground(world, large):
    patches = Patches(world.tree, 16, 0, per_epoch=4_000, also=[large])
    seen = sum(patch.usable(TRAIN).sum() for patch in patches.sweep())
    assert seen == world.total(TRAIN) + LARGE[0] * LARGE[1]
    spots = patches.epoch(1)
    share = sum(spot.cube == 0 for spot in spots) / len(spots)
    assert share == pytest.approx(world.total(TRAIN) / seen, abs=0.03)
    for cube in (0, 1):
        spot = next(spot for spot in spots if spot.cube == cube)
        plain = Patches(patches.trees[cube], 16, 0).read(Spot(spot.group, spot.year, spot.region))
        np.testing.assert_array_equal(patches.read(spot).codes, plain.codes)
    assert patches.read(spots[0]).prior is None  # one of them has none
    assert {spot.cube for spot in patches.validation()} == {0}


def test_patches_travel_to_another_process_without_what_they_hold(large):
    patches = limited(large, 0.3)
    patches.read(Spot("utm10n", 2021, Region(0, 0, 16, 16)))
    assert patches.pool.bytes > 0
    twin = pickle.loads(pickle.dumps(patches))
    assert twin.pool.bytes == 0
    assert twin.epoch(3) == patches.epoch(3)
    spot = patches.epoch(3)[0]
    np.testing.assert_array_equal(twin.read(spot).codes, patches.read(spot).codes)
