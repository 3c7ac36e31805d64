"""The sizing table: made-up ground of the right size, and plans that grow with it."""

import math
from itertools import pairwise

import pytest
from pyproj import Geod

from tests.benchmarks.sizing import LAT, _options, size, square, table, tiles


@pytest.mark.parametrize("area", [1e3, 1e4, 1e6])
def test_a_square_has_its_area_on_the_ellipsoid(area):
    west, south, east, north = square(area)
    lons = [west + (east - west) * k / 500 for k in range(501)]  # a parallel is no geodesic
    ring = [(lon, south) for lon in lons] + [(lon, north) for lon in reversed(lons)]
    found, _ = Geod(ellps="WGS84").polygon_area_perimeter(*zip(*ring, strict=True))
    assert found / 1e6 == pytest.approx(area, rel=0.01)
    height = math.radians(north - south) * 6371
    assert height == pytest.approx(math.sqrt(area), rel=1e-6)
    assert (south + north) / 2 == pytest.approx(LAT)


def test_tiles_cover_the_square():
    west, south, east, north = square(1e6)
    made = list(tiles((west, south, east, north)))
    assert {row["utm_zone"] for row in made} == {"31N", "32N", "33N"}
    for k in range(40):
        for m in range(40):
            lon = west + (east - west) * (k + 0.5) / 40
            lat = south + (north - south) * (m + 0.5) / 40
            assert any(
                row["wgs84_west"] <= lon <= row["wgs84_east"]
                and row["wgs84_south"] <= lat <= row["wgs84_north"]
                for row in made
            )


@pytest.mark.slow
def test_figures_grow_with_the_area(tmp_path):
    areas = (400.0, 1600.0)
    sized = [size(tmp_path / str(area), area) for area in areas]
    for one in sized:
        assert one.area * 1e4 <= one.pixels  # whole shards: a little more than was asked for
        assert one.plans["ingest"]["covered_by_tiles"][2024] == 1
        assert one.plans["predict"]["layers"] == ["height", "novelty", "spread"]
        assert one.plans["ingest"]["pending"] == one.plans["ingest"]["shards"]
        assert one.plans["predict"]["shards"] == one.plans["evaluate"]["shards"]
    for small, large in pairwise(sized):
        assert small.pixels < large.pixels
        assert small.cube_bytes < large.cube_bytes
        for step in ("ingest", "predict", "evaluate"):
            memory = [one.plans[step]["peak_worker_bytes"] for one in (small, large)]
            assert memory[0] == memory[1]  # law 10: no area makes a task larger
    told = table(sized, _options([])), table(sized, _options(["--price-gpu-hour", "2"]))
    assert "400 km² | 1,600 km²" in told[0]
    assert ["money" in text for text in told] == [False, True]
    half = table(sized, _options(["--gpu-pixels-per-second", "2.5e6"]))
    assert "at 2.5 Mpx/s" in half
