"""The demo world keeps its promises: real formats, a shift from west to east, a task with steps."""

from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio
from affine import Affine
from pyproj import Transformer
from rasterio.enums import Resampling
from rasterio.warp import reproject

from aeheight.embeddings import BANDS, NODATA, decode
from aeheight.errors import InputError
from pipelines.world import World, embed, make_world
from pipelines.world_files import bilinear
from pipelines.world_land import make_landscape

SIZE = 256


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("demo") / "world", size=SIZE, seed=3)


@pytest.fixture(scope="module")
def codes(world: World) -> np.ndarray:
    return mosaic_tiles(world)


@pytest.fixture(scope="module")
def dsm(world: World) -> np.ndarray:
    """The DSM on 5 m pixels, NaN in its voids."""
    whole = np.full((2 * SIZE, 2 * SIZE), np.nan, np.float32)
    for href in asset_hrefs(world):
        with rasterio.open(href) as source:
            row = round((world.bounds[3] - source.bounds.top) / 5)
            column = round((source.bounds.left - world.bounds[0]) / 5)
            part = source.read(1, masked=True).filled(np.nan)
            whole[row : row + part.shape[0], column : column + part.shape[1]] = part
    return whole


def tiles(world: World) -> list[Path]:
    return sorted(world.embeddings.glob("2021/31N/*.tiff"))


def mosaic_tiles(world: World) -> np.ndarray:
    """All tiles north up; each pixel must come from exactly one tile."""
    whole = np.zeros((BANDS, SIZE, SIZE), np.int8)
    times = np.zeros((SIZE, SIZE), int)
    for path in tiles(world):
        with rasterio.open(path) as source:
            top = source.transform.f + source.height * source.transform.e
            row = round((world.bounds[3] - top) / 10)
            column = round((source.transform.c - world.bounds[0]) / 10)
            place = np.s_[row : row + source.height, column : column + source.width]
            whole[:, *place] = source.read()[:, ::-1]
            times[place] += 1
    assert (times == 1).all()
    return whole


def asset_hrefs(world: World) -> list[str]:
    items = pystac.Catalog.from_file(str(world.height)).get_items(recursive=True)
    return [str(item.assets["data"].get_absolute_href()) for item in items]


def halve(field: np.ndarray) -> np.ndarray:
    return field.reshape(SIZE, 2, SIZE, 2).mean((1, 3))


def test_tiles_are_like_the_real_ones(world: World) -> None:
    paths = tiles(world)
    assert len(paths) >= 4
    for path in paths:
        with rasterio.open(path) as tile:
            assert (tile.count, set(tile.dtypes), tile.nodata) == (BANDS, {"int8"}, NODATA)
            assert tile.crs == world.crs
            assert tile.transform.almost_equals(
                Affine(10, 0, tile.transform.c, 0, 10, tile.transform.f)
            )
            assert tile.transform.c % 10 == tile.transform.f % 10 == 0
            assert tile.profile["interleave"] == "band"
            assert tile.profile["compress"] == "zstd"
            assert tile.profile["tiled"]
            assert tile.overviews(1)[0] == 2


def test_tile_edges_cross_the_shards(world: World) -> None:
    inner = {(world.bounds[3] - rasterio.open(path).transform.f) / 10 for path in tiles(world)}
    assert any(edge % 256 for edge in inner)


def test_nodata_is_in_all_bands_at_once(codes: np.ndarray) -> None:
    missing = codes == NODATA
    np.testing.assert_array_equal(missing.any(0), missing.all(0))
    gaps = missing[0]
    assert 0.003 < gaps.mean() < 0.05
    assert gaps[0, -1]  # the corner
    assert gaps[20:-20, 20:-20].any()  # the lake


def test_embeddings_are_unit_vectors(codes: np.ndarray) -> None:
    norms = np.linalg.norm(decode(codes), axis=0)[codes[0] != NODATA]
    assert norms.min() > 0.99
    assert norms.max() < 1.01


def test_dsm_catalogue_opens(world: World, dsm: np.ndarray) -> None:
    catalog = pystac.Catalog.from_file(str(world.height))
    items = list(catalog.get_items(recursive=True))
    assert len(items) >= 4
    for item in items:
        asset = item.assets["data"]
        assert asset.media_type == pystac.MediaType.COG
        assert asset.roles == ["data"]
        assert not Path(asset.href).is_absolute()
        assert item.properties["proj:code"] == world.crs
        with rasterio.open(str(asset.get_absolute_href())) as source:
            assert (source.count, source.dtypes[0], source.nodata) == (1, "float32", -9999)
            assert source.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert source.res == (5, 5)
            assert item.properties["proj:shape"] == list(source.shape)
            assert item.properties["proj:transform"] == list(source.transform)[:6]
            assert item.properties["proj:bbox"] == list(source.bounds)
    void = np.isnan(dsm).mean()
    assert 0.001 < void < 0.02


def test_surface_has_trees_and_roofs_of_sane_size(dsm: np.ndarray) -> None:
    assert 30 < np.nanmin(dsm) < 80
    assert 150 < np.nanmax(dsm) < 500
    steps = np.abs(np.diff(dsm, axis=1))
    assert np.nanpercentile(steps, 99) > 5  # edges of forest and houses
    assert np.nanmedian(steps) < 2


def test_prior_lies_where_the_surface_lies(world: World, dsm: np.ndarray) -> None:
    truth = np.where(np.isnan(dsm), np.nanmean(dsm), dsm)
    centres = (np.arange(SIZE) + 0.5) * 10
    lon, lat = Transformer.from_crs(world.crs, "EPSG:4326", always_xy=True).transform(
        *np.meshgrid(world.bounds[0] + centres, world.bounds[3] - centres)
    )
    with rasterio.open(world.prior) as source:
        assert source.crs == "EPSG:4326"
        assert source.res == pytest.approx((1 / 3600, 1 / 3600))
        assert source.tags()["AREA_OR_POINT"] == "Area"
        rows, columns = (lat - source.transform.f) / -source.res[1], lon - source.transform.c
        columns = columns / source.res[0]
        assert rows.min() > 1
        assert columns.min() > 1
        assert rows.max() < source.height - 1
        assert columns.max() < source.width - 1
        prior = source.read(1)
    smooth = halve(truth)

    def error(down: float, right: float) -> float:
        sampled = bilinear(prior, rows + down, columns + right)
        return float(np.std((sampled - smooth)[~np.isnan(halve(dsm))]))

    assert 2 < error(0, 0) < 8
    assert all(error(0, 0) < error(*shift) for shift in [(0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)])


def test_bilinear_is_gdals() -> None:
    field = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    ours = np.empty((38, 58), np.float32)
    there = Affine(0.5, 0, 0.5, 0, -0.5, 19.5)
    reproject(
        field,
        ours,
        src_transform=Affine(1, 0, 0, 0, -1, 20),
        dst_transform=there,
        src_crs="EPSG:32631",
        dst_crs="EPSG:32631",
        resampling=Resampling.bilinear,
    )
    rows, columns = np.ogrid[:38, :58]
    expected = bilinear(field, 0.5 + (rows + 0.5) / 2, 0.5 + (columns + 0.5) / 2)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_east_is_higher_and_hillier(dsm: np.ndarray) -> None:
    west, east = dsm[:, :SIZE], dsm[:, SIZE:]
    assert 30 < np.nanmean(east) - np.nanmean(west) < 80
    assert np.nanstd(east) > 1.1 * np.nanstd(west)
    assert np.nanpercentile(west, 90) > np.nanpercentile(east, 25)  # they overlap


def test_ridge_beats_the_mean_in_the_east(codes: np.ndarray, dsm: np.ndarray) -> None:
    height = halve(dsm).astype(np.float64)
    known = (codes[0] != NODATA) & ~np.isnan(height)
    west = np.arange(SIZE)[None, :] < SIZE // 2
    x, y = decode(codes)[:, known & west].T.astype(np.float64), height[known & west]
    centred = x - x.mean(0)
    gram = centred.T @ centred
    weights = np.linalg.solve(
        gram + 1e-3 * np.trace(gram) / BANDS * np.eye(BANDS), centred.T @ (y - y.mean())
    )
    x_east, y_east = decode(codes)[:, known & ~west].T, height[known & ~west]

    def r2(predicted: np.ndarray | float) -> float:
        return 1 - float(np.mean((predicted - y_east) ** 2) / y_east.var())

    assert r2(y.mean()) < 0
    assert 0.3 < r2(y.mean() + (x_east - x.mean(0)) @ weights) < 0.85


def test_same_seed_same_pixels(world: World, codes: np.ndarray, tmp_path: Path) -> None:
    again = make_world(tmp_path / "again", size=SIZE, seed=3)
    np.testing.assert_array_equal(mosaic_tiles(again), codes)
    for ours, theirs in zip(asset_hrefs(world), asset_hrefs(again), strict=True):
        with rasterio.open(ours) as a, rasterio.open(theirs) as b:
            np.testing.assert_array_equal(a.read(), b.read())
    with rasterio.open(world.prior) as a, rasterio.open(again.prior) as b:
        np.testing.assert_array_equal(a.read(), b.read())


def test_other_seed_other_pixels(codes: np.ndarray, tmp_path: Path) -> None:
    other = make_world(tmp_path / "other", size=SIZE, seed=4)
    assert (mosaic_tiles(other) != codes).mean() > 0.5


def test_a_whole_world_is_left_alone_and_a_torn_one_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "world"
    first = make_world(folder, size=SIZE)
    stamp = first.prior.stat().st_mtime_ns
    assert make_world(folder, size=SIZE) == first
    assert first.prior.stat().st_mtime_ns == stamp
    tile = tiles(first)[0]
    tile.unlink()
    make_world(folder, size=SIZE)
    assert tile.is_file()
    assert make_world(folder, size=SIZE, seed=1).seed == 1
    assert [path.name for path in tmp_path.iterdir()] == ["world"]  # no drafts left


@pytest.fixture(scope="module")
def two_zones(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("zones") / "world", size=SIZE, seed=3, zones=2)


def zone_of(world: World, zone: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes of a zone's tiles (64, n), where they lie in the world's CRS, and their longitude."""
    codes, places = [], []
    for path in sorted(world.embeddings.glob(f"2021/{zone}/*.tiff")):
        with rasterio.open(path) as source:
            assert source.crs == f"EPSG:326{zone[:2]}"
            assert source.transform.c % 10 == source.transform.f % 10 == 0
            rows, columns = np.indices(source.shape)
            x = source.transform.c + 10 * (columns + 0.5)
            y = source.transform.f + 10 * (rows + 0.5)
            codes.append(source.read().reshape(BANDS, -1))
            places.append(np.stack([x.ravel(), y.ravel()]))
    x, y = np.concatenate(places, axis=1)
    corners = np.round(np.stack([x, y]) - 5).astype(int)
    assert len(np.unique(corners, axis=1).T) == x.size  # no pixel in two tiles
    crs = f"EPSG:326{zone[:2]}"
    lon, _ = Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(x, y)
    x, y = Transformer.from_crs(crs, world.crs, always_xy=True).transform(x, y)
    return np.concatenate(codes, axis=1), x, y, lon


def seen(x: np.ndarray, y: np.ndarray, world: World) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and column of the world that holds a place, and whether it is inside."""
    row = np.floor((world.bounds[3] - y) / 10).astype(int)
    column = np.floor((x - world.bounds[0]) / 10).astype(int)
    inside = (row >= 0) & (row < SIZE) & (column >= 0) & (column < SIZE)
    return row, column, inside


@pytest.mark.parametrize("zone", ["31N", "32N"])
def test_every_code_of_two_zones_is_the_landscapes(two_zones: World, zone: str) -> None:
    truth = embed(make_landscape(SIZE, 3), 3)
    codes, x, y, lon = zone_of(two_zones, zone)
    row, column, inside = seen(x, y, two_zones)
    known = (codes != NODATA).all(axis=0)
    assert inside[known].all()
    np.testing.assert_array_equal(codes[:, known], truth[:, row[known], column[known]])
    # Away from the meridian every pixel of the landscape that has a code is there.
    east = (lon - 6) * 111_320 * np.cos(np.radians(46))
    mine = inside & ((east < 0) if zone == "31N" else (east > 60))
    np.testing.assert_array_equal(known[mine], truth[0, row[mine], column[mine]] != NODATA)


def test_two_zones_share_the_ground_but_for_a_ragged_seam(two_zones: World) -> None:
    truth = embed(make_landscape(SIZE, 3), 3)[0] != NODATA
    covered = np.zeros((2, SIZE, SIZE), bool)
    for layer, zone in zip(covered, ("31N", "32N"), strict=True):
        codes, x, y, lon = zone_of(two_zones, zone)
        row, column, inside = seen(x, y, two_zones)
        known = inside & (codes[0] != NODATA)
        layer[row[known], column[known]] = True
        east = (lon[known] - 6) * 111_320 * np.cos(np.radians(46))
        assert (20 < east.max() < 40) if zone == "31N" else (-60 < east.min() < -40)
    both, neither = covered.all(axis=0), truth & ~covered.any(axis=0)
    assert 0.3 < covered[0].mean() < 0.6
    assert 0.3 < covered[1].mean() < 0.6
    assert 2 < both.sum() / SIZE < 6  # pixels of overlap in a row
    assert 0 < neither[:, SIZE // 4 : -SIZE // 4].sum() / SIZE < 1
    missed = neither.sum() - neither[:, SIZE // 4 : -SIZE // 4].sum()
    assert missed < 0.01 * truth.sum()  # pixels between the centres of the turned lattice


def test_two_zones_leave_the_rest_as_it_was(
    world: World, two_zones: World, dsm: np.ndarray
) -> None:
    assert two_zones.crs == world.crs
    assert two_zones.bounds[1::2] == world.bounds[1::2]
    middle = (two_zones.bounds[0] + two_zones.bounds[2]) / 2, two_zones.bounds[3] - SIZE * 5
    lon, _ = Transformer.from_crs(world.crs, "EPSG:4326", always_xy=True).transform(*middle)
    assert abs(lon - 6) * 111_320 < 20
    for mine, other in zip(asset_hrefs(two_zones), asset_hrefs(world), strict=True):
        with rasterio.open(mine) as a, rasterio.open(other) as b:
            np.testing.assert_array_equal(a.read(), b.read())


def test_worlds_of_one_and_two_zones_are_two(tmp_path: Path) -> None:
    make_world(tmp_path / "world", size=SIZE, zones=2)
    again = make_world(tmp_path / "world", size=SIZE)
    assert not list(again.embeddings.glob("2021/32N"))
    with pytest.raises(InputError, match="give 1 or 2"):
        make_world(tmp_path / "world", size=SIZE, zones=3)


@pytest.mark.parametrize(("size", "seed"), [(0, 0), (100, 0), (300, 0), (256, -1)])
def test_bad_parameters(tmp_path: Path, size: int, seed: int) -> None:
    with pytest.raises(InputError, match="give"):
        make_world(tmp_path / "world", size=size, seed=seed)


def test_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="holds no demo world"):
        make_world(tmp_path, size=SIZE)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
