"""COGs: bits, overviews, what the file says of itself, and a disk that is full."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rioxarray
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS
from rio_cogeo.cogeo import cog_validate

from aeheight.export import About, Moments, overview, sha256, write_cog
from aeheight.grid import Grid
from aeheight.hillshade import hillshade
from aeheight.settings import ExportSettings
from aeheight.sources.datum import compound
from aeheight.store import Store
from aeheight.windows import Region
from tests.trees import full_disk

GRID = Grid("EPSG:32610", 10.0, 540000.25, 4280000.5, (512, 768))
SMALL = ExportSettings(block=128)
ABOUT = About("predicted height", "metre", CRS.from_epsg(32610), {"YEAR": "2021"})


def terrain(shape: tuple[int, int] = GRID.shape) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.normal(300, 100, shape).astype(np.float32)
    values[rng.random(shape) < 0.1] = np.nan
    values[100:260, 100:400] = np.nan
    return values


def written(folder: Path, values: np.ndarray, grid: Grid = GRID, **changes) -> tuple[Path, Moments]:
    path = folder / "a.tif"
    told = SMALL.model_copy(update=changes)
    return path, write_cog(path, grid, lambda region: values[region.slices], ABOUT, told)


def halves(values: np.ndarray) -> np.ndarray:
    """Mean of what is valid in every square of two by two pixels."""
    rows, cols = values.shape[0] // 2, values.shape[1] // 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of squares without a valid pixel
        return np.nanmean(values.reshape(rows, 2, cols, 2).astype(np.float64), axis=(1, 3))


@pytest.mark.parametrize("compress", ["deflate", "zstd"])
def test_a_file_is_the_pixels_bit_for_bit(tmp_path, compress):
    values = terrain()
    path, _ = written(tmp_path, values, compress=compress)
    assert cog_validate(path, strict=True) == (True, [], [])
    with rasterio.open(path) as found:
        assert found.read(1).tobytes() == values.tobytes()
        assert found.dtypes == ("float32",)
        assert np.isnan(found.nodata)
        assert (found.units, found.descriptions) == (("metre",), ("predicted height",))
        assert found.tags()["YEAR"] == "2021"
        assert found.tags(ns="IMAGE_STRUCTURE")["PREDICTOR"] == "3"
        assert found.compression.name == compress
        np.testing.assert_allclose(found.transform, GRID.transform, rtol=0, atol=1e-9)
        assert CRS.from_wkt(found.crs.to_wkt()).equals(CRS.from_epsg(32610))
    assert [each.name for each in tmp_path.iterdir()] == ["a.tif"]


@pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")  # its own
def test_rioxarray_reads_the_same(tmp_path):
    values = terrain()
    path, _ = written(tmp_path, values)
    with rioxarray.open_rasterio(path, masked=True) as found:
        np.testing.assert_array_equal(found.to_numpy()[0], values)
        np.testing.assert_allclose(found.x, GRID.x(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(found.y, GRID.y(), rtol=0, atol=1e-6)
        assert found.rio.crs.to_epsg() == 32610


def test_overviews_are_means_of_what_is_valid(tmp_path):
    expected = terrain()
    path, _ = written(tmp_path, expected)
    with rasterio.open(path) as found:
        levels = found.overviews(1)
    assert levels == [2, 4, 8]
    for level in range(len(levels)):
        expected = halves(expected)
        with rasterio.open(path, overview_level=level) as found:
            values = found.read(1)
        np.testing.assert_array_equal(np.isnan(values), np.isnan(expected))
        np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_array_equal(overview(path, (64, 96)), values)


def test_the_same_pixels_are_the_same_file(tmp_path):
    digests = []
    for name in "ab":
        (tmp_path / name).mkdir()
        path, _ = written(tmp_path / name, terrain())
        digests.append(sha256(Store(str(path.parent)).pieces(path.name, 1000)))
    assert digests[0] == digests[1]


def test_windows_are_bounded(tmp_path):
    grid = Grid("EPSG:32610", 10.0, 0.0, 4280000.0, (1100, 2500))
    asked = []

    def read(region: Region) -> np.ndarray:
        asked.append(region.shape)
        return np.ones(region.shape, np.float32)

    write_cog(tmp_path / "a.tif", grid, read, ABOUT, SMALL)
    assert max(rows * cols for rows, cols in asked) == 1024 * 1024
    assert sum(rows * cols for rows, cols in asked) == 1100 * 2500


def test_nothing_valid_makes_no_file(tmp_path):
    _, moments = written(tmp_path, np.full(GRID.shape, np.nan, np.float32))
    assert (moments.valid, moments.pixels) == (0, 512 * 768)
    assert not list(tmp_path.iterdir())


def noise() -> np.ndarray:
    """What does not compress: its COG is larger than its pixels."""
    bits = np.random.default_rng(0).integers(0, 2**31, GRID.shape, dtype=np.int32)
    return np.clip(np.nan_to_num(bits.view(np.float32)), -1e30, 1e30)


@pytest.mark.parametrize("lacking", [2_055_000, 1_000_000, 400_000, 200_000, 20_000, 1_000, 1])
def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path, lacking):
    """GDAL itself says nothing where little is lacking, and leaves a file that is cut off."""
    path, _ = written(tmp_path, noise())
    size = path.stat().st_size
    path.unlink()
    with full_disk(size - lacking), pytest.raises(OSError, match=r"cannot write a\.tif.*TMPDIR"):
        written(tmp_path, noise())
    assert not list(tmp_path.iterdir())


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 999), max_size=6), seed=st.integers(0, 99))
def test_moments_do_not_depend_on_the_cut(cuts, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(3000, 5, 1000).astype(np.float32)
    values[rng.random(1000) < 0.3] = np.nan
    found = Moments()
    for part in np.split(values, sorted(cuts)):
        found = found.add(part)
    known = values[~np.isnan(values)].astype(np.float64)
    expected = {
        "minimum": known.min(),
        "maximum": known.max(),
        "mean": known.mean(),
        "stddev": known.std(),
        "valid_percent": len(known) / 10,
    }
    assert found.statistics == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("datum", ["EPSG:5773", "EPSG:3855", "EPSG:9707"])
def test_heights_of_a_geoid_have_a_compound_crs(tmp_path, datum):
    whole = compound("EPSG:32610", datum)
    assert whole is not None
    about = About("height", "metre", whole)
    path = tmp_path / "a.tif"
    write_cog(path, GRID, lambda region: np.ones(region.shape, np.float32), about, SMALL)
    with rasterio.open(path) as found:
        flat, heights = CRS.from_wkt(found.crs.to_wkt()).sub_crs_list
        assert flat.to_epsg() == 32610
        assert heights.equals((CRS.from_user_input(datum).sub_crs_list or [None])[-1]
                              or CRS.from_user_input(datum))  # fmt: skip
        np.testing.assert_allclose(found.transform, GRID.transform, rtol=0, atol=1e-9)


@pytest.mark.parametrize("datum", ["EPSG:4979", "nonsense", "EPSG:32610"])
def test_what_no_compound_crs_can_hold(datum):
    assert compound("EPSG:32610", datum) is None


def test_a_hillshade_is_light_where_the_sun_shines():
    rows, cols = np.mgrid[:40, :40].astype(np.float32)
    north_west = hillshade(rows + cols, (10.0, 10.0))  # falls towards the north-west
    south_east = hillshade(-rows - cols, (10.0, 10.0))
    flat = hillshade(np.full((40, 40), 7, np.float32), (10.0, 10.0))
    assert north_west.mean() > flat.mean() > south_east.mean()
    np.testing.assert_allclose(flat, np.sin(np.radians(45)), atol=1e-6)
    # A plane of slope 0.5 that faces the sun at 45 degrees: the angle between them is known.
    slope = np.arctan(0.5)
    np.testing.assert_allclose(north_west, np.cos(np.radians(45) - slope), atol=1e-3)
