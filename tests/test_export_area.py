"""Plain GeoTIFFs of a small area."""

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from pyproj import CRS, Transformer

from tests.runs import arrays, flip, one_message, run_here, snapshot
from tests.test_calibrate import EAST, GRID, WEST, Map, make_map
from tests.test_export_kept import raise_heights
from tests.test_export_step import SMALL, files

LAYERS = {"height", "novelty", "spread", "reference", "difference"}


@pytest.fixture(scope="module")
def workers(scheduler):
    """Where the commands of this file compute."""
    return "--scheduler", scheduler


@pytest.fixture
def made(tmp_path) -> Map:
    """A map with a reference, not exported yet."""
    return make_map(tmp_path, reference=True)


def corners(rows: tuple[int, int], cols: tuple[int, int], grid=GRID) -> list[list[float]]:
    """The outline of some pixels in degrees, closed."""
    to_degrees = Transformer.from_crs(grid.crs, 4326, always_xy=True)
    x = [grid.left + col * grid.resolution for col in cols]
    y = [grid.top - row * grid.resolution for row in rows]
    ring = [(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1]), (x[0], y[0])]
    return [list(to_degrees.transform(*corner)) for corner in ring]


def bounds(rows: tuple[int, int], cols: tuple[int, int], grid=GRID) -> list[float]:
    lon, lat = np.array(corners(rows, cols, grid)).T
    return [lon.min(), lat.min(), lon.max(), lat.max()]


def area(value: object) -> tuple[str, str]:
    return "--set", f"export.area={json.dumps(value)}"


def test_bounds_are_the_pixels_that_they_touch(made, workers):
    box = bounds((40, 90), (100, 170))
    result = run_here("export", made.region.path, *workers, *area(box))
    assert result.code == 0, result.err
    assert str(made.region.store / "export" / "area") in result.out
    paths = files(made.region, "area/utm10n/2022/*.tif")
    assert {path.name.split("-")[0] for path in paths} == LAYERS
    heights = arrays(made.region.heights)["height"][1]
    for path in paths:
        with rasterio.open(path) as found:
            row = round((GRID.top - found.transform.f) / 10)
            col = round((found.transform.c - GRID.left) / 10)
            # Bounds in degrees are askew on the grid: a pixel or so more on every side.
            assert 37 <= row <= 40
            assert 97 <= col <= 100
            assert 90 <= row + found.height <= 93
            assert 170 <= col + found.width <= 173
            assert found.overviews(1) == []
            assert found.profile["tiled"]
            assert found.profile["compress"] == "deflate"
            assert np.isnan(found.nodata)
            values, crs = found.read(1), CRS.from_wkt(found.crs.to_wkt())
        if "height" in path.name:
            cut = heights[row : row + values.shape[0], col : col + values.shape[1]]
            np.testing.assert_array_equal(values, cut)
            assert [part.to_epsg() for part in crs.sub_crs_list] == [32610, 5773]
    assert not (made.region.store / "export" / "collection.json").exists()


def test_a_polygon_has_nothing_outside(made, workers):
    ring = corners((30, 90), (100, 170))
    del ring[1]  # a triangle: the north-eastern corner is left out
    shape = {"type": "Polygon", "coordinates": [ring]}
    path = made.region.path.parent / "triangle.geojson"
    path.write_text(json.dumps(shape))
    result = run_here("export", made.region.path, *workers, *area("triangle.geojson"))
    assert result.code == 0, result.err
    (found,) = files(made.region, "area/utm10n/2021/height-*.tif")
    with rasterio.open(found) as opened:
        values = opened.read(1)
        rows, cols = np.indices(values.shape)
        x = opened.transform.c + 10 * (cols + 0.5)
        y = opened.transform.f - 10 * (rows + 0.5)
    west, north, width, height = GRID.left + 1000, GRID.top - 300, 700, 600
    inside = (x > west) & (y > north - height) & ((x - west) / width < (north - y) / height)
    assert (np.isfinite(values) == inside).mean() > 0.995
    assert 0.4 < np.isfinite(values).mean() < 0.6


def test_it_stands_beside_a_whole_export(made, workers):
    assert run_here("export", made.region.path, *SMALL, *workers).code == 0
    before = snapshot(made.region.store / "export")
    first, second = bounds((40, 90), (100, 170)), bounds((0, 20), (0, 20))
    for box in (first, second):
        assert run_here("export", made.region.path, *workers, *area(box)).code == 0
    after = snapshot(made.region.store / "export")
    assert {key: after[key] for key in before} == before
    # The second lies where the reference begins only later.
    assert len(after) - len(before) == 2 * (5 + 3)
    again = run_here("export", made.region.path, *workers, *area(first))
    assert "0 shards done in 0.0 s, 2 done before" in again.out
    packed = ("--set", "export.compress=zstd")
    changed = run_here("export", made.region.path, *workers, *area(first), *packed)
    assert "2 shards done" in changed.out
    assert run_here("verify", made.region.path, *workers).code == 0
    assert "12 of 12 tiles" in run_here("status", made.region.path, *SMALL).out
    assert run_here("export", made.region.path, *SMALL, *workers, "--overwrite").code == 0
    assert not files(made.region, "area/**/*.tif")
    assert run_here("verify", made.region.path, *workers).code == 0


def test_the_plan_says_its_size(made):
    box = bounds((40, 90), (100, 170))
    before = snapshot(made.region.store)
    result = run_here("export", made.region.path, "--plan", "--json", *area(box))
    plan = json.loads(result.out)
    assert plan["files"] == 10
    (size,) = plan["area"]
    assert size.startswith("utm10n 5")
    assert snapshot(made.region.store) == before


def test_damage_is_found_and_mended_where_the_area_is_known(made, workers):
    wanted = area(bounds((40, 90), (100, 170)))
    assert run_here("export", made.region.path, *workers, *wanted).code == 0
    path = files(made.region, "area/utm10n/2021/height-*.tif")[0]
    data = path.read_bytes()
    flip(path)
    found = run_here("verify", made.region.path, *workers)
    assert found.code == 1
    assert path.name in found.out
    mended = run_here("verify", made.region.path, *workers, "--repair", *wanted)
    assert mended.code == 0, mended.err
    assert path.read_bytes() == data
    flip(path)
    removed = run_here("verify", made.region.path, *workers, "--repair")
    assert removed.code == 1
    assert "run aeheight export with its export.area again" in removed.out
    assert not path.exists()


def test_another_area_is_not_the_damaged_one(made, workers):
    """The region file names another by now: repair must not delete one and report success."""
    first, second = area(bounds((40, 90), (100, 170))), area(bounds((0, 20), (0, 20)))
    assert run_here("export", made.region.path, *workers, *first).code == 0
    path = files(made.region, "area/utm10n/2021/height-*.tif")[0]
    flip(path)
    result = run_here("verify", made.region.path, *workers, "--repair", *second)
    assert result.code == 1
    assert "removed utm10n/area/2021/" in result.out
    assert "with its export.area again" in result.out


def test_areas_of_a_map_that_has_changed_are_dropped(made, workers, caplog):
    """One shard is made anew: the area over it goes, and is named; the one beside it stays."""
    over, beside, new = (bounds(r, c) for r, c in (((5, 30), (5, 30)), ((100, 120), (150, 180)),
                                                    ((130, 140), (10, 30))))  # fmt: skip
    for box in (over, beside):
        assert run_here("export", made.region.path, *workers, *area(box)).code == 0
    names = {path.name for path in files(made.region, "area/**/height-*.tif")}
    raise_heights(made.region, "utm10n")  # rows and columns 0 to 63 of 2021
    result = run_here("export", made.region.path, *workers, *area(new))
    assert result.code == 0, result.err
    assert "removed the files of 1 shards of earlier areas" in caplog.text
    left = files(made.region, "area/**/height-*.tif")
    assert len(names) == 2
    assert sorted(path.parent.name for path in left if path.name in names) == [
        "2021",
        "2022",
        "2022",
    ]
    assert run_here("verify", made.region.path, *workers).code == 0
    again = run_here("export", made.region.path, *workers, *area(over))
    assert "1 shards done" in again.out
    assert caplog.text.count("removed") == 1


def test_two_zones_have_files_of_their_own(tmp_path, workers):
    made = make_map(tmp_path, grids=(WEST, EAST))
    box = [-120.2, 38.57, -119.8, 38.6]
    assert run_here("export", made.region.path, *workers, *area(box)).code == 0
    found = {path.parts[-3] for path in files(made.region, "area/*/2021/height-*.tif")}
    assert found == {"utm10n", "utm11n"}


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ([10.0, 45.0, 10.1, 45.1], ["misses the region", "[10.0, 45.0, 10.1, 45.1]", "-122.5"]),
        ([3.0, 45.0, 2.0, 44.0], ["is no area in degrees", "export.area"]),
        ("none.geojson", ["export.area", "none.geojson", "no GeoJSON"]),
    ],
)
def test_what_is_no_area_of_the_map(made, wanted, words):
    for plan in (["--plan"], []):
        result = run_here("export", made.region.path, *plan, *area(wanted))
        assert result.code == 2
        one_message(result.err, *words)
    assert not Path(made.region.store / "export").exists()


def test_a_large_area_is_for_cogs(made, monkeypatch):
    monkeypatch.setattr("aeheight.steps.area._LARGEST", 60)
    result = run_here("export", made.region.path, *area(bounds((40, 90), (100, 170))))
    assert result.code == 2
    one_message(result.err, "small areas", "60 px an edge", "COGs")
