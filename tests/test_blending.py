"""A mosaic over zones: heights, weights, and that the cut does not matter."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Transformer

from aeheight.blending import Mosaic, mosaic_grid
from aeheight.errors import InputError
from aeheight.grid import Grid
from aeheight.windows import Region, whole

WEST = Grid("EPSG:32610", 100.0, 750000.0, 4280000.0, (120, 170))
EAST = Grid("EPSG:32611", 100.0, 230000.0, 4280000.0, (120, 120))
REACH = 2000.0
STEP = 10.0
"""By how much the eastern zone's heights are above the western's, metres."""


def plane(crs: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """True heights anywhere, metres: a plane in degrees."""
    lon, lat = Transformer.from_crs(crs, 4326, always_xy=True).transform(x, y)
    return 500 + 800 * (lon + 120) - 600 * (lat - 38.6)


def heights_of(zone: Grid) -> np.ndarray:
    found = plane(zone.crs, *np.meshgrid(zone.x(), zone.y()))
    return (found + STEP * (zone == EAST)).astype(np.float32)


ARRAYS = {zone.name: heights_of(zone) for zone in (WEST, EAST)}


def read(zone: Grid, region: Region, arrays=ARRAYS) -> np.ndarray:
    out = np.full(region.shape, np.nan, np.float32)
    inside = region.intersect(whole(zone.shape))
    if inside:
        out[inside.within(region).slices] = arrays[zone.name][inside.slices]
    return out


def mosaic(crs: str, resolution: float | None = None) -> Mosaic:
    return Mosaic(mosaic_grid((WEST, EAST), crs, resolution), (WEST, EAST), REACH)


def degrees(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    to_degrees = Transformer.from_crs(grid.crs, 4326, always_xy=True)
    return to_degrees.transform(*np.meshgrid(grid.x(), grid.y()))


@pytest.mark.parametrize("crs", ["EPSG:3310", "EPSG:4326", "EPSG:3857"])
def test_heights_go_from_one_zone_to_the_other_in_a_line(crs):
    """Every pixel against the plane, plus the step times a weight from longitude alone."""
    made = mosaic(crs)
    found = made.read(whole(made.grid.shape), read)
    lon, lat = degrees(made.grid)
    east = (lon + 120) * np.cos(np.radians(lat)) * 111_320
    there = {}
    for zone in (WEST, EAST):
        x, y = Transformer.from_crs(4326, zone.crs, always_xy=True).transform(lon, lat)
        rows, cols = (zone.top - y) / 100, (x - zone.left) / 100
        there[zone] = (rows > 1) & (cols > 1) & (rows < 119) & (cols < zone.shape[1] - 1)
    both = there[WEST] & there[EAST]
    assert both.sum() > 1000
    expected = plane("EPSG:4326", lon, lat) + STEP * np.clip(0.5 + east / (2 * REACH), 0, 1)
    np.testing.assert_allclose(found[both], expected[both], atol=0.02)
    only = there[WEST] & (east < -REACH)
    np.testing.assert_allclose(found[only], plane("EPSG:4326", lon, lat)[only], atol=0.02)
    steps = np.abs(np.diff(found - plane("EPSG:4326", lon, lat), axis=1))[both[:, 1:]]
    assert np.nanmax(steps) < STEP * 100 / (2 * REACH) * 1.7  # of one pixel, in any direction


def test_one_zone_alone_serves_where_the_other_has_nothing():
    arrays = ARRAYS | {EAST.name: np.full_like(ARRAYS[EAST.name], np.nan)}
    made = mosaic("EPSG:3310")
    found = made.read(whole(made.grid.shape), partial(read, arrays=arrays))
    lon, lat = degrees(made.grid)
    known = np.isfinite(found)
    # Also past the reach: what is there is shown.
    assert (known & (lon > -120 + REACH / 80_000)).any()
    inner = known.copy()  # at the rim a pixel has neighbours on one side only
    for axis in (0, 1):
        inner &= np.roll(known, 2, axis) & np.roll(known, -2, axis)
    np.testing.assert_allclose(found[inner], plane("EPSG:4326", lon, lat)[inner], atol=0.02)


def test_a_mosaic_of_one_zone_in_its_own_crs_is_that_zone():
    made = Mosaic(mosaic_grid((WEST,), WEST.crs, None), (WEST,), REACH)
    assert made.grid == WEST
    np.testing.assert_array_equal(made.read(whole(WEST.shape), read), ARRAYS[WEST.name])


WHOLE = mosaic("EPSG:3310")
EVERY = WHOLE.read(whole(WHOLE.grid.shape), read)


@settings(max_examples=25, deadline=None)
@given(
    row=st.integers(0, 100), col=st.integers(0, 150), height=st.integers(1, 60),
    width=st.integers(1, 60),
)  # fmt: skip
def test_bits_do_not_depend_on_the_cut(row, col, height, width):
    region = Region(row, col, height, width).intersect(whole(WHOLE.grid.shape))
    assert region is not None
    np.testing.assert_array_equal(WHOLE.read(region, read), EVERY[region.slices])


@settings(max_examples=25, deadline=None)
@given(row=st.integers(0, 100), col=st.integers(0, 150))
def test_all_that_is_read_is_told(row, col):
    region = Region(row, col, 40, 40).intersect(whole(WHOLE.grid.shape))
    assert region is not None
    told = {zone.name: part for zone, part in WHOLE.touched(region)}

    def needed(zone: Grid, part: Region) -> np.ndarray:
        values, kept = read(zone, part), np.full(part.shape, np.nan, np.float32)
        inside = told[zone.name].intersect(part) if zone.name in told else None
        if inside:
            kept[inside.within(part).slices] = values[inside.within(part).slices]
        return kept

    np.testing.assert_array_equal(WHOLE.read(region, needed), EVERY[region.slices])


def test_neighbours_meet_at_the_equator_too():
    """Four zones around one corner: the weights of all add up, and nothing leaps."""
    grids = tuple(
        Grid(f"EPSG:32{6 + south}{zone}", 100.0, left, top, (60, 60))
        for zone, left in ((31, 830_900.0), (32, 163_000.0))
        for south, top in ((0, 3_000.0), (1, 10_003_000.0))
    )
    made = Mosaic(mosaic_grid(grids, "EPSG:3857", None), grids, REACH)
    level = {grid.name: 100.0 * number for number, grid in enumerate(grids)}
    found = made.read(
        whole(made.grid.shape), lambda zone, part: np.full(part.shape, level[zone.name], np.float32)
    )
    lon, lat = degrees(made.grid)
    share_east = np.clip(0.5 + (lon - 6) * np.cos(np.radians(lat)) * 111_320 / (2 * REACH), 0, 1)
    share_south = np.clip(0.5 - lat * 111_320 / (2 * REACH), 0, 1)
    expected = 200 * share_east + 100 * share_south
    middle = (np.abs(lon - 6) < 0.02) & (np.abs(lat) < 0.02)
    assert middle.sum() > 100
    np.testing.assert_allclose(found[middle], expected[middle], atol=0.1)


@pytest.mark.parametrize(
    ("crs", "words"),
    [("EPSG:99999", "PROJ does not know"), ("EPSG:5773", "no horizontal CRS"),
     ("EPSG:4979", "no horizontal CRS")],
)  # fmt: skip
def test_a_crs_that_is_no_map_is_refused(crs, words):
    with pytest.raises(InputError, match=words):
        mosaic_grid((WEST, EAST), crs, None)


def test_a_mosaic_around_the_world_is_refused():
    left = Grid("EPSG:32660", 100.0, 700_000.0, 4_280_000.0, (50, 900))
    with pytest.raises(InputError, match="180th meridian"):
        mosaic_grid((left,), "EPSG:4326", None)


def test_a_mosaic_of_too_many_pixels_is_refused():
    """Both counts are told, and the resolution that the zones have."""
    words = r"would have .* pixels, and the map has 3.48e\+04; name an export.resolution of 100 or"
    with pytest.raises(InputError, match=words):
        mosaic_grid((WEST, EAST), "EPSG:32610", 1e-9)
    coarse = mosaic_grid((WEST, EAST), "EPSG:3310", 100.0).shape
    ground = WEST.shape[0] * WEST.shape[1] + EAST.shape[0] * EAST.shape[1]
    most = 10 * (ground / (coarse[0] * coarse[1])) ** 0.5
    with pytest.raises(InputError, match="pixels"):
        mosaic_grid((WEST, EAST), "EPSG:3310", 100 / (most * 1.02))
    mosaic_grid((WEST, EAST), "EPSG:3310", 100 / (most * 0.98))


def test_the_ground_of_another_planet_is_refused():
    with pytest.raises(InputError, match="cannot be shown in IAU_2015:30100"):
        mosaic_grid((WEST,), "IAU_2015:30100", None)
