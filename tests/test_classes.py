"""Class rasters: the nearest pixel of any raster, and what is refused."""

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.warp import Resampling, reproject

from aeheight.errors import InputError
from aeheight.settings import load_region
from aeheight.sources import ClassMaps
from aeheight.sources.classes import LARGEST, MISSING, read_classes, scan_classes
from aeheight.windows import Region, tile, whole
from tests.runs import arrays
from tests.test_end_to_end import SPLITS, numpy_metrics, same_metrics
from tests.tifs import CRS, LEFT, STEP, TOP, grid_of, region, write_tif

GRID = grid_of(60, 72)
RNG = np.random.default_rng(4)


def written(path, values, transform=None, crs=CRS, nodata=None):
    return write_tif(path, values, transform or Affine(STEP, 0, LEFT, 0, -STEP, TOP), crs, nodata)


def wanted(*hrefs, **more):
    classes = {"land": {"href": [str(href) for href in hrefs], **more}}
    return region("unused.tiff", evaluate={"classes": classes})


def read(*hrefs, grid=GRID, part=None, **more):
    settings = wanted(*hrefs, **more)
    source = scan_classes(settings, "land", settings.evaluate.classes["land"], [grid])
    return read_classes(source, grid, part or whole(grid.shape))


def test_classes_on_the_grid_are_copied(tmp_path):
    values = RNG.integers(0, 200, (60, 72)).astype(np.uint8)
    path = written(tmp_path / "a.tif", values, nodata=7)
    np.testing.assert_array_equal(read(path), np.where(values == 7, MISSING, values.astype(int)))


def test_a_raster_whose_first_row_is_the_southernmost(tmp_path):
    values = RNG.integers(0, 9, (60, 72)).astype(np.uint8)
    turned = Affine(STEP, 0, LEFT, 0, STEP, TOP - 60 * STEP)
    path = written(tmp_path / "a.tif", values[::-1].copy(), turned)
    np.testing.assert_array_equal(read(path), values)


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:32611", "EPSG:3857"])
def test_another_crs_is_warped_to_the_nearest_as_gdal_does_exactly(tmp_path, crs):
    west, south, east, north = rasterio.warp.transform_bounds(CRS, crs, *GRID.bounds)
    rows, cols = 47, 53
    dx, dy = (east - west) / cols, (north - south) / rows
    transform = Affine(dx, 0, west + 5 * dx, 0, -dy, north - 3 * dy)  # does not cover it all
    values = RNG.integers(0, 200, (rows, cols)).astype(np.uint8)
    path = written(tmp_path / "a.tif", values, transform, crs, nodata=255)
    gdal = np.full(GRID.shape, 255, np.uint8)
    reproject(
        values, gdal, src_transform=transform, src_crs=crs, src_nodata=255, dst_nodata=255,
        dst_transform=GRID.transform, dst_crs=CRS, resampling=Resampling.nearest, tolerance=1e-6,
    )  # fmt: skip
    found = read(path)
    assert (found == MISSING).any()
    assert (found != MISSING).mean() > 0.7
    same = found == np.where(gdal == 255, MISSING, gdal.astype(np.int64))
    assert same.mean() > 0.999  # a centre on the edge of two pixels may fall to either
    for part in tile(GRID.shape, 17):
        np.testing.assert_array_equal(read(path, part=part), found[part.slices])


def test_a_raster_much_finer_than_the_grid_is_read_in_parts(tmp_path, monkeypatch):
    values = RNG.integers(0, 9, (600, 720)).astype(np.int16)
    path = written(tmp_path / "a.tif", values, Affine(STEP / 10, 0, LEFT, 0, -STEP / 10, TOP))
    monkeypatch.setattr("aeheight.sources.classes._MOST", 5000)
    np.testing.assert_array_equal(read(path), values[5::10, 5::10])


def test_of_rasters_that_overlap_the_first_valid_pixel_counts(tmp_path):
    first = np.full((60, 72), 1, np.uint8)
    first[:, 40:] = 0
    one = written(tmp_path / "a.tif", first, nodata=0)
    two = written(tmp_path / "b.tif", np.full((60, 72), 2, np.uint8))
    np.testing.assert_array_equal(read(one, two), np.where(first == 1, 1, 2))


def test_what_is_no_raster_of_classes_is_refused(tmp_path):
    floats = written(tmp_path / "f.tif", np.zeros((60, 72), np.float32))
    bands = written(tmp_path / "b.tif", np.zeros((2, 60, 72), np.uint8))
    below = written(tmp_path / "n.tif", np.full((60, 72), -5, np.int16))
    plain = written(tmp_path / "p.tif", np.zeros((60, 72), np.uint8), nodata=3)
    far = written(tmp_path / "far.tif", np.zeros((9, 9), np.uint8),
                  Affine(STEP, 0, LEFT + 9e4, 0, -STEP, TOP))  # fmt: skip
    for path, more, words in (
        (floats, {}, "classes.land: .*float32, and classes are whole numbers"),
        (bands, {}, "2 bands"),
        (below, {}, "4320 pixels are of class -5.*name it in `nodata`"),
        (plain, {"nodata": 4}, "declares 3 as its missing-value, `nodata` says 4"),
        (far, {}, "none of its 1 rasters touches the grid"),
        (tmp_path / "gone.tif", {}, "names no raster"),
    ):
        with pytest.raises(InputError, match=words):
            read(path, **more)
    assert (read(below, nodata=-5) == MISSING).all()


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ({"slope": {"href": "a.tif"}}, "'slope' is one of the report's own tables"),
        ({"land": {"hrf": "a.tif"}}, "evaluate.classes.land.hrf: unknown key; did you mean 'href'"),
        ({"Land use": {"href": "a.tif"}}, "evaluate.classes"),
    ],
)
def test_settings_of_classes_are_checked(regions, classes, words):
    path = regions.write("x", evaluate={"classes": classes}).path
    with pytest.raises(InputError, match=words):
        load_region(path)


def test_a_class_beyond_what_can_be_counted_is_refused(tmp_path):
    """Numbers of classes and uses share 32 bits: beyond, one class would pass for another."""
    values = np.zeros(GRID.shape, np.uint32)
    values[2, 3], values[4, 5] = LARGEST, 600_000_000
    path = written(tmp_path / "far.tif", values)
    assert read(path, part=Region(2, 3, 1, 1)) == LARGEST
    with pytest.raises(InputError, match="1 pixels are of class 600000000; classes are 0 to 26"):
        read(path)


def test_maps_of_classes_travel_and_know_their_files(tmp_path):
    path = written(tmp_path / "a.tif", np.ones((60, 72), np.uint8))
    maps = ClassMaps.scan(wanted(path), [GRID])
    again = ClassMaps.from_bytes(maps.to_bytes())
    assert again.files == {"land": [str(path)]}
    assert (again.read(GRID, Region(3, 4, 5, 6))["land"] == 1).all()


def test_the_report_by_land_cover_whatever_the_cut(
    aeheight, regions, small_run, world, scheduler, tmp_path
):
    """Rows by class, relief and height are those of numpy on whole arrays, for another cut too."""
    rng = np.random.default_rng(8)
    land = np.kron(rng.integers(1, 4, (32, 32)), np.ones((8, 8))).astype(np.uint8)
    west, _, _, north = world.bounds
    path = written(tmp_path / "land.tif", land, Affine(10, 0, west, 0, -10, north), world.crs, 3)
    names = {1: "forest", 9: "nowhere"}
    changes = {"land": {"href": str(path), "names": names}}
    cut = regions.write("cut", cube={"shard": 96}, evaluate={"classes": changes})
    trained = ("--checkpoint", small_run.store, "--scheduler", scheduler)
    assert aeheight("run", cut.path, *trained).code == 0
    cube, metrics = arrays(cut.cube), cut.metrics()
    predicted = arrays(cut.heights)["height"][0]
    rows = metrics["by"]["land"]
    assert {row["class"] for row in rows} == {"forest", "class 2", "nowhere"}
    assert {row["n"] for row in rows if row["class"] == "nowhere"} == {0}
    for row in (row for row in rows if row["class"] != "nowhere"):
        judged = (land == (1 if row["class"] == "forest" else 2)) & ~np.isnan(cube["height"])
        judged &= (cube["split"] == SPLITS.get(row["split"])) | (row["split"] == "all")
        same_metrics(row, numpy_metrics(predicted[judged], cube["height"][judged]))
    for name, rows in small_run.metrics()["by"].items():
        if name == "distance":  # of a model trained elsewhere it says nothing
            assert name not in metrics["by"]
            continue
        for row, other in zip(rows, metrics["by"][name], strict=True):
            assert [row[k] for k in ("split", "lo", "hi")] == [
                other[k] for k in ("split", "lo", "hi")
            ]
            same_metrics(other, {k: v for k, v in row.items() if k not in ("split", "lo", "hi",
                                                                             "class")})  # fmt: skip
    assert metrics["provenance"]["classes"] == {"land": [str(path)]}
    page = (cut.store / "report" / "index.html").read_text()
    for words in ("forest", "nowhere", "in no class"):
        assert words in page
    # Another raster at the same place makes the sums again.
    written(path, np.full_like(land, 2), Affine(10, 0, west, 0, -10, north), world.crs, 3)
    assert aeheight("evaluate", cut.path, "--scheduler", scheduler).code == 0
    found = {row["class"] for row in cut.metrics()["by"]["land"] if row["n"]}
    assert found == {"class 2"}
    # A raster of measures is no raster of classes.
    written(path, rng.integers(0, 60_000, land.shape, np.uint16),
            Affine(10, 0, west, 0, -10, north), world.crs)  # fmt: skip
    result = aeheight("evaluate", cut.path, "--scheduler", scheduler)
    assert result.code == 1
    assert "land: " in result.out
    assert "give a raster of classes, not of measures" in result.out
    assert {row["class"] for row in cut.metrics()["by"]["land"] if row["n"]} == found
